"""Folders on disk: never half there, taken up again after an interruption, and honest about where they came from."""

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
from safetensors import SafetensorError

from coral_core import __version__, artifacts, embedded
from coral_core.artifacts import (
    Manifest,
    check_files,
    drop_unfinished,
    fingerprint,
    refuse_unfinished,
    stage,
    standing,
    write_text,
)
from coral_core.errors import ArtifactError, CoralError, DataError
from coral_core.lock import published
from coral_core.recipe.loader import changes


def names(folder: Path) -> list[str]:
    """What is in a folder, hidden names too."""
    return sorted(path.name for path in folder.iterdir())


def interrupted(final: Path, mark: str, finished: str) -> None:
    """One run of a stage that finishes one file and is then stopped by Ctrl-C."""
    with pytest.raises(KeyboardInterrupt), stage(final, mark) as work:
        (work / finished).write_text("done", encoding="utf-8")
        raise KeyboardInterrupt


def test_success_publishes_the_folder_and_leaves_nothing_else(tmp_path):
    with stage(tmp_path / "data", "f1") as work:
        (work / "shard-0").write_text("x", encoding="utf-8")
        assert names(tmp_path) == [".data.partial"], "nothing stands under the final name before the end"
    assert names(tmp_path) == ["data"]
    assert names(tmp_path / "data") == ["shard-0"]


def test_an_interrupted_stage_goes_on_where_it_stopped(tmp_path):
    final = tmp_path / "data"
    interrupted(final, "f1", "shard-0")
    assert names(tmp_path) == [".data.partial"]
    with stage(final, "f1") as work:
        assert (work / "shard-0").read_text(encoding="utf-8") == "done"
        (work / "shard-1").write_text("x", encoding="utf-8")
    assert names(final) == ["shard-0", "shard-1"]


def test_what_was_made_for_another_recipe_is_cleared(tmp_path):
    final = tmp_path / "data"
    interrupted(final, "f1", "shard-0")
    with stage(final, "f2") as work:
        assert names(work) == ["fingerprint"]
        (work / "shard-9").write_text("x", encoding="utf-8")
    assert names(final) == ["shard-9"]


def test_a_partial_folder_without_its_mark_is_cleared(tmp_path):
    stranger = tmp_path / ".data.partial"
    stranger.mkdir()
    (stranger / "shard-0").write_text("whose?", encoding="utf-8")
    with stage(tmp_path / "data", "f1") as work:
        assert names(work) == ["fingerprint"]


def test_the_older_folder_stands_until_the_new_one_is_whole(tmp_path):
    final = tmp_path / "data"
    with stage(final, "f1") as work:
        (work / "old").write_text("x", encoding="utf-8")
    interrupted(final, "f2", "new")
    assert names(final) == ["old"]
    with stage(final, "f2"):
        assert names(final) == ["old"]
    assert names(final) == ["new"]
    assert names(tmp_path) == ["data"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_keeps_what_is_finished(tmp_path, code):
    final = tmp_path / "data"
    message = r"is full; what is finished is kept\. Free some room and run the same command"
    with pytest.raises(ArtifactError, match=message), stage(final, "f1") as work:
        (work / "shard-0").write_text("done", encoding="utf-8")
        raise OSError(code, os.strerror(code))
    assert names(tmp_path) == [".data.partial"]
    with stage(final, "f1") as work:
        assert (work / "shard-0").exists()


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError("100000 requested and 32752 written"),
        shutil.Error([("head/a", "work/a", "[Errno 28] No space left on device: 'work/a'")]),
    ],
    ids=["safetensors", "numpy", "shutil"],
)
def test_a_full_disk_as_libraries_tell_it(tmp_path, error):
    """All were seen on a real full disk: none carries ENOSPC."""
    with pytest.raises(ArtifactError, match="is full"), stage(tmp_path / "data", "f1"):
        raise error


def test_a_disk_that_is_full_from_the_start(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ArtifactError, match="is full"), stage(tmp_path / "data", "f1"):
        pass
    assert not (tmp_path / "data").exists()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    message = r"cannot write .* Choose another folder with --runs"
    with pytest.raises(CoralError, match=message), stage(tmp_path / "file" / "data", "f1"):
        pass


def test_a_stage_that_made_nothing_leaves_nothing(tmp_path):
    with pytest.raises(DataError), stage(tmp_path / "data", "f"):
        raise DataError("no prompts")
    assert list(tmp_path.iterdir()) == []


def test_any_other_error_is_a_bug_and_keeps_the_partial_folder(tmp_path):
    for error in (ValueError("a bug"), OSError(errno.EIO, "Input/output error")):
        with pytest.raises(type(error), match=str(error).replace("[", r"\[")), stage(tmp_path / "data", "f1") as work:
            (work / "made").touch()
            raise error
    assert names(tmp_path) == [".data.partial"]


