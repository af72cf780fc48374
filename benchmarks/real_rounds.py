"""Tokens and rounds of each drafter on the questions of benchmarks/real.py, with EAGLE-2's tree of a fixed size.

They are found by replay (benchmarks/replay.py), at the price of drafting: a processor's tree is never so large, so that
no race needs these rounds. They are counts, which a busy machine does not change. A row is one answer of one method.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import replay
from benchmarks.real_figures import Row
from benchmarks.rows import append, read
from coral_core.artifacts import Manifest, fingerprint
from coral_core.bench.race import run_lane
from coral_core.decoding.engine import Engine
from coral_core.decoding.sampling import Sampler
from coral_core.recipe.loader import load_recipe
from coral_core.run import Run
from coral_core.target.target import Target

PAPERS_TREE = ("decode.draft_depth=6", "decode.draft_nodes=60", "decode.draft_topk=10")
"""EAGLE-2's, which HASS and CORAL are compared on: methods' tau is that of fixed trees, speeds are those of `auto`."""


@dataclasses.dataclass(frozen=True)
class Drafted:
    """A method's run on disk: `name` is METHOD or METHOD@SEED."""

    name: str
    folder: Path

    @property
    def heads(self) -> tuple[str, ...]:
        return ("full", "grouped") if (self.folder / "head").exists() else ("full",)

    def made(self, head: str) -> list[str]:
        """Fingerprints of the drafter, and of the grouped head where that is used."""
        kinds = {"drafter": "coral train"} | ({"head": "coral group-head"} if head == "grouped" else {})
        return [Manifest.read(self.folder / kind, kind, command).fingerprint for kind, command in kinds.items()]

    def engine(self, target: Target, head: str, tree: str) -> Engine:
        """The run's own recipe on this target; the tree is the one that pays (auto), or always as large (fixed)."""
        keys = [f"decode.tree={tree}", f"head.kind={head}", *PAPERS_TREE]
        return Run(load_recipe(self.folder / "recipe.yaml", keys), self.folder).engine(target)


@dataclasses.dataclass(frozen=True)
class Asked:
    """One question at one temperature."""

    bench: str
    question: str
    temperature: float
    prompt: list[int]

    @property
    def row(self) -> Row:
        """What names it in a row."""
        return {"bench": self.bench, "question": self.question, "temperature": self.temperature}


def rounds(
    target: Target, drafters: Sequence[Drafted], asked: Sequence[Asked], tokens: int, seed: int, path: Path
) -> list[Row]:
    """The rows of these methods and heads, other questions in the file too; what is missing is counted and appended."""
    made = [(one, head, one.made(head)) for one in drafters for head in one.heads]
    settings = [
        fingerprint(["rounds", target.fingerprint, str(target.dtype), prints, tokens, seed]) for *_, prints in made
    ]
    done = {key(row): row for row in read(path) if "rounds" in row}

    @functools.cache
    def engines() -> list[Engine]:
        return [one.engine(target, head, "fixed") for one, head, _ in made]

    for number, one in enumerate(asked, start=1):
        rows = [
            one.row | {"method": drafter.name, "head": head, "settings": own}
            for (drafter, head, _), own in zip(made, settings, strict=True)
        ]
        missing = [place for place, row in enumerate(rows) if key(row) not in done]
        if missing:
            fresh = counted(target, [engines()[place] for place in missing], one, tokens, seed)
            for place, counts in zip(missing, fresh, strict=True):
                done[key(rows[place])] = rows[place] | counts
                append(path, rows[place] | counts)
            print(f"rounds {number}/{len(asked)}: {one.bench} {one.question}, T={one.temperature:g}", file=sys.stderr)
    own = {(one.name, head, name): prints for (one, head, prints), name in zip(made, settings, strict=True)}
    named = [((row["method"], row["head"], row["settings"]), row) for row in done.values()]
    return [row | {"made": own[name]} for name, row in named if name in own]


def counted(target: Target, engines: Sequence[Engine], asked: Asked, tokens: int, seed: int) -> Iterator[Row]:
    """Tokens after the first and rounds of each engine; `alike`: whether the replay said the target's own answer."""
    picks = Sampler(temperature=asked.temperature, seed=seed)
    (answer,) = replay.plain_answers(target, [asked.prompt], picks, tokens)
    repeating = functools.cache(functools.partial(replay.repeating, target, asked.prompt, answer))
    for engine in engines:
        told = dataclasses.replace(engine, target=repeating(engine.target.taps))
        lane = run_lane(told.decode(asked.prompt, picks, tokens))
        yield {"tokens": sum(lane.emitted), "rounds": len(lane.emitted), "alike": lane.ids == answer}


def key(row: Row) -> tuple[Any, ...]:
    """What a row is of."""
    return tuple(row[name] for name in ("bench", "question", "temperature", "method", "head", "settings"))
