"""Many clients at once, some of which leave or talk nonsense: nobody is stuck, nothing is kept."""

import concurrent.futures
import contextlib
import gc
import json
import random
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from coral_core.decoding.cache import Slots
from coral_core.decoding.engine import plain
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.seat import Seat
from coral_core.decoding.table import Table
from tests.serve.helpers import PATIENCE_S, ask, make_service, running

LONG = {"model": "tiny", "prompt": "x", "max_tokens": 200}


class Slow(Table):
    """Rounds that take a while, and are counted."""

    rounds, round_s = 0, 0.01

    def step(self) -> list[tuple[Seat, Round]]:
        time.sleep(self.round_s)
        type(self).rounds += 1
        return super().step()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Slow], str]]:
    """One active request, one that may wait."""
    monkeypatch.setattr(Slow, "rounds", 0)
    monkeypatch.setattr("coral_core.serve.app.Table", Slow)
    with running(make_service(), active=1, waiting=1) as address:
        yield Slow, address


def wire(address: str, data: bytes) -> socket.socket:
    """A connection on which `data` was sent."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
    connection.sendall(data)
    return connection


def posted(path: str, body: bytes, length: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def asked(**fields: object) -> bytes:
    return posted("/v1/completions", json.dumps(LONG | fields).encode())


def leave(connection: socket.socket, abruptly: bool) -> None:
    if abruptly:  # a reset instead of a farewell
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def settled(address: str) -> dict[str, object]:
    """The server's health when nothing is left to do."""
    deadline = time.monotonic() + PATIENCE_S
    while (health := ask(address, "/health")[1]) != {"status": "ok", "active": 0, "waiting": 0}:
        assert time.monotonic() < deadline, health
        time.sleep(0.02)
    return health


@pytest.mark.parametrize("abruptly", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(slow: tuple[type[Slow], str], stream: bool, abruptly: bool) -> None:
    counted, address = slow
    connection = wire(address, asked(stream=stream))
    if stream:
        assert b"data:" in connection.recv(4096) + connection.recv(4096)
    while counted.rounds < 3:
        time.sleep(0.005)
    leave(connection, abruptly)
    settled(address)
    assert counted.rounds < 60, "nobody reads the rest: it is not decoded"
    assert ask(address, "/v1/completions", LONG | {"max_tokens": 3})[0] == 200


def test_one_too_many_is_told_to_try_again_and_does(slow: tuple[type[Slow], str]) -> None:
    counted, address = slow
    active = wire(address, asked())
    while counted.rounds == 0:
        time.sleep(0.005)
    waiting = wire(address, asked())
    while ask(address, "/health")[1]["waiting"] == 0:
        time.sleep(0.005)
    status, value = ask(address, "/v1/completions", LONG)
    assert (status, value["error"]["code"]) == (503, "overloaded")
    waiting.close()
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=9) as client:
        assert client.completions.create(**LONG | {"max_tokens": 2}).usage.completion_tokens == 2
    active.close()


def test_shutting_down_ends_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers that are not done in time are cut, and say so; `running` itself checks that the server ends."""
    monkeypatch.setattr(Slow, "rounds", 0)
    monkeypatch.setattr(Slow, "round_s", 0.2)
    monkeypatch.setattr("coral_core.serve.app.Table", Slow)
    with running(make_service(), active=1, waiting=2) as address:
        connections = [wire(address, asked(stream=stream)) for stream in (True, False, True)]
        while Slow.rounds == 0:
            time.sleep(0.005)
        begun_s = time.monotonic()
    assert time.monotonic() - begun_s < 10
    for connection in connections:
        with contextlib.closing(connection):
            told = b"".join(iter(lambda: connection.recv(4096), b""))  # noqa: B023  # read at once
        assert b"shutting_down" in told, told[-300:]


def nonsense(rng: random.Random) -> bytes:
    """Bytes that are no proper request."""
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}).encode()
    cut = rng.randrange(1, len(body))
    odd = rng.choice([None, True, -1, 1e99, "", "x" * 999, [], [[]], {}, {"a": 1}, [None], "\ud83d"])
    field = rng.choice(["model", "messages", "max_tokens", "temperature", "stop", "stream", "seed", "n", "unknown"])
    path = rng.choice(["/v1/chat/completions", "/v1/completions"])
    return rng.choice(
        [
            posted(path, body[:cut]),
            posted(path, body, length=len(body) + 50),
            posted(path, rng.randbytes(200)),
            posted(path, json.dumps({**json.loads(body), field: odd, "messages2": 1}).encode()),
            posted(path, b"[" * 50_000),
            posted(path, b"x" * 1_200_000),
            posted("/v1/" + "x" * cut, body),
            posted(path, body).replace(b"application/json", b"text/plain"),
            posted(path, body, length=-5),
            rng.randbytes(100) + b"\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST " + path.encode() + b" HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        ]
    )


def refused(address: str, data: bytes) -> bytes:
    """What the server says to it; nothing, where it hangs up."""
    try:
        connection = wire(address, data)
        with contextlib.closing(connection):
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(4096)
    except ConnectionError:
        return b""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def caches() -> list[Slots]:
    """All that there are in this process, other tests' too."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is Slots]


def crowd(address: str, expected: list[str]) -> None:
    """16 clients, of which one leaves in the middle, beside 200 senders of nonsense, 8 at a time."""

    def client(number: int) -> str | None:
        if number == 7:
            connection = wire(address, asked(stream=True))
            connection.recv(100)
            return leave(connection, abruptly=True)
        fields = {"model": "tiny", "prompt": [5, number], "max_tokens": 20, "temperature": 1, "seed": number}
        status, answer = ask(address, "/v1/completions", fields)
        assert status == 200, answer
        return str(answer["choices"][0]["text"])

    rng = random.Random(0)
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(client, number) for number in range(16)]
        said = [pool.submit(refused, address, nonsense(rng)) for _ in range(200)]
        assert [answer.result(PATIENCE_S) for answer in answers] == expected
        statuses = [future.result(PATIENCE_S)[:12] for future in said]
    assert {status[:10] for status in statuses} <= {b"HTTP/1.1 4", b""}, set(statuses)
    assert sum(status.startswith(b"HTTP/1.1 4") for status in statuses) > 150
    settled(address)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to see that memory is flat")
def test_sixteen_clients_one_that_leaves_and_two_hundred_malformed_requests() -> None:
    service, others = make_service(), caches()
    expected: list[str | None] = []
    for number in range(16):
        rounds = plain(service.target, [5, number], Sampler(temperature=1, seed=number), 20)
        ids = [token for event in rounds for token in event.new_ids]
        expected.append(service.target.tokenizer.decode(ids, skip_special_tokens=True) if number != 7 else None)
    with running(service) as address:
        crowd(address, expected)
        before = resident_bytes()
        crowd(address, expected)
        grown = resident_bytes() - before
    assert grown < 30e6, f"{grown / 1e6:.0f} MB more after the same load again"
    kept = [thing for thing in caches() if not any(thing is other for other in others)]
    assert kept == [], "an answer that has ended keeps no cache"
