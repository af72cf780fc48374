"""One shard's dialogues: answered by the target, whose features are kept meanwhile; those of others' answers are read.

Axes: B batch, T position, D hidden, I input width: the taps side by side.
"""

import warnings
from collections.abc import Sequence

import torch

from coral_core.data.answer import Sampling, derive_seed, write
from coral_core.data.meter import Meter
from coral_core.data.plan import Fit
from coral_core.data.prompts import Dialogue
from coral_core.errors import CoralWarning
from coral_core.store.shard import FP8, Sample
from coral_core.target.capture import Capture, tap
from coral_core.target.target import Target
from coral_core.target.template import Encoded, Turn, append, hides

HIDDEN = (
    "an answer holds special tokens, such as those around reasoning. coral cannot show them in the next prompt as the "
    "chat template does, so such a dialogue ends there. Train with dialogues of one turn"
)
CPU_ROWS = 8
"""Dialogues that a processor taps at once, at most: features of SmolLM2-135M come at 487 tokens/s with 8, at some 210
with 64 (one core, bfloat16), since a layer's activations then leave the cache."""


def answer(
    target: Target,
    dialogues: Sequence[Dialogue],
    fit: Fit,
    seed: int,
    meter: Meter,
    keep: torch.dtype | None = None,
) -> list[list[Encoded]]:
    """Each dialogue's pieces, one in most cases, with the answers that `data.regenerate` asks for.

    With `keep`, an answer that is written here brings its features in that dtype.
    """
    if fit.spec.regenerate == "none":
        pieces = [fit.given(dialogue) for dialogue in dialogues]
        meter.advance(len(dialogues), 0)
        return pieces
    return _regenerate(target, dialogues, fit, seed, meter, keep)


def _regenerate(
    target: Target, dialogues: Sequence[Dialogue], fit: Fit, seed: int, meter: Meter, keep: torch.dtype | None
) -> list[list[Encoded]]:
    """Turn after turn: the words of a later turn are answered in view of the answers just written."""
    spec = fit.spec
    pieces: list[list[Encoded]] = [[] for _ in dialogues]
    texts: list[list[str]] = [[] for _ in dialogues]
    open_rows = list(range(len(dialogues)))
    for number in range(max(len(dialogue.users) for dialogue in dialogues)):
        following = {row: fit.following(dialogues[row], texts[row]) for row in open_rows}
        prompts = {row: prompt for row, prompt in following.items() if prompt is not None}
        meter.advance(len(open_rows) - len(prompts), 0)
        open_rows = list(prompts)
        limits = [min(spec.max_new_tokens, spec.max_length - len(prompts[row])) for row in open_rows]
        last = {place for place, row in enumerate(open_rows) if len(dialogues[row].users) == number + 1}
        sampling = Sampling(
            temperature=1.0 if spec.regenerate == "sample" else 0.0,
            seed=derive_seed(seed, number),
            batch_size=spec.batch_size,
            keep=keep,
        )

        def advance(ended: set[int], tokens: int, last: set[int] = last) -> None:
            meter.advance(len(ended & last), tokens)

        answers = write(
            target,
            [prompts[row] for row in open_rows],
            limits,
            lambda ids: ids[-1] in target.stop_ids,
            sampling,
            advance,
        )
        for row, written in zip(open_rows, answers, strict=True):
            append(pieces[row], Turn(prompts[row], written.ids, written.given_TI))
            texts[row].append(target.tokenizer.decode(written.ids, skip_special_tokens=True).strip())
            if len(dialogues[row].users) > number + 1 and hides(target.tokenizer, written.ids, target.stop_ids):
                warnings.warn(HIDDEN, CoralWarning, stacklevel=2)
                fit.refuse(dialogues[row])
        open_rows = [row for row in open_rows if len(dialogues[row].users) > number + 1]
    return pieces


def words_only(piece: Encoded) -> Sample:
    """A sample whose features are of no width: they are asked of the target when it is trained on."""
    return Sample(torch.tensor(piece.ids), torch.tensor(piece.answer), torch.empty(len(piece.ids), 0))


def held_dtype(target: Target, dtype: torch.dtype) -> torch.dtype:
    """Of features in memory. For an fp8 store the target's: they are scaled row by row when the shard is written."""
    return target.dtype if dtype == FP8 else dtype


def tap_all(
    target: Target, pieces: Sequence[Encoded], batch_size: int, dtype: torch.dtype, meter: Meter
) -> list[Sample]:
    """A sample for each piece, in the pieces' order; those without features are read, the ones of like length at once.

    `dtype` is of the features in memory.
    """
    batch_size = min(batch_size, CPU_ROWS) if target.device.type == "cpu" else batch_size
    samples = {index: _kept(target, piece) for index, piece in enumerate(pieces) if piece.given_TI is not None}
    order = sorted(set(range(len(pieces))) - set(samples), key=lambda index: len(pieces[index].ids))
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        for index, sample in zip(indices, _tap_batch(target, [pieces[i] for i in indices], dtype), strict=True):
            samples[index] = sample
        meter.advance(0, sum(len(pieces[index].ids) for index in indices))
    return [samples[index] for index in range(len(pieces))]


def _tap_batch(target: Target, pieces: Sequence[Encoded], dtype: torch.dtype) -> list[Sample]:
    lengths = [len(piece.ids) for piece in pieces]
    width = max(lengths)
    ids_BT = torch.tensor([piece.ids + [0] * (width - len(piece.ids)) for piece in pieces])
    valid_BT = torch.arange(width) < torch.tensor(lengths)[:, None]
    found = tap(target, ids_BT, valid_BT)
    feature_BTD = found.feature_BTD.to("cpu", dtype)
    tap_BTI = None if found.tap_BTI is None else found.tap_BTI.to("cpu", dtype)
    return [
        Sample(
            ids_BT[row, :length],
            torch.tensor(pieces[row].answer),
            feature_BTD[row, :length],
            None if tap_BTI is None else tap_BTI[row, :length],
        )
        for row, length in enumerate(lengths)
    ]


def _kept(target: Target, piece: Encoded) -> Sample:
    """The sample of a piece that brings its features."""
    assert piece.given_TI is not None and len(piece.given_TI) == len(piece.ids)
    found = Capture.of(target, piece.given_TI[None])
    tap_TI = None if found.tap_BTI is None else found.tap_BTI[0]
    return Sample(torch.tensor(piece.ids), torch.tensor(piece.answer), found.feature_BTD[0], tap_TI)
