"""A model and a tokenizer of transformers from a folder or the Hub, or one line that says what is wrong with them.

transformers gives random values to the weights that a checkpoint lacks, and leaves out what the model has no place for:
both with a warning. Here both are refused.
"""

import contextlib
import math
import re
import sys
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from coral_core import hub
from coral_core.errors import CoralWarning, TargetError, first_line

WEIGHTS = "*.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TEKKEN_TYPES = ("mistral", "mistral3", "ministral", "ministral3", "mixtral")
"""Model types whose tokenizer may be Mistral's Tekken, which has this token."""
TEKKEN_TOKEN = "[TOOL_CALLS]"
QUANTISED = (".bias", ".k_scale", ".v_scale")
"""What quantised checkpoints hold for nobody: AutoGPTQ's zero biases, scales of an 8-bit cache."""
LFS_POINTER = b"version https://git-lfs"
"""How the file begins that Git leaves in place of a large one which was not downloaded."""


def reachable(name: str, source: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options; where the Hub does not answer, with its client kept from trying.

    `source` is a folder or a Hub id, and `name` what the recipe calls it. Raises TargetError for a folder that is not
    there.
    """
    if Path(source).is_dir():
        return options
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise TargetError(f"there is no folder '{name}'. Set target.model to a folder, a GGUF file or a Hub id")
    return options if hub.answers() else options | {"local_files_only": True}


def weights(source: str, options: dict[str, Any]) -> int | None:
    """How many numbers the weights of a folder, or of a model on the Hub, have, by the headers of their files; None
    where these do not tell."""
    from huggingface_hub import get_safetensors_metadata, snapshot_download

    with contextlib.suppress(Exception):  # no such model, no network, a damaged file: loading it tells why
        if Path(source).is_dir():
            return _weights_of(Path(source))
        revision = options.get("revision")
        if options.get("local_files_only"):
            return _weights_of(Path(snapshot_download(source, revision=revision, local_files_only=True)))
        return sum(get_safetensors_metadata(source, revision=revision).parameter_count.values())
    return None


def _weights_of(folder: Path) -> int | None:
    """The same of a folder. Raises SafetensorError for a file that is damaged."""
    from safetensors import safe_open

    found = 0
    for path in folder.glob(WEIGHTS):
        if not path.name.startswith("consolidated"):  # Mistral's own form, beside transformers'
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                found += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return found or None


def load_config(name: str, source: str, options: dict[str, Any]) -> Any:
    """The config.json of a model. Raises TargetError when there is none, or transformers cannot read it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # transformers raises many kinds; the reason is passed on
        raise TargetError(f"cannot load target '{name}': {_reason(source, error)}") from error


def load_model(name: str, source: str, config: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """The causal LM in `source`. Raises TargetError for weights that are absent, damaged, or not as `config` says.

    Of a model that also reads images (Mistral Small 3.1, Qwen2.5-VL) it is the whole, and text is all that it is given.
    """
    import transformers as t

    pictured = (
        type(config) in t.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in t.MODEL_FOR_CAUSAL_LM_MAPPING
    )
    kind = t.AutoModelForImageTextToText if pictured else t.AutoModelForCausalLM
    with _quiet():
        try:
            model, info = kind.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told in `info`, and refused below
                **options,
            )
        except Exception as error:  # as above
            raise TargetError(f"cannot load target '{name}': {_reason(source, error)}") from error
    if fault := _fault(model, info):
        raise TargetError(
            f"cannot load target '{name}': {fault}. Restore its files, or set target.model to another model"
        )
    if spare := _left_out(model, info):
        warnings.warn(
            f"target '{name}' is quantised, and its files hold {_some(spare)}, for which {type(model).__name__} has no "
            "place: these are left out. Where answers are poor, set target.model to the model that is not quantised",
            CoralWarning,
            stacklevel=2,
        )
    return model


def load_tokenizer(name: str, source: str, config: Any, options: dict[str, Any]) -> Any:
    """The tokenizer in `source`. Raises TargetError when there is none, it does not load, or it loses spaces."""
    try:
        tokenizer = _tokenizer(source, config, options)
    except Exception as error:  # as above
        folder = Path(source)
        if folder.is_dir() and not any(folder.glob("*token*")):
            reason = f"{folder} holds none. Copy tokenizer.json and tokenizer_config.json there from the original model"
        elif pointer := _pointer(folder):
            reason = pointer
        else:
            reason = f"{first_line(error)}. Restore tokenizer.json and tokenizer_config.json"
        raise TargetError(f"target '{name}' has no tokenizer that loads: {reason}") from error
    if _loses_spaces(tokenizer):
        import transformers

        raise TargetError(
            f"the tokenizer of target '{name}' loses the spaces between words in transformers "
            f"{transformers.__version__}. Run: pip install -U transformers, or restore the model's own tokenizer.json "
            "and tokenizer_config.json"
        )
    return tokenizer


def _tokenizer(source: str, config: Any, options: dict[str, Any]) -> Any:
    """What transformers loads; of Mistral's Tekken the form with a chat template, and with its own split of words.

    Its published tokenizer.json splits otherwise, as transformers knows, and mends when it is told to.
    """
    from transformers import AutoTokenizer

    if config.model_type not in TEKKEN_TYPES:
        return AutoTokenizer.from_pretrained(source, **options)
    with _quiet():
        try:
            # named, though it says nothing: mistral-common's tokenizer, which has no chat template, is not taken then
            tokenizer = AutoTokenizer.from_pretrained(source, fix_mistral_regex=None, **options)
        except TypeError:  # transformers 5.0 gives it twice
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    unmended = getattr(getattr(tokenizer, "backend_tokenizer", None), "fix_mistral_regex", None) is False
    if unmended and TEKKEN_TOKEN in tokenizer.get_vocab():
        return AutoTokenizer.from_pretrained(source, fix_mistral_regex=True, **options)
    return tokenizer


def _loses_spaces(tokenizer: Any) -> bool:
    """Whether a text comes back as one word, though there is a token for a space: a fault of fast tokenizers alone."""
    if not getattr(tokenizer, "is_fast", False):
        return False
    ids = tokenizer("a b\n\nc 12", add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip().casefold()
    return text == "abc12" and not {" ", "Ġ", "▁"}.isdisjoint(tokenizer.get_vocab())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of missing weights, which is told in one line, and without its bar; a download
    keeps the Hub's own on a terminal."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    if sys.stderr.isatty():
        enable_progress_bars()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


# ---- what is wrong


def _reason(source: str, error: Exception) -> str:
    """Why a model did not load, and what mends it."""
    folder = Path(source)
    if folder.is_dir():
        return _adapter(folder) or _pickled(folder) or _damaged(folder) or f"{first_line(error)}. {_mend(folder)}"
    if not hub.answers():
        return (
            f"{hub.unreachable()}, and its cache does not hold the model. Set target.model to a folder, "
            "or run the command again with a network"
        )
    if "safetensors" in str(error):
        return f"{first_line(error)}. {_conversion(source, source.rpartition('/')[2])}"
    return f"{first_line(error)}. Set target.model to a folder or a Hub id of a causal LM{hub.login(error)}"


def _mend(folder: Path) -> str:
    if (folder / "config.json").exists():
        return "Restore its files, or set target.model to another folder or a Hub id of a causal LM"
    return f"{folder} holds no config.json. Set target.model to a folder or a Hub id of a causal LM"


def _adapter(folder: Path) -> str:
    """For a folder with a LoRA adapter alone."""
    if (folder / "config.json").exists() or not (folder / "adapter_config.json").exists():
        return ""
    return (
        f"{folder} holds a LoRA adapter alone (adapter_config.json). Merge it into its model with PEFT's "
        "merge_and_unload(), write model and tokenizer with save_pretrained(), and set target.model to that folder"
    )


def _pickled(folder: Path) -> str:
    """For a folder with pickled weights alone."""
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if not pickles or any(folder.glob(WEIGHTS)):
        return ""
    return f"its weights are pickled ({pickles[0]}). {_conversion(str(folder), str(folder))}"


def _conversion(source: str, folder: str) -> str:
    """The command that turns pickled weights into safetensors."""
    tokenizer = "" if source == folder else f"; t.AutoTokenizer.from_pretrained({source!r}).save_pretrained({folder!r})"
    return (
        "Coral reads safetensors only, since opening a pickle can run code. If you trust it, convert it with: "
        f'python -c "import transformers as t; t.AutoModelForCausalLM.from_pretrained({source!r}, '
        f'use_safetensors=False).save_pretrained({folder!r}){tokenizer}"'
    )


def _damaged(folder: Path) -> str:
    """Names the first weight file that does not open."""
    from safetensors import SafetensorError, safe_open

    if pointer := _pointer(folder):
        return pointer
    for path in sorted(folder.glob(WEIGHTS)):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path} ({path.stat().st_size:,} bytes) is truncated or damaged: {first_line(error)}. Restore it"
    return ""


def _pointer(folder: Path) -> str:
    """Names the first file that Git LFS has not downloaded."""
    for path in sorted(folder.glob("*.*")) if folder.is_dir() else []:
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS_POINTER):
            return f"{path} is a pointer of Git LFS, not the file itself. Run: git -C {folder} lfs pull"
    return ""


