"""Prompts that the target writes itself: it continues its chat template's opening of a user's turn, as Magpie does.

Rounds are kept in the work folder as they are finished, so that an interruption loses one round at most.
Magpie: https://arxiv.org/abs/2406.08464
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from coral_core.artifacts import OWN_SUM, fingerprint, write_text
from coral_core.data.answer import Sampling, derive_seed, write
from coral_core.data.meter import Meter
from coral_core.data.prompts import Dialogue, Skipped
from coral_core.progress import Progress
from coral_core.recipe.schema import DataSpec
from coral_core.target.target import Target
from coral_core.target.template import control_ids, user_turn

ROUND = 256
"""Prompts written between two saves. Not the batch size: a smaller batch on the next run must not change the words."""
TRIES = 8
"""Prompts written for each one wanted, before giving up."""
SPOILT = "self-written prompts that did not end, were empty or held control tokens"
REPEATED = "self-written prompts said before"


class PromptWriter:
    """Lets the target write a user's prompts."""

    def __init__(self, target: Target, spec: DataSpec) -> None:
        self.target = target
        self.spec = spec
        self.turn = user_turn(target.tokenizer)
        self._stop_ids = target.stop_ids | self.turn.stop_ids
        self._control_ids = control_ids(target.tokenizer)

    def write(self, count: int, seed: int, meter: Meter) -> list[str]:
        """That many prompts; '' for one that cannot be used."""
        sampling = Sampling(temperature=1.0, seed=seed, batch_size=self.spec.batch_size)
        limits = [self.spec.max_new_tokens] * count

        def advance(ended: set[int], tokens: int) -> None:
            meter.advance(len(ended), tokens)

        written = write(self.target, [self.turn.header] * count, limits, self._ends, sampling, advance)
        return [self._words(answer.ids) for answer in written]

    def _ends(self, ids: list[int]) -> bool:
        """A stop token, or, where the template closes a user's turn with plain text, that text."""
        if ids[-1] in self._stop_ids:
            return True
        if self.turn.stop_ids or not self.turn.stop_text:
            return False
        tail = ids[-2 - len(self.turn.stop_text) :]  # a token is a character at least
        return self.turn.stop_text in self.target.tokenizer.decode(tail)

    def _words(self, ids: list[int]) -> str:
        if not self._ends(ids):
            return ""
        body = ids[:-1] if ids[-1] in self._stop_ids else ids
        if self._control_ids.intersection(body):
            return ""
        text: str = self.target.tokenizer.decode(body)
        if not self.turn.stop_ids and self.turn.stop_text:
            text = text.split(self.turn.stop_text)[0]
        return text.strip()


def written_prompts(
    writer: PromptWriter, wanted: int, *, seed: int, work: Path, skipped: Skipped, progress: Progress
) -> Iterator[tuple[str, Dialogue]]:
    """Different prompts with their places, `wanted` and as many more as are asked for, since some may turn out to be of
    no use; fewer when the target keeps repeating itself."""
    meter = Meter(progress, "prompts", wanted)
    seen: set[str] = set()
    tried = number = 0
    while tried < TRIES * wanted:
        missing = max(1, wanted - len(seen))
        size = min(ROUND, max(32, missing + missing // 4))
        for text in _round(writer, size, derive_seed(seed, "prompts", number), work / f"self-{number:05d}.json", meter):
            tried += 1
            where = f"prompt {tried}"
            if not text or text in seen:
                skipped.add(REPEATED if text else SPOILT, where)
            else:
                seen.add(text)
                yield where, Dialogue((text,))
        number += 1
        meter.done = min(len(seen), wanted)


def _round(writer: PromptWriter, size: int, seed: int, path: Path, meter: Meter) -> list[str]:
    """One round's prompts: those an interrupted run had saved, or new ones."""
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):  # damaged: the same words are written again
        saved = json.loads(path.read_text(encoding="utf-8"))
        texts: list[str] = saved["prompts"]
        if saved[OWN_SUM] == fingerprint(texts):
            return texts
    texts = writer.write(size, seed, meter)
    write_text(path, json.dumps({"prompts": texts, OWN_SUM: fingerprint(texts)}) + "\n")
    return texts
