"""How the text of a GGUF file's model is split before its merges: `tokenizer.ggml.pre`, by llama.cpp's names.

transformers reads some of the names, and splits as GPT-2 does for all others. For those of DIGITS the split is put
right; for a name that stands for another split, a warning says so.
"""

import json
import warnings
from pathlib import Path
from typing import Any

from coral_core.errors import CoralWarning

MODEL, PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
AS_GPT2 = frozenset(
    {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat", "a.x-4.0", "mellum"}
)
DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""As GPT-2, and each digit on its own; so that a blank line before a number is one token."""


def warn(file: Path, fields: dict[str, Any]) -> None:
    """Warn where the file's text is split in a way that is not known, or that the file does not name."""
    pre = fields.get(PRE)
    table = _table()
    if fields.get(MODEL) != "gpt2" or table is None or pre in table | AS_GPT2 | DIGITS:
        return
    said = f"{PRE} is {pre!r}, which transformers does not know" if pre else f"it does not hold {PRE}"
    warnings.warn(
        f"{file}: {said}, and some words may be split into other tokens than in llama.cpp. "
        "Set target.model to the model's own folder or Hub id for its own tokens",
        CoralWarning,
        stacklevel=2,
    )


def save(tokenizer: Any, fields: dict[str, Any], folder: Path) -> None:
    """Write a tokenizer that transformers made of the file, with the split that it lacks."""
    if fields.get(MODEL) != "gpt2" or fields.get(PRE) not in DIGITS:
        tokenizer.save_pretrained(folder)
        return
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    parts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(parts)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # A class of the model's own, as StarCoder2's GPT2Tokenizer, would set its split again when it is loaded.
    path.write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")


def _table() -> frozenset[str] | None:
    """The names that transformers knows; None where this version of it keeps no such table."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return None
    return frozenset(GGUF_PRE_TOKENIZER_SPLITS)
