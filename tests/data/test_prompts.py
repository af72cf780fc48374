"""The forms people keep dialogues in, and the line that is named when one is wrong."""

import gzip
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.errors import HfHubHTTPError

from coral_core.data.draw import Wanted, read_dialogues
from coral_core.data.prompts import Dialogue, Skipped, UnusableError, parse
from coral_core.data.sources import open_source
from coral_core.errors import DataError
from tests.data.helpers import write_lines

TWO_TURNS = Dialogue(("Hi.", "And?"), ("Yes.", "No."), "Be brief.")
FORMS = {
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi."},
            {"role": "assistant", "content": " Yes.\n"},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "No."},
        ]
    },
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Hi."},
            {"from": "gpt", "value": "Yes."},
            {"from": "human", "value": "And?"},
            {"from": "gpt", "value": "No."},
        ]
    },
    "parts": {
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "."}]},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "No."},
        ],
    },
    "turns": {"turns": ["Hi.", "And?"], "answers": ["Yes.", "No."], "system": "Be brief."},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_dialogue(form: str) -> None:
    assert parse(FORMS[form], "line 1") == TWO_TURNS


def test_prompts_without_answers() -> None:
    assert parse({"prompt": " Hi. "}, "") == Dialogue(("Hi.",))
    assert parse({"prompt": [{"role": "user", "content": "Hi."}]}, "") == Dialogue(("Hi.",))
    assert parse({"turns": ["Hi.", "And?"]}, "") == Dialogue(("Hi.", "And?"))
    assert parse({"prompt": "Hi.", "messages": [{"role": "user", "content": "Ho."}]}, "") == Dialogue(("Ho.",))


def test_a_dialogue_survives_its_own_row() -> None:
    for dialogue in (TWO_TURNS, Dialogue(("Hi.",)), Dialogue(("a", "b"), ("x",))):
        assert parse(json.loads(json.dumps(dialogue.to_row())), "") == dialogue


