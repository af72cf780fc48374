"""What a user reads: progress on a terminal and in a log, tables, JSON."""

import io
import json

import pytest
from rich.console import Console

from coral_cli import console


def log(monkeypatch, calls, every_s=10.0) -> list[str]:
    """The plain lines for calls of (clock, stage, done, total, numbers)."""
    buffer = io.StringIO()
    clock_s = iter([call[0] for call in calls])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock_s))
    with console.progress_bars(Console(file=buffer, width=40)) as progress:
        for _, *arguments in calls:
            progress(*arguments)
    return buffer.getvalue().splitlines()


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    calls = [
        (0.0, "answers", 0, 100, {}),
        (1.0, "answers", 10, 100, {"tokens_per_s": 90}),
        (10.0, "answers", 20, 100, {"tokens_per_s": 80.4}),
        (11.0, "answers", 30, 100, {}),
        (50.0, "answers", 100, 100, {}),
    ]
    assert log(monkeypatch, calls) == [
        "answers 0/100",
        "answers 20/100, 40 s left, 80.4 tokens/s",
        "answers 100/100, took 50 s",
    ]


def test_a_resumed_stage_reckons_from_where_it_began(monkeypatch):
    calls = [(0.0, "train", 500, 1000, {}), (10.0, "train", 600, 1000, {"loss": 1.25})]
    assert log(monkeypatch, calls) == ["train 500/1,000", "train 600/1,000, 40 s left, loss 1.25"]


def test_a_bar_of_a_stage_that_comes_again_has_a_clock_of_its_own():
    """The second round is not shown as ended, with the first one's time."""
    buffer = io.StringIO()
    with console.progress_bars(Console(file=buffer, width=80, force_terminal=True)) as progress:
        for done in (0, 1, 2, 0, 1):
            progress("acceptance", done, 2, {})
    assert "-:--" in buffer.getvalue().split("acceptance")[-1]


def test_an_unknown_total_has_no_time_left(monkeypatch):
    assert log(monkeypatch, [(0.0, "x", 0, 0, {}), (20.0, "x", 7, 0, {})]) == ["x 0", "x 7"]


def test_a_stage_that_comes_again_is_shown_again(monkeypatch):
    calls = [(0.0, "x", 1, 1, {}), (1.0, "x", 0, 1, {}), (2.0, "x", 1, 1, {})]
    assert log(monkeypatch, calls) == ["x 1/1, took 0 s", "x 0/1", "x 1/1, took 1 s"]


def test_a_terminal_gets_a_bar():
    buffer = io.StringIO()
    with console.progress_bars(Console(file=buffer, force_terminal=True, width=100)) as progress:
        progress("answers", 5, 10, {"tokens_per_s": 1234.0})
        progress("answers", 10, 10, {"tokens_per_s": 1234.0})
        progress("self-written", 3, 0, {})
    assert "10/10" in buffer.getvalue()
    assert "1,234 tokens/s" in buffer.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7805, "2 h 10 min")]
)
def test_durations_are_for_people(seconds, text):
    assert console.duration_text(seconds) == text


@pytest.mark.parametrize(("size", "text"), [(900, "0.9 kB"), (81_400_000, "81.4 MB"), (2_500_000_000, "2.5 GB")])
def test_sizes_are_never_zero_gigabytes(size, text):
    assert console.size_text(size) == text


def test_numbers_carry_their_unit():
    assert (
        console.numbers_text({"tokens_per_s": 1234.5, "loss": 0.12345, "done": 3})
        == "1,234 tokens/s, loss 0.123, done 3"
    )


def test_a_table_is_markdown_on_stdout(capsys):
    console.print_table(["bench", "tau"], [["mt-bench [x]", "2.51"], ["gsm8k", "3.0"]])
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.splitlines() == [
        "| bench        |  tau |",
        "| ------------ | ---: |",
        "| mt-bench [x] | 2.51 |",
        "| gsm8k        |  3.0 |",
    ]


def test_json_on_stdout_is_json(capsys):
    value = {"words": "x " * 200 + "[bold]é", "number": 1.5}
    console.print_json(value)
    assert json.loads(capsys.readouterr().out) == value