def test_a_folder_that_is_being_read_is_replaced_when_its_reader_is_done(tmp_path):
    work, final = tmp_path / "work", tmp_path / "data"
    for folder in (work, final):
        folder.mkdir()
    (work / "new").touch()
    replacing = threading.Thread(target=artifacts.replace_folder, args=(work, final))
    with published(tmp_path):
        replacing.start()
        replacing.join(0.3)
        assert names(final) == []
    replacing.join()
    assert names(final) == ["new"]


def test_a_killed_publication_loses_nothing(tmp_path, monkeypatch):
    """Killed between moving the old folder aside and moving the new one in: the next run publishes what is finished."""
    final = tmp_path / "data"
    with stage(final, "f1") as work:
        (work / "old").write_text("x", encoding="utf-8")
    replace, calls = os.replace, []

    def killed_at_the_second(source, destination):
        if "partial" in str(source) and Path(source).is_dir():
            calls.append(source)
            raise KeyboardInterrupt
        replace(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(artifacts.os, "replace", killed_at_the_second)
        interrupted_at_the_end = stage(final, "f2")
        with pytest.raises(KeyboardInterrupt), interrupted_at_the_end as work:
            (work / "new").write_text("x", encoding="utf-8")
    assert len(calls) == 1
    with stage(final, "f2") as work:
        assert (work / "new").exists()
        assert names(final) == ["old"], "the older folder serves again until the new one is in its place"
    assert names(final) == ["new"]


def test_write_text_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    write_text(path, "old")

    def half(self, text, **_kwargs):
        with self.open("w", encoding="utf-8") as file:
            file.write(text[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "newer")
    assert path.read_text(encoding="utf-8") == "old"


# ---- the manifest


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        kind="data", fingerprint="f", inputs={"target": "t"}, recipe={"seed": 0}, facts={"tokens": 7}, git_commit="c"
    )


def test_a_manifest_reads_back_equal_and_knows_its_versions(tmp_path, manifest):
    manifest.write(tmp_path)
    read = Manifest.read(tmp_path, "data", "coral prepare-data")
    assert read == manifest
    assert read.versions["coral"] == __version__
    assert {"python", "torch", "transformers"} <= set(read.versions)


def test_a_missing_manifest_names_the_command(tmp_path):
    with pytest.raises(ArtifactError, match=r"no data in .*\. Run: coral prepare-data"):
        Manifest.read(tmp_path / "data", "data", "coral prepare-data")


def test_a_manifest_of_another_kind_is_refused(tmp_path, manifest):
    manifest.write(tmp_path)
    with pytest.raises(ArtifactError, match=r"holds a data, not a drafter\. Run: coral train"):
        Manifest.read(tmp_path, "drafter", "coral train")


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '{"kind": "data"}', '{"kind": "data", "strange": 1}', "\x00"]
)
def test_a_damaged_manifest_is_one_line(tmp_path, damage):
    (tmp_path / "manifest.json").write_text(damage, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged: .*\. Run: coral prepare-data") as caught:
        Manifest.read(tmp_path, "data", "coral prepare-data")
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_not_text_is_damaged(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        Manifest.read(tmp_path, "data", "coral prepare-data")


def test_a_fingerprint_is_of_the_value_not_of_its_order():
    assert fingerprint({"a": 1, "b": [2.5]}) == fingerprint(json.loads('{"b": [2.5], "a": 1}'))
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert len(fingerprint(None)) == 16


def test_the_old_folder_is_there_until_the_new_one_stands(tmp_path, monkeypatch):
    """Killed at any rename or removal while a folder is replaced: the old or the new content is somewhere, whole."""
    remove, replace = shutil.rmtree, os.replace
    for last in range(5):
        folder = tmp_path / str(last)
        with stage(folder / "drafter", "old") as work:
            (work / "weights").write_text("old", encoding="utf-8")
        calls = []

        def killed(act, *given, calls=calls, last=last, **options):
            calls.append(act)
            if len(calls) > last:
                raise KeyboardInterrupt
            act(*given, **options)

        monkeypatch.setattr(os, "replace", functools.partial(killed, replace))
        monkeypatch.setattr(shutil, "rmtree", functools.partial(killed, remove))
        with contextlib.suppress(KeyboardInterrupt), stage(folder / "drafter", "new") as work:
            (work / "weights").write_text("new", encoding="utf-8")
        monkeypatch.undo()
        whole = [path.read_text(encoding="utf-8") for path in folder.glob("*/weights")]
        whole += [path.read_text(encoding="utf-8") for path in folder.glob(".*/weights")]
        assert "old" in whole or (folder / "drafter" / "weights").read_text(encoding="utf-8") == "new"


# ---- checksums


@pytest.fixture
def drafter(tmp_path) -> Path:
    folder = tmp_path / "drafter"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(b"{ } " + name.encode())
    values = {"seed": 0, "train": {"steps": 10}}
    made = Manifest(kind="drafter", fingerprint="f", inputs={"data": "d"}, recipe=values, facts={})
    made.sealed(folder).write(folder)
    return folder


DAMAGES = {
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file_is_found_and_named(drafter, name, damage):
    check_files(drafter, ["config.json", "model.safetensors"], "coral train")
    damage(drafter / name)
    assert Manifest.read(drafter, "drafter", "").damaged(drafter) == [name]
    with pytest.raises(ArtifactError, match=rf"{name} is (damaged|missing).* Run: coral train"):
        check_files(drafter, ["config.json", "model.safetensors"], "coral train")


def test_a_manifest_in_which_one_digit_changed_is_damaged(drafter):
    path = drafter / "manifest.json"
    path.write_text(path.read_text().replace('"steps": 10', '"steps": 11'))
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged: its checksum is another. Run: coral train"):
        Manifest.read(drafter, "drafter", "coral train")


def test_what_was_made_before_there_were_checksums_still_loads(drafter):
    path = drafter / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in ("files", "sha256")}))
    (drafter / "config.json").write_text("changed")
    check_files(drafter, ["config.json"], "coral train")
    assert Manifest.read(drafter, "drafter", "").damaged(drafter) == []


