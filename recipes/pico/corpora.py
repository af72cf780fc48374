"""The corpora that pico learns from: read, cleaned of benchmark questions, split, weighted, packed into rows."""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from coral_core.errors import DataError

# Share of the training tokens. Only what people wrote under permissive licences: GPTeacher (written by GPT-4) and the
# arena's answers (written by other models) are left out; medquad and novels are large, and teach little talk.
SHARES = {
    "sgd": 0.20,
    "self_dialogue": 0.20,
    "gsm8k_train": 0.16,
    "tldr": 0.11,
    "fairytaleqa": 0.06,
    "fairytale_stories": 0.05,
    "taskmaster4": 0.04,
    "flan_cot_ecqa": 0.04,
    "flan_cot_creak": 0.03,
    "flan_cot_strategyqa": 0.02,
    "flan_cot_sensemaking": 0.01,
    "flan_cot_qasc": 0.01,
    "flan_cot_aqua": 0.02,
    "mbpp_train_val": 0.02,
    "medquad": 0.02,
    "novels": 0.01,
}

# One dialogue in eight is led by its corpus's system prompt, so that the role means something.
SYSTEM = {
    "sgd": "You are an assistant who books tables, rooms, rides and tickets.",
    "self_dialogue": "You chat about films, music and sports.",
    "gsm8k_train": "You solve word problems step by step.",
    "tldr": "You explain commands of the shell.",
    "fairytaleqa": "You answer questions about a story.",
    "fairytale_stories": "You tell fairy tales.",
    "taskmaster4": "You take orders in a coffee shop.",
    "mbpp_train_val": "You write short Python functions.",
    "medquad": "You explain diseases and treatments.",
}

NGRAM = 10
NOVEL_CHARACTERS = 4000


def read(folder: Path, source: str) -> list[list[dict[str, str]]]:
    """The dialogues of one corpus; a novel is cut into pieces, each a message of the role `text`."""
    with gzip.open(folder / f"{source}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if source != "novels":
        return [row["messages"] for row in rows]
    pieces = (
        text[i : i + NOVEL_CHARACTERS]
        for text in (row["text"] for row in rows)
        for i in range(0, len(text), NOVEL_CHARACTERS)
    )
    return [[{"role": "text", "content": piece}] for piece in pieces]


def _ngrams(text: str) -> Iterator[str]:
    words = re.findall(r"\w+", text.lower())
    return (" ".join(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1))


def _strings(value: Any) -> Iterator[str]:
    """Every string in a value of JSON, at any depth; names of fields are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def benchmark_ngrams(folder: Path) -> frozenset[str]:
    """Every run of ten words in the questions and answers of the benchmark files (JSONL with strings at any depth).

    Raises DataError where there are none: a benchmark's questions would be trained on, and nothing would tell.
    """
    found: set[str] = set()
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            for text in _strings(json.loads(line)):
                found.update(_ngrams(text))
    if not found:
        raise DataError(
            f"no file *.jsonl in {folder} holds {NGRAM} words in a row, so that no dialogue would be left out. "
            "Give --benchmarks a folder with one BENCH.jsonl for each benchmark"
        )
    return frozenset(found)


def clean(dialogues: list[list[dict[str, str]]], forbidden: frozenset[str]) -> list[list[dict[str, str]]]:
    """The dialogues that share no run of ten words with a benchmark."""
    return [d for d in dialogues if not any(gram in forbidden for message in d for gram in _ngrams(message["content"]))]


def split(dialogues: list[list[dict[str, str]]]) -> tuple[list[list[dict[str, str]]], list[list[dict[str, str]]]]:
    """(training, held out): one dialogue in a hundred is held out, chosen by a hash of its first message, so that a
    dialogue and its copies fall on the same side."""
    sides: tuple[list, list] = ([], [])
    for dialogue in dialogues:
        digest = hashlib.sha256(dialogue[0]["content"].encode()).digest()
        sides[int.from_bytes(digest[:4], "big") % 100 == 0].append(dialogue)
    return sides


def tokens_of(
    dialogue: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, system: str | None = None
) -> list[int]:
    """Token ids of one dialogue in pico's chat format; plain text ends with the end token alone."""
    if dialogue[0]["role"] == "text":
        return tokenizer(dialogue[0]["content"])["input_ids"] + [tokenizer.eos_token_id]
    head = [{"role": "system", "content": system}] if system and dialogue[0]["role"] != "system" else []
    return tokenizer.apply_chat_template(head + dialogue, tokenize=True, return_dict=False)


def _stream(
    source: str, dialogues: list, tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator
) -> Iterator[list[int]]:
    while True:
        for i in rng.permutation(len(dialogues)):
            yield tokens_of(dialogues[i], tokenizer, SYSTEM.get(source) if rng.random() < 1 / 8 else None)


def pack(corpora: dict[str, list], tokenizer: PreTrainedTokenizerBase, rows: int, length: int, seed: int) -> np.ndarray:
    """[rows, length] token ids: dialogues laid end to end, each from the corpus that is furthest below its share.

    A dialogue that does not fit goes on in the next row: nothing is padded, and no start is privileged.
    """
    rng = np.random.default_rng(seed)
    streams = {source: _stream(source, dialogues, tokenizer, rng) for source, dialogues in corpora.items()}
    given = dict.fromkeys(corpora, 0)
    packed = np.empty(rows * length, dtype=np.uint16)
    filled = 0
    while filled < packed.size:
        source = min(given, key=lambda s: given[s] / SHARES[s])
        ids = next(streams[source])[: packed.size - filled]
        packed[filled : filled + len(ids)] = ids
        filled += len(ids)
        given[source] += len(ids)
    return packed.reshape(rows, length)
