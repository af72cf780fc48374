"""Loading a target: model and tokenizer, what coral needs to know of them, and what its drafter is shaped like.

Axes: V vocabulary, D hidden.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from coral_core import embedded
from coral_core.errors import CoralWarning, TargetError, first_line
from coral_core.kernels.layers import pack, shorten_norms
from coral_core.kernels.precision import GAIN, bfloat16_over_float32
from coral_core.lent import Lent
from coral_core.recipe.schema import TargetSpec
from coral_core.target import checkpoint, gguf_file, named_templates, template
from coral_core.target.target import Target

MASKED_TYPES = {"full_attention", "sliding_attention"}
"""Layer types that an explicit mask fully describes; others keep a state that a rejected draft would spoil."""
LARGE = 50_000_000
"""A model of fewer weights is decoded in float32 on a processor: they stay in the caches, and bfloat16 gains nothing
(pico, 22 million: a plain step takes 16.5 ms in float32 and 16.3 in bfloat16)."""
SHARE = 0.8
"""Of a machine's memory, the most that a model's weights may take; of all its memory, so that the next run chooses as
this one did."""


def pick_device(device: str) -> torch.device:
    """`auto` is the first GPU when there is one. Raises TargetError for a device this machine lacks."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        kind, _, number = device.partition(":")
        if kind not in ("cpu", "cuda", "mps", "xpu") or (number and not number.isdigit()):
            raise TargetError(f"target.device is {device!r}; it must be auto, cpu, cuda or cuda:NUMBER") from error
        lacks = f"target.device is {device!r}, which this machine lacks ({first_line(error)})"
        raise TargetError(f"{lacks}. Set target.device=auto") from error


def pick_dtype(dtype: str, device: torch.device, weights: Callable[[], int | None]) -> torch.dtype:
    """`auto` is bfloat16 on a GPU, and on a processor that is faster in it or has no memory for float32, for a model
    that is large. Answers in 16 bits may differ from those in float32: the output names it.

    `weights` tells how many numbers the model has, None where that is not known; it is asked on a processor alone.
    """
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if device.type == "cpu" and dtype in ("auto", "bfloat16"):
        return _on_a_processor(dtype, weights())
    return named.get(dtype, torch.bfloat16 if device.type == "cuda" else torch.float32)


def _on_a_processor(dtype: str, weights: int | None) -> torch.dtype:
    """For `auto` or `bfloat16`, with a line where that is the slower one. SmolLM2-135M on Zen 3: 17 tokens/s drafted in
    bfloat16 and 21 in float32, and a prompt took four times as long; `prepare-data` of a larger model wrote 3.
    """
    if weights is not None and weights < LARGE:
        return torch.float32 if dtype == "auto" else torch.bfloat16
    times, needed, memory = bfloat16_over_float32(), 4 * (weights or 0), psutil.virtual_memory().total
    if dtype == "auto" and times * GAIN >= 1 and needed <= SHARE * memory:
        return torch.float32
    if times > GAIN:
        mend = "Set target.dtype=auto; float32 takes twice the memory"
        if needed > SHARE * memory:
            mend = f"Float32 would take {needed / 1e9:.1f} GB of this machine's {memory / 1e9:.1f}"
        slower = f"a tree of drafts takes this processor {times:.1f} times as long in it as in float32"
        warnings.warn(f"target.dtype is bfloat16, and {slower}. {mend}", CoralWarning, stacklevel=4)
    return torch.bfloat16


def load_target(spec: TargetSpec, *, dialogues: bool = False) -> Target:
    """Load model and tokenizer. Raises TargetError for what is not there or cannot be sped up; for `dialogues`,
    DataError for a tokenizer without a chat template, before the weights are read, which may take minutes."""
    device = pick_device(spec.device)
    if spec.graphs and device.type != "cuda":
        raise TargetError(f"target.graphs records CUDA graphs, and the target is on {device.type}; set it to false")
    file = None if spec.model == embedded.NAME else gguf_file.find(spec.model, spec.revision)
    if file is None:
        source, options = _source(spec)
        options = checkpoint.reachable(spec.model, source, options)
        dtype = pick_dtype(spec.dtype, device, lambda: checkpoint.weights(source, options))
    else:
        dtype = pick_dtype(spec.dtype, device, lambda: gguf_file.weights(file))
        own_template = dialogues and not spec.chat_template
        source, options = str(gguf_file.unpack(file, dtype, own_template=own_template)), {}
    config = checkpoint.load_config(spec.model, source, options)
    tokenizer = checkpoint.load_tokenizer(spec.model, source, config, options)
    if file is not None:
        gguf_file.add_template(tokenizer, file)
    if spec.chat_template:
        named_templates.choose(tokenizer, spec.chat_template)
    ends = named_templates.ends(tokenizer, incomplete=bool(spec.chat_template) or file is not None)
    if dialogues:
        template.template_of(tokenizer)
    model = checkpoint.load_model(spec.model, source, config, dtype, options).to(device)
    if ends:  # where `model.generate` is to stop too
        model.generation_config.eos_token_id = sorted({*_stop_ids(model, tokenizer), *ends})
    return dataclasses.replace(wrap(model, tokenizer), graphs=spec.graphs)


