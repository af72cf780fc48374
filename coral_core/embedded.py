"""What coral ships: pico, a whole model, and drafters of published ones. The one place that knows where they lie."""

from pathlib import Path

NAME = "pico"
FOLDER = Path(__file__).parent / "pico"
"""A run: the target, the drafter and the head trained for it, and their recipe."""
RECIPE = FOLDER / "recipe.yaml"
SHIPPED = Path(__file__).parent / "shipped"
"""Drafters of published models, by the name of their run: each a run with head, recipe and held-out prompts."""


def model_source(model: str) -> str:
    """What transformers loads a target from: pico's folder, any other name as it is."""
    return str(FOLDER / "target") if model == NAME else model


def shipped(name: str) -> Path | None:
    """The run that coral ships by this name."""
    return {NAME: FOLDER, **{path.parent.name: path.parent for path in SHIPPED.glob("*/drafter")}}.get(name)


def made_in(run: Path, model: str, artifact: str = "drafter") -> Path:
    """The run that holds an artifact: `run` itself, or, where it has none, the one of coral's own for this target."""
    if (run / artifact).exists():
        return run
    own = FOLDER if model == NAME else SHIPPED / run.name
    return own if own.is_dir() else run


def holds(folder: Path) -> bool:
    """Whether a folder is a part of the package, which no command makes anew."""
    return any(own in (folder, *folder.parents) for own in (FOLDER, SHIPPED))
