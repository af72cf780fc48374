"""Folders on disk that say where they came from, and that are never half there.

    runs/NAME/recipe.yaml  data/  drafter/  head/  eval/      each stage with its manifest.json

A stage works in `runs/NAME/.STAGE.partial` and is published by one rename. What it finished before an interruption
stays in that folder, under the stage's fingerprint, so that the next run goes on from there. A manifest holds the
checksum of every file of its stage, and its own.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from coral_core import __version__, embedded
from coral_core.errors import ArtifactError, CoralError
from coral_core.lock import published
from coral_core.progress import Progress, silent

MANIFEST = "manifest.json"
COMPATIBILITY = "target"
"""The fact that says which targets an artifact serves: those of one tokenizer and width (target/compatibility.py)."""
OWN_SUM = "sha256"
"""The key of a manifest that holds the checksum of all others."""
MARK = "fingerprint"
"""The file in a stage's working folder that says whose it is."""


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
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of each file, by its path in the folder. Empty in manifests of earlier versions, and in those of data,
    whose facts hold them."""

    def write(self, folder: Path) -> None:
        """Write manifest.json, with a checksum of its own."""
        values = dataclasses.asdict(self)
        write_text(folder / MANIFEST, json.dumps({**values, OWN_SUM: _sum(values)}, indent=2) + "\n")

    def sealed(self, folder: Path, *names: str) -> "Manifest":
        """The manifest with the checksums of these files; of all in the folder, where none is named."""
        names = names or tuple(sorted(_files(folder)))
        return dataclasses.replace(self, files={name: file_sha256(folder / name) for name in names})

    def damaged(self, folder: Path, *names: str, progress: Progress = silent) -> list[str]:
        """Which of its files, or of those named, are missing or have other bytes than were written; reads them all."""
        sums, found = self.sums(), []
        for number, name in enumerate(names or sums, start=1):
            if name in sums and not _is(folder / name, sums[name]):
                found.append(name)
            progress("checking files", number, len(names or sums), {})
        return found

    def sums(self) -> dict[str, str]:
        """The checksum of each file."""
        if self.kind != "data":
            return self.files
        return {shard["file"]: shard["sha256"] for shard in self.facts["shards"]} | self.facts["files"]

    @classmethod
    def read(cls, folder: Path, kind: str, command: str) -> "Manifest":
        """Read manifest.json. Raises ArtifactError, naming `command`, when it is absent, damaged or of another kind.

        '' is any kind.
        """
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            own_sum = values.pop(OWN_SUM, None)
            manifest = cls(**values)
        except FileNotFoundError as error:
            what = f"no {kind or MANIFEST} in {folder}" + (
                f": it has no {MANIFEST}" if kind and folder.is_dir() else ""
            )
            raise ArtifactError(f"{what}. {remedy(folder, command)}") from error
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} is damaged: {error}. {remedy(folder, command)}") from error
        if own_sum is not None and own_sum != _sum(values):
            raise ArtifactError(f"{path} is damaged: its checksum is another. {remedy(folder, command)}")
        if kind and manifest.kind != kind:
            raise ArtifactError(f"{folder} holds a {manifest.kind}, not a {kind}. {remedy(folder, command)}")
        return manifest

    def refuse_stranger(self, folder: Path, remedy: str, **wanted: str) -> None:
        """Raises ArtifactError, which ends in `remedy`, when this was made for another target, data or drafter.

        `wanted` holds fingerprints by these names.
        """
        for name, own in wanted.items():
            if (made_for := self.inputs.get(name)) != own:
                raise ArtifactError(
                    f"the {self.kind} in {folder} was made for {name} {made_for}, and this {name} is {own}. {remedy}"
                )


def remedy(folder: Path, command: str) -> str:
    """What makes a damaged or missing folder anew, as the end of a message."""
    if embedded.holds(folder):
        again = "git checkout -- coral_core && pip install --force-reinstall --no-deps ."
        return f"Install coral anew, in its folder: {again}"
    return f"Run: {command}"


def check_files(folder: Path, names: Sequence[str], command: str) -> None:
    """Compare files with the checksums in the manifest beside them, where there are any.

    Raises ArtifactError, naming the first that differs and the `command`; likewise for a damaged manifest.
    """
    if not (folder / MANIFEST).exists():
        return
    if damaged := Manifest.read(folder, "", command).damaged(folder, *names):
        path = folder / damaged[0]
        state = "is damaged: its checksum is not the manifest's" if path.exists() else "is missing"
        raise ArtifactError(f"{path} {state}. {remedy(folder, command)}")


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _sum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _is(path: Path, sha256: str) -> bool:
    try:
        return file_sha256(path) == sha256
    except OSError:
        return False


def _files(folder: Path) -> list[str]:
    """Every file below, by its path from there; what only an unfinished stage needs is none of them."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [path.as_posix() for path in paths if str(path) not in (MANIFEST, MARK) and path.name[0] != "."]


@dataclasses.dataclass(frozen=True)
class Standing:
    """What stands in a stage's folder before the stage begins."""

    manifest: Manifest | None
    """What stands is whole, and is what the stage would make: nothing is to be done."""
    why: str = ""
    """Otherwise how it differs, or which file is damaged; '' where nothing stands."""


