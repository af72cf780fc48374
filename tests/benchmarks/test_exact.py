"""The rows of the exactness benchmark: which of them are measured again, and which are told of."""

from types import SimpleNamespace

import pytest

from benchmarks import exact


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The commit and the target's fingerprint; nothing is computed."""
    now = SimpleNamespace(commit="c1", target="t1")
    monkeypatch.setattr(exact, "git_commit", lambda: now.commit)
    monkeypatch.setattr(
        exact.Target, "from_pretrained", lambda *_, **__: SimpleNamespace(fingerprint=now.target, stop_ids=frozenset())
    )
    monkeypatch.setattr(exact, "written", lambda *_: ([], []))
    monkeypatch.setattr(exact, "in_a_batch", lambda target, prompts, *_: [0] * len(prompts))
    for name in ("differing", "chat_differs"):
        monkeypatch.setattr(exact, name, lambda *_: 0)
    monkeypatch.setattr(exact, "costs", lambda *_: {"1": 0.9})
    return now


def measured(rows: list[exact.Row], answers: int) -> list[int]:
    """The answers of what is measured beside these rows, which it joins; no answers: what a step costs."""
    fresh = list(exact.rows_of("models/some", "bf16", answers, 8, {row["key"] for row in rows}))
    rows += fresh
    return [len(row.get("answers", ())) for row in fresh]


def test_a_row_is_of_a_commit_a_target_and_so_many_answers(made: SimpleNamespace) -> None:
    rows: list[exact.Row] = []
    assert measured(rows, 6) == [4, 2, 0]
    assert measured(rows, 6) == []
    assert measured(rows, 8) == [4], "the batch of two is no batch of four"
    found = exact.newest(rows)
    assert exact.figures(found) == {
        "bf16_equal_share": 1.0,
        "bf16_answers": 8,
        "exact_over_inexact_tokens_per_s": {"some bf16": {"1": 0.9}},
    }
    made.target = "t2"
    assert measured(rows, 8) == [4, 4, 0]
    made.commit = "c2"
    assert measured(rows, 6) == [4, 2, 0]
    assert exact.figures(exact.newest(rows))["bf16_answers"] == 6, "of today's code alone"
