"""What a row holds beside its words, tokens that the target does not know, and rows whose features are no numbers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from coral_core.data import plan as planning
from coral_core.data.kept import Kept
from coral_core.data.plan import Plan
from coral_core.data.prompts import Dialogue, parse
from coral_core.data.stage import prepare
from coral_core.decoding.engine import plain
from coral_core.decoding.sampling import Sampler
from coral_core.errors import ArtifactError, DataError
from coral_core.serve.answer import Answer, Opened
from coral_core.serve.protocol import Ask, Refusal, read_chat
from tests.data.helpers import CHATML, NOON, make_job, make_target, make_tokenizer, write_lines
from tests.serve.helpers import make_service

THINKING = CHATML.replace(
    "message['content'] +", "('<t>' + message.reasoning + '</t>' if message.reasoning else '') + message['content'] +"
)


def rows(count: int, **fields: Any) -> list[dict[str, Any]]:
    """Dialogues whose answers have these fields."""
    return [
        {
            "messages": [
                {"role": "system", "content": "Be brief.", "name": ""},
                {"role": "user", "content": f"Question {number}", "timestamp": 7},
                {"role": "assistant", "content": f"Answer {number}", **fields},
            ],
            "tools": [{"name": "search"}],
        }
        for number in range(count)
    ]


def test_a_field_is_learnt_where_the_template_shows_it_and_counted_where_not(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", rows(8, reasoning="So", weight=0))
    job = make_job(tmp_path, make_target(THINKING), prompts=path, regenerate="none")
    store = prepare(job)
    text = job.target.tokenizer.decode(store[0].ids_T[store[0].answer_T])
    assert text.startswith("<t>So</t>Answer ")
    unread = {key.split(" ")[0]: count for key, count in store.manifest.facts["unread"].items()}
    assert unread == {"timestamp": 8, "tools": 8, "weight": 8}
    assert all(f"(first: {path} line " in key for key in store.manifest.facts["unread"])


def test_fields_of_answers_go_with_the_answers(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", rows(8, reasoning="So", weight=0))
    store = prepare(make_job(tmp_path, make_target(THINKING), prompts=path))
    assert {key.split(" ")[0] for key in store.manifest.facts["unread"]} == {"timestamp", "tools"}
    assert "<t>" not in (tmp_path / "data" / "prompts.jsonl").read_text()


def test_a_dialogue_with_fields_is_read_back_as_it_was() -> None:
    user = {"role": "user", "content": "q", "mood": "good"}
    row = {"messages": [user, {"role": "assistant", "content": "a"}], "system": "s"}
    dialogue = parse(row, "line 1")
    assert dialogue == Dialogue(("q",), ("a",), "s", ({}, {"mood": "good"}, {}))
    assert parse(json.loads(json.dumps(dialogue.to_row())), "line 1") == dialogue
    assert dialogue.messages(["b"])[1] == user
    assert dialogue.folded().messages([])[0] == {"role": "user", "content": "s\n\nq", "mood": "good"}
    assert parse({"turns": ["q"], "fields": [{"content": "other"}]}, "line 1").messages([])[0]["content"] == "q"


def refusals(ask: Ask, **target: Any) -> list[Any]:
    service = make_service()
    engine = dataclasses.replace(service.engine, target=dataclasses.replace(service.target, **target))
    return [Answer(dataclasses.replace(service, engine=engine), ask).open()[1]]


def test_a_request_whose_fields_the_template_does_not_show_is_refused_by_name() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning": "So"}] * 2
    ask = read_chat({"model": "tiny", "messages": messages[:3]})
    (refusal,) = refusals(ask)
    assert refusal.body["error"]["param"] == "messages[1].reasoning"
    assert "the target's chat template does not show messages[1].reasoning" in str(refusal)
    (opened,) = refusals(ask, tokenizer=make_tokenizer(THINKING))
    assert isinstance(opened, Opened)
    empty = {"refusal": None, "tool_calls": [], "function_call": None, "annotations": []}  # as OpenAI's client sends
    (opened,) = refusals(read_chat({"model": "tiny", "messages": [{"role": "user", "content": "q", **empty}]}))
    assert isinstance(opened, Opened)


ADDED = "<|added|>"
LINE = r"token 259 \(<\|added\|>\) has no row in the target's embedding, which has 259\. Leave it out of the prompt, or"


def extended() -> Any:
    """A tokenizer with one token more than the target has rows for."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([ADDED], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("regenerate", ["sample", "none"])
