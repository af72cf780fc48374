"""From the target's logits to the token: greedy and sampled picks by one rule.

    x = argmax_v (log p(v) + g(v))        p after all processors; g keyed by (seed, absolute position)

Greedy is g = 0. Each row is picked on its own, so one token per tree node is drawn at once.
Axes: N row, V vocabulary, M tree row, C candidate token, T position (of the past, or of the levels of a draft), B
batch: a seat each.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
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

from coral_core.decoding.noise import NoiseRows
from coral_core.decoding.tree import Draft, Verdict, judge
from coral_core.errors import DataError

GAP_SCALE = 0.5
"""Scale of the difference between the drafter's and the target's logits, where the target is not drawn from."""
LEAST_TEMPERATURE = 1e-30
"""Below it a temperature counts as 0. Logits divided by less overflow float32, and what is left of them are equal
infinities, so that noise alone would pick; at this one any two float32 logits above 1e-20 that differ are a factor of
e^1000 apart, so that the pick is the greedy one."""


@dataclasses.dataclass(frozen=True)
class Ahead:
    """What a draft may know of the target's picks at the next positions, one per level of the tree."""

    sampler: "Sampler | None"
    """None where nothing is known: the draws are somebody else's."""
    noise_TV: torch.Tensor | None
    """The sampler's noise; none for greedy picks."""

    def rank(self, level: int, logit_NC: torch.Tensor, token_C: torch.Tensor) -> torch.Tensor:
        """`Sampler.rank` for the picks at a level."""
        if self.sampler is None:
            return logit_NC.log_softmax(-1, dtype=torch.float32)
        return self.sampler.rank(logit_NC, token_C, None if self.noise_TV is None else self.noise_TV[level])


