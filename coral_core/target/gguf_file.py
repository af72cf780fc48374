"""GGUF files as targets: dequantised once, and kept as an ordinary folder of transformers.

    CACHE/coral/gguf/SHA256-DTYPE-FORM/   config, weights, tokenizer with its chat template
    CACHE/coral/gguf/sums/           checksums of files that were read before, so that a start need not read them again

CACHE is the Hugging Face libraries' own (HF_ASSETS_CACHE, else HF_HOME/assets). A folder may be removed at any time.
"""

import contextlib
import importlib.util
import io
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from coral_core import hub
from coral_core.artifacts import file_sha256, fingerprint, write_text
from coral_core.errors import TargetError, first_line
from coral_core.target import checkpoint, gguf_rope, gguf_splits, template

ON_THE_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>.+\.gguf)", re.IGNORECASE)
CHAT_TEMPLATE = "chat_template.jinja"
END_IDS = ("eos", "eot", "eom")
"""Tokens that a file names as ends: of the sequence, of a turn, of a message. Many name the first alone."""
FORM = 4
"""Of what is made of a file; folders of another one are left alone, and may be removed."""
INSTEAD = "Set target.model to a whole GGUF file, or to the model's own folder or Hub id"


def find(model: str, revision: str) -> Path | None:
    """The GGUF file that `target.model` names: a path, or OWNER/NAME/FILE.gguf on the Hub. None when it names none.

    Raises TargetError for a file that is not there.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return path
    if path.suffix.lower() != ".gguf" or path.is_dir():
        return None
    there = ON_THE_HUB.fullmatch(model)
    if there is None or path.parent.is_dir():
        raise TargetError(f"there is no file {model}. {INSTEAD}")
    from huggingface_hub import hf_hub_download

    try:
        cached = not hub.answers()  # the Hub's client would try for minutes
        return Path(hf_hub_download(there["repo"], there["file"], revision=revision, local_files_only=cached))
    except (OSError, ValueError) as error:
        where = f"{there['file']} of {there['repo']} from the Hub"
        raise TargetError(f"cannot fetch {where}: {first_line(error)}. {INSTEAD}{hub.login(error)}") from error


def unpack(file: Path, dtype: torch.dtype, *, own_template: bool = False) -> Path:
    """The folder of a GGUF file's model in `dtype`; the first call makes it, which takes seconds to minutes.

    Raises TargetError for what is no GGUF, is damaged, or cannot be read by transformers. With `own_template`, the
    first call raises DataError for a file that has no chat template.
    """
    import filelock

    with file.open("rb") as start:
        if start.read(4) != b"GGUF":
            raise TargetError(f"{file} is a file, and no GGUF. {INSTEAD}")
    with _cache() as cache:
        if (folder := _known(file, cache, dtype)) and folder.is_dir():
            return folder
        with filelock.FileLock(cache / ".lock"):  # one process converts, the others wait for it
            write_text(_sum_file(file, cache), file_sha256(file))
            folder = _known(file, cache, dtype)
            assert folder is not None
            if not folder.is_dir():
                fields = _check(file)
                if own_template and not (fields.get("tokenizer.chat_template") or _beside(file)):
                    template.known(str(file))
                gguf_splits.warn(file, fields)
                partial = cache / f".{folder.name}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                try:
                    with _quiet_unless_seen():
                        _convert(file, dtype, partial)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
            return folder


def weights(file: Path) -> int | None:
    """How many numbers the file's tensors have; None for one that cannot be read, of which `unpack` tells.

    From what was made of it before, if it was: its vocabulary alone takes seconds to read.
    """
    with contextlib.suppress(TargetError, ImportError, OSError), _cache() as cache:
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            if (folder := _known(file, cache, dtype)) and folder.is_dir():
                return checkpoint.weights(str(folder), {})
        return sum(int(tensor.n_elements) for tensor in _read(file)[1].values())
    return None


def add_template(tokenizer: Any, file: Path) -> None:
    """Name a tokenizer by its GGUF file, and give it the chat template beside the file where the file holds none."""
    tokenizer.name_or_path = str(file)
    if not tokenizer.chat_template:
        tokenizer.chat_template = _beside(file) or None


def _beside(file: Path) -> str:
    """The chat template beside a file; '' where there is none."""
    beside = file.with_name(CHAT_TEMPLATE)
    return beside.read_text(encoding="utf-8") if beside.is_file() else ""


@contextlib.contextmanager
def _cache() -> Iterator[Path]:
    from huggingface_hub import cached_assets_path

    try:
        cache = cached_assets_path(library_name="coral", namespace="gguf", subfolder="sums").parent
        yield cache
    except (OSError, ValueError) as error:
        raise TargetError(
            f"cannot keep a dequantised GGUF in the Hugging Face cache: {error}. Free some room, or set HF_HOME to a "
            "folder that can be written"
        ) from error


def _quiet_unless_seen() -> contextlib.AbstractContextManager[Any]:
    """transformers draws bars of its own; in a log they are noise."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())


