"""The draft network: one decoder layer, in one of two shapes.

EAGLE-2 (arXiv 2406.16858): the layer reads fc[embedding ; state]; a state is a feature, the target's or a drafted one,
and the LM head reads it as it is.
EAGLE-3 (arXiv 2503.01840): the layer reads [embedding ; state]; the first state is fc[taps], taken from three layers of
the target, the later ones are the layer's own output, and the LM head reads `norm` of it.

A row is drafted in three steps: `read` what the target gives, `forward`, and `hidden` for the LM head; the output of
`forward` is the state of the row after it.
No training code, no decoding code, no loading (load.py): `attend` decides what a row sees, `lent` turns ids into
embeddings, and the head room turns hidden states into logits.
Axes: B batch, T position, Q query: a row whose output is asked for, D hidden, I input width of what is read of the
target, C candidate: a row of the drafter's own LM head.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from coral_core.drafter.blocks import Attend, CosSin, DraftLayer, RMSNorm, Rope, WideLayer
from coral_core.drafter.config import DrafterConfig
from coral_core.kernels.layers import PackedLinear

if TYPE_CHECKING:
    from coral_core.artifacts import Manifest


class Drafter(nn.Module):
    """Row t reads token t+1 and the target's feature t, and predicts what the LM head makes token t+2 of."""

    manifest: "Manifest | None" = None
    """Where it came from, once `from_pretrained` has read it: the target that it was trained for, above all."""
    folder: Path | None = None
    """The folder that `from_pretrained` read; a grouped head may lie beside it, in head/."""
    d2t: torch.Tensor

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        hidden, eps = config.hidden_size, config.rms_norm_eps
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        layer: DraftLayer | WideLayer
        if config.taps:
            self.fc = PackedLinear(len(config.taps) * hidden, hidden, bias=False)
            early = config.norm_before_residual
            layer = WideLayer(hidden, heads, config.intermediate_size, eps, norm_before_residual=early)
            self.norm = RMSNorm(hidden, eps)
            if config.fc_norm:
                self.fc_norm = nn.ModuleList([RMSNorm(hidden, eps) for _ in config.taps])
            if rows := config.draft_vocab_size:
                self.lm_head = PackedLinear(hidden, rows, bias=False)
                self.register_buffer("d2t", torch.zeros(rows, dtype=torch.int64))
        else:
            self.fc = PackedLinear(2 * hidden, hidden, bias=config.fc_bias)
            layer = DraftLayer(hidden, heads, config.intermediate_size, eps)
        self.layers = nn.ModuleList([layer])
        self.rope = Rope(config.rotary())
        self._start_as_identity()

    @torch.no_grad()
    def _start_as_identity(self) -> None:
        """Begin near f̂ = f: `fc` passes the feature through (the last tap), and the layer adds little to it.

        Against random weights, at 300 steps on pico: tau 2.27 → 2.42 (20 nodes). The target's own last layer as a
        start was far worse (held-out accuracy 0.35 against 0.58): without an input norm its weights do not fit.
        """
        hidden = self.config.hidden_size
        self.fc.weight[:, -hidden:] += torch.eye(hidden, device=self.fc.weight.device)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(0.2)

    @torch.no_grad()
    def expect_sizes(self, sizes: Sequence[float]) -> None:
        """Scale the first weights such that taps of these sizes weigh alike.

        Layers are far apart (root mean squares in SmolLM2 3, 7 and 22, in pico 42, 56 and 81), and a first state of the
        last one's size would drown what attention adds to it.
        """
        for tap_DD, size in zip(self.fc.weight.split(self.config.hidden_size, dim=1), sizes, strict=True):
            tap_DD.div_(size)

    @property
    def draft_tokens(self) -> torch.Tensor:
        """The token of each row [C] of the drafter's own LM head."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def read(self, feature_BTI: torch.Tensor) -> torch.Tensor:
        """The first states [B,T,D] from what the target gives: its features, or its taps side by side.

        What stands behind the taps is left out: a target that is tapped gives its last hidden state there.
        """
        if not self.config.taps:
            return feature_BTI
        taps_BTI = feature_BTI[..., : self.fc.in_features]
        if self.config.fc_norm:
            parts = taps_BTI.split(self.config.hidden_size, dim=-1)
            taps_BTI = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(taps_BTI)

    def forward(
        self,
        embed_BTD: torch.Tensor,
        state_BTD: torch.Tensor,
        cos_sin: CosSin,
        attend: Attend,
        asked_Q: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The next states [B,T,D] from the embeddings of tokens t+1, states t, and `rope` of row positions t.

        With `asked_Q` only those of these rows, [B,Q,D]: the others give keys and values alone.
        """
        if not self.config.taps:
            return self.layers[0](self.fc(torch.cat((embed_BTD, state_BTD), dim=-1)), cos_sin, attend, asked_Q)
        out_BQD = self.layers[0](embed_BTD, state_BTD, cos_sin, attend, asked_Q)
        return self.norm(out_BQD) if self.config.norm_output else out_BQD

    def hidden(self, state_BTD: torch.Tensor) -> torch.Tensor:
        """What the LM head reads [B,T,D] of a drafted state."""
        return self.norm(state_BTD) if self.config.taps and not self.config.norm_output else state_BTD

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> "Drafter":
        """The drafter of a folder or a Hub repository: coral's own, or a checkpoint of EAGLE-1, 2, 3 or HASS.

        Raises ArtifactError when there is none, or one that does not fit its own config in every tensor.
        """
        from coral_core.drafter.load import load_pretrained

        return load_pretrained(str(name), revision)

    def save_pretrained(self, folder: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None) -> None:
        """Write config.json, model.safetensors and, when its origin is known, manifest.json; then push, if asked.

        `repo_id` is by default the folder's name, under the user's own account.
        """
        from coral_core.drafter.load import save_pretrained

        save_pretrained(self, Path(folder))
        if push_to_hub:
            self.push_to_hub(repo_id or Path(folder).name)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes; the commit's address.

        `options` are upload's: private, message. Raises CoralError with the Hub's reason, such as no login.
        """
        from coral_core.drafter.load import push_to_hub

        return push_to_hub(self, repo_id, **options)
