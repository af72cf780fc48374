"""Who may ask a server that listens on this machine alone: requests that carry a name of this machine.

A web page whose name was pointed at this machine must not read answers. Its visitor's browser sends that name.
"""

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from coral_core.serve.protocol import Refusal

OWN = ("127.0.0.1", "localhost", "::1", "host.docker.internal")
"""This machine's names for itself; the last is what a container of Docker Desktop calls it."""


class OwnHosts:
    """ASGI around an app: a request whose Host header has another name is refused."""

    def __init__(self, app: ASGIApp, names: Collection[str] = OWN) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        given = Headers(scope=scope).get("host", "") if scope["type"] == "http" else None
        if given is None or _name(given) in self.names:
            await self.app(scope, receive, send)
            return
        message = (
            f"the request's Host header is {given[:100]!r}, and this server answers to {', '.join(self.names)} alone. "
            "Start it with --host 0.0.0.0, and it answers to any name"
        )
        body = Refusal(message, code="unknown_host").body
        # The rest of a body that was not read would be taken for the next request.
        await JSONResponse(body, 400, {"Connection": "close"})(scope, receive, send)


def _name(host: str) -> str:
    """The name or address in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
