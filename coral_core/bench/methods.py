"""A drafter and a head, loaded: each method an engine on the same target with the same tree.

Axes: C candidate token.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from coral_core.artifacts import MANIFEST, Manifest
from coral_core.bench.contenders import Contender
from coral_core.bench.probe import Watched
from coral_core.decoding.engine import Engine
from coral_core.decoding.sampling import Sampler
from coral_core.run import Run
from coral_core.target.target import Target

PROBE_TOKENS = 32
"""New tokens of the answer in which rows read are counted."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A drafter with a head, ready to decode, and what results.json says of them."""

    name: str
    engine: Engine
    folder: Path
    """Where the drafter came from: a run, or the package's own pico."""
    facts: dict[str, Any]
    """{method, drafter, head, tree}, and {costs} of a round where the tree is chosen by them."""


def load_method(contender: Contender, target: Target) -> Method:
    """Load drafter and head. Raises ArtifactError for what is missing, damaged or made for another target."""
    run = Run(contender.recipe, contender.folder)
    engine, manifest = run.engine(target), run.manifest(target)
    spec = contender.recipe.head
    head: dict[str, Any] = {"kind": spec.kind, "groups": spec.groups, "active": spec.active}
    if rows := engine.drafter.config.draft_vocab_size if engine.drafter else 0:
        head = {"kind": "own", "rows": rows}
    elif spec.kind != "full":
        made = Manifest.read(run.made / "head", "head", "coral group-head")
        head |= {key: head[key] or made.facts[key] for key in ("groups", "active")}  # what the recipe leaves open
        head["fingerprint"] = made.fingerprint
    facts = {
        "method": contender.name,
        "drafter": {
            "run": contender.owner,
            "preset": manifest.recipe.get("train", {}).get("preset"),
            "fingerprint": manifest.fingerprint,
            "data": manifest.inputs.get("data"),
        },
        "head": head,
        "tree": {"kind": contender.recipe.decode.tree, **dataclasses.asdict(engine.shape)},
    }
    if engine.costs is not None:
        facts["costs"] = dataclasses.asdict(engine.costs)
    return Method(contender.name, engine, run.made, facts)


def learnt_elsewhere(method: Method, run: Path) -> str:
    """What to tell where a method's drafter was not trained on the data whose held-out prompts are asked; '' else."""
    learnt, folder = method.facts["drafter"]["data"], run / "data"
    if not learnt or not (folder / MANIFEST).exists():
        return ""
    if learnt == Manifest.read(folder, "data", "coral prepare-data").fingerprint:
        return ""
    return (
        f"{method.name} was trained on other data than {folder} holds: the held-out prompts may be among what it "
        "learnt. Run coral train first, or name a --bench"
    )


def rows_read(engine: Engine, prompt: list[int]) -> float:
    """LM-head rows that the drafter reads per level of the tree, the mean over a short greedy answer; not timed."""
    assert engine.head is not None
    head = Watched(engine.head)
    for _ in dataclasses.replace(engine, head=head).decode(prompt, Sampler(), PROBE_TOKENS):
        pass
    return statistics.fmean(token_C.unique().numel() for token_C in head.tokens) if head.tokens else 0.0
