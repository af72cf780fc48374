"""The head step alone, at the shapes of real targets: grouped against the full head, and against what memory allows.

Weights are random, so that any machine can run it; which groups the random router picks does not matter, only that they
are scattered. Axes: N row, D hidden, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from coral_core.grouping.cost import time_calls
from coral_core.head.groups import Groups
from coral_core.head.heads import FullHead, GroupedHead, Router
from coral_core.lent import Lent

SHAPES = {"llama-2-7b": (32000, 4096), "llama-3-8b": (128256, 4096), "qwen2.5-7b": (152064, 3584)}
GROUPS = 256
SHARES = (4, 8, 16)
ROWS = (1, 10)
READ_BYTES = 1 << 28


def measure(devices: list[str], shapes: list[str]) -> Iterator[dict[str, Any]]:
    """One row per device, dtype, shape, number of rows, and head."""
    for device in map(torch.device, devices):
        for dtype in (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16,):
            for name in shapes:
                for row in _shape(device, dtype, *SHAPES[name]):
                    yield {"part": "micro", "device": device.type, "dtype": str(dtype)[6:], "shape": name, **row}


@torch.no_grad()
def _shape(device: torch.device, dtype: torch.dtype, vocabulary: int, hidden: int) -> Iterator[dict[str, Any]]:
    """All heads in turns, with two ways to read memory: neighbours on the machine slow all of them alike."""
    torch.manual_seed(0)
    some_ND = torch.randn(997, hidden, device=device, dtype=dtype) / hidden**0.5
    head_VD = some_ND.repeat(-(-vocabulary // 997), 1)[:vocabulary].contiguous()
    lent = Lent(head_VD, head_VD)
    full, parts = FullHead(lent), dict(_grouped(lent))
    reads = _reads(device)
    for rows in ROWS:
        hidden_ND = torch.randn(rows, hidden, device=device, dtype=dtype)
        calls = [partial(_step, head, hidden_ND) for head in (full, *parts.values())]
        seconds = time_calls([*reads, *calls], device, repeats=9)
        per_s = READ_BYTES / min(seconds[: len(reads)])
        full_s, *part_s = seconds[len(reads) :]
        yield _row("full", 1, rows, full_s, head_VD.nbytes / per_s, None) | {"bandwidth_bytes_per_s": per_s}
        for (inner, share), head, spent_s in zip(parts, parts.values(), part_s, strict=True):
            router_bytes = sum(weight.nbytes for weight in head.router.parameters())
            read_bytes = head.start_G[head.active] * hidden * head_VD.element_size() + router_bytes
            name = "grouped, the paper's router" if inner else "grouped"
            yield _row(name, share, rows, spent_s, read_bytes / per_s, full_s)


def _grouped(lent: Lent) -> Iterator[tuple[tuple[bool, int], GroupedHead]]:
    """By the router's form and the share of rows; one copy of the rows serves all."""
    vocabulary, hidden = lent.head_VD.shape
    first = GroupedHead(lent, Groups.from_order(torch.arange(vocabulary), GROUPS), Router(hidden, GROUPS), 1)
    for inner in (False, True):
        router = Router(hidden, GROUPS, inner=inner).to(lent.head_VD.device, lent.head_VD.dtype)
        for share in SHARES:
            head = copy.copy(first)
            head.router, head.active = router, GROUPS // share
            yield (inner, share), head


def _reads(device: torch.device) -> list[Callable[[], object]]:
    """Readings of READ_BYTES from memory, of which the faster one says what a byte costs: the largest element of a
    buffer, and a matrix times one vector."""
    buffer_ND = torch.zeros(READ_BYTES // 4 // 4096, 4096, device=device)
    vector_D = torch.zeros(4096, device=device)
    return [buffer_ND.amax, partial(torch.mv, buffer_ND, vector_D)]


def _step(head: Any, hidden_ND: torch.Tensor) -> None:
    head.candidates(hidden_ND).best(10)


def _row(head: str, share: int, rows: int, seconds: float, floor_s: float, full_s: float | None) -> dict[str, Any]:
    found = {"head": head, "share": share, "rows": rows, "ms": seconds * 1e3, "floor_ms": floor_s * 1e3}
    found["over_floor"] = seconds / floor_s
    return found | ({"of_full": seconds / full_s} if full_s else {})
