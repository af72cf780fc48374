"""Question files: what is read, and which line is blamed."""

import json
import logging
from pathlib import Path

import pytest

from coral_core.bench.questions import check_bench, check_names, from_file, from_hub, held_out, load_bench
from coral_core.errors import ArtifactError, DataError


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_the_three_forms(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        {"question_id": 81, "turns": ["Hello.", "And now?"]},
        "",
        {"task_id": "HumanEval/0", "prompt": "def f():"},
        {"question": "1 + 1?", "answer": "2"},
    )
    questions = from_file(path)
    assert [question.name for question in questions] == ["81", "HumanEval/0", "q-4"]
    assert [question.turns for question in questions] == [("Hello.", "And now?"), ("def f():",), ("1 + 1?",)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"turns": []}', "it has no turn that is text"),
        ('{"question": []}', "it has no turn that is text"),
        ('{"turns": [""]}', "a turn is empty or not text"),
        ('{"turns": [3]}', "a turn is empty or not text"),
        ('{"prompt": 3}', "it has no turn that is text"),
        ('{"x": 1}', "it has no turn that is text"),
        ("[1]", "not a JSON object"),
        ("{", "Expecting property name"),
    ],
)
def test_a_malformed_line_is_named_with_its_reason(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / "q.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(DataError, match=rf"q\.jsonl line 2 is not a question: .* \({reason}"):
        from_file(path)


def test_a_line_may_hold_what_else_breaks_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "one\u2028two\u0085three"}, {"prompt": "four"}]
    (tmp_path / "q.jsonl").write_text(
        "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    assert [question.turns for question in from_file(tmp_path / "q.jsonl")] == [(rows[0]["prompt"],), ("four",)]


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the questions file .*absent"):
        from_file(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="is empty"):
        from_file(write(tmp_path / "q.jsonl", ""))


def test_an_unknown_bench_names_the_nearest() -> None:
    with pytest.raises(DataError, match="unknown bench 'mtbench'; did you mean mt-bench?"):
        check_bench("mtbench")


@pytest.mark.parametrize(
    ("bench", "row", "turns"),
    [
        ("math-500", {"problem": "1 + 1?", "solution": "2"}, ("1 + 1?",)),
        ("mbpp", {"prompt": "Add.", "test_list": ["assert a", "assert b"]}, None),
        ("alpaca", {"instruction": "Sort.", "input": "3 1"}, ("Sort.\n3 1",)),
        ("alpaca", {"instruction": "Sing.", "input": ""}, ("Sing.",)),
        ("cnn-dailymail", {"article": "It rained.", "highlights": "Rain."}, ("Summarize this article.\n\nIt rained.",)),
        ("speed-bench", {"turns": ["One.", "Two."]}, ("One.", "Two.")),
        ("spec-bench-rag", {"turns": ["Who?"], "category": "rag"}, ("Who?",)),
        ("gsm8k", {"question": "2 + 2?", "answer": "#### 4"}, ("2 + 2?",)),
    ],
)
def test_each_bench_asks_what_its_rows_hold(monkeypatch: pytest.MonkeyPatch, bench: str, row: dict, turns) -> None:
    """The same from the Hub and from a file of the bench's name."""
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [row])
    turns = turns or ("Add.\nYour code should pass these tests:\nassert a\nassert b",)
    assert [question.turns for question in from_hub(bench)] == [turns]


def test_a_benchs_own_file_is_read_with_its_template(tmp_path: Path) -> None:
    path = write(tmp_path / "mbpp.jsonl", {"prompt": "Add.", "test_list": ["assert a"]}, {"turns": ["As ever."]})
    asked = [question.turns for question in from_file(path)]
    assert asked == [("Add.\nYour code should pass these tests:\nassert a",), ("As ever.",)]


def test_rows_whose_words_are_withheld_are_left_out(tmp_path: Path) -> None:
    masked = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
    path = write(tmp_path / "speed-bench.jsonl", {"turns": [masked]}, {"turns": ["Said."]})
    assert [question.turns for question in from_file(path)] == [("Said.",)]


def test_an_unreachable_hub_says_what_to_download(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In one line: the client's own lines about each retry are left out."""

    def refuse(*args: object, **kwargs: object) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)  # to where the test listens
    with pytest.raises(DataError, match=r"HuggingFaceH4/mt_bench_prompts \(ConnectionError\).*--questions questions"):
        from_hub("mt-bench")
    assert caplog.records == []


def test_held_out_prompts_are_the_runs_own(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no held-out prompts in .*Run: coral prepare-data"):
        held_out(tmp_path, "some/model")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "holdout.json", [[3, 4, 5], [6]])
    assert [question.ids for question in held_out(tmp_path, "some/model")] == [(3, 4, 5), (6,)]


def test_a_folder_holds_a_file_per_bench(tmp_path: Path) -> None:
    for name in ("mt-bench", "mine"):
        write(tmp_path / f"{name}.jsonl", {"prompt": name})
    assert check_names([], tmp_path) == ["mine", "mt-bench"]
    assert check_names(["mine"], tmp_path) == ["mine"]
    assert load_bench("mine", tmp_path, tmp_path, "pico").questions[0].turns == ("mine",)
    assert check_names(["held-out", "mine"], tmp_path) == ["held-out", "mine"]
    write(tmp_path / "data.json", [])
    with pytest.raises(ArtifactError, match="no held-out prompts"):
        load_bench("held-out", tmp_path, tmp_path, "some/model")
    with pytest.raises(DataError, match="unknown bench 'mint'; did you mean mine?"):
        check_names(["mint"], tmp_path)
    with pytest.raises(DataError, match=r"gsm8k are missing; download .*openai/gsm8k.* to .*gsm8k\.jsonl, and run"):
        check_names(["gsm8k"], tmp_path)


def test_a_missing_file_says_what_to_download_and_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"humaneval\.jsonl is missing; download .*openai_humaneval.* to .*humaneval"):
        check_names([], tmp_path / "humaneval.jsonl")
    with pytest.raises(DataError, match=r"absent\.jsonl is missing\. Pass a JSONL file"):
        check_names([], tmp_path / "absent.jsonl")


def test_wrong_combinations_of_benches(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", {"prompt": "x"})
    assert check_names([], None) == ["held-out"]
    assert check_names([], path) == ["q"]
    with pytest.raises(DataError, match="is one file and 2 benches are asked; give a folder"):
        check_names(["a", "b"], path)
    with pytest.raises(DataError, match="bench 'gsm8k' is given twice"):
        check_names(["gsm8k", "gsm8k"], None)


def test_what_answers_are_graded_by(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        {"question": "1 + 1?", "answer": "It is 2.\n#### 2"},
        {"turns": ["1 + 1?"], "reference": ["#### 2"]},
        {"turns": ["Say hello."], "reference": ["hello"]},
        {"prompt": "def f():", "test": "def check(candidate): pass", "entry_point": "f"},
    )
    questions = from_file(path)
    assert [question.reference for question in questions] == ["It is 2.\n#### 2", "#### 2", "", ""]
    assert [question.entry_point for question in questions] == ["", "", "", "f"]
