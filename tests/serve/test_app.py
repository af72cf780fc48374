"""The server as OpenAI's own client sees it."""

import dataclasses
import time
from collections.abc import Iterator

import anyio
import openai
import pytest
from starlette.requests import Request

from coral_core.api.stream import TextStream
from coral_core.decoding.engine import plain
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from coral_core.serve.answer import Answer, Piece, Service, StopText
from coral_core.serve.app import _body
from coral_core.serve.protocol import Refusal
from coral_core.target.template import prompt_ids
from tests.serve.helpers import JSON, ask, make_service, running

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def service() -> Service:
    return make_service()


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with running(service) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def plain_text(service: Service, prompt: list[int], sampler: Sampler, limit: int) -> str:
    ids = [token for event in plain(service.target, prompt, sampler, limit) for token in event.new_ids]
    return str(service.target.tokenizer.decode(ids, skip_special_tokens=True))


SETTINGS = {
    "greedy": ({}, Sampler()),
    "T=1": ({"temperature": 1, "seed": 5}, Sampler(temperature=1, seed=5)),
    "T=0.8": (
        {"temperature": 0.8, "top_p": 0.9, "seed": -1, "extra_body": {"top_k": 30, "repetition_penalty": 1.2}},
        Sampler(temperature=0.8, top_p=0.9, seed=-1, top_k=30, repetition_penalty=1.2),
    ),
}


@pytest.mark.parametrize(("fields", "sampler"), SETTINGS.values(), ids=SETTINGS)
def test_a_chat_is_what_plain_decoding_says(
    client: openai.OpenAI, service: Service, fields: dict, sampler: Sampler
) -> None:
    expected = plain_text(service, prompt_ids(service.target.tokenizer, HELLO), sampler, 30)
    whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=30, **fields)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == "assistant" and whole.choices[0].finish_reason == "length"
    stream = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_completion_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
        **fields,
    )
    chunks = list(stream)
    said = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert said[0].delta.role == "assistant" and said[-1].finish_reason == "length"
    assert "".join(choice.delta.content or "" for choice in said) == expected
    assert len(chunks) > 4, "it is told as it comes"
    for usage in (whole.usage, chunks[-1].usage):
        assert usage.completion_tokens == 30 and usage.total_tokens == usage.prompt_tokens + 30
        assert usage.prompt_tokens == len(prompt_ids(service.target.tokenizer, HELLO))
        assert usage.tokens_per_round >= 1.0


def test_what_a_request_leaves_open_is_as_the_service_has_it(service: Service) -> None:
    own = Sampler(temperature=1.0, top_p=0.8)
    expected = [plain_text(service, [5, 6], dataclasses.replace(own, seed=seed), 24) for seed in (3, 4)]
    assert expected[0] != expected[1] != plain_text(service, [5, 6], Sampler(temperature=1.0, seed=4), 24)
    with running(dataclasses.replace(service, sampler=own)) as address:
        fields = {"model": "tiny", "prompt": [5, 6], "max_tokens": 24}
        answers = [ask(address, "/v1/completions", {**fields, "seed": seed})[1] for seed in (3, 4)]
    assert [answer["choices"][0]["text"] for answer in answers] == expected


