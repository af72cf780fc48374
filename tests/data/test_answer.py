"""The target's batched writing: the words of `model.generate`, whoever the neighbours are."""

import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
import transformers

from coral_core.data.answer import Sampling, derive_seed, write
from coral_core.decoding.sampling import Sampler
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
    written = write(target, prompts, [20 + row for row in range(len(prompts))], ends, Sampling(**sampling))
    return [answer.ids for answer in written]


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


@pytest.mark.parametrize("keep", [None, torch.float32])
def test_answers_that_ended_are_let_go(monkeypatch: pytest.MonkeyPatch, keep: torch.dtype | None) -> None:
    """A sampler holds the noise of many positions: 256 prompts of a vocabulary of 151,936 would hold 10 GB."""
    made: list[weakref.ref[Sampler]] = []

    def sampler(**keys: Any) -> Sampler:
        one = Sampler(**keys)
        made.append(weakref.ref(one))
        return one

    monkeypatch.setattr("coral_core.data.answer.Sampler", sampler)
    alive: list[int] = []

    def advance(ended: set[int], tokens: int) -> None:
        gc.collect()
        alive.append(sum(one() is not None for one in made))

    prompts = make_prompts()
    write(tiny_target(), prompts, [4] * len(prompts), ends, Sampling(temperature=1.0, batch_size=2, keep=keep), advance)
    assert len(made) == len(prompts) and max(alive) <= 3, "two under way, and one that this round ended"


def test_limits_and_ends() -> None:
    target = tiny_target()
    prompts = make_prompts()
    limits = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    written = write(target, prompts, limits, lambda ids: False, Sampling(batch_size=3))
    assert [len(answer.ids) for answer in written] == limits
    stopped = write(target, prompts, [30] * 10, lambda ids: len(ids) == 3, Sampling(batch_size=3))
    assert [len(answer.ids) for answer in stopped] == [3] * 10
    assert write(target, [], [], ends, Sampling()) == []


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_what_ends_is_told_once_and_tokens_as_they_come(batch_size: int) -> None:
    told: list[tuple[set[int], int]] = []
    prompts = make_prompts()
    limits = [1 + row % 4 for row in range(len(prompts))]
    sampling = Sampling(batch_size=batch_size)
    written = write(tiny_target(), prompts, limits, lambda ids: False, sampling, lambda *now: told.append(now))
    assert sorted(row for ended, _ in told for row in ended) == list(range(len(prompts)))
    assert sum(tokens for _, tokens in told) == sum(len(answer.ids) for answer in written)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_features_of_an_answer_are_kept_as_it_is_written(family: str) -> None:
    """Those of a forward over prompt and answer, the last token's too, and of one whose limit is a single token."""
    target, prompts = tiny_target(family, layers=4).tapping((1, 2, 3)), make_prompts()
    limits = [1 + 5 * (row % 4) for row in range(len(prompts))]
    plain = write(target, prompts, limits, ends, Sampling(batch_size=3))
    told: list[tuple[set[int], int]] = []
    kept = write(
        target, prompts, limits, ends, Sampling(batch_size=3, keep=torch.float32), lambda *now: told.append(now)
    )
    assert [answer.ids for answer in kept] == [answer.ids for answer in plain]
    assert {len(answer.ids) < limit for answer, limit in zip(kept, limits, strict=True)} == {True, False}
    assert sorted(row for ended, _ in told for row in ended) == list(range(len(prompts)))
    assert sum(tokens for _, tokens in told) == sum(len(answer.ids) for answer in kept)
    for prompt, answer, unkept in zip(prompts, kept, plain, strict=True):
        wanted_TI = target.forward(torch.tensor([prompt + answer.ids]))[0]
        torch.testing.assert_close(answer.given_TI, wanted_TI, rtol=1e-3, atol=1e-3)
        assert unkept.given_TI is None


def test_kept_features_do_not_depend_on_the_batch() -> None:
    target, prompts = tiny_target(), make_prompts()
    whole, *others = (
        write(target, prompts, [9] * 10, ends, Sampling(batch_size=size, keep=torch.bfloat16)) for size in (16, 1, 3)
    )
    for written in others:
        for answer, wanted in zip(written, whole, strict=True):
            assert answer.given_TI.dtype == torch.bfloat16 and torch.equal(answer.given_TI, wanted.given_TI)


def test_an_answer_that_fills_the_context_has_no_feature_of_its_last_token() -> None:
    target = tiny_target()
    prompt = make_prompts()[1]
    room = target.max_positions - len(prompt)
    for limit, kept in ((room - 1, True), (room, False), (room + 5, False)):
        (answer,) = write(target, [prompt], [limit], lambda ids: False, Sampling(keep=torch.float32))
        assert len(answer.ids) == min(limit, room)
        assert (answer.given_TI is not None) == kept


def test_an_answer_that_overflows_is_no_short_answer() -> None:
    bad = dataclasses.replace(tiny_target.__wrapped__(), stop_ids=frozenset())
    with torch.no_grad():
        bad.lent.embed_VD[write(bad, [[5, 6, 7]], [4], lambda ids: False, Sampling())[0].ids[2]] = torch.nan
    with pytest.raises(DataError, match="computes no numbers in float32"):
        write(bad, [[5, 6, 7]], [9], lambda ids: False, Sampling())


def test_seeds_of_parts_differ() -> None:
    seeds = {derive_seed(seed, name, part) for seed in (0, 1) for name in ("prompts", "answers") for part in range(50)}
    assert len(seeds) == 200
    assert max(seeds) < 2**32