def wrap(model: Any, tokenizer: Any) -> Target:
    """A Target around a loaded model. Raises TargetError, and leaves the model as it was, when coral cannot decode
    speculatively with it."""
    with _undone_when_refused(model):
        target = _wrap(model, tokenizer)
    pack(model, [target.body, model.get_output_embeddings()])
    return target


def _wrap(model: Any, tokenizer: Any) -> Target:
    from coral_core.kernels import attention  # it imports transformers, which whoever has a model has loaded
    from coral_core.target.probe import probed

    config = model.config.get_text_config()
    if "flash" in str(own := model.config._attn_implementation):
        raise TargetError(
            f"{type(model).__name__} attends by {own}, which takes no mask for the rows of a draft. "
            'Load it with attn_implementation="sdpa"'
        )
    types = _layer_types(model, config)
    lent = _lend(model, config)
    positions = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
    window = int(config.sliding_window) if "sliding_attention" in types else 0
    model.eval().requires_grad_(False)
    shorten_norms(model)
    target = Target(
        model=model,
        tokenizer=tokenizer,
        lent=lent,
        fingerprint=_identify(model, tokenizer),
        stop_ids=_stop_ids(model, tokenizer),
        max_positions=positions,
        layer_types=types,
        window=window if window < positions else 0,
    )
    routed = _routes(target.body)
    attention.plug_in(model)
    if target.device.type == "cpu" and model.config._attn_implementation == attention.NAME and not routed:
        try:
            return probed(dataclasses.replace(target, exact=True))
        except TargetError:  # layers that compute with keys or masks themselves: DeepSeek's, Gemma 4's shared ones
            model.set_attn_implementation(own)
    target = probed(target)
    if target.device.type == "cpu" and target.dtype != torch.float32:
        dtype = str(target.dtype).removeprefix("torch.")
        does = "sends tokens to experts" if routed else "attends in a way of its own"
        warnings.warn(
            f"{type(model).__name__} {does}: in {dtype}, a drafted answer may differ from a plain one where two "
            "tokens are nearly tied. Set target.dtype=float32 for equal answers",
            CoralWarning,
            stacklevel=2,
        )
    return target


def _routes(body: Any) -> bool:
    """Whether tokens are sent to experts: the product of one has as many rows as come to it, and rounds by that."""
    for name, module in body.named_modules():
        stacked = any(weight.dim() == 3 and len(weight) > 1 for weight in module.parameters(recurse=False))
        if name.endswith("experts") or (stacked and not isinstance(module, torch.nn.Conv1d)):
            return True
    return False


@contextlib.contextmanager
def _undone_when_refused(model: Any) -> Iterator[None]:
    """Gives a model its modes, layer classes and attention back after an error."""
    modules = [(module, module.training, type(module)) for module in model.modules()]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    attention = model.config._attn_implementation
    try:
        yield
    except BaseException:
        for module, training, kind in modules:
            module.training, module.__class__ = training, kind
        for weight in trained:
            weight.requires_grad_(True)
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        raise


def drafter_shape(config: Any) -> dict[str, Any]:
    """The shape of the target's own decoder layer, as DrafterConfig's keywords. `config` is a Hugging Face config.

    Where the layers differ (Gemma 4's head size, Gemma 3n's MLP), each value is the one that most layers have.
    """
    config = config.get_text_config()
    hidden, heads = int(config.hidden_size), int(_common(config, "num_attention_heads"))
    return {
        "hidden_size": hidden,
        "intermediate_size": _intermediate(config, hidden),
        "num_attention_heads": heads,
        "num_key_value_heads": int(_common(config, "num_key_value_heads") or heads),
        "head_dim": int(_common(config, "head_dim") or hidden // heads),
        "vocab_size": int(config.vocab_size),
        "rms_norm_eps": float(getattr(config, "rms_norm_eps", None) or 1e-6),
        "max_position_embeddings": int(getattr(config, "max_position_embeddings", None) or 2048),
        "rope_parameters": _rope(config),
    }


def _intermediate(config: Any, hidden: int) -> int:
    """The width of the drafter's MLP. A config that gives the width of one expert alone, of which a token passes
    several (OLMoE, gpt-oss), is met by three times `hidden` at least; of wide experts one will do."""
    width = int(_common(config, "intermediate_size") or 4 * hidden)
    one_expert = getattr(config, "num_experts_per_tok", None) and not getattr(config, "moe_intermediate_size", None)
    return 3 * hidden if one_expert and width < 2 * hidden else width


def _common(config: Any, key: str) -> Any:
    """The value that most layers have; None where the config has none."""
    try:
        value = getattr(config, key, None)
    except RuntimeError:  # transformers refuses to give one value where the layers differ
        value = [getattr(layer, key, None) for layer in config.per_layer_config]
    return statistics.mode(value) if isinstance(value, list | tuple) and value else value


def _rope(config: Any) -> dict[str, Any]:
    """The rotary parameters of a full layer, for all of a head's dimensions."""
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in rope.values()):  # one set of parameters per layer type
        rope = rope.get("full_attention") or next(iter(rope.values()))
    theta = rope.get("rope_theta") or 10000.0
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and "short_factor" in rope:  # a factor for each turned dimension
        rope = {}
    rope = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
    return rope or {"rope_type": "default", "rope_theta": theta}


