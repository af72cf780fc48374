"""What begins with a slash: each command, and each slip in one line."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from coral_cli.talk.commands import _told, run
from coral_cli.talk.session import Session, Tally
from coral_core.decoding.engine import Engine
from coral_core.decoding.policy.costs import Costs
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.sampling import Sampler
from coral_core.errors import CoralError
from tests.cli.test_chat_session import counting, session, told
from tests.data.helpers import make_target
from tests.tiny import PlainHead, tiny_drafter

NO_SYSTEM = "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
NO_SYSTEM += "{{ message['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture
def talk() -> Session:
    return session(counting())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/clera", "unknown command /clera; did you mean /clear?"),
        ("/Temperature 1", "unknown command /Temperature; did you mean /temperature?"),
        ("/?", "unknown command /?; there are /clear /stats /system /temperature /speculative /save /exit"),
        ("/temperature hot", "temperature 'hot' must be a number from 0"),
        ("/temperature -1", "temperature '-1' must be a number from 0"),
        ("/temperature nan", "temperature 'nan' must be a number from 0"),
        ("/temperature inf", "temperature 'inf' must be a number from 0"),
        ("/speculative yes", "/speculative 'yes' must be on or off"),
        ("/save", "/save needs a file to write to"),
        ("/save x.json", "there is no answer to save yet"),
    ],
)
def test_a_slip_is_one_line(talk: Session, line: str, message: str) -> None:
    with pytest.raises(CoralError, match=re.escape(message)) as slip:
        run(talk, line)
    assert "\n" not in str(slip.value)


def test_temperature_is_the_samplers_and_nothing_else_changes(talk: Session) -> None:
    before = talk.sampler
    assert "0.7 from now on" in run(talk, "/temperature 0.7")
    assert talk.sampler == type(before)(temperature=0.7, seed=before.seed)
    assert "is 0.7" in run(talk, "/temperature")
    sampled = told(talk.answer("Hello!"))
    other = session(counting(), drafted=False, sampler=talk.sampler)
    assert told(other.answer("Hello!")) == sampled != told(session(counting()).answer("Hello!"))


def test_speculative_on_and_off(talk: Session) -> None:
    assert "off" in run(talk, "/speculative off") and not talk.speculative
    told(talk.answer("Hello!"))
    assert (talk.plain.answers, talk.drafted.answers) == (1, 0)
    run(talk, "/speculative on")
    told(talk.answer("Hello!"))
    assert (talk.plain.answers, talk.drafted.answers) == (1, 1)
    assert "is on" in run(talk, "/speculative")


def test_system_sets_shows_and_removes(talk: Session) -> None:
    assert "no system prompt" in run(talk, "/system")
    run(talk, "/system  You are a pirate. ")
    assert run(talk, "/system") == "the system prompt is: You are a pirate."
    told(talk.answer("Hello!"))
    assert talk.last is not None
    assert talk.target.tokenizer.decode(talk.last.prompt).startswith("<|im_start|>system\nYou are a pirate.<|im_end|>")
    assert "stays" in run(talk, "/clear")
    run(talk, "/system -")
    assert talk.opening == []
    assert run(talk, "/clear") == "the dialogue is forgotten"


def test_a_dialogue_after_clear_draws_anew(talk: Session) -> None:
    run(talk, "/temperature 1")
    first = told(talk.answer("Hello!"))
    run(talk, "/clear")
    assert told(talk.answer("Hello!")) != first


def test_a_template_without_system_prompts_says_so() -> None:
    talk = session(make_target(NO_SYSTEM))
    with pytest.raises(CoralError, match="shows no system prompt"):
        run(talk, "/system Be brief.")
    assert talk.opening == []


def test_stats_tell_both_ways_of_decoding_and_the_speedup(talk: Session) -> None:
    assert "drafted: no answer yet" in run(talk, "/stats")
    told(talk.answer("Hello!"))
    talk.compare()
    assert "against a sample of 16 plain tokens" in run(talk, "/stats")
    run(talk, "/speculative off")
    told(talk.answer("And?"))
    stats = run(talk, "/stats")
    assert re.search(r"drafted: 1 answer, 13 tokens after the first, [\d.]+ tokens/s, tau [\d.]+", stats)
    assert re.search(r"plain: 1 answer, 13 tokens after the first, [\d.]+ tokens/s", stats)
    assert re.search(r"speedup: [\d.]+x plain decoding, against 13 plain tokens of this session", stats)
    assert f"dialogue: 2 turns, {talk.length} of 600 tokens" in stats


def test_stats_say_how_many_rounds_drafted_nothing() -> None:
    target = counting()
    dear = Costs(step_s=1, verify={1: 1.0, 2: 2.0}, level={1: 1.0}, base=1.0)
    engine = Engine(target, tiny_drafter(target), PlainHead(target), TreeShape(depth=3, nodes=6, topk=2), dear)
    talk = Session(target, Sampler(), 14, lambda: engine, drafted=True)
    told(talk.answer("Hello!"))
    plain_rounds, rounds = talk.drafted.plain_rounds, len(talk.drafted.accepted)
    assert 0 < plain_rounds < rounds
    assert f"{plain_rounds} of {rounds} rounds were plain steps: drafting did not pay" in run(talk, "/stats")


def test_stats_say_how_many_rounds_copied() -> None:
    tally = Tally(answers=1, tokens=12, elapsed_s=1.0, accepted=[2, 3, 4], copied_rounds=2)
    assert _told("drafted", tally).endswith("2 drafted a copy of the text")
    assert "copy" not in _told("drafted", dataclasses.replace(tally, copied_rounds=0))


def test_save_writes_the_messages_once(talk: Session, tmp_path: Path) -> None:
    run(talk, "/system Be brief.")
    said = told(talk.answer("Grüß dich!"))
    file = tmp_path / "a dialogue.json"
    assert run(talk, f"/save {file}") == f"2 messages saved to {file}"
    assert json.loads(file.read_text(encoding="utf-8")) == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Grüß dich!"},
            {"role": "assistant", "content": said},
        ]
    }
    assert "Grüß" in file.read_text(encoding="utf-8"), "people read it"
    before = file.read_bytes()
    told(talk.answer("More"))
    with pytest.raises(CoralError, match="is there already, and is left as it is"):
        run(talk, f"/save {file}")
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("place", ["absent/x.json", "file/x.json", "x" * 300, "~no-such-user-here/x.json"])
def test_a_place_that_cannot_be_written_is_one_line(talk: Session, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    told(talk.answer("Hello!"))
    path = place if place.startswith("~") else str(tmp_path / place)
    with pytest.raises(CoralError, match="cannot write") as slip:
        run(talk, f"/save {path}")
    assert "\n" not in str(slip.value)
    assert [child.name for child in tmp_path.iterdir()] == ["file"]
