"""The draft network (EAGLE-2's layout, arXiv 2406.16858): one decoder layer over [token embedding ; feature].

No training code and no decoding code: `attend` decides what a row sees, `lent` turns ids into embeddings, and the
head room turns the outputs into logits. Axes: B batch, T position, D hidden.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from coral_core.artifacts import MANIFEST, Manifest, check_files, remedy
from coral_core.drafter.blocks import Attend, DraftLayer, Rope, Turn
from coral_core.drafter.config import COMMAND, DrafterConfig
from coral_core.drafter.hub import fetch, upload
from coral_core.errors import ArtifactError
from coral_core.kernels.linear import PackedLinear
from coral_core.tensors import write_tensors

WEIGHTS = "model.safetensors"
FILES = ("config.json", WEIGHTS)
"""What a drafter is on disk, besides its manifest."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of weights that can be computed with as they are; quantized ones mean something else by their numbers."""


class Drafter(nn.Module):
    """Row t reads token t+1 and feature t, and predicts feature t+1."""

    manifest: Manifest | None = None
    """Where it came from, once `from_pretrained` has read it: the target that it was trained for, above all."""
    folder: Path | None = None
    """The folder that `from_pretrained` read; a grouped head may lie beside it, in head/."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.fc = PackedLinear(2 * hidden, hidden, bias=config.fc_bias)
        self.layers = nn.ModuleList([DraftLayer(hidden, heads, config.intermediate_size, config.rms_norm_eps)])
        self.rope = Rope(config.rotary())
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

    def forward(self, embed_BTD: torch.Tensor, feature_BTD: torch.Tensor, turn: Turn, attend: Attend) -> torch.Tensor:
        """The next features [B,T,D] from the embeddings of tokens t+1, features t, and `rope` of row positions t."""
        x_BTD = self.fc(torch.cat((embed_BTD, feature_BTD), dim=-1))
        return self.layers[0](x_BTD, turn, attend)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors; the embedding is the target's and is not repeated."""
        self.config.save(folder)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        write_tensors(weights, folder / WEIGHTS, {"format": "pt"})

    @classmethod
    def load(cls, folder: Path, command: str = COMMAND) -> "Drafter":
        """Read what `save` wrote, on the CPU and in the dtype on disk.

        Raises ArtifactError, naming the `command` that makes it anew, when a file is missing or damaged, or a tensor is
        absent, unknown or of another shape: never a partly random drafter.
        """
        path, mend = folder / WEIGHTS, remedy(folder, command)
        check_files(folder, FILES, command)
        config = DrafterConfig.load(folder, mend)
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"cannot read the drafter {path}: {error}. {mend}") from error
        return cls.build(config, weights, source=str(path), remedy=mend)

    @classmethod
    def build(
        cls, config: DrafterConfig, weights: Mapping[str, torch.Tensor], *, source: str, remedy: str
    ) -> "Drafter":
        """A frozen drafter of exactly these weights, in their own dtype.

        Raises ArtifactError, naming `source`, the first tensor that does not fit, and the `remedy`.
        """
        drafter = cls(config)
        expected = drafter.state_dict()
        for name in sorted(expected.keys() | weights.keys()):
            if name not in weights:
                raise ArtifactError(f"{source} lacks tensor '{name}'. {remedy}")
            if name not in expected:
                raise ArtifactError(f"{source} holds an unknown tensor '{name}'. {remedy}")
            if weights[name].shape != expected[name].shape:
                shapes = f"{tuple(weights[name].shape)}, not {tuple(expected[name].shape)}"
                raise ArtifactError(f"{source}: tensor '{name}' has shape {shapes}. {remedy}")
            if (dtype := weights[name].dtype) not in DTYPES:
                raise ArtifactError(f"{source}: tensor '{name}' is {dtype}; a drafter has no such weights. {remedy}")
        drafter.load_state_dict(weights, assign=True)
        return drafter.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> "Drafter":
        """The drafter of a folder or a Hub repository: coral's own, or a checkpoint of EAGLE-1, EAGLE-2 or HASS.

        Raises ArtifactError when there is none, or one that does not fit its own config in every tensor.
        """
        from coral_core.drafter.checkpoint import is_coral, read_checkpoint

        folder = fetch(str(name), revision)
        if not is_coral(folder):
            return read_checkpoint(folder).drafter
        drafter = cls.load(folder)
        drafter.folder = folder
        if (folder / MANIFEST).exists():
            drafter.manifest = Manifest.read(folder, "drafter", COMMAND)
        return drafter

    def save_pretrained(self, folder: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None) -> None:
        """Write config.json, model.safetensors and, when its origin is known, manifest.json; then push, if asked.

        `repo_id` is by default the folder's name, under the user's own account.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder)
        if self.manifest is not None:
            self.manifest.sealed(folder, *FILES).write(folder)
        if push_to_hub:
            upload(folder, repo_id or folder.name)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes; the commit's address.

        `options` are upload's: private, message. Raises CoralError with the Hub's reason, such as no login.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(Path(folder), repo_id, **options)
