"""What a folder that coral made is, and whether it is whole. Reads, and changes nothing."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from coral_core.artifacts import MANIFEST, Manifest, partial
from coral_core.errors import ArtifactError
from coral_core.progress import Progress, silent
from coral_core.store.shard import Shard

STAGES = ("data", "drafter", "head", "eval", "export")
EXPORT = "export"
"""Not a stage itself: it holds one folder for each format."""
RECIPE = "recipe.yaml"


def inspect(path: Path, progress: Progress = silent) -> dict[str, Any]:
    """A JSON-able description of a store, drafter, head, or a whole run; `damaged` names the files that are not whole.

    The bytes of every file are compared with its checksum; weights of earlier versions, which have none, are opened.
    Raises ArtifactError for anything else.
    """
    if (path / MANIFEST).exists():
        manifest = Manifest.read(path, "", "the command that made it")
        found = _store(path, manifest, progress) if manifest.kind == "data" else _weights(path, manifest)
        return {"path": str(path), "kind": manifest.kind} | _provenance(manifest) | found
    if found := _run(path, progress):
        return found
    if (path / RECIPE).exists():
        raise ArtifactError(f"{path} holds a recipe, and nothing that was made of it yet. Run: coral prepare-data")
    state = "holds nothing that coral made" if path.is_dir() else "is no folder"
    raise ArtifactError(f"{path} {state}. Give a run (runs/NAME), or the data, drafter or head in one")


def _run(path: Path, progress: Progress) -> dict[str, Any]:
    """The stages that stand in a folder, and those that were begun; {} where there is neither."""
    known = (path / RECIPE).exists() or any((path / name / MANIFEST).exists() for name in STAGES)
    folders = [name for name in STAGES if known and (path / name).is_dir()]
    exported = sorted((path / EXPORT).iterdir()) if EXPORT in folders else []
    formats = [f"{EXPORT}/{made.name}" for made in exported if made.is_dir() and not made.name.startswith(".")]
    stages, damaged = {}, []
    for name in [*(name for name in folders if name != EXPORT), *formats]:
        try:
            stages[name] = inspect(path / name, progress)
            damaged += [f"{name}/{file}" for file in stages[name]["damaged"]]
        except ArtifactError:
            damaged.append(f"{name}/{MANIFEST}")
    unfinished = [name for name in STAGES if partial(path / name).exists() or any(path.glob(f".{name}-*.partial"))]
    if not (stages or damaged or unfinished):
        return {}
    return {"path": str(path), "kind": "run", "stages": stages, "unfinished": unfinished, "damaged": damaged}


def _provenance(manifest: Manifest) -> dict[str, Any]:
    made = {key: value for key, value in dataclasses.asdict(manifest).items() if key not in ("kind", "facts")}
    files = ("shards", "files")  # one entry per file: too long to read, and said in sum
    return made | {"facts": {name: value for name, value in manifest.facts.items() if name not in files}}


def _store(path: Path, manifest: Manifest, progress: Progress) -> dict[str, Any]:
    damaged = manifest.damaged(path, progress=progress)
    shards = [facts["file"] for facts in manifest.facts["shards"]]
    whole = [Shard(path / name, "coral prepare-data") for name in shards if name not in damaged]
    facts = manifest.facts
    return {
        "shards": len(shards),
        "answer_share": facts["answer_tokens"] / max(1, facts["tokens"]),
        "lengths": histogram(itertools.chain.from_iterable(shard.lengths() for shard in whole)),
        "damaged": damaged,
    }


def histogram(lengths: Iterable[int]) -> list[dict[str, int]]:
    """Samples by tokens: {"from": 32, "to": 63, "samples": 7}, each step twice as wide as the one before."""
    counts = Counter(length.bit_length() for length in lengths)
    steps = range(min(counts), max(counts) + 1) if counts else range(0)
    return [{"from": 1 << bits - 1, "to": (1 << bits) - 1, "samples": counts[bits]} for bits in steps]


def _weights(path: Path, manifest: Manifest) -> dict[str, Any]:
    """What the folder's weights are, and which files are damaged; a published drafter has a head, with its manifest."""
    weights: dict[str, Any] = {}
    damaged = manifest.damaged(path)
    for inner in sorted(path.glob(f"*/{MANIFEST}")):
        try:
            found = Manifest.read(inner.parent, "", "").damaged(inner.parent)
            damaged += [f"{inner.parent.name}/{name}" for name in found]
        except ArtifactError:
            damaged.append(str(inner.relative_to(path)))
    for file in sorted(path.rglob("*.safetensors")):
        name = str(file.relative_to(path))
        try:
            weights[name] = _tensors(file)
        except (SafetensorError, OSError):
            damaged.append(name)
    return {"weights": weights, "damaged": sorted(set(damaged))}


def _tensors(path: Path) -> dict[str, Any]:
    """From the header alone."""
    with safe_open(path, framework="pt") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
    shapes = [part.get_shape() for part in slices]
    parameters = sum(map(math.prod, shapes))
    dtypes = sorted({part.get_dtype() for part in slices})
    return {"tensors": len(shapes), "parameters": parameters, "dtypes": dtypes, "bytes": path.stat().st_size}