def standing(final: Path, kind: str, changes: Callable[[Manifest], str]) -> Standing:
    """Compare what stands in `final` with what a stage would make; `changes` says how a manifest differs from that.

    Reads every file of it, and changes nothing.
    """
    if not final.exists():
        return Standing(None)
    try:
        manifest = Manifest.read(final, kind, "")
    except ArtifactError:
        return Standing(None, f"its {MANIFEST} is {'damaged' if (final / MANIFEST).exists() else 'missing'}")
    if why := changes(manifest):
        return Standing(None, why)
    if damaged := manifest.damaged(final):
        return Standing(None, f"{', '.join(damaged)} {'are' if damaged[1:] else 'is'} damaged")
    return Standing(manifest)


def first_difference(was: Any, now: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """(dotted key, old, new) of the first value in which two nested mappings differ; `absent` where one has none."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return None if was == now else (path, was, now)
    for key in [*was, *(key for key in now if key not in was)]:
        where = f"{path}.{key}" if path else str(key)
        if difference := first_difference(was.get(key, "absent"), now.get(key, "absent"), where):
            return difference
    return None


def write_text(path: Path, text: str) -> None:
    """Write a small file whole, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def stage(
    final: Path, stage_fingerprint: str, *, leftovers: Sequence[str] = (), work: Path | None = None
) -> Iterator[Path]:
    """Yield the folder to work in; on success it is renamed to `final`, on any exception what is in it stays for the
    next run.

    A partial folder left by an interrupted run is handed back when its fingerprint is the same, and cleared when not.
    An older `final` is replaced only at the end; `leftovers`, folders that only an unfinished stage needs, are removed
    after that, so that a kill at any moment costs nothing. `work` is the folder, if it is not the usual one. Raises
    ArtifactError when the disk is full.
    """
    work = work or partial(final)
    mark = work / MARK
    if work.exists() and (not mark.exists() or mark.read_text(encoding="utf-8") != stage_fingerprint):
        shutil.rmtree(work)
    try:
        if _aside(final).exists() and not final.exists():  # killed between two renames: the older folder serves again
            os.replace(_aside(final), final)
        work.mkdir(parents=True, exist_ok=True)
        write_text(mark, stage_fingerprint)
        yield work
        replace_folder(work, final)
        for name in leftovers:
            shutil.rmtree(final / name, ignore_errors=True)
        (final / MARK).unlink()  # last: killed before this line, the next run still knows whose the folder is
    except Exception as error:
        if work.is_dir() and {path.name for path in work.iterdir()} <= {MARK}:
            shutil.rmtree(work, ignore_errors=True)
        tell_full(error, final.parent)
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
            raise CoralError(f"cannot write {final}: {error.strerror}. Choose another folder with --runs") from error
        raise


def refuse_unfinished(final: Path, stage_fingerprint: str, command: str) -> None:
    """Raises ArtifactError when `stage` would clear what an interrupted run of another recipe has finished."""
    work = partial(final)
    made = {path.name for path in work.iterdir()} - {MARK} if work.is_dir() else set()
    if made and not (work / MARK).exists():
        return
    if made and (work / MARK).read_text(encoding="utf-8") != stage_fingerprint:
        raise ArtifactError(
            f"{work} holds unfinished work of another recipe, or from other inputs. Give the keys their old values to "
            f"go on with it, or drop it. Run: {command} --restart"
        )


def drop_unfinished(final: Path) -> None:
    """Remove what an interrupted run has finished."""
    shutil.rmtree(partial(final), ignore_errors=True)


def partial(final: Path) -> Path:
    """The folder that `stage` works in."""
    return final.with_name(f".{final.name}.partial")


def tell_full(error: Exception, folder: Path) -> None:
    """Raises ArtifactError, in one line, when an error says that the disk of a folder is full."""
    if _disk_full(error):
        raise ArtifactError(
            f"the disk of {folder} is full; what is finished is kept. Free some room and run the same command"
        ) from error


def _disk_full(error: Exception) -> bool:
    """safetensors and shutil's copies of folders raise their own errors with the system's text in it; NumPy an OSError
    without a number."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error).lower()
    if any(f"{told} {code}" in text for told in ("os error", "[errno") for code in (errno.ENOSPC, errno.EDQUOT)):
        return True
    return "requested and" in text and "written" in text


def replace_folder(work: Path, final: Path) -> None:
    """Rename `work` to `final`, moving an older `final` aside first, so that no moment shows half a folder."""
    old = _aside(final)
    if final.exists():
        _remove(old)
        with published(final.parent, exclusive=True):
            os.replace(final, old)
            os.replace(work, final)
    else:
        os.replace(work, final)
    _remove(old)


def _aside(final: Path) -> Path:
    """Where an older folder is for the moment in which the new one takes its name."""
    return final.with_name(f".{final.name}.old")


def _remove(folder: Path) -> None:
    """Remove a folder, or the link to one: another run may share what it leads to."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
