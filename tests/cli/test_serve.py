"""`coral serve` as a user starts and stops it."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_errors import coral
from tests.serve.helpers import ask

ROOT = Path(__file__).parent.parent.parent


def test_a_port_that_is_taken_is_said_before_the_model_loads(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = coral("serve", "name=mine", "--port", str(port), "--active", "2", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: cannot listen on 127.0.0.1 port {port}: Address already in use. "
        f"Run: coral serve name=mine --port {port + 1} --active 2\n"
    )


def test_an_address_that_is_not_ours(tmp_path: Path) -> None:
    done = coral("serve", "--host", "no.such.host.invalid", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot listen on no.such.host.invalid port 8000: ")


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from coral_cli.commands import serve
    from coral_core.errors import CoralError

    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(serve, "_listen", lambda *_: pytest.fail("it listens all the same"))
    with pytest.raises(
        CoralError, match=r"needs starlette and uvicorn. Run, in coral's folder: pip install '\.\[serve\]'"
    ):
        serve.serve()


def test_it_answers_on_this_machine_alone_and_stops_at_ctrl_c(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "coral_cli.main", "serve", "--port", "0", "decode.max_new_tokens=4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as server:
        assert server.stderr is not None
        drafter, line = server.stderr.readline(), server.stderr.readline()
        try:
            assert drafter == f"drafter and head from {ROOT / 'coral_core' / 'pico'}\n"
            assert line.startswith("pico answers at http://127.0.0.1:"), line
            limit = server.stderr.readline()
            assert limit.startswith("an answer ends after 4 tokens unless a request sets max_tokens; "), limit
            address = line.split()[3].removesuffix("/v1,")
            status, answer = ask(address, "/v1/completions", {"model": "pico", "prompt": "Hello"})
            assert status == 200 and answer["usage"]["completion_tokens"] <= 4
            rebound = {"Content-Type": "application/json", "Host": "evil.example"}
            status, refused = ask(address, "/v1/models", method="GET", headers=rebound)
            assert status == 400 and "Start it with --host 0.0.0.0" in refused["error"]["message"]
        finally:
            server.send_signal(signal.SIGINT)
            log = server.stderr.read()
    assert server.returncode == 0
    assert log.splitlines()[-1] == "stopped" and "Traceback" not in log
