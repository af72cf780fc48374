"""What the real models are asked, out of a made-up corpus."""

import gzip
import json
from pathlib import Path

import pytest

from recipes.real import prompts

QUOTED = "how many apples does tom have after he buys four more in the morning"


def test_no_dialogue_quotes_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dialogue(asked: str, answer: str = "A") -> str:
        said = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return json.dumps({"messages": said}) + "\n"

    (tmp_path / "bench.jsonl").write_text(json.dumps({"question": QUOTED}) + "\n")
    with gzip.open(tmp_path / "talk.jsonl.gz", "wt") as file:
        file.writelines([dialogue("first"), dialogue(f"Say, {QUOTED}?"), dialogue("second", QUOTED), dialogue("third")])
    monkeypatch.setattr(prompts, "COUNTS", {"talk": 9})
    arguments = ["prompts", "--corpora", tmp_path, "--benchmarks", tmp_path, "--to", tmp_path / "out.jsonl"]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
    prompts.main()
    rows = [json.loads(line)["turns"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(rows) == [["first"], ["third"]]
