"""A message's words reach the target, in the form its template takes; what a template drops is refused, not lost.

The templates are as small as they can be, after published ones.
"""

import datetime

import pytest
import transformers

from coral_core.errors import DataError
from coral_core.target import template
from coral_core.target.template import Encoded, encode, keeps_turns, prompt_ids, render, shown_fields, takes_system
from tests.data.helpers import SPECIAL, make_tokenizer

USER = {"role": "user", "content": "Which way is north?"}
ANSWER = {"role": "assistant", "content": "Towards the pole star."}
OPEN, CLOSE = "<|im_start|>{{ message['role'] }}\n", "<|im_end|>\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def each(content: str, before: str = "") -> str:
    """A ChatML template that shows a message's content so."""
    return before + "{% for message in messages %}" + OPEN + content + CLOSE + "{% endfor %}" + PROMPT


PARTS = "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
EITHER = "{% if message['content'] is string %}{{ message['content'] }}{% else %}" + PARTS + "{% endif %}"
TEXT = "{{ message['content'] }}"
THOUGHTLESS = "{{ message['content'].split('</think>')[-1] }}"
ROLES = "{% if message['role'] == 'user' %}" + PARTS + "{% else %}{{ message['content'] + '' }}{% endif %}"
DATED = each(TEXT, "Today is {{ strftime_now('%d %b %Y') }}.\n")
TAKEN = {
    "text": each(TEXT),
    "parts": each(PARTS),
    "either": each(EITHER),
    "parts of users alone": each(ROLES),
    "the first part by its number": each("{{ message['content'][0]['text'] }}"),
    "stripped": each("{{ message['content'] | trim }}"),
    "spaces squeezed": each("{{ message['content'].split() | join(' ') }}"),
    "capitals": each("{{ message['content'] | upper }}"),
    "escaped": each("{{ message['content'] | e }}"),
    "as JSON": each("{{ message['content'] | tojson }}"),
    "a switch left out": each("{{ message['content'].replace('/no_think', '') }}"),
    "reasoning left out": each(THOUGHTLESS),
    "dated": DATED,
    "tagged parts": (
        "{% for message in messages %}" + OPEN + "{% if message['role'] == 'user' %}" + PARTS + CLOSE + "{% else %}"
        "{% generation %}" + PARTS + CLOSE.strip() + "{% endgeneration %}\n{% endif %}{% endfor %}" + PROMPT
    ),
}


def answered(tokenizer: transformers.PreTrainedTokenizerFast, piece: Encoded) -> str:
    """What the mask takes for the target's."""
    return tokenizer.decode([token for token, own in zip(piece.ids, piece.answer, strict=True) if own])


def tokenizer_of(text: str) -> transformers.PreTrainedTokenizerFast:
    return make_tokenizer(text)


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("words", ["Which way?\n\n  'north' & \"south\"?", "Hi", "Straße /no_think", "π ≈ 3.14\t<b>"])
def test_the_words_are_in_the_rendering(name: str, words: str) -> None:
    """A template that takes parts shows nothing of a text: 20 samples were published, and they were one."""
    tokenizer = tokenizer_of(TAKEN[name])
    other = prompt_ids(tokenizer, [USER])
    asked = prompt_ids(tokenizer, [{"role": "user", "content": words}])
    assert asked != other
    assert "type" not in tokenizer.decode(asked)
    stop_ids = tokenizer.convert_tokens_to_ids(SPECIAL[2:])
    (piece,) = encode(tokenizer, [{"role": "user", "content": words}, ANSWER], stop_ids)
    answer = answered(tokenizer, piece).lower()
    assert "pole" in answer and words.split()[0].lower() not in answer


DROPPING = {
    "everything": each(""),
    "users": each("{% if message['role'] != 'user' %}{{ message['content'] }}{% endif %}"),
    "all but a list, which is printed": each(
        "{% if message['content'] is not string %}{{ message['content'] }}{% endif %}"
    ),
    "parts of another kind": each(PARTS.replace("'text' %}", "'words' %}")),
}


@pytest.mark.parametrize("name", DROPPING)
def test_a_template_that_drops_a_role_is_refused(name: str) -> None:
    """However short the words: a word of one letter is found in any text."""
    tokenizer = tokenizer_of(DROPPING[name])
    with pytest.raises(DataError, match=r"the chat template of 'tiny' leaves out the words of .* role user"):
        prompt_ids(tokenizer, [{"role": "user", "content": "a"}])


def test_words_that_are_dropped_for_what_they_are() -> None:
    tokenizer = tokenizer_of(each("{{ message['content'] if 'secret' not in message['content'] else '' }}"))
    prompt_ids(tokenizer, [USER])
    with pytest.raises(DataError, match=r"leaves out the words of message 2 \(role assistant\)"):
        prompt_ids(tokenizer, [USER, {"role": "assistant", "content": "A secret place."}, USER])


def test_a_template_with_generation_tags_is_looked_at_too() -> None:
    words = "{{ message['content'] if 'secret' not in message['content'] else '' }}"
    text = TAKEN["tagged parts"].replace(PARTS, words)
    with pytest.raises(DataError, match=r"leaves out the words of message 2 \(role assistant\)"):
        encode(tokenizer_of(text), [USER, {"role": "assistant", "content": "A secret place."}], [])


