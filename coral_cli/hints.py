"""Hints that can be pasted: a command named in a message gets the recipe and the overrides that were given.

The core writes "Run: coral train", since it does not know the command line. A user reads
"Run: coral train my.yaml train.steps=5".
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coral_core.artifacts import Standing

TAKES_A_RECIPE = ("prepare-data", "train", "group-head", "eval", "chat", "serve", "export", "publish")
_COMMAND = re.compile(rf"\bcoral ({'|'.join(TAKES_A_RECIPE)})\b(?!-)(?! [^ ,;]*\.yaml)")
_given: dict[str, list[str]] = {}
"""What was given, by part of the command line: `recipe`, with its overrides, and `runs`."""


def remember(name: str, words: list[str]) -> None:
    """Keep a part of this command line for the hints to come: its recipe and overrides, or its --runs."""
    _given[name] = words


def standing(folder: Path, found: Standing, same: str) -> str:
    """What is said, before a stage begins, of what stands in its folder; '' of nothing.

    `same` is what a finished stage agrees in.
    """
    if found.manifest:
        return f"{folder} is finished already, with this {same}"
    return f"{folder} is made anew, and replaced at the end, since {found.why}" if found.why else ""


def pasteable(text: str) -> str:
    """The text, each command in it with this command line's recipe and overrides."""
    words = [shlex.quote(word) for part in ("recipe", "runs") for word in _given.get(part, [])]
    return _COMMAND.sub(lambda found: " ".join([found.group(), *words]), text)
