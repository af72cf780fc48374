"""The inputs of three layers beside the features: what is stored, and that words are never answered twice for them."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from coral_core.data import stage as module
from coral_core.data.estimate import estimate
from coral_core.data.job import Job, standing
from coral_core.data.stage import check_job, prepare
from coral_core.errors import TargetError
from coral_core.store.batches import batch_of
from coral_core.store.shard import FP8, Sample, Shard, shard_name, write_shard
from coral_core.store.store import Store
from coral_core.target.capture import tap
from tests.data.helpers import make_job, make_target

LAYERS = 4
TAPS = (1, 2, 3)


def deep_job(folder: Path, **data: object) -> Job:
    return make_job(folder, make_target(layers=LAYERS), **{"feature_dtype": "float32", "shape": "eagle3", **data})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store without taps."""
    job = deep_job(tmp_path_factory.mktemp("plain"), shape="eagle2")
    prepare(job)
    return job.folder


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the shards whose dialogues the target was asked to answer."""
    asked: list[int] = []

    def answer(target, dialogues, *rest):
        asked.append(len(dialogues))
        return real(target, dialogues, *rest)

    real = module.answer
    monkeypatch.setattr(module, "answer", answer)
    return asked


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def assert_alike(store: Store, other: Store) -> None:
    """The same words; features that were read, and such as were kept while the answer was written, to rounding."""
    assert len(store) == len(other)
    for index in range(len(store)):
        sample, wanted = store[index], other[index]
        assert torch.equal(sample.ids_T, wanted.ids_T) and torch.equal(sample.answer_T, wanted.answer_T)
        torch.testing.assert_close(sample.feature_TD, wanted.feature_TD, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(sample.tap_TI, wanted.tap_TI, rtol=1e-5, atol=1e-4)


def test_a_store_holds_what_the_layers_read(tmp_path: Path) -> None:
    job = deep_job(tmp_path)
    store = prepare(job)
    assert store.taps == TAPS
    assert store.manifest.inputs["taps"] == "1 2 3"
    sample = store[3]
    with torch.no_grad():
        out = job.target.model(sample.ids_T[None], output_hidden_states=True)
    wanted_TI = torch.cat([out.hidden_states[layer][0] for layer in TAPS], dim=-1)
    torch.testing.assert_close(sample.tap_TI, wanted_TI, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sample.feature_TD, out.hidden_states[-1][0], rtol=1e-5, atol=1e-4)
    assert standing(job).store is not None


def test_a_store_without_them_is_tapped_anew_and_nothing_is_answered(
    plain: Path, tmp_path: Path, answered: list[int]
) -> None:
    job = deep_job(tmp_path)
    fresh = prepare(deep_job(tmp_path / "fresh"))
    answered.clear()
    copied(plain, job.folder)
    found = standing(job)
    assert found.words
    assert found.changed == ("the layers tapped were none, are 1 2 3",)
    assert_alike(prepare(job), fresh)
    assert answered == []


def test_a_damaged_shard_s_words_are_answered_again(plain: Path, tmp_path: Path, answered: list[int]) -> None:
    job = deep_job(tmp_path)
    fresh = prepare(deep_job(tmp_path / "fresh"))
    answered.clear()
    path = copied(plain, job.folder) / shard_name(1)
    path.write_bytes(path.read_bytes()[:-8] + b"\0\1\2\3\4\5\6\7")
    assert_alike(prepare(job), fresh)
    assert len(answered) == 1


def test_a_store_with_them_serves_a_recipe_that_asks_for_none(tmp_path: Path) -> None:
    prepare(deep_job(tmp_path))
    assert standing(deep_job(tmp_path, shape="eagle2")).store is not None
    changed = standing(deep_job(tmp_path, shape="eagle2", max_samples=15))
    assert changed.store is None
    assert not changed.words


@pytest.mark.parametrize("kept", [{"features": "online"}, {"feature_dtype": "fp8"}], ids=str)
def test_other_features_of_the_same_words_are_tapped_too(
    plain: Path, tmp_path: Path, answered: list[int], kept: dict[str, str]
) -> None:
    job = deep_job(tmp_path, **kept)
    old = Store.open(copied(plain, job.folder))
    words = [old[index].ids_T.tolist() for index in range(len(old))]
    store = prepare(job)
    assert [store[index].ids_T.tolist() for index in range(len(store))] == words
    assert store.taps == TAPS
    assert answered == []


def test_fp8_taps_have_scales_of_their_own(tmp_path: Path) -> None:
    """A tap may be far larger than another: one scale for all would leave nothing of the smaller."""
    torch.manual_seed(0)
    sizes = (1.0, 1e3, 1e6)
    tap_TI = torch.cat([size * torch.randn(6, 16) for size in sizes], dim=1)
    sample = Sample(torch.arange(6), torch.ones(6, dtype=torch.bool), torch.randn(6, 16), tap_TI)
    facts = write_shard(tmp_path, 0, [sample], FP8)
    read_TI = Shard(tmp_path / facts.file, "").sample(0).tap_TI
    assert read_TI is not None
    for size, read_TD, tap_TD in zip(sizes, read_TI.split(16, 1), tap_TI.split(16, 1), strict=True):
        torch.testing.assert_close(read_TD, tap_TD, rtol=1 / 16, atol=size / 500)


def test_online_taps_are_the_stored_ones(tmp_path: Path) -> None:
    stored = prepare(deep_job(tmp_path / "stored"))
    job = deep_job(tmp_path / "online", features="online")
    prepare(job)

    def ask(ids_BT, valid_BT):
        found = tap(job.target.tapping(TAPS), ids_BT, valid_BT)
        return found.feature_BTD, found.tap_BTI

    online = Store.open(job.folder, tap=ask)
    assert online.taps == TAPS
    kept, asked = batch_of(stored, [0, 4, 2]), batch_of(online, [0, 4, 2])
    torch.testing.assert_close(asked.tap_BTI, kept.tap_BTI, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(asked.feature_BTD, kept.feature_BTD, rtol=1e-5, atol=1e-4)


def test_the_bytes_are_told_beforehand(tmp_path: Path) -> None:
    job = deep_job(tmp_path, feature_dtype="bfloat16")
    expected = estimate(job)
    store = prepare(job)
    assert store.manifest.facts["bytes"] <= expected.size_bytes + 1000 * len(store.manifest.facts["shards"])
    plain = estimate(deep_job(tmp_path, feature_dtype="bfloat16", shape="eagle2"))
    assert expected.size_bytes - plain.size_bytes == expected.tokens * 3 * 16 * 2


def test_layers_that_read_several_states_of_a_token_are_refused_before_one_is_answered(tmp_path: Path) -> None:
    """Gemma 3n's read four of each, side by side before the batch."""
    target = make_target(layers=4)
    config = target.model.config

    def forward(input_ids: torch.Tensor, past_key_values: object = None, **_: object) -> SimpleNamespace:
        feature_BTD = torch.zeros(*input_ids.shape, 16)
        return SimpleNamespace(hidden_states=[feature_BTD.expand(4, -1, -1, -1)] * 5, last_hidden_state=feature_BTD)

    several = dataclasses.replace(target, model=SimpleNamespace(base_model=forward, config=config), exact=False)
    says = r"read states of the shape \[4, 1, 1, 16\], and a drafter reads \[1, 1, 16\]\. Set train\.preset="
    with pytest.raises(TargetError, match=says):
        check_job(make_job(tmp_path, several, shape="eagle3"))
    check_job(make_job(tmp_path, target, shape="eagle3"))


def test_a_target_of_two_layers_is_refused_before_it_answers(tmp_path: Path) -> None:
    with pytest.raises(
        TargetError, match="2 layers, and an EAGLE-3 drafter reads three. Set train.preset=drawn train.shape=eagle2"
    ):
        prepare(make_job(tmp_path, shape="eagle3"))
    assert not (tmp_path / ".data.partial").exists()
