"""A dialogue without a terminal: its words, its caches, its numbers."""

import dataclasses
import signal
from collections.abc import Iterator

import pytest
import torch

from coral_cli.commands import chat
from coral_cli.talk.session import SAMPLE_TOKENS, Piece, Session
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from coral_core.errors import ArtifactError, CoralWarning, DataError
from coral_core.target.target import Target
from coral_core.target.template import render, text_ids
from tests.data.helpers import make_target
from tests.tiny import OracleHead, PlainHead, tiny_drafter

SHAPE = TreeShape(depth=3, nodes=6, topk=2)
ROUNDS_BEHIND = 1 + SHAPE.depth + 1
"""Rows that a drafted turn reads again, at most: one for its feature, and the last round, which the drafter has not."""


@dataclasses.dataclass(frozen=True)
class Counting(Target):
    """A target that notes how many rows each forward takes."""

    rows: list[int] = dataclasses.field(default_factory=list)

    def forward(self, ids_BT: torch.Tensor, **rest: object) -> torch.Tensor:
        self.rows.append(ids_BT.shape[1])
        return super().forward(ids_BT, **rest)  # type: ignore[arg-type]


def counting(**changes: object) -> Counting:
    """A byte-level chat model that never ends an answer by itself."""
    fields = {field.name: getattr(make_target(), field.name) for field in dataclasses.fields(Target)}
    return Counting(**{**fields, "stop_ids": frozenset(), "max_positions": 600, **changes})


def session(target: Target, *, drafted: bool = True, limit: int = 14, sampler: Sampler | None = None) -> Session:
    engine = Engine(target, tiny_drafter(target), PlainHead(target), SHAPE)
    return Session(target, sampler or Sampler(), limit, lambda: engine, drafted=drafted)


def told(rounds: Iterator[list[Piece]]) -> str:
    return "".join(piece.text for pieces in rounds for piece in pieces)


def test_an_answer_that_special_tokens_part_is_known() -> None:
    """The random model says <|im_start|> now and then; the token at which an answer ends parts nothing."""
    target, found = counting(stop_ids=frozenset({0, 2})), set()
    for seed in range(6):
        talk = session(target, drafted=False, limit=60, sampler=Sampler(temperature=1.0, seed=seed))
        told(talk.answer("Hello!"))
        assert talk.last is not None and talk.last.hides == (1 in talk.last.ids)
        found.add(talk.last.hides)
    assert found == {False, True}


def test_that_the_next_turn_does_not_show_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = session(counting(), drafted=False)
    monkeypatch.setattr("coral_core.target.template.hides", lambda *_: True)
    with pytest.warns(CoralWarning, match="the next turn is told both without them. To ask without .*: /clear"):
        chat._turn(talk, "Hello!", False)


QUESTIONS = ("Hello!", "And then?", "Why?")


@pytest.mark.parametrize("drafted", [True, False])
def test_history_is_never_read_again(drafted: bool) -> None:
    """Of every later prompt only the new words are forwarded, though a random model's bytes are no text at all."""
    target = counting()
    talk = session(target, drafted=drafted)
    told(talk.answer(QUESTIONS[0]))
    for question in QUESTIONS[1:]:
        before = talk.length
        target.rows.clear()
        told(talk.answer(question))
        assert talk.last is not None
        new = len(talk.last.prompt) - before
        assert len(question) < new < 60
        assert target.rows[0] <= new + (ROUNDS_BEHIND if drafted else 2) < before


def test_a_prompt_is_what_the_template_says_where_text_tells_it_all() -> None:
    """The kept tokens are those of the whole dialogue's text, token for token, while answers are proper text."""
    target = counting()
    talk = session(target, limit=5)
    talk.messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, you."}]
    talk._said = text_ids(target.tokenizer, render(target.tokenizer, talk.messages, generation_prompt=False).rstrip())
    told(talk.answer("And?"))
    asked = [*talk.messages[:2], {"role": "user", "content": "And?"}]
    assert talk.last is not None
    assert talk.last.prompt == text_ids(target.tokenizer, render(target.tokenizer, asked, generation_prompt=True))


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=1.0, seed=4)], ids=["greedy", "T=1"])
def test_drafted_and_plain_say_the_same_in_every_turn(sampler: Sampler) -> None:
    """Turned on and off in between, too; and each answer is plain decoding's of the prompt without any memory."""
    said = []
    for drafted in ([True] * 3, [False] * 3, [False, True, False]):
        talk = session(counting(), drafted=drafted[0], sampler=sampler)
        for on, question in zip(drafted, QUESTIONS, strict=True):
            talk.draft(on)
            told(talk.answer(question))
            talk.compare()
            assert talk.last is not None
            alone = plain(counting(), talk.last.prompt, sampler, 14)
            assert talk.last.ids == [token for event in alone for token in event.new_ids]
        said.append(talk.messages)
    assert said[0] == said[1] == said[2]


