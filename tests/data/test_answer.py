"""The target's batched writing: the words of `model.generate`, whoever the neighbours are."""

import dataclasses

import pytest
import torch
import transformers

from coral_core.data.answer import Sampling, derive_seed, write
from coral_core.errors import DataError
from coral_core.target.target import Target
from tests.tiny import FAMILIES, VOCAB, tiny_target

LENGTHS = [1, 9, 4, 17, 2, 6, 30, 3, 12, 5]


def make_prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def ends(ids: list[int]) -> bool:
    return ids[-1] in range(2, 14)


def run(target: Target, **sampling: float) -> list[list[int]]:
    prompts = make_prompts()
    return write(target, prompts, [20 + row for row in range(len(prompts))], ends, Sampling(**sampling))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_words_are_generates(family: str) -> None:
    """One prompt at a time through `generate`; ten at once here, in a batch of four with rows coming and going."""
    target = tiny_target(family)
    written = run(target, batch_size=4)
    for row, prompt in enumerate(make_prompts()):
        ids = torch.tensor([prompt])
        config = transformers.GenerationConfig(
            max_new_tokens=20 + row, do_sample=False, eos_token_id=list(range(2, 14)), pad_token_id=0
        )
        out = target.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert written[row] == out[0, len(prompt) :].tolist(), f"row {row}"
    assert len({len(ids) for ids in written}) > 3, "rows of all lengths"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_batch_size_changes_no_word(temperature: float) -> None:
    target = tiny_target()
    whole = run(target, batch_size=16, temperature=temperature, seed=5)
    for size in (1, 2, 3, 7):
        assert run(target, batch_size=size, temperature=temperature, seed=5) == whole


def test_a_seed_is_an_answer() -> None:
    target = tiny_target()
    first, again, other = (run(target, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_limits_and_ends() -> None:
    target = tiny_target()
    prompts = make_prompts()
    limits = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    written = write(target, prompts, limits, lambda ids: False, Sampling(batch_size=3))
    assert [len(ids) for ids in written] == limits
    stopped = write(target, prompts, [30] * 10, lambda ids: len(ids) == 3, Sampling(batch_size=3))
    assert [len(ids) for ids in stopped] == [3] * 10
    assert write(target, [], [], ends, Sampling()) == []


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_what_ends_is_told_once_and_tokens_as_they_come(batch_size: int) -> None:
    told: list[tuple[set[int], int]] = []
    prompts = make_prompts()
    limits = [1 + row % 4 for row in range(len(prompts))]
    sampling = Sampling(batch_size=batch_size)
    written = write(tiny_target(), prompts, limits, lambda ids: False, sampling, lambda *now: told.append(now))
    assert sorted(row for ended, _ in told for row in ended) == list(range(len(prompts)))
    assert sum(tokens for _, tokens in told) == sum(map(len, written))


def test_an_answer_that_overflows_is_no_short_answer() -> None:
    bad = dataclasses.replace(tiny_target.__wrapped__(), stop_ids=frozenset())
    with torch.no_grad():
        bad.lent.embed_VD[write(bad, [[5, 6, 7]], [4], lambda ids: False, Sampling())[0][2]] = torch.nan
    with pytest.raises(DataError, match="computes no numbers in float32"):
        write(bad, [[5, 6, 7]], [9], lambda ids: False, Sampling())


def test_seeds_of_parts_differ() -> None:
    seeds = {derive_seed(seed, name, part) for seed in (0, 1) for name in ("prompts", "answers") for part in range(50)}
    assert len(seeds) == 200
    assert max(seeds) < 2**32
