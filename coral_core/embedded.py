"""pico, the model that coral ships: the one place that knows its name and where it lies."""

from pathlib import Path

NAME = "pico"
FOLDER = Path(__file__).parent / "pico"
"""A run: the target, the drafter and the head trained for it, and their recipe."""
RECIPE = FOLDER / "recipe.yaml"


def model_source(model: str) -> str:
    """What transformers loads a target from: pico's folder, any other name as it is."""
    return str(FOLDER / "target") if model == NAME else model


def made_in(run: Path, model: str, artifact: str = "drafter") -> Path:
    """The run that holds an artifact: `run` itself, or coral's own where the target is pico and `run` has none."""
    return FOLDER if model == NAME and not (run / artifact).exists() else run
