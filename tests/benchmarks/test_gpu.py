"""The GPU's one command: every part is run, and what fails is written down."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import decode_gpu, gpu
from coral_core.decoding import recorded as recording

ROOT = Path(__file__).parent.parent.parent


def test_a_part_that_fails_is_written_down_and_says_what_it_had_done(tmp_path: Path) -> None:
    log = tmp_path / "gpu.log"
    fine = [sys.executable, "-c", "print('{\"what\": 1}'); print('no JSON')"]
    broken = [sys.executable, "-c", "raise ValueError('a bug')"]
    found = gpu.run(gpu.Part("some", [fine, broken, fine]), 60, log)
    assert (found["ok"], found["error"], found["rows"]) == (False, "ValueError: a bug", [{"what": 1}])
    late = gpu.run(gpu.Part("late", [[sys.executable, "-c", "import time; time.sleep(60)"]]), 1, log)
    assert late["error"] == "stopped after 1 s"
    assert gpu.run(gpu.Part("none", [["no-such-program"]]), 5, log)["ok"] is False
    said = log.read_text()
    assert "a bug" in said and "==== late" in said and said.count("==== exit code") == 4


def test_every_part_has_a_limit_and_all_of_them_fit_into_ten_minutes_of_work() -> None:
    options = gpu.argparse.Namespace(shape="tiny", repeats=1, model="pico", out=Path("out"))
    assert {part.name for part in gpu.parts(options)} == set(gpu.LIMIT_S)
    assert json.loads(next(p for p in gpu.parts(options) if p.name == "training").commands[0][-1])["length"] == 64


def test_the_command_runs_where_there_is_no_gpu(tmp_path: Path) -> None:
    """The eager part measures; the recorded one says that it needs a GPU, and the next part runs all the same."""
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path), "--shape", "tiny", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--only", "recorded", "training"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    value = json.loads((tmp_path / "gpu.json").read_text())
    recorded, training = value["parts"]
    if not torch.cuda.is_available():
        assert recorded["error"] == "recorded: CUDA graphs need a GPU, and this machine has none"
    assert training["ok"] and training["rows"][0]["tokens_per_s"] > 0
    assert "training: ok" in done.stderr


def test_what_a_library_compiles_stands_in_for_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its compiler: that results are copied to one place, for a draft and for a verification."""
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    monkeypatch.setattr(recording, "record", decode_gpu.compiled)
    rows = list(decode_gpu.measure("tiny", torch.device("cpu"), torch.float32, 1, True))
    assert {"plain step", "verify", "round"} <= {row["what"] for row in rows}
