"""Paired intervals on counts whose answer is known."""

import numpy as np
import pytest

from benchmarks.paired import quantile, ratio, ratio_ci95, tau, tau_ci95

GENERATOR = np.random.default_rng(1)
ROUNDS = GENERATOR.integers(5, 30, (3, 200)).astype(float)
TOKENS = ROUNDS * GENERATOR.uniform(2, 4, (1, 200))  # prompts differ far more than seeds


def test_tau_is_all_tokens_over_all_rounds():
    assert tau((np.array([[4.0, 1.0]]), np.array([[1.0, 1.0]]))) == 2.5


def test_pairing_removes_what_prompts_share():
    """Two per cent more on every prompt: each tau is uncertain by several per cent, their ratio not at all."""
    low, high = tau_ci95((TOKENS, ROUNDS))
    assert (high - low) / low > 0.03
    more, less = (TOKENS * 1.02, ROUNDS), (TOKENS, ROUNDS)
    assert ratio(more, less) == pytest.approx(1.02)
    assert ratio_ci95(more, less) == pytest.approx([1.02, 1.02])


def test_few_seeds_take_students_quantile():
    assert [quantile(seeds, 100) for seeds in (1, 2, 3, 10, 31)] == [1.96, 12.706, 4.303, 2.262, 2.042]
    assert (quantile(100, 200), quantile(3, 2), quantile(3, 1)) == (1.96, 12.706, 1.96)


@pytest.mark.parametrize(("seeds", "seed_noise"), [(1, 0.0), (3, 0.02), (10, 0.02)])
def test_95_of_100_intervals_hold_the_truth(seeds, seed_noise):
    """200 comparisons without a difference; with noise of seeds, only where there are seeds to see it in."""
    generator, rounds_NP = np.random.default_rng(0), np.full((seeds, 200), 20.0)
    prompt_P, held = generator.uniform(2, 4, 200), 0
    for _ in range(200):
        pair = []
        for _ in range(2):
            noise_NP = generator.normal(1, 0.1, rounds_NP.shape) + generator.normal(0, seed_noise, (seeds, 1))
            pair.append((rounds_NP * prompt_P * noise_NP, rounds_NP))
        low, high = ratio_ci95(*pair)
        held += low < 1 < high
    assert 180 <= held <= 198  # 190 expected


def test_seeds_that_disagree_widen_the_interval():
    """+6 %, -3 %, 0 %: over prompts alone this would look certain."""
    factor_N1 = np.array([[1.06], [0.97], [1.0]])
    low, high = ratio_ci95((TOKENS * factor_N1, ROUNDS), (TOKENS, ROUNDS))
    assert low < 0.99 < 1.03 < high
