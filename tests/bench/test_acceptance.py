"""Tokens per round of a drafter in training, against a case computed by hand."""

from collections.abc import Iterator
from typing import Any

from coral_core.bench.acceptance import tokens_per_round
from coral_core.decoding.rounds import Round
from coral_core.recipe.schema import Recipe


class Told:
    """An engine whose prompts say how many tokens each round brings."""

    def decode(self, prompt: list[int], *_: Any) -> Iterator[Round]:
        yield Round([0], "prefill")
        for count in prompt:
            yield Round([0] * count, "draft", count - 1)


def test_it_is_the_mean_over_all_rounds() -> None:
    told: list[tuple[int, int, dict[str, float]]] = []

    def decoded(prompts: list[list[int]]) -> float:
        return tokens_per_round(Recipe(name="a"), Told(), prompts, lambda _, *rest: told.append(rest))  # type: ignore[arg-type]

    assert decoded([[4, 4], [3, 1]]) == 3.0
    assert told == [(1, 2, {"tokens_per_round": 4.0}), (2, 2, {"tokens_per_round": 3.0})]
    assert decoded([[]]) == 1.0, "an answer of one token has no rounds"
