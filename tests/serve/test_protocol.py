"""Requests read, and each bad one refused by the name of its field."""

import dataclasses

import pytest

from coral_core.serve.protocol import Refusal, parse, read_chat, read_completion

HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


def test_a_chat_request_is_read() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ask = read_chat(
        {
            "model": "tiny",
            "messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}],
            "max_completion_tokens": 7,
            "temperature": 0.5,
            "seed": -3,
            "stop": "x",
            "stream": True,
            "stream_options": {"include_usage": True},
            "user": "somebody",
            "n": 1,
            "tools": [],
        }
    )
    assert ask.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ab"}]
    assert (ask.max_new_tokens, ask.sampling, ask.stops) == (7, {"temperature": 0.5, "seed": -3}, ("x",))
    assert ask.stream and ask.include_usage


@pytest.mark.parametrize(
    ("prompt", "text", "ids"), [("a", "a", None), (["a"], "a", None), ([1, 2], None, [1, 2]), ([[3]], None, [3])]
)
def test_a_completion_takes_a_text_or_ids(prompt: object, text: str | None, ids: list[int] | None) -> None:
    ask = read_completion({"model": "tiny", "prompt": prompt, "max_tokens": 3})
    assert (ask.text, ask.ids, ask.messages, ask.max_new_tokens) == (text, ids, None, 3)


IDLE = {
    "verbosity": "low",
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_retention": "24h",
    "service_tier": "flex",
    "parallel_tool_calls": True,
    "reasoning_effort": "low",
    "skip_special_tokens": True,
    "add_special_tokens": False,
    "spaces_between_special_tokens": True,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "ignore_eos": False,
    "min_tokens": 0,
    "stop_token_ids": [],
    "length_penalty": 1.0,
    "request_id": "r",
    "cache_prompt": True,
}


def test_fields_that_ask_for_nothing_are_taken() -> None:
    """Clients send them to any server."""
    asked = dataclasses.replace(read_chat(HELLO | IDLE), variables={})
    assert asked == read_chat(HELLO)


def test_vllms_word_for_no_top_k_is_taken() -> None:
    assert read_chat(HELLO | {"top_k": -1}).sampling == {"top_k": 0}


def test_null_is_absent() -> None:
    fields = parse(b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stop": null, "seed": null}')
    ask = read_chat(fields)
    assert (ask.stops, ask.sampling, ask.max_new_tokens, ask.stream) == ((), {}, None, False)


BODIES = {
    b"": "not JSON",
    b"{": "not JSON",
    b"\xff\xfe": "not JSON",
    b"[]": "must be a JSON object",
    b'"text"': "must be a JSON object",
    b'{"temperature": NaN}': "NaN is no JSON number",
    b'{"seed": ' + b"9" * 5000 + b"}": "not JSON",
    b'{"a": "\\ud800"}': "half of a surrogate pair",
    b"[" * 200_000: "nested too deeply",
}


@pytest.mark.parametrize(("body", "message"), BODIES.items(), ids=range(len(BODIES)))
def test_a_body_that_cannot_be_read(body: bytes, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        parse(body)


WRONG = {
    "model": [1],
    "messages": ["x", [], [3], [{}], [{"role": "tool", "content": "x"}], [{"role": [], "content": "x"}]],
    "max_tokens": [0, -1, 1.5, "7", True, 10**12],
    "max_completion_tokens": [0, []],
    "temperature": [-0.1, 2.1, "0", True, [], 1e400],
    "top_p": [0, 1.1, "x"],
    "top_k": [-2, 0.5],
    "min_p": [2, -1],
    "repetition_penalty": [0, 11],
    "seed": [0.5, "x", 2**63, False],
    "stop": [3, "", [""], ["a"] * 5, [1], {}, "x" * 257],
    "stream": ["yes", 1],
    "stream_options": [3, {"include_usage": 1}],
    "n": [2, 0, "x"],
    "logprobs": [True],
    "logit_bias": [{"3": 1}],
    "presence_penalty": [0.5],
    "tools": [[{"type": "function"}]],
    "tool_choice": ["required", {}],
    "response_format": [{"type": "json_object"}, 3],
    "modalities": [["audio"]],
    "chat_template_kwargs": [3, [], "enable_thinking"],
    "reasoning_effort": [3, ["low"]],
    "add_special_tokens": [True],
    "skip_special_tokens": [1, "no"],
    "ignore_eos": [True, 0],
    "min_tokens": [5],
    "stop_token_ids": [[3]],
    "grammar": ["root ::= x"],
    "temperatur": [1],
    "x" * 1000: [1],
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{name[:12]}-{n}" for n, (name, _) in enumerate(CASES)])
def test_a_field_that_cannot_be_used_is_named(name: str, value: object) -> None:
    with pytest.raises(Refusal) as refused:
        read_chat({**HELLO, name: value})
    error = refused.value.body["error"]
    assert error["param"].startswith(name[:60])
    assert error["type"] == "invalid_request_error" and 5 < len(error["message"]) < 300


@pytest.mark.parametrize("content", [None, 3, [], ["x"], [{"type": "image_url"}], [{"type": "text", "text": 3}]])
def test_content_that_is_no_text(content: object) -> None:
    with pytest.raises(Refusal, match=r"messages\[0\].content must be a text"):
        read_chat({"model": "tiny", "messages": [{"role": "user", "content": content}]})


@pytest.mark.parametrize("prompt", [None, "", [], ["a", "b"], [1, "a"], [True], 3, {}, [[]], [""]])
def test_a_prompt_that_is_none(prompt: object) -> None:
    with pytest.raises(Refusal, match="'prompt' must be one text"):
        read_completion({"model": "tiny", "prompt": prompt})


@pytest.mark.parametrize("logprobs", [0, 5])
def test_log_probabilities_are_refused_and_not_left_out(logprobs: int) -> None:
    """A completion's 0 asks for the chosen tokens' own."""
    with pytest.raises(Refusal, match="'logprobs' is"):
        read_completion({"model": "tiny", "prompt": "x", "logprobs": logprobs})


def test_a_field_that_is_nearly_one_is_told_the_other() -> None:
    with pytest.raises(Refusal, match=r"unknown field 'temprature'; did you mean 'temperature'\?"):
        read_chat(HELLO | {"temprature": 1})
    with pytest.raises(Refusal, match="unknown field 'grammar'; leave it out"):
        read_chat(HELLO | {"grammar": "root ::= x"})


def test_what_belongs_to_the_other_kind_is_unknown() -> None:
    with pytest.raises(Refusal, match="unknown field 'messages'"):
        read_completion({**HELLO, "prompt": "x"})
