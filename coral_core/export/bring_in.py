"""The import: a drafter from elsewhere becomes RUN/drafter, for a target that is told by its fingerprint.

Axes: V vocabulary, D hidden.
"""

import dataclasses
import shutil
from pathlib import Path

import torch

from coral_core.artifacts import MANIFEST, Manifest, stage
from coral_core.drafter.checkpoint import is_coral, read_checkpoint, weights_fingerprint
from coral_core.drafter.hub import fetch
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError
from coral_core.target.load import Target

EMBED_TOLERANCE = 1e-2
"""Relative distance of two embeddings that are the same but for rounding: bfloat16's is at most 2^-9 = 0.002."""


def bring_in(name: str, run: Path, target: Target) -> tuple[Manifest, bool]:
    """Publish RUN/drafter, and RUN/head where there is one, from a folder or Hub id; (manifest, whether a head came).

    Coral's own folder keeps its manifest, so that its head still fits. Raises ArtifactError, in one line, for what is
    no whole drafter, for one of another target, and rather than replace another drafter in the run.
    """
    folder = fetch(name)
    if is_coral(folder):
        drafter, manifest = Drafter.load(folder), Manifest.read(folder, "drafter", "coral export --to hf")
        if (made_for := manifest.inputs.get("target")) != target.fingerprint:
            raise ArtifactError(
                f"the drafter in {folder} was trained for target {made_for}; this target is {target.fingerprint}. "
                "Set target.model to its own"
            )
    else:
        checkpoint = read_checkpoint(folder)
        drafter, manifest = checkpoint.drafter, foreign_manifest(checkpoint.drafter, checkpoint.path, target)
        refuse_wrong_target(folder, drafter, checkpoint.embed_VD, target)
    _refuse_replacing(run / "drafter", manifest)
    with stage(run / "drafter", manifest.fingerprint) as work:
        drafter.save(work)
        manifest.write(work)
    head = folder / "head"
    if is_coral(folder) and head.exists():
        with stage(run / "head", Manifest.read(head, "head", "coral export --to hf").fingerprint) as work:
            shutil.copytree(head, work, dirs_exist_ok=True)
        return manifest, True
    return manifest, False


def foreign_manifest(drafter: Drafter, path: Path, target: Target) -> Manifest:
    """What can be said of a drafter that coral did not train: its weights, and the target it is now tied to."""
    facts = {
        "imported_from": path.parent.name,
        "parameters": sum(weight.numel() for weight in drafter.parameters()),
        "dtype": str(drafter.fc.weight.dtype).removeprefix("torch."),
        "drafter_config": dataclasses.asdict(drafter.config),
    }
    name = weights_fingerprint(drafter)
    return Manifest(kind="drafter", fingerprint=name, inputs={"target": target.fingerprint}, recipe={}, facts=facts)


def refuse_wrong_target(folder: Path, drafter: Drafter, embed_VD: torch.Tensor | None, target: Target) -> None:
    """Raises ArtifactError when the target's features or words are not those that the drafter was trained on."""
    own_VD = target.lent.embed_VD.detach().cpu()
    config, (vocabulary, hidden) = drafter.config, own_VD.shape
    if (config.vocab_size, config.hidden_size) != (vocabulary, hidden):
        raise ArtifactError(
            f"the drafter in {folder} is for a vocabulary of {config.vocab_size} and {config.hidden_size} hidden; "
            f"the target has {vocabulary} and {hidden}. Set target.model to its own"
        )
    if embed_VD is None:
        return
    distance = float((embed_VD.float() - own_VD.float()).norm() / own_VD.float().norm())
    if not distance <= EMBED_TOLERANCE:
        raise ArtifactError(
            f"the drafter in {folder} was trained for another target: its embed_tokens.weight is {distance:.2g} away "
            "from the target's, relatively. Set target.model to its own"
        )


def _refuse_replacing(final: Path, manifest: Manifest) -> None:
    if not (final / MANIFEST).exists():
        return
    there = Manifest.read(final, "drafter", "coral train").fingerprint
    if there != manifest.fingerprint:
        raise ArtifactError(f"{final} holds another drafter ({there}). Import into a run of its own: name=…")
