"""Numbers that overflow: a draft that does changes no answer, an answer that does ends in one line, and alone."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from benchmarks.batch import decode_all
from coral_core.decoding import step
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.seat import Memory
from coral_core.decoding.table import Request, Table
from coral_core.errors import DataError
from coral_core.target.target import Target
from tests.tiny import ScriptHead, tiny_drafter, tiny_target

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [20, 21]]
NEW = 24


def said(rounds: Iterator[Round]) -> list[int]:
    return [token for event in rounds for token in event.new_ids]


def target_of(family: str, exact: bool = True) -> Target:
    target = dataclasses.replace(tiny_target(family), stop_ids=frozenset())
    return dataclasses.replace(target, exact=target.exact and exact)


def poisoned(family: str, token: int, exact: bool = True) -> Target:
    """The same, whose row for one token is no number: as where an activation overflows in float16."""
    target = dataclasses.replace(tiny_target.__wrapped__(family), stop_ids=frozenset())  # of its own
    target = dataclasses.replace(target, exact=target.exact and exact)
    assert target.lent.embed_VD is not target.lent.head_VD
    with torch.no_grad():
        target.lent.embed_VD[token] = torch.nan
    return target


def drafting(target: Target, token: int) -> Engine:
    """Every draft holds the token, beside others."""
    head = ScriptHead([[token, 30, 40]])
    return Engine(target, tiny_drafter(target), head, TreeShape(depth=3, nodes=6, topk=3))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_a_draft_that_overflows_changes_no_answer(family: str, exact: bool) -> None:
    """A hidden column weighs 0, and 0 times no number is no number: siblings, and later rows, were spoilt by it."""
    target = target_of(family, exact)
    answers = [said(plain(target, prompt, Sampler(), NEW)) for prompt in PROMPTS]
    token = next(token for token in range(50, 96) if all(token not in answer for answer in answers))
    engine = drafting(poisoned(family, token, exact), token)
    assert [said(engine.decode(prompt, Sampler(), NEW)) for prompt in PROMPTS] == answers
    found: dict[int, list[int]] = {}
    for number, event in decode_all(engine, [Request(prompt, Sampler(), NEW) for prompt in PROMPTS], 2):
        found.setdefault(number, []).extend(event.new_ids)
    assert [found[number] for number in range(len(PROMPTS))] == answers


def test_an_answer_that_overflows_is_told_and_its_memory_goes_on() -> None:
    target = target_of("llama")
    whole = said(plain(target, PROMPTS[0], Sampler(), NEW))
    bad = poisoned("llama", token := next(token for token in whole[4:] if token not in whole[:4] + PROMPTS[1]))
    line = r"after \d+ tokens the target computes no numbers in float32: its weights are damaged. Restore its files"
    memory, other = Memory(bad), PROMPTS[1]
    for engine in (Engine(bad), drafting(bad, token)):
        with pytest.raises(DataError, match=line):
            said(engine.decode(PROMPTS[0], Sampler(), NEW, memory if engine.drafter is None else None))
        with pytest.raises(DataError, match="after 4 tokens"):
            said(engine.decode([*PROMPTS[0], token], Sampler(), NEW, memory if engine.drafter is None else None))
    expected = said(plain(target, other, Sampler(), 3))
    assert said(plain(bad, other, Sampler(), 3, memory)) == expected


def test_others_in_the_round_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the seats that it leaves, too: what stands there is hidden from a shorter answer, and is no number."""
    again, verify_roots = [], step._verify_roots
    monkeypatch.setattr(step, "_verify_roots", lambda *given: again.append(given) or verify_roots(*given))
    target, long = target_of("llama"), list(range(3, 15))
    prompts = [long, [*long, *range(20, 30)], [16, 17], [18, 19]]
    answers = [said(plain(target, prompt, Sampler(), NEW)) for prompt in prompts]
    token = next(token for token in answers[0] if all(token not in answer for answer in (*answers[1:], *prompts)))
    table = Table(drafting(poisoned("llama", token), 31 + (token == 31)), 3)
    found = []
    for prompt in prompts[:3]:
        seat, event = table.sit(Request(prompt, Sampler(), NEW))
        found.append((seat, event.new_ids))
    while table.seats:
        for seat, event in table.step():
            next(ids for own, ids in found if own is seat).extend(event.new_ids)
        if found[0][0].error and len(found) == 3:  # the last answer has moved to its seat
            with pytest.raises(DataError, match="after 9 tokens"):
                table.sit(Request([*range(3, 11), token], Sampler(), NEW))
            seat, event = table.sit(Request(prompts[3], Sampler(), NEW))
            found.append((seat, event.new_ids))
    assert isinstance(found[0][0].error, DataError)
    assert found[0][1] == answers[0][: answers[0].index(token) + 1]
    assert [ids for _, ids in found[1:]] == answers[1:]
    assert len(again) == 1, "the rounds after it are drafted as ever"
