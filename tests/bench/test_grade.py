"""Right answers: GSM8K's number, HumanEval's tests, and the sandbox that runs them."""

from pathlib import Path

import pytest

from coral_core.bench.grade import exact_match, final_number, grade, program
from coral_core.bench.questions import Question
from coral_core.bench.race import Lane, Turn
from coral_core.bench.sandbox import runs_through

DOUBLE = Question(
    "HumanEval/0",
    ('from typing import List\n\n\ndef double(x: List[int]):\n    """Twice."""\n',),
    tests="def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n",
    entry_point="double",
)
BODY = "    return [2 * n for n in x]\n"
WHOLE = "def double(x: List[int]):\n" + BODY


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so she has 7 eggs, 3 of them white.\n#### 1,200", 1200),
        ("it costs $18.50.", 18.5),
        ("5 apples and then -3 more", -3),
        ("#### 7 dollars, or 8 with tip", 7),
        ("in 2024 it was 1,000.0", 1000),
        ("#### unknown, perhaps 12", 12),
        ("no number", None),
        ("3 apples ####", 3),
    ],
)
def test_the_number_that_an_answer_ends_with(text: str, number: float | None) -> None:
    assert final_number(text) == number


def test_exact_match_is_about_numbers_not_digits() -> None:
    assert exact_match("that makes 18.00 dollars", "<<9*2=18>>\n#### 18")
    assert not exact_match("that makes 180", "#### 18")
    assert not exact_match("", "#### 18")


@pytest.mark.parametrize(
    "answer",
    [BODY, WHOLE, f"Here you are:\n```python\n{WHOLE}```\nIt doubles.", f"```\n{BODY}```", f"```python\n{WHOLE}"],
    ids=["body", "whole", "fenced whole", "fenced body", "fence cut off"],
)
def test_every_form_of_a_right_program_passes(answer: str) -> None:
    assert runs_through(program(DOUBLE, answer))


@pytest.mark.parametrize("answer", ["    return x\n", "I cannot.", "```python\nimport os; os._exit(0)\n```", ""])
def test_a_wrong_program_does_not_pass(answer: str) -> None:
    assert not runs_through(program(DOUBLE, answer))


def test_code_is_run_only_when_asked_and_lanes_are_graded_apart() -> None:
    words = {1: BODY, 2: "    return x\n"}

    def turns(plain: int, method: int) -> list[Turn]:
        lanes = {name: Lane([token], 0, 0, [], [], {}) for name, token in (("plain", plain), ("m", method))}
        return [Turn("HumanEval/0", 0, 1, lanes, {"m": None})]

    raced = [turns(1, 1), turns(1, 2), []]
    assert grade([DOUBLE] * 3, raced, lambda ids: words[ids[0]], run_code=False) is None
    graded = grade([DOUBLE] * 3, raced, lambda ids: words[ids[0]], run_code=True)
    assert graded is not None
    assert graded.of("m") == {"metric": "pass@1", "checked": 2, "plain": 2, "speculative": 1}


def test_the_sandbox_lets_ordinary_programs_run() -> None:
    assert runs_through("import math, re, collections, itertools, hashlib, random, heapq, typing\nprint(math.pi)")


def test_the_sandbox_has_limits(tmp_path: Path) -> None:
    assert not runs_through("while True: pass", time_limit_s=1)
    assert not runs_through("import time; time.sleep(60)", time_limit_s=1)
    assert not runs_through("x = bytearray(1 << 29)", memory_bytes=1 << 28)
    assert runs_through("x = bytearray(1 << 20)", memory_bytes=1 << 28)


@pytest.mark.parametrize(
    "attempt",
    [
        "open({kept!r}, 'w')",
        "open({new!r}, 'x')",
        "import os; os.open({new!r}, os.O_CREAT | os.O_WRONLY)",
        "import os; os.remove({kept!r})",
        "import os; os.replace({kept!r}, {new!r})",
        "import shutil; shutil.rmtree({folder!r})",
        "import pathlib; pathlib.Path({new!r}).mkdir()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import socket; socket.socket()",
        "import ctypes; ctypes.CDLL(None)",
        "import atexit, os; raise SystemExit(0)",
        "import os; os._exit(0)",
        "import os; os.kill(os.getppid(), 0)",
    ],
)
def test_the_sandbox_refuses(attempt: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    paths = {"kept": str(kept), "new": str(tmp_path / "new"), "folder": str(tmp_path)}
    assert not runs_through(attempt.format(**paths))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "mine"


def test_the_sandbox_gives_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert runs_through("import os; assert 'SECRET' not in os.environ")
