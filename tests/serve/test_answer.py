"""Prompts as a client means them, and an answer's text as it goes on from them."""

import dataclasses
from typing import Any

import pytest
import tokenizers

from coral_core.decoding.rounds import Round
from coral_core.serve.answer import Answer, Opened
from coral_core.serve.protocol import Ask, Refusal, read_chat, read_completion
from tests.api.test_stream import metaspace
from tests.data.helpers import SPECIAL, make_tokenizer
from tests.serve.helpers import make_service

THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message.name %}{{ message.name + ': ' }}{% endif %}{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if reasoning_effort is defined %}{{ 'Effort: ' + reasoning_effort + '\\n' }}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)


def answer_of(ask: Ask, tokenizer: Any, stop_ids: frozenset[int] = frozenset()) -> Answer:
    service = make_service()
    target = dataclasses.replace(service.target, tokenizer=tokenizer, stop_ids=stop_ids)
    return Answer(dataclasses.replace(service, engine=dataclasses.replace(service.engine, target=target)), ask)


def prompt_of(ask: Ask, tokenizer: Any) -> list[int]:
    request, opened = answer_of(ask, tokenizer).open()
    assert request is not None and isinstance(opened, Opened), opened
    return request.prompt


def chat(**fields: Any) -> Ask:
    return read_chat({"model": "tiny", "messages": [{"role": "user", "content": "q"}], **fields})


def completion(prompt: str | list[int], **fields: Any) -> Ask:
    return read_completion({"model": "tiny", "prompt": prompt, **fields})


@pytest.mark.parametrize("by_ids", [False, True])
def test_a_completion_keeps_the_space_between_its_prompt_and_the_answer(by_ids: bool) -> None:
    """A decoder of sentencepiece leaves out the first space of all, which is the prompt's and not the answer's."""
    tokenizer = metaspace()
    ids = tokenizer.convert_tokens_to_ids(["▁def", "x", "▁return"])
    answer = answer_of(completion(ids[:2] if by_ids else "defx"), tokenizer)
    answer.open()
    assert answer.feed(Round(ids[2:], "prefill"), last=True)[0].text == " return"


def test_an_answer_in_a_chat_begins_without_a_space() -> None:
    tokenizer = make_tokenizer()
    answer = answer_of(chat(), tokenizer)
    answer.open()
    answer.stream.tokenizer = metaspace()
    assert answer.feed(Round(metaspace().convert_tokens_to_ids(["▁return"]), "prefill"), last=True)[0].text == "return"


def with_bos() -> Any:
    """Puts its first special token before each text, as Llama's tokenizers do."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("text", "fields", "bos"),
    [
        ("a", {}, 1),
        ("a", {"add_special_tokens": True}, 1),
        ("a", {"add_special_tokens": False}, 0),
        (f"{SPECIAL[0]}a", {}, 1),  # was 2: the client made the text by the chat template
        (f"{SPECIAL[0]}a", {"add_special_tokens": False}, 1),
        (f"{SPECIAL[0]}a", {"add_special_tokens": True}, 2),
    ],
)
def test_a_text_that_begins_with_the_special_token_gets_no_second_one(text: str, fields: dict, bos: int) -> None:
    tokenizer = with_bos()
    assert prompt_of(completion(text, **fields), tokenizer) == [0] * bos + tokenizer("a")["input_ids"][1:]


def test_a_special_token_after_the_text_stays() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {SPECIAL[0]}", special_tokens=[(SPECIAL[0], 0)]
    )
    assert prompt_of(completion("a"), tokenizer)[-1] == 0


def test_a_request_sets_the_templates_variables() -> None:
    tokenizer = make_tokenizer(THINKING)
    shown = tokenizer.decode(prompt_of(chat(chat_template_kwargs={"enable_thinking": False}), tokenizer))
    assert shown == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    usual = prompt_of(chat(), tokenizer)
    assert tokenizer.decode(usual) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    for idle in ({}, {"enable_thinking": True}, {"never_read": [1, {"a": None}]}):
        assert prompt_of(chat(chat_template_kwargs=idle), tokenizer) == usual
    assert "Effort: low\n" in tokenizer.decode(prompt_of(chat(reasoning_effort="low"), tokenizer))
    both = chat(reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "high"})
    assert "Effort: high\n" in tokenizer.decode(prompt_of(both, tokenizer))
    assert prompt_of(chat(reasoning_effort="low"), make_tokenizer()) == prompt_of(chat(), make_tokenizer())


@pytest.mark.parametrize("name", ["messages", "tools", "now", "generation_prompt", "chat_template", "tokenize"])
def test_a_variable_that_is_not_the_clients_is_refused(name: str) -> None:
    request, refusal = answer_of(chat(chat_template_kwargs={name: 1}), make_tokenizer()).open()
    assert request is None and isinstance(refusal, Refusal)
    assert refusal.body["error"]["param"] == f"chat_template_kwargs.{name}"


def test_a_variable_that_the_template_refuses_is_the_clients_fault() -> None:
    request, refusal = answer_of(chat(chat_template_kwargs={"reasoning_effort": 3}), make_tokenizer(THINKING)).open()
    assert request is None and isinstance(refusal, Refusal) and refusal.status == 400
    assert "refuses a dialogue" in str(refusal)


def test_a_messages_name_is_left_to_the_template() -> None:
    message = {"role": "user", "content": "q", "name": "Ada", "id": "msg_1", "annotations": [{"type": "url"}]}
    ask = read_chat({"model": "tiny", "messages": [message]})
    assert prompt_of(ask, make_tokenizer()) == prompt_of(chat(), make_tokenizer())
    assert "Ada: q" in make_tokenizer().decode(prompt_of(ask, make_tokenizer(THINKING)))


@pytest.mark.parametrize("name", ["tool_calls", "function_call", "reasoning_content", "audio", "prefix", "attachments"])
def test_words_of_a_message_that_the_template_does_not_show_are_refused(name: str) -> None:
    said = {"role": "assistant", "content": "a", name: [{"id": "call_1"}]}
    ask = read_chat({"model": "tiny", "messages": [{"role": "user", "content": "q"}, said]})
    _, refusal = answer_of(ask, make_tokenizer()).open()
    assert isinstance(refusal, Refusal) and refusal.body["error"]["param"] == f"messages[1].{name}"


def test_special_tokens_of_an_answer_are_shown_to_who_asks() -> None:
    """Reasoning that special tokens mark runs into the answer without them; the token that ends it is never shown."""
    tokenizer = make_tokenizer()
    ids = [1, *tokenizer("final")["input_ids"], 1, *tokenizer("four")["input_ids"], 2]
    for fields, text in (({}, "finalfour"), ({"skip_special_tokens": False}, "<|im_start|>final<|im_start|>four")):
        answer = answer_of(chat(**fields), tokenizer, frozenset({2}))
        answer.open()
        assert answer.feed(Round(ids, "prefill"), last=True)[0].text == text
