"""`coral serve`: OpenAI's API on a port, with speculative decoding behind it."""

from __future__ import annotations

import copy
import errno
import importlib.util
import socket
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coral_cli.options import RUNS, Arguments, RunsOption, engine_of, look_at_run
from coral_core.errors import CoralError

if TYPE_CHECKING:
    from types import FrameType

    from coral_core.run import Run
    from coral_core.serve.answer import Service

LOCAL = ("127.0.0.1", "localhost", "::1")
ACTIVE, WAITING = 8, 64
SHUTDOWN_S = 10
"""What answers under way are given to finish in, after Ctrl-C; a second one ends them at once."""


def serve(
    arguments: Arguments = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 is the whole network.")] = LOCAL[0],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    active: Annotated[
        int, typer.Option("--active", min=1, help="Requests answered at once, in rounds that they share.")
    ] = ACTIVE,
    waiting: Annotated[int, typer.Option("--waiting", min=0, help="Requests that may wait for a place.")] = WAITING,
    runs: RunsOption = RUNS,
) -> None:
    """Answer OpenAI's chat and completions API with speculative decoding; Ctrl-C stops."""
    _refuse_without_extra()
    given = (("--host", host, LOCAL[0]), ("--active", active, ACTIVE), ("--waiting", waiting, WAITING))
    others = "".join(f" {option} {value}" for option, value, usual in given if value != usual)
    listening = _listen(host, port, others)  # before the model is loaded: a port in use is answered at once
    run = look_at_run(arguments, runs)

    import uvicorn

    from coral_cli.console import tell
    from coral_core.serve.app import make_app
    from coral_core.serve.hosts import OwnHosts
    from coral_core.serve.worker import OneThread

    thread = OneThread()
    app = make_app(thread.submit(lambda: _service(run)).result(), thread, active, waiting)
    if host in LOCAL:
        app.add_middleware(OwnHosts)
    else:
        tell(f"listening on {host}: whoever reaches this port may ask; there are no keys")
    listening.listen()  # whoever reads the next line may connect
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}/v1"
    tell(f"{run.recipe.name} answers at {address}, Ctrl-C stops")
    most = run.recipe.decode.max_new_tokens
    tell(
        f"an answer ends after {most} tokens unless a request sets max_tokens; change that with decode.max_new_tokens=N"
    )
    config = uvicorn.Config(
        app, log_config=_log_config(uvicorn.config.LOGGING_CONFIG), timeout_graceful_shutdown=SHUTDOWN_S, ws="none"
    )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:  # uvicorn's own answer to a second Ctrl-C leaves threads running, and a traceback
                for task in self.server_state.tasks:
                    task.cancel()
                return
            if self.server_state.tasks:
                tell(f"waits {SHUTDOWN_S} s at most for answers under way; Ctrl-C again ends them now")
            super().handle_exit(sig, frame)

    try:
        Server(config).run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn passes it on when it has shut down
        tell("stopped")


def _refuse_without_extra() -> None:
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise CoralError(f"coral serve needs {' and '.join(missing)}. Run, in coral's folder: pip install '.[serve]'")


def _listen(host: str, port: int, others: str) -> socket.socket:
    """Raises CoralError for an address that is taken, or is none of this machine's; `others` are the other options."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        mend = "Choose others with --host and --port"
        if error.errno == errno.EADDRINUSE:
            mend = f"Run: coral serve --port {port + 1 if port < 65535 else 8000}{others}"
        raise CoralError(f"cannot listen on {host} port {port}: {error.strerror}. {mend}") from error
    return listening


def _service(run: Run) -> Service:
    from coral_core.serve.answer import Service

    run.refuse_unmade()
    engine = engine_of(run, run.target())
    return Service(run.recipe.name, engine, run.sampler, run.recipe.decode.max_new_tokens)


def _log_config(theirs: dict[str, Any]) -> dict[str, Any]:
    """uvicorn's log, all of it on stderr, and warnings and errors only besides one line per request."""
    config = copy.deepcopy(theirs)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    config["loggers"]["uvicorn.error"]["level"] = "WARNING"
    return config
