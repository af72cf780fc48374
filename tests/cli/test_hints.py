"""A command that a message names can be pasted: it has the recipe and the overrides that were given."""

import pytest

from coral_cli import hints
from tests.cli.test_errors import coral


@pytest.fixture(autouse=True)
def _nothing_given(monkeypatch):
    monkeypatch.setattr(hints, "_given", {})


def test_a_hint_gets_the_recipe_and_the_overrides():
    hints.remember("recipe", ["my recipe.yaml", "train.steps=5"])
    assert hints.pasteable("it is damaged. Run: coral train") == (
        "it is damaged. Run: coral train 'my recipe.yaml' train.steps=5"
    )


def test_options_of_the_hint_stay_behind_the_recipe():
    hints.remember("recipe", ["my.yaml"])
    hints.remember("runs", ["--runs", "elsewhere"])
    assert hints.pasteable("run coral publish --repo ORG/NAME, coral eval") == (
        "run coral publish my.yaml --runs elsewhere --repo ORG/NAME, coral eval my.yaml --runs elsewhere"
    )


@pytest.mark.parametrize(
    "text", ["coral inspect runs/a", "coral train other.yaml", "a coral reef trains", "coral trainer", "coral eval-all"]
)
def test_other_words_stay(text):
    hints.remember("recipe", ["my.yaml"])
    assert hints.pasteable(text) == text


def test_with_no_recipe_a_hint_stays_as_it_is():
    assert hints.pasteable("Run: coral train") == "Run: coral train"


def test_an_error_names_the_command_line_that_mends_it(tmp_path):
    (tmp_path / "my.yaml").write_text("seed: 3\n", encoding="utf-8")
    done = coral("train", "my.yaml", "train.steps=7", "--runs", "kept here", cwd=tmp_path)
    assert done.returncode == 1
    assert "coral prepare-data my.yaml train.steps=7 --runs 'kept here'" in done.stderr
