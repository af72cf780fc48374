"""What pico is asked, out of made-up corpora."""

import gzip
import json
from pathlib import Path

import pytest

from recipes.pico import prompts

QUOTED = "how many apples does tom have after he buys four more in the morning"


def test_only_what_users_asked_and_no_benchmark_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dialogue(*turns: str) -> str:
        said = [
            {"role": role, "content": text} for turn in turns for role, text in (("user", turn), ("assistant", "A"))
        ]
        return json.dumps({"messages": said}) + "\n"

    (tmp_path / "bench.jsonl").write_text(json.dumps({"question": QUOTED}) + "\n")
    lines = [dialogue(f"first {i}", f"second {i}", f"third {i}") for i in range(300)]
    lines += [dialogue(QUOTED), dialogue("long " * 300)]
    with gzip.open(tmp_path / "talk.jsonl.gz", "wt") as file:
        file.writelines(lines)
    monkeypatch.setattr(prompts, "COUNTS", {"talk": 400})
    arguments = ["prompts", "--corpora", tmp_path, "--benchmarks", tmp_path, "--to", tmp_path / "to" / "out.jsonl"]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
    prompts.main()
    rows = [json.loads(line) for line in (tmp_path / "to" / "out.jsonl").read_text().splitlines()]
    asked = {tuple(row["turns"]) for row in rows}
    assert asked <= {(f"first {i}", f"second {i}") for i in range(300)}
    assert 280 <= len(rows) == len(asked) < 300, "all but the held-out ones"
