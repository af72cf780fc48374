"""Training in EAGLE-3's shape: from taps, through all steps, to a drafter that decoding reads."""

import dataclasses

import pytest
import torch

from coral_core.drafter.load import load_drafter, save_drafter
from coral_core.errors import ArtifactError
from coral_core.grouping.router import Source, held_out_rows
from coral_core.recipe.schema import PRESETS
from coral_core.store.batches import batch_of
from coral_core.training import trainer
from coral_core.training.depths import by_depth
from coral_core.training.loop import Reports, train
from coral_core.training.objective import Objective
from tests.training.helpers import HIDDEN, TAPS, tiny_batch, tiny_drafter, tiny_lent, tiny_spec, tiny_store


@pytest.fixture(autouse=True)
def fresh_accelerate():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def spec(preset="eagle3", **changes):
    return tiny_spec(**{**PRESETS[preset], "unroll_steps": 3, "candidates": 0, "learning_rate": 1e-2, **changes})


def weights(store, folder, measured=None, **changes):
    reports = Reports(log=lambda line: None, measure=measured)
    return train(spec(**changes), store, seed=0, work=folder, reports=reports).state_dict()


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("shape", ["eagle3", "eagle3.1"])
def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path, shape):
    store = tiny_store(tmp_path / "data", holdout=3, taps=True)
    whole = weights(store, tmp_path / "whole", shape=shape)

    def stop(line):
        raise StoppedError

    with pytest.raises(StoppedError):
        train(spec(shape=shape), store, seed=0, work=tmp_path / "cut", reports=Reports(log=stop))
    resumed = weights(store, tmp_path / "cut", shape=shape)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert ("fc_norm.0.weight" in whole) == (shape == "eagle3.1")


def test_every_weight_learns_and_the_best_by_decoding_is_kept(tmp_path):
    store = tiny_store(tmp_path / "data", holdout=3, taps=True)
    scores = iter([2.0, 1.0])
    seen = []

    def measured(drafter):
        seen.append({name: value.clone() for name, value in drafter.state_dict().items()})
        return next(scores)

    kept = weights(store, tmp_path / "run", measured, eval_every=5)
    begun = trainer.initial_drafter(trainer.drafter_config(spec(), store), 0)
    begun.expect_sizes(trainer.tap_sizes(store))
    for name, value in begun.state_dict().items():
        assert not torch.equal(kept[name], value), name
    assert all(torch.equal(kept[name], value) for name, value in seen[0].items())


def test_the_published_drafter_names_its_taps_and_reads_back(tmp_path):
    store = tiny_store(tmp_path / "data", taps=True)
    drafter = trainer.initial_drafter(trainer.drafter_config(spec(), store), 0)
    assert drafter.config.taps == TAPS
    (tmp_path / "drafter").mkdir()
    save_drafter(drafter, tmp_path / "drafter")
    back = load_drafter(tmp_path / "drafter")
    assert back.config == drafter.config
    assert all(torch.equal(back.state_dict()[name], value) for name, value in drafter.state_dict().items())


def test_data_without_taps_are_refused_and_the_other_shape_reads_data_with_them(tmp_path):
    with pytest.raises(ArtifactError, match=r"hold no taps, which train.shape=eagle3 reads; .* Run: coral prep"):
        weights(tiny_store(tmp_path / "plain"), tmp_path / "run")
    store = tiny_store(tmp_path / "data", taps=True)
    assert trainer.drafter_config(tiny_spec(), store).taps == ()


def test_a_start_of_another_shape_is_refused(tmp_path):
    (tmp_path / "old").mkdir()
    save_drafter(tiny_drafter(), tmp_path / "old")
    store = tiny_store(tmp_path / "data", taps=True)
    with pytest.raises(ArtifactError, match=r"has taps \(\), this target's drafter has \(1, 2, 4\)"):
        weights(store, tmp_path / "run", init_from=str(tmp_path / "old"))


def test_the_first_weights_take_taps_of_any_size_alike(tmp_path):
    """Layers are up to seven times as large as each other; the largest would drown what attention adds."""
    store = tiny_store(tmp_path / "data", taps=True)
    sizes = trainer.tap_sizes(store)
    assert sizes == pytest.approx([5.0] * 3, rel=0.15)
    drafter = trainer.initial_drafter(trainer.drafter_config(spec(), store), 0)
    before = drafter.fc.weight.clone()
    drafter.expect_sizes([1.0, 10.0, 100.0])
    for tap, size in enumerate((1.0, 10.0, 100.0)):
        part = slice(tap * HIDDEN, (tap + 1) * HIDDEN)
        torch.testing.assert_close(drafter.fc.weight[:, part], before[:, part] / size)


def test_later_steps_weigh_less():
    batch, lent = tiny_batch([14, 9], [(5, 14), (1, 9)]), tiny_lent()
    hiddens = [torch.randn(2, 13, HIDDEN, generator=torch.Generator().manual_seed(step)) for step in range(3)]
    alone = [float(Objective(regression_weight=0, distill_weight=1)([h], batch, lent)[0]) for h in hiddens]
    total, _ = Objective(regression_weight=0, distill_weight=1, step_decay=0.5)(hiddens, batch, lent)
    assert float(total) == pytest.approx((alone[0] + alone[1] / 2 + alone[2] / 4) / 1.75, rel=1e-5)


def test_what_is_measured_by_depth_and_what_routers_learn_from_read_taps(tmp_path):
    store = tiny_store(tmp_path / "data", holdout=4, taps=True)
    drafter = tiny_drafter(taps=TAPS).requires_grad_(False)
    depths = by_depth(drafter, store.lent(), store, torch.device("cpu"))
    rows = held_out_rows(Source(drafter, store.lent(), 3), store)
    assert len(depths["accuracy_by_depth"]) == 5
    batch = batch_of(store, list(store.holdout_indices))
    loud = dataclasses.replace(batch, feature_BTD=batch.feature_BTD + 100)
    from coral_core.training.unroll import unroll

    with torch.no_grad():
        outs, same = (unroll(drafter, store.lent(), one, 2) for one in (batch, loud))
    assert torch.equal(outs[1], same[1])
    assert rows.hidden_SND.shape[-1] == HIDDEN
