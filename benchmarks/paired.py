"""Ratios of tokens per round with an interval, paired by prompt and by seed.

A drafter's tau is all its tokens over all its rounds. Two methods are compared on the same prompts and the same seeds
(initial weights, order of the data, noise). Both are samples: other prompts might have been held out, another training
run. So the variance of the log-ratio is clustered two ways (Cameron, Gelbach and Miller 2011): by prompt, plus by seed,
minus what both count; never less than by prompt alone. A bootstrap over both counts a cell's own noise three times.
Where there are several seeds, the quantile is Student's with one degree of freedom less than the smaller number of
clusters, as the same authors say: three seeds tell little of how much seeds differ. With one seed nothing is known of
that, and an interval speaks of the prompts alone.

Axes: N row: a seed, P prompt.
"""

import math

import numpy as np

NORMAL_95 = 1.96
STUDENT_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Two-sided 95 % quantiles of 1, 2, 3 … degrees of freedom."""

Counts = tuple[np.ndarray, np.ndarray]
"""(tokens_NP, rounds_NP)"""


def tau(counts: Counts) -> float:
    """Tokens per round, micro."""
    tokens_NP, rounds_NP = counts
    return float(tokens_NP.sum() / rounds_NP.sum())


def tau_ci95(counts: Counts) -> list[float]:
    """95 % interval of tau."""
    return _interval(tau(counts), _influence(counts))


def ratio(first: Counts, second: Counts) -> float:
    """tau of `first` over tau of `second`."""
    return tau(first) / tau(second)


def ratio_ci95(first: Counts, second: Counts) -> list[float]:
    """95 % interval of the ratio; the two are paired by place."""
    return _interval(ratio(first, second), _influence(first) - _influence(second))


def quantile(seeds: int, prompts: int) -> float:
    """How many standard errors a 95 % interval reaches to either side."""
    freedom = min(seeds, prompts) - 1
    return STUDENT_95[freedom - 1] if seeds > 1 and 1 <= freedom <= len(STUDENT_95) else NORMAL_95


def _influence(counts: Counts) -> np.ndarray:
    """Each cell's first-order share of the error of log tau."""
    tokens_NP, rounds_NP = counts
    share_NP: np.ndarray = tokens_NP / tokens_NP.sum() - rounds_NP / rounds_NP.sum()
    return share_NP


def _interval(value: float, share_NP: np.ndarray) -> list[float]:
    seeds, prompts = share_NP.shape
    by_prompt = (share_NP.sum(0) ** 2).sum() * prompts / max(1, prompts - 1)
    by_seed = (share_NP.sum(1) ** 2).sum() * seeds / max(1, seeds - 1)
    variance = max(by_prompt, by_prompt + by_seed - (share_NP**2).sum()) if seeds > 1 else by_prompt
    width = math.exp(quantile(seeds, prompts) * math.sqrt(variance))
    return [value / width, value * width]
