"""Damaged data, and what an interrupted command left: each command names the file, and what it says to run mends it."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner, Result

from coral_cli import hints
from coral_cli.main import app
from coral_core.bench import evaluate
from coral_core.data import plan
from coral_core.data import stage as data_stage
from coral_core.training import loop
from tests.cli.test_damage import DAMAGES
from tests.data.helpers import contents, make_target

KEYS = [
    *("name=tiny", "data.max_samples=16", "data.holdout=3", "data.max_length=120", "data.max_new_tokens=12"),
    *("data.batch_size=4", "data.regenerate=sample"),
    *("train.steps=6", "train.checkpoint_every=2", "train.eval_every=3", "train.batch_size=4"),
    *("head.groups=4", "head.active=2", "head.router_steps=1"),
    *("decode.max_new_tokens=8", "decode.tree=fixed"),
]
COMMANDS = ("prepare-data", "train", "group-head", "eval")
FILES = ("manifest.json", "shard-00000.safetensors", "lent.safetensors", "holdout.json", "prompts.jsonl", "plan.json")
READERS = {
    "train": ["train", "train.learning_rate=0.002"],
    "group-head": ["group-head", "head.router_steps=2"],
    "eval": ["eval", "--limit", "1"],
    "inspect": ["inspect"],
}
READ_BY = {
    "prompts.jsonl": ("inspect",),
    "plan.json": ("inspect",),
    "holdout.json": ("train", "eval", "inspect"),
    "manifest.json": ("train", "group-head", "inspect"),
}
MARKS = {
    "missing": pytest.mark.slow,
    "truncated": pytest.mark.slow,
    "empty": pytest.mark.slow,
    "another JSON": pytest.mark.slow,
}
DAMAGED = [pytest.param(act, marks=MARKS.get(name, ()), id=name) for name, act in DAMAGES.items()]


def coral(words: list[str], folder: Path, stdin: str = "") -> Result:
    """A command with the run's keys; `inspect` takes the run alone."""
    keys = [str(folder / "runs" / "tiny")] if words == ["inspect"] else [*KEYS, f"target.model={folder / 'target'}"]
    hints._given.clear()  # as in a fresh process: `inspect` takes no recipe
    runs = [] if words == ["inspect"] else ["--runs", str(folder / "runs")]
    return typed([words[0], *keys, *words[1:], *runs], stdin)


def typed(words: list[str], stdin: str = "") -> Result:
    result = CliRunner().invoke(app, words, input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def named(result: Result) -> list[list[str]]:
    """The commands that an error names, as a shell reads them."""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    texts = re.findall(r"coral ((?:prepare-data|train|group-head|eval)[^,;]*)", line.split("Run: ")[1])
    return [shlex.split(text) for text in texts]


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    """Several of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHARD_TOKENS", 200)
        yield


@pytest.fixture(scope="module")
def made(small_shards: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, and a run with every stage."""
    folder = tmp_path_factory.mktemp("ein Lauf")
    target = make_target()
    target.model.save_pretrained(folder / "target")
    target.tokenizer.save_pretrained(folder / "target")
    for command in COMMANDS:
        done = coral([command], folder)
        assert done.exit_code == 0, done.stderr
    return folder


@pytest.fixture
def run(made: Path) -> Iterator[Path]:
    """The run, and afterwards the same again."""
    kept = made / "kept"
    shutil.copytree(made / "runs", kept)
    yield made / "runs" / "tiny"
    shutil.rmtree(made / "runs")
    kept.rename(made / "runs")


CASES = [(file, reader) for file in FILES for reader in READ_BY.get(file, ("train", "group-head", "inspect"))]


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize(("file", "reader"), CASES)
def test_damaged_data_are_named_and_made_again(
    made: Path, run: Path, file: str, reader: str, damage: Callable[[Path], object]
) -> None:
    whole = contents(run / "data")
    damage(run / "data" / file)
    done = coral(READERS[reader], made)
    assert done.exit_code == 1
    assert file in done.stderr, done.stderr
    for words in named(done)[:1]:
        assert words[0] == "prepare-data"
        mended = typed(words)
        assert mended.exit_code == 0, mended.stderr
        assert file in mended.stderr, mended.stderr
    assert coral(READERS[reader], made).exit_code == 0
    again = contents(run / "data")
    shard = "shard-00000.safetensors"
    for name in set(FILES) - {"manifest.json", shard}:
        assert again[name] == whole[name], name
    was, now = safetensors.torch.load(whole[shard]), safetensors.torch.load(again[shard])
    assert was.keys() == now.keys()
    for name, tensor in was.items():  # features of other batches may differ in their last bit
        torch.testing.assert_close(now[name], tensor, rtol=2**-7 if tensor.is_floating_point() else 0, atol=1e-6)
    assert coral(["inspect"], made).exit_code == 0


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("file", ["results.json", "held-out.jsonl", "manifest.json", "report.html"])
def test_a_damaged_evaluation_is_named_and_made_again(
    made: Path, run: Path, file: str, damage: Callable[[Path], object]
) -> None:
    damage(run / "eval" / file)
    done = coral(["inspect"], made)
    assert (done.exit_code, f"eval/{file}" in done.stderr) == (1, True)
    (words,) = named(done)
    assert words[0] == "eval"
    assert typed(words).exit_code == 0
    assert coral(["inspect"], made).exit_code == 0


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize(
    "reader", [["chat"], ["eval", "--limit", "1"], ["export", "--to", "hf"]], ids=lambda words: words[0]
)
@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("drafter/model.safetensors", "train"),
        ("drafter/manifest.json", "train"),
        ("head/head.safetensors", "group-head"),
        ("head/manifest.json", "group-head"),
    ],
)
def test_what_decodes_names_a_damaged_drafter_or_head(
    made: Path, run: Path, file: str, remedy: str, reader: list[str], damage: Callable[[Path], object]
) -> None:
    damage(run / file)
    done = coral(reader, made, "Hi.\n")
    if reader[0] == "export" and file == "head/manifest.json" and not (run / file).exists():
        assert done.exit_code == 0, "a drafter is exported without a head, where there is none"
        return
    assert (done.exit_code, Path(file).name in done.stderr) == (1, True), done.stderr
    words = named(done)[0]
    assert words[0] == remedy
    mended = typed(words)
    assert mended.exit_code == 0, mended.stderr
    assert coral(reader, made, "Hi.\n").exit_code == 0


