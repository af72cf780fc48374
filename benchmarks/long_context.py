"""Prompts of 1k, 8k and 32k tokens on a small random target: memory per token, and what a round's time grows with.

    python -m benchmarks.long_context            # about three minutes

Each length runs in a process of its own, whose peak memory is its own. `attention_ms` is a round's attention alone,
measured in the same process: the target's layers over the tree's rows, the drafter's layer over each level's.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import transformers

from benchmarks.record import record
from coral_core.decoding.drafting import TreeShape
from coral_core.decoding.engine import Engine
from coral_core.decoding.plain import plain
from coral_core.decoding.sampling import Sampler
from coral_core.drafter.config import DrafterConfig
from coral_core.drafter.model import Drafter
from coral_core.head.full import FullHead
from coral_core.target.attention import grouped
from coral_core.target.load import Target, drafter_shape, wrap

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


def attention_ms(rows: int, length: int, layers: int) -> float:
    """Attention of `rows` new rows over `length` cached ones, in the form that a masked forward on a CPU takes.

    Each layer has keys and values of its own: read over and over, one layer's would come from the processor's cache.
    """
    query = torch.randn(1, HEADS, rows, WIDTH)
    held = [torch.randn(2, 1, KV_HEADS, length, WIDTH) for _ in range(layers)]
    mask = torch.zeros(1, 1, rows, length)
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        for key, value in held:
            grouped(query, key, value, mask)
        times.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(times)


def measure(length: int) -> dict[str, Any]:
    """One prompt of `length` tokens, in this process."""
    target = random_target()
    drafter = Drafter(DrafterConfig(**drafter_shape(target.model.config))).requires_grad_(False).eval()
    engine = Engine(target, drafter, FullHead(target.lent), SHAPE)
    prompt = torch.randint(0, 4096, (length,)).tolist()
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    events = list(engine.decode(prompt, Sampler(), 2 * ROUNDS))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rounds = [sum(event.seconds.values()) for event in events if event.kind != "prefill"][
        1:
    ]  # 1st: the drafter's prompt
    steps = [sum(event.seconds.values()) for event in plain(target, prompt, Sampler(), ROUNDS)][1:]
    drafted = attention_ms(SHAPE.topk, length, SHAPE.depth - 1) + attention_ms(1, length, 1)
    return {
        "tokens": length,
        "prefill_s": events[0].seconds["prefill"],
        "peak_bytes": peak_bytes - before_bytes,
        "cache_bytes": length * 2 * 4 * WIDTH * KV_HEADS * (LAYERS + 1),
        "round_ms": 1e3 * statistics.median(rounds),
        "step_ms": 1e3 * statistics.median(steps),
        "attention_ms": attention_ms(SHAPE.nodes + 1, length, LAYERS) + drafted,
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
