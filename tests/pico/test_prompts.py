"""What pico, and drafters of real models, are asked, out of made-up corpora."""

import gzip
import json
from pathlib import Path
from types import ModuleType

import pytest

from recipes.pico import prompts
from recipes.real import prompts as real_prompts

QUOTED = "how many apples does tom have after he buys four more in the morning"


def dialogue(*turns: str) -> str:
    said = [{"role": role, "content": text} for turn in turns for role, text in (("user", turn), ("assistant", "A"))]
    return json.dumps({"messages": said}) + "\n"


def made(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, list[str]]]:
    """The prompts of 302 dialogues, of which one asks what a benchmark asks and one is long."""
    lines = [dialogue(f"first {i}", f"second {i}", f"third {i}") for i in range(300)]
    lines += [dialogue(QUOTED), dialogue("long " * 300)]
    with gzip.open(folder / "talk.jsonl.gz", "wt") as file:
        file.writelines(lines)
    monkeypatch.setattr(module, "COUNTS", {"talk": 400})
    arguments = ["prompts", "--corpora", folder, "--benchmarks", folder, "--to", folder / "to" / "out.jsonl"]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
    module.main()
    return [json.loads(line) for line in (folder / "to" / "out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("module", [prompts, real_prompts])
def test_only_what_users_asked_and_no_benchmark_asks(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench.jsonl").write_text(json.dumps({"question": QUOTED}) + "\n")
    rows = made(module, tmp_path, monkeypatch)
    asked = {tuple(row["turns"]) for row in rows}
    assert asked <= {(f"first {i}", f"second {i}") for i in range(300)}
    if module is prompts:
        assert 280 <= len(rows) == len(asked) < 300, "all but the held-out ones"
    else:
        assert len(rows) == len(asked) == 300
    assert f"talk: {len(rows)} of {len(rows)} prompts; 1 of 302 dialogues left out" in capsys.readouterr().out


@pytest.mark.parametrize("module", [prompts, real_prompts])
def test_without_a_benchmark_nothing_is_written(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"error: no file .* Give --benchmarks a folder"):
        made(module, tmp_path, monkeypatch)
    assert not (tmp_path / "to").exists()
