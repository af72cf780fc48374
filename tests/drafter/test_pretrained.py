"""Drafters as the ecosystem passes them around: from_pretrained, save_pretrained, push_to_hub, and EAGLE's files."""

import dataclasses
import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from coral_core import Drafter, embedded
from coral_core.drafter import hub
from coral_core.drafter.checkpoint import read_checkpoint, weights_fingerprint
from coral_core.drafter.load import load_drafter
from coral_core.errors import ArtifactError
from coral_core.export.bring_in import bring_in
from coral_core.export.run import export_engine
from tests.export.helpers import publish, random_drafter
from tests.tiny import tiny_target


def same(one: Drafter, other: Drafter) -> bool:
    weights = other.state_dict()
    return one.config == other.config and all(torch.equal(w, weights[name]) for name, w in one.state_dict().items())


def test_what_is_saved_is_loaded_with_where_it_came_from(tmp_path):
    target = tiny_target("llama")
    drafter = random_drafter(target)
    publish(tmp_path / "run", target, drafter)
    first = Drafter.from_pretrained(tmp_path / "run" / "drafter")
    first.save_pretrained(tmp_path / "copy")
    second = Drafter.from_pretrained(str(tmp_path / "copy"))
    assert same(second, drafter)
    assert second.manifest == first.manifest
    assert second.manifest.inputs["target"] == target.fingerprint


def test_a_hub_id_is_fetched_at_its_revision(tmp_path, monkeypatch):
    drafter = random_drafter(tiny_target("llama"))
    drafter.save_pretrained(tmp_path)
    asked = []

    def snapshot(name, revision, allow_patterns):
        asked.append((name, revision))
        assert "*.safetensors" in allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert same(Drafter.from_pretrained("org/drafter", revision="v2"), drafter)
    assert asked == [("org/drafter", "v2")]


def refused_by_the_hub(*_, **__):
    response = SimpleNamespace(status_code=401, headers={}, request=None)
    raise huggingface_hub.errors.GatedRepoError("401 Client Error.\nAccess is restricted.", response=response)


def test_a_gated_drafter_names_the_login(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused_by_the_hub)
    with pytest.raises(ArtifactError, match=r"401 Client Error\. If it is private or gated, .* run: hf auth login$"):
        Drafter.from_pretrained("org/drafter")


@pytest.mark.parametrize("run", [*embedded.SHIPPED.glob("*")], ids=lambda run: run.name)
def test_what_ships_is_loaded_by_its_name(run):
    assert Drafter.from_pretrained(run.name).folder == run / "drafter"


def test_a_hub_that_does_not_answer_is_named(monkeypatch):
    def unreachable(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the Hub.\nMore.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        ArtifactError, match=r"no folder org/drafter, and the Hub does not give it: cannot reach the Hub.$"
    ):
        Drafter.from_pretrained("org/drafter")


