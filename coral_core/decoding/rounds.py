"""What a round brings, and how long its phases took."""

import dataclasses
import time
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Round:
    """New tokens, and how they came."""

    new_ids: list[int]
    kind: Literal["prefill", "plain", "draft", "copy"]
    """plain: a step of plain decoding, in a drafted answer too, where a draft would not pay; copy: what was drafted is
    in the text before."""
    accepted_drafts: int = 0
    """Of `new_ids`, how many were drafted; the others are the target's own."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Wall-clock by phase."""


class Clock:
    """Splits a round's wall-clock into phases.

    `with clock.phase("draft"): …` is how one is told; a phase within another is not part of it.

    prefill; draft (the drafter's layer, the tree); head (the drafter's LM head); verify (masks, the target's forward,
    logits); accept (picks, and the rows that are kept); other (the rest). On a GPU the work of one phase may end in a
    later one, as nothing waits for the device in between. A recorded draft, and one for several seats, is `draft` as a
    whole.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open = ["other"]
        self._last = time.perf_counter()

    def restart(self) -> None:
        """Forget the time since the last phase: the caller had the round."""
        self._last = time.perf_counter()

    def phase(self, name: str) -> "Clock":
        """What runs within `with` is of this phase."""
        self._add()
        self._open.append(name)
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self._add()
        self._open.pop()

    def take(self) -> dict[str, float]:
        """The phases so far; starts anew."""
        self._add()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _add(self) -> None:
        """Add the time since the last change to the phase that is open."""
        now, phase = time.perf_counter(), self._open[-1]
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now