def _fault(model: Any, info: dict[str, Any]) -> str:
    """How a checkpoint differs from what its config.json describes; '' when it does not.

    Keys are missing where they are in no file and tied to nothing that is. A key too many is a fault inside a part that
    the model has: a further layer, a bias that is left out. A part of its own (a value head, a vision tower) is none,
    nor is a layer that predicts further tokens.
    """
    if info["mismatched_keys"]:
        key, found, expected = min(info["mismatched_keys"])
        return f"{key} has the shape {list(found)}, and config.json says {list(expected)}"
    if missing := info["missing_keys"]:
        return f"its files lack {_some(missing)}, which config.json asks for"
    if spare := set(_spare(model, info)).difference(_left_out(model, info)):
        return f"its files hold {_some(spare)}, for which config.json has no place"
    if failed := info.get("error_msgs"):
        return str(failed[0]).splitlines()[0]
    return ""


def _spare(model: Any, info: dict[str, Any]) -> list[str]:
    """The keys too many, inside a part that the model has."""
    return [key for key in info["unexpected_keys"] if _within(model, key) and not _predicts_further(model, key)]


def _predicts_further(model: Any, key: str) -> bool:
    """Whether a key belongs to a layer behind the last one that predicts further tokens (DeepSeek-V3, GLM-4.5)."""
    config, found = model.config.get_text_config(), re.search(r"\blayers\.(\d+)\.", key)
    more = getattr(config, "num_nextn_predict_layers", None) or 0
    return found is not None and 0 <= int(found[1]) - config.num_hidden_layers < more


def _left_out(model: Any, info: dict[str, Any]) -> list[str]:
    """Those of them that a quantised checkpoint may hold."""
    quantised = getattr(model.config, "quantization_config", None)
    return [key for key in _spare(model, info) if quantised and key.endswith(QUANTISED)]


def _within(model: Any, key: str) -> bool:
    """Whether a key belongs to a part of the model below its trunk."""
    modules = dict(model.named_modules())
    parts = key.split(".")
    owner = next(name for end in range(len(parts) - 1, -1, -1) if (name := ".".join(parts[:end])) in modules)
    return owner not in ("", model.base_model_prefix)


def _some(keys: Collection[str]) -> str:
    """The first key, and how many more."""
    first = min(keys, key=lambda key: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)])
    return first if len(keys) == 1 else f"{len(keys)} weights (the first: {first})"
