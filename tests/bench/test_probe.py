"""What a mean round is measured of: drafted rounds alone."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from coral_core.bench import probe
from coral_core.decoding.rounds import Round
from coral_core.errors import DataError
from coral_core.grouping.cost import RoundCost, hit_rates
from coral_core.head.heads import Head
from coral_core.recipe.schema import Recipe
from tests.tiny import tiny_drafter, tiny_target

DRAFT = Round([5, 6, 7], "draft", 2, {"head": 0.1, "draft": 0.2, "verify": 0.3})
COPY = Round([5, 6, 7, 8, 9, 5], "copy", 5, {"verify": 0.7})


@dataclasses.dataclass(frozen=True)
class Played:
    """An engine whose rounds are given: a drafted one asks the head for its root, and every second one for a level."""

    rounds: list[Round]
    head: Head

    def decode(self, *_: Any) -> Iterator[Round]:
        for number, event in enumerate(self.rounds):
            for rows in (1, 4)[: number % 2 + 1] if event.kind == "draft" else ():
                self.head.candidates(torch.zeros(rows, 32))
            yield event


def played(rounds: list[Round], monkeypatch: pytest.MonkeyPatch) -> RoundCost:
    target = tiny_target("llama")
    monkeypatch.setattr(probe, "wire", lambda _target, _drafter, head, _spec: Played(rounds, head))
    return probe.Probe(Recipe(), target, [[3, 4], [4, 5]], lambda *_: None).measure(tiny_drafter(target))


def test_plain_steps_and_copies_are_not_rounds_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, step = Round([4], "prefill"), Round([5], "plain", 0, {"verify": 0.2})
    cost = played([prefill, DRAFT, COPY, step, DRAFT], monkeypatch)
    assert (cost.round_s, cost.head_s) == pytest.approx((0.6, 0.1))
    assert cost.hit_rates == hit_rates([2, 2])
    assert (cost.head_calls, cost.level_rows) == (1.5, 4), "the first prompt, which warms up, does not count"


def test_prompts_without_a_draft_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no held-out prompt led to a drafted round. Raise data\.holdout"):
        played([COPY], monkeypatch)
