"""The HTTP side: an ASGI app that checks requests, hands them to the worker, and writes what it is told.

Everything slow happens in the worker's thread; the event loop only waits and writes.
"""

import asyncio
import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from coral_core.decoding.table import Table
from coral_core.errors import DataError
from coral_core.serve.answer import Answer, Opened, Piece, Service
from coral_core.serve.protocol import Ask, Fields, Form, Refusal, Usage, parse, read_chat, read_completion
from coral_core.serve.worker import Ended, FullError, Job, OneThread, Worker

BODY_BYTES = 1 << 20
"""A larger body is refused before it is read."""
BODY_S = 30.0
"""Seconds that a client may take to send its body."""
SEED_BITS = 32
"""Of the seed that is drawn for a request without one; JavaScript's numbers hold it."""


def make_app(service: Service, thread: OneThread, active: int, waiting: int) -> Starlette:
    """The app: `active` requests are answered at once, `waiting` more may wait, others are told to retry.

    `thread` decodes; the one that has loaded the service is the fastest.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.worker = Worker(thread, lambda: Table(service.engine, active), active, waiting)
        yield
        await anyio.to_thread.run_sync(app.state.worker.close)

    def completions(read: Callable[[Fields], Ask]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            fields = parse(await _body(request))
            ask = read(fields)
            if fields["model"] != service.name:
                raise _no_model(service, fields["model"])
            return Reply(request.app.state.worker, service, ask)

        return endpoint

    async def models(request: Request) -> Response:
        model = {"id": service.name, "object": "model", "created": started, "owned_by": "coral"}
        wanted = request.path_params.get("name")
        if wanted not in (None, service.name):
            raise _no_model(service, wanted)
        return JSONResponse(model if wanted else {"object": "list", "data": [model]})

    async def health(request: Request) -> Response:
        now_active, now_waiting = request.app.state.worker.counts()
        return JSONResponse({"status": "ok", "active": now_active, "waiting": now_waiting})

    started = int(time.time())
    return Starlette(
        routes=[
            Route("/v1/chat/completions", completions(read_chat), methods=["POST"]),
            Route("/v1/completions", completions(read_completion), methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", models),
            Route("/health", health),
        ],
        exception_handlers={Refusal: _refused, HTTPException: _http_error, Exception: _bug},
        lifespan=lifespan,
    )


class Reply(Response):
    """Answers one request; whatever ends it, the client's place with the worker is free again."""

    def __init__(self, worker: Worker, service: Service, ask: Ask) -> None:
        seed = ask.sampling.get("seed", secrets.randbits(SEED_BITS))
        ask = dataclasses.replace(ask, sampling={**ask.sampling, "seed": seed})
        self.worker, self.service, self.ask = worker, service, ask
        self.streaming = False
        self.form = Form(
            chat=ask.messages is not None,
            id=("chatcmpl-" if ask.messages is not None else "cmpl-") + secrets.token_hex(12),
            created=int(time.time()),
            model=service.name,
            fingerprint=f"coral-{service.target.fingerprint}",
            seed=seed,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. A client that leaves, before the first word or later, ends the work for it."""
        told: asyncio.Queue[Any] = asyncio.Queue()
        try:
            job = self._submit(told)
        except FullError:
            await _BUSY(scope, receive, send)
            return
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(_until_gone, receive, group.cancel_scope)
                await self._reply(told, scope, receive, send)
                group.cancel_scope.cancel()
        except asyncio.CancelledError:  # by the server, which waits no longer; passed on, it is logged as a bug
            await self._break_off(scope, receive, send)
        finally:
            self.worker.cancel(job)

    def _submit(self, told: asyncio.Queue[Any]) -> Job:
        loop = asyncio.get_running_loop()

        def tell(value: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(told.put_nowait, value)

        return self.worker.submit(Answer(self.service, self.ask), tell)

    async def _reply(self, told: asyncio.Queue[Any], scope: Scope, receive: Receive, send: Send) -> None:
        opened = await told.get()
        if not isinstance(opened, Opened):
            await _failure(opened)(scope, receive, send)
            return
        usage = Usage(opened.prompt_tokens)
        if self.ask.stream:
            await self._stream(told, usage, send)
        else:
            await (await self._whole(told, usage))(scope, receive, send)

    async def _break_off(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What a client is told whose answer the server's end cuts off."""
        refusal = _SHUTTING_DOWN
        if self.streaming:
            data = f"data: {_json(refusal.body)}\n\ndata: [DONE]\n\n"
            await send({"type": "http.response.body", "body": data.encode(), "more_body": False})
        else:
            await JSONResponse(refusal.body, refusal.status)(scope, receive, send)

    async def _whole(self, told: asyncio.Queue[Any], usage: Usage) -> Response:
        text = ""
        while isinstance(piece := await told.get(), Piece):
            text += piece.text
            usage.add(piece.tokens, piece.drafted)
            if piece.finish:
                return JSONResponse(self.form.whole(text, piece.finish, usage))
        return _failure(piece)

    async def _stream(self, told: asyncio.Queue[Any], usage: Usage, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self.streaming = True

        async def event(data: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more})

        if self.form.chat:
            await event(_json(self.form.chunk("", None, first=True)))
        while isinstance(piece := await told.get(), Piece):
            usage.add(piece.tokens, piece.drafted)
            if piece.text:
                await event(_json(self.form.chunk(piece.text, None)))
            if piece.finish:
                await event(_json(self.form.chunk("", piece.finish)))
                break
        else:
            await event(_json(_failed(piece).body))
        if self.ask.include_usage:
            await event(_json(self.form.usage(usage)))
        await event("[DONE]", more=False)


async def _until_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    """Cancel the scope when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _body(request: Request) -> bytes:
    """The body, in time and within its limit. Raises Refusal."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Also what keeps a web page from making its visitor's browser ask: this type needs leave from the server.
        raise Refusal("send the body as JSON, with the header Content-Type: application/json", status=415)
    body = bytearray()
    with anyio.move_on_after(BODY_S), contextlib.suppress(ClientDisconnect):
        async for part in request.stream():
            body += part
            if len(body) > BODY_BYTES:
                raise Refusal(f"the body is larger than {BODY_BYTES:,} bytes", status=413)
        return bytes(body)
    raise Refusal(f"the body did not arrive whole, within {BODY_S:g} s", status=408)


def _no_model(service: Service, name: str) -> Refusal:
    message = f"there is no model {name[:100]!r} here; this server has {service.name!r}"
    return Refusal(message, status=404, param="model", code="model_not_found")


def _failed(told: Any) -> Refusal:
    """What a client is told instead of an answer."""
    if isinstance(told, Refusal):
        return told
    if isinstance(told, Ended) and isinstance(told.error, FullError):
        return _SHUTTING_DOWN
    if isinstance(told, Ended) and isinstance(told.error, DataError):
        return Refusal(str(told.error), status=500)
    return Refusal("the answer failed; the server's log says why", status=500)


def _failure(told: Any) -> Response:
    refusal = _failed(told)
    return JSONResponse(refusal.body, refusal.status)


_HERE = "Ask for POST /v1/chat/completions, POST /v1/completions, GET /v1/models or GET /health"
_SHUTTING_DOWN = Refusal("the server is shutting down", status=503, code="shutting_down")
_BUSY = JSONResponse(
    Refusal("too many requests are waiting; try again", status=503, code="overloaded").body, 503, {"Retry-After": "1"}
)


async def _refused(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    # The rest of a body that was not read would be taken for the next request.
    headers = {"Connection": "close"} if refusal.status in (408, 413, 415) else None
    return JSONResponse(refusal.body, refusal.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Paths and methods that do not exist."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}. {_HERE}"
    return JSONResponse(Refusal(message, status=error.status_code).body, error.status_code, error.headers)


async def _bug(request: Request, error: Exception) -> Response:
    return JSONResponse(Refusal("a bug; the server's log says where", status=500).body, 500)


def _json(value: Fields) -> str:
    """In ASCII: some clients break lines of a stream at U+2028."""
    return json.dumps(value, separators=(",", ":"))
