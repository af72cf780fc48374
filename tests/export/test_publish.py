"""The model card and the files that go with it; nothing leaves the machine unless asked to."""

import dataclasses
import json

import pytest
import yaml
from typer.testing import CliRunner

from coral_cli.main import app
from coral_core.artifacts import Manifest
from coral_core.drafter import hub
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError, CoralError
from coral_core.export.publication import prepare
from coral_core.export.run import export_engine, frequent_tokens
from coral_core.recipe.schema import DecodeSpec, TargetSpec
from tests.export.helpers import RECIPE, publish, random_drafter
from tests.tiny import tiny_target

BENCH = {
    "temperature": 0.0,
    "questions": 80,
    "tokens_per_round_micro": 3.456,
    "tokens_per_s": 201.5,
    "baseline": "plain bfloat16",
    "baseline_tokens_per_s": 99.5,
    "speedup": 2.025,
    "speedup_ci95": [1.9, 2.1],
    "accepted_by_depth": [0.8, 0.5],
    "lossless": {"checked": 80, "equal": 79},
}
RESULTS = {
    "target": {"fingerprint": "t" * 16},
    "drafter": {"fingerprint": "e" * 16},
    "head": {"kind": "grouped"},
    "tree": {"depth": 5},
    "device": "NVIDIA Fast x 1",
    "dtype": "bfloat16",
    "command": "coral eval my.yaml --bench mt-bench",
    "versions": {"coral": "0.1.0", "torch": "2.13"},
    "benches": {"mt-bench": BENCH},
}
HUB_RECIPE = dataclasses.replace(
    RECIPE,
    target=TargetSpec(model="org/model", revision="abc"),
    decode=DecodeSpec(draft_depth=5, draft_nodes=16, draft_topk=4),
)


@pytest.fixture
def run(tmp_path):
    """A trained, grouped, evaluated and exported run."""
    target = tiny_target("llama")
    source = publish(tmp_path, target, random_drafter(target), head=True)
    token_map = frequent_tokens(source, RECIPE, target, 10)
    export_engine("vllm", source, target, tmp_path)
    export_engine("sglang", source, target, tmp_path, token_map)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "results.json").write_text(json.dumps(RESULTS))
    return tmp_path


