"""The group-head stage: what it tries, what it chooses, what it publishes. Timings are made up, one ms a row read."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from coral_core.errors import ArtifactError, RecipeError
from coral_core.grouping import stage
from coral_core.grouping.cost import RoundCost
from coral_core.grouping.stage import _refuse_unusable, group_head, open_active, open_groups
from coral_core.head.heads import FullHead, GroupedHead
from coral_core.head.load import load_head
from coral_core.lent import Lent
from coral_core.recipe.schema import HeadSpec, Recipe
from coral_core.training.stage import train_drafter
from tests.training.helpers import tiny_lent, tiny_spec, tiny_store

OPEN = HeadSpec(router_steps=5)


class FakeProbe:
    """A round whose head takes a given share of it."""

    def __init__(self, head_s: float) -> None:
        self.cost = RoundCost(hit_rates=[0.9, 0.9], round_s=1.0, head_s=head_s, head_calls=2, level_rows=2)

    @property
    def lent(self) -> Lent:
        return tiny_lent()

    def measure(self, drafter: torch.nn.Module) -> RoundCost:
        return self.cost


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(stage, "GROUPS", (2, 3))

    def time_heads(heads: list[FullHead | GroupedHead], hidden_ND: torch.Tensor, cost: RoundCost) -> list[float]:
        return [len(head.candidates(hidden_ND).token_C) / 1e3 for head in heads]

    monkeypatch.setattr(stage, "time_heads", time_heads)
    tiny_store(tmp_path / "tiny" / "data")
    train_drafter(a_recipe(OPEN), tmp_path / "tiny")
    return tmp_path / "tiny"


def a_recipe(spec: HeadSpec) -> Recipe:
    return Recipe(name="tiny", train=tiny_spec(steps=1), head=spec)


def test_what_is_open() -> None:
    assert open_groups(HeadSpec(), 8192) == [64, 128, 256]
    assert open_groups(HeadSpec(), 2100) == [64, 128]
    assert open_groups(HeadSpec(groups=7), 1100) == [7]
    assert open_active(HeadSpec(), 64) == [16, 8, 4, 2]
    assert open_active(HeadSpec(), 8) == [2, 1]
    assert open_active(HeadSpec(groups=8, active=3), 8) == [3]


def test_a_round_that_is_all_head_reads_few_rows_and_one_without_reads_all(run: Path) -> None:
    for head_s, rows_read in ((0.999, 16), (0.0, 24)):
        manifest, built = group_head(
            a_recipe(dataclasses.replace(OPEN, router_steps=5 + rows_read)), run, probe=FakeProbe(head_s)
        )
        assert built
        settings = manifest.facts["settings"]
        assert [(one["groups"], one["active"], one["rows_read"]) for one in settings] == [(2, 1, 24), (3, 1, 16)]
        fastest = max(settings, key=lambda one: one["tokens_per_s"])
        assert manifest.facts["active"] == fastest["active"] and manifest.facts["groups"] == fastest["groups"]
        assert all(set(one["recall"]) == {"argmax", "top10", "mass", "kept"} for one in settings)
        assert fastest["rows_read"] == rows_read


def test_what_was_chosen_is_what_is_loaded_and_is_not_built_again(run: Path) -> None:
    recipe = a_recipe(OPEN)
    manifest, _ = group_head(recipe, run, probe=FakeProbe(0.5))
    fingerprints = {"target_fingerprint": "t" * 16, "drafter_fingerprint": manifest.inputs["drafter"]}
    head = load_head(run / "head", recipe.head, tiny_lent(), **fingerprints)
    assert isinstance(head, GroupedHead)
    assert (len(head.start_G) - 1, head.active) == (manifest.facts["groups"], manifest.facts["active"])
    again, built = group_head(recipe, run, probe=None)
    assert not built and again == manifest


def test_a_recipe_that_fixes_both_needs_no_target(run: Path) -> None:
    manifest, _ = group_head(a_recipe(HeadSpec(groups=5, active=2, router_steps=5)), run)
    assert len(manifest.facts["settings"]) == 1
    assert manifest.facts["round"] is None
    assert manifest.facts["rows_read"] == 20, "48 tokens in groups of 10, 10, 10, 9, 9"
    assert manifest.facts["head_ms"] > 0


@pytest.mark.parametrize(
    ("taps", "remedy"),
    [((), "Run: coral prepare-data train.shape=eagle3"), ((0, 1, 2), "No data can be made for it. Run: coral eval")],
)
def test_a_drafter_that_reads_other_layers(taps: tuple[int, ...], remedy: str) -> None:
    drafter = SimpleNamespace(config=SimpleNamespace(draft_vocab_size=0, taps=(0, 1, 3)))
    store = SimpleNamespace(taps=taps, folder=Path("data"))
    with pytest.raises(ArtifactError, match=re.escape(remedy)):
        _refuse_unusable(drafter, store, Path("drafter"))  # type: ignore[arg-type]


def test_slips_in_the_recipe_are_one_line(run: Path) -> None:
    with pytest.raises(RecipeError, match=r"head.active is 9; it must be from 1 to head.groups \(8\)"):
        HeadSpec(groups=8, active=9)
    with pytest.raises(RecipeError, match="head.active is 3; it must be 0 while head.groups is, or 0 to have it"):
        HeadSpec(active=3)
    with pytest.raises(RecipeError, match="head.groups is 49, but the vocabulary has 48 tokens"):
        group_head(a_recipe(HeadSpec(groups=49, active=2)), run)
