"""What prepare-data costs: regeneration, tapping, writing, reading, bytes, and what fp8 features cost in tau.

    python -m benchmarks.data [--dialogues 300] [--steps 150] [--seeds 4] [RECIPE.YAML] [section.key=value ...]

Everything is a ratio of one run on one machine. The target is asked once; its features are then written in every
format, and drafters are trained on two of them, with the same seeds. Their rounds on the held-out prompts are found by
replay (benchmarks/replay.py), and compared prompt by prompt and seed by seed. Rows of width 4,096 are random numbers,
written by the same code.
Axes: B batch, T position, D hidden, N row: a seed, P prompt.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import replay
from benchmarks.paired import Counts, ratio, ratio_ci95, tau
from benchmarks.record import record
from coral_cli.console import progress_bars
from coral_cli.options import read_recipe
from coral_core.bench.acceptance import emitted_by_prompt
from coral_core.data.answer import Sampling, write
from coral_core.data.job import Job
from coral_core.data.meter import Meter
from coral_core.data.shards import tap_all
from coral_core.data.stage import prepare
from coral_core.decoding.engine import Engine
from coral_core.head.heads import FullHead
from coral_core.progress import Progress, silent
from coral_core.recipe.schema import Recipe
from coral_core.run import sampler, tree_shape
from coral_core.store.batches import batches
from coral_core.store.shard import FP8, Sample, ShardFacts, row_bytes, write_shard
from coral_core.store.store import Store, seal
from coral_core.target.load import load_target
from coral_core.target.target import Target
from coral_core.target.template import Encoded
from coral_core.training.loop import Reports, train

FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": FP8}
WRITTEN = 64
"""Prompts that are answered by either way of writing."""
TAPPED = 128
REPEATS = 5
FASTEST_OF = 3
"""Of so many goes at what takes milliseconds, the fastest: a neighbour on the machine only ever adds time."""
WIDE, WIDE_TOKENS = 4096, 16_384
EAGLE_BYTES = 740e9
"""What EAGLE's authors store for 68,000 ShareGPT dialogues at D 4,096: two bytes a number, so 90 million tokens."""
EAGLE_TOKENS = EAGLE_BYTES / (2 * WIDE)


def seconds(work: Callable[[], Any]) -> float:
    """Of one call, the device's queue included."""
    begun_s = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun_s


def regeneration(target: Target, recipe: Recipe, prompts: list[list[int]]) -> dict[str, Any]:
    """Tokens per second of coral's own loop and of `model.generate`, the same greedy words at the same batch size."""
    size, limit = recipe.data.batch_size, recipe.data.max_new_tokens
    tokens = {"coral": 0, "generate": 0}

    def coral() -> None:
        ends = lambda ids: ids[-1] in target.stop_ids  # noqa: E731
        written = write(target, prompts, [limit] * len(prompts), ends, Sampling(batch_size=size))
        tokens["coral"] = sum(len(answer.ids) for answer in written)

    def generate() -> None:
        ordered = sorted(prompts, key=len)
        tokens["generate"] = sum(
            _generate(target, ordered[first : first + size], limit) for first in range(0, len(ordered), size)
        )

    ways = {"coral": coral, "generate": generate}
    took_s: dict[str, list[float]] = {name: [] for name in ways}
    for _, name in itertools.product(range(2), ways):
        took_s[name].append(seconds(ways[name]))
    rates = {f"{name}_tokens_per_s": tokens[name] / min(took_s[name]) for name in ways}
    share = rates["coral_tokens_per_s"] / rates["generate_tokens_per_s"]
    return {"row": "regeneration", "batch_size": size, "tokens": tokens, **rates, "coral_over_generate": share}


@torch.no_grad()
def _generate(target: Target, prompts: list[list[int]], limit: int) -> int:
    """Tokens written for a batch padded on the left, up to each row's own end."""
    width = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=target.device)
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=target.device)
    out_BT = target.model.generate(
        ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=sorted(target.stop_ids) or None,
        pad_token_id=0,
    )
    written = 0
    for row in out_BT[:, width:].tolist():
        end = next((place + 1 for place, token in enumerate(row) if token in target.stop_ids), len(row))
        written += end
    return written


@torch.no_grad()
def tapping(target: Target, size: int, samples: list[Sample]) -> dict[str, Any]:
    """Tokens per second of `tap_all` and of nothing but the same batches' forwards."""
    pieces = [Encoded(sample.ids_T.tolist(), sample.answer_T.tolist()) for sample in samples]
    tokens = sum(len(piece.ids) for piece in pieces)
    ordered = sorted((sample.ids_T for sample in samples), key=len)
    padded = [
        torch.nn.utils.rnn.pad_sequence(ordered[first : first + size], batch_first=True).to(target.device)
        for first in range(0, len(ordered), size)
    ]
    ways = {
        "tap": lambda: tap_all(target, pieces, size, torch.bfloat16, Meter(silent, "", 1)),
        "forward": lambda: [target.forward(ids_BT) for ids_BT in padded],
    }
    took_s: dict[str, list[float]] = {name: [] for name in ways}
    for _, name in itertools.product(range(REPEATS + 1), ways):
        took_s[name].append(seconds(ways[name]))
    median_s = {name: statistics.median(values[1:]) for name, values in took_s.items()}
    rates = {f"{name}_tokens_per_s": tokens / median_s[name] for name in ways}
    share = median_s["forward"] / median_s["tap"]
    return {"row": "tapping", "batch_size": size, "tokens": tokens, **rates, "tap_over_forward": share}


