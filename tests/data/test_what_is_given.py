"""What a user gives: answers that are kept, dialogues that are left out and counted, recipes that cannot work."""

import re
import shutil
from pathlib import Path

import pytest

from coral_core.data.estimate import estimate
from coral_core.data.plan import Fit
from coral_core.data.prompts import Dialogue
from coral_core.data.stage import prepare
from coral_core.errors import DataError
from tests.data.helpers import (
    CHATML,
    NOON,
    TAGGED_NEVER,
    make_job,
    make_target,
    write_lines,
)


def answered(count: int) -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Question {number}"},
                {"role": "assistant", "content": f"Answer {number}"},
            ]
        }
        for number in range(count)
    ]


def test_given_answers_are_kept(tmp_path: Path) -> None:
    rows = [*answered(12), {"prompt": "alone"}]
    path = write_lines(tmp_path / "p.jsonl", rows)
    job = make_job(tmp_path, prompts=path, regenerate="none", max_samples=50)
    store = prepare(job)
    assert len(store) == 12
    assert store.manifest.facts["skipped"] == {f"without an answer (first: {path} line 13)": 1}
    texts = {job.target.tokenizer.decode(store[index].ids_T[store[index].answer_T]) for index in range(12)}
    assert texts == {f"Answer {number}<|im_end|>" for number in range(12)}


def test_what_is_too_long_is_left_out_and_counted(tmp_path: Path) -> None:
    """A prompt of a hundred tokens, and one line of ten million characters, which is not even cut into tokens."""
    long = [{"prompt": "q" * 100}, {"prompt": " ".join(map(str, range(1_450_000)))}]
    path = write_lines(tmp_path / "p.jsonl", [*long, *({"prompt": f"q{number}"} for number in range(8))])
    store = prepare(make_job(tmp_path, prompts=path, max_length=60))
    assert store.manifest.facts["dialogues"] == 8
    ((reason, count),) = store.manifest.facts["skipped"].items()
    assert re.fullmatch(rf"whose prompt has data.max_length \(60\) tokens or more \(first: {path} line [12]\)", reason)
    assert count == 2


def test_dialogues_whose_later_turns_are_refused_are_counted(tmp_path: Path) -> None:
    """Nothing may follow the first answer to a q; of an r the template takes all."""
    refusal = (
        "{% if messages[0]['content'][0] == 'q' and messages | length > 2 %}{{ raise_exception('no') }}{% endif %}"
    )
    rows = [{"turns": [f"{letter}{number}", "and?"]} for letter in "qr" for number in range(4)]
    path = write_lines(tmp_path / "p.jsonl", rows)
    store = prepare(make_job(tmp_path, make_target(refusal + CHATML), prompts=path))
    ((reason, count),) = store.manifest.facts["skipped"].items()
    assert reason.startswith("later turns that the chat template or the target cannot take") and count == 4
    assert sum(shard["refused_dialogues"] for shard in store.manifest.facts["shards"]) == 4


def test_a_system_message_that_the_template_drops_before_an_answer_is_learnt_from(tmp_path: Path) -> None:
    """Mistral-7B-Instruct-v0.3's shows it where a user has the last word: each dialogue with an answer was refused."""
    shown = "{% if message['role'] != 'system' or messages[-1]['role'] == 'user' %}{{"
    template = CHATML.replace("{{", shown, 1).replace("{% endfor %}", "{% endif %}{% endfor %}", 1)
    rows = [{"messages": [{"role": "system", "content": "Be brief."}, *row["messages"]]} for row in answered(8)]
    path = write_lines(tmp_path / "p.jsonl", rows)
    job = make_job(tmp_path, make_target(template), prompts=path, regenerate="none")
    store = prepare(job)
    text = job.target.tokenizer.decode(store[0].ids_T)
    assert len(store) == 8 and text.startswith("<|im_start|>user\nBe brief.\n\nQuestion")


