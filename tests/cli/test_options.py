"""From words on the command line to a run's folder."""

from pathlib import Path

import pytest
import typer

from coral_cli.options import open_run, read_recipe
from coral_core.errors import CoralError
from coral_core.recipe.loader import load_recipe


def test_no_words_are_the_default_recipe():
    assert read_recipe(None) == read_recipe([]) == load_recipe(None, [])


def test_a_path_with_an_equals_sign_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("tried/lr=3/my.yaml")
    path.parent.mkdir(parents=True)
    path.write_text("name: mine\n", encoding="utf-8")
    assert read_recipe(["seed=4", str(path), "train.steps=5"]).name == "mine"


def test_two_files_are_wrong_usage():
    with pytest.raises(typer.BadParameter, match="one recipe file at most, got a, b"):
        read_recipe(["a", "seed=1", "b"])


def test_open_run_keeps_the_resolved_recipe(tmp_path):
    run = open_run(["name=mine", "train.preset=hass"], tmp_path / "runs")
    assert run.folder == tmp_path / "runs" / "mine"
    assert [path.name for path in run.folder.iterdir()] == ["recipe.yaml"]
    assert load_recipe(run.folder / "recipe.yaml", []) == run.recipe
    assert open_run([str(run.folder / "recipe.yaml")], tmp_path / "runs") == run


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(
        CoralError, match=r"cannot write .*file/pico: Not a directory. Choose another folder with --runs"
    ):
        open_run([], tmp_path / "file")


def test_a_full_disk_leaves_the_old_recipe(tmp_path, monkeypatch):
    run = open_run([], tmp_path)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CoralError, match="No space left on device"):
        open_run(["seed=5"], tmp_path)
    assert load_recipe(run.folder / "recipe.yaml", []) == run.recipe
