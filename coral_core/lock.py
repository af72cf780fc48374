"""One command at a time in a run's folder, and a word about which one it is.

    runs/NAME/.lock     {"pid": 4711, "host": "node3", "command": "coral train …", "since": "2026-01-31 12:00:00"}

The system's own lock on that file decides (flock): it is free as soon as its holder is dead, however it died. Where a
file system has no such locks (some network mounts), the file's content decides: a process of this host that is gone
holds nothing, one of another host is believed. Where a mount locks within one host only (NFS with `nolock`), two hosts
do not see each other.
"""

import contextlib
import datetime
import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from coral_core.errors import ArtifactError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"


@contextlib.contextmanager
def locked(folder: Path, command: str) -> Iterator[None]:
    """Hold the folder, for a command that writes to it.

    Raises ArtifactError, naming the process that holds it already.
    """
    path = folder / FILE
    with _taken(path) as file:
        file.truncate(0)
        since = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": since}
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its words
            file.write(json.dumps(holder) + "\n")
            file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(PermissionError):  # Windows: not while it is open
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def published(folder: Path, *, exclusive: bool = False) -> Iterator[None]:
    """Wait until nobody renames the stages of this folder, and keep it so: for reading several files of one of them.

    The lock is on the folder itself, so that a reader needs no right to write. Where there is none, nothing waits.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # no such folder, or one that cannot be opened (Windows): nothing to wait for
        yield
        return
    try:
        with contextlib.suppress(OSError):
            if fcntl:
                fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _taken(path: Path) -> Iterator[IO[str]]:
    """The lock file, open and held."""
    while True:
        with path.open("a+", encoding="utf-8") as file:
            if not _free(file):
                raise ArtifactError(_in_use(path, _read(file)))
            # A holder that ended meanwhile has removed the file that was opened here: the next has made another.
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                yield file
                return


def _free(file: IO[str]) -> bool:
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
    holder = _read(file)
    return not holder or (holder["host"] == socket.gethostname() and not _alive(holder["pid"]))


def _alive(pid: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(pid))


def _read(file: IO[str]) -> dict[str, Any]:
    """What the holder wrote; nothing where it has not come to it."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return {"pid": int(holder["pid"]), **{key: str(holder[key]) for key in ("host", "command", "since")}}
    except (ValueError, TypeError, KeyError):
        return {}


def _in_use(path: Path, holder: dict[str, Any]) -> str:
    if not holder:
        return f"{path.parent} is in use by another process. Wait for it, or work on a run of another name (name=…)"
    here = holder["host"] == socket.gethostname()
    stop = f"stop it with: kill {holder['pid']}" if here else f"stop it there; if it is gone, remove {path}"
    return (
        f"{path.parent} is in use: '{holder['command']}', process {holder['pid']} on {holder['host']}, "
        f"since {holder['since']}. Wait for it, or {stop}"
    )
