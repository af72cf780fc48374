"""Ratios of tokens per round with an interval, paired by prompt and by seed.

A drafter's tau is all its tokens over all its rounds. Two methods are compared on the same prompts and the same seeds
(initial weights, order of the data, noise). Both are samples: other prompts might have been held out, another training
run. So the variance of the log-ratio is clustered two ways (Cameron, Gelbach and Miller 2011): by prompt, plus by seed,
minus what both count; never less than by prompt alone. A bootstrap over both counts a cell's own noise three times.

Axes: S seed, P prompt.
"""

import math

import numpy as np

NORMAL_95 = 1.96

Counts = tuple[np.ndarray, np.ndarray]
"""(tokens_SP, rounds_SP)"""


def tau(counts: Counts) -> float:
    """Tokens per round, micro."""
    tokens_SP, rounds_SP = counts
    return float(tokens_SP.sum() / rounds_SP.sum())


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
    tokens_SP, rounds_SP = counts
    share_SP: np.ndarray = tokens_SP / tokens_SP.sum() - rounds_SP / rounds_SP.sum()
    return share_SP


def _interval(value: float, share_SP: np.ndarray) -> list[float]:
    seeds, prompts = share_SP.shape
    by_prompt = (share_SP.sum(0) ** 2).sum() * prompts / max(1, prompts - 1)
    by_seed = (share_SP.sum(1) ** 2).sum() * seeds / max(1, seeds - 1)
    variance = max(by_prompt, by_prompt + by_seed - (share_SP**2).sum()) if seeds > 1 else by_prompt
    width = math.exp(NORMAL_95 * math.sqrt(variance))
    return [value / width, value * width]
