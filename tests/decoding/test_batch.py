"""Batches: each answer is its batch-1 answer, whatever its company; seats are refilled; trees and masks as drawn."""

import dataclasses
import itertools
import random
from collections.abc import Iterator

import pytest
import torch

from benchmarks.batch import decode_all
from coral_core.decoding import tree
from coral_core.decoding.cache import SlotCache
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.table import Request
from coral_core.decoding.tree import judge, on_path
from coral_core.errors import DataError
from coral_core.target.target import Target
from tests.decoding.test_lossless import ids_of, some_prompt
from tests.tiny import FAMILIES, ConfidentShape, PlainHead, tiny_drafter, tiny_target

F, T = False, True
WIDE = TreeShape(depth=3, nodes=60, topk=20)
"""Wide enough that a random drafter's guesses over 96 tokens are often accepted."""
SAMPLERS = {
    "greedy": Sampler(),
    "T=1": Sampler(temperature=1.0, seed=3),
    "T=0.8,p=0.9,r=1.4": Sampler(temperature=0.8, top_p=0.9, repetition_penalty=1.4, seed=4),
}


@dataclasses.dataclass(frozen=True)
class Batch:
    """An engine, and so many seats."""

    engine: Engine
    seats: int

    def decode(self, prompts: list[list[int]], sampler: Sampler, new: int) -> Iterator[tuple[int, Round]]:
        return decode_all(self.engine, [Request(prompt, sampler, new) for prompt in prompts], self.seats)


def batch_of(target: Target, seats: int, shape: TreeShape = WIDE) -> Batch:
    return Batch(Engine(target, tiny_drafter(target), PlainHead(target), shape), seats)


def decode(batch: Batch, prompts: list[list[int]], sampler: Sampler, new: int) -> list[list[Round]]:
    rounds: list[list[Round]] = [[] for _ in prompts]
    for number, event in batch.decode(prompts, sampler, new):
        rounds[number].append(event)
    return rounds


def prompts_of(lengths: list[int]) -> list[list[int]]:
    return [some_prompt(seed, length) for seed, length in enumerate(lengths)]


@pytest.mark.parametrize(("family", "name"), list(zip(FAMILIES, itertools.cycle(SAMPLERS), strict=False)))
def test_each_answer_is_its_batch_1_answer_in_every_family(family: str, name: str) -> None:
    """Five prompts of different lengths on three seats; answers end at the stop token or the limit."""
    target, sampler = tiny_target(family), SAMPLERS[name]
    batch, prompts = batch_of(target, 3), prompts_of([1, 14, 5, 9, 3])
    rounds = decode(batch, prompts, sampler, 14)
    for prompt, own in zip(prompts, rounds, strict=True):
        alone = list(batch.engine.decode(prompt, sampler, 14))
        assert ids_of(own) == ids_of(alone)
        assert [event.new_ids for event in own] == [event.new_ids for event in alone], "the same trees, too"
        assert [event.accepted_drafts for event in own] == [event.accepted_drafts for event in alone]
    assert sum(event.accepted_drafts for own in rounds for event in own) >= 5


@pytest.mark.parametrize("seats", [1, 2, 9])
@pytest.mark.parametrize(
    "sampler", [SAMPLERS["greedy"], dataclasses.replace(SAMPLERS["T=1"], seed=35)], ids=["greedy", "T=1"]
)
def test_the_company_does_not_matter(seats: int, sampler: Sampler) -> None:
    """Nor does the order of the prompts: every answer is plain decoding's."""
    target = tiny_target("llama")
    prompts = prompts_of([3, 8, 1, 20, 6, 11, 2])
    expected = {tuple(prompt): ids_of(list(plain(target, prompt, sampler, 24))) for prompt in prompts}
    assert len({len(ids) for ids in expected.values()}) >= 3, "answers must end at different times"
    random.Random(seats).shuffle(prompts)
    rounds = decode(batch_of(target, seats), prompts, sampler, 24)
    assert {tuple(p): ids_of(own) for p, own in zip(prompts, rounds, strict=True)} == expected


@pytest.mark.parametrize("confidence", [0.02, 0.2, 0.99])
def test_trees_of_different_sizes_in_one_round(confidence: float) -> None:
    """Down to answers that draft nothing while others do."""
    target = dataclasses.replace(tiny_target("mistral-sliding"), stop_ids=frozenset())
    prompts = prompts_of([4, 17, 9, 2])
    shape = ConfidentShape(depth=4, nodes=WIDE.nodes, topk=WIDE.topk, confidence=confidence)
    for own, prompt in zip(decode(batch_of(target, 4, shape), prompts, Sampler(), 16), prompts, strict=True):
        assert ids_of(own) == ids_of(list(plain(target, prompt, Sampler(), 16)))


def test_waiting_prompts_take_the_seats_of_finished_ones() -> None:
    """Rounds, not answers, are shared: two seats never wait for the longest answer."""
    target = dataclasses.replace(tiny_target("llama"), stop_ids=frozenset())
    shape = ConfidentShape(depth=1, nodes=1, topk=1, confidence=0.99)  # nothing is drafted: one token per round
    prompts = prompts_of([150, 5, 6, 7, 8])  # the first has room for ten tokens only
    order = [
        number
        for number, event in batch_of(target, 2, shape).decode(prompts, Sampler(), 30)
        if not event.accepted_drafts
    ]
    assert order[:4] == [0, 1, 0, 1]
    assert order.index(2) == 20, "prompt 2 sits down when prompt 0 has its ten tokens, not when prompt 1 has thirty"
    assert [order.count(number) for number in range(5)] == [10, 30, 30, 30, 30]


