"""What the target lends to the drafter: its embedding, its LM head, and what its logits go through.

store/store.py saves it beside the features, so that training runs on a machine that never loads the target.
Axes: D hidden, V vocabulary, N row, X any axes.
"""

import dataclasses
import functools

import torch

from coral_core.kernels.layers import FILL, Packed, packs, wanted


@dataclasses.dataclass(frozen=True)
class Lent:
    """Frozen weights of the target that the drafter reads; `head_VD is embed_VD` when the target ties them."""

    embed_VD: torch.Tensor
    head_VD: torch.Tensor
    head_bias_V: torch.Tensor | None = None
    logit_scale: float = 1.0
    """The factor on the logits (Cohere, Granite)."""
    logit_softcap: float = 0.0
    """Gemma-2's tanh cap on the logits; 0 is none."""

    def logits(self, feature_XD: torch.Tensor, *, exact: bool = True) -> torch.Tensor:
        """The target's own logits [..., V] of features [..., D]: the full head, the reference.

        On a CPU one to three rows are filled up where they must be exact, as the kernels add in another order for so
        few. SmolLM2's head takes 14 ms for four rows in bfloat16 on Zen 3, and 4 for one.
        """
        rows = feature_XD.numel() // feature_XD.shape[-1]
        if exact and rows < FILL and self.head_VD.device.type == "cpu":
            filled_ND = torch.nn.functional.pad(feature_XD.reshape(rows, -1), (0, 0, 0, FILL - rows))
            return self.logits(filled_ND)[:rows].reshape(*feature_XD.shape[:-1], -1)
        if wanted() and packs(self.head_VD):
            return self.transform(self._packed.linear(feature_XD, self.head_bias_V))
        return self.transform(torch.nn.functional.linear(feature_XD, self.head_VD, self.head_bias_V))

    @functools.cached_property
    def _packed(self) -> Packed:
        """The head as it multiplies few rows on a CPU."""
        return Packed(self.head_VD)

    def transform(self, raw_XV: torch.Tensor) -> torch.Tensor:
        """Scale and cap raw products with head rows, as the target does."""
        if self.logit_scale != 1.0:
            raw_XV = raw_XV * self.logit_scale
        if self.logit_softcap:
            raw_XV = torch.tanh(raw_XV / self.logit_softcap) * self.logit_softcap
        return raw_XV

    def embed(self, ids_X: torch.Tensor) -> torch.Tensor:
        """Embeddings [..., D] of token ids [...]; no factor of the target's own (Gemma's): engines feed plain rows."""
        return torch.nn.functional.embedding(ids_X, self.embed_VD)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Lent":
        """A copy on another device or in another dtype; tied tensors stay tied."""
        embed_VD = self.embed_VD.to(device, dtype)
        tied = self.head_VD is self.embed_VD
        bias_V = None if self.head_bias_V is None else self.head_bias_V.to(device, dtype)
        return dataclasses.replace(
            self,
            embed_VD=embed_VD,
            head_VD=embed_VD if tied else self.head_VD.to(device, dtype),
            head_bias_V=bias_V,
        )
