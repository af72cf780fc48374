"""`coral inspect` as typed, on small stores and on what ships with coral."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from coral_cli.main import app
from coral_core.embedded import FOLDER as PICO
from coral_core.inspection import histogram
from coral_core.store.shard import Sample
from tests.store.helpers import make_store


def coral(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, words)])


def make_run(folder: Path) -> Path:
    """Samples of 3, 5 and 9 tokens, of which 1, 2 and 4 are the target's, two to a shard."""
    samples = [
        Sample(torch.arange(length), torch.arange(length) >= length - answer, torch.ones(length, 8))
        for length, answer in ((3, 1), (5, 2), (9, 4))
    ]
    make_store(folder / "data", samples, per_shard=2, holdout=1)
    (folder / "recipe.yaml").write_text("name: r\n")
    return folder


def test_a_store(tmp_path: Path) -> None:
    found = json.loads(coral(make_run(tmp_path) / "data", "--json").stdout)
    assert (found["kind"], found["shards"], found["damaged"]) == ("data", 2, [])
    assert (found["facts"]["samples"], found["facts"]["tokens"], found["facts"]["answer_tokens"]) == (3, 17, 7)
    assert found["answer_share"] == pytest.approx(7 / 17)
    assert found["lengths"] == [
        {"from": 2, "to": 3, "samples": 1},
        {"from": 4, "to": 7, "samples": 1},
        {"from": 8, "to": 15, "samples": 1},
    ]
    assert (found["fingerprint"], found["inputs"]) == ("f" * 16, {"target": "t" * 16})
    shown = coral(tmp_path / "data")
    assert shown.exit_code == 0, shown.output
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.stdout.splitlines()]
    for line in (["samples", "3"], ["answer tokens, share", "41.2%"], ["damaged files", "none"], ["shards", "2"]):
        assert line in lines
    assert "8-15              1 " + "█" * 40 in shown.stdout


def test_damaged_and_missing_shards_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    path = folder / "data" / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    for where, name in ((folder / "data", "shard-00001.safetensors"), (folder, "data/shard-00001.safetensors")):
        done = coral(where)
        assert done.exit_code == 1
        assert re.search(r"damaged files +\| +shard-00001\.safetensors \|", done.stdout)
        run = f"{folder / 'recipe.yaml'} --runs {folder.parent}"
        assert f"error: damaged: {name}. Run: coral prepare-data {run}" in done.stderr
    (folder / "data" / "shard-00000.safetensors").unlink()
    found = json.loads(coral(folder / "data", "--json").stdout)
    assert found["damaged"] == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert found["lengths"] == []


def test_a_run_and_what_of_it_is_unfinished(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    shutil.copytree(PICO / "drafter", folder / "drafter")
    (folder / ".head.partial").mkdir()
    done = coral(folder)
    assert done.exit_code == 0, done.output
    assert [line for line in done.stdout.splitlines() if line.startswith(("| data ", "| drafter "))]
    assert "head is unfinished: the command that makes it goes on where it stopped" in done.stderr
    found = json.loads(coral(folder, "--json").stdout)
    assert (list(found["stages"]), found["unfinished"]) == (["data", "drafter"], ["head"])


def test_exports_are_folders_and_are_made_again_by_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path)
    (folder / "export" / ".vllm.partial").mkdir(parents=True)
    (folder / "export" / "notes.txt").write_text("mine")
    assert coral(folder).exit_code == 0, "what a failed export left, and a note, are no damage"
    shutil.copytree(PICO / "drafter", folder / "export" / "vllm")
    (folder / "export" / "vllm" / "manifest.json").write_text("{")
    run = f"{folder / 'recipe.yaml'} --runs {folder.parent}"
    assert f"damaged: export/vllm/manifest.json. Run: coral export {run} --to vllm" in coral(folder).stderr
    (folder / "data" / "shard-00000.safetensors").unlink()
    monkeypatch.chdir(folder)
    assert f"Run: coral prepare-data {run}" in coral(".").stderr, "from inside the run too"


@pytest.mark.parametrize("kind", ["drafter", "head"])
def test_what_ships_with_coral(tmp_path: Path, kind: str) -> None:
    found = json.loads(coral(PICO / kind, "--json").stdout)
    manifest = json.loads((PICO / kind / "manifest.json").read_text())
    assert (found["kind"], found["fingerprint"], found["damaged"]) == (kind, manifest["fingerprint"], [])
    (weights,) = found["weights"].values()
    assert weights["parameters"] >= manifest["facts"].get("parameters", 1)
    assert "parameters in" in coral(PICO / kind).stdout
    shutil.copytree(PICO / kind, tmp_path / kind)
    (file,) = (tmp_path / kind).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    done = coral(tmp_path / kind)
    assert (done.exit_code, f"error: damaged: {file.name}." in done.stderr) == (1, True)


@pytest.mark.parametrize(("kind", "file"), [("drafter", "model.safetensors"), ("head", "head.safetensors")])
def test_a_flipped_byte_is_named_with_the_command_that_mends_it(tmp_path: Path, kind: str, file: str) -> None:
    run = make_run(tmp_path)
    shutil.copytree(PICO / kind, run / kind)
    content = bytearray((run / kind / file).read_bytes())
    content[-1] ^= 1
    (run / kind / file).write_bytes(content)
    done = coral(run)
    remedy = {"drafter": "coral train", "head": "coral group-head"}[kind] + f" {run / 'recipe.yaml'}"
    assert (done.exit_code, f"error: damaged: {kind}/{file}. Run: {remedy}" in done.stderr) == (1, True)
    (run / kind / "manifest.json").unlink()
    assert f"damaged: {kind}/manifest.json. Run: {remedy}" in coral(run).stderr


def test_a_bare_recipe_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: r\n")
    done = coral(tmp_path)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "holds a recipe, and nothing that was made of it yet. Run: coral prepare-data" in done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "nowhere is no folder"), (".", "holds nothing that coral made. Give a run (runs/NAME)")],
)
def test_anything_else_is_one_line(tmp_path: Path, name: str, message: str) -> None:
    done = coral(tmp_path / name)
    assert (done.exit_code, done.stdout) == (1, "")
    assert message in done.stderr


def test_the_histogram_has_no_gaps() -> None:
    assert [(step["from"], step["to"], step["samples"]) for step in histogram([1, 4, 4, 31])] == [
        (1, 1, 1),
        (2, 3, 0),
        (4, 7, 2),
        (8, 15, 0),
        (16, 31, 1),
    ]
