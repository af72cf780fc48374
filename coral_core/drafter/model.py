"""The draft network (EAGLE-2's layout, arXiv 2406.16858): one decoder layer over [token embedding ; feature].

No training code and no decoding code: `attend` decides what a row sees, `lent` turns ids into embeddings, and the
head room turns the outputs into logits. Axes: B batch, T position, D hidden.
"""

import dataclasses
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from coral_core.drafter.blocks import Attend, DraftLayer, Rope
from coral_core.drafter.config import DrafterConfig
from coral_core.errors import ArtifactError


class Drafter(nn.Module):
    """Row t reads token t+1 and feature t, and predicts feature t+1."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        from transformers import LlamaConfig

        self.config = config
        hidden = config.hidden_size
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.layers = nn.ModuleList([DraftLayer(hidden, heads, config.intermediate_size, config.rms_norm_eps)])
        self.rope = Rope(LlamaConfig(**dataclasses.asdict(config)))
        self._start_as_identity()

    @torch.no_grad()
    def _start_as_identity(self) -> None:
        """Begin near f̂ = f: `fc` passes the feature through, and the layer adds little to it.

        Against random weights, at 300 steps on pico: tau 2.27 → 2.42 (20 nodes). The target's own last layer as a
        start was far worse (held-out accuracy 0.35 against 0.58): without an input norm its weights do not fit.
        """
        hidden = self.config.hidden_size
        self.fc.weight[:, hidden:] += torch.eye(hidden, device=self.fc.weight.device)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(0.2)

    def forward(
        self, embed_BTD: torch.Tensor, feature_BTD: torch.Tensor, position_BT: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """The next features [B,T,D] from the embeddings of tokens t+1, features t, and row positions t."""
        x_BTD = self.fc(torch.cat((embed_BTD, feature_BTD), dim=-1))
        return self.layers[0](x_BTD, self.rope(position_BT, x_BTD.dtype), attend)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors; the embedding is the target's and is not repeated."""
        self.config.save(folder)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path) -> "Drafter":
        """Read what `save` wrote, on the CPU and in the dtype on disk.

        Raises ArtifactError when a file is missing or damaged, or a tensor is absent, unknown or of another shape:
        never a partly random drafter.
        """
        drafter = cls(DrafterConfig.load(folder))
        path = folder / "model.safetensors"
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"cannot read the drafter {path}: {error}. Run: coral train") from error
        expected = drafter.state_dict()
        for name in sorted(expected.keys() | weights.keys()):
            if name not in weights:
                raise ArtifactError(f"{path} lacks tensor '{name}'. Run: coral train")
            if name not in expected:
                raise ArtifactError(f"{path} holds an unknown tensor '{name}'. Run: coral train")
            if weights[name].shape != expected[name].shape:
                shapes = f"{tuple(weights[name].shape)}, not {tuple(expected[name].shape)}"
                raise ArtifactError(f"{path}: tensor '{name}' has shape {shapes}. Run: coral train")
        drafter.load_state_dict(weights, assign=True)
        return drafter.requires_grad_(False).eval()
