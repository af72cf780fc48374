"""Which dialogues a run has, and which of them share a shard: settled, and kept, before the first answer.

A shard's dialogues are known by bounds on their lengths, not by their answers: so every shard can be made alone, in
any order, by any process, and is the same.
"""

import dataclasses
import datetime
import json
import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coral_core.artifacts import OWN_SUM, file_sha256, fingerprint, write_text
from coral_core.data.draw import Wanted, read_dialogues
from coral_core.data.kept import Kept
from coral_core.data.mix import Mix, Stream
from coral_core.data.prompts import Dialogue, Skipped, UnusableError
from coral_core.data.sources import SELF, open_source, shares
from coral_core.data.written import PromptWriter, written_prompts
from coral_core.errors import ArtifactError, DataError
from coral_core.progress import Progress
from coral_core.recipe.schema import DataSpec
from coral_core.target.target import Target
from coral_core.target.template import (
    Encoded,
    Message,
    encode,
    keeps_turns,
    prompt_ids,
    shown_fields,
    takes_system,
    text_ids,
)

PROMPTS = "prompts.jsonl"
PLAN = "plan.json"
SHARD_TOKENS = 65536
"""Tokens of one shard on disk, at most: bounds memory, and what an interruption can lose."""
SPARE = 2
"""Dialogues drawn from a file for each one wanted: some turn out too long."""
TURN_TOKENS = 32
"""What a template puts around a user's words, at most, where it is only estimated."""
TOKEN_CHARACTERS = 64
"""A token has fewer characters than this on average: longer texts are too long without being cut into tokens."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Dialogues in their final order, the held-out ones last, and shards as ranges of them."""

    dialogues: Kept
    bounds: "array[int]"
    """Tokens that a dialogue can have, at most."""
    shards: list[range]
    skipped: dict[str, tuple[int, str]]
    sources: dict[str, int]
    """Dialogues of each source."""
    unread: dict[str, tuple[int, str]]
    """Fields of rows and messages that are not read, with the number of rows and the place of the first."""
    now: datetime.datetime
    """The time that a chat template with a date shows, in all of the dialogues and after an interruption too."""

    def place(self, number: int) -> str:
        """A dialogue's number and where it was found."""
        where = self.dialogues.row(number).get("where")
        return f"dialogue {number}" + (f" ({where})" if where else "")

    def shard_tokens(self, number: int) -> int:
        """Tokens of one shard, at most."""
        return sum(self.bounds[index] for index in self.shards[number])

    def save(self, folder: Path) -> None:
        """Write prompts.jsonl, which is a prompt file like any other, and then the rest."""
        self.dialogues.save(folder / PROMPTS)
        rest: dict[str, Any] = {
            "bounds": list(self.bounds),
            "shards": [[shard.start, shard.stop] for shard in self.shards],
            "skipped": self.skipped,
            "sources": self.sources,
            "unread": self.unread,
            "now": self.now.isoformat(),
            PROMPTS: file_sha256(folder / PROMPTS),
        }
        write_text(folder / PLAN, json.dumps({**rest, OWN_SUM: fingerprint(rest)}) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Plan | None":
        """What `save` wrote, or None when an interruption came before it was done.

        Raises ArtifactError when it is damaged.
        """
        if not (folder / PLAN).exists():
            return None
        try:
            rest = _read(folder)
            skipped, unread = (
                {reason: (count, first) for reason, (count, first) in rest.get(key, {}).items()}
                for key in ("skipped", "unread")
            )
            now = datetime.datetime.fromisoformat(rest["now"]) if "now" in rest else _today()
            ranges = [range(*shard) for shard in rest["shards"]]
            kept = Kept.load(folder / PROMPTS)
            if len(kept) != len(rest["bounds"]):
                raise ValueError(f"{PROMPTS} has {len(kept)} of {len(rest['bounds'])} dialogues")
            return cls(kept, array("q", rest["bounds"]), ranges, skipped, rest["sources"], unread, now)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise ArtifactError(
                f"the unfinished data in {folder} are damaged: {error}. Run: coral prepare-data --restart"
            ) from error


def _read(folder: Path) -> dict[str, Any]:
    """What plan.json says. Raises ValueError when it, or prompts.jsonl, has other bytes than were written; those of
    earlier versions have no checksums."""
    try:
        rest: dict[str, Any] = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{PLAN}: {error}") from error
    if not isinstance(rest, dict) or "bounds" not in rest:
        raise ValueError(f"{PLAN} holds something else")
    own_sum = rest.pop(OWN_SUM, None)
    if own_sum is not None and own_sum != fingerprint(rest):
        raise ValueError(f"{PLAN} has another checksum than was written")
    if PROMPTS in rest and file_sha256(folder / PROMPTS) != rest[PROMPTS]:
        raise ValueError(f"{PROMPTS} has another checksum than was written")
    return rest


class Fit:
    """Whether a dialogue fits the target's template and the recipe's lengths, and how long it can become."""

    def __init__(self, target: Target, spec: DataSpec, now: datetime.datetime) -> None:
        self.target, self.now = target, now
        self.tokenizer = target.tokenizer
        self.stop_ids = target.stop_ids
        self.spec = spec
        self._takes_system = takes_system(target.tokenizer, answered=True)
        self._keeps_turns = keeps_turns(target.tokenizer, target.stop_ids)
        self._refused: set[tuple[str, ...]] = set()

    def read(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue with those fields of its messages that the chat template shows."""
        if not dialogue.fields:
            return dialogue
        return dialogue.with_fields(shown_fields(self.tokenizer, dialogue.messages(dialogue.answers)))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a dialogue up to where the target begins its answer. Raises DataError when they cannot be read."""
        ids = prompt_ids(self.tokenizer, messages, self.now)
        self.target.refuse_strange(ids)
        return ids

    def following(self, dialogue: Dialogue, answers: Sequence[str]) -> list[int] | None:
        """The prompt of the turn behind these answers; None where none can follow, as it leaves no room for another or
        the template refuses what was said, such as an empty answer, or another has (`refused` counts these).

        Raises DataError for a first one that is refused.
        """
        if answers and self.refused([dialogue]):
            return None
        try:
            ids = self.prompt(dialogue.messages(answers))
        except DataError:
            if not answers:
                raise
            self.refuse(dialogue)
            return None
        return ids if len(ids) < self.spec.max_length else None

    def refuse(self, dialogue: Dialogue) -> None:
        """Let no turn follow in this dialogue."""
        self._refused.add((dialogue.system, *dialogue.users))

    def refused(self, dialogues: Sequence[Dialogue]) -> int:
        """How many of these end early since the template, or the target, refused a later turn of them."""
        return sum((dialogue.system, *dialogue.users) in self._refused for dialogue in dialogues)

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
        limit, turns = self.spec.max_length, self._turns_in_reach(dialogue)
        messages = dialogue.messages(dialogue.answers)[: (1 if dialogue.system else 0) + 2 * turns]
        pieces = [
            Encoded(piece.ids[:limit], piece.answer[:limit])
            for piece in encode(self.tokenizer, messages, self.stop_ids, self.now)
            if any(piece.answer[:limit])
        ]
        if not pieces:
            raise UnusableError(f"whose first answer begins beyond data.max_length ({limit} tokens)")
        for piece in pieces:
            self.target.refuse_strange(piece.ids)
        return pieces

    def _turns_in_reach(self, dialogue: Dialogue) -> int:
        """Answered turns at the dialogue's head that are not, by their characters alone, beyond `data.max_length`."""
        characters = len(dialogue.system)
        for turn, (words, answer) in enumerate(zip(dialogue.users, dialogue.answers, strict=False)):
            characters += len(words) + len(answer)
            if characters > TOKEN_CHARACTERS * self.spec.max_length:
                if not turn:
                    raise UnusableError(f"whose first turn is far longer than data.max_length ({self.spec.max_length})")
                return turn
        return len(dialogue.answers)

    def _answered_tokens(self, dialogue: Dialogue) -> int:
        """Tokens if every answer is as long as it may be; summed over the turns where each is a sample of its own."""
        readable = len(dialogue.system) + len(dialogue.users[0]) <= TOKEN_CHARACTERS * self.spec.max_length
        length = len(self.prompt(dialogue.messages(()))) if readable else self.spec.max_length
        if length >= self.spec.max_length:
            raise UnusableError(f"whose prompt has data.max_length ({self.spec.max_length}) tokens or more")
        total = 0
        for turn in range(len(dialogue.users)):
            if turn:
                words = text_ids(self.tokenizer, dialogue.users[turn])
                self.target.refuse_strange(words)
                length += len(words) + TURN_TOKENS
            length += self.spec.max_new_tokens
            sample = min(length, self.spec.max_length)
            total = sample if self._keeps_turns else total + sample
        return total


def make_plan(
    target: Target,
    spec: DataSpec,
    *,
    seed: int,
    work: Path,
    now: datetime.datetime | None = None,
    progress: Progress,
) -> Plan:
    """Find the dialogues, from files, the Hub or the target itself. Raises DataError when they are too few.

    `work` is a folder on the disk that may hold them meanwhile, `now` the time that templates show, today's noon if
    it is not given.
    """
    skipped, now = Skipped(), now or _today()
    named = shares(spec.prompts)
    total = sum(share.weight for share in named)
    streams = []
    for share in named:
        if share.name == SELF:
            count = math.ceil(spec.max_samples * share.weight / total)
            writer = PromptWriter(target, spec)
            found = written_prompts(writer, count, seed=seed, work=work, skipped=skipped, progress=progress)
        else:
            wanted = Wanted(SPARE * spec.max_samples, seed, answered=spec.regenerate == "none")
            source = open_source(share.name, seed)
            found = read_dialogues(source, wanted, skipped=skipped, folder=work, progress=progress)
        streams.append(Stream(share, found))
    dialogues, bounds = _fitting(Fit(target, spec, now), Mix(streams, seed, skipped), skipped, Kept.nowhere(work))
    progress("prompts", len(dialogues), len(dialogues), {})
    _check_count(len(dialogues), spec, skipped)
    sources = {stream.share.name: stream.taken for stream in streams}
    shards = cut(bounds)
    return Plan(dialogues, bounds, shards, skipped.reasons, sources, skipped.unread, now)


def _today() -> datetime.datetime:
    """Noon: two runs of one day make the same plan."""
    return datetime.datetime.combine(datetime.date.today(), datetime.time(12))


def cut(bounds: Sequence[int]) -> list[range]:
    """Consecutive dialogues per shard, so many that their bounds stay within SHARD_TOKENS; one at least."""
    shards: list[range] = []
    first = tokens = 0
    for index, bound in enumerate(bounds):
        if index > first and tokens + bound > SHARD_TOKENS:
            shards.append(range(first, index))
            first, tokens = index, 0
        tokens += bound
    return [*shards, range(first, len(bounds))]


def _fitting(fit: Fit, mix: Mix, skipped: Skipped, kept: Kept) -> "tuple[Kept, array[int]]":
    """The first `data.max_samples` dialogues that fit. Raises the template's DataError when it is not a rare case."""
    bounds: array[int] = array("q")
    refusals: list[DataError] = []
    for where, dialogue in mix:
        try:
            read = fit.read(dialogue)
            fitted, bound = fit.measure(read)
        except UnusableError as reason:
            skipped.add(str(reason), where)
        except DataError as error:
            skipped.add("that the chat template or the target cannot take", where)
            refusals.append(DataError(f"{where}: {error}"))
            if len(refusals) > 10 + len(kept) // 10:
                raise refusals[0] from error
        else:
            mix.take()
            kept.append(fitted, where)
            for name in sorted(_names(dialogue) - _names(read)):
                skipped.leave_out(name, where)
            bounds.append(bound)
        if len(kept) == fit.spec.max_samples:
            break
    if len(refusals) > len(kept):
        raise refusals[0]
    return kept, bounds


def _names(dialogue: Dialogue) -> set[str]:
    return {name for fields in dialogue.fields for name in fields}


def _check_count(count: int, spec: DataSpec, skipped: Skipped) -> None:
    """Raises DataError when nothing, or nothing to train on, is left."""
    left_out = f"; left out: {skipped}" if skipped.reasons else ""
    if spec.prompts == SELF and count < spec.max_samples:
        raise DataError(
            f"the target wrote only {count} of {spec.max_samples} prompts{left_out}. "
            "Lower data.max_samples, or set data.prompts to a file"
        )
    if not count:
        raise DataError(f"no dialogue of {spec.prompts} can be used{left_out}. Set data.prompts to another source")
    if count <= spec.holdout:
        raise DataError(
            f"{spec.prompts} gives {count} dialogues, and data.holdout is {spec.holdout}{left_out}. "
            f"Set data.holdout below {count}"
        )
