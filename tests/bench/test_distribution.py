"""The check of sampled answers: quiet for a right sampler, loud for a wrong one."""

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import pytest

from coral_core.bench.distribution import check_distribution, uniformity
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from tests.tiny import tiny_engine, tiny_target

PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]


@dataclasses.dataclass(frozen=True)
class Cold:
    """An engine that samples at another temperature than it was told."""

    engine: Any
    temperature: float

    @property
    def target(self) -> Any:
        return self.engine.target

    def decode(self, prompt: list[int], sampler: Sampler, max_new_tokens: int) -> Iterator[Round]:
        return self.engine.decode(prompt, dataclasses.replace(sampler, temperature=self.temperature), max_new_tokens)


@pytest.mark.parametrize(
    "sampler",
    [Sampler(temperature=1.0), Sampler(temperature=0.8, top_p=0.9, repetition_penalty=1.5, seed=7)],
    ids=["plain", "warped"],
)
def test_speculative_samples_follow_the_target(sampler: Sampler) -> None:
    found = check_distribution(tiny_engine(tiny_target(), depth=2, nodes=3, topk=2), sampler, PROMPTS)
    assert found["ok"]
    assert found["tokens"] > 200


def test_a_sampler_that_is_too_greedy_is_found_out() -> None:
    engine = Cold(tiny_engine(tiny_target(), depth=2, nodes=3, topk=2), 0.6)
    assert not check_distribution(engine, Sampler(temperature=1.0), PROMPTS)["ok"]  # type: ignore[arg-type]


def test_chi_square_by_hand() -> None:
    """Eight bins of four: 0. All 32 in one bin: (28² + 7 · 4²) / 4 = 224."""
    even = [(n + 0.5) / 32 for n in range(32)]
    assert uniformity(even)["chi2"] == 0
    assert uniformity(even)["p_value"] == pytest.approx(1.0)
    one = uniformity([0.01] * 32)
    assert one["chi2"] == pytest.approx(224)
    assert not one["ok"]
    assert uniformity([1.0])["bins"] == [0, 0, 0, 0, 0, 0, 0, 1]


def test_the_p_value_is_a_probability() -> None:
    """Of many truly uniform samples, a tenth falls below p = 0.1, within three standard deviations."""
    draw = random.Random(0)
    below = sum(uniformity([draw.random() for _ in range(400)])["p_value"] < 0.1 for _ in range(400))
    assert abs(below - 40) < 3 * (400 * 0.1 * 0.9) ** 0.5