def test_what_coral_ships_is_mended_by_installing_it():
    command = "git checkout -- coral_core && pip install --force-reinstall --no-deps ."
    with pytest.raises(ArtifactError, match=f"Install coral anew, in its folder: {re.escape(command)}$"):
        Manifest.read(embedded.FOLDER / "nothing", "drafter", "coral train")


def test_what_stands_is_compared_by_its_recipe_its_inputs_and_its_bytes(drafter):
    recipe, inputs = Manifest.read(drafter, "drafter", "").recipe, {"data": "d"}

    def found(folder=drafter, recipe=recipe, inputs=inputs):
        return standing(folder, "drafter", lambda made: changes(made, recipe, inputs))

    assert found(drafter.with_name("none")) == artifacts.Standing(None)
    assert found().manifest
    changed = {"seed": 0, "train": {"steps": 5}}
    assert found(recipe=changed).why == "train.steps was 10, is 5"
    assert found(inputs={"data": "e"}).why == "the data changed"
    DAMAGES["flipped"](drafter / "config.json")
    assert found().why == "config.json is damaged"
    DAMAGES["flipped"](drafter / "manifest.json")
    assert found().why == "its manifest.json is damaged"
    DAMAGES["missing"](drafter / "manifest.json")
    assert found().why == "its manifest.json is missing"


def test_what_an_unfinished_stage_needs_goes_only_after_the_rename(tmp_path, monkeypatch):
    """Killed between the two, a training that was finished was begun anew: its checkpoints were gone already."""
    final = tmp_path / "drafter"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "replace_folder", killed)
        begun = stage(final, "f", leftovers=["checkpoints"])
        with pytest.raises(KeyboardInterrupt), begun as work:
            (work / "checkpoints").mkdir()
    with stage(final, "f", leftovers=["checkpoints"]) as work:
        assert (work / "checkpoints").exists()
    assert names(final) == []


def test_an_older_folder_that_a_kill_left_aside_is_cleared(tmp_path):
    (tmp_path / ".data.old").mkdir()
    with stage(tmp_path / "data", "f"):
        pass
    assert names(tmp_path) == ["data"]


def test_a_link_to_another_runs_data_is_replaced_and_the_data_stay(tmp_path):
    shared = tmp_path / "other" / "data"
    shared.mkdir(parents=True)
    (shared / "shard-0").write_text("x", encoding="utf-8")
    final = tmp_path / "run" / "data"
    final.parent.mkdir()
    final.symlink_to(shared)
    for mark in ("f", "g"):
        with stage(final, mark) as work:
            (work / mark).write_text("x", encoding="utf-8")
    assert names(final.parent) == ["data"]
    assert names(final) == ["g"]
    assert names(shared) == ["shard-0"]


def test_unfinished_work_of_another_recipe_is_not_cleared_unasked(tmp_path):
    final = tmp_path / "data"
    refuse_unfinished(final, "f2", "coral prepare-data")
    interrupted(final, "f1", "shard-0")
    refuse_unfinished(final, "f1", "coral prepare-data")
    message = r"\.data\.partial holds unfinished work of another recipe.* Run: coral prepare-data --restart"
    with pytest.raises(ArtifactError, match=message):
        refuse_unfinished(final, "f2", "coral prepare-data")
    drop_unfinished(final)
    refuse_unfinished(final, "f2", "coral prepare-data")
