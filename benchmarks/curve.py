"""Tokens per round by the answer tokens that drafters were trained on, and where a line through them leads."""

from collections.abc import Sequence
from typing import Any

import numpy as np

WANTED = 3.0
"""Tokens per round that the line is asked for."""


def curve(answer_tokens: Sequence[int], taus: Sequence[float]) -> dict[str, Any]:
    """The points, the slope of the least-squares line over log2 of the tokens, and the tokens where it reaches WANTED.

    A token that is trained on twice counts twice. Behind the last point the line tells too much: more epochs of the
    same dialogues bring less.
    """
    slope, start = np.polyfit(np.log2(answer_tokens), taus, 1)
    points = {str(tokens): tau for tokens, tau in sorted(zip(answer_tokens, taus, strict=True))}
    reached = round(float(2 ** ((WANTED - start) / slope)))
    return {"tau_by_answer_tokens": points, "tau_per_doubling": float(slope), "answer_tokens_for_tau_3": reached}