def _sum_file(file: Path, cache: Path) -> Path:
    state = file.stat()
    name = fingerprint([str(file.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino])
    return cache / "sums" / name


def _known(file: Path, cache: Path, dtype: torch.dtype) -> Path | None:
    """Where the file's folder is or will be; None when the file, as it is now, was not read before."""
    known = _sum_file(file, cache)
    if not known.exists():
        return None
    return cache / f"{known.read_text(encoding='utf-8')}-{str(dtype).removeprefix('torch.')}-{FORM}"


def _check(file: Path) -> dict[str, Any]:
    """The metadata of a file. Raises TargetError for one that lacks what a target needs, before minutes are spent on
    it."""
    if importlib.util.find_spec("gguf") is None:
        raise TargetError(f"reading {file} needs the package gguf. Run, in coral's folder: pip install '.[gguf]'")
    fields, tensors = _read(file)
    if "general.architecture" not in fields:
        raise TargetError(f"{file} does not say of which architecture its model is. {INSTEAD}")
    if (fields.get("split.count") or 1) > 1:
        first = file.with_name(re.sub(r"-\d{5}-of-", "-00001-of-", file.name))
        raise TargetError(
            f"{file} is one of {fields['split.count']} parts. "
            f"Join them with: llama-gguf-split --merge {first} WHOLE.gguf"
        )
    if "tokenizer.ggml.tokens" not in fields:
        raise TargetError(f"{file} holds no tokenizer. {INSTEAD}")
    gguf_rope.scaling(file, fields, tensors)
    return fields


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The file's metadata, of an array how long it is; and its tensors by name, as `gguf` has them.

    Raises TargetError when the file ends early or is damaged.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        fields = {
            name: len(field.data) if field.types[:1] == [gguf.GGUFValueType.ARRAY] else field.contents()
            for name, field in reader.fields.items()
        }
        return fields, {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise TargetError(
            f"{file} is damaged, or was cut off while it was copied ({first_line(error)}). Fetch it again"
        ) from error


def _convert(file: Path, dtype: torch.dtype, folder: Path) -> None:
    """Let transformers read the file, and save what it made of it. Raises TargetError when it cannot."""
    import transformers

    alone = folder / "gguf"
    alone.mkdir(parents=True)
    (alone / "model.gguf").symlink_to(file.resolve())  # alone: what lies beside the file must not be read with it
    options: dict[str, Any] = {"gguf_file": "model.gguf"}
    whole = dict(options)
    if hasattr(transformers, "GgufConfig"):  # newer than our floor: else weights may stay in their blocks
        whole["quantization_config"] = transformers.GgufConfig(dequantize=True)
    fields, tensors = _read(file)
    try:
        config = transformers.AutoConfig.from_pretrained(alone, **options)
        if config.model_type == "llama":  # Granite Code's biases, of which the metadata says nothing
            config.attention_bias = "blk.0.attn_q.bias" in tensors
            config.mlp_bias = "blk.0.ffn_up.bias" in tensors
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            alone, config=config, dtype=dtype, output_loading_info=True, **whole
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(alone, **options)
    except (OSError, ValueError, KeyError, ImportError, NotImplementedError, RuntimeError) as error:
        raise TargetError(f"transformers cannot read {file}: {first_line(error)}. {INSTEAD}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise TargetError(f"{file} lacks {len(missing)} of its model's tensors, {missing[0]} among them. {INSTEAD}")
    if spare := _spare(model, report, fields, tensors):
        raise TargetError(
            f"{file} holds tensors for which {type(model).__name__} of transformers has no place ({len(spare)}, the "
            f"first: {spare[0]}). {gguf_rope.INSTEAD}"
        )
    gguf_rope.apply(model.config, fields, gguf_rope.scaling(file, fields, tensors))
    ends = [int(fields[key]) for name in END_IDS if (key := f"tokenizer.ggml.{name}_token_id") in fields]
    model.generation_config.eos_token_id = sorted(set(ends)) or tokenizer.eos_token_id
    model.hf_quantizer = None  # the weights are plain: nothing of the file's form is left
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    shutil.rmtree(alone)
    model.save_pretrained(folder)
    gguf_splits.save(tokenizer, fields, folder)


def _spare(model: Any, report: dict[str, Any], fields: dict[str, Any], tensors: dict[str, Any]) -> list[str]:
    """The file's tensors that transformers left out, sorted; its older reader does so without a word. Rotary factors
    are read by gguf_rope.py."""
    if getattr(getattr(model, "hf_quantizer", None), "supported", False):  # its newer reader
        return sorted(report["unexpected_keys"])
    from transformers import modeling_gguf_pytorch_utils as reader

    kind = reader.TENSOR_PROCESSORS.get(fields["general.architecture"], reader.TensorProcessor)
    placed = {gguf_rope.FACTORS, *reader.get_gguf_hf_weights_map(model, kind(config={}))}
    return sorted(name for name in tensors if placed.isdisjoint((name, name.removesuffix(".weight"))))
