"""Folders on disk that say where they came from, and that are never half there.

    runs/NAME/recipe.yaml  data/  drafter/  head/  eval/      each stage with its manifest.json

A stage works in `runs/NAME/.STAGE.partial` and is published by one rename. What it finished before an interruption
stays in that folder, under the stage's fingerprint, so that the next run goes on from there.
"""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coral_core import __version__
from coral_core.errors import ArtifactError, CoralError

MANIFEST = "manifest.json"


def fingerprint(value: Any) -> str:
    """Sixteen hex digits that name a JSON-able value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    found = {"coral": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_commit() -> str:
    """The commit of the working folder, or '' outside a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a stage's folder says of itself."""

    kind: str
    """data, drafter, head or eval."""
    fingerprint: str
    """Of everything that determined the content: recipe sections and upstream fingerprints."""
    inputs: dict[str, str]
    """Fingerprints of what was read: {"target": …, "data": …}."""
    recipe: dict[str, Any]
    """The recipe's sections that this stage read, resolved."""
    facts: dict[str, Any]
    """Counts, shapes, dtypes, measured numbers."""
    versions: dict[str, str] = dataclasses.field(default_factory=versions)
    git_commit: str = dataclasses.field(default_factory=git_commit)

    def write(self, folder: Path) -> None:
        """Write manifest.json."""
        write_text(folder / MANIFEST, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path, kind: str, command: str) -> "Manifest":
        """Read manifest.json. Raises ArtifactError, naming `command`, when it is absent, damaged or of another kind.

        '' is any kind.
        """
        path = folder / MANIFEST
        try:
            manifest = cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise ArtifactError(f"no {kind} in {folder}. Run: {command}") from error
        except (OSError, ValueError, TypeError) as error:
            raise ArtifactError(f"{path} is damaged: {error}. Remove {folder} and run: {command}") from error
        if kind and manifest.kind != kind:
            raise ArtifactError(f"{folder} holds a {manifest.kind}, not a {kind}. Run: {command}")
        return manifest

    def refuse_stranger(self, folder: Path, remedy: str, **wanted: str) -> None:
        """Raises ArtifactError, which ends in `remedy`, when this was made for another target, data or drafter.

        `wanted` holds fingerprints by these names. The one check of its kind.
        """
        for name, own in wanted.items():
            if (made_for := self.inputs.get(name)) != own:
                raise ArtifactError(
                    f"the {self.kind} in {folder} was made for {name} {made_for}, and this {name} is {own}. {remedy}"
                )


def write_text(path: Path, text: str) -> None:
    """Write a small file whole, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def stage(final: Path, stage_fingerprint: str) -> Iterator[Path]:
    """Yield the folder to work in; on success it is renamed to `final`, on any exception it stays for the next run.

    A partial folder left by an interrupted run is handed back when its fingerprint is the same, and cleared when not.
    An older `final` is replaced only at the end. Raises ArtifactError when the disk is full.
    """
    work = partial(final)
    mark = work / "fingerprint"
    if work.exists() and (not mark.exists() or mark.read_text(encoding="utf-8") != stage_fingerprint):
        shutil.rmtree(work)
    try:
        work.mkdir(parents=True, exist_ok=True)
        write_text(mark, stage_fingerprint)
        yield work
        replace_folder(work, final)
        (final / mark.name).unlink()  # last: killed before this line, the next run still knows whose the folder is
    except Exception as error:
        if _disk_full(error):
            raise ArtifactError(
                f"the disk of {final.parent} is full; what is finished is kept. Free some room and run the same command"
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
            raise CoralError(f"cannot write {final}: {error.strerror}. Choose another folder with --runs") from error
        raise


def partial(final: Path) -> Path:
    """The folder that `stage` works in."""
    return final.with_name(f".{final.name}.partial")


def _disk_full(error: Exception) -> bool:
    """safetensors raises its own error with the system's text in it; NumPy an OSError without a number."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    return "os error 28" in text or "os error 122" in text or ("requested and" in text and "written" in text)


def replace_folder(work: Path, final: Path) -> None:
    """Rename `work` to `final`, moving an older `final` aside first, so that no moment shows half a folder."""
    if final.exists():
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
        os.replace(work, final)
        shutil.rmtree(old)
    else:
        os.replace(work, final)
