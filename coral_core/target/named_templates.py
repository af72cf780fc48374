"""The chat template that `target.chat_template` names, for a model that has none: a public format, or a file.

chatml is OpenAI's (openai-python 0.28, chatml.md), llama-2 is Meta's (facebookresearch/llama, generation.py), vicuna is
FastChat's (conversation.py, vicuna_v1.1). plain has no turns: the model continues the text.
"""

from pathlib import Path
from typing import Any

from coral_core.errors import DataError, TargetError, did_you_mean
from coral_core.target.template import FOLDER, NAMED, OFFER, SENTINEL, control_ids, render, text_ids


def choose(tokenizer: Any, chosen: str) -> None:
    """Give a tokenizer the template of a name or a file, in place of its own.

    Raises TargetError for a template that is not there, does not render, or whose answers would not end.
    """
    tokenizer.chat_template = _read(chosen)
    if chosen == "plain" and tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        tokenizer.chat_template = tokenizer.chat_template.replace("{{- bos_token }}", "")
    try:
        tail, controls = ending(tokenizer)
    except DataError as error:
        raise TargetError(f"target.chat_template is '{chosen}': {error}") from error
    if chosen in NAMED and chosen != "plain" and not controls:
        raise TargetError(
            f"target.chat_template is '{chosen}', which ends an answer with {tail.strip() or 'the end-of-text token'}, "
            "and the tokenizer has no such token: no answer would end. Set target.chat_template=plain"
        )


def ends(tokenizer: Any, *, incomplete: bool) -> list[int]:
    """The tokens with which the template ends an answer, as far as they are known to end one.

    The tokenizer's end of sequence is, where the template puts it there: the generation config of a fine-tuned base
    model often names the base's own end alone. Where what the model came with is `incomplete`, as the metadata of GGUF
    files are (Gemma's, Phi-3's), the first control token is one too. In other models it may end a part of an answer.
    """
    try:
        _, controls = ending(tokenizer)
    except DataError:  # no template, or one that does not render
        return []
    return [token for token in controls if token == tokenizer.eos_token_id or (incomplete and token == controls[0])]


def ending(tokenizer: Any) -> tuple[str, list[int]]:
    """What the template puts behind an answer, and the control tokens in it.

    Raises DataError for a tokenizer without a template, or one that does not render.
    """
    dialogue = [{"role": "user", "content": "."}, {"role": "assistant", "content": SENTINEL}]
    tail, controls = render(tokenizer, dialogue).rpartition(SENTINEL)[2], control_ids(tokenizer)
    return tail, [token for token in text_ids(tokenizer, tail) if token in controls]


def _read(chosen: str) -> str:
    path = FOLDER / f"{chosen}.jinja" if chosen in NAMED else Path(chosen).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = did_you_mean(chosen, NAMED) or f"it is no file that can be read. Set it to {OFFER}"
        raise TargetError(f"target.chat_template is '{chosen}': {reason}") from error
