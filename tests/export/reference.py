"""EAGLE's draft layer again, from its papers and the tensor names alone: plain tensors, loops over heads, no cache.

Reads an exported folder itself and shares nothing with coral_core.
"""

import json
import math
from pathlib import Path

import safetensors.torch
import torch


class Reference:
    """config.json and model.safetensors of a folder in EAGLE's layout."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = safetensors.torch.load_file(folder / "model.safetensors")

    def __call__(self, ids_T: list[int], feature_TD: torch.Tensor) -> torch.Tensor:
        """The next features: row t has read token t+1 and feature t."""
        embed_TD = torch.stack([self.weights["embed_tokens.weight"][token] for token in ids_T]).float()
        x_TD = torch.cat([embed_TD, feature_TD], dim=-1) @ self.weights["fc.weight"].T
        x_TD = x_TD + self.weights.get("fc.bias", 0.0)
        x_TD = x_TD + self.attention(x_TD)
        return x_TD + self.mlp(self.norm(x_TD))

    layer = "layers.0."

    def linear(self, x_TD: torch.Tensor, name: str) -> torch.Tensor:
        return x_TD @ self.weights[f"{self.layer}{name}.weight"].T

    def norm(self, x_TD: torch.Tensor, name: str = "post_attention_layernorm") -> torch.Tensor:
        scale_T1 = (x_TD.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt()
        return x_TD / scale_T1 * self.weights[f"{self.layer}{name}.weight"]

    def mlp(self, x_TD: torch.Tensor) -> torch.Tensor:
        gate = self.linear(x_TD, "mlp.gate_proj")
        return self.linear(gate / (1 + (-gate).exp()) * self.linear(x_TD, "mlp.up_proj"), "mlp.down_proj")

    def attention(self, x_TD: torch.Tensor) -> torch.Tensor:
        config, steps = self.config, len(x_TD)
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        size = config.get("head_dim", config["hidden_size"] // heads)
        query, key, value = (self.linear(x_TD, f"self_attn.{name}_proj") for name in "qkv")
        mixed = []
        for head in range(heads):
            shared = head // (heads // groups)
            own = self.turn(query[:, head * size : (head + 1) * size])
            seen = self.turn(key[:, shared * size : (shared + 1) * size])
            score_TT = own @ seen.T / math.sqrt(size)
            score_TT[torch.ones(steps, steps).triu(1).bool()] = -math.inf
            mixed.append(score_TT.softmax(-1) @ value[:, shared * size : (shared + 1) * size])
        return self.linear(torch.cat(mixed, dim=-1), "self_attn.o_proj")

    def turn(self, x_TE: torch.Tensor) -> torch.Tensor:
        """RoPE, pair by pair, as rotations of complex numbers (unscaled)."""
        steps, size = x_TE.shape
        power = torch.arange(size // 2) * 2 / size
        angle = torch.arange(steps)[:, None] / self.config["rope_theta"] ** power
        turned = torch.complex(x_TE[:, : size // 2], x_TE[:, size // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], dim=-1)


class WideReference(Reference):
    """The same of EAGLE-3's layer, in a folder that names it midlayer."""

    layer = "midlayer."

    def __call__(self, ids_T: list[int], tap_TI: torch.Tensor) -> torch.Tensor:
        """What the LM head reads: row t has read token t+1 and the taps of t."""
        embed_TD = torch.stack([self.weights["embed_tokens.weight"][token] for token in ids_T]).float()
        state_TD = tap_TI @ self.weights["fc.weight"].T
        joined_TD = torch.cat([self.norm(embed_TD, "input_layernorm"), self.norm(state_TD, "hidden_norm")], dim=-1)
        x_TD = state_TD + self.attention(joined_TD)
        x_TD = x_TD + self.mlp(self.norm(x_TD))
        scale_T1 = (x_TD.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt()
        return x_TD / scale_T1 * self.weights["norm.weight"]
