"""What a screen shows: words stay whole, and a dash is explained."""

import io

import pytest
from rich.console import Console

from coral_cli import console
from coral_cli.commands.chat import HELP, _tell
from coral_cli.commands.group_head import _print_summary
from coral_cli.main import VERBS, app
from coral_core.artifacts import Manifest
from tests.cli.test_errors import coral


@pytest.mark.parametrize("width", [40, 80])
def test_chat_wraps_what_it_says_at_words(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=shown, force_terminal=True, width=width, color_system=None))
    _tell(HELP)
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert " ".join(" ".join(lines).split()) == HELP


def test_a_log_gets_lines_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=shown, width=40))
    _tell(HELP)
    assert shown.getvalue() == f"{HELP}\n"


def test_help_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERMINAL_WIDTH", "40")
    shown = " ".join(coral("--help").stdout.split())
    assert "..." not in shown.partition("Commands:")[2]
    for verb in VERBS.values():
        assert " ".join((verb.__doc__ or "").partition("\n")[0].split()) in shown
    assert [command.name for command in app.registered_commands] == list(VERBS)


def head(**predicted: float) -> Manifest:
    facts = {"groups": 4, "active": 1, "rows_read": 24, "recall_rows": 10, **predicted}
    facts["recall"] = {"argmax": 0.9, "top10": 0.8, "kept": 0.9}
    return Manifest(kind="head", fingerprint="", inputs={}, recipe={}, facts=facts)


def test_group_head_says_why_nothing_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    _print_summary(head())
    shown = capsys.readouterr()
    assert "| - |" in " ".join(shown.out.split())
    assert "- was not predicted, since head.groups and head.active were given" in shown.err
    _print_summary(head(tokens_per_round=2.0, round_s=0.01, tokens_per_s=200.0, speedup=1.0))
    assert "was not predicted" not in capsys.readouterr().err
