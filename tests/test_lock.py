"""Who holds a run's folder, and what a lock is worth when its holder is gone."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from coral_core import lock
from coral_core.errors import ArtifactError
from coral_core.lock import locked, published
from tests.together import ROOT

HOLD = """
import signal, sys, time
from pathlib import Path
from coral_core.lock import locked
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
with locked(Path(sys.argv[1]), "train my.yaml"):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_held_folder_names_the_process_that_holds_it(tmp_path, holder):
    told = rf"{tmp_path} is in use: 'train my.yaml', process {holder.pid} on {socket.gethostname()}, since 20\d\d-"
    with pytest.raises(ArtifactError, match=rf"{told}.* Wait for it, or stop it with: kill {holder.pid}$"):
        locked(tmp_path, "eval").__enter__()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == holder.pid, "a refused command changes nothing"


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_lock_ends_with_its_holder(tmp_path, holder, ended_by):
    holder.send_signal(ended_by)
    holder.wait()
    with locked(tmp_path, "eval"):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_lock_whose_words_were_not_written_still_holds(tmp_path, holder):
    (tmp_path / ".lock").write_text("")
    with pytest.raises(ArtifactError, match="is in use by another process. Wait for it, or"):
        locked(tmp_path, "eval").__enter__()


@pytest.mark.parametrize(
    ("holder", "told"),
    [
        ({"pid": os.getpid(), "host": socket.gethostname()}, rf"process {os.getpid()} on .* kill {os.getpid()}$"),
        ({"pid": 1, "host": "elsewhere"}, r"process 1 on elsewhere.* if it is gone, remove .*\.lock$"),
        ({"pid": 2**22 + 1, "host": socket.gethostname()}, ""),
        ({}, ""),
    ],
)
def test_where_a_file_system_has_no_locks_the_words_decide(tmp_path, monkeypatch, holder, told):
    class NoLocks:
        LOCK_EX = LOCK_NB = LOCK_SH = 0

        @staticmethod
        def flock(*_):
            raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock, "fcntl", NoLocks)
    words = {**holder, "command": "train", "since": "2026-01-31 12:00:00"} if holder else {}
    (tmp_path / ".lock").write_text(json.dumps(words))
    if told:
        with pytest.raises(ArtifactError, match=told):
            locked(tmp_path, "eval").__enter__()
    else:
        with locked(tmp_path, "eval"), published(tmp_path):
            pass


def test_a_reader_and_a_renaming_wait_for_each_other(tmp_path):
    seen = []

    def rename():
        with published(tmp_path, exclusive=True):
            seen.append("renamed")

    with published(tmp_path), published(tmp_path):
        other = threading.Thread(target=rename)
        other.start()
        other.join(0.3)
        seen.append("read")
    other.join()
    assert seen == ["read", "renamed"]


def test_reading_what_is_not_there_waits_for_nothing(tmp_path):
    with published(tmp_path / "none"):
        pass
