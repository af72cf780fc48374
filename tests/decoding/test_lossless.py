"""The promise: speculative ids equal plain ids, exactly, in float32. A property over families, trees and prompts."""

import dataclasses
import random

import pytest
import torch

from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from coral_core.errors import DataError
from tests.tiny import (
    FAMILIES,
    VOCAB,
    ConfidentShape,
    OracleHead,
    PlainHead,
    ScriptHead,
    tiny_drafter,
    tiny_engine,
    tiny_target,
)

SAMPLERS = {
    "greedy": Sampler(),
    "T=0.3": Sampler(temperature=0.3, seed=1),
    "T=0.7,p=0.9": Sampler(temperature=0.7, top_p=0.9, seed=2),
    "T=1.0": Sampler(temperature=1.0, seed=3),
    "T=1.0,k=5": Sampler(temperature=1.0, top_k=5, seed=4),
    "T=1.5,p=0.8,k=20": Sampler(temperature=1.5, top_p=0.8, top_k=20, seed=5),
}
SHAPES = [(1, 1, 1), (1, 4, 4), (2, 3, 2), (4, 7, 3), (5, 20, 4), (3, 60, 5), (8, 8, 1)]


def ids_of(rounds: list[Round]) -> list[int]:
    return [token for event in rounds for token in event.new_ids]


def some_prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCAB), k=length)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_speculative_equals_plain_in_every_family(family: str, sampler: Sampler) -> None:
    """An oracle that is right four times in five makes long and short paths, so that every gather is exercised."""
    target = dataclasses.replace(tiny_target(family), stop_ids=frozenset())
    accepted = 0
    for seed, length in ((0, 1), (1, 14)):
        prompt = some_prompt(seed, length)
        expected = ids_of(list(plain(target, prompt, sampler, 20)))
        head = OracleHead(expected, right=0.8)
        engine = Engine(target, tiny_drafter(target), head, TreeShape(depth=4, nodes=12, topk=3))
        rounds = [head.follow(event) for event in engine.decode(prompt, sampler, 20)]
        assert ids_of(rounds) == expected
        accepted += sum(event.accepted_drafts for event in rounds)
    assert accepted >= 8


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sampler", [SAMPLERS["greedy"], SAMPLERS["T=1.0"]], ids=["greedy", "T=1.0"])
def test_speculative_equals_plain_for_every_tree(shape: tuple[int, int, int], sampler: Sampler) -> None:
    target = tiny_target("llama")
    engine = tiny_engine(target, *shape)
    for limit in (1, 2, 17):
        prompt = some_prompt(limit, 6)
        rounds = list(engine.decode(prompt, sampler, limit))
        assert ids_of(rounds) == ids_of(list(plain(target, prompt, sampler, limit)))
        assert all(len(event.new_ids) <= shape[0] + 1 for event in rounds)


@pytest.mark.parametrize("confidence", [0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_speculative_equals_plain_when_unlikely_branches_are_left_out(family: str, confidence: float) -> None:
    """Down to rounds that draft nothing at all, which are plain steps."""
    target = dataclasses.replace(tiny_target(family), stop_ids=frozenset())
    prompt = some_prompt(6, 9)
    expected = ids_of(list(plain(target, prompt, Sampler(), 20)))
    head = OracleHead(expected, right=0.8)
    shape = ConfidentShape(depth=4, nodes=12, topk=3, confidence=confidence)
    engine = Engine(target, tiny_drafter(target), head, shape)
    rounds = [head.follow(event) for event in engine.decode(prompt, Sampler(), 20)]
    assert ids_of(rounds) == expected
    drafted = sum(event.accepted_drafts for event in rounds)
    assert drafted == 0 if confidence == 0.99 else drafted > 0 or confidence == 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family: str) -> None:
    target = tiny_target(family)
    for seed in range(3):
        prompt = some_prompt(seed, 5)
        own = target.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 5).long(), max_new_tokens=20, do_sample=False
        )
        assert ids_of(list(plain(target, prompt, Sampler(), 20))) == own[0, 5:].tolist()


