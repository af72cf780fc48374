"""The whole job on pico, as a user types it, in miniature: every stage reads what the one before published."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coral_cli.main import app
from coral_core.embedded import FOLDER as PICO
from coral_core.errors import CoralWarning

SMALL = "name=tiny data.max_samples=10 data.holdout=2 data.max_new_tokens=16 train.steps=2 decode.max_new_tokens=12"
SMALL += " head.router_steps=2"


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """contextlib.chdir, which Python 3.10 lacks."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@dataclasses.dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def coral(folder: Path, *arguments: str, stdin: str = "") -> Done:
    """The command in this process: torch is imported once, not once per command."""
    with working_in(folder):
        result = CliRunner().invoke(app, list(arguments), input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    for command in ("prepare-data", "train", "group-head"):
        done = coral(folder, command, *SMALL.split())
        assert done.returncode == 0, done.stderr
    made = {path.name for path in (folder / "runs" / "tiny").iterdir()}
    assert made == {"recipe.yaml", "log.jsonl", "data", "drafter", "head"}, "looked at before other commands add theirs"
    return folder


def test_every_stage_is_published_whole(finished: Path) -> None:
    run = finished / "runs" / "tiny"
    made = {name: json.loads((run / name / "manifest.json").read_text()) for name in ("data", "drafter", "head")}
    assert made["drafter"]["inputs"]["data"] == made["data"]["fingerprint"]
    assert made["head"]["inputs"]["drafter"] == made["drafter"]["fingerprint"]


@pytest.mark.parametrize(("command", "made"), [("prepare-data", "data"), ("train", "drafter"), ("group-head", "head")])
def test_a_finished_stage_is_not_done_again(finished: Path, command: str, made: str) -> None:
    manifest = finished / "runs" / "tiny" / made / "manifest.json"
    before = manifest.stat().st_mtime_ns
    done = coral(finished, command, *SMALL.split())
    assert done.returncode == 0
    assert "finished already" in done.stderr and manifest.stat().st_mtime_ns == before


def test_eval_compares_every_head_and_each_is_lossless(finished: Path) -> None:
    heads = ("grouped", "full", "static")
    done = coral(finished, "eval", *SMALL.split(), "--json", *(f"--head={kind}" for kind in heads))
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    found = [results, *results["others"]]
    assert [one["method"] for one in found] == [f"tiny {kind}" for kind in heads]
    for one in found:
        numbers = one["benches"]["held-out"]
        assert numbers["lossless"] == {"checked": 2, "equal": 2, "ties": 0, "first_divergence": None}
        assert (numbers["rows_read"] == results["target"]["vocabulary"]) == (one["head"]["kind"] == "full")


def test_eval_of_draws_from_a_file(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coral_core.bench.distribution.SEEDS", 8)
    questions = finished / "sums.jsonl"
    questions.write_text(json.dumps({"question": "1 + 1?", "answer": "It is 2. #### 2"}) + "\n")
    keys = ["decode.max_new_tokens=4", "decode.temperature=1", "seed=5"]
    done = coral(finished, "eval", *SMALL.split(), *keys, "--questions", str(questions))
    assert done.returncode == 0, done.stderr
    assert "right answers" in done.stdout
    assert "fall as the target's distribution wants" in done.stdout
    assert "report.html" in done.stderr
    results = json.loads((finished / "runs" / "tiny" / "eval" / "results.json").read_text())
    for numbers in results["benches"].values():
        assert (numbers["temperature"], numbers["seed"]) == (1, 5)
        assert numbers["answers"]["plain"] == numbers["answers"]["speculative"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--bench mtbench", "unknown bench 'mtbench'; did you mean mt-bench?"),
        ("--questions absent/gsm8k.jsonl", "gsm8k.jsonl is missing; download the test split of https://hugging"),
        ("--drafter tinny", "no drafter in 'tinny' or 'runs/tinny'; did you mean tiny?"),
        ("--head ful", "unknown head 'ful'; did you mean full?"),
    ],
)
def test_eval_answers_a_slip_in_one_line(finished: Path, options: str, message: str) -> None:
    done = coral(finished, "eval", *SMALL.split(), *options.split())
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr.strip().splitlines()[-1]


def test_an_export_with_a_token_map_says_how_to_serve_it_and_comes_back(finished: Path) -> None:
    done = coral(finished, "export", *SMALL.split(), "--to", "sglang", "--map-size", "64")
    assert done.returncode == 0, done.stderr
    (command,) = done.stdout.splitlines()
    assert command.startswith("python -m sglang.launch_server --model-path")
    assert "runs/tiny/export/sglang" in command
    assert "token map: 64 of " in done.stderr and "expected tau " in done.stderr
    back = coral(finished, "import", "runs/tiny/export/sglang", "name=back")
    assert back.returncode == 0, back.stderr
    assert (finished / "runs" / "back" / "drafter" / "model.safetensors").exists()


def test_chat_in_a_pipe_says_the_same_drafted_and_plain(finished: Path) -> None:
    said = [
        coral(finished, "chat", *SMALL.split(), flag, stdin="Book a table for two.\n/clear\nHello.\n/exit\n")
        for flag in ("--speculative", "--no-speculative")
    ]
    assert said[0].returncode == said[1].returncode == 0, said[0].stderr
    assert said[0].stdout == said[1].stdout
    assert len(said[0].stdout.strip().splitlines()) >= 2
    assert "tau" in said[0].stderr and "tau" not in said[1].stderr


def test_a_stage_refuses_what_was_made_otherwise(finished: Path) -> None:
    """The drafter was trained on data of 16 new tokens; a recipe with others must not quietly use them."""
    done = coral(finished, "train", *SMALL.split(), "data.max_new_tokens=17")
    assert done.returncode == 1
    assert "data.max_new_tokens=16; this recipe says data.max_new_tokens=17" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_stages_in_the_wrong_order_say_what_to_run(tmp_path: Path) -> None:
    for command, missing in (("train", "coral prepare-data"), ("group-head", "coral prepare-data")):
        done = coral(tmp_path, command, *SMALL.split())
        assert done.returncode == 1
        assert missing in done.stderr.strip().splitlines()[-1]


def test_the_embedded_drafter_works_with_no_recipe_and_no_set_up(tmp_path: Path) -> None:
    done = coral(tmp_path, "eval", "--limit", "2", "--json")
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)["benches"]["held-out"]
    assert numbers["lossless"]["equal"] == 2
    assert numbers["tokens_per_round_micro"] > 1.3


@pytest.fixture(scope="module")
def fine_tune(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pico with other weights."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("fine-tune") / "pico"
    shutil.copytree(PICO / "target", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 0.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "--json", "--limit", "1"],
        ["chat", "--speculative"],
        ["export", "--to", "hf"],
        ["group-head"],
    ],
)
def test_the_drafter_serves_a_fine_tune_of_its_target(finished: Path, fine_tune: Path, command: list[str]) -> None:
    with pytest.warns(CoralWarning, match="was made for a sibling of this target"):
        done = coral(finished, *command, *SMALL.split(), f"target.model={fine_tune}", stdin="Hello\n")
    assert done.returncode == 0, done.stderr
    if command[0] == "eval":
        assert json.loads(done.stdout)["benches"]["held-out"]["lossless"]["equal"] == 1
