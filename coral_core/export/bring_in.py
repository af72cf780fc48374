"""The import: a drafter from elsewhere becomes RUN/drafter, for a target that is told by its fingerprint.

Axes: V vocabulary, D hidden.
"""

import dataclasses
import shutil
from pathlib import Path

import torch

from coral_core.artifacts import COMPATIBILITY, MANIFEST, Manifest, stage
from coral_core.drafter.checkpoint import is_coral, read_checkpoint, weights_fingerprint
from coral_core.drafter.hub import fetch
from coral_core.drafter.load import FILES, build_drafter, load_drafter, save_drafter
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError, TargetError
from coral_core.head.load import load_head
from coral_core.lent import Lent
from coral_core.recipe.schema import HeadSpec
from coral_core.target import compatibility
from coral_core.target.load import tap_layers
from coral_core.target.target import Target

EMBED_TOLERANCE = 1e-2
"""Relative distance of two embeddings that are the same but for rounding: bfloat16's is at most 2^-9 = 0.002."""
AGAIN = "coral export --to hf"
OWN = "Set target.model to its own"


def bring_in(name: str, run: Path, target: Target) -> tuple[Manifest, bool]:
    """Publish RUN/drafter, and RUN/head where there is one, from a folder or Hub id; (manifest, whether a head came).

    Coral's own folder keeps its manifest, so that its head still fits. Raises ArtifactError, in one line, for what is
    no whole drafter, for one of another target, and rather than replace another drafter in the run.
    """
    folder = fetch(name)
    if is_coral(folder):
        drafter, embed_VD, path = load_drafter(folder, AGAIN), None, folder / "model.safetensors"
    else:
        checkpoint = read_checkpoint(folder, _usual_taps(target))
        drafter, embed_VD, path = lent_head(checkpoint.drafter, target.lent), checkpoint.embed_VD, checkpoint.path
    refuse_broken(path, drafter)
    refuse_wrong_target(folder, drafter, embed_VD, target)
    if is_coral(folder) and (folder / MANIFEST).exists():
        manifest, head = own_manifest(folder, target), folder / "head"
        head_manifest = check_head(head, manifest, target) if head.exists() else None
    else:  # its head, if it has one, fits a drafter that only its manifest names
        manifest, head_manifest = foreign_manifest(drafter, _source(name), target), None
    _refuse_replacing(run / "drafter", manifest)
    with stage(run / "drafter", manifest.fingerprint) as work:
        save_drafter(drafter, work)
        manifest = manifest.sealed(work, *FILES)
        manifest.write(work)
    if head_manifest is not None:
        with stage(run / "head", head_manifest.fingerprint) as work:
            shutil.copytree(folder / "head", work, dirs_exist_ok=True)
    return manifest, head_manifest is not None


def _usual_taps(target: Target) -> tuple[int, ...]:
    """What EAGLE-3's own code reads of this target; nothing where it has too few layers."""
    try:
        return tap_layers(target.model.config)
    except TargetError:
        return ()


def lent_head(drafter: Drafter, lent: Lent) -> Drafter:
    """The drafter without an LM head of its own, where that is the target's whole one: engines want it written out."""
    if drafter.config.draft_vocab_size != drafter.config.vocab_size or lent.head_bias_V is not None:
        return drafter
    if drafter.d2t.any() or not torch.equal(drafter.lm_head.weight.to(lent.head_VD), lent.head_VD):
        return drafter
    weights = {name: value for name, value in drafter.state_dict().items() if name not in ("lm_head.weight", "d2t")}
    config = dataclasses.replace(drafter.config, draft_vocab_size=0)
    return build_drafter(config, weights, source="the checkpoint", remedy=OWN)


def own_manifest(folder: Path, target: Target) -> Manifest:
    """Of a drafter that coral made. Raises ArtifactError when it was trained for another target."""
    manifest = Manifest.read(folder, "drafter", AGAIN)
    compatibility.refuse_other_target(manifest, folder, OWN, target)
    return manifest


def check_head(folder: Path, drafter: Manifest, target: Target) -> Manifest:
    """The head's manifest. Raises ArtifactError when it is damaged, or was made for another drafter."""
    manifest = Manifest.read(folder, "head", AGAIN)
    facts = manifest.facts
    spec = HeadSpec(groups=facts["groups"], active=facts["active"])
    fits = {"target_fingerprint": drafter.inputs["target"], "drafter_fingerprint": drafter.fingerprint}
    load_head(folder, spec, target.lent, **fits, command=AGAIN)
    return manifest


def foreign_manifest(drafter: Drafter, source: str, target: Target) -> Manifest:
    """What can be said of a drafter that coral did not train: its weights, and the target it is now tied to."""
    facts = {
        "imported_from": source,
        "parameters": sum(weight.numel() for weight in drafter.parameters()),
        "dtype": str(drafter.fc.weight.dtype).removeprefix("torch."),
        "drafter_config": drafter.config.to_json(),
        COMPATIBILITY: compatibility.describe(target),
    }
    name = weights_fingerprint(drafter)
    return Manifest(kind="drafter", fingerprint=name, inputs={"target": target.fingerprint}, recipe={}, facts=facts)


def _source(name: str) -> str:
    """A Hub id as it is; of a folder its own name, since the path to it is the user's affair."""
    folder = Path(name)
    return folder.resolve().name if folder.is_dir() else name


def refuse_broken(path: Path, drafter: Drafter) -> None:
    """Raises ArtifactError, naming the tensor, when a weight is no number: it would load, and guess nothing."""
    for name, weight in drafter.state_dict().items():
        if not weight.isfinite().all():
            raise ArtifactError(f"{path}: tensor '{name}' holds numbers that are not finite. Take another copy of it")


def refuse_wrong_target(folder: Path, drafter: Drafter, embed_VD: torch.Tensor | None, target: Target) -> None:
    """Raises ArtifactError when the target's features or words are not those that the drafter was trained on."""
    own_VD = target.lent.embed_VD.detach().cpu()
    try:
        target.tapping(drafter.config.taps)
    except TargetError as error:
        raise ArtifactError(f"{folder}: {error}") from error
    if misfit := drafter.config.misfit(tuple(own_VD.shape)):
        raise ArtifactError(f"the drafter in {folder} {misfit}. {OWN}")
    if embed_VD is None:
        return
    distance = float((embed_VD.float() - own_VD.float()).norm() / own_VD.float().norm())
    if not distance <= EMBED_TOLERANCE:
        raise ArtifactError(
            f"the drafter in {folder} was trained for another target: its embed_tokens.weight is {distance:.2g} away "
            f"from the target's, relatively. {OWN}"
        )


def _refuse_replacing(final: Path, manifest: Manifest) -> None:
    try:
        there = Manifest.read(final, "drafter", "").fingerprint
    except ArtifactError:  # none, or a damaged one: this import mends it
        return
    if there != manifest.fingerprint:
        raise ArtifactError(f"{final} holds another drafter ({there}). Import into a run of its own: name=…")
