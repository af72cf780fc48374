"""Drawing from a source of any size: what is left out, what is mixed, and how little stays in memory."""

import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coral_core.data.draw import Wanted, read_dialogues
from coral_core.data.kept import Kept
from coral_core.data.mix import Mix, Stream
from coral_core.data.prompts import Dialogue, Skipped
from coral_core.data.sources import Share, Source, shares
from coral_core.data.stage import prepare
from coral_core.errors import DataError
from tests.data.helpers import make_job, write_lines


def rows(texts: Iterator[str] | list[str]) -> Source:
    return Source(((f"row {number}", {"prompt": text}) for number, text in enumerate(texts, 1)), ordered=True)


def draw(texts: Iterator[str] | list[str], count: int, folder: Path, skipped: Skipped | None = None) -> list[str]:
    found = read_dialogues(rows(texts), Wanted(count, 0, answered=False), skipped=skipped or Skipped(), folder=folder)
    return [dialogue.users[0] for _, dialogue in found]


def test_the_draw_does_not_know_the_order_of_the_rows(tmp_path: Path) -> None:
    texts = [f"q{number}" for number in range(300)]
    drawn = draw(texts, 40, tmp_path)
    assert len(set(drawn)) == 40
    assert draw(texts[::-1], 40, tmp_path) == drawn
    assert draw(texts * 3, 40, tmp_path) == drawn, "what is said thrice is no likelier"


def test_repetitions_are_dropped_however_far_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten texts, a thousand times each, and keys sorted every few rows."""
    monkeypatch.setattr("coral_core.data.draw.SPARE_KEYS", 5)
    skipped = Skipped()
    texts = [f"q{number % 10}" for number in range(10_000)]
    assert sorted(draw(texts, 20, tmp_path, skipped)) == sorted(texts[:10])
    assert skipped.reasons["said before"] == (9990, "row 11")
    assert len(draw(texts, 4, tmp_path)) == 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("caf\ufffd", "decoded wrongly"),
        ("\x00\x01 binary", "decoded wrongly"),
        ("ha" * 400, "repeats itself"),
        ("I will do so.\n" * 100, "repeats itself"),
    ],
)
def test_what_is_text_in_no_language_is_left_out_and_counted(tmp_path: Path, text: str, reason: str) -> None:
    skipped = Skipped()
    assert draw(["good", text], 5, tmp_path, skipped) == ["good"]
    ((found, (count, first)),) = skipped.reasons.items()
    assert (reason in found, count, first) == (True, 1, "row 2")


@pytest.mark.parametrize(
    "text",
    [
        "ha" * 20,
        "خانه‌ها را می‌بینم " * 3,
        "".join(chr(0x4E00 + number) for number in range(2000)),
        "tab\tand\r\nline",
        "😀 🧑‍🚀 fine",
        Path(__file__).read_text(),
        "\n".join(f"{number},{number * number}" for number in range(500)),
    ],
)
def test_what_is_text_in_some_language_stays(tmp_path: Path, text: str) -> None:
    assert draw([text], 5, tmp_path) == [text.strip()]


def peak_bytes(count: int, folder: Path) -> int:
    tracemalloc.start()
    draw((f"question number {number} of many" for number in range(count)), 100, folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coral_core.data.draw.SPARE_KEYS", 500)
    peak_bytes(500, tmp_path)  # what is imported on the way
    small, large = (peak_bytes(count, tmp_path) for count in (2_000, 20_000))
    assert large < 1.3 * small + 50_000, "a set of what was seen took 80 bytes a row"


MILLION = """
import resource, sys
from pathlib import Path
from coral_core.data.estimate import estimate
from tests.data.helpers import make_job, write_lines
folder, rows, samples = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
path = folder / "p.jsonl"
with path.open("w") as file:
    for number in range(rows):
        file.write('{"prompt": "What is %d plus %d, and why would anybody want to know it?"}\\n' % (number, number * 7))
