"""Which run holds a drafter: one's own first, then what coral ships for it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import embed
from coral_core import embedded
from coral_core.artifacts import Manifest
from coral_core.bench.questions import held_out
from coral_core.drafter.load import load_drafter
from coral_core.errors import ArtifactError, CoralWarning
from coral_core.recipe.loader import load_recipe
from coral_core.recipe.schema import TargetSpec
from coral_core.target.compatibility import refuse_other_target
from coral_core.target.load import load_target
from recipes.real import ship


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pico's drafter, as a run named some-model that was shipped."""
    run = tmp_path / "trained" / "some-model"
    for part in ("drafter", "head"):
        shutil.copytree(embedded.FOLDER / part, run / part)
    (run / "data").mkdir()
    (run / "recipe.yaml").write_text("name: some-model\n")
    (run / "data" / "holdout.json").write_text(json.dumps([[5, 6, 7]] * 50))
    monkeypatch.setattr(embedded, "SHIPPED", tmp_path / "shipped")
    ship.ship(run, embedded.SHIPPED / "some-model")
    return embedded.SHIPPED / "some-model"


def test_a_run_uses_what_is_shipped_until_it_has_its_own(tmp_path: Path, shipped: Path) -> None:
    run = tmp_path / "runs" / "some-model"
    assert embedded.made_in(run, "some/model") == shipped
    assert embedded.made_in(run.with_name("other"), "some/model") == run.with_name("other")
    assert len(held_out(run, "some/model")) == ship.PROMPTS
    (run / "drafter").mkdir(parents=True)
    assert embedded.made_in(run, "some/model") == run
    assert embedded.holds(shipped / "drafter") and not embedded.holds(run)


def test_what_is_shipped_is_whole_and_in_bfloat16(shipped: Path) -> None:
    drafter, own = load_drafter(shipped / "drafter"), load_drafter(embedded.FOLDER / "drafter")
    assert drafter.fc.weight.dtype == torch.bfloat16
    torch.testing.assert_close(drafter.fc.weight.float(), own.fc.weight.float(), rtol=2e-2, atol=1e-4)
    made, before = (
        Manifest.read(folder / "drafter", "drafter", "coral train") for folder in (shipped, embedded.FOLDER)
    )
    assert made.fingerprint == before.fingerprint and not made.damaged(shipped / "drafter")
    assert Manifest.read(shipped / "head", "head", "coral group-head").inputs["drafter"] == made.fingerprint


def test_what_is_embedded_serves_the_target_in_float16_too() -> None:
    """Its smallest weights are rounded there, so that its fingerprint is another's."""
    target = load_target(TargetSpec(model=embedded.NAME, dtype="float16"))
    for part in ("drafter", "head"):
        made = Manifest.read(embedded.FOLDER / part, part, "")
        with pytest.warns(CoralWarning, match=f"the {part} in .* was made for a sibling of this target"):
            refuse_other_target(made, embedded.FOLDER / part, "", target)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", ["drafter/manifest.json", "drafter/model.safetensors", "head/manifest.json"])
def test_a_run_that_is_damaged_replaces_nothing(tmp_path: Path, shipped: Path, damage: str) -> None:
    run, pico = tmp_path / "trained" / "some-model", tmp_path / "pico"
    embed.embed(run, pico)
    assert Manifest.read(pico / "drafter", "drafter", "").damaged(pico / "drafter") == []
    assert load_drafter(pico / "drafter").fc.weight.dtype == torch.bfloat16
    (run / damage).write_bytes(b"no")
    for copy, place in ((ship.ship, shipped), (embed.embed, pico)):
        before = contents(place)
        with pytest.raises(ArtifactError):
            copy(run, place)
        assert contents(place) == before


def test_a_copy_that_is_stopped_replaces_nothing(
    tmp_path: Path, shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, pico = tmp_path / "trained" / "some-model", tmp_path / "pico"
    embed.embed(run, pico)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    for module, copy, place in ((ship, ship.ship, shipped), (embed, embed.embed, pico)):
        before = contents(place)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, "save_drafter", stopped)
            copy(run, place)
        assert {name: data for name, data in contents(place).items() if ".partial" not in name} == before
        copy(run, place)
        assert contents(place) == before, "what was left of it is gone"


@pytest.mark.parametrize("run", [embedded.FOLDER, *embedded.SHIPPED.glob("*")], ids=lambda run: run.name)
def test_what_the_package_holds_is_whole(run: Path, tmp_path: Path) -> None:
    made = Manifest.read(run / "drafter", "drafter", "coral train")
    head = Manifest.read(run / "head", "head", "coral group-head")
    assert not made.damaged(run / "drafter") and not head.damaged(run / "head")
    assert made.files and head.files and head.inputs["drafter"] == made.fingerprint
    drafter, recipe = load_drafter(run / "drafter"), load_recipe(run / "recipe.yaml", [])
    assert recipe.name == run.name
    asked = held_out(tmp_path / run.name, recipe.target.model)
    assert asked and all(0 <= token < drafter.config.vocab_size for one in asked for token in one.ids)
