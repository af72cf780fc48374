"""`coral prepare-data` as typed, on the embedded target."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from coral_cli.main import app
from coral_core.recipe.loader import load_recipe
from coral_core.store.store import Store
from coral_core.target.load import load_target
from tests.data.server import Server, serving

ROWS = [{"prompt": text} for text in ("Hello.", "Find me a bus.", "What does `ls` do?", "And `cd`?", "")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def coral(*words: str) -> Result:
    keys = ["name=t", "data.prompts=p.jsonl", "data.max_samples=4", "data.holdout=1", "data.max_new_tokens=8"]
    return CliRunner().invoke(app, ["prepare-data", *keys, *words])


def cut_at(limit: int) -> int:
    """Dialogues of the store that hold so many tokens of the target's, none of which ends an answer."""
    store = Store.open(Path("runs/t/data"))
    ends = load_target(load_recipe(None, []).target).stop_ids
    samples = [store[index] for index in range(len(store))]
    return sum(int(one.answer_T.sum()) == limit and int(one.ids_T[-1]) not in ends for one in samples)


def test_a_run_its_samples_and_a_second_run(folder: Path) -> None:
    first = coral("--show", "1")
    assert first.exit_code == 0, first.output
    lines = first.stdout.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:8]] == [
        "dialogues",
        "of them held out",
        "tokens",
        "answer tokens",
        "last answer cut at data.max_new_tokens=8 or data.max_length=512",
        "size",
    ]
    assert lines[6].split("|")[2].strip() == f"{cut_at(8)} ({cut_at(8) / 4:.0%})"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert ["left out: with an empty message (first: p.jsonl line 5)", "1"] in cells
    assert "--- sample 0: " in first.stdout
    assert first.stdout.count("⟦") == first.stdout.count("⟧") == 1
    assert "<|assistant|>⟦" in first.stdout
    assert "answers 4/4" in first.stderr

    again = coral()
    assert (again.exit_code, "answers" in again.stderr) == (0, False)
    assert "t/data is finished already, with this recipe and target" in again.stderr

    changed = coral("data.max_new_tokens=5")
    assert changed.exit_code == 0
    assert "made anew, and replaced at the end, since data.max_new_tokens was 8, is 5" in changed.stderr


def test_an_endpoint_is_sent_the_key_of_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORAL_ENDPOINT_KEY", "k")
    with serving(Server()) as server:
        done = coral(f"data.endpoint={server.url}", "data.regenerate=greedy")
    assert done.exit_code == 0, done.output
    assert set(server.keys) == {"Bearer k"}


def test_given_answers_are_cut_at_the_length_of_a_dialogue(folder: Path) -> None:
    long = "It was sold to a farmer from the hills who paid for it in barley and two old hens."
    answers = {"One.": "ab", "Two.": "cd", "Three.": long}
    said = [
        {"messages": [*asked(words), {"role": "assistant", "content": answer}]} for words, answer in answers.items()
    ]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    done = coral("data.regenerate=none", "data.max_length=20", "data.max_samples=3")
    assert done.exit_code == 0, done.output
    assert re.search(r"last answer cut at data\.max_length=20 +\| +1 \(33%\)", done.stdout)


def asked(words: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": words}]


def test_a_dry_run_makes_nothing(folder: Path) -> None:
    done = coral("--dry-run")
    assert done.exit_code == 0, done.output
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]] == [
        "dialogues",
        "tokens",
        "tokens to write",
        "size",
        "time",
    ]
    assert not (folder / "runs").exists()


def test_a_slip_is_one_line_before_the_target_is_loaded(folder: Path) -> None:
    done = coral("data.prompts=nope.jsonl", "target.model=nowhere", "name=mine")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no prompt file nope.jsonl. Set data.prompts to")
    (folder / "prompts.jsonl").write_text("")
    done = coral("data.prompts=promts.json", "name=mine")
    assert done.stderr.startswith("error: no prompt file promts.json; did you mean data.prompts=prompts.jsonl? Set")
    (folder / "p.jsonl").write_text('{"prompt": "a"\n{"prompt": \n')
    done = coral()
    assert done.exit_code == 1
    assert "error: p.jsonl line 1 is not JSON" in done.stderr
