"""A run on disk: what its recipe says reaches the target, and so the engine."""

from pathlib import Path

import pytest

from coral_core.recipe.loader import load_recipe
from coral_core.run import Run


@pytest.mark.parametrize("exact", [True, False])
def test_decode_exact_says_whether_forwards_are_exact(exact: bool, tmp_path: Path) -> None:
    recipe = load_recipe(None, [f"decode.exact={str(exact).lower()}"])
    assert Run(recipe, tmp_path).target().exact is exact