def test_messages_end_with_the_words_to_answer() -> None:
    roles = [[message["role"] for message in TWO_TURNS.messages(answers)] for answers in ((), ("x",), ("x", "y"))]
    assert roles == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user", "assistant", "user", "assistant"],
    ]
    assert TWO_TURNS.folded().messages(())[0] == {"role": "user", "content": "Be brief.\n\nHi."}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [user("a"), user("b")]}, "roles are out of order"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "roles are out of order"),
        ({"messages": [user("a"), {"role": "tool", "content": "b"}]}, "by none of system, user"),
        ({"messages": [user(" ")]}, "empty message"),
        ({"messages": []}, "without a word"),
        ({"turns": []}, "without a word"),
        ({"messages": [user(None)]}, "no text"),
        ({"messages": [user([{"type": "image_url", "image_url": "x"}])]}, "not text"),
        ({"prompt": "half \ud83d"}, "half of a Unicode pair"),
        ({"turns": ["a"], "answers": ["b", "c"]}, "do not match"),
    ],
)
def test_a_whole_row_that_is_no_use_is_skipped(row: Any, reason: str) -> None:
    with pytest.raises(UnusableError, match=reason):
        parse(row, "x line 1")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a"], "x line 7 is a list, not an object"),
        ({"text": "a"}, r"x line 7 has no messages, .* \(its keys: text\)"),
        ({"messages": "a"}, "x line 7: messages is a text, not a list"),
        ({"messages": ["a"]}, "x line 7: messages, message 1 is a text, not an object"),
        ({"messages": [{"content": "a"}]}, "x line 7: messages, message 1 has no role"),
        ({"messages": [user(5)]}, "x line 7: messages, message 1 has a number for its text"),
        ({"turns": "a"}, "x line 7: turns is not a list of texts"),
        ({"prompt": 3}, "x line 7 has a number for its prompt, not a text or a list of messages"),
        ({"prompt": {"a": 1}}, "x line 7 has an object for its prompt"),
    ],
)
def test_a_malformed_row_is_an_error_that_names_its_line(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse(row, "x line 7")


def read(path: Path | str, count: int = 100, answered: bool = False, seed: int = 0) -> list[Dialogue]:
    wanted = Wanted(count, seed, answered)
    found = read_dialogues(open_source(str(path), seed), wanted, skipped=Skipped(), folder=Path(tempfile.gettempdir()))
    return [dialogue for _, dialogue in found]


ROWS = [{"prompt": f"Question {number}?"} for number in range(20)]
WORDS = sorted(f"Question {number}?" for number in range(20))


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", lines(ROWS)),
        ("p.jsonl.gz", gzip.compress(lines(ROWS))),
        ("p.json", json.dumps(ROWS, indent=1).encode()),
        ("lines-in.json", lines(ROWS)),
        ("bom.jsonl", b"\xef\xbb\xbf" + lines(ROWS)),
        ("p.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("bom.json", b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode()),
        ("p.txt", "\n".join(WORDS).encode()),
    ],
)
def test_every_kind_of_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert sorted(dialogue.users[0] for dialogue in read(tmp_path / name)) == WORDS


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_a_json_list_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Wherever a piece ends, in a number, a text or between two items; and a slip's line is the file's."""
    monkeypatch.setattr("coral_core.data.sources.PIECE", piece)
    path = tmp_path / "p.json"
    path.write_text(json.dumps(ROWS, indent=2))
    assert sorted(dialogue.users[0] for dialogue in read(path)) == WORDS
    path.write_text(path.read_text().replace('"Question 9?"', "Question 9?"))
    with pytest.raises(DataError, match=r"Expecting value, line 30, item 10"):
        read(path)


def test_an_item_without_end_is_not_looked_for_in_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coral_core.data.sources.PIECE", 64)
    monkeypatch.setattr("coral_core.data.sources.ITEM_CHARACTERS", 200)
    path = tmp_path / "p.json"
    path.write_text('[{"prompt": "a"}, {"prompt": "' + "b" * 5000 + '"}]')
    with pytest.raises(DataError, match="Unterminated string .*, line 1, item 2"):
        read(path)


def test_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    assert sorted(dialogue.users[0] for dialogue in read(tmp_path / "p.parquet")) == WORDS
    messages = [{"messages": [user("Hi."), {"role": "assistant", "content": "Yes."}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(messages), tmp_path / "m.parquet")
    assert read(tmp_path / "m.parquet", answered=True) == [Dialogue(("Hi.",), ("Yes.",))]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no-json.jsonl", b"a\n\n" + lines(ROWS[:1]) + b"b", r"no-json\.jsonl line 1 is not JSON: .*Mend or remove it"),
        ("utf-16.jsonl", lines(ROWS).decode().encode("utf-16"), r"utf-16\.jsonl line 1 is not UTF-8"),
        ("deep.jsonl", b"[" * 200_000, r"deep\.jsonl line 1 is not JSON"),
        ("empty.jsonl", b"", r"empty\.jsonl is empty"),
        ("blank.txt", b"\n \n", r"blank\.txt is empty"),
        ("empty.json", b"[]", r"empty\.json is an empty list"),
        ("open.json", b'[{"prompt": "a"},\n\n', r"open\.json is not JSON: .*line 3, item 2\. Mend it"),
        (
            "slip.json",
            b'[{"prompt": "a"},\n{"prompt": b},\n',
            r"slip\.json is not JSON: Expecting value, line 2, item 2",
        ),
        ("bytes.json", b'[{"prompt": "a"},\n{"prompt": "\xe9"}]', r"bytes\.json item [12] is not UTF-8"),
        (
            "cut.json.gz",
            gzip.compress(json.dumps(ROWS).encode())[:-9],
            r"cannot read .*cut\.json\.gz beyond (item|line) 0",
        ),
        ("cut.jsonl.gz", gzip.compress(lines(ROWS))[:-9], r"cannot read .*cut\.jsonl\.gz beyond line"),
        ("no.parquet", b"PAR1 not", r"cannot read .*no\.parquet beyond row 0"),
        ("p.csv", b"a,b", r"must end in one of \.jsonl, .*\.txt"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["no/such/file", "nothing.jsonl", "/nowhere/p", "./p", "words"])
def test_a_file_that_is_not_there(name: str) -> None:
    with pytest.raises(DataError, match=r"no prompt file .* a Hub dataset id \(owner/name\)"):
        open_source(name, 0)


TROUBLE = [
    (b'{"prompt": "cut', "that is not JSON"),
    (b'{"prompt": "caf\xe9"}', "that is not UTF-8"),
    (b'{"text": "a"}', "that has no messages, conversations, turns or prompt"),
    (b'{"messages": ["a"]}', "that is a text, not an object"),
    (b'{"prompt": null}', "that has no messages, conversations, turns or prompt"),
]


def test_malformed_lines_are_counted_by_kind_with_the_first_of_each(tmp_path: Path) -> None:
    path, skipped = tmp_path / "p.jsonl", Skipped()
    path.write_bytes(lines(ROWS) + b"\n".join(line for line, _ in TROUBLE))
    found = read_dialogues(open_source(str(path), 0), Wanted(99, 0, False), skipped=skipped, folder=tmp_path)
    assert sorted(dialogue.users[0] for _, dialogue in found) == WORDS
    expected: dict[str, tuple[int, str]] = {}
    for number, (_, reason) in enumerate(TROUBLE, 41):
        count, first = expected.get(reason, (0, f"{path} line {number}"))
        expected[reason] = (count + 1, first)
    assert skipped.reasons == expected


@pytest.mark.parametrize(("good", "bad", "stops"), [(100, 11, False), (100, 12, True), (1000, 20, False), (3, 4, True)])
def test_too_many_malformed_lines_stop_the_run_with_the_first(tmp_path: Path, good: int, bad: int, stops: bool) -> None:
    """Ten, and one in a hundred besides; in a small file no more than those of use."""
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"".join(b'{"prompt": "%d"}\n' % number for number in range(good)) + b"{\n" * bad)
    if stops:
        with pytest.raises(DataError, match=rf"p\.jsonl line {good + 1} is not JSON"):
            read(path, 2000)
    else:
        assert len(read(path, 2000)) == good


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is the folder"):
        open_source(str(tmp_path), 0)


def test_a_sorted_file_gives_a_fair_sample(tmp_path: Path) -> None:
    """Ten of a thousand rows: from all over the file, not its head, and in another order for another seed."""
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": f"{number:04d}"} for number in range(1000)])
    drawn = [int(dialogue.users[0]) for dialogue in read(path, count=10)]
    assert len(set(drawn)) == 10
    assert max(drawn) > 600
    assert drawn != sorted(drawn)
    assert [int(dialogue.users[0]) for dialogue in read(path, count=10)] == drawn
    assert [int(dialogue.users[0]) for dialogue in read(path, count=10, seed=1)] != drawn


def test_each_row_is_as_likely_as_any_other(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": str(number)} for number in range(8)])
    counts = [0] * 8
    for seed in range(400):
        for dialogue in read(path, count=2, seed=seed):
            counts[int(dialogue.users[0])] += 1
    assert all(65 <= count <= 135 for count in counts), "100 each, within 4 sigma"


def test_what_is_left_out_is_counted_with_its_first_place(tmp_path: Path) -> None:
    answered = {"messages": [user("a"), {"role": "assistant", "content": "b"}]}
    rows = [answered, {"prompt": "c"}, answered, {"messages": [user("a"), user("b")]}, {"prompt": "d"}]
    path, skipped = write_lines(tmp_path / "p.jsonl", rows), Skipped()
    source = open_source(str(path), 0)
    found = read_dialogues(source, Wanted(9, 0, answered=True), skipped=skipped, folder=tmp_path)
    assert [dialogue for _, dialogue in found] == [Dialogue(("a",), ("b",))]
    assert skipped.reasons == {
        "without an answer": (2, f"{path} line 2"),
        "said before": (1, f"{path} line 3"),
        "whose roles are out of order": (1, f"{path} line 4"),
    }
    assert str(skipped).startswith("2 without an answer (first: ")


def test_dialogues_that_differ_in_their_answers_are_one_when_answered_anew(tmp_path: Path) -> None:
    rows = [{"messages": [user("a"), {"role": "assistant", "content": text}]} for text in "xyz"]
    path = write_lines(tmp_path / "p.jsonl", rows)
    assert read(path) == [Dialogue(("a",))]
    assert len(read(path, answered=True)) == 3


def test_a_hub_stream_is_read_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, given = [], []

    def rows():
        for number in range(100_000):
            given.append(number)
            yield {"prompt": str(number)}

    def load(*args: Any, **options: Any) -> datasets.IterableDataset:
        asked.append((args, options))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("coral_core.data.sources.SHUFFLE_ROWS", 50)
    assert len(read("owner/name:chat:train_sft", count=10)) == 10
    assert asked == [(("owner/name", "chat"), {"split": "train_sft", "streaming": True})]
    assert len(given) < 100


def test_a_gated_hub_dataset_names_the_login(monkeypatch: pytest.MonkeyPatch) -> None:
    response = SimpleNamespace(status_code=401, headers={}, request=None)

    def load(*args: Any, **options: Any) -> None:
        refused = HfHubHTTPError("401 Client Error", response=response)
        raise datasets.exceptions.DatasetNotFoundError("it is a gated dataset") from refused

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"If it is private or gated, .* run: hf auth login$"):
        read("owner/name")


def test_a_hub_dataset_that_cannot_be_read_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"Hub dataset owner/name, split train: ConnectionError: no route\. Check"):
        read("owner/name")
