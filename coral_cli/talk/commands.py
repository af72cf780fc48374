"""What begins with a slash. Each command returns what to tell the user, or raises CoralError in one line."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from coral_core.artifacts import write_text
from coral_core.errors import CoralError, did_you_mean

if TYPE_CHECKING:
    from coral_cli.talk.session import Session, Tally


def run(session: Session, line: str) -> str:
    """Do what the line asks; /exit is the caller's. Raises CoralError for what is no command, with the nearest."""
    name, _, argument = line.partition(" ")
    if name not in COMMANDS:
        known = did_you_mean(name, COMMANDS) or f"there are {' '.join(COMMANDS)}; a message may begin with a space"
        raise CoralError(f"unknown command {name}; {known}")
    return COMMANDS[name](session, argument.strip())


def _exit(session: Session, argument: str) -> str:
    raise AssertionError("the caller leaves")


def _clear(session: Session, argument: str) -> str:
    session.clear()
    session.sampler = dataclasses.replace(session.sampler, seed=session.sampler.seed + 1)  # or it would say the same
    return "the dialogue is forgotten" + ("; the system prompt stays, /system - removes it" if session.system else "")


def _system(session: Session, argument: str) -> str:
    from coral_core.target.template import takes_system

    if not argument:
        return (
            f"the system prompt is: {session.system}" if session.system else "no system prompt; /system TEXT sets one"
        )
    if argument == "-":
        session.system = ""
        return "no system prompt from now on"
    if not takes_system(session.target.tokenizer, answered=False):
        raise CoralError("this target's chat template shows no system prompt; say it in a message instead")
    session.system = argument
    return "the system prompt is set; /system - removes it"


def _temperature(session: Session, argument: str) -> str:
    if not argument:
        return f"the temperature is {session.sampler.temperature:g}; /temperature NUMBER changes it"
    try:
        value = float(argument)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise CoralError(f"temperature '{argument}' must be a number from 0 (the most likely words) up, such as 0.7")
    session.sampler = dataclasses.replace(session.sampler, temperature=value)
    session.forget_numbers()
    return f"temperature {value:g} from now on; the numbers begin anew"


def _speculative(session: Session, argument: str) -> str:
    if not argument:
        return f"speculative decoding is {'on' if session.speculative else 'off'}; /speculative on|off changes it"
    if argument not in ("on", "off"):
        raise CoralError(f"/speculative '{argument}' must be on or off")
    session.draft(argument == "on")
    return f"speculative decoding is {argument}; the words stay the same"


def _save(session: Session, argument: str) -> str:
    from coral_cli.talk.session import transcript

    if not argument:
        raise CoralError("/save needs a file to write to, such as /save dialogue.json")
    if not session.messages:
        raise CoralError("there is no answer to save yet")
    text = json.dumps(transcript(session), indent=2, ensure_ascii=False) + "\n"
    try:
        path = Path(argument).expanduser()
        if path.exists():
            raise CoralError(f"{path} is there already, and is left as it is; give /save another name")
        write_text(path, text)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: the home of no such user
        raise CoralError(f"cannot write {argument}: {getattr(error, 'strerror', None) or error}") from error
    return f"{_many(len(session.messages), 'message')} saved to {path}"


def _stats(session: Session, argument: str) -> str:
    target, rate = session.target, session.speedup()
    lines = [_told("drafted", session.drafted), _told("plain", session.plain)]
    if rate:
        lines.append(f"speedup: {rate[0]:.2f}x plain decoding, against {rate[1]}")
    turns = sum(message["role"] == "user" for message in session.messages)
    lines.append(
        f"dialogue: {_many(turns, 'turn')}, {session.length:,} of {target.max_positions:,} tokens of the context"
    )
    lines.append(
        f"settings: temperature {session.sampler.temperature:g}, speculative {'on' if session.speculative else 'off'}, "
        + (f"system prompt: {session.system}" if session.system else "no system prompt")
    )
    return "\n".join(lines)


def _told(name: str, tally: Tally) -> str:
    if not tally.answers:
        return f"{name}: no answer yet"
    parts = [f"{name}: {_many(tally.answers, 'answer')}, {tally.tokens:,} tokens after the first"]
    if tally.tokens_per_s:
        parts.append(f"{tally.tokens_per_s:.1f} tokens/s")
    if tally.tokens_per_round and name == "drafted":
        parts.append(f"tau {tally.tokens_per_round:.2f}")
        rounds, deepest = len(tally.accepted), max(tally.accepted)
        shares = [sum(n >= depth for n in tally.accepted) / rounds for depth in range(1, deepest + 1)]
        if shares:
            parts.append("accepted by depth " + " ".join(f"{share:.0%}" for share in shares))
        if tally.plain_rounds:
            parts.append(f"{tally.plain_rounds} of {rounds} rounds were plain steps: drafting did not pay")
        if tally.copied_rounds:
            parts.append(f"{tally.copied_rounds} drafted a copy of the text")
    return ", ".join(parts)


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


COMMANDS = {
    "/clear": _clear,
    "/stats": _stats,
    "/system": _system,
    "/temperature": _temperature,
    "/speculative": _speculative,
    "/save": _save,
    "/exit": _exit,
}
