"""The pieces of decoding as calls that can be timed in turns, and the machine's floor under each of them.

A step reads every weight of the target's layers, its LM head, and the cached rows: what it cannot beat is those bytes
over the speed at which this machine reads as many bytes again and again, or its multiplications over the machine's
rate, whichever takes longer. Both speeds are measured in the same run. Where the bytes fit a cache, the floor is the
cache's.
Axes: T position, M tree row, D hidden, V vocabulary, X any axes.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from coral_core.decoding.drafting import Drafting
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.rounds import Clock, Round
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.seat import Memory
from coral_core.decoding.step import prefill
from coral_core.decoding.tree import Draft
from coral_core.drafter.model import Drafter
from coral_core.head.heads import GroupedHead, Head
from coral_core.target.target import Target

LEVELS = 4
"""Draft levels of which one is the mean."""
LARGEST_BYTES = 1 << 32
"""Of the buffer that tells the bandwidth."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What one device does at most, in one dtype."""

    bytes_per_s: float
    flops_per_s: float

    def floor_s(self, read_bytes: float, flops: float) -> float:
        """What reading and multiplying so much takes at least, the two side by side."""
        return max(read_bytes / self.bytes_per_s, flops / self.flops_per_s)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def in_turns(calls: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each call, one after the other, `repeats` times after two that do not count."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 2):
        for name, call in calls.items():
            wait(device)
            begun_s = time.perf_counter()
            call()
            wait(device)
            if turn >= 2:
                spent[name].append(time.perf_counter() - begun_s)
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


def measure_machine(device: torch.device, dtype: torch.dtype, read_bytes: int) -> Machine:
    """The fastest reading and multiplying that PyTorch offers here."""
    size_bytes = min(max(read_bytes, 1 << 23), LARGEST_BYTES)
    buffer_XX = torch.ones(size_bytes // 4096, 1024, device=device)
    ones_X = torch.ones(1024, device=device)
    side = 8192 if device.type == "cuda" else 1024
    square_XX = torch.ones(side, side, device=device, dtype=dtype)
    reads: dict[str, Callable[[], object]] = {"amax": buffer_XX.amax, "mv": lambda: buffer_XX.mv(ones_X)}
    read_s = min(in_turns(reads, device, 15).values())
    (product_s,) = in_turns({"mm": lambda: square_XX @ square_XX}, device, 15).values()
    return Machine(buffer_XX.nbytes / read_s, 2 * side**3 / product_s)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a forward of the target, or a draft level, must read and multiply."""

    weights: int
    """Numbers in the weights that are read."""
    row_flops: float
    """Of attention, per new row and cached one."""
    cached_bytes: int
    item_bytes: int

    def read_bytes(self) -> int:
        return self.weights * self.item_bytes + self.cached_bytes

    def flops(self, rows: int, context: int) -> float:
        return 2 * rows * self.weights + rows * context * self.row_flops


def target_work(target: Target, context: int) -> Work:
    """Of one forward and its logits; looking up embeddings reads next to nothing."""
    config = target.model.config.get_text_config()
    weights = sum(weight.numel() for weight in target.model.base_model.parameters())
    embedding, head = target.lent.embed_VD.numel(), target.lent.head_VD.numel()
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    item_bytes = target.dtype.itemsize
    cached_bytes = 2 * layers * kv_heads * width * context * item_bytes
    return Work(weights - embedding + head, 4 * layers * heads * width, cached_bytes, item_bytes)


def level_work(parts: "Parts", head: Head) -> Work:
    """Of one draft level."""
    config, rows = parts.drafter.config, parts.target.lent.head_VD.shape[0]
    weights = sum(weight.numel() for weight in parts.drafter.parameters())
    if isinstance(head, GroupedHead):
        weights += sum(weight.numel() for weight in head.router.parameters())
        rows = head.start_G[head.active]
    item_bytes = parts.target.dtype.itemsize
    cached_bytes = 2 * config.num_key_value_heads * config.head_dim * parts.context * item_bytes
    row_flops = 4 * config.num_attention_heads * config.head_dim
    return Work(weights + rows * config.hidden_size, row_flops, cached_bytes, item_bytes)


class Parts:
    """A target, its drafter and heads, behind `context` tokens."""

    def __init__(
        self, target: Target, drafter: Drafter, heads: dict[str, Head], shape: TreeShape, context: int
    ) -> None:
        self.target, self.drafter, self.heads, self.shape, self.context = target, drafter, heads, shape, context
        generator = torch.Generator().manual_seed(0)
        vocabulary = target.lent.embed_VD.shape[0]
        self.prompt = torch.randint(vocabulary, (context,), generator=generator).tolist()
        self.prompt_T = torch.tensor(self.prompt, device=target.device)
        self.lasting = dataclasses.replace(target, stop_ids=frozenset())
        self._running: dict[str, Iterator[Round]] = {}

    def verify(self, sizes: Sequence[int]) -> dict[str, Callable[[], object]]:
        """The target over N rows of a tree, the token at each of them, and the cache cut again."""
        target, memory, forwards = self.target, Memory(self.target), Engine(self.target).forwards
        memory.cache.reserve(forwards.capacity(self.context, max(sizes)))
        prefill(target, self.prompt_T, memory.cache)

        def call(size: int) -> None:
            _, logits_MV = forwards.verify(target, memory, self.chain(size))
            logits_MV.argmax(-1).tolist()
            memory.cache.truncate(self.context)

        return {f"verify {size}": lambda size=size: call(size) for size in sizes}  # type: ignore[misc]

    def chain(self, rows: int) -> Draft:
        """Nodes one below the other."""
        depth_M = torch.arange(rows, device=self.target.device)
        return Draft(
            token_M=self.prompt_T.repeat(-(-rows // self.context))[:rows],
            parent_M=(depth_M - 1).clamp_min(0),
            depth_M=depth_M,
            sees_MM=depth_M[:, None] >= depth_M,
            score_M=torch.zeros(rows, device=self.target.device),
            levels=rows - 1,
        )

    def level(self, name: str, width: int) -> dict[str, Callable[[], object]]:
        """Drafts of one level and of 1 + LEVELS, `width` nodes expanded on each; `level_s` is their difference."""
        memory = Memory(self.target)
        memory.slots.reserve(self.context + (1 + LEVELS) * width)
        engine = Engine(self.target, self.drafter, self.heads[name])
        found: dict[str, Callable[[], object]] = {}
        generator = torch.Generator().manual_seed(0)
        hidden = self.drafter.config.hidden_size
        feature_TD = torch.randn(self.context, hidden, generator=generator).to(self.target.device, self.target.dtype)
        for depth in (1, 1 + LEVELS):
            shape = TreeShape(depth=depth, nodes=1, topk=width)
            drafting = engine.drafting(shape, memory)
            assert drafting is not None
            if memory.slots.length == 0:
                drafting.feed(self.prompt_T[:-1], feature_TD[:-1])

            def call(drafting: Drafting = drafting) -> None:
                drafting.draft(self.prompt_T[-1:], feature_TD[-1:], Sampler(), Clock())
                memory.slots.truncate(self.context - 1)

            found[f"draft {name} {width} x {depth}"] = call
        return found

    def level_s(self, seconds: dict[str, float], name: str, width: int) -> float:
        """One level's seconds, from those of the two drafts."""
        flat_s, deep_s = (seconds[f"draft {name} {width} x {depth}"] for depth in (1, 1 + LEVELS))
        return (deep_s - flat_s) / LEVELS

    def steps(self) -> dict[str, Callable[[], object]]:
        """One step of the plain loop, and one round with each head, as their callers see them."""
        engines = {
            f"round {name}": Engine(self.lasting, self.drafter, self.heads[name], self.shape) for name in self.heads
        }

        def begin(name: str) -> Iterator[Round]:
            most = self.target.max_positions - self.context
            if name == "plain step":
                return plain(self.lasting, self.prompt, Sampler(), most)
            return engines[name].decode(self.prompt, Sampler(), most)

        def step(name: str) -> None:
            if name not in self._running:
                self._running[name] = begin(name)
                next(self._running[name])  # the prefill
            next(self._running[name])

        return {name: lambda name=name: step(name) for name in ("plain step", *engines)}  # type: ignore[misc]


def floor_row(seconds: float, floor_s: float) -> dict[str, Any]:
    """How a time and its floor stand in a row."""
    return {"ms": 1e3 * seconds, "floor_ms": 1e3 * floor_s, "over_floor": seconds / floor_s}