class Picker(Protocol):
    """What decides the next token: a Sampler, or the caller's own code (api/generate.py)."""

    @property
    def temperature(self) -> float: ...
    @property
    def looks_back(self) -> bool: ...
    def pick(self, logits_NV: torch.Tensor, position: int, past_NT: torch.Tensor | None = None) -> torch.Tensor: ...
    def judge(
        self, draft: Draft, logits_MV: torch.Tensor, position: int, past_MT: torch.Tensor | None = None
    ) -> Verdict: ...
    def ahead(self, position: int, count: int, vocab: int, device: torch.device) -> "Ahead": ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a token is picked. `temperature` 0 is greedy; `top_p` 1, `top_k` 0, `min_p` 0, a penalty of 1 are off.

    Raises DataError for a temperature that is negative or not finite.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise DataError(f"temperature is {self.temperature:g}; it must be 0 (greedy) or a finite number above 0")
        temperature = 0.0 if self.temperature < LEAST_TEMPERATURE else float(self.temperature)  # JSON says 2 for 2.0
        object.__setattr__(self, "temperature", temperature)

    @property
    def looks_back(self) -> bool:
        """Whether a pick depends on the tokens before it, which `pick` is then given."""
        return self.repetition_penalty != 1.0

    @functools.cached_property
    def _warpers(self) -> LogitsProcessorList:
        """What needs no past, in the order in which `model.generate` applies it; nothing at temperature 0, where the
        most likely token stays where it is."""
        chain = LogitsProcessorList()
        if self.temperature not in (0.0, 1.0):
            chain.append(TemperatureLogitsWarper(self.temperature))
        if self.temperature and self.top_k:
            chain.append(TopKLogitsWarper(self.top_k))
        if self.temperature and self.top_p < 1.0:
            chain.append(TopPLogitsWarper(self.top_p))
        if self.temperature and self.min_p:
            chain.append(MinPLogitsWarper(self.min_p))
        return chain

    @functools.cached_property
    def _processors(self) -> LogitsProcessorList:
        """All of them: the penalty comes first."""
        penalty = [RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty))] if self.looks_back else []
        return LogitsProcessorList([*penalty, *self._warpers])

    @functools.cached_property
    def _rows(self) -> NoiseRows:
        return NoiseRows(self.seed)

    def warp(self, logits_NV: torch.Tensor, past_NT: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of the distribution that is sampled from, by transformers' own processors."""
        return self._processors(past_NT, logits_NV.float())

    def pick(self, logits_NV: torch.Tensor, position: int, past_NT: torch.Tensor | None = None) -> torch.Tensor:
        """One token id per row [N]; `position` is the absolute one that the picked token will take.

        `past_NT` holds the tokens before each row's pick, prompt included, in any order and as often as one likes
        (History in seat.py); wanted when the sampler `looks_back`. An unnormalised log p serves as well: a constant per
        row does not move the argmax.
        """
        if self.temperature == 0:
            # In bfloat16 a processor looks for the largest four times as long: 0.54 ms of 151,936 instead of 0.14.
            return (self.warp(logits_NV, past_NT) if self.looks_back else logits_NV).float().argmax(-1)
        return (self.warp(logits_NV, past_NT) + self._noise(position, logits_NV)).argmax(-1)

    def judge(
        self, draft: Draft, logits_MV: torch.Tensor, position: int, past_MT: torch.Tensor | None = None
    ) -> Verdict:
        """Pick at every row of a drafted tree, and follow the picks; the root's own pick takes `position`."""
        scores_MV = self.warp(logits_MV, past_MT) if self.temperature or self.looks_back else logits_MV
        if self.temperature:
            noise_TV = self._rows.at(position, draft.levels + 1, scores_MV.shape[-1], scores_MV.device)
            scores_MV = scores_MV + noise_TV[draft.depth_M]
        return judge(draft, scores_MV.float().argmax(-1))

    def ahead(self, position: int, count: int, vocab: int, device: torch.device) -> "Ahead":
        """What a draft may know of the picks at `count` positions from `position` on."""
        return Ahead(self, self._rows.at(position, count, vocab, device) if self.temperature else None)

    def rank(self, logit_NC: torch.Tensor, token_C: torch.Tensor, noise_V: torch.Tensor | None) -> torch.Tensor:
        """The drafter's log-probabilities that the target's *pick*, with that noise, will be each candidate [N,C].

        The pick is argmax(log p + g), and g is known. With log q for log p, what is uncertain is their difference; were
        it Gumbel noise too, of scale `sharpness`, the candidate with score s would win with probability
        softmax(s / sharpness). Only drafts depend on this, never what is said.
        """
        score_NC = logit_NC if noise_V is None else self._warpers(None, logit_NC.float()) + noise_V[token_C]
        return (score_NC * self.sharpness).log_softmax(-1, dtype=torch.float32)

    @property
    def sharpness(self) -> float:
        """1 for draws at temperature 0.5 and above; the argmax of a distribution is surer than a draw from it.

        Measured on pico, tau with the grouped head, 8 questions of mt-bench, 8 nodes: at temperature 0 by
        softmax(log q / x) 3.26 (x 1, EAGLE-2's score), 3.49 (0.7), 3.68 (0.5).
        """
        return self.temperature / max(self.temperature, GAP_SCALE) if self.temperature else 1 / GAP_SCALE

    def _noise(self, position: int, logits_NV: torch.Tensor) -> torch.Tensor:
        """[1,V]: one position's, for all rows."""
        return self._rows.at(position, 1, logits_NV.shape[-1], logits_NV.device)


def pick_together(samplers: Sequence[Sampler], logits_BV: torch.Tensor, position: Sequence[int]) -> torch.Tensor:
    """`pick` of one row by each sampler [B], at the row's position, where no sampler looks back."""
    if all(sampler.temperature == 0 for sampler in samplers):
        return logits_BV.float().argmax(-1)
    alike: dict[tuple[float, ...], list[int]] = {}
    for row, sampler in enumerate(samplers):
        alike.setdefault((sampler.temperature, sampler.top_p, sampler.top_k, sampler.min_p), []).append(row)
    picked_B = torch.empty(len(samplers), dtype=torch.long, device=logits_BV.device)
    for rows in alike.values():
        sampler, some_B = samplers[rows[0]], torch.tensor(rows, device=logits_BV.device)
        scores_BV = logits_BV[some_B] if len(alike) > 1 else logits_BV
        if sampler.temperature:
            noise = [samplers[row]._noise(position[row], logits_BV) for row in rows]
            scores_BV = sampler.warp(scores_BV) + torch.cat(noise)
        picked_B[some_B] = scores_BV.float().argmax(-1)
    return picked_B
