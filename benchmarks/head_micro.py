"""The head step alone, at the shapes of real targets: grouped against the full head, and against what memory allows.

Weights are random, so that any machine can run it; which groups the random router picks does not matter, only that they
are scattered. Axes: N row, D hidden, V vocabulary.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from coral_core.head.clustering import by_id
from coral_core.head.cost import time_calls
from coral_core.head.full import FullHead
from coral_core.head.grouped import GroupedHead
from coral_core.head.router import Router
from coral_core.head.static import StaticHead
from coral_core.lent import Lent

SHAPES = {"llama-2-7b": (32000, 4096), "llama-3-8b": (128256, 4096), "qwen2.5-7b": (152064, 3584)}
GROUPS = 64
SHARES = (4, 8, 16)
ROWS = (1, 10)
BANDWIDTH_BYTES = 1 << 29


def measure(devices: list[str], shapes: list[str]) -> Iterator[dict[str, Any]]:
    """One row per device, dtype, shape, number of rows, and head."""
    for device in map(torch.device, devices):
        for dtype in (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16,):
            for name in shapes:
                for row in _shape(device, dtype, *SHAPES[name]):
                    yield {"part": "micro", "device": device.type, "dtype": str(dtype)[6:], "shape": name, **row}


def bandwidth(device: torch.device) -> float:
    """Bytes per second of the fastest reading of a large buffer that PyTorch offers here: its largest element."""
    buffer_E = torch.zeros(BANDWIDTH_BYTES // 4, device=device)
    (seconds,) = time_calls([buffer_E.amax], device, repeats=7)
    return BANDWIDTH_BYTES / seconds


@torch.no_grad()
def _shape(device: torch.device, dtype: torch.dtype, vocabulary: int, hidden: int) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    some_RD = torch.randn(997, hidden, device=device, dtype=dtype) / hidden**0.5
    head_VD = some_RD.repeat(-(-vocabulary // 997), 1)[:vocabulary].contiguous()
    lent = Lent(head_VD, head_VD)
    per_s = bandwidth(device)
    # Two forms of the full head: as coral decodes with it, and packed as the grouped head's blocks are. The faster one
    # is what the others are compared with. They are measured first, so that their copies can be let go.
    full: dict[int, float] = {}
    for form, head in (("full", FullHead(lent)), ("full, packed", StaticHead(lent, torch.arange(vocabulary)))):
        for rows, seconds in _times(head, hidden, device, dtype):
            full[rows] = min(seconds, full.get(rows, seconds))
            floor_s = head_VD.nbytes / per_s
            yield _row(form, 1, rows, seconds, floor_s, None) | {"bandwidth_bytes_per_s": per_s}
    lent.__dict__.pop("_packed_VD", None)
    groups = by_id(vocabulary, GROUPS)
    for inner in (False, True):
        router = Router(hidden, GROUPS, inner=inner)
        grouped = GroupedHead(lent, groups, router, 1)
        router_bytes = sum(weight.nbytes for weight in grouped.router.parameters())
        for share in SHARES:
            grouped.active = GROUPS // share
            read_bytes = groups.start_G[grouped.active] * hidden * head_VD.element_size() + router_bytes
            for rows, seconds in _times(grouped, hidden, device, dtype):
                name = "grouped, the paper's router" if inner else "grouped"
                yield _row(name, share, rows, seconds, read_bytes / per_s, full[rows])
        del grouped


def _times(head: Any, hidden: int, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[int, float]]:
    for rows in ROWS:
        hidden_ND = torch.randn(rows, hidden, device=device, dtype=dtype)
        (seconds,) = time_calls([partial(_step, head, hidden_ND)], device, repeats=9)
        yield rows, seconds


def _step(head: Any, hidden_ND: torch.Tensor) -> None:
    head.candidates(hidden_ND).best(10)


def _row(head: str, share: int, rows: int, seconds: float, floor_s: float, full_s: float | None) -> dict[str, Any]:
    found = {"head": head, "share": share, "rows": rows, "ms": seconds * 1e3, "floor_ms": floor_s * 1e3}
    found["over_floor"] = seconds / floor_s
    return found | ({"of_full": seconds / full_s} if full_s else {})
