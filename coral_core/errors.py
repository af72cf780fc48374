"""The errors that a user can cause and mend; anything else is a bug and keeps its traceback.

A message names the thing, the value, and the next command to try, in one line.
"""


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