def test_pieces_carry_the_depth_at_which_they_were_drafted() -> None:
    """With an oracle for a drafter, every round is tokens of depth 1, 2, … and one of the target's own."""
    target = counting()
    talk = session(target, drafted=False, limit=20)
    told(talk.answer("Hello!"))
    assert talk.last is not None
    oracle = OracleHead(talk.last.ids, right=1.0)
    engine = Engine(target, tiny_drafter(target), oracle, SHAPE)

    class Following:
        def decode(self, *given: object) -> Iterator[Round]:
            return map(oracle.follow, engine.decode(*given))  # type: ignore[arg-type]

    talk = Session(target, Sampler(), 20, Following, drafted=True)
    rounds = list(talk.answer("Hello!"))
    depths = [[piece.depth for piece in pieces] for pieces in rounds]
    assert depths[0] == [0], "the prefill's token is the target's own"
    assert max(map(max, depths)) >= 2
    assert all(row == [*range(1, len(row)), 0] for row in depths[:-1]), "the last round may be cut by the limit"
    assert talk.drafted.tokens_per_round == 19 / len(talk.drafted.accepted)


class Breaking:
    """Ctrl-C in the k-th round, from inside the model."""

    def __init__(self, engine: Engine, at: int) -> None:
        self.engine, self.at = engine, at

    def decode(self, *given: object) -> Iterator[Round]:
        for number, event in enumerate(self.engine.decode(*given)):  # type: ignore[arg-type]
            if number == self.at:
                signal.raise_signal(signal.SIGINT)
            yield event


@pytest.mark.parametrize("at", [1, 3])
def test_a_stopped_answer_is_kept_as_far_as_it_came_and_the_dialogue_goes_on(at: int) -> None:
    target = counting()
    talk = session(target)
    engine = talk._engine
    assert isinstance(engine, Engine)
    talk._engine = Breaking(engine, at)
    text = told(talk.answer("Hello!"))
    assert talk.last is not None and talk.last.ended == "stopped"
    assert talk.messages[-1] == {"role": "assistant", "content": text}
    assert 0 < len(talk.last.ids) < 14
    talk._engine = engine
    before = talk.length
    target.rows.clear()
    told(talk.answer("Go on."))
    assert target.rows[0] <= len(talk.last.prompt) - before + ROUNDS_BEHIND, "what was said is in the caches"
    alone = plain(counting(), talk.last.prompt, Sampler(), 14)
    assert talk.last.ids == [token for event in alone for token in event.new_ids]


def test_stopped_before_the_first_word_the_question_is_forgotten() -> None:
    talk = session(counting())
    assert isinstance(talk._engine, Engine)
    talk._engine = Breaking(talk._engine, 0)
    assert told(talk.answer("Hello!")) == ""
    assert (talk.messages, talk.length) == ([], 0)


def test_a_reader_may_stop_it_between_rounds() -> None:
    """As a Ctrl-C does that fell into drawing."""
    talk = session(counting())
    seen: list[list[Piece]] = []
    for pieces in talk.answer("Hello!", lambda: len(seen) == 2):
        seen.append(pieces)
    assert talk.last is not None and talk.last.ended == "stopped"
    assert talk.messages[-1]["content"] == "".join(piece.text for pieces in seen for piece in pieces)


def test_why_an_answer_ended() -> None:
    talk = session(counting(max_positions=60), limit=14)
    told(talk.answer("Hi"))
    assert talk.last is not None and talk.last.ended == "limit"
    talk.clear()
    told(talk.answer("Hello, hello, hello, hello, hello!"))
    assert talk.last.ended == "context" and talk.length == 60
    with pytest.raises(DataError, match="context holds 60"):
        told(talk.answer("More"))
    assert len(talk.messages) == 2, "a question that does not fit is not kept"
    talk = session(make_target(), sampler=Sampler(temperature=1.0), limit=200)
    told(talk.answer("Hi"))
    assert talk.last is not None and talk.last.ended == ""


def test_clear_forgets_what_was_said_and_keeps_the_system_prompt() -> None:
    target = counting()
    talk = session(target)
    talk.system = "Be brief."
    first = told(talk.answer("Hello!"))
    assert talk.last is not None
    prompt = talk.last.prompt
    told(talk.answer("More"))
    talk.clear()
    assert (talk.messages, talk.length) == ([], 0)
    assert told(talk.answer("Hello!")) == first and talk.last.prompt == prompt
    assert "Be brief." in target.tokenizer.decode(prompt)


def test_speedup_is_of_this_session_and_says_against_what() -> None:
    """A few plain tokens are decoded only where no answer was plain, once, and they leave no trace in the dialogue."""
    target = counting()
    talk = session(target)
    told(talk.answer("Hello!"))
    assert talk.speedup() is None
    said = (talk.messages, talk.length)
    target.rows.clear()
    talk.compare()
    assert target.rows == [1] * (SAMPLE_TOKENS + 1), "the caches were used as they are"
    assert (talk.messages, talk.length) == said and talk.plain.tokens == 0
    fast = talk.drafted.tokens_per_s
    assert fast and talk.sampled.tokens_per_s
    assert talk.speedup() == (fast / talk.sampled.tokens_per_s, "a sample of 16 plain tokens")
    target.rows.clear()
    talk.compare()
    assert target.rows == []
    talk.draft(False)
    told(talk.answer("Hello!"))
    assert talk.plain.tokens_per_s
    assert talk.speedup() == (fast / talk.plain.tokens_per_s, "13 plain tokens of this session")


def test_a_drafter_that_cannot_be_loaded_leaves_plain_decoding() -> None:
    def absent() -> Engine:
        raise ArtifactError("no drafter in runs/x. Run: coral train")

    talk = Session(counting(), Sampler(), 5, absent, drafted=False)
    with pytest.raises(ArtifactError):
        talk.draft(True)
    assert not talk.speculative and told(talk.answer("Hello!"))