def test_pushing_uploads_what_saving_writes(monkeypatch):
    drafter, seen = random_drafter(tiny_target("llama")), []

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            assert exist_ok and private
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen.append((repo_id, same(Drafter.from_pretrained(folder_path), drafter), commit_message))
            return type("Commit", (), {"commit_url": "https://hub/commit"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert drafter.push_to_hub("org/drafter", private=True, message="first") == "https://hub/commit"
    assert seen == [("org/drafter", True, "first")]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_checkpoints_of_the_research_repos_are_read(tmp_path, bias, kind):
    """As EAGLE and HASS publish them: half precision, old config keys, with and without fc.bias, often a .bin."""
    target = tiny_target("llama")
    drafter = random_drafter(target, fc_bias=bias).half()
    folder = export_engine("eagle", publish(tmp_path, target, drafter), target, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for key in ("head_dim", "rope_theta", "attention_bias") + (() if not bias else ("bias",)):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": None, "pretraining_tp": 1}))
    if kind == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    found = read_checkpoint(folder)
    assert same(found.drafter, drafter)
    assert found.drafter.config.fc_bias is bias
    assert torch.equal(found.embed_VD.float(), target.lent.embed_VD)
    assert same(Drafter.from_pretrained(folder), drafter)


@pytest.fixture
def sharded(tmp_path):
    """(The drafter, its folder in EAGLE's layout with the weights in two files and an index.)"""
    target = tiny_target("llama")
    drafter = random_drafter(target)
    folder = export_engine("eagle", publish(tmp_path, target, drafter), target, tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(weights)}
    for file in set(places.values()):
        save_file({name: weights[name] for name in places if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return drafter, folder


def test_a_sharded_checkpoint_is_read_whole(sharded):
    drafter, folder = sharded
    assert same(Drafter.from_pretrained(folder), drafter)


def test_a_sharded_checkpoint_that_lacks_a_part_is_refused(sharded):
    _, folder = sharded
    second = folder / "model-00002-of-00002.safetensors"
    weights = load_file(second)
    gone = sorted(weights)[0]
    save_file({name: weight for name, weight in weights.items() if name != gone}, second)
    with pytest.raises(ArtifactError, match=f"index.json and its files do not agree on tensor '{gone}'"):
        Drafter.from_pretrained(folder)
    second.unlink()
    with pytest.raises(ArtifactError, match="cannot read .*model-00002-of-00002.safetensors: No such file"):
        Drafter.from_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ArtifactError, match="is no index of weights"):
        Drafter.from_pretrained(folder)


def test_others_may_read_the_weights_as_they_may_read_the_config(tmp_path):
    """safetensors makes files that only their owner can read: a server under another account could not load them."""
    target = tiny_target("llama")
    folder = export_engine("vllm", publish(tmp_path, target, random_drafter(target)), target, tmp_path)
    for made in (folder, tmp_path / "drafter"):
        assert (made / "model.safetensors").stat().st_mode == (made / "config.json").stat().st_mode


def test_a_drafter_saved_without_its_origin_can_be_imported(tmp_path):
    """EAGLE's, say, read from the Hub and saved again: it has coral's config, and no manifest."""
    target = tiny_target("llama")
    drafter = random_drafter(target)
    drafter.save_pretrained(tmp_path / "saved")
    manifest, with_head = bring_in(str(tmp_path / "saved"), tmp_path / "run", target)
    assert not with_head
    assert manifest.facts["imported_from"] == "saved"
    assert same(load_drafter(tmp_path / "run" / "drafter"), drafter)


def test_an_imported_drafter_says_where_it_came_from(tmp_path, monkeypatch):
    """A Hub id as it is: its folder in the cache is named by a commit. The name of a folder, but not the way to it."""
    target = tiny_target("llama")
    random_drafter(target).save_pretrained(tmp_path / "cache" / "0123abcd")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "cache" / "0123abcd"))
    assert bring_in("org/drafter", tmp_path / "a", target)[0].facts["imported_from"] == "org/drafter"
    monkeypatch.chdir(tmp_path / "cache" / "0123abcd")
    assert bring_in(".", tmp_path / "b", target)[0].facts["imported_from"] == "0123abcd"


def test_the_fingerprint_names_the_weights():
    target = tiny_target("llama")
    one, same_weights, other = (weights_fingerprint(random_drafter(target, seed)) for seed in (1, 1, 2))
    assert one == same_weights != other


def test_an_old_config_without_the_bias_key_still_loads(tmp_path):
    drafter = random_drafter(tiny_target("llama"))
    drafter.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["fc_bias"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert same(load_drafter(tmp_path), drafter)
    assert dataclasses.asdict(drafter.config)["fc_bias"] is False


def test_a_path_is_never_taken_for_a_hub_id(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    for name in ("./nowhere", "/nowhere/x", "~/x", "a/b/c", "word"):
        with pytest.raises(ArtifactError, match="give the folder of a drafter, or a Hub id as org/name"):
            hub.fetch(name)
