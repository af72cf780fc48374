"""What verifying N nodes costs, in plain steps and over the machine's floor; what a draft level costs beside it."""

from collections.abc import Iterator
from typing import Any

from benchmarks.decode_steps import Parts, floor_row, in_turns, level_work, measure_machine, target_work

SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Rows of a verification, the root included."""
WIDTHS = (1, 4)
"""Nodes expanded on a draft level."""
CONTEXT = 256


def measure(parts: Parts, repeats: int, sizes: tuple[int, ...] = SIZES) -> Iterator[dict[str, Any]]:
    """A row per number of nodes, then one per draft level, of one target in one dtype."""
    target, dtype = parts.target, str(parts.target.dtype).removeprefix("torch.")
    work = target_work(target, parts.context)
    machine = measure_machine(target.device, target.dtype, work.read_bytes())
    calls = parts.verify(sizes)
    for name in parts.heads:
        for width in WIDTHS:
            calls |= parts.level(name, width)
    seconds = in_turns(calls, target.device, repeats)
    one_s = seconds[f"verify {sizes[0]}"]
    shared = {"part": "cost", "dtype": dtype, "context": parts.context}
    speeds = {"bytes_per_s": machine.bytes_per_s, "flops_per_s": machine.flops_per_s}
    yield {**shared, "what": "machine", "read_bytes": work.read_bytes(), **speeds}
    for size in sizes:
        floor_s = machine.floor_s(work.read_bytes(), work.flops(size, parts.context))
        took_s = seconds[f"verify {size}"]
        yield {**shared, "what": "verify", "rows": size, **floor_row(took_s, floor_s), "over_one": took_s / one_s}
    for name, head in parts.heads.items():
        level = level_work(parts, head)
        for width in WIDTHS:
            floor_s = machine.floor_s(level.read_bytes(), level.flops(width, parts.context))
            took_s = parts.level_s(seconds, name, width)
            row = {**shared, "what": "draft level", "head": name, "rows": width, **floor_row(took_s, floor_s)}
            yield row | {"over_one": took_s / one_s}
