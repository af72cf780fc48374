"""The noise is fair: draws follow p, positions and seeds are independent."""

import torch

from coral_core.decoding.noise import gumbel
from coral_core.decoding.sampling import Sampler

DRAWS = 100_000
LOGITS_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def assert_follows(picked_N: torch.Tensor, p_V: torch.Tensor) -> None:
    """Every token's frequency within 3 sigma of its probability; impossible tokens never."""
    frequency_V = torch.bincount(picked_N, minlength=p_V.numel()) / picked_N.numel()
    sigma_V = (p_V * (1 - p_V) / picked_N.numel()).sqrt()
    assert ((frequency_V - p_V).abs() <= 3 * sigma_V).all(), (frequency_V, p_V)


def draw(sampler: Sampler) -> torch.Tensor:
    logits_NV = LOGITS_V.expand(DRAWS, -1)
    return sampler.pick(logits_NV, torch.arange(DRAWS))


def test_draws_over_positions_follow_the_distribution() -> None:
    for temperature in (0.5, 1.0, 1.5):
        assert_follows(draw(Sampler(temperature=temperature, seed=7)), (LOGITS_V / temperature).softmax(0))


def test_draws_over_seeds_follow_the_distribution() -> None:
    position_1, token_V = torch.tensor([3]), torch.arange(6)
    noise = torch.cat([gumbel(seed, position_1, token_V) for seed in range(20_000)])
    assert_follows((LOGITS_V + noise).argmax(-1), LOGITS_V.softmax(0))


def test_top_k_and_top_p_cut_the_distribution() -> None:
    p_V = LOGITS_V.softmax(0)
    top_k = torch.where(torch.arange(6) < 3, p_V, 0.0)
    assert_follows(draw(Sampler(temperature=1.0, top_k=3, seed=1)), top_k / top_k.sum())
    kept = int((p_V.cumsum(0) < 0.9).sum()) + 1
    top_p = torch.where(torch.arange(6) < kept, p_V, 0.0)
    assert_follows(draw(Sampler(temperature=1.0, top_p=0.9, seed=2)), top_p / top_p.sum())


def test_consecutive_draws_are_independent() -> None:
    """Pairs of neighbouring positions follow the product of the marginals."""
    picked_N = draw(Sampler(temperature=1.0, seed=5))
    p_V = LOGITS_V.softmax(0)
    assert_follows(picked_N[:-1] * 6 + picked_N[1:], (p_V[:, None] * p_V).flatten())


def test_noise_depends_on_seed_position_and_token_alone() -> None:
    token_V = torch.arange(1000)
    whole = gumbel(3, torch.tensor([5, 6]), token_V)
    assert torch.equal(gumbel(3, torch.tensor([6]), token_V[10:20]), whole[1:, 10:20])
    assert not torch.equal(gumbel(4, torch.tensor([5]), token_V), whole[:1])
    assert not torch.equal(gumbel(3 + (1 << 40), torch.tensor([5]), token_V), whole[:1])


def test_noise_is_finite_for_a_real_vocabulary() -> None:
    noise = gumbel(0, torch.arange(50), torch.arange(151_936))
    assert noise.isfinite().all()
    assert abs(float(noise.mean()) - 0.57722) < 0.002  # Euler's constant: the mean of a Gumbel


def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampler().pick(torch.tensor([[0.0, 2.0, 2.0]]), torch.tensor([9])).tolist() == [1]
