"""Prompts of 1k, 8k and 32k tokens on a small random target: memory per token, and what a round's time grows with.

    python -m benchmarks.long_context            # about three minutes

Each length runs in a process of its own, whose peak memory is its own. `attention_ms` is a round's attention alone,
measured in the same process: the target's layers over the tree's rows, the drafter's layer over each level's.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from benchmarks.record import record
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.sampling import Sampler
from coral_core.drafter.config import DrafterConfig
from coral_core.drafter.model import Drafter
from coral_core.head.heads import FullHead
from coral_core.kernels.attention import grouped
from coral_core.target.load import drafter_shape, wrap
from coral_core.target.target import Target

LENGTHS = (1024, 8192, 32768)
LAYERS, HEADS, KV_HEADS, WIDTH = 4, 4, 2, 64
SHAPE = TreeShape(depth=4, nodes=16, topk=4)
ROUNDS = 12


def random_target() -> Target:
    """A Llama of 4 layers and 256 wide, whose context holds every length."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=HEADS * WIDTH,
        intermediate_size=768,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2 * LENGTHS[-1],
        eos_token_id=None,
    )
    return wrap(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32), None)


def attention(length: int) -> Callable[[], None]:
    """A round's attention over `length` cached rows, in the form that masked forwards on a CPU take.

    Each layer has keys and values of its own: read over and over, one layer's would come from the processor's cache.
    The drafter's layer reads its own on every level.
    """
    held = [torch.randn(2, 1, KV_HEADS, length, WIDTH) for _ in range(LAYERS + 1)]
    parts = [(SHAPE.nodes + 1, keys) for keys in held[:-1]]
    parts += [(rows, held[-1]) for rows in (1, *[SHAPE.topk] * (SHAPE.depth - 1))]
    calls = [(torch.randn(1, HEADS, rows, WIDTH), *keys, torch.zeros(1, 1, rows, length)) for rows, keys in parts]

    def attend() -> None:
        for query, key, value, mask in calls:
            grouped(query, key, value, mask)

    return attend


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(length: int) -> dict[str, Any]:
    """One prompt of `length` tokens, in this process; rounds and their attention in turns."""
    target = random_target()
    drafter = Drafter(DrafterConfig(**drafter_shape(target.model.config))).requires_grad_(False).eval()
    engine = Engine(target, drafter, FullHead(target.lent), SHAPE)
    prompt = torch.randint(0, 4096, (length,)).tolist()
    before_bytes = peak_bytes()
    events = engine.decode(prompt, Sampler(), 3 * ROUNDS)
    first, *_ = itertools.islice(events, ROUNDS)  # the drafter's prompt among them
    grown_bytes = peak_bytes() - before_bytes
    attend, rounds_s, attention_s = attention(length), [], []
    for event in events:
        rounds_s.append(sum(event.seconds.values()))
        begun = time.perf_counter()
        attend()
        attention_s.append(time.perf_counter() - begun)
    steps_s = [sum(event.seconds.values()) for event in plain(target, prompt, Sampler(), ROUNDS)][1:]
    return {
        "tokens": length,
        "prefill_s": first.seconds["prefill"],
        "peak_bytes": grown_bytes,
        "cache_bytes": length * 2 * 4 * WIDTH * KV_HEADS * (LAYERS + 1),
        "round_ms": 1e3 * statistics.median(rounds_s),
        "step_ms": 1e3 * statistics.median(steps_s),
        "attention_ms": 1e3 * statistics.median(attention_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--one", type=int, help="measure one length in this process and print it")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    rows = []
    for length in options.lengths:
        command = [sys.executable, "-m", "benchmarks.long_context", "--one", str(length)]
        rows.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
        print(rows[-1], file=sys.stderr)
    small, *_, middle, large = rows
    figures = {
        "peak_bytes_per_token": {str(row["tokens"]): row["peak_bytes"] / row["tokens"] for row in rows},
        "cache_bytes_per_token": large["cache_bytes"] / large["tokens"],
        "more_bytes_per_token": (large["peak_bytes"] - middle["peak_bytes"]) / (large["tokens"] - middle["tokens"]),
        "round_growth_over_attention_growth": (large["round_ms"] - small["round_ms"])
        / (large["attention_ms"] - small["attention_ms"]),
    }
    print(json.dumps(figures, indent=1))
    print(record("long_context", figures, rows))


if __name__ == "__main__":
    main()