found = estimate(make_job(folder, prompts=path, max_samples=samples, max_length=120))
print(found.dialogues, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_of_process(folder: Path, *arguments: int) -> tuple[int, float]:
    """(dialogues, MB) of a dry run in a process of its own."""
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-c", MILLION, str(folder), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    dialogues, kilobytes = map(int, done.stdout.split())
    return dialogues, kilobytes / 1e3


@pytest.mark.slow
def test_a_million_rows_in_flat_memory(tmp_path: Path) -> None:
    """The whole process, torch included: a million rows and a thousand take the same; so do most of them kept."""
    _, small = peak_of_process(tmp_path, 1_000, 500)
    dialogues, large = peak_of_process(tmp_path, 1_000_000, 500)
    assert (dialogues, large < small + 20) == (500, True), (small, large)
    dialogues, kept = peak_of_process(tmp_path, 1_000_000, 100_000)
    assert (dialogues, kept < small + 60) == (100_000, True), (small, kept)


def test_kept_dialogues_are_read_back_by_number(tmp_path: Path) -> None:
    dialogues = [Dialogue((f"q{number} é",), (), "s" * number) for number in range(5)]
    kept = Kept.nowhere(tmp_path)
    for number, dialogue in enumerate(dialogues):
        kept.append(dialogue, f"line {number}")
        assert kept[number] == dialogue, "reading in between does not disturb writing"
    assert (list(kept), kept.row(3)["where"]) == (dialogues, "line 3")
    kept.save(tmp_path / "p.jsonl")
    assert list(Kept.load(tmp_path / "p.jsonl")) == dialogues


def stream(name: str, weight: float, texts: list[str]) -> Stream:
    return Stream(Share(name, weight), iter([(f"{name} {text}", Dialogue((text,))) for text in texts]))


def test_each_source_keeps_its_share_of_what_is_of_use() -> None:
    """Half of b is of no use: it still has a quarter, and where a source ends the others go on."""
    streams = [stream("a", 3, [f"a{n}" for n in range(60)]), stream("b", 1, [f"b{n}" for n in range(90)])]
    mix, taken = Mix(streams, 0, Skipped()), []
    for _, dialogue in mix:
        if dialogue.users[0][0] == "b" and int(dialogue.users[0][1:]) % 2:
            continue
        mix.take()
        taken.append(dialogue.users[0][0])
        if len(taken) == 40:
            assert (taken.count("a"), taken.count("b")) == (30, 10)
            assert 14 <= taken[:20].count("a") <= 16, "mixed all along"
    assert (taken.count("a"), taken.count("b")) == (60, 45)


def test_what_two_sources_say_comes_once() -> None:
    skipped = Skipped()
    mix = Mix([stream("a", 1, ["x", "y"]), stream("b", 1, ["y", "z", "x"])], 0, skipped)
    assert sorted(dialogue.users[0] for _, dialogue in mix) == ["x", "y", "z"]
    assert skipped.reasons["said before"][0] == 2


def test_a_run_from_two_files_and_the_target(tmp_path: Path) -> None:
    a = write_lines(tmp_path / "a.jsonl", [{"prompt": f"a{n}"} for n in range(20)])
    b = write_lines(tmp_path / "b.jsonl", [{"prompt": f"b{n}"} for n in range(20)])
    store = prepare(make_job(tmp_path, prompts=f"{a}=2, {b}, self=1", max_samples=12))
    assert store.manifest.facts["sources"] == {str(a): 6, str(b): 3, "self": 3}
    assert len(store) == 12


@pytest.mark.parametrize(
    ("prompts", "found"),
    [
        ("self", [("self", 1)]),
        ("a.jsonl=3, owner/name:train=0.5,self", [("a.jsonl", 3), ("owner/name:train", 0.5), ("self", 1)]),
    ],
)
def test_shares(prompts: str, found: list[tuple[str, float]]) -> None:
    assert [(share.name, share.weight) for share in shares(prompts)] == found


def test_a_file_with_a_comma_in_its_name(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a,b=c.jsonl", [{"prompt": "x"}])
    assert shares(str(path)) == [Share(str(path), 1.0)]


@pytest.mark.parametrize("prompts", ["a.jsonl=0", "a.jsonl=-1", "a.jsonl=x", "a.jsonl,,b.jsonl", "=3", "a=inf"])
def test_a_weight_that_is_none(prompts: str) -> None:
    with pytest.raises(DataError, match=r"names no source with a weight above 0\. Write it as chats\.jsonl=3"):
        shares(prompts)


def test_a_source_given_twice() -> None:
    with pytest.raises(DataError, match=r"a\.jsonl stands twice\. Add its weights up"):
        shares("a.jsonl, b.jsonl=2, a.jsonl=3")


def test_a_file_of_several_that_is_not_there(tmp_path: Path) -> None:
    a: Any = write_lines(tmp_path / "a.jsonl", [{"prompt": "a"}])
    with pytest.raises(DataError, match=r"no prompt file nope\.jsonl"):
        prepare(make_job(tmp_path, prompts=f"{a}, nope.jsonl"))
