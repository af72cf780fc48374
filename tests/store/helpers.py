"""Small stores for tests; training and head tests use `make_store` too."""

from pathlib import Path

import torch

from coral_core.artifacts import Manifest
from coral_core.lent import Lent
from coral_core.store.shard import Sample, write_shard
from coral_core.store.store import Store, seal


def make_lent(*, hidden: int = 8, vocab: int = 32, seed: int = 0) -> Lent:
    generator = torch.Generator().manual_seed(seed)
    embed_VD = torch.randn(vocab, hidden, generator=generator)
    return Lent(embed_VD, torch.randn(vocab, hidden, generator=generator))


def make_samples(count: int, *, hidden: int = 8, vocab: int = 32, seed: int = 0) -> list[Sample]:
    """Samples of 2 to 9 tokens; the second half of each is the answer."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        length = int(torch.randint(2, 10, (), generator=generator))
        ids_T = torch.randint(vocab, (length,), generator=generator)
        answer_T = torch.arange(length) >= length // 2
        samples.append(Sample(ids_T, answer_T, torch.randn(length, hidden, generator=generator)))
    return samples


def make_store(
    folder: Path,
    samples: list[Sample],
    *,
    lent: Lent | None = None,
    holdout: int = 0,
    per_shard: int = 5,
    dtype: torch.dtype = torch.float32,
    facts: dict | None = None,
    inputs: dict | None = None,
) -> Store:
    """A published store of these samples, the last `holdout` held out."""
    folder.mkdir(parents=True, exist_ok=True)
    lent = lent or make_lent(hidden=samples[0].feature_TD.shape[1])
    shards = []
    for number, first in enumerate(range(0, len(samples), per_shard)):
        part = samples[first : first + per_shard]
        held = min(len(part), max(0, first + len(part) - (len(samples) - holdout)))
        shards.append(write_shard(folder, number, part, dtype, holdout_samples=held))
    manifest = Manifest(
        kind="data",
        fingerprint="f" * 16,
        inputs=inputs or {"target": "t" * 16},
        recipe={},
        facts={"dtype": str(dtype).removeprefix("torch."), **(facts or {})},
    )
    prompts = [sample.ids_T[: len(sample.ids_T) // 2].tolist() for sample in samples[len(samples) - holdout :]]
    seal(folder, manifest, shards, lent=lent, holdout_prompts=prompts)
    return Store.open(folder)
