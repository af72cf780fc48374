"""Which dialogues a run has, and which of them share a shard: settled, and kept, before the first answer.

A shard's dialogues are known by bounds on their lengths, not by their answers: so every shard can be made alone, in
any order, by any process, and is the same.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from coral_core.artifacts import write_text
from coral_core.data.prompts import Dialogue, Skipped, UnusableError, parse, read_dialogues
from coral_core.data.sources import open_source
from coral_core.data.written import Scribe, written_prompts
from coral_core.errors import DataError
from coral_core.progress import Progress
from coral_core.recipe.schema import DataSpec
from coral_core.target.load import Target
from coral_core.target.template import Encoded, encode, prompt_ids, takes_system

PROMPTS = "prompts.jsonl"
PLAN = "plan.json"
SPARE = 2
"""Dialogues drawn from a file for each one wanted: some turn out too long."""
TURN_TOKENS = 32
"""What a template puts around a user's words, at most, where it is only estimated."""
TOKEN_CHARACTERS = 64
"""A token has fewer characters than this on average: longer texts are too long without being cut into tokens."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Dialogues in their final order, the held-out ones last, and shards as ranges of them."""

    dialogues: list[Dialogue]
    bounds: list[int]
    """Tokens that a dialogue can have, at most."""
    shards: list[range]
    skipped: dict[str, tuple[int, str]]

    def shard_tokens(self, number: int) -> int:
        """Tokens of one shard, at most."""
        return sum(self.bounds[index] for index in self.shards[number])

    def save(self, folder: Path) -> None:
        """Write prompts.jsonl, which is a prompt file like any other, and then the rest."""
        rows = "".join(json.dumps(dialogue.to_row(), ensure_ascii=False) + "\n" for dialogue in self.dialogues)
        write_text(folder / PROMPTS, rows)
        rest: dict[str, Any] = {
            "bounds": self.bounds,
            "shards": [[shard.start, shard.stop] for shard in self.shards],
            "skipped": self.skipped,
        }
        write_text(folder / PLAN, json.dumps(rest) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Plan | None":
        """What `save` wrote, or None when an interruption came before it was done."""
        if not (folder / PLAN).exists():
            return None
        with (folder / PROMPTS).open(encoding="utf-8") as file:
            dialogues = [parse(json.loads(line), f"{PROMPTS} line {number}") for number, line in enumerate(file, 1)]
        rest = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        skipped = {reason: (count, first) for reason, (count, first) in rest["skipped"].items()}
        return cls(dialogues, rest["bounds"], [range(*shard) for shard in rest["shards"]], skipped)


class Fit:
    """Whether a dialogue fits the target's template and the recipe's lengths, and how long it can become."""

    def __init__(self, target: Target, spec: DataSpec) -> None:
        self.tokenizer = target.tokenizer
        self.stop_ids = target.stop_ids
        self.spec = spec
        self._takes_system = takes_system(target.tokenizer)

    def measure(self, dialogue: Dialogue) -> tuple[Dialogue, int]:
        """The dialogue as the template takes it, and its tokens at most. Raises UnusableError when it is no use."""
        if not self._takes_system:
            dialogue = dialogue.folded()
        if self.spec.regenerate == "none":
            pieces = self.given(dialogue)
            return dialogue, sum(len(piece.ids) for piece in pieces)
        return dialogue, self._answered_tokens(dialogue)

    def given(self, dialogue: Dialogue) -> list[Encoded]:
        """The dialogue with its given answers, cut to `data.max_length`."""
        messages = dialogue.messages(dialogue.answers)[: (1 if dialogue.system else 0) + 2 * len(dialogue.answers)]
        self._check_size(sum(len(message["content"]) for message in messages[:2]))
        limit = self.spec.max_length
        pieces = [
            Encoded(piece.ids[:limit], piece.answer[:limit])
            for piece in encode(self.tokenizer, messages, self.stop_ids)
            if any(piece.answer[:limit])
        ]
        if not pieces:
            raise UnusableError(f"whose first answer begins beyond data.max_length ({limit} tokens)")
        return pieces

    def _answered_tokens(self, dialogue: Dialogue) -> int:
        """A bound for a dialogue whose turns each become a sample of their own, which most do not."""
        self._check_size(len(dialogue.system) + len(dialogue.users[0]))
        first = dialogue.messages(())
        length = len(prompt_ids(self.tokenizer, first))
        if length >= self.spec.max_length:
            raise UnusableError(f"whose prompt has data.max_length ({self.spec.max_length}) tokens or more")
        total = 0
        for turn in range(len(dialogue.users)):
            if turn:
                words = self.tokenizer(dialogue.users[turn], add_special_tokens=False)["input_ids"]
                length += len(words) + TURN_TOKENS
            length += self.spec.max_new_tokens
            total += min(length, self.spec.max_length)
        return total

    def _check_size(self, characters: int) -> None:
        if characters > TOKEN_CHARACTERS * self.spec.max_length:
            raise UnusableError(f"whose prompt has data.max_length ({self.spec.max_length}) tokens or more")


def make_plan(target: Target, spec: DataSpec, *, seed: int, work: Path, progress: Progress) -> Plan:
    """Find the dialogues, from a file, the Hub or the target itself. Raises DataError when they are too few."""
    skipped = Skipped()
    found: Iterable[tuple[str, Dialogue]]
    if spec.prompts == "self":
        scribe = Scribe(target, spec)
        found = written_prompts(scribe, seed=seed, work=work, skipped=skipped, progress=progress)
    else:
        found = read_dialogues(
            open_source(spec.prompts, seed),
            count=SPARE * spec.max_samples,
            seed=seed,
            answered=spec.regenerate == "none",
            skipped=skipped,
            progress=progress,
        )
    dialogues, bounds = _fitting(Fit(target, spec), found, skipped)
    progress("prompts", len(dialogues), len(dialogues), {})
    _check_count(len(dialogues), spec, skipped)
    return Plan(dialogues, bounds, cut(bounds, spec.shard_tokens), skipped.reasons)


def cut(bounds: Sequence[int], shard_tokens: int) -> list[range]:
    """Consecutive dialogues per shard, so many that their bounds stay within `shard_tokens`; one at least."""
    shards: list[range] = []
    first = tokens = 0
    for index, bound in enumerate(bounds):
        if index > first and tokens + bound > shard_tokens:
            shards.append(range(first, index))
            first, tokens = index, 0
        tokens += bound
    return [*shards, range(first, len(bounds))]


def _fitting(fit: Fit, found: Iterable[tuple[str, Dialogue]], skipped: Skipped) -> tuple[list[Dialogue], list[int]]:
    """The first `data.max_samples` dialogues that fit. Raises the template's DataError when it is not a rare case."""
    dialogues: list[Dialogue] = []
    bounds: list[int] = []
    refusals: list[DataError] = []
    for where, dialogue in found:
        try:
            fitted, bound = fit.measure(dialogue)
        except UnusableError as reason:
            skipped.add(str(reason), where)
        except DataError as error:
            skipped.add("that the chat template cannot mark", where)
            refusals.append(DataError(f"{where}: {error}"))
            if len(refusals) > 10 + len(dialogues) // 10:
                raise refusals[0] from error
        else:
            dialogues.append(fitted)
            bounds.append(bound)
        if len(dialogues) == fit.spec.max_samples:
            break
    if len(refusals) > len(dialogues):
        raise refusals[0]
    return dialogues, bounds


def _check_count(count: int, spec: DataSpec, skipped: Skipped) -> None:
    """Raises DataError when nothing, or nothing to train on, is left."""
    left_out = f"; left out: {skipped}" if skipped.reasons else ""
    if spec.prompts == "self" and count < spec.max_samples:
        raise DataError(
            f"the target wrote only {count} of {spec.max_samples} prompts{left_out}. "
            "Lower data.max_samples, raise data.temperature, or set data.prompts to a file"
        )
    if not count:
        raise DataError(f"no dialogue of {spec.prompts} can be used{left_out}. Set data.prompts to another source")
    if count <= spec.holdout:
        raise DataError(
            f"{spec.prompts} gives {count} dialogues, and data.holdout is {spec.holdout}{left_out}. "
            f"Set data.holdout below {count}"
        )