def test_without_a_seed_every_answer_is_another_and_its_seed_brings_it_back(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": HELLO, "temperature": 1.0, "max_tokens": 12}
    drawn = [client.chat.completions.create(**asked) for _ in range(4)]
    assert len({answer.choices[0].message.content for answer in drawn}) == len({answer.seed for answer in drawn}) == 4
    for answer in drawn[:2]:
        again = client.chat.completions.create(**asked, seed=answer.seed)
        assert (again.choices[0].message.content, again.seed) == (answer.choices[0].message.content, answer.seed)
    asked["stream"] = True
    chunks = list(client.chat.completions.create(**asked))
    (seed,) = {chunk.seed for chunk in chunks}
    again = list(client.chat.completions.create(**asked, seed=seed))
    texts = ["".join(chunk.choices[0].delta.content or "" for chunk in answer) for answer in (chunks, again)]
    assert texts[0] == texts[1]


def test_a_completion_takes_text_or_its_ids(client: openai.OpenAI, service: Service) -> None:
    ids = service.target.tokenizer("Once upon")["input_ids"]
    expected = plain_text(service, ids, Sampler(), 24)
    for prompt in ("Once upon", ids):
        whole = client.completions.create(model="tiny", prompt=prompt)
        assert whole.choices[0].text == expected, "the recipe's limit, where a request has none"
        stream = client.completions.create(model="tiny", prompt=prompt, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI, service: Service) -> None:
    """It may begin in one round and end in another; tokens are counted up to where it is complete."""
    ids = [token for event in plain(service.target, [5, 6], Sampler(), 24) for token in event.new_ids]
    stream = TextStream(service.target.tokenizer)
    texts = [stream.feed([token]) and stream.text for token in ids]
    for start in (3, 6, 9):
        stop = stream.text[start : start + 3]
        expected = stream.text[: stream.text.index(stop)]
        fields = {"model": "tiny", "prompt": [5, 6], "max_tokens": 24, "stop": [stop, "never said"]}
        answer = client.completions.create(**fields)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
        assert answer.usage.completion_tokens == 1 + next(n for n, text in enumerate(texts) if stop in text)
        chunks = list(client.completions.create(**fields, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_a_stop_token_ends_the_answer() -> None:
    with running(make_service(stopping=True)) as address:
        body = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 200, "temperature": 1, "seed": 3}
        _, answer = ask(address, "/v1/completions", body)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert 1 <= answer["usage"]["completion_tokens"] < 200


def test_held_back_text_is_told_when_it_is_no_stop_string() -> None:
    stop = StopText(["abc", "bd"])
    assert [stop.feed(text) for text in ("xa", "b", "ab", "x", "b")] == ["x", "", "ab", "abx", ""]
    assert (stop.held, stop.hit) == ("b", False)
    assert (stop.feed("dz"), stop.hit) == ("", True)


def test_models_and_health(client: openai.OpenAI, address: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "coral"
    with pytest.raises(openai.NotFoundError, match="no model 'other' here"):
        client.models.retrieve("other")
    assert ask(address, "/health") == (200, {"status": "ok", "active": 0, "waiting": 0})


def test_the_clients_own_errors_are_raised(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=9)
    assert wrong.value.param == "temperature" and "must be a number from 0 to 2" in wrong.value.message
    for streamed in (False, True):
        with pytest.raises(openai.BadRequestError) as long:
            client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1000, stream=streamed)
        assert long.value.code == "context_length_exceeded"
        room = 256 - len(prompt_ids(make_service().target.tokenizer, HELLO))
        assert f"and the context holds 256; ask for {room} tokens at most" in long.value.message
    with pytest.raises(openai.BadRequestError, match="the context holds 256; give another prompt"):
        client.completions.create(model="tiny", prompt=[5] * 256)
    with pytest.raises(openai.NotFoundError, match="/v1/responses: Not Found. Ask for POST /v1/chat/completions, "):
        client.responses.create(model="tiny", input="x")
    with pytest.raises(openai.BadRequestError, match="token 259 has no row in the target's embedding, which has 259"):
        client.completions.create(model="tiny", prompt=[5, 259])


FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/", None, None, 404),
        ("GET", "/v1/chat/completions", None, None, 405),
        ("POST", "/v1/models", {}, None, 405),
        ("POST", "/v1/completions", b"{}", None, 415),
        ("POST", "/v1/completions", b"prompt=x", FORM, 415),
        ("POST", "/v1/completions", {"prompt": "x" * 2_000_000}, None, 413),
        ("POST", "/v1/chat/completions", b"{", JSON, 400),
    ],
)
def test_every_error_has_openais_form(
    address: str, method: str, path: str, body: bytes | dict | None, headers: dict | None, status: int
) -> None:
    answered, value = ask(address, path, body, method, headers)
    assert answered == status
    assert set(value["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_never_comes_is_given_up(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coral_core.serve.app.BODY_S", 0.2)

    def slowly() -> Iterator[bytes]:
        yield b'{"model": '
        time.sleep(1)

    assert ask(address, "/v1/completions", slowly(), headers=JSON)[0] == 408


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_bug() -> None:
    """Starlette raises an error of its own, which would be logged with a traceback."""
    told = [{"type": "http.request", "body": b'{"model": ', "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> dict[str, object]:
        return told.pop(0)

    request = Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, receive)
    with pytest.raises(Refusal, match="did not arrive whole"):
        anyio.run(_body, request)


def test_a_bug_in_one_answer_is_500_and_the_next_one_is_answered(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = Answer.feed

    def broken(answer: Answer, event: Round, last: bool) -> tuple[Piece, bool]:
        if event.kind != "prefill" and answer.ask.max_new_tokens == 7:
            raise ValueError("a bug")
        return feed(answer, event, last)

    monkeypatch.setattr(Answer, "feed", broken)
    fields = {"model": "tiny", "prompt": "x", "max_tokens": 7}
    with running(service) as address:
        status, failed = ask(address, "/v1/completions", fields)
        assert status == 500 and failed["error"]["type"] == "server_error"
        assert "a bug" not in str(failed)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with client, pytest.raises(openai.APIError, match="the answer failed"):
            list(client.completions.create(**fields, stream=True))
        assert ask(address, "/v1/completions", {**fields, "max_tokens": 5})[0] == 200