def test_a_drafter_that_is_always_right_fills_every_round() -> None:
    target, prompt = tiny_target("llama"), some_prompt(7, 4)
    expected = ids_of(list(plain(target, prompt, Sampler(), 17)))
    depth = 3
    # Round r drafts answer tokens 1+4r, 2+4r, 3+4r: the bonus token of each round is the target's own.
    script = [[expected[1 + 4 * r + level]] for r in range(4) for level in range(depth)]
    engine = Engine(target, tiny_drafter(target), ScriptHead(script), TreeShape(depth=depth, nodes=depth, topk=1))
    rounds = list(engine.decode(prompt, Sampler(), 17))
    assert ids_of(rounds) == expected
    assert [event.accepted_drafts for event in rounds if event.kind == "draft"] == [3, 3, 3, 3]


def test_a_drafter_that_is_always_wrong_costs_rounds_and_no_word() -> None:
    target, prompt = tiny_target("llama"), some_prompt(8, 4)
    expected = ids_of(list(plain(target, prompt, Sampler(), 12)))
    absent = [token for token in range(3, VOCAB) if token not in expected][:3]
    engine = Engine(target, tiny_drafter(target), ScriptHead([absent]), TreeShape(depth=3, nodes=6, topk=3))
    rounds = list(engine.decode(prompt, Sampler(), 12))
    assert ids_of(rounds) == expected
    assert all(event.accepted_drafts == 0 and len(event.new_ids) == 1 for event in rounds)


def test_a_stop_token_ends_the_answer_in_the_middle_of_a_path() -> None:
    """The stop token is drafted and accepted with words behind it; those must not be emitted."""
    target, prompt = tiny_target("llama"), some_prompt(9, 4)
    full = ids_of(list(plain(target, prompt, Sampler(), 12)))
    stop = next(index for index, token in enumerate(full) if index >= 2 and token not in full[:index])
    stopping = dataclasses.replace(target, stop_ids=frozenset([full[stop]]))
    script = [[token] for token in full[1:]]
    engine = Engine(stopping, tiny_drafter(target), ScriptHead(script), TreeShape(depth=8, nodes=8, topk=1))
    rounds = list(engine.decode(prompt, Sampler(), 12))
    assert ids_of(rounds) == full[: stop + 1] == ids_of(list(plain(stopping, prompt, Sampler(), 12)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral-sliding"])
def test_the_context_can_be_filled_to_its_last_position(family: str) -> None:
    target = tiny_target(family)
    prompt = some_prompt(3, target.max_positions - 5)
    expected = ids_of(list(plain(target, prompt, Sampler(temperature=1.0), 99)))
    assert len(expected) <= 5
    assert ids_of(list(tiny_engine(target).decode(prompt, Sampler(temperature=1.0), 99))) == expected


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    target = tiny_target("llama")
    with pytest.raises(DataError, match=r"160 tokens and the target's context holds 160; shorten"):
        list(tiny_engine(target).decode(some_prompt(0, 160), Sampler(), 4))
    with pytest.raises(DataError, match="no tokens"):
        list(plain(target, [], Sampler(), 4))
    with pytest.raises(DataError, match="max_new_tokens is -1"):
        list(plain(target, [3], Sampler(), -1))


def test_a_prompt_longer_than_one_prefill_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    target, prompt = tiny_target("mistral-sliding"), some_prompt(4, 50)
    whole = ids_of(list(plain(target, prompt, Sampler(), 12)))
    monkeypatch.setattr("coral_core.decoding.step.PREFILL_ROWS", 16)
    assert ids_of(list(plain(target, prompt, Sampler(), 12))) == whole
    assert ids_of(list(tiny_engine(target).decode(prompt, Sampler(), 12))) == whole


def test_a_drafter_as_good_as_the_target_is_not_needed_for_the_right_answer_but_seed_and_tree_do_not_matter() -> None:
    """The answer at T = 1 is a function of seed and target alone."""
    target, prompt = tiny_target("qwen2"), some_prompt(5, 8)
    answers = set()
    for seed, shape in ((1, SHAPES[2]), (2, SHAPES[3]), (3, SHAPES[4])):
        depth, nodes, topk = shape
        engine = Engine(
            target, tiny_drafter(target, seed), PlainHead(target), TreeShape(depth=depth, nodes=nodes, topk=topk)
        )
        answers.add(tuple(ids_of(list(engine.decode(prompt, Sampler(temperature=1.0, seed=11), 20)))))
    assert len(answers) == 1
