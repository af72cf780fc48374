"""Answers that share rounds: each says what the reference says, whoever joins and leaves meanwhile."""

import dataclasses

import pytest
import torch

from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.sampling import Sampler, pick_together
from coral_core.decoding.seat import Seat
from coral_core.decoding.table import Request, Table
from coral_core.target.target import Target
from tests.decoding.policy.test_adaptive import DEAR
from tests.decoding.reference import reference
from tests.decoding.test_lossless import ids_of, some_prompt
from tests.tiny import FAMILIES, tiny_engine, tiny_target

SAMPLERS = [
    Sampler(),
    Sampler(temperature=1.0, seed=3),
    Sampler(temperature=1.0, seed=4),
    Sampler(repetition_penalty=1.4),
    Sampler(temperature=0.8, top_p=0.9, top_k=30, min_p=0.01, seed=5),
]
NEW = 14


def requests() -> list[Request]:
    return [Request(some_prompt(seed, 1 + 4 * seed), sampler, NEW + seed) for seed, sampler in enumerate(SAMPLERS)]


def endless(family: str) -> Target:
    return dataclasses.replace(tiny_target(family), stop_ids=frozenset())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampler", SAMPLERS[:4:3], ids=["greedy", "penalty"])
def test_plain_decoding_is_the_reference(family: str, sampler: Sampler) -> None:
    """On transformers' own cache and masks, in which nothing is ours but the sampler."""
    target, prompt = tiny_target(family), some_prompt(2, 9)
    expected = reference(target.model, prompt, sampler, NEW, target.stop_ids)
    assert ids_of(list(plain(target, prompt, sampler, NEW))) == expected


@pytest.mark.parametrize("drafted", [True, False], ids=["drafted", "plain"])
@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3-mixed", "gemma4-shared", "gpt2"])
def test_answers_join_and_leave_between_rounds(family: str, drafted: bool) -> None:
    """One more joins before every other round; the second is left in the middle, and its place is taken again."""
    target = endless(family)
    engine = tiny_engine(target, depth=3, nodes=12, topk=4) if drafted else Engine(target)
    table, waiting = Table(engine, 3), requests()
    asked: dict[Seat, Request] = {}
    said: dict[Seat, list[int]] = {}
    companies = set()
    for number in range(200):
        if waiting and not table.full and number % 2 == 0:
            request = waiting.pop(0)
            seat, event = table.sit(request)
            asked[seat], said[seat] = request, list(event.new_ids)
        companies.add(len(table.seats))
        for seat, event in table.step() if table.seats else []:
            said[seat] += event.new_ids
            if asked[seat].sampler == SAMPLERS[1] and len(said[seat]) > 4 and seat in table.seats:
                table.leave(seat)
    assert (waiting, table.seats, companies) == ([], [], {0, 1, 2, 3})
    for seat, request in asked.items():
        assert isinstance(request.sampler, Sampler)
        expected = reference(target.model, request.prompt, request.sampler, request.max_new_tokens)
        left = request.sampler == SAMPLERS[1]
        assert said[seat] == (expected[: len(said[seat])] if left else expected)
        assert not left or 4 < len(said[seat]) < len(expected)


def test_some_draft_while_others_rest() -> None:
    """Where drafts are dear, each answer rests when its own drafts did not pay."""
    target = endless("llama")
    engine = dataclasses.replace(tiny_engine(target, depth=3, nodes=12, topk=4), costs=DEAR)
    table = Table(engine, 3)
    said: dict[Seat, list[int]] = {}
    asked: dict[Seat, Request] = {}
    kinds = set()
    for request in requests()[:3]:
        seat, event = table.sit(dataclasses.replace(request, max_new_tokens=40))
        asked[seat], said[seat] = request, list(event.new_ids)
        for _ in range(2):
            for one, event in table.step():
                said[one] += event.new_ids
    while table.seats:
        events = table.step()
        kinds.add(frozenset(event.kind for _, event in events))
        for seat, event in events:
            said[seat] += event.new_ids
    assert frozenset({"draft", "plain"}) in kinds
    for seat, request in asked.items():
        assert said[seat] == ids_of(list(plain(target, request.prompt, request.sampler, 40)))


def test_rows_that_are_picked_together_are_picked_as_alone() -> None:
    logits_BV = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    samplers = [sampler for sampler in SAMPLERS if not sampler.looks_back]
    picked_B = pick_together(samplers, logits_BV, [7, 7, 8, 2])
    alone = [
        int(sampler.pick(logits_BV[row : row + 1], position))
        for row, (sampler, position) in enumerate(zip(samplers, [7, 7, 8, 2], strict=True))
    ]
    assert picked_B.tolist() == alone
