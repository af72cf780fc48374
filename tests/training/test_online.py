"""Features asked of the target while training: the same training as from the disk, with nothing on it but tokens."""

import dataclasses

import pytest
import torch

from coral_core.data.stage import prepare
from coral_core.drafter.load import load_drafter
from coral_core.recipe.schema import Recipe
from coral_core.store.batches import batch_of, batches
from coral_core.store.shard import Shard
from coral_core.target.capture import tap
from coral_core.training.stage import train_drafter
from tests.data.helpers import make_job, make_target
from tests.training.helpers import tiny_spec


@pytest.fixture(autouse=True)
def fresh_accelerate():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def ask(ids_BT, valid_BT):
    found = tap(make_target(), ids_BT, valid_BT)
    return found.feature_BTD, found.tap_BTI


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The same dialogues twice: with their features, and without."""
    made = {}
    for features in ("stored", "online"):
        folder = tmp_path_factory.mktemp(features)
        made[features] = make_job(folder, features=features, feature_dtype="float32")
        prepare(made[features])
    return made


def test_nothing_is_on_disk_but_tokens(jobs):
    from coral_core.store.store import Store

    stored, online = (Store.open(jobs[name].folder) for name in ("stored", "online"))
    assert [sample.ids_T.tolist() for sample in map(online.__getitem__, range(len(online)))] == [
        sample.ids_T.tolist() for sample in map(stored.__getitem__, range(len(stored)))
    ]
    for path in online.folder.glob("shard-*.safetensors"):
        assert Shard(path, "").sample(0).feature_TD.shape[1] == 0
    tokens = online.manifest.facts["tokens"]
    shards = sum(shard["size_bytes"] for shard in online.manifest.facts["shards"])
    assert shards < 5 * tokens + 1000 * len(online.manifest.facts["shards"])


def test_a_batch_asked_of_the_target_is_the_stored_one(jobs):
    from coral_core.store.store import Store

    stored, online = Store.open(jobs["stored"].folder), Store.open(jobs["online"].folder, tap=ask)
    for index in (list(stored.holdout_indices), [0, 5, 2]):
        kept, asked = batch_of(stored, index), batch_of(online, index)
        for field in dataclasses.fields(kept):
            torch.testing.assert_close(getattr(asked, field.name), getattr(kept, field.name), rtol=0, atol=1e-5)
    pair = (next(batches(store, batch_size=4, seed=0)) for store in (stored, online))
    torch.testing.assert_close(*(batch.feature_BTD for batch in pair), rtol=0, atol=1e-5)


def test_training_online_equals_training_from_the_disk(jobs):
    spec = tiny_spec(steps=4, unroll_steps=3)
    weights = []
    for job in jobs.values():
        recipe = Recipe(name="tiny", seed=job.recipe.seed, data=job.recipe.data, train=spec)
        run = job.folder.parent
        train_drafter(recipe, run, tap=ask if job.online else None)
        weights.append(load_drafter(run / "drafter").state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5)
