"""A random chat model behind a real server, in this process."""

import contextlib
import dataclasses
import http.client
import json
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import uvicorn

from coral_core.decoding.sampling import Sampler
from coral_core.serve.answer import Service
from coral_core.serve.app import make_app
from coral_core.serve.worker import OneThread
from tests.data.helpers import make_target
from tests.tiny import tiny_engine


def make_service(stopping: bool = False) -> Service:
    """Answers under the name `tiny`; it goes on to the limit unless `stopping`."""
    target = make_target()
    if not stopping:
        target = dataclasses.replace(target, stop_ids=frozenset())
    return Service("tiny", tiny_engine(target, depth=2, nodes=3, topk=2), Sampler(), 24)


@contextlib.contextmanager
def running(service: Service, active: int = 4, waiting: int = 64) -> Iterator[str]:
    """The base address of a server that is up, and down afterwards."""
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(service, OneThread(), active, waiting),
            port=0,
            log_level="critical",
            timeout_graceful_shutdown=2,
            ws="none",
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive(), "the server does not shut down"


PATIENCE_S = 180
"""Whoever waits longer is stuck; a machine busy with other things is not that slow."""
JSON = {"Content-Type": "application/json"}


def ask(
    address: str,
    path: str,
    body: bytes | Iterable[bytes] | dict[str, Any] | None = None,
    method: str | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, Any]]:
    """Status and JSON of one request, by a client that checks nothing; a dict is sent as JSON."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=PATIENCE_S)
    if isinstance(body, dict):
        body, headers = json.dumps(body).encode(), JSON
    with contextlib.closing(connection):
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
