"""What a training would take is counted from the store, and nothing of a training is begun."""

import time

import pytest

from coral_core.training.estimate import estimate
from coral_core.training.trainer import Trainer
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


def test_reading_and_updating_are_timed(tmp_path, monkeypatch):
    """Where the target answers for the features, reading is most of a step; AdamW's moments are memory."""
    read, updated = Trainer.micro_batches, []

    def slow(trainer):
        for micro in read(trainer):
            time.sleep(0.05)
            yield micro

    monkeypatch.setattr(Trainer, "micro_batches", slow)
    update = Trainer.update
    monkeypatch.setattr(Trainer, "update", lambda trainer: updated.append(trainer.step) or update(trainer))
    expected = estimate(tiny_spec(steps=30, batch_size=4), tiny_store(tmp_path / "data", samples=12), seed=0)
    assert expected.elapsed_s > 30 * 0.05 * 0.6 and len(updated) == 4 and len(set(updated)) == 1


def test_more_steps_take_as_much_more(tmp_path):
    store = tiny_store(tmp_path / "data", samples=12)
    few, many = (estimate(tiny_spec(steps=steps), store, seed=0) for steps in (10, 1000))
    assert many.elapsed_s > 10 * few.elapsed_s
    assert many.tokens == pytest.approx(100 * few.tokens, rel=0.3)
