"""A target of Llama-3-8B's shape with random weights, and its drafter: what a round costs on a GPU, in plain steps.

Random weights cost what trained ones do and accept nothing: times are measured, acceptance is not. The speedups that
published numbers of tokens per round imply at these costs are projections, and marked so.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers

from benchmarks.decode_steps import (
    Parts,
    Work,
    floor_row,
    in_turns,
    level_work,
    measure_machine,
    target_work,
)
from benchmarks.train import LLAMA_3_8B
from coral_core.decoding import recorded as recording
from coral_core.decoding.policy.plan import TreeShape
from coral_core.drafter.config import DrafterConfig
from coral_core.drafter.model import Drafter
from coral_core.head.groups import Groups
from coral_core.head.heads import FullHead, GroupedHead, Head, Router
from coral_core.target.load import drafter_shape, wrap

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {**LLAMA_3_8B, "num_hidden_layers": 32},
    "tiny": {
        **LLAMA_3_8B,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "num_hidden_layers": 2,
    },
}
TREE = TreeShape(depth=6, nodes=60, topk=10)
"""The usual one (EAGLE-2)."""
SIZES = (1, 2, 4, 9, 21, 61)
"""Rows of a verification; 60 nodes and their root are 61."""
GROUPS, ACTIVE = 256, 32
CONTEXT = 512
PUBLISHED = {
    "EAGLE-2, Llama-3-8B": 4.52,
    "CORAL with the router": 4.63,
    "CORAL, full head": 4.90,
    "HASS, Llama-3-8B": 5.08,
}
"""Tokens per round at temperature 0."""
PAPER_SPEEDUP = (2.50, 4.07)
"""What CORAL's paper reports, over three families and three benchmarks."""


def parts(shape: str, device: torch.device, dtype: torch.dtype, recorded: bool) -> Parts:
    """Target, drafter and both heads with random weights, made on the device; with its forwards recorded or not."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPES[shape], tie_word_embeddings=False, eos_token_id=None)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        drafter = Drafter(DrafterConfig(**drafter_shape(config))).to(dtype)
        router = Router(config.hidden_size, GROUPS)
    target = dataclasses.replace(wrap(model, None), graphs=recorded)
    groups = Groups.from_order(torch.arange(config.vocab_size), GROUPS)
    grouped = GroupedHead(target.lent, groups, router, ACTIVE)
    heads: dict[str, Head] = {"full": FullHead(target.lent), "grouped": grouped}
    if grouped.fused:  # beside Triton's kernel, what serves where there is none
        bare = GroupedHead(target.lent, groups, router, ACTIVE)
        bare.fused, heads["grouped, no kernel"] = False, bare
    return Parts(target, drafter.requires_grad_(False).eval(), heads, TREE, CONTEXT)


def measure(
    shape: str, device: torch.device, dtype: torch.dtype, repeats: int, recorded: bool = False
) -> Iterator[dict[str, Any]]:
    """A row per piece, then the projections."""
    found = parts(shape, device, dtype, recorded)
    work = target_work(found.target, found.context)
    machine = measure_machine(device, dtype, work.read_bytes())
    calls = found.verify(SIZES) | found.steps()
    for name in found.heads:
        calls |= found.level(name, TREE.topk)
    seconds = in_turns(calls, device, repeats)
    dtype_name = str(dtype).removeprefix("torch.")
    shared = {"shape": shape, "device": device.type, "dtype": dtype_name, "graphs": recorded}
    speeds = {"bytes_per_s": machine.bytes_per_s, "flops_per_s": machine.flops_per_s}
    yield {**shared, "what": "machine", "read_bytes": work.read_bytes(), **speeds}

    def floor_s(part: Work, rows: int) -> float:
        return machine.floor_s(part.read_bytes(), part.flops(rows, found.context))

    plain_s = seconds["plain step"]
    yield {**shared, "what": "plain step", **floor_row(plain_s, floor_s(work, 1))}
    for size in SIZES:
        row = floor_row(seconds[f"verify {size}"], floor_s(work, size))
        yield {**shared, "what": "verify", "nodes": size - 1, **row, "over_plain": seconds[f"verify {size}"] / plain_s}
    for name, head in found.heads.items():
        level = level_work(found, head)
        level_s, round_s = found.level_s(seconds, name, TREE.topk), seconds[f"round {name}"]
        row = floor_row(level_s, floor_s(level, TREE.topk))
        yield {**shared, "what": "draft level", "head": name, **row, "over_plain": level_s / plain_s}
        least_s = floor_s(work, TREE.nodes + 1) + TREE.depth * floor_s(level, TREE.topk)
        over_plain = round_s / plain_s
        yield {**shared, "what": "round", "head": name, **floor_row(round_s, least_s), "over_plain": over_plain}
        for source, tau in PUBLISHED.items():
            row = {"head": name, "tau": tau, "tau_from": source, "speedup": tau / over_plain, "projected": True}
            yield {**shared, "what": "projection", **row, "paper_speedup": PAPER_SPEEDUP}


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the README quotes: with graphs, where they were measured."""
    rows = [row for row in rows if row["graphs"] == rows[-1]["graphs"]]
    plain = next(row for row in rows if row["what"] == "plain step")
    verify = next(row for row in rows if row["what"] == "verify" and row["nodes"] == TREE.nodes)
    rounds = {row["head"]: row for row in rows if row["what"] == "round"}
    found = {
        "plain_over_floor": plain["over_floor"],
        "verify60_over_plain": verify["over_plain"],
        "round_grouped_over_plain": rounds["grouped"]["over_plain"],
        "round_full_over_plain": rounds["full"]["over_plain"],
        "paper_speedup": list(PAPER_SPEEDUP),
    }
    projected = [row for row in rows if row["what"] == "projection"]
    for name in rounds:
        found[f"projected_speedup_{name}"] = {row["tau"]: row["speedup"] for row in projected if row["head"] == name}
    return found


def compiled(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """In place of `record`: a library's own CUDA graphs with fused kernels, its results copied to fixed places."""
    fast = torch.compile(call, mode="reduce-overhead", dynamic=False)
    out = fast()
    held = {name: tensor.clone() for name, tensor in _tensors(out)}

    def replay() -> None:
        for name, tensor in _tensors(fast()):
            held[name].copy_(tensor)

    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        return replay, dataclasses.replace(out, **held)
    return replay, tuple(held.values())


def _tensors(out: Any) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a dataclass or a tuple, by name or number."""
    named = vars(out).items() if dataclasses.is_dataclass(out) else enumerate(out)
    return [(str(name), value) for name, value in named if isinstance(value, torch.Tensor)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=("eager", "recorded", "compiled"), required=True)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3-8b")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.form == "compiled":
        recording.record = compiled
    elif options.form == "recorded" and device.type != "cuda":
        sys.exit("recorded: CUDA graphs need a GPU, and this machine has none")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for row in measure(options.shape, device, dtype, options.repeats, options.form != "eager"):
        print(json.dumps(row | {"form": options.form}), flush=True)


if __name__ == "__main__":
    main()
