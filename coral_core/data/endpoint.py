"""A server that answers in the target's place, over OpenAI's chat protocol: vLLM, SGLang, transformers serve.

The server brings throughput, and the answers come back as text; features are still tapped here. The standard library's
client is enough: one request is one whole answer, and the waiting is done by threads.
Protocol: https://platform.openai.com/docs/api-reference/chat/create
"""

import dataclasses
import http.client
import itertools
import json
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from coral_core.errors import DataError
from coral_core.target.template import Message

TRIES = 8
"""Requests for one answer before giving up: with the waits between them, two minutes of a server that is away."""
LONGEST_WAIT_S = 60.0
CHECK_S = 20.0
"""How long a server may take to say which models it has."""
ANSWER_S = 1800.0
"""How long one answer may take, the server's queue included."""
TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the server wrote."""

    text: str
    ended: bool
    """Whether the target stopped of itself; else its limit was reached."""


class Endpoint:
    """One server, or several that share the work: each request goes to the next, a repeated one too.

    `wait` is how a thread waits between two tries; it raises to break off.
    """

    def __init__(self, urls: str, model: str, key: str, wait: Callable[[float], None]) -> None:
        self.urls = [url.strip().rstrip("/") for url in urls.split(",")]
        self._names = dict.fromkeys(self.urls, model)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._turns = itertools.cycle(self.urls)
        self._lock = threading.Lock()
        self._wait = wait

    def check(self) -> None:
        """Ask every server for its models; one that serves a single model is asked for it under its own name.

        Raises DataError, naming the server, when one does not answer.
        """
        for url in self.urls:
            try:
                models = [entry["id"] for entry in self._ask(f"{url}/models", None, CHECK_S)["data"]]
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
                if isinstance(error, urllib.error.HTTPError) and error.code >= 500:
                    continue  # somebody is there: `transformers serve` fails so where no model was ever downloaded
                raise DataError(
                    f"no server answers at data.endpoint {url} ({_reason(error)}). Start it (for instance: vllm serve "
                    "MODEL; the address ends in /v1), or leave data.endpoint out"
                ) from error
            if len(models) == 1:
                self._names[url] = models[0]

    def reply(self, messages: Sequence[Message], limit: int, temperature: float, seed: int) -> Reply:
        """One answer of at most `limit` tokens. Raises DataError when the server refuses, or is away for too long."""
        body = {"messages": list(messages), "max_tokens": limit, "temperature": temperature, "stream": False}
        if temperature:
            body |= {"top_p": 1.0, "seed": seed}
        last: Exception | None = None
        for attempt in range(TRIES):
            with self._lock:
                url = next(self._turns)
            try:
                return _reply(self._ask(f"{url}/chat/completions", body | {"model": self._names[url]}, ANSWER_S), url)
            except urllib.error.HTTPError as error:
                if error.code not in TRANSIENT:
                    raise DataError(f"data.endpoint {url} refuses a dialogue: {_reason(error)}") from error
                last, asked_s = error, _seconds(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException, ValueError) as error:
                last, asked_s = error, 0.0
            if attempt < TRIES - 1:
                self._wait(max(asked_s, min(LONGEST_WAIT_S, 2.0**attempt) * random.uniform(0.5, 1.0)))
        raise DataError(
            f"data.endpoint {url} gave no answer in {TRIES} tries ({_reason(last or OSError())}); what is finished "
            "is kept. See to the server and run the same command"
        ) from last

    def _ask(self, url: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(url, data, self._headers), timeout=timeout_s) as answer:
            return json.loads(answer.read())


def _reply(answer: Any, url: str) -> Reply:
    """Raises DataError for an answer that is not a whole one of the target's."""
    try:
        choice = answer["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
        text, reasoning = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(f"data.endpoint {url} does not speak OpenAI's chat protocol: {str(answer)[:200]}") from error
    if reasoning:
        raise DataError(
            f"data.endpoint {url} takes the reasoning out of the answers. Start the server without a reasoning parser"
        )
    if reason not in ("stop", "length") or not (text or reason == "stop"):
        raise DataError(f"data.endpoint {url} ended an answer by '{reason}'. Start the server without tools or filters")
    return Reply(text, reason == "stop")


def _reason(error: BaseException) -> str:
    """What went wrong in one line: the server's own words where it has some."""
    if isinstance(error, urllib.error.HTTPError):
        try:
            words = error.read().decode(errors="replace")
        except (OSError, http.client.HTTPException):
            words = ""
        return f"{error.code} {' '.join(words.split())[:300] or error.reason}"
    return str(getattr(error, "reason", "") or error) or type(error).__name__


def _seconds(text: str | None) -> float:
    """Of a Retry-After header; its other form, a date, counts as none."""
    return float(text) if text and text.isdigit() else 0.0
