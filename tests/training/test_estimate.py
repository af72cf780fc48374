"""What a training would take is counted from the store, and nothing of a training is begun."""

import pytest

from coral_core.training.estimate import estimate
from tests.training.helpers import tiny_drafter, tiny_spec, tiny_store


def test_steps_epochs_and_tokens_are_those_of_the_training(tmp_path):
    store = tiny_store(tmp_path / "data", samples=12)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    expected = estimate(tiny_spec(steps=30, batch_size=4, accumulate=2), store, seed=0)
    assert (expected.steps, expected.epochs) == (30, 20.0)
    assert expected.parameters == sum(weight.numel() for weight in tiny_drafter().parameters())
    mean = store.manifest.facts["tokens"] / store.manifest.facts["samples"]
    assert expected.tokens == pytest.approx(240 * mean, rel=0.3)
    assert expected.elapsed_s > 0 and expected.peak_bytes > 1e7
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_more_steps_take_as_much_more(tmp_path):
    store = tiny_store(tmp_path / "data", samples=12)
    few, many = (estimate(tiny_spec(steps=steps), store, seed=0) for steps in (10, 1000))
    assert many.elapsed_s > 10 * few.elapsed_s
    assert many.tokens == pytest.approx(100 * few.tokens, rel=0.3)
