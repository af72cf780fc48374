"""What a target has in common with its fine-tunes and its quantised forms, for the drafters that serve them all."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

from coral_core.artifacts import COMPATIBILITY, Manifest
from coral_core.errors import ArtifactError, CoralWarning, DataError
from coral_core.target.target import Target
from coral_core.target.template import SENTINEL, render

SPECIAL = set("<>[]|｜")
"""Characters of special tokens and of fillers ([PAD7]), which differ between a model's forms."""


def describe(target: Target) -> dict[str, Any]:
    """`tokenizer` and `template` are hashes, `vocabulary` and `hidden` the shape of the LM head."""
    tokenizer = target.tokenizer
    vocabulary, hidden = target.lent.head_VD.shape
    return {
        "tokenizer": "" if tokenizer is None else _hash(_words(tokenizer)),
        "template": "" if tokenizer is None else _turns(tokenizer),
        "vocabulary": vocabulary,
        "hidden": hidden,
    }


def refuse_other_target(manifest: Manifest, folder: Path, remedy: str, target: Target) -> None:
    """Raises ArtifactError, which ends in `remedy`, when what a manifest describes cannot work with `target`.

    It works with the target that it was made for, and with its siblings, fine-tunes and quantised forms, which
    share tokenizer, vocabulary and width; for a sibling there is a CoralWarning.
    """
    if manifest.inputs.get("target") == target.fingerprint:
        return
    if (made_for := manifest.facts.get(COMPATIBILITY)) is None:
        manifest.refuse_stranger(folder, remedy, target=target.fingerprint)
        return
    own = describe(target)
    for key, what in {
        "vocabulary": "a vocabulary of {}",
        "hidden": "{} hidden",
        "tokenizer": "tokenizer {}",
    }.items():
        if made_for[key] != own[key]:
            raise ArtifactError(
                f"the {manifest.kind} in {folder} was made for a target with {what.format(made_for[key])}; "
                f"this target has {what.format(own[key])}. {remedy}"
            )
    differs = "" if made_for["template"] == own["template"] else ", and its chat template differs"
    warnings.warn(
        f"the {manifest.kind} in {folder} was made for a sibling of this target ({manifest.inputs.get('target')}, and "
        f"this is {target.fingerprint}){differs}: answers are this target's own, tokens per round may be fewer",
        CoralWarning,
        stacklevel=2,
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _words(tokenizer: Any) -> str:
    """Every token with its id, but for special ones."""
    vocabulary = tokenizer.get_vocab().items()
    return "\n".join(sorted(f"{token} {number}" for token, number in vocabulary if SPECIAL.isdisjoint(token)))


def _turns(tokenizer: Any) -> str:
    """A hash of what the template puts around a later question: forms of a model may begin with other system messages.

    '' where there is no template, or it refuses.
    """
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": f"{SENTINEL}{index}"} for index, role in enumerate(roles)]
    try:
        text = render(tokenizer, messages, generation_prompt=True)
    except DataError:
        return ""
    return _hash(text[text.find(messages[1]["content"]) :])
