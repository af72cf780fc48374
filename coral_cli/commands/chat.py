"""`coral chat`: talk with the target, drafted or plain; the words are the same."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from coral_cli import hints
from coral_cli.options import RUNS, Arguments, RunsOption, engine_of, look_at_run
from coral_core.errors import ArtifactError, CoralError, CoralWarning, DataError

if TYPE_CHECKING:
    from coral_cli.talk.session import Session
    from coral_core.run import Run

HELP = "/clear /stats /system TEXT /temperature NUMBER /speculative on|off /save FILE /exit; Ctrl-C stops an answer"


def chat(
    arguments: Arguments = None,
    speculative: Annotated[
        bool, typer.Option("--speculative/--no-speculative", help="Draft with the drafter, or decode plainly.")
    ] = True,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="Colour the drafted tokens by depth, in place of Markdown.")
    ] = False,
    runs: RunsOption = RUNS,
) -> None:
    """Talk with the target: answers stream; after each, tokens/s, tau and the speedup against plain decoding."""
    from coral_cli.console import err, out, tell
    from coral_cli.talk import keyboard, views

    session = _session(look_at_run(arguments, runs), speculative)
    keyboard.prepare()
    _tell(HELP)
    if show_drafts:
        marked = isinstance(views.view(out, drafts=True), views.DraftView)
        err.print(views.legend(out) if marked else "--show-drafts needs a terminal; answers are plain text here")
    with keyboard.listening():
        while True:
            try:
                line = keyboard.read_line()
                if line is None or line.split()[:1] == ["/exit"]:
                    return
                _do(session, line, show_drafts)
            except CoralError as error:
                tell(hints.pasteable(str(error)))
            except KeyboardInterrupt:  # pressed once more, after the answer had ended
                tell("(stopped)", "dim")


def _tell(text: str) -> None:
    """On stderr, wrapped at words where that is a terminal."""
    from coral_cli.console import err

    err.print(text, style="dim", markup=False, soft_wrap=not err.is_terminal)


def _do(session: Session, line: str, show_drafts: bool) -> None:
    """Do what a line asks for: a command, an answer, or nothing."""
    from coral_cli.talk import commands

    if line.startswith("/"):
        _tell(commands.run(session, line.strip()))
    elif words := line.strip():
        _turn(session, words, show_drafts)


def _session(run: Run, speculative: bool) -> Session:
    from coral_cli.talk.session import Session
    from coral_core.decoding.engine import Engine

    if speculative:
        with _told():
            run.refuse_unmade()
    target = run.target(dialogues=True)

    def engine() -> Engine:
        with _told():
            return engine_of(run, target)

    return Session(target, run.sampler, run.recipe.decode.max_new_tokens, engine, drafted=speculative)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Say, where drafter or head are no use, that one may chat without."""
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"{error}, or chat without a drafter: --no-speculative") from error


def _turn(session: Session, words: str, show_drafts: bool) -> None:
    """Ask, show the answer on stdout, and its numbers on stderr."""
    from coral_cli.console import out
    from coral_cli.talk import keyboard, views

    shown = views.view(out, drafts=show_drafts)
    try:
        with keyboard.unechoed(), keyboard.Interrupts() as ctrl_c:
            for pieces in ctrl_c.each(session.answer(words, lambda: ctrl_c.pressed)):
                shown.feed(pieces)
            shown.close()
            if not ctrl_c.pressed:
                with ctrl_c.working():
                    session.compare()
    except DataError as error:
        raise DataError(f"{error}, or start anew with /clear") from error
    _tell(_status(session))
    if session.last and session.last.hides:
        note = "special tokens part this model's reasoning from its answer, and the next turn is told both without them"
        warnings.warn(f"{note}. To ask without what was said before: /clear", CoralWarning, stacklevel=2)


def _status(session: Session) -> str:
    """The last answer's numbers, and the session's speedup with what it was measured on."""
    answer = session.last
    assert answer is not None
    parts = [f"{len(answer.ids)} tokens"]
    if rate := answer.tally.tokens_per_s:
        parts.append(f"{rate:.1f} tokens/s" + ("" if answer.drafted else " without drafts"))
    if answer.drafted and (tau := answer.tally.tokens_per_round):
        parts.append(f"tau {tau:.2f}")
    if speedup := session.speedup():
        parts.append(f"drafting is {speedup[0]:.2f}x plain decoding ({speedup[1]})")
    if answer.drafted and (plain := answer.tally.plain_rounds):
        parts.append(f"{plain} of {len(answer.tally.accepted)} rounds were plain steps: drafting did not pay")
    ended = {
        "stopped": "stopped",
        "limit": f"cut at decode.max_new_tokens={session.max_new_tokens}",
        "context": f"the context of {session.target.max_positions:,} tokens is full, /clear starts anew",
    }
    return f"[{', '.join(parts)}]" + (f" {ended[answer.ended]}" if answer.ended else "")
