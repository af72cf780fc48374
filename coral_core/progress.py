"""How core code says how far it is: a passed function, so that it never prints."""

from collections.abc import Callable

Progress = Callable[[str, int, int, dict[str, float]], None]
"""(stage, done, total, numbers): `done` of `total` units of the named stage, with numbers to show beside the bar.

A number's name carries its unit (`tokens_per_s`). A total of 0 is an unknown total; a stage ends when done == total.
"""


def silent(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
    """The progress that nobody watches."""
