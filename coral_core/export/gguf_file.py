"""A drafter of EAGLE-3's shape as a GGUF file, as llama.cpp's architecture `eagle3` reads it (src/models/eagle3.cpp).

Queries and keys are laid out for its RoPE, which turns neighbours (0, 1), (2, 3) … where ours turns halves. The weights
are float32, the drafter's own bits. Embedding and LM head are left out where the target lends them: llama.cpp takes
them from the target's context, and its tokenizer from the target's file.
Axes: D hidden, X any axes: heads and their width as one.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch

from coral_core.drafter.config import DrafterConfig
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError, CoralError
from coral_core.export.refusal import OTHERWISE, OURS

ARCHITECTURE = "eagle3"
LAYER = {
    "input_layernorm": "attn_norm",
    "hidden_norm": "attn_norm_2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Our names of the layer's tensors -> llama.cpp's."""
NAMES = {"fc": "fc", "norm": "output_norm", "lm_head": "output"}


def refuse(drafter: Drafter) -> None:
    """Raises ArtifactError when llama.cpp would not load this drafter, or would compute something else with it."""
    config = drafter.config
    if not config.taps:
        raise ArtifactError(f"llama.cpp drafts with EAGLE-3's shape only; this drafter has EAGLE-2's. {OURS}")
    for key in ("norm_output", "fc_norm"):
        if getattr(config, key):
            raise ArtifactError(f"llama.cpp has no {key} (EAGLE-3.1), which this drafter has. {OTHERWISE}")
    if len(config.taps) != 3:
        raise ArtifactError(f"llama.cpp reads three layers of the target, and this drafter {len(config.taps)}. {OURS}")
    if (kind := config.rope_parameters.get("rope_type", "default")) != "default":
        raise ArtifactError(f"coral does not write RoPE of type '{kind}' into a GGUF file. {OURS}")


def write_gguf(drafter: Drafter, file: Path) -> None:
    """Write the file. Raises CoralError when the package gguf is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise CoralError("writing a GGUF file needs the package gguf. Run, in coral's folder: pip install '.[gguf]'")
    import gguf

    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    config = drafter.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for key in ("target_layers", "extract_layers"):  # its name since summer 2026, and before
        writer.add_array(f"{ARCHITECTURE}.{key}", list(config.taps))
    writer.add_uint32(f"{ARCHITECTURE}.target_hidden_size", config.hidden_size)
    writer.add_bool(f"{ARCHITECTURE}.norm_before_residual", config.norm_before_residual)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in gguf_tensors(drafter):
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(drafter: Drafter) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor by llama.cpp's name."""
    config = drafter.config
    for name, tensor in drafter.state_dict().items():
        tensor = tensor.detach().cpu()
        if name == "d2t":
            yield "d2t", drafter.draft_tokens.cpu()  # the tokens themselves, where a checkpoint has their offsets
            continue
        whole = name.removesuffix(".weight")
        own = NAMES[whole] if whole in NAMES else f"blk.0.{LAYER[whole.removeprefix('layers.0.')]}"
        if whole.endswith(("q_proj", "k_proj")):
            tensor = neighbours(tensor, config)
        yield f"{own}.weight", tensor.float().contiguous()


def neighbours(weight_XD: torch.Tensor, config: DrafterConfig) -> torch.Tensor:
    """Rows of each head reordered: 0, E/2, 1, E/2 + 1, …"""
    half = config.head_dim // 2
    return weight_XD.unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2)
