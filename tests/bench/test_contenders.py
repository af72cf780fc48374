"""Drafters and heads by name, before anything is loaded."""

from pathlib import Path

import pytest

from coral_core import embedded
from coral_core.bench.contenders import contenders, find_run
from coral_core.errors import ArtifactError, DataError
from coral_core.recipe.loader import dump_yaml, load_recipe


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in ("coral", "hass"):
        (tmp_path / name / "drafter").mkdir(parents=True)
    recipe = load_recipe(None, ["name=hass", "head.groups=16", "head.active=4", "decode.draft_depth=2"])
    (tmp_path / "hass" / "recipe.yaml").write_text(dump_yaml(recipe))
    return tmp_path


def test_with_nothing_named_the_run_meets_plain_decoding_alone(runs: Path) -> None:
    recipe = load_recipe(None, ["name=coral"])
    (only,) = contenders(recipe, runs / "coral", [], [])
    assert (only.name, only.folder, only.recipe) == ("coral grouped", runs / "coral", recipe)


def test_every_drafter_meets_every_head_on_one_tree(runs: Path) -> None:
    recipe = load_recipe(None, ["name=coral"])
    found = contenders(recipe, runs / "coral", ["coral", str(runs / "hass")], ["full", "grouped"])
    assert [one.name for one in found] == ["coral full", "coral grouped", "hass full", "hass grouped"]
    assert found[3].folder == runs / "hass"
    assert found[3].recipe.head.groups == 16, "the groups are those of the run that made them"
    assert found[3].recipe.decode == recipe.decode, "the tree is the same for all"


def test_slips_are_named(runs: Path) -> None:
    recipe = load_recipe(None, ["name=coral"])
    with pytest.raises(ArtifactError, match="no drafter in 'has' or .*; did you mean hass?"):
        contenders(recipe, runs / "coral", ["has"], [])
    with pytest.raises(ArtifactError, match="runs with one: coral, hass"):
        find_run("zzz", runs)
    with pytest.raises(DataError, match="unknown head 'ful'; did you mean full?"):
        contenders(recipe, runs / "coral", [], ["ful"])
    with pytest.raises(DataError, match="'coral full' would be compared with itself"):
        contenders(recipe, runs / "coral", ["coral", "coral"], ["full"])


def test_what_ships_has_a_name(tmp_path: Path) -> None:
    assert find_run("pico", tmp_path) == embedded.FOLDER
    for run in embedded.SHIPPED.glob("*"):
        assert find_run(run.name, tmp_path) == run
    for name in ("", ".", "..", str(embedded.SHIPPED)):
        assert embedded.shipped(name) is None