def test_the_card_says_what_was_made_measured_and_how_it_is_served(run):
    made = prepare(HUB_RECIPE, run, "me/drafter", "apache-2.0")
    front = yaml.safe_load(made.card.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == "org/model"
    assert "speculative-decoding" in front["tags"]
    for words in (
        "`org/model`, revision `abc`",
        "EAGLE-3.1 with CORAL's alignment (arXiv 2503.01840, 2502.16880)",
        "| mt-bench | 0 | 80 | 3.46 | 201.5 | 99.5 (plain bfloat16) | 2.02x [1.90, 2.10] | 0.80 0.50 | 79 of 80 |",
        "NVIDIA Fast x 1, bfloat16; depth 5, kind grouped; coral 0.1.0, torch 2.13",
        "    coral eval my.yaml --bench mt-bench",
        "10 dialogues, 200 answer tokens",
        "8 groups, 2 active; recall of the target's argmax 90.0%",
        "coral group-head recipe.yaml",
        "apache-2.0. The target has a licence of its own",
        'Drafter.from_pretrained("me/drafter")',
        '"num_speculative_tokens": 5',
        "--speculative-num-steps 5 --speculative-eagle-topk 4 --speculative-num-draft-tokens 17 "
        "--speculative-token-map drafter/sglang/token_map.pt",
    ):
        assert words in made.card
    assert made.card == (made.folder / "README.md").read_text()


def test_the_card_of_an_imported_drafter_claims_no_data_and_no_training(run):
    """It said that the target had written the prompts and answered them, out of the recipe's defaults."""
    facts = {"parameters": 1000, "imported_from": "org/eagle"}
    dataclasses.replace(Manifest.read(run / "drafter", "drafter", ""), facts=facts).write(run / "drafter")
    card = prepare(HUB_RECIPE, run, "me/drafter", "mit").card
    assert "Imported from `org/eagle` with coral 0.1.0, which did not train it" in card
    assert "Data: not known to coral" in card
    assert "coral import org/eagle recipe.yaml\n" in card
    assert "answered by the target" not in card and "coral train" not in card


def test_the_recipe_is_the_one_that_the_stages_read_not_todays(run):
    """The drafter's manifest says seed 7, the head's 8 groups; an override given to `publish` changes neither."""
    today = dataclasses.replace(HUB_RECIPE, seed=1, head=dataclasses.replace(HUB_RECIPE.head, groups=16))
    made = yaml.safe_load((prepare(today, run, "me/drafter", "").folder / "recipe.yaml").read_text())
    assert (made["seed"], made["head"]["groups"]) == (7, 8)


def test_the_repository_holds_corals_format_and_the_engines_folders(run):
    made = prepare(HUB_RECIPE, run, "me/drafter", "")
    assert {name for name, _ in made.files} == {
        *("README.md", "config.json", "manifest.json", "model.safetensors", "recipe.yaml"),
        *("head/head.safetensors", "head/manifest.json"),
        *(f"vllm/{name}" for name in ("config.json", "manifest.json", "model.safetensors")),
        *(f"sglang/{name}" for name in ("config.json", "manifest.json", "model.safetensors", "token_map.pt")),
    }
    assert Drafter.from_pretrained(made.folder).manifest.fingerprint == "e" * 16
    assert any("no licence is said" in warning for warning in made.warnings)
    assert any("folders for eagle" in warning for warning in made.warnings)


def test_a_path_of_this_machine_in_the_card_is_pointed_at(run):
    local = dataclasses.replace(HUB_RECIPE, target=TargetSpec(model="/data/secret"))
    made = prepare(local, run, "me/drafter", "mit")
    assert any("/data/secret" in warning for warning in made.warnings)
    assert "base_model" not in made.card


def test_a_folder_named_like_a_hub_id_is_no_hub_id(run, tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    local = dataclasses.replace(HUB_RECIPE, target=TargetSpec(model="models/mine"))
    made = prepare(local, run, "me/drafter", "mit")
    assert "base_model" not in made.card and any("is not on the Hub" in warning for warning in made.warnings)


def test_another_drafters_folders_and_numbers_are_not_published(run):
    made = run / "export" / "vllm"
    manifest = Manifest.read(made, "export", "")
    dataclasses.replace(manifest, inputs={**manifest.inputs, "drafter": "0" * 16}).write(made)
    assert not any(name.startswith("vllm/") for name, _ in prepare(HUB_RECIPE, run, "me/drafter", "").files)
    (run / "eval" / "results.json").write_text(json.dumps(RESULTS | {"drafter": {"fingerprint": "0" * 16}}))
    with pytest.raises(ArtifactError, match=r"measured drafter 0{16}, and the one in .* is e{16}. Run: coral eval"):
        prepare(HUB_RECIPE, run, "me/drafter", "")
    (run / "eval" / "results.json").unlink()
    with pytest.raises(ArtifactError, match="a card says what was measured. Run: coral eval"):
        prepare(HUB_RECIPE, run, "me/drafter", "")


@pytest.fixture
def uploads(monkeypatch):
    """What would have gone to the Hub."""
    seen = []
    monkeypatch.setattr(hub, "upload", lambda folder, repo, **options: seen.append((folder, repo)) or "https://hub/x")
    return seen


def coral_publish(run, *arguments):
    overrides = [f"name={run.name}", "target.model=org/model", "--runs", str(run.parent)]
    return CliRunner().invoke(app, ["publish", "--repo", "me/drafter", *overrides, *arguments])


def test_the_command_uploads_nothing_unless_told_to(run, uploads):
    shown = coral_publish(run)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("---\nlicense: other")
    assert "model.safetensors" in shown.stderr and "nothing was uploaded" in shown.stderr
    assert not uploads
    refused = coral_publish(run, "--push")
    assert refused.exit_code == 1 and "needs a licence" in refused.stderr
    assert not uploads
    done = coral_publish(run, "--push", "--licence", "mit")
    assert done.exit_code == 0, done.output
    assert uploads == [(run / "export" / "hf", "me/drafter")]
    assert "published: https://hub/x" in done.stderr


def test_the_hubs_refusal_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise OSError("401 Client Error.\n\nInvalid credentials\n")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(CoralError, match=r"^the Hub refused me/drafter: 401 Client Error. Log in with: hf auth login$"):
        hub.upload(tmp_path, "me/drafter")
