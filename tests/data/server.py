"""A small server of OpenAI's chat protocol, for tests: it answers with what it was asked, and fails as told."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """`fail` is a list of what happens to the next requests: an HTTP status, "drop", or "garbage"."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, models: tuple[str, ...] = ("served",), fail: tuple[int | str, ...] = (), delay_s: float = 0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.models, self.fail, self.delay_s = models, list(fail), delay_s
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        self.choice: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, code: int, value: Any) -> None:
        content = json.dumps(value).encode() if not isinstance(value, bytes) else value
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        if code == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.send(200, {"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
            failure = self.server.fail.pop(0) if self.server.fail else 0
        time.sleep(self.server.delay_s)
        with self.server.lock:
            self.server.busy -= 1
        if failure == "drop":
            self.connection.close()
        elif failure == "garbage":
            self.send(200, b"not JSON")
        elif failure:
            self.send(int(failure), {"error": {"message": "no such luck"}})
        else:
            self.send(200, {"choices": [told(body) | self.server.choice]})


def told(body: dict[str, Any]) -> dict[str, Any]:
    """The user's last words in capitals, with how many messages came before; cut to `max_tokens` characters."""
    text = f"{len(body['messages'])} {body['messages'][-1]['content'].upper()}"
    whole = len(text) < body["max_tokens"]
    message = {"role": "assistant", "content": text[: body["max_tokens"]]}
    return {"index": 0, "message": message, "finish_reason": "stop" if whole else "length"}


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