def test_an_answer_may_be_shown_from_where_its_reasoning_ends() -> None:
    """However a template knows that place."""
    tokenizer = tokenizer_of(each("{{ message['content'].split('</why>')[-1] }}"))
    answer = "Towards the pole star, which stands above the end of the earth's axis, as far as eyes can tell."
    messages = [USER, {"role": "assistant", "content": f"<why>Which star?</why>{answer}"}]
    assert answer in render(tokenizer, messages) and "Which star" not in render(tokenizer, messages)


SHORTENED = {
    "EXAONE-Deep": ("thought", "{{ message['content'].split('</thought>')[-1].lstrip('\n') }}"),
    "Hunyuan": ("think", "{{ message['content'].split('<answer>')[-1].strip('</answer>').strip() }}"),
}


@pytest.mark.parametrize("name", SHORTENED)
def test_an_earlier_answer_may_be_shown_without_its_reasoning_and_tags(name: str) -> None:
    """With 64 letters and more in the last words, and with less: the tags themselves are not looked for."""
    reasoning, shown = SHORTENED[name]
    tokenizer = tokenizer_of(each("{% if loop.last %}" + TEXT + "{% else %}" + shown + "{% endif %}"))
    for answer in (ANSWER["content"], "It is north." * 9, "Use <b>bold</b>"):
        tagged = f"<answer>\n{answer}\n</answer>" if name == "Hunyuan" else answer
        words = f"<{reasoning}>\nWhich star?\n</{reasoning}>\n{tagged}"
        assert answer in render(tokenizer, [USER, {"role": "assistant", "content": words}, USER])
    assert not keeps_turns(tokenizer, tokenizer.convert_tokens_to_ids(SPECIAL[2:]))
    dropped = tokenizer_of(each("{% if loop.last %}" + TEXT + "{% endif %}"))
    with pytest.raises(DataError, match=r"leaves out the words of message 2 \(role assistant\)"):
        prompt_ids(dropped, [{"role": "user", "content": ""}, {"role": "assistant", "content": words}, USER])


def test_a_system_message_that_is_shown_in_the_last_message_alone_is_not_taken() -> None:
    """Mistral-7B-Instruct-v0.3 puts it before the user's words, where these are the last message."""
    text = (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
        "{% for message in rest %}{% if message['role'] == 'user' %}<|im_start|>"
        "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ message['content'] }}\n"
        "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_of(text)
    assert "Be brief." in render(tokenizer, [{"role": "system", "content": "Be brief."}, USER])
    assert takes_system(tokenizer, answered=False) and not takes_system(tokenizer, answered=True)


def test_a_system_message_that_is_dropped_or_refused_is_not_taken() -> None:
    system = "{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    for text, taken in ((each(TEXT), True), (each(PARTS), True), (each(system + TEXT), False)):
        assert takes_system(tokenizer_of(text), answered=True) is taken
    dropped = tokenizer_of(each("{% if message['role'] != 'system' %}{{ message['content'] }}{% endif %}"))
    assert not takes_system(dropped, answered=False)
    with pytest.raises(DataError, match="leaves out the words of messages of the role system"):
        prompt_ids(dropped, [{"role": "system", "content": "."}, USER])


def test_a_template_that_breaks_says_so_in_one_line() -> None:
    for text in (each("{{ message['content'] / 2 }}"), each("{{ message.content.nothing.at_all }}"), "{% for %}"):
        with pytest.raises(DataError, match="the chat template of 'tiny' refuses a dialogue: ") as error:
            prompt_ids(tokenizer_of(text), [USER])
        assert "\n" not in str(error.value)


def test_a_date_is_the_same_in_both_renderings_that_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """At midnight the prompt's date was another than the answer's, and the answer could not be told."""
    days = iter(range(1, 28))

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Clock":
            return cls(2026, 1, next(days))

    monkeypatch.setattr(template.datetime, "datetime", Clock)
    tokenizer = tokenizer_of(DATED)
    (piece,) = encode(tokenizer, [USER, ANSWER], tokenizer.convert_tokens_to_ids(SPECIAL[2:]))
    text = tokenizer.decode(piece.ids)
    assert text.startswith("Today is 0") and text.count("Today") == 1
    assert tokenizer.decode([token for token, own in zip(piece.ids, piece.answer, strict=True) if own]).startswith(
        "Tow"
    )
    then = datetime.date(2020, 5, 4)
    shown = render(tokenizer, [USER], now=Clock.combine(then, datetime.time()))
    assert shown.startswith("Today is 04 May 2020.")


def test_fields_that_the_template_shows() -> None:
    thinking = each(
        "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}" + TEXT
    )
    messages = [USER, ANSWER | {"reasoning_content": "Stars move.", "weight": 1}]
    assert shown_fields(tokenizer_of(thinking), messages) == {"reasoning_content"}
    assert shown_fields(tokenizer_of(each(TEXT)), messages) == frozenset()
    named_only = each(TEXT + "{# weight #}")
    assert shown_fields(tokenizer_of(named_only), messages) == frozenset()