def tap_layers(config: Any) -> tuple[int, int, int]:
    """The layers (0 is the first) whose inputs an EAGLE-3 drafter reads: 2, n // 2 and n - 3 of n, as in EAGLE's code.

    With three to six layers, where these are not three different ones, they are spread. Raises TargetError for fewer.
    """
    layers = int(config.get_text_config().num_hidden_layers)
    if layers < 3:
        raise TargetError(
            f"the target has {layers} layers, and an EAGLE-3 drafter reads three. "
            "Set train.preset=drawn train.shape=eagle2"
        )
    return (2, layers // 2, layers - 3) if layers >= 7 else (layers // 4, layers // 2, layers - 1)


def _source(spec: TargetSpec) -> tuple[str, dict[str, Any]]:
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    folder = Path(embedded.model_source(spec.model)).expanduser()
    if folder.is_dir():
        return str(folder), options
    return spec.model, options | {"revision": spec.revision}


def _layer_types(model: Any, config: Any) -> tuple[str, ...]:
    """Raises TargetError for layers whose state a rejected draft would spoil, or that cannot place tree nodes."""
    name = type(model).__name__
    types = set(getattr(config, "layer_types", None) or [])
    if not types:
        types = {"sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"}
    strange = sorted(types - MASKED_TYPES)
    if getattr(model, "_is_stateful", False) and not getattr(config, "layer_types", None):
        strange = ["recurrent"]
    if strange:
        raise TargetError(
            f"{name} has layers of type '{strange[0]}', whose state cannot take back a rejected draft; "
            "coral needs full or sliding-window attention. Choose another target.model"
        )
    if any(getattr(layer, "attention_type", None) == "local" for layer in model.modules()):
        raise TargetError(
            f"{name} has local layers that count rows of the cache, where siblings of a draft have one position. "
            "Choose another target.model"
        )
    if model.base_model is model:
        raise TargetError(
            f"{name} does not say which part of it lies below its LM head (its base_model is itself), so its features "
            "cannot be read. Choose another target.model"
        )
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise TargetError(f"{name} takes no position ids, so tree nodes cannot be placed. Choose another target.model")
    return tuple(sorted(types))


def _lend(model: Any, config: Any) -> Lent:
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        raise TargetError(f"{type(model).__name__} has no LM head. Choose a causal LM as target.model")
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if scaling := float(getattr(config, "logits_scaling", None) or 0.0):  # Granite divides by it
        scale *= scaling if config.model_type.startswith("hyperclovax") else 1 / scaling
    embed_VD, head_VD = embed.weight.detach(), head.weight.detach()
    if embed_VD.shape[1] != config.hidden_size:
        raise TargetError(
            f"{type(model).__name__} has an embedding of width {embed_VD.shape[1]} and layers of width "
            f"{config.hidden_size}, and a drafter has one width. Choose another target.model"
        )
    return Lent(
        embed_VD=embed_VD,
        head_VD=embed_VD if head_VD.data_ptr() == embed_VD.data_ptr() else head_VD,
        head_bias_V=None if getattr(head, "bias", None) is None else head.bias.detach(),
        logit_scale=scale,
        logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )


def _identify(model: Any, tokenizer: Any) -> str:
    """A hash over every tensor's name, shape and first rows (as bfloat16, so that loading in float32 keeps it), the
    vocabulary's size and the chat template. Hashing all of an 8B model's bytes would take most of a minute."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        head = weight.detach().reshape(-1)[:64].to("cpu", torch.bfloat16).view(torch.uint8)
        digest.update(f"{name}{tuple(weight.shape)}".encode() + head.numpy().tobytes())
    if tokenizer is not None:
        digest.update(f"{len(tokenizer)}{tokenizer.chat_template}".encode())
    return digest.hexdigest()[:16]


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids at which `model.generate` stops: the generation config's, else the tokenizer's end of sequence."""
    stop = model.generation_config.eos_token_id
    if stop is None:
        stop = getattr(tokenizer, "eos_token_id", None)
    return frozenset([] if stop is None else [stop] if isinstance(stop, int) else stop)
