"""The table of real models: its figures from rows by hand, and rows that are not computed twice."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import real


def lane(tokens: int, rounds: int, decode_s: float, **more: Any) -> dict[str, Any]:
    return {"tokens": tokens + 1, "rounds": rounds, "plain_rounds": 0, "prefill_s": 1.0, "decode_s": decode_s, **more}


def row(bench: str, question: str, temperature: float = 0.0, right: bool = True) -> dict[str, Any]:
    """CORAL drafts 4 tokens a round with the full head and 3 with the grouped one; HASS and its other seed 3 and 5."""
    lanes = {
        "plain float32": lane(60, 60, 6.0),
        "generate bfloat16": lane(60, 60, 5.0),
        "coral full fixed float32": lane(60, 15, 9.0, equal=right),
        "coral full auto float32": lane(60, 20, 3.0, equal=True),
        "coral grouped fixed float32": lane(60, 20, 9.0, equal=True),
        "coral grouped auto float32": lane(60, 30, 2.0, equal=True),
        "hass full fixed float32": lane(60, 20, 4.0, equal=True),
        "hass@1 full fixed float32": lane(60, 12, 4.0, equal=True),
        "lookup float32": lane(60, 30, 4.0),
        "llamacpp q4": lane(60, 60, 1.0),
        "llamacpp q4 ngram": lane(60, 60, 0.5),
        "llamacpp bf16": lane(60, 60, 4.0),
        "plain bfloat16": lane(60, 60, 8.0),
    }
    found = {"model": "smollm2", "bench": bench, "question": question, "temperature": temperature}
    return {**found, "settings": "s", "prompt_tokens": 3, "lanes": lanes}


def test_figures_by_hand() -> None:
    rows = [row("mt-bench", "a"), row("mt-bench", "b"), row("gsm8k", "c"), row("gsm8k", "c", 1.0, right=False)]
    found = real.figures(rows)
    assert found["tau"] == {"coral": 4.0, "hass": pytest.approx(120 / 32)}
    assert found["speedup_greedy"] == pytest.approx(5.0 / 2.0), "the fastest of ours over the fastest plain lane"
    assert found["lookup_speedup_greedy"] == pytest.approx(5.0 / 4.0)
    assert found["coral_over_hass"] == pytest.approx(4.0 / (120 / 32))
    assert found["grouped_tau_kept"] == pytest.approx(0.75)
    assert found["grouped_gain"] == pytest.approx(1.5)
    assert found["lossless_share"] == pytest.approx(23 / 24), "at both temperatures"
    llama = real.llama_figures(rows)
    assert llama["q4_tokens_per_s"] == pytest.approx(60.0) and llama["q4_ngram_tokens_per_s"] == pytest.approx(120.0)
    assert llama["plain_over_llamacpp_same_bits"] == pytest.approx(0.5)


def test_only_the_fastest_of_lanes_that_do_the_same_goes_on() -> None:
    """The plain loop in float32 stays, slow as it is: drafted answers in float32 are compared with it."""
    assert real.ahead([row("gsm8k", "a")]) == set(row("gsm8k", "a")["lanes"]) - {"plain bfloat16"}
    slow = row("gsm8k", "b")
    slow["lanes"] |= {"coral full auto bfloat16": lane(60, 20, 9.0, equal=True), "lookup bfloat16": lane(60, 30, 1.0)}
    assert real.ahead([slow]) == set(slow["lanes"]) - {"plain bfloat16", "coral full auto bfloat16", "lookup float32"}
    figures = real.figures([slow, row("gsm8k", "a")])
    assert figures["lookup_speedup_greedy"] == pytest.approx(5.0 / 4.0), "of the lanes that answered both questions"


def test_a_row_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert real.read(path) == []
    whole = json.dumps(row("gsm8k", "a"))
    path.write_text(f"{whole}\n{whole[: len(whole) // 2]}")
    assert real.read(path) == [row("gsm8k", "a")]


def test_a_drafter_is_named_with_its_run(tmp_path: Path) -> None:
    (tmp_path / "drafter").mkdir()
    assert real.drafted(f"coral@1={tmp_path}").name == "coral@1"
    for wrong in ("coral", f"coral={tmp_path / 'drafter'}"):
        with pytest.raises(argparse.ArgumentTypeError, match="holds no drafter; give NAME=RUN"):
            real.drafted(wrong)
