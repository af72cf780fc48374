"""The chat template that `target.chat_template` names, for a model that has none: a public format, or a file.

chatml is OpenAI's (openai-python 0.28, chatml.md), llama-2 is Meta's (facebookresearch/llama, generation.py), vicuna is
FastChat's (conversation.py, vicuna_v1.1). plain has no turns: the model continues the text.
"""

from pathlib import Path
from typing import Any

from coral_core.errors import DataError, TargetError, did_you_mean
from coral_core.target.template import FOLDER, NAMED, OFFER, SENTINEL, control_ids, render, text_ids


def choose(tokenizer: Any, chosen: str) -> list[int]:
    """Give a tokenizer the template of a name or a file, in place of its own. Gives the token that ends an answer in
    it, where there is one.

    Raises TargetError for a template that is not there, does not render, or whose answers would not end.
    """
    tokenizer.chat_template = _read(chosen)
    if chosen == "plain" and tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        tokenizer.chat_template = tokenizer.chat_template.replace("{{- bos_token }}", "")
    try:
        tail, ends = ending(tokenizer)
    except DataError as error:
        raise TargetError(f"target.chat_template is '{chosen}': {error}") from error
    if chosen in NAMED and chosen != "plain" and not ends:
        raise TargetError(
            f"target.chat_template is '{chosen}', which ends an answer with {tail.strip() or 'the end-of-text token'}, "
            "and the tokenizer has no such token: no answer would end. Set target.chat_template=plain"
        )
    return ends


def ending(tokenizer: Any) -> tuple[str, list[int]]:
    """What the template puts behind an answer, and the control token in it that ends one, where there is one.

    Raises DataError for a tokenizer without a template, or one that does not render.
    """
    dialogue = [{"role": "user", "content": "."}, {"role": "assistant", "content": SENTINEL}]
    tail = render(tokenizer, dialogue).rpartition(SENTINEL)[2]
    return tail, [token for token in text_ids(tokenizer, tail) if token in control_ids(tokenizer)][:1]


def _read(chosen: str) -> str:
    path = FOLDER / f"{chosen}.jinja" if chosen in NAMED else Path(chosen).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = did_you_mean(chosen, NAMED) or f"it is no file that can be read. Set it to {OFFER}"
        raise TargetError(f"target.chat_template is '{chosen}': {reason}") from error
