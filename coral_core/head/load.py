"""The head on disk, and the head that a recipe asks for.

head.safetensors   token_GR (groups), frequent_V (tokens, the most frequent first), router.*
Axes: G group, R place in a list: a row of its group, V vocabulary.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from coral_core.artifacts import Manifest, check_files
from coral_core.errors import ArtifactError
from coral_core.head.groups import Groups
from coral_core.head.heads import FullHead, GroupedHead, Head, Router, StaticHead
from coral_core.lent import Lent
from coral_core.recipe.schema import HeadSpec
from coral_core.tensors import write_tensors

COMMAND = "coral group-head"
FILE = "head.safetensors"


def save_head(folder: Path, groups: Groups, router: Router, frequent_V: torch.Tensor) -> None:
    """Write head.safetensors."""
    tensors = {f"router.{name}": value.detach().cpu().contiguous() for name, value in router.state_dict().items()}
    tensors |= {"token_GR": groups.token_GR.contiguous(), "frequent_V": frequent_V.cpu().contiguous()}
    write_tensors(tensors, folder / FILE, {"format": "pt"})


def load_head(
    folder: Path,
    spec: HeadSpec,
    lent: Lent,
    *,
    target_fingerprint: str,
    drafter_fingerprint: str,
    command: str = COMMAND,
) -> Head:
    """The head of a recipe's kind; the full one needs nothing on disk.

    Raises ArtifactError when the folder is missing, damaged, made for another target or drafter, or has
    other groups than the recipe says, with the `command` that makes it anew. `active` is free: the router ranks all
    groups.
    """
    if spec.kind == "full":
        return FullHead(lent)
    manifest = Manifest.read(folder, "head", command)
    manifest.refuse_stranger(folder, f"Run: {command}", target=target_fingerprint, drafter=drafter_fingerprint)
    check_files(folder, [FILE], command)
    tensors = _read(folder / FILE, command)
    vocabulary, hidden = lent.head_VD.shape
    total = spec.groups or int(manifest.facts["groups"])
    active = spec.active or int(manifest.facts["active"])
    if spec.kind == "static":
        return StaticHead(lent, tensors["frequent_V"][: max(1, vocabulary * active // total)])
    if (made := manifest.facts["groups"]) != total:
        raise ArtifactError(
            f"the head in {folder} has head.groups={made}; this recipe says {total}. "
            f"Run: {command}, or give head.groups its old value"
        )
    groups = Groups(tensors["token_GR"])
    if not groups.is_whole(vocabulary):
        raise ArtifactError(f"{folder / FILE} does not hold each of {vocabulary} tokens once. Run: {command}")
    return GroupedHead(lent, groups, _router(tensors, folder / FILE, (groups.count, hidden), command), active)


def _read(path: Path, command: str) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read the head {path}: {error}. Run: {command}") from error
    for name in ("token_GR", "frequent_V", "router.w2.weight"):
        if name not in tensors:
            raise ArtifactError(f"{path} lacks tensor '{name}'. Run: {command}")
    return tensors


def _router(tensors: dict[str, torch.Tensor], path: Path, shape: tuple[int, int], command: str) -> Router:
    """The router, which must rank these groups from this width: `shape` is (groups, hidden)."""
    found = tuple(tensors["router.w2.weight"].shape)
    if found != shape:
        raise ArtifactError(
            f"{path} holds a router from {found[-1]} to {found[0]} groups; {shape[0]} groups of a head {shape[1]} wide "
            f"need another. Run: {command}"
        )
    router = Router(shape[1], shape[0], inner="router.w1.weight" in tensors)
    own = {name.removeprefix("router."): value for name, value in tensors.items() if name.startswith("router.")}
    try:
        router.load_state_dict(own)
    except RuntimeError as error:
        raise ArtifactError(
            f"{path} holds no whole router: {str(error).splitlines()[-1].strip()} Run: {command}"
        ) from error
    return router
