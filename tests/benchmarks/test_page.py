"""The page of results and the README's table say what the files say."""

import json
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from benchmarks import page, real_figures, record
from tests.benchmarks.test_real import counted, row


def test_the_page_is_of_todays_files():
    assert (page.ROOT / "docs" / "results.md").read_text(encoding="utf-8") == page.results_page(), (
        "run: python -m benchmarks.page"
    )


def test_the_readmes_table_is_of_todays_file():
    text = (page.ROOT / "README.md").read_text(encoding="utf-8")
    assert text == page.readme(text), "run: python -m benchmarks.page"


def test_what_the_readme_says_of_pico_is_in_the_file():
    text = " ".join((page.ROOT / "README.md").read_text(encoding="utf-8").split())
    greedy, sampled = (
        [row["speedup"] for row in page.load("pico")["rows"] if row["temperature"] == temperature]
        for temperature in (0, 1)
    )
    assert f"{min(greedy):.1f} to {max(greedy):.1f} times the fastest plain decoding" in text
    assert f"{min(sampled):.1f} to {max(sampled):.1f} at temperature 1" in text


def test_what_the_readme_says_of_compiled_decoding_is_in_the_file():
    text = " ".join((page.ROOT / "README.md").read_text(encoding="utf-8").split())
    found = page.load("decode")["figures"]
    equal, answers = found["compiled_answers"]["equal"], found["compiled_answers"]["answers"]
    assert f"coral was {found['speedup_over_compiled']:.2f} times as fast as it" in text
    assert f"{equal} of its {answers} answers equalled plain ones" in text


def test_what_is_said_of_the_grouped_head_is_in_the_file():
    text = " ".join((page.ROOT / "README.md").read_text(encoding="utf-8").split())
    found = page.load("head")["figures"]
    small, large = "smollm2-135m", "qwen2.5-coder-0.5b"
    groups, listed, kept, kept_listed = (
        [found[f"{figure}_eighth_{model}"] for model in (small, large)]
        for figure in ("end_to_end_gain", "end_to_end_gain_static", "tau_kept", "tau_kept_static")
    )
    assert "equal size it is {:.2f} and {:.2f} times as fast".format(*groups) in text
    assert "was {:.2f} and {:.2f} times as fast there".format(*listed) in text
    assert f"it keeps {kept_listed[0]:.0%} on SmolLM2 and all on Qwen".replace("%", " %") in text
    table = (page.ROOT / "docs" / "grouped-head.md").read_text(encoding="utf-8")
    for values in zip(kept, kept_listed, groups, listed, strict=True):
        assert "| {:.2f}, {:.2f} | {:.2f}, {:.2f} |".format(*values) in table


def test_what_the_readme_says_of_a_processor_without_bfloat16_is_in_the_file():
    text = " ".join((page.ROOT / "README.md").read_text(encoding="utf-8").split())
    counted, raced = real_figures.parts(page.load("real-avx2")["rows"])
    assert [sum(row["temperature"] == temperature for row in raced) for temperature in (0, 1)] == [12, 12]
    greedy, sampled = (
        real_figures.speed_figures(
            [row for row in raced if row["temperature"] == temperature],
            real_figures.LONG,
            real_figures.made_of(counted, real_figures.LONG),
        )["speedup_greedy"]
        for temperature in (0, 1)
    )
    assert (
        f"SmolLM2 was {greedy:.2f} times as fast as the fastest plain decoding at temperature 0 and {sampled:.2f}"
        in text
    )
    equal = [lane["equal"] for row in raced for lane in row["lanes"].values() if "equal" in lane]
    assert all(equal) and f"All {len(equal)} drafted answers" in text


