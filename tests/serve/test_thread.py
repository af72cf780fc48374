"""The thread that decodes has loaded the model: a second one that computes makes every operation wait."""

import threading
from pathlib import Path
from typing import Any

import pytest

from coral_cli.commands import serve
from coral_core.errors import CoralError
from coral_core.serve.worker import OneThread


def test_the_service_is_loaded_in_the_thread_that_decodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: dict[str, int] = {}

    def load(run: Any) -> None:
        found["loads"] = threading.get_ident()

    def make_app(service: Any, thread: OneThread, active: int, waiting: int) -> None:
        found["decodes"] = thread.submit(threading.get_ident).result()
        raise CoralError("enough is seen")

    monkeypatch.setattr(serve, "_service", load)
    monkeypatch.setattr("coral_core.serve.app.make_app", make_app)
    with pytest.raises(CoralError, match="enough is seen"):
        serve.serve(None, "127.0.0.1", 0, 1, 1, tmp_path)
    assert found["loads"] == found["decodes"] != threading.get_ident()


def test_what_fails_in_the_thread_is_raised_for_who_asked() -> None:
    def fail() -> None:
        raise CoralError("no such model")

    thread = OneThread()
    with pytest.raises(CoralError, match="no such model"):
        thread.submit(fail).result()
    assert thread.submit(lambda: 3).result() == 3
