"""A few answers with the origin of every token, for readers."""

from collections.abc import Sequence
from typing import Any

from coral_core.api.stream import TextStream
from coral_core.bench.questions import Bench
from coral_core.bench.race import Lane, Turn
from coral_core.target.target import Target

SAMPLES = 3
"""Answers shown of each bench."""


def samples(target: Target, bench: Bench, raced: Sequence[Sequence[Turn]], method: str) -> list[dict[str, Any]]:
    """{question, prompt, pieces} of the first turns of the first questions; a piece is (text, depth).

    Depth 0 is the target's own token, depth n one that was drafted at level n and accepted.
    """
    found: list[dict[str, Any]] = []
    for question, turns in zip(bench.questions, raced, strict=True):
        if turns and len(found) < SAMPLES:
            prompt = question.turns[0] if question.turns else _readable(target, list(question.ids))
            found.append(
                {"question": question.name, "prompt": prompt, "pieces": _pieces(target, turns[0].lanes[method])}
            )
    return found


def _readable(target: Target, ids: list[int]) -> str:
    return str(target.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def depths(lane: Lane) -> list[int]:
    """For each token of a lane, the level at which it was drafted, or 0 where the target alone picked it."""
    found = [0]  # the prefill's
    for accepted, emitted in zip(lane.accepted_drafts, lane.emitted, strict=True):
        found += [n if n <= accepted else 0 for n in range(1, emitted + 1)]
    return found


def _pieces(target: Target, lane: Lane) -> list[tuple[str, int]]:
    """Text as it became final; a token that only began a character has no text, its successor has both's."""
    stream = TextStream(target.tokenizer)
    found = [(stream.feed([token]), depth) for token, depth in zip(lane.ids, depths(lane), strict=True)]
    return [piece for piece in [*found, (stream.rest(), 0)] if piece[0]]
