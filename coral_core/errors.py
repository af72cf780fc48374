"""The errors that a user can cause and mend; anything else is a bug and keeps its traceback.

A message names the thing, the value, and the next command to try, in one line.
"""

import difflib
from collections.abc import Iterable


class CoralError(Exception):
    """Base of every error that the command line shows as one line, with exit code 1."""


class CoralWarning(UserWarning):
    """What a user should know, and need not mend; the command line shows it as one line."""


class RecipeError(CoralError):
    """A recipe, or an override of it, that cannot be read or means nothing."""


class DataError(CoralError):
    """A prompt file, dialogue or chat template that cannot be used."""


class ArtifactError(CoralError):
    """A folder on disk that is missing, damaged, or made for something else."""


class TargetError(CoralError):
    """A target that is absent, or of a kind that coral cannot speed up."""


def first_line(error: BaseException) -> str:
    """Of a library's message, which may run over a page, or be one word that says nothing without the error's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = (" ".join(lines[:2]) if lines[0].endswith(":") else lines[0]).rstrip(".: ")
    return text if " " in text else f"{type(error).__name__}: {text}".rstrip(": ")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'did you mean X?', where X is the known name that is nearest; '' where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""