def rewrite(store: Store, folder: Path, dtype: torch.dtype) -> tuple[Store, float]:
    """The same samples in another format, and the seconds that writing its shards took."""
    folder.mkdir()
    facts = [ShardFacts(**shard) for shard in store.manifest.facts["shards"]]
    made, took_s, first = [], 0.0, 0
    for number, shard in enumerate(facts):
        samples = [store[index] for index in range(first, first + shard.samples)]
        first += shard.samples
        write = functools.partial(write_shard, folder, number, samples, dtype, holdout_samples=shard.holdout_samples)
        took_s += min(seconds(write) for _ in range(FASTEST_OF))
        made.append(write())
    kept = {name: store.manifest.facts[name] for name in ("dialogues", "holdout_dialogues", "drafter_config")}
    kept["dtype"] = str(dtype).removeprefix("torch.")
    manifest = dataclasses.replace(store.manifest, facts=kept)
    seal(folder, manifest, made, lent=store.lent(), holdout_prompts=store.holdout_prompts)
    return Store.open(folder), took_s


def reading(store: Store, size: int) -> float:
    """Tokens per second of an epoch in batches as training reads them; the files' checksums were compared before."""
    count = max(1, len(store.train_indices) // size)

    def epoch(start: int) -> int:
        found = itertools.islice(batches(store, batch_size=size, seed=0, start=start), count)
        return sum(int(batch.valid_BT.sum()) for batch in found)

    epoch(0)
    rates = []
    for number in range(1, 1 + FASTEST_OF):
        begun_s = time.perf_counter()
        rates.append(epoch(number * count) / (time.perf_counter() - begun_s))
    return max(rates)


@dataclasses.dataclass(frozen=True)
class Held:
    """A held-out prompt, how many tokens the target answered it with, and the target repeating that answer."""

    prompt: list[int]
    limit: int
    repeating: Target


def held_out(target: Target, store: Store, limit: int) -> list[Held]:
    """The first answer of each held-out sample, up to `limit` tokens: the store has what the target said."""
    found = []
    for index in store.holdout_indices:
        ids, answer = store[index].ids_T.tolist(), store[index].answer_T.tolist()
        first = answer.index(True)
        last = answer.index(False, first) if False in answer[first:] else len(ids)
        words = ids[first : min(last, first + limit)]
        found.append(Held(ids[:first], len(words), replay.repeating(target, ids[:first], words)))
    return found


def trained(
    recipe: Recipe, store: Store, held: list[Held], seed: int, work: Path, progress: Progress
) -> tuple[list[int], list[int], float]:
    """(tokens, rounds) of each held-out prompt after a short training, and tokens per second of the training."""
    lines: list[dict[str, Any]] = []
    drafter = train(recipe.train, store, seed=seed, work=work, reports=Reports(lines.append, progress))
    picks, shape = sampler(recipe), tree_shape(recipe.decode)
    emitted: list[list[int]] = []
    drafter = drafter.to(held[0].repeating.device, held[0].repeating.dtype)
    for one in held:
        engine = Engine(one.repeating, drafter, FullHead(one.repeating.lent), shape)
        emitted += emitted_by_prompt(engine, [one.prompt], picks, one.limit)
    rate = statistics.median(line["tokens_per_s"] for line in lines if "tokens_per_s" in line)
    return [sum(rounds) for rounds in emitted], [len(rounds) for rounds in emitted], rate


def counts(row: dict[str, Any]) -> Counts:
    """(tokens_NP, rounds_NP) of a format's row."""
    return np.array(row["tokens"], float), np.array(row["rounds"], float)


def wide(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Writing and reading rows of 4,096 numbers, and what 68,000 ShareGPT dialogues would come to."""
    generator = torch.Generator().manual_seed(0)
    feature_TD = torch.randn(WIDE_TOKENS, WIDE, generator=generator, dtype=torch.float32).bfloat16()
    length = 512
    samples = [
        Sample(torch.zeros(length, dtype=torch.long), torch.ones(length, dtype=torch.bool), part_TD)
        for part_TD in feature_TD.split(length)
    ]
    folder.mkdir()
    took_s = min(seconds(lambda: write_shard(folder, 0, samples, dtype)) for _ in range(FASTEST_OF))
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    write_rate = WIDE_TOKENS / took_s
    return {
        "row": "width 4096",
        "format": str(dtype).removeprefix("torch."),
        "bytes_per_token": size_bytes / WIDE_TOKENS,
        "write_tokens_per_s": write_rate,
        "sharegpt_68k_gigabytes": EAGLE_TOKENS * size_bytes / WIDE_TOKENS / 1e9,
        "sharegpt_68k_write_hours": EAGLE_TOKENS / write_rate / 3600,
    }


def formats(recipe: Recipe, store: Store, target: Target, tap_s: float, options: Any, folder: Path) -> list[Any]:
    """A row for each format: bytes, writing, reading, and for the two that matter most some trainings."""
    rows, held = [], held_out(target, store, recipe.decode.max_new_tokens)
    for name, dtype in FORMATS.items():
        made, write_s = rewrite(store, folder / name, dtype)
        facts = made.manifest.facts
        shard_bytes = sum(shard["size_bytes"] for shard in facts["shards"])
        row: dict[str, Any] = {"row": "format", "format": name, "bytes_per_token": shard_bytes / facts["tokens"]}
        row["bytes_per_token_without_headers"] = row_bytes(facts["hidden"], dtype)
        row["write_share"] = write_s / (write_s + tap_s * facts["tokens"])
        row["read_tokens_per_s"] = reading(made, recipe.train.batch_size)
        if name != "fp16":
            with progress_bars() as progress:
                runs = [
                    trained(recipe, made, held, seed, folder / f"{name}-{seed}", progress)
                    for seed in range(options.seeds)
                ]
            row["tokens"], row["rounds"], rates = map(list, zip(*runs, strict=True))
            row["tau"] = tau(counts(row))
            row["training_tokens_per_s"] = max(rates)
            row["read_over_training"] = row["read_tokens_per_s"] / row["training_tokens_per_s"]
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="*")
    parser.add_argument("--dialogues", type=int, default=300)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    held = max(4, options.dialogues // 6)
    recipe = read_recipe(
        [
            f"data.max_samples={options.dialogues}",
            f"data.holdout={held}",
            "data.feature_dtype=float32",
            f"train.steps={options.steps}",
            "decode.max_new_tokens=64",
            *options.recipe,
            "data.regenerate=greedy",  # a replayed answer is the target's likeliest
            "decode.temperature=0",
        ]
    )
    target = load_target(recipe.target)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with progress_bars() as progress:
            begun_s = time.perf_counter()
            store = prepare(Job(recipe, target, folder / "exact"), progress)
            whole_s = time.perf_counter() - begun_s
        facts = store.manifest.facts
        samples = [store[index] for index in range(min(TAPPED, len(store)))]
        prompts = [sample.ids_T[: int(sample.answer_T.int().argmax())].tolist() for sample in samples[:WRITTEN]]
        rows = [
            {"row": "prepare", "dialogues": facts["dialogues"], "tokens": facts["tokens"], "elapsed_s": whole_s},
            regeneration(target, recipe, prompts),
            tapping(target, recipe.data.batch_size, samples),
        ]
        print(rows, flush=True)
        rows += formats(recipe, store, target, 1 / rows[2]["tap_tokens_per_s"], options, folder)
        rows += [wide(folder / f"wide-{name}", dtype) for name, dtype in FORMATS.items()]
    print(record("data", figures(rows), rows))


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers that the README quotes."""
    by_format = {row["format"]: row for row in rows if row["row"] == "format"}
    by_dtype = {row["format"]: row for row in rows if row["row"] == "width 4096"}
    bf16, fp8 = by_format["bf16"], by_format["fp8"]
    wide_rows = {"bf16": by_dtype["bfloat16"], "fp8": by_dtype["float8_e4m3fn"]}
    return {
        "regeneration_over_generate": rows[1]["coral_over_generate"],
        "tap_over_forward": rows[2]["tap_over_forward"],
        "write_share": bf16["write_share"],
        "read_over_training": min(bf16["read_over_training"], fp8["read_over_training"]),
        "fp8_tau_kept": ratio(counts(fp8), counts(bf16)),
        "fp8_tau_kept_ci95": ratio_ci95(counts(fp8), counts(bf16)),
        "tau": {"bf16": bf16["tau"], "fp8": fp8["tau"]},
        "bytes_per_token": {"bf16": bf16["bytes_per_token"], "fp8": fp8["bytes_per_token"]},
        "sharegpt_68k_d4096": {
            "eagle_gigabytes": EAGLE_BYTES / 1e9,
            "tokens": round(EAGLE_TOKENS),
            "gigabytes": {name: row["sharegpt_68k_gigabytes"] for name, row in wide_rows.items()},
            "write_hours": {name: row["sharegpt_68k_write_hours"] for name, row in wide_rows.items()},
            "tap_hours_per_10000_forward_tokens_per_s": EAGLE_TOKENS / (1e4 * rows[2]["tap_over_forward"]) / 3600,
        },
    }


if __name__ == "__main__":
    main()
