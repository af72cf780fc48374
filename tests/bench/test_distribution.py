"""The check of sampled answers: quiet for a right sampler, loud for a wrong one."""

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from coral_core.bench.distribution import check_distribution, uniformity
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from tests.tiny import tiny_engine, tiny_target

PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens as a test has time for."""
    monkeypatch.setattr("coral_core.bench.distribution.SEEDS", 16)


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
def test_speculative_samples_follow_the_target(few: None, sampler: Sampler) -> None:
    found = check_distribution(tiny_engine(tiny_target(), depth=2, nodes=3, topk=2), sampler, PROMPTS)
    assert found["ok"]
    assert found["tokens"] > 200


def test_a_sampler_that_is_too_greedy_is_found_out(few: None) -> None:
    engine = Cold(tiny_engine(tiny_target(), depth=2, nodes=3, topk=2), 0.6)
    assert not check_distribution(engine, Sampler(temperature=1.0), PROMPTS)["ok"]  # type: ignore[arg-type]


class Urn:
    """Engine and target in one, whose next token always has the same distribution: what is left is the noise."""

    device = torch.device("cpu")

    def __init__(self, seed: int) -> None:
        self.logits_V = 2 * torch.randn(40, generator=torch.Generator().manual_seed(seed))
        self.target = self.lent = self

    def decode(self, prompt: list[int], sampler: Sampler, max_new_tokens: int) -> Iterator[Round]:
        noise_NV = sampler.ahead(len(prompt), max_new_tokens, self.logits_V.numel(), self.device).noise_TV
        yield Round((sampler.warp(self.logits_V[None]) + noise_NV).argmax(-1).tolist(), "draft")

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return ids_BT

    def logits(self, ids_T: torch.Tensor) -> torch.Tensor:
        return self.logits_V.expand(ids_T.numel(), -1)


@pytest.mark.parametrize(("temperature", "least", "most"), [(1.0, 0, 1), (1.1, 10, 20)], ids=["right", "wrong"])
def test_the_check_holds_its_level(temperature: float, least: int, most: int) -> None:
    """A right sampler falls below p = 0.001 in one run of a thousand, with whatever seed the runs begin: when seeds
    shared their noise, 8 of these 20 did. A wrong one, too hot by a tenth, is found in more than half of them."""
    below = 0
    for run in range(20):
        engine = Cold(Urn(run), temperature)
        below += not check_distribution(engine, Sampler(temperature=1.0, seed=64 * run), PROMPTS)["ok"]  # type: ignore[arg-type]
    assert least <= below <= most


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
