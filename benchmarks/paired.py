"""Ratios of tokens per round with an interval, paired by prompt and by seed.

A drafter's tau is all its tokens over all its rounds. Two methods are compared on the same prompts and the same seeds
(initial weights, order of the data, noise). Both are samples: other prompts might have been held out, another training
run. So the variance of the log-ratio is clustered two ways (Cameron, Gelbach and Miller 2011): by prompt, plus by seed,
minus what both count; never less than by prompt alone. A bootstrap over both counts a cell's own noise three times.

Axes: N row: a seed, P prompt.
"""

import math

import numpy as np

NORMAL_95 = 1.96

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
    width = math.exp(NORMAL_95 * math.sqrt(variance))
    return [value / width, value * width]