def test_a_token_without_a_row_is_left_out_or_named(tmp_path: Path, regenerate: str) -> None:
    target = dataclasses.replace(make_target(), tokenizer=extended())
    words = [f"r {ADDED if number == 3 else ''}" for number in range(9)]
    turns = [{"turns": [f"q{number}", word], "answers": ["a", "b"]} for number, word in enumerate(words)]
    job = make_job(tmp_path, target, prompts=write_lines(tmp_path / "p.jsonl", turns), regenerate=regenerate)
    store = prepare(job)
    assert store.manifest.facts["dialogues"] == 8
    ((reason, count),) = store.manifest.facts["skipped"].items()
    assert reason.endswith("line 4)") and "or the target cannot take" in reason and count == 1
    turns = [{"turns": [f"{ADDED} {number}"], "answers": ["a"]} for number in range(9)]
    job = make_job(tmp_path, target, prompts=write_lines(tmp_path / "q.jsonl", turns), regenerate=regenerate)
    with pytest.raises(DataError, match=rf"line \d+: {LINE}"):
        prepare(job)


def test_every_way_to_a_target_says_the_same_of_a_token_without_a_row() -> None:
    tokenizer = extended()
    target = dataclasses.replace(make_target(), tokenizer=tokenizer)
    with pytest.raises(DataError, match=LINE):
        list(plain(target, [5, 259], Sampler(), 4))
    engine = make_service().engine
    with pytest.raises(DataError, match=LINE):
        list(dataclasses.replace(engine, target=target).decode([5, 259], Sampler(), 4))
    with pytest.raises(DataError, match="token -1 has no row"):
        list(plain(target, [5, -1], Sampler(), 4))
    chat = {"model": "tiny", "messages": [{"role": "user", "content": f"a {ADDED}"}]}
    rest: dict[str, Any] = {"max_new_tokens": 4, "sampling": {}}
    for ask in (read_chat(chat), Ask(text=ADDED, **rest), Ask(ids=[259], **rest)):
        (refusal,) = refusals(ask, tokenizer=tokenizer)
        assert refusal.status == 400
        with pytest.raises(Refusal, match=LINE):
            raise refusal


def test_a_row_whose_features_are_no_numbers_is_named_by_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"turns": [question], "answers": ["a"]} for question in (*(f"q{number}" for number in range(8)), "BAD")]
    path = write_lines(tmp_path / "p.jsonl", rows)
    job = make_job(tmp_path, prompts=path, holdout=1, regenerate="none")
    bad = torch.tensor([job.target.tokenizer.convert_tokens_to_ids(letter) for letter in "BAD"])
    own = type(job.target).forward

    def forward(self: Any, ids_BT: torch.Tensor, **options: Any) -> torch.Tensor:
        feature_BTD = own(self, ids_BT, **options)
        if not options:  # the features of given answers are read without a cache
            feature_BTD[(ids_BT.unfold(1, 3, 1) == bad).all(2).any(1)] = float("nan")
        return feature_BTD

    monkeypatch.setattr(type(job.target), "forward", forward)
    with pytest.raises(DataError, match=rf"a feature of dialogue \d+ \({path} line 9\), in shard-0000\d"):
        prepare(job)


@pytest.mark.parametrize("regenerate", ["sample", "none"])
def test_every_rendering_shows_the_day_on_which_the_run_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, regenerate: str
) -> None:
    monkeypatch.setattr(planning, "_today", lambda: NOON)
    target = make_target("{{ strftime_now('%Y-%m-%d') + '\n' }}" + CHATML)
    path = write_lines(tmp_path / "p.jsonl", rows(8))
    store = prepare(make_job(tmp_path, target, prompts=path, regenerate=regenerate, max_length=200))
    held = json.loads((tmp_path / "data" / "holdout.json").read_text())
    texts = [target.tokenizer.decode(ids) for ids in [*held, *(one.ids_T.tolist() for one in store)]]
    assert len(held) == 3 and len(texts) == 11
    assert all(text.startswith("2026-01-01\n<|im_start|>system") for text in texts)


def test_an_interrupted_run_goes_on_with_the_day_on_which_it_began(tmp_path: Path) -> None:
    kept = Kept.nowhere(tmp_path)
    kept.append(Dialogue(("q",)), "p.jsonl line 1")
    plan = Plan(kept, planning.array("q", [3]), [range(1)], {}, {"p.jsonl": 1}, {"weight": (2, "line 4")}, NOON)
    plan.save(tmp_path)
    found = Plan.load(tmp_path)
    assert found is not None
    assert (found.now, found.unread, found.place(0)) == (NOON, plan.unread, "dialogue 0 (p.jsonl line 1)")


@pytest.mark.parametrize("text", ["[1]", "{}", "{", "3"])
def test_a_plan_that_holds_something_else_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"are damaged: plan\.json.*Run: coral prepare-data --restart"):
        Plan.load(tmp_path)
