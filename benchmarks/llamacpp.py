"""llama.cpp as a lane of a race, alone or with a drafter: the wheel xllamacpp, a tool for measuring beside the project.

    pip install --target TOOLS xllamacpp gguf      # and: python -m benchmarks.real … --llamacpp TOOLS

Its wheel for Linux is compiled for any x86-64 processor, without AVX-512.
"""

import atexit
import dataclasses
import importlib
import itertools
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from coral_core.bench.race import Lane

NGRAM = "COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE"
"""Drafts what followed the last tokens when they were there before: its form of prompt lookup."""


EAGLE3 = "COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a prompt's answer took."""

    text: str
    accepted: list[int]
    """Drafts that each round accepted, the last one left out: it drafts no further than the answer may go."""
    tokens_per_s: float


class LlamaCpp:
    """One server in a process of its own, on as many threads as torch uses in this one.

    In one process with torch its library slowed torch down: a plain step of SmolLM2-135M took 50 to 55 ms before the
    server was made and 78 to 85 ms after it, idle or not.
    """

    def __init__(
        self, tools: Path, model: Path, context: int, ngram: bool = False, drafter: tuple[Path, int] | None = None
    ) -> None:
        """`drafter` is a GGUF file of EAGLE-3's shape, and how many tokens it proposes a round, however unlikely."""
        asked = tools, model, context, ngram, drafter, torch.get_num_threads()
        spawn = multiprocessing.get_context("spawn")
        self.process = ProcessPoolExecutor(1, mp_context=spawn, initializer=_begin, initargs=asked)
        atexit.register(self.process.shutdown)  # collected before, it leaves an error at the end

    def answer(self, prompt: list[int], tokens: int) -> Answer:
        """A greedy answer of exactly so many tokens, and its rounds."""
        return self.process.submit(_answer, prompt, tokens).result()

    def decode(self, text: str, tokens: int, temperature: float) -> Lane:
        """One answer to a rendered prompt, by its own clock. Its ids are not told: only their number is."""
        return self.process.submit(_decode, text, tokens, temperature).result()


_own: list[Any] = []
"""The server of this process, where it is a server's."""


def _begin(tools: Path, model: Path, context: int, ngram: bool, drafter: tuple[Path, int] | None, threads: int) -> None:
    sys.path.append(str(tools))
    library = importlib.import_module("xllamacpp")
    params = library.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(model), context, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    if ngram:
        params.speculative.types = [getattr(library.common_speculative_type, NGRAM)]
    if drafter is not None:
        draft = params.speculative.draft
        params.speculative.types = [getattr(library.common_speculative_type, EAGLE3)]
        draft.mparams.path, draft.n_max, draft.n_min, draft.p_min = str(drafter[0]), drafter[1], 0, 0.0
        draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = threads
    _own.append(library.Server(params))


def _answer(prompt: list[int], tokens: int) -> Answer:
    greedy = {"temperature": 0.0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True}
    told = {"cache_prompt": False, "stream": True, "timings_per_token": True}
    pieces: list[dict[str, Any]] = []

    def take(piece: Any) -> bool:
        found = json.loads(piece) if isinstance(piece, str | bytes) else piece
        pieces.extend(found if isinstance(found, list) else [found])
        return False

    _own[0].handle_completions({"prompt": prompt, "n_predict": tokens, **greedy, **told}, take)
    accepted = {0: 0}  # drafted so far -> accepted so far: one entry a round
    for timings in (piece.get("timings") or {} for piece in pieces):
        if "draft_n" in timings:
            accepted[timings["draft_n"]] = timings["draft_n_accepted"]
    rounds = [later - earlier for earlier, later in itertools.pairwise(accepted.values())]
    text = "".join(piece["choices"][0]["text"] for piece in pieces)
    spent = pieces[-1]["timings"]
    return Answer(text, rounds[:-1], 1e3 * after_first(spent) / spent["predicted_ms"])


def _decode(text: str, tokens: int, temperature: float) -> Lane:
    wanted = {"prompt": text, "max_tokens": tokens, "temperature": temperature, "seed": 0, "cache_prompt": False}
    answer: dict[str, Any] = _own[0].handle_completions(wanted)
    spent = answer["timings"]
    emitted = [1] * after_first(spent)
    return Lane([], spent["prompt_ms"] / 1e3, spent["predicted_ms"] / 1e3, [], emitted, {})


def after_first(spent: dict[str, Any]) -> int:
    """The tokens that its clock of decoding saw: it starts when the first one is there, which is counted too."""
    return int(spent["predicted_n"]) - 1


def rewritten(model: Path, to: Path, weights: str) -> Path:
    """The same GGUF file with its products' weights in another type, such as BF16: the bits of a target in that dtype.
    Made once."""
    if to.exists():
        return to
    import gguf

    reader = gguf.GGUFReader(model)
    partial = to.with_name(f".{to.name}.partial")
    writer = gguf.GGUFWriter(partial, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    kept = gguf.GGMLQuantizationType[weights]
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim > 1:
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, kept), raw_dtype=kept)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(to)
    return to