def test_every_file_of_results_is_on_the_page():
    assert {path.stem for path in page.RESULTS.glob("*.json")} <= page.ABOUT.keys()
    sources = [path.read_text(encoding="utf-8") for path in (page.ROOT / "benchmarks").glob("*.py")]
    written = {name for source in sources for name in re.findall(r"\brecord\(\"([\w-]+)\"", source)}
    assert "decode-gpu" in written <= page.ABOUT.keys(), "what no one has measured yet too"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.98765, "0.9877"), (12345.6, "12,346"), ([1.02, 1.05], "[1.02, 1.05]"), (True, "True"), (3, "3")],
)
def test_numbers_are_rounded(value, shown):
    assert page.text(value) == shown


def test_a_table_typed_by_hand_is_replaced():
    begin, end = page.BEGIN, page.END
    table = page.real_table(page.counted_enough(page.load("real")["rows"]))
    assert page.readme(f"a\n{begin}\ntau 9\n{end}\nb\n") == f"a\n{begin}\n{table}\n{end}\nb\n"


def test_the_table_of_real_models():
    rows = [row("mt-bench", "a"), *counted("mt-bench", "a"), *counted("mt-bench", "c"), row("gsm8k", "b")]
    warm = [{**one, "rounds": 30} for one in counted("gsm8k", "b", temperature=1.0)]
    lines = page.real_table([*rows, *counted("gsm8k", "b"), *warm, row("gsm8k", "b", temperature=1.0)]).splitlines()[2:]
    assert [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines] == [
        ["0", "HASS, full head", "3.75", "3.75"],
        ["0", "CORAL, full head", "4.00, 1.67x", "4.00, 1.67x"],
        ["0", "CORAL, grouped head", "3.00, 2.50x", "3.00, 2.50x"],
        ["1", "HASS, full head", "-", "2.00"],
        ["1", "CORAL, full head", "-", "2.00, 1.67x"],
        ["1", "CORAL, grouped head", "-", "2.00, 2.50x"],
    ], "tau of the fixed tree over all seeds; the speed of the tree that pays over the fastest plain lane"


def test_a_method_that_was_counted_on_some_benches_only_has_no_tau_on_the_others():
    rows = [*counted("mt-bench", "a"), *({**one, "method": "eagle2-steps"} for one in counted("gsm8k", "b")[:1])]
    lines = page.real_table(rows).splitlines()[2:]
    assert [[cell.strip() for cell in line.split("|")[3:-1]] for line in lines] == [
        ["EAGLE-2, equal steps, full head", "-", "4.00"],
        ["HASS, full head", "3.75", "-"],
        ["CORAL, full head", "4.00", "-"],
        ["CORAL, grouped head", "3.00", "-"],
    ]


def test_the_readme_leaves_out_what_was_counted_on_few_questions():
    many = [one for name in "abcdefghij" for one in counted("gsm8k", name)]
    few = [{**one, "method": "coral-steps"} for one in many if one["question"] != "j"]
    warm = counted("gsm8k", "a", temperature=1.0)
    raced = row("gsm8k", "a")
    assert page.counted_enough([*many, *few, *warm, raced]) == [*many, raced]
    half = [one for one in counted("mt-bench", "a")]
    assert page.counted_enough([*many, *half]) == [], "of every bench"


def test_nested_figures_have_dotted_names():
    assert page.flat({"tau": {"coral": 3.5}, "gain": 1.25}) == [("tau.coral", "3.5"), ("gain", "1.25")]


def test_a_part_keeps_the_command_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (page, record):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("benchmarks.race", None))
    for model in ("one", "two"):
        monkeypatch.setattr(sys, "argv", ["race.py", model])
        record.record("race", {"speedup": 2.0}, [], model)
    path = tmp_path / "race.json"
    value = page.load("race")
    value["parts"]["two"]["note"] = "Stopped at 30 questions."
    path.write_text(json.dumps(value))
    shown = page.section("race", "A race.")
    assert shown.count("\n\nStopped at 30 questions.\n\n") == 1
    assert "one: `python -m benchmarks.race one`" in shown and "two: `python -m benchmarks.race two`" in shown
