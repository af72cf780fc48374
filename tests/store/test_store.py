"""What is written is what is read, and damage is found and named."""

import json
from pathlib import Path

import pytest
import torch

from coral_core.artifacts import file_sha256
from coral_core.errors import ArtifactError, DataError
from coral_core.store.shard import FP8, Sample, Shard, _pack, _unpack, row_bytes, write_shard
from coral_core.store.store import OPEN_SHARDS, Store
from tests.store.helpers import make_lent, make_samples, make_store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    samples = make_samples(12)
    store = make_store(tmp_path / "data", samples, dtype=dtype, holdout=3)
    assert len(store) == 12
    assert list(store.train_indices) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert list(store.holdout_indices) == [9, 10, 11]
    assert store.holdout_prompts == [s.ids_T[: len(s.ids_T) // 2].tolist() for s in samples[9:]]
    for index, sample in enumerate(samples):
        read = store[index]
        assert read.ids_T.dtype == torch.int64
        assert read.ids_T.tolist() == sample.ids_T.tolist()
        assert read.answer_T.tolist() == sample.answer_T.tolist()
        assert torch.equal(read.feature_TD, sample.feature_TD.to(dtype))


def test_the_shard_layout_is_the_documented_one(tmp_path: Path) -> None:
    """Two samples of 2 and 3 tokens, as rows on disk."""
    feature_ND = torch.arange(10.0).view(5, 2)
    samples = [
        Sample(torch.tensor([7, 8]), torch.tensor([False, True]), feature_ND[:2]),
        Sample(torch.tensor([4, 5, 6]), torch.tensor([False, False, True]), feature_ND[2:]),
    ]
    facts = write_shard(tmp_path, 3, samples, torch.float32)
    shard = Shard(tmp_path / "shard-00003.safetensors", "again")
    assert shard._file.get_tensor("ids").tolist() == [7, 8, 4, 5, 6]
    assert shard._file.get_tensor("answer").tolist() == [False, True, False, False, True]
    assert shard._file.get_tensor("offset").tolist() == [0, 2, 5]
    assert torch.equal(shard._file.get_tensor("feature"), feature_ND)
    assert (facts.samples, facts.tokens, facts.answer_tokens) == (2, 5, 2)
    assert facts.size_bytes == (tmp_path / facts.file).stat().st_size >= 5 * row_bytes(2, torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00003.safetensors"]
    (tmp_path / "plain").touch()
    assert (tmp_path / facts.file).stat().st_mode == (tmp_path / "plain").stat().st_mode, "readable by others as usual"


def test_fp8_keeps_each_row_to_a_sixteenth_of_its_values(tmp_path: Path) -> None:
    """Rows of unlike magnitudes, one of them zero, each to its own scale: a shared one would flush the small rows."""
    samples = make_samples(6, hidden=64)
    for index, sample in enumerate(samples):
        sample.feature_TD.mul_(10.0 ** (3 * index - 9))
    samples[0].feature_TD[1] = 0
    store = make_store(tmp_path / "data", samples, dtype=FP8)
    for index, sample in enumerate(samples):
        read, true = store[index].feature_TD, sample.feature_TD
        largest_T1 = true.abs().amax(1, keepdim=True)
        assert read.dtype == torch.float32
        assert ((read - true).abs() <= torch.maximum(true.abs() / 16, largest_T1 / 448 / 2**9) * 1.001).all()
        torch.testing.assert_close(read.abs().amax(1, keepdim=True), largest_T1)
    facts = store.manifest.facts["shards"][0]
    assert row_bytes(64, FP8) == 64 + 4 + 5
    assert facts["tokens"] * row_bytes(64, FP8) <= facts["size_bytes"] <= facts["tokens"] * row_bytes(64, FP8) + 600


def test_every_fp8_value_is_read_as_torch_reads_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    value_N1 = codes[(codes & 0x7F) != 0x7F].view(FP8)[:, None]  # the two left out are NaN
    torch.testing.assert_close(_unpack(value_N1, torch.ones(254)), value_N1.float(), rtol=0, atol=0)
    assert _pack(torch.tensor([[448.0, -1.0]]), FP8)["feature"].float().tolist() == [[448.0, -1.0]]


def test_fp8_refuses_what_is_not_finite(tmp_path: Path) -> None:
    for value in (float("inf"), float("nan")):
        samples = make_samples(1)
        samples[0].feature_TD[0, 0] = value
        with pytest.raises(DataError, match=r"is infinite or not a number in float8_e4m3fn"):
            write_shard(tmp_path, 0, samples, FP8)


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    make_store(tmp_path / "a", make_samples(12), holdout=2)
    make_store(tmp_path / "b", make_samples(12), holdout=2)
    for name in ("shard-00000.safetensors", "shard-00001.safetensors", "shard-00002.safetensors", "holdout.json"):
        assert file_sha256(tmp_path / "a" / name) == file_sha256(tmp_path / "b" / name), name


def test_counts_of_the_manifest(tmp_path: Path) -> None:
    samples = make_samples(12)
    facts = make_store(tmp_path / "data", samples).manifest.facts
    assert facts["samples"] == 12
    assert facts["tokens"] == sum(len(s.ids_T) for s in samples)
    assert facts["answer_tokens"] == sum(int(s.answer_T.sum()) for s in samples)
    assert (facts["hidden"], facts["vocab"], facts["dtype"]) == (8, 32, "float32")
    assert [shard["samples"] for shard in facts["shards"]] == [5, 5, 2]


def flip_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("place", [0, 200, -1])
def test_a_flipped_byte_is_found_and_named(tmp_path: Path, place: int) -> None:
    make_store(tmp_path / "data", make_samples(12))
    flip_byte(tmp_path / "data" / "shard-00001.safetensors", place)
    store = Store.open(tmp_path / "data", "coral prepare-data x.yaml")
    assert len(store[0].ids_T), "an undamaged shard stays readable"
    with pytest.raises(ArtifactError, match=r"shard-00001\.safetensors is damaged.*Run: coral prepare-data x\.yaml"):
        store[5]
    assert store.manifest.damaged(store.folder) == ["shard-00001.safetensors"]


@pytest.mark.parametrize("name", ["holdout.json", "lent.safetensors"])
def test_damage_beside_the_shards_is_found_and_named(tmp_path: Path, name: str) -> None:
    make_store(tmp_path / "data", make_samples(12), holdout=2)
    flip_byte(tmp_path / "data" / name, -2)
    store = Store.open(tmp_path / "data")
    with pytest.raises(ArtifactError, match=f"{name} is damaged"):
        (store.lent(), store.holdout_prompts)
    assert store.manifest.damaged(store.folder) == [name]


def test_a_missing_or_cut_shard_is_named_on_opening(tmp_path: Path) -> None:
    make_store(tmp_path / "data", make_samples(12))
    path = tmp_path / "data" / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match=r"shard-00002\.safetensors is damaged \(\d+ bytes instead of \d+\)"):
        Store.open(tmp_path / "data")
    path.unlink()
    with pytest.raises(ArtifactError, match=r"shard-00002\.safetensors is missing\. Run: coral prepare-data"):
        Store.open(tmp_path / "data")


def test_no_store_at_all(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no data in"):
        Store.open(tmp_path / "data")


def test_a_feature_that_the_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    samples = make_samples(1)
    samples[0].feature_TD[0, 0] = 1e6
    with pytest.raises(
        DataError, match=r"sample 0, in shard-00000\.safetensors, is infinite .* float16.*data.feature_dtype=bfloat16"
    ):
        write_shard(tmp_path, 0, samples, torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_lent_survives(tmp_path: Path) -> None:
    lent = make_lent()
    read = make_store(tmp_path / "data", make_samples(3), lent=lent).lent()
    assert torch.equal(read.embed_VD, lent.embed_VD)
    assert torch.equal(read.head_VD, lent.head_VD)


def test_more_shards_than_may_stay_open(tmp_path: Path) -> None:
    samples = make_samples(OPEN_SHARDS + 6)
    store = make_store(tmp_path / "data", samples, per_shard=1)
    read = [store[index].ids_T.tolist() for index in range(len(store))]
    assert read == [sample.ids_T.tolist() for sample in samples]
    assert len(store._open) == OPEN_SHARDS


def test_holdout_file_is_plain_json(tmp_path: Path) -> None:
    store = make_store(tmp_path / "data", make_samples(4), holdout=1)
    assert json.loads((store.folder / "holdout.json").read_text()) == store.holdout_prompts


def test_only_the_training_answers_are_counted(tmp_path):
    ids = [torch.tensor([1, 1, 2, 3]), torch.tensor([5, 5, 5, 5])]
    answer_T = torch.tensor([False, True, True, True])
    samples = [Sample(ids_T, answer_T, torch.zeros(4, 8)) for ids_T in ids]
    count_V = make_store(tmp_path / "data", samples, lent=make_lent(vocab=6), holdout=1).answer_counts()
    assert count_V.tolist() == [0, 1, 1, 1, 0, 0]
