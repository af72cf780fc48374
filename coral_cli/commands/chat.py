"""`coral chat`: talk with the target, drafted or plain; the words are the same."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from coral_cli.options import RUNS, Arguments, RunsOption, open_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from coral_core.decoding.rounds import Round

    Decode = Callable[[list[int]], Iterable[Round]]

HELP = "/clear forgets the dialogue, /exit leaves; Ctrl-C stops an answer"


def chat(
    arguments: Arguments = None,
    speculative: Annotated[
        bool, typer.Option("--speculative/--no-speculative", help="Draft with the drafter, or decode plainly.")
    ] = True,
    runs: RunsOption = RUNS,
) -> None:
    """Talk with the target: answers stream, with tokens/s and tau after each."""
    from coral_cli.console import err
    from coral_core.decoding.assemble import assemble, sampler
    from coral_core.decoding.plain import plain
    from coral_core.errors import DataError
    from coral_core.target.load import load_target
    from coral_core.target.template import prompt_ids

    run = open_run(arguments, runs)
    target = load_target(run.recipe.target)
    pick, limit = sampler(run.recipe), run.recipe.decode.max_new_tokens
    if speculative:
        assembled = assemble(run.recipe, run.folder, target)
        err.print(f"drafter and head from {assembled.folder}", style="dim", markup=False, soft_wrap=True)

    def decode(prompt: list[int]) -> Iterable[Round]:
        return assembled.engine.decode(prompt, pick, limit) if speculative else plain(target, prompt, pick, limit)

    err.print(HELP, style="dim")
    messages: list[dict[str, str]] = []
    while (words := _ask()) not in (None, "/exit"):
        if not words:
            continue
        if words == "/clear":
            messages.clear()
        elif words.startswith("/"):
            err.print(f"unknown command {words}; {HELP}", markup=False)
        else:
            messages.append({"role": "user", "content": words})
            try:
                answer = _answer(decode, prompt_ids(target.tokenizer, messages), target.tokenizer)
            except DataError as error:
                messages.pop()
                err.print(f"{error}, or start anew with /clear", markup=False)
            else:
                messages.append({"role": "assistant", "content": answer})


def _ask() -> str | None:
    """The user's next line; None at the end of the input, or when Ctrl-C is pressed with no answer under way."""
    if sys.stdin.isatty():
        sys.stderr.write("\n> ")
        sys.stderr.flush()
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        return None
    return line.strip() if line else None


def _answer(decode: Decode, prompt: list[int], tokenizer: object) -> str:
    """Stream one answer to stdout, its statistics to stderr; Ctrl-C ends the answer and keeps what was said."""
    from coral_cli.console import err
    from coral_core.decoding.stream import TextStream

    stream, rounds, begun_s = TextStream(tokenizer), [], time.perf_counter()
    try:
        for event in decode(prompt):
            rounds.append(event)
            sys.stdout.write(stream.feed(event.new_ids))
            sys.stdout.flush()
    except KeyboardInterrupt:
        err.print(" (stopped)", style="dim")
    sys.stdout.write(stream.rest() + "\n")
    sys.stdout.flush()
    elapsed_s = time.perf_counter() - begun_s
    tokens = sum(len(event.new_ids) for event in rounds)
    drafted = [len(event.new_ids) for event in rounds if event.kind == "draft"]
    tau = f", tau {sum(drafted) / len(drafted):.2f}" if drafted else ""
    err.print(f"[{tokens} tokens, {tokens / elapsed_s:.1f} tokens/s{tau}]", style="dim", markup=False)
    return stream.text
