"""A server of this machine alone answers to this machine's names, and says so to others."""

from typing import Any

import anyio
import pytest

from coral_core.serve.hosts import OwnHosts


def answered(host: str | None) -> list[Any]:
    """What came of a request with that Host header: "passed on", or the messages of a refusal."""
    told: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        told.append("passed on")

    async def send(message: Any) -> None:
        told.append(message)

    async def ask() -> None:
        headers = [] if host is None else [(b"host", host.encode())]
        await OwnHosts(app)({"type": "http", "headers": headers}, None, send)  # type: ignore[arg-type]  # reads nothing

    anyio.run(ask)
    return told


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost", "LocalHost:80", "[::1]:8000", "host.docker.internal:8000"]
)
def test_names_of_this_machine(host: str) -> None:
    assert answered(host) == ["passed on"]


OTHERS = ["evil.example", "evil.example:8000", "localhost.evil.example", "localhost@evil.example", "", None, "[::1"]


@pytest.mark.parametrize("host", OTHERS)
def test_another_name_is_refused_and_told_what_to_do(host: str | None) -> None:
    start, body = answered(host)
    assert start["status"] == 400
    assert repr(host or "").encode() in body["body"] and b"--host 0.0.0.0" in body["body"]


def test_what_is_no_request_is_passed_on() -> None:
    told: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        told.append(scope["type"])

    anyio.run(OwnHosts(app), {"type": "lifespan"}, None, None)
    assert told == ["lifespan"]
