"""From the target's logits to the token: greedy and sampled picks by one rule.

    x = argmax_v (log p(v) + g(v))        p after all processors; g keyed by (seed, absolute position)

Greedy is g = 0. Each row is picked on its own, so one token per tree node is drawn at once.
Axes: N row, V vocabulary, L token of a row's own past.
"""

import dataclasses
import functools
from typing import Protocol

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from coral_core.decoding.noise import gumbel
from coral_core.decoding.tree import Draft
from coral_core.decoding.verify import Verdict, judge


class Picker(Protocol):
    """What decides the next token: a Sampler, or the caller's own code (generate.py)."""

    @property
    def temperature(self) -> float: ...
    @property
    def looks_back(self) -> bool: ...
    def pick(
        self, logits_NV: torch.Tensor, position_N: torch.Tensor, past_NL: torch.Tensor | None = None
    ) -> torch.Tensor: ...
    def judge(
        self, draft: Draft, logits_MV: torch.Tensor, position_M: torch.Tensor, past_ML: torch.Tensor | None = None
    ) -> Verdict: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a token is picked. `temperature` 0 is greedy; `top_p` 1, `top_k` 0, `min_p` 0, a penalty of 1 are off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def looks_back(self) -> bool:
        """Whether a pick depends on the tokens before it, which `pick` is then given."""
        return self.repetition_penalty != 1.0

    @functools.cached_property
    def _processors(self) -> LogitsProcessorList:
        """In the order in which `model.generate` applies them."""
        chain = LogitsProcessorList()
        if self.looks_back:
            chain.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.temperature == 0:
            return chain  # the others leave the most likely token where it is
        if self.temperature != 1.0:
            chain.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            chain.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            chain.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            chain.append(MinPLogitsWarper(self.min_p))
        return chain

    def warp(self, logits_NV: torch.Tensor, past_NL: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of the distribution that is sampled from, by transformers' own processors."""
        return self._processors(past_NL, logits_NV.float())

    def pick(
        self, logits_NV: torch.Tensor, position_N: torch.Tensor, past_NL: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One token id per row [N]; `position_N` is the absolute position that the picked token will take.

        `past_NL` holds the tokens before each row's pick, prompt included, in any order and as often as one likes
        (see history.py); wanted when the sampler `looks_back`. An unnormalised log p serves as well: a constant per
        row does not move the argmax.
        """
        if self.temperature == 0:
            return (self.warp(logits_NV, past_NL) if self.looks_back else logits_NV).argmax(-1)
        return (self.warp(logits_NV, past_NL) + self.noise(position_N, logits_NV.shape[-1])).argmax(-1)

    def judge(
        self, draft: Draft, logits_MV: torch.Tensor, position_M: torch.Tensor, past_ML: torch.Tensor | None = None
    ) -> Verdict:
        """Pick at every row of a drafted tree, and follow the picks; arguments as for `pick`."""
        return judge(draft, self.pick(logits_MV, position_M, past_ML))

    def noise(self, position_N: torch.Tensor, vocab: int) -> torch.Tensor:
        """The noise [N,V]. Nodes of one depth share a position: each distinct one is hashed once."""
        distinct_P, row_N = position_N.unique(return_inverse=True)
        token_V = torch.arange(vocab, device=position_N.device)
        return gumbel(self.seed, distinct_P, token_V)[row_N]
