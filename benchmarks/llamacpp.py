"""llama.cpp as a lane of a race: the wheel xllamacpp, a tool for measuring beside the project.

    pip install --target TOOLS xllamacpp gguf      # and: python -m benchmarks.real … --llamacpp TOOLS

Its wheel for Linux is compiled for any x86-64 processor, without AVX-512.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import torch

from coral_core.bench.race import Lane

NGRAM = "COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE"
"""Drafts what followed the last tokens when they were there before: its form of prompt lookup."""


class LlamaCpp:
    """One server in this process, on as many threads as torch uses."""

    def __init__(self, tools: Path, model: Path, context: int, ngram: bool = False) -> None:
        if str(tools) not in sys.path:
            sys.path.append(str(tools))
        library = importlib.import_module("xllamacpp")
        params = library.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(model), context, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        if ngram:
            params.speculative.types = [getattr(library.common_speculative_type, NGRAM)]
        self.server = library.Server(params)

    def decode(self, text: str, tokens: int, temperature: float) -> Lane:
        """One answer to a rendered prompt, by its own clock. Its ids are not told: only their number is."""
        wanted = {"prompt": text, "max_tokens": tokens, "temperature": temperature, "seed": 0, "cache_prompt": False}
        answer: dict[str, Any] = self.server.handle_completions(wanted)
        spent = answer["timings"]
        emitted = [1] * int(spent["predicted_n"])
        return Lane([], spent["prompt_ms"] / 1e3, spent["predicted_ms"] / 1e3, [], emitted, {})


def as_bfloat16(model: Path, to: Path) -> Path:
    """The same GGUF file with its products' weights in bfloat16: the bits of a target in bfloat16. Made once."""
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
    kept = gguf.GGMLQuantizationType.BF16
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
