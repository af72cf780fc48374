"""Files of benchmarks: rows that a kill cut off, and results that are there whole or not at all."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import record, rows


def test_a_row_that_was_cut_off_is_left_out_and_others_follow(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert list(rows.read(path)) == []
    whole = json.dumps({"name": "a", "lanes": {"plain": 1}})
    path.write_text(f"{whole}\n{whole[: whole.rindex('}')]}")
    assert list(rows.read(path)) == [json.loads(whole)]
    for name in ("b", "c"):
        rows.append(path, {"name": name})
    assert [row["name"] for row in rows.read(path)] == ["a", "b", "c"]


def test_results_are_whole_when_writing_them_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["race.py"])
    path = record.record("race", {"speedup": 2.0}, [])
    before, write = path.read_text(), Path.write_text

    def half(self: Path, text: str, encoding: str | None = None) -> int:
        write(self, text[: len(text) // 2], encoding=encoding)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        record.record("race", {"speedup": 3.0}, [])
    assert path.read_text() == before
