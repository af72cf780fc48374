"""What a folder that coral made is, and whether it is whole. Reads, and changes nothing."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from coral_core.artifacts import MANIFEST, Manifest
from coral_core.errors import ArtifactError
from coral_core.progress import Progress, silent
from coral_core.store.shard import Shard
from coral_core.store.store import Store

STAGES = ("data", "drafter", "head", "eval", "export")
RECIPE = "recipe.yaml"


def inspect(path: Path, progress: Progress = silent) -> dict[str, Any]:
    """A JSON-able description of a store, drafter, head, or a whole run; `damaged` names the files that are not whole.

    A store's bytes are compared with their checksums, other weights are opened. Raises ArtifactError for anything else.
    """
    if (path / MANIFEST).exists():
        manifest = Manifest.read(path, "", "the command that made it")
        found = _store(path, manifest, progress) if manifest.kind == "data" else _weights(path)
        return {"path": str(path), "kind": manifest.kind} | _provenance(manifest) | found
    if (path / RECIPE).exists():
        return _run(path, progress)
    state = "holds nothing that coral made" if path.is_dir() else "is no folder"
    raise ArtifactError(f"{path} {state}. Give a run (runs/NAME), or the data, drafter or head in one")


def _run(path: Path, progress: Progress) -> dict[str, Any]:
    stages = {name: inspect(path / name, progress) for name in STAGES if (path / name / MANIFEST).exists()}
    unfinished = [name for name in STAGES if (path / f".{name}.partial").exists()]
    damaged = [f"{name}/{file}" for name, stage in stages.items() for file in stage["damaged"]]
    return {"path": str(path), "kind": "run", "stages": stages, "unfinished": unfinished, "damaged": damaged}


def _provenance(manifest: Manifest) -> dict[str, Any]:
    made = {key: value for key, value in dataclasses.asdict(manifest).items() if key not in ("kind", "facts")}
    files = ("shards", "files")  # one entry per file: too long to read, and said in sum
    return made | {"facts": {name: value for name, value in manifest.facts.items() if name not in files}}


def _store(path: Path, manifest: Manifest, progress: Progress) -> dict[str, Any]:
    store = Store(path, manifest, "coral prepare-data")
    damaged = store.damaged(progress)
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


def _weights(path: Path) -> dict[str, Any]:
    weights: dict[str, Any] = {}
    damaged = []
    for file in sorted(path.rglob("*.safetensors")):
        name = str(file.relative_to(path))
        try:
            weights[name] = _tensors(file)
        except (SafetensorError, OSError):
            damaged.append(name)
    return {"weights": weights, "damaged": damaged}


def _tensors(path: Path) -> dict[str, Any]:
    """From the header alone."""
    with safe_open(path, framework="pt") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
    shapes = [part.get_shape() for part in slices]
    parameters = sum(map(math.prod, shapes))
    dtypes = sorted({part.get_dtype() for part in slices})
    return {"tensors": len(shapes), "parameters": parameters, "dtypes": dtypes, "bytes": path.stat().st_size}