def test_a_file_with_every_kind_of_trouble_is_told_line_by_line(tmp_path: Path) -> None:
    """Each reason is counted in the summary, with the line where it first came."""
    user, assistant = ({"role": role, "content": "w" * 30} for role in ("user", "assistant"))
    rows = [
        {"messages": []},
        {"messages": [user, {"role": "assistant", "content": " "}, user, assistant]},
        {"messages": [user, user]},
        {"messages": [assistant, user]},
        {"messages": [user]},
        {"messages": [{**user, "content": "q" * 200}, assistant]},
        {"messages": [{**user, "content": " ".join(map(str, range(1_450_000)))}, assistant]},
        {"messages": [user, {"role": "tool", "content": "x"}]},
        {"messages": [user, {**assistant, "content": "ok " * 300}]},
        {"messages": [user, {**assistant, "content": "caf\ufffd"}]},
    ]
    path = write_lines(tmp_path / "p.jsonl", [*rows, *answered(8), answered(1)[0]])
    facts = prepare(make_job(tmp_path, prompts=path, regenerate="none", max_samples=50, max_length=90)).manifest.facts
    assert (facts["dialogues"], facts["cut_samples"]) == (8, 0)
    told = {
        reason.split(" (first: ")[0]: (count, reason.split(" line ")[1]) for reason, count in facts["skipped"].items()
    }
    assert told == {
        "without a word of a user": (1, "1)"),
        "with an empty message": (1, "2)"),
        "whose roles are out of order": (2, "3)"),
        "without an answer": (1, "5)"),
        "whose first answer begins beyond data.max_length (90 tokens)": (1, "6)"),
        "whose first turn is far longer than data.max_length (90)": (1, "7)"),
        "with a message by none of system, user and assistant": (1, "8)"),
        "with a text that repeats itself over and over": (1, "9)"),
        "with text that was decoded wrongly (control or replacement characters)": (1, "10)"),
        "said before": (1, "19)"),
    }


def test_a_late_turn_of_ten_million_characters_is_not_read_and_the_turns_before_it_stay(tmp_path: Path) -> None:
    long = {"role": "user", "content": " ".join(map(str, range(1_450_000)))}
    rows = [{"messages": [*row["messages"], long, {"role": "assistant", "content": "ok"}]} for row in answered(4)]
    job = make_job(tmp_path, prompts=write_lines(tmp_path / "p.jsonl", rows), regenerate="none", max_samples=4)
    store = prepare(job)
    assert {len(store[index].ids_T) for index in range(4)} == {len("Question 0") + len("Answer 0") + 20}
    assert store.manifest.facts["skipped"] == {}


def test_tokens_of_several_turns_are_counted_once_where_they_make_one_sample(tmp_path: Path) -> None:
    """Counted turn by turn, they would be refused on a disk that holds them twice over."""
    dialogue = Dialogue(("a", "b", "c"))
    keeps, changes = CHATML, CHATML.replace("message['content'] +", "' ' + message['content'] +")
    for template, bound in ((keeps, 20 + 12 + 2 * (1 + 32 + 12)), (changes, 33 + (33 + 45) + (33 + 90))):
        job = make_job(tmp_path, make_target(template), max_length=250)
        assert Fit(job.target, job.recipe.data, NOON).measure(dialogue)[1] == bound


@pytest.mark.parametrize(
    ("template", "rows", "data", "message"),
    [
        (TAGGED_NEVER, answered(9), {"regenerate": "none"}, "line [0-9]: the chat template of 'tiny' marks no token"),
        (CHATML.replace("assistant\\n", "bot\\n"), answered(9), {"regenerate": "none"}, "has no generation tags"),
        (CHATML, answered(3), {}, "gives 3 dialogues, and data.holdout is 3.*Set data.holdout below 3"),
        (
            CHATML,
            [{"prompt": " "}] * 3,
            {},
            r"no dialogue .* can be used; left out: 3 with an empty message \(first: .*line 1\)",
        ),
        (CHATML, answered(9), {"max_length": 500}, "max_length is 500, and the target has 256 positions"),
        (CHATML, None, {"regenerate": "none"}, "self-written prompts have no answers"),
        (CHATML, None, {"max_new_tokens": 1}, "the target wrote only 0 of 16 prompts; left out: .* did not end"),
    ],
)
def test_what_cannot_work_is_one_line_with_a_way_out(tmp_path: Path, template, rows, data, message) -> None:
    if rows is not None:
        data = {**data, "prompts": write_lines(tmp_path / "p.jsonl", rows)}
    with pytest.raises(DataError, match=message):
        prepare(make_job(tmp_path, make_target(template), **data))
    assert not (tmp_path / "data").exists()


def test_a_dry_run_bounds_what_comes_and_makes_nothing(tmp_path: Path) -> None:
    for data in ({}, {"prompts": write_lines(tmp_path / "p.jsonl", answered(9)), "max_samples": 9}):
        expected = estimate(make_job(tmp_path, **data))
        assert not (tmp_path / "data").exists()
        store = prepare(make_job(tmp_path, **data))
        facts = store.manifest.facts
        assert expected.dialogues == facts["dialogues"]
        assert facts["tokens"] <= expected.tokens <= 4 * facts["tokens"]
        assert facts["answer_tokens"] <= expected.written_tokens
        assert sum(shard["size_bytes"] for shard in facts["shards"]) <= 2 * expected.size_bytes
        assert expected.elapsed_s > 0
        shutil.rmtree(store.folder)
