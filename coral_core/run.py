"""A run on disk gives its target, drafter, head and engine, and refuses what was made for something else."""

import dataclasses
from pathlib import Path
from typing import Any

from coral_core import embedded
from coral_core.artifacts import Manifest
from coral_core.decoding.engine import Engine
from coral_core.decoding.measure import measure_costs, tuned
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.sampling import Sampler
from coral_core.drafter.config import DrafterConfig
from coral_core.drafter.load import load_drafter
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError
from coral_core.head.heads import FullHead, Head, StaticHead
from coral_core.head.load import COMMAND as HEAD_COMMAND
from coral_core.head.load import load_head
from coral_core.lent import Lent
from coral_core.lock import published
from coral_core.recipe.schema import DecodeSpec, Recipe
from coral_core.target.compatibility import refuse_other_target
from coral_core.target.load import load_target
from coral_core.target.target import Target

DRAFTER_COMMAND = "coral train"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its recipe, and the folder where its stages are.

    What reads an artifact raises ArtifactError when it is missing, damaged, or made for another target.
    """

    recipe: Recipe
    folder: Path

    @property
    def made(self) -> Path:
        """The run that holds drafter and head: this one, or the package's own pico."""
        return embedded.made_in(self.folder, self.recipe.target.model)

    @property
    def sampler(self) -> Sampler:
        """The recipe's distribution and seed."""
        return sampler(self.recipe)

    def refuse_unmade(self) -> None:
        """Raises ArtifactError, as `engine` does, for a drafter or a head that is missing: before a target is read."""
        with published(self.made):
            Manifest.read(self.made / "drafter", "drafter", DRAFTER_COMMAND)
            if self.recipe.head.kind != "full" and not self._brings_head():
                Manifest.read(self.made / "head", "head", HEAD_COMMAND)

    def _brings_head(self) -> bool:
        """Whether the drafter has an LM head of its own."""
        try:
            return bool(DrafterConfig.load(self.made / "drafter", "").draft_vocab_size)
        except ArtifactError:  # it is told when the drafter is loaded
            return True

    def target(self, *, dialogues: bool = False) -> Target:
        """The recipe's target, loaded, as `load_target` does; exact if the recipe decodes so."""
        return self.as_decoded(load_target(self.recipe.target, dialogues=dialogues))

    def as_decoded(self, target: Target) -> Target:
        """A loaded target; exact if the recipe decodes so."""
        return dataclasses.replace(target, exact=target.exact and self.recipe.decode.exact)

    def manifest(self, target: Target) -> Manifest:
        """What the drafter's folder says of itself; the drafter is this target's, or a sibling's."""
        folder = self.made / "drafter"
        manifest = Manifest.read(folder, "drafter", DRAFTER_COMMAND)
        own = f"name={self.recipe.name}-2"  # the run's data and drafter are another target's, and stay
        refuse_other_target(manifest, folder, f"Run: coral prepare-data {own}, then coral train {own}", target)
        return manifest

    def drafter(self, target: Target) -> Drafter:
        """The drafter, on the target's device and in its dtype."""
        self.manifest(target)
        return load_drafter(self.made / "drafter").to(target.device, target.dtype)

    def head(self, target: Target) -> Head:
        """The head of the recipe's kind."""
        drafter = self.manifest(target)
        fits = {"target_fingerprint": drafter.inputs["target"], "drafter_fingerprint": drafter.fingerprint}
        return load_head(self.made / "head", self.recipe.head, target.lent, **fits)

    def engine(self, target: Target) -> Engine:
        """Drafter and head on the target. With `decode.tree: auto`, what a round costs on this device is read from
        the run, or measured now, in seconds."""
        with published(self.made):  # no drafter of before with a head of after, while another command replaces them
            drafter = self.drafter(target)
            own = drafter.config.draft_vocab_size
            head = whole_head(drafter, target.lent) if own else self.head(target)
            engine = Engine(target, drafter, head, tree_shape(self.recipe.decode))
        if self.recipe.decode.tree != "auto":
            return engine
        head_of = {"kind": "own", "rows": own} if own else self._head_of()
        of = {"target": target.fingerprint, "drafter": self.manifest(target).fingerprint, "head": head_of}
        return tuned(engine, self.folder, of)

    def _head_of(self) -> dict[str, Any]:
        """What tells heads apart that differ in their cost."""
        spec, folder = self.recipe.head, self.made / "head"
        made = "" if spec.kind == "full" else Manifest.read(folder, "head", HEAD_COMMAND).fingerprint
        return {"kind": spec.kind, "groups": spec.groups, "active": spec.active, "made": made}


def wire(target: Target, drafter: Drafter, head: Head, decode: DecodeSpec) -> Engine:
    """An engine of parts that are at hand; with `decode.tree: auto`, the costs are measured now, in seconds."""
    engine = Engine(target, drafter, head, tree_shape(decode))
    return dataclasses.replace(engine, costs=measure_costs(engine)) if decode.tree == "auto" else engine


def tree_shape(decode: DecodeSpec) -> TreeShape:
    """The recipe's tree, or the bounds of the one that pays."""
    return TreeShape(depth=decode.draft_depth, nodes=decode.draft_nodes, topk=decode.draft_topk)


def whole_head(drafter: Drafter, lent: Lent) -> Head:
    """Every row that the drafter can draft: of an LM head of its own, if it has one, or of the target's."""
    if not drafter.config.draft_vocab_size:
        return FullHead(lent)
    return StaticHead(lent, drafter.draft_tokens, drafter.lm_head.weight)


def sampler(recipe: Recipe) -> Sampler:
    """The recipe's distribution and seed."""
    decode = recipe.decode
    return Sampler(
        temperature=decode.temperature,
        top_p=decode.top_p,
        top_k=decode.top_k,
        min_p=decode.min_p,
        repetition_penalty=decode.repetition_penalty,
        seed=recipe.seed,
    )
