"""From words on the command line to a run's folder."""

import os
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


def opened(words, runs):
    with open_run(words, runs) as run:
        assert run.folder.is_dir()
    return run


def test_open_run_keeps_the_resolved_recipe(tmp_path):
    run = opened(["name=mine", "train.preset=hass"], tmp_path / "runs")
    assert run.folder == tmp_path / "runs" / "mine"
    assert [path.name for path in run.folder.iterdir()] == ["recipe.yaml"]
    assert load_recipe(run.folder / "recipe.yaml", []) == run.recipe
    assert opened([str(run.folder / "recipe.yaml")], tmp_path / "runs") == run


def test_a_command_that_fails_leaves_no_run_and_no_other_recipe(tmp_path):
    with pytest.raises(CoralError), open_run(["seed=1"], tmp_path):
        raise CoralError("no such model")
    assert not list(tmp_path.iterdir())
    run = opened(["seed=1"], tmp_path)
    with pytest.raises(CoralError), open_run(["seed=2"], tmp_path):
        raise CoralError("no such model")
    assert load_recipe(run.folder / "recipe.yaml", []).seed == 1


def test_an_interrupted_command_leaves_its_recipe(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_run(["seed=1"], tmp_path) as run:
        raise KeyboardInterrupt
    assert load_recipe(run.folder / "recipe.yaml", []).seed == 1


def test_a_run_that_is_in_use_is_one_line(tmp_path):
    with (
        open_run([], tmp_path),
        pytest.raises(CoralError, match=rf"pico is in use: .* process {os.getpid()} on"),
        open_run(["seed=2"], tmp_path),
    ):
        pass
    assert load_recipe(tmp_path / "pico" / "recipe.yaml", []).seed == 0


def test_several_processes_one_of_which_is_the_main_one(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with open_run([], tmp_path, main=True), open_run([], tmp_path, main=False) as run:
        assert run.folder == tmp_path / "pico"
    with pytest.raises(CoralError, match="works in one process. Start it without"), open_run([], tmp_path):
        pass


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    message = r"cannot write .*file/pico: Not a directory. Choose another folder with --runs"
    with pytest.raises(CoralError, match=message), open_run([], tmp_path / "file"):
        pass


def test_a_full_disk_leaves_the_old_recipe(tmp_path, monkeypatch):
    run = opened([], tmp_path)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CoralError, match="the disk of .*pico is full; .* Free some room and run the same command"):
        opened(["seed=5"], tmp_path)
    with pytest.raises(KeyboardInterrupt), open_run(["seed=5"], tmp_path):
        raise KeyboardInterrupt
    with pytest.raises(CoralError, match="the disk of .*pico is full"), open_run(["seed=5"], tmp_path) as other:
        (other.folder / "file").write_text("what a command writes besides its stages")
    assert load_recipe(run.folder / "recipe.yaml", []) == run.recipe