def test_the_context_can_be_filled_to_its_last_position() -> None:
    target = tiny_target("gpt2")
    prompts = prompts_of([target.max_positions - 5, 3, target.max_positions - 1])
    sampler = Sampler(temperature=1.0)
    for own, prompt in zip(decode(batch_of(target, 3), prompts, sampler, 99), prompts, strict=True):
        assert ids_of(own) == ids_of(list(plain(target, prompt, sampler, 99)))


def test_a_bad_prompt_is_refused_before_anything_is_decoded() -> None:
    target = tiny_target("llama")
    with pytest.raises(DataError, match="160 tokens and the target's context holds 160"):
        next(batch_of(target, 2).decode([[3, 4], some_prompt(0, 160)], Sampler(), 4))
    assert list(batch_of(target, 2).decode([], Sampler(), 4)) == []


def test_the_mask_of_two_trees_behind_pasts_of_different_length() -> None:
    """Three rows behind two committed ones, two rows behind one; the second answer's last column holds nothing."""
    sees_BMM = torch.tensor([[[T, F, F], [T, T, F], [T, F, T]], [[T, F, F], [T, T, F], [F, F, T]]])
    depth_BM = torch.tensor([[0, 1, 1], [0, 1, 0]])
    past_B1 = torch.tensor([[2], [1]])
    drawn = torch.tensor(
        [
            [[T, T, T, F, F], [T, T, T, T, F], [T, T, T, F, T]],
            [[T, T, F, F, F], [T, T, T, F, F], [T, F, F, T, F]],
        ]
    )
    assert torch.equal(tree.batch_sees(past_B1, depth_BM, sees_BMM, 5, 0), drawn)
    for number, past in enumerate((2, 1)):
        alone = tree.sees(past, depth_BM[number], sees_BMM[number], 2)
        windowed = tree.batch_sees(past_B1, depth_BM, sees_BMM, 5, 2)[number]
        assert torch.equal(windowed[:, : past + 3], alone)


def test_rows_that_fill_up_a_batch_are_never_on_a_path() -> None:
    parents = [torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0])]
    drafts = [
        tree.Draft(
            token_M=token_M,
            parent_M=parent_M,
            depth_M=depth_M,
            sees_MM=tree.ancestry(parent_M, 2),
            score_M=torch.zeros(len(token_M)),
            levels=2,
        )
        for token_M, parent_M, depth_M in zip(
            [torch.tensor([7, 8, 9, 5]), torch.tensor([4, 6])],
            parents,
            [torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1])],
            strict=True,
        )
    ]
    picked_BM = torch.tensor([[8, 9, 1, 1], [6, 2, -1, -1]])
    assert on_path(tree.pad(drafts), picked_BM).tolist() == [[T, T, T, F], [T, T, F, F]]
    assert judge(drafts[0], picked_BM[0]).new_A.tolist() == [8, 9, 1]


def test_cache_rows_are_written_kept_and_moved_per_seat() -> None:
    """The drawing on top of cache.py, one head of width one, its numbers the rows' names."""
    cache = SlotCache(layers=1, capacity=7)

    def rows(*names: list[float]) -> torch.Tensor:
        return torch.tensor(names)[:, None, :, None]

    for number, names in enumerate(([1.0, 2, 3, 4], [11.0, 12])):
        cache.seat(number).update(rows(names), rows(names))
        assert cache.storage.shape[0] == number + 1, "as many as sit"
    new = rows([5.0, 6], [13.0, 14])
    with cache.place(torch.tensor([[4, 5], [2, 3]]), 6):
        keys, _ = cache.update(new, new)
    assert keys[:, 0, :, 0].tolist() == [[1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 0, 0]]
    for number, (length, kept) in enumerate(((6, 1), (4, 0))):
        cache.seat(number).length = length
        cache.seat(number).keep(torch.tensor([kept]), length - 2)
    assert keys[:, 0, :, 0].tolist() == [[1, 2, 3, 4, 6, 6], [11, 12, 13, 14, 0, 0]]
    with cache.place(torch.tensor([[3]]), 4, torch.tensor([1])):
        alone, _ = cache.update(rows([15.0]), rows([15.0]))
    assert alone[:, 0, :, 0].tolist() == [[11, 12, 13, 15]], "one seat of several"
    cache.move(1, 0)
    assert keys[0, 0, :, 0].tolist() == [11, 12, 13, 4, 6, 6]
    assert cache.seat(0).length == 3
    cache.seat(0).reserve(9)
    assert cache.seat(1).capacity >= 9
    more, _ = cache.seat(1).update(rows([16.0]), rows([16.0]))
    assert more[0, 0, :, 0].tolist() == [11, 12, 13, 16]
    cache.seat(2).update(rows([21.0]), rows([21.0]))
    assert cache.storage[:, 0, :3, 0].tolist() == [[11, 12, 13], [11, 12, 13], [21, 0, 0], [0, 0, 0]], "two by two"
