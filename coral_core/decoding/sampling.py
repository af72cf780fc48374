"""From the target's logits to the token: greedy and sampled picks by one rule.

    x = argmax_v (log p(v) + g(v))        p after temperature, top-k, top-p; g keyed by (seed, absolute position)

Greedy is g = 0. Each row is picked on its own, so one token per tree node is drawn at once.
Axes: N row, V vocabulary.
"""

import dataclasses
import functools

import torch

from coral_core.decoding.noise import gumbel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the next token is picked. Temperature 0 is greedy; `top_p` 1 and `top_k` 0 are off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    @functools.cached_property
    def _warpers(self) -> list[object]:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        warpers: list[object] = []
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers

    def warp(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """Logits of the distribution that is sampled from, by transformers' own processors."""
        scores_NV = logits_NV.float()
        for warper in self._warpers:
            scores_NV = warper(None, scores_NV)  # type: ignore[operator]
        return scores_NV

    def pick(self, logits_NV: torch.Tensor, position_N: torch.Tensor) -> torch.Tensor:
        """One token id per row [N]; `position_N` is the absolute position that the picked token will take.

        An unnormalised log p serves as well: a constant per row does not move the argmax.
        """
        if self.temperature == 0:
            return logits_NV.argmax(-1)
        return (self.warp(logits_NV) + self.noise(position_N, logits_NV.shape[-1])).argmax(-1)

    def noise(self, position_N: torch.Tensor, vocab: int) -> torch.Tensor:
        """The noise [N,V]. Nodes of one depth share a position: each distinct one is hashed once."""
        distinct_P, row_N = position_N.unique(return_inverse=True)
        token_V = torch.arange(vocab, device=position_N.device)
        return gumbel(self.seed, distinct_P, token_V)[row_N]
