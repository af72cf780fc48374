"""The `coral` command: registers the verbs, and is the one place where an error becomes a line and an exit code.

0 done; 1 a user's error (CoralError), one line; 2 wrong usage (typer's own); 130 Ctrl-C; a bug keeps its traceback.
Nothing heavy is imported here: `coral --help` must answer at once.
"""

import atexit
import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Annotated

import typer
import typer.core

from coral_cli import hints
from coral_cli.commands.chat import chat
from coral_cli.commands.env import env
from coral_cli.commands.eval import evaluate
from coral_cli.commands.export import export
from coral_cli.commands.group_head import group_head
from coral_cli.commands.import_drafter import import_drafter
from coral_cli.commands.inspect import inspect
from coral_cli.commands.prepare_data import prepare_data
from coral_cli.commands.publish import publish
from coral_cli.commands.recipe import recipe
from coral_cli.commands.serve import serve
from coral_cli.commands.train import train
from coral_core import __version__
from coral_core.errors import CoralError, CoralWarning

INTERRUPTED = 130
"""The exit code after Ctrl-C."""


class Boundary(typer.core.TyperGroup):
    """The group of all verbs. A subclass, since typer turns Ctrl-C into a silent exit before `main` could see it."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]  # typer's own base class is private
        try:
            done = super().invoke(ctx)
            if group := _group():
                group.part()
            return done
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except CoralError as error:
            if os.environ.get("CORAL_DEBUG"):
                raise
            typer.echo(f"error: {hints.pasteable(' '.join(str(error).splitlines()))}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    name="coral",
    cls=Boundary,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a bug's traceback as Python prints it
    rich_markup_mode=None,  # plain help: rich takes 0.2 s more, and reads `[recipe.yaml]` as markup
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"coral {__version__}")
        raise typer.Exit


@app.callback()
def coral(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Make a language model decode faster without changing a word of what it says.

    Most commands take one recipe: `coral COMMAND [recipe.yaml] [section.key=value ...]`. With no recipe they work on
    the small embedded model pico. In order: prepare-data, train, group-head, eval, then chat or serve;
    export and publish for other engines, import for other people's drafters.
    """


VERBS: dict[str, Callable[..., None]] = {
    "prepare-data": prepare_data,
    "train": train,
    "group-head": group_head,
    "eval": evaluate,
    "chat": chat,
    "inspect": inspect,
    "export": export,
    "import": import_drafter,
    "publish": publish,
    "serve": serve,
    "recipe": recipe,
    "env": env,
}
for name, verb in VERBS.items():
    whole = (verb.__doc__ or "").partition("\n")[0]  # given as it is: of a docstring, the help would cut the end off
    app.command(name, short_help=whole)(verb)


def _group() -> ModuleType | None:
    """The module of the processes that run this command together, where the command asked for it."""
    return sys.modules.get("coral_core.processes")


def _leave_at_once() -> None:
    """End a process that failed while others of its group wait for it: its end lets the launcher end them.

    Python's own farewell would free the group, and may wait forever (coral_core/processes.py).
    """
    if (group := _group()) and group.in_group():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of ours as one line, any other as Python shows it."""
    if issubclass(category, CoralWarning):
        return f"note: {message}\n"
    return _as_python_does(message, category, filename, lineno, line)


_as_python_does = warnings.formatwarning


def main() -> None:
    """Entry point of the console script."""
    warnings.formatwarning = _one_line
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is for who calls it
    atexit.register(_leave_at_once)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal of ASCII shows ? in place of a letter it lacks
    try:
        app()
    except SystemExit as done:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt, and Python's end would show where
        if done.code == INTERRUPTED:  # while a command ran, or, from typer, while its words were read
            typer.echo("interrupted; run the same command again to go on", err=True)
        sys.exit(_flushed(done.code))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(_not_written())


def _flushed(code: str | int | None) -> str | int | None:
    """The exit code, once what was printed is written."""
    try:
        sys.stdout.flush()
    except OSError:
        return _not_written()
    return code


def _not_written() -> int:
    """Say that the answer could not be printed. Python would try once more at the end, and end in a traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    typer.echo("error: the output cannot be written: no space is left there, or nobody reads it", err=True)
    return 1


if __name__ == "__main__":
    main()