def test_chat_without_a_drafter_says_how_to_chat_plainly(made: Path, run: Path) -> None:
    shutil.rmtree(run / "drafter")
    done = coral(["chat"], made, "Hi.\n")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: no drafter in {run / 'drafter'}. Run: coral train ")
    assert done.stderr.endswith(", or chat without a drafter: --no-speculative\n")
    assert coral(["chat", "--no-speculative"], made, "Hi.\n").exit_code == 0


def interrupt(monkeypatch: pytest.MonkeyPatch, module: object, name: str, call: int) -> None:
    """Ctrl-C after the so-and-so-manieth call of a function."""
    left, act = [call], getattr(module, name)

    def once(*given: object, **keys: object) -> object:
        found = act(*given, **keys)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(module, name, once)


UNFINISHED = {
    "data": ["plan.json", "prompts.jsonl", "shard-00000.safetensors", "shard-00000.safetensors.json"],
    "words": ["self-00000.json"],
    "drafter": [
        "checkpoints/latest",
        *(f"checkpoints/step-00000004/{file}" for file in ("state.json", "weights.safetensors")),
        "checkpoints/step-00000004/optimizer.safetensors",
        *(f"checkpoints/best/{file}" for file in ("state.json", "weights.safetensors")),
    ],
    "eval": ["held-out.jsonl", "settings.json"],
}
BROKEN = {
    "data": ("prepare-data", data_stage, "_finish", 1),
    "words": ("prepare-data", data_stage, "make_plan", 1),
    "drafter": ("train", loop, "refuse_non_finite", 6),
    "eval": ("eval", evaluate, "summarise", 1),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize(("stage", "file"), [(stage, file) for stage, files in UNFINISHED.items() for file in files])
def test_damage_to_unfinished_work_is_named_or_costs_only_time(
    made: Path, run: Path, stage: str, file: str, damage: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the end the same files stand as if nothing had happened."""
    command, module, name, call = BROKEN[stage]
    kind = "data" if stage == "words" else stage
    whole = contents(run / kind)
    shutil.rmtree(run / kind)
    interrupt(monkeypatch, module, name, call)
    broken = CliRunner().invoke(app, [command, *KEYS, f"target.model={made / 'target'}", "--runs", str(run.parent)])
    assert broken.exit_code == 130
    monkeypatch.undo()
    (work,) = (path for path in run.iterdir() if path.match(f".{kind}*.partial"))  # eval has a folder for each settings
    damage(work / file)
    done = coral([command], made)
    if done.exit_code:
        assert os.path.basename(file) in done.stderr, done.stderr  # noqa: PTH119
        (words,) = named(done)
        assert "--restart" in words
        assert typed(words).exit_code == 0
    again = contents(run / kind)
    assert again.keys() == whole.keys()
    if kind == "eval":
        assert ids(again) == ids(whole)
    else:
        named_files = whole.keys() - {"manifest.json"}
        assert {name: again[name] for name in named_files} == {name: whole[name] for name in named_files}


def ids(found: dict[str, bytes]) -> list[list[list[int]]]:
    """The answers of an evaluation, whose seconds are never the same."""
    questions = [json.loads(line) for line in found["held-out.jsonl"].splitlines()]
    return [[lane["ids"] for turn in turns for lane in turn["lanes"].values()] for turns in questions]
