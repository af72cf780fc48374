"""A run on disk: what its recipe says reaches the target, and so the engine."""

from pathlib import Path

import pytest

from coral_core.api.generator import Generator
from coral_core.decoding import measure
from coral_core.decoding.engine import Engine
from coral_core.decoding.policy.adaptive import AdaptiveTree
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.sampling import Sampler
from coral_core.errors import ArtifactError, RecipeError
from coral_core.recipe.loader import load_recipe
from coral_core.run import Run, sampler
from tests.decoding.policy.test_adaptive import PLAIN_CPU
from tests.tiny import tiny_drafter, tiny_target


@pytest.mark.parametrize("exact", [True, False])
def test_decode_exact_says_whether_forwards_are_exact(exact: bool, tmp_path: Path) -> None:
    recipe = load_recipe(None, [f"decode.exact={str(exact).lower()}"])
    assert Run(recipe, tmp_path).target().exact is exact


def test_a_tree_that_is_too_large_to_be_exact_is_refused(tmp_path: Path) -> None:
    def engine(*keys: str) -> Engine:
        run = Run(load_recipe(None, ["decode.tree=fixed", "head.kind=full", *keys]), tmp_path)
        return run.engine(run.target())

    with pytest.raises(RecipeError, match=r"draft_nodes is 64; .* Set decode.draft_nodes=63, or decode.exact=false"):
        engine("decode.draft_nodes=64")
    assert engine("decode.draft_nodes=63").target.exact
    assert not engine("decode.draft_nodes=64", "decode.exact=false").target.exact


def test_so_is_one_in_python() -> None:
    target = tiny_target()
    with pytest.raises(RecipeError, match="draft_nodes is 64"):
        Generator(target, tiny_drafter(target), TreeShape(depth=8, nodes=64, topk=8))


def test_a_drafter_of_another_target_is_refused_with_a_run_that_keeps_it(tmp_path: Path) -> None:
    """Its own run would be replaced, data and all."""
    run = Run(load_recipe(None, ["name=mine"]), tmp_path)
    with pytest.raises(ArtifactError, match=r"Run: coral prepare-data name=mine-2, then coral train name=mine-2$"):
        run.manifest(tiny_target())


def test_an_auto_tree_has_costs_that_are_kept_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(measure, "measure_costs", lambda engine: (measured.append(engine), PLAIN_CPU)[1])
    monkeypatch.setattr(measure, "step_s", lambda engine: PLAIN_CPU.step_s)
    run = Run(load_recipe(None, ["decode.tree=auto", "target.device=cpu"]), tmp_path)
    target = run.target()
    for engine in (run.engine(target), run.engine(target)):
        assert engine.costs == PLAIN_CPU and isinstance(engine.plan(), AdaptiveTree)
    assert (tmp_path / measure.FILE).is_file() and len(measured) == 1


def test_the_sampler_is_the_recipes() -> None:
    said = {"temperature": 0.7, "top_p": 0.8, "top_k": 9, "min_p": 0.05, "repetition_penalty": 1.3}
    recipe = load_recipe(None, ["seed=4", *(f"decode.{key}={value}" for key, value in said.items())])
    assert sampler(recipe) == Sampler(**said, seed=4)
