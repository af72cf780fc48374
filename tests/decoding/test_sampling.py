"""The noise is fair: draws follow p, positions and seeds are independent."""

import pytest
import torch

from coral_core.decoding.noise import MEMO_ROWS, NoiseRows, gumbel
from coral_core.decoding.sampling import Ahead, Sampler
from coral_core.errors import DataError

DRAWS = 100_000
LOGITS_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def assert_follows(picked_N: torch.Tensor, p_V: torch.Tensor) -> None:
    """Every token's frequency within 3 sigma of its probability; impossible tokens never."""
    frequency_V = torch.bincount(picked_N, minlength=p_V.numel()) / picked_N.numel()
    sigma_V = (p_V * (1 - p_V) / picked_N.numel()).sqrt()
    assert ((frequency_V - p_V).abs() <= 3 * sigma_V).all(), (frequency_V, p_V)


def draw(sampler: Sampler) -> torch.Tensor:
    """As `pick` draws at each position: a test below holds it equal to what a draft is told of the picks' noise."""
    noise_NV = sampler.ahead(0, DRAWS, LOGITS_V.numel(), LOGITS_V.device).noise_TV
    return (sampler.warp(LOGITS_V[None]) + noise_NV).argmax(-1)


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


def grid(seeds: list[int], positions: int, tokens: int) -> torch.Tensor:
    """Noise [seed, position, token]."""
    position_T, token_V = torch.arange(positions), torch.arange(tokens)
    return torch.stack([gumbel(seed, position_T, token_V) for seed in seeds])


NEAR_SEEDS = [*range(128), *(2**40 + low for low in range(8)), *range(-8, 0), 2**63 - 1, 2**63 - 2]
"""Seeds that differ in a few bits, low or high."""


def test_no_two_seeds_and_positions_share_their_noise() -> None:
    """A seed that was combined with the position before it was mixed gave seed 1 the noise of seed 0 at p ^ 1."""
    noise_NV = grid(NEAR_SEEDS, 64, 6).flatten(0, 1)
    assert noise_NV.unique(dim=0).shape == noise_NV.shape
    drawn_NT = (grid([2**40, 2**40 + 3], 64, 6) + LOGITS_V).argmax(-1)
    assert not torch.equal(drawn_NT[0], drawn_NT[1])


def test_no_two_rows_are_permutations_of_each_other() -> None:
    """Without the second key, two rows whose keys differ in their low bits hash the same numbers in another order."""
    noise_NV = gumbel(0, torch.arange(30_000), torch.arange(256)).sort(-1).values
    assert noise_NV[:, :8].unique(dim=0).shape[0] == 30_000


def test_seeds_and_positions_are_independent_together() -> None:
    """Over a grid of 128 seeds and 128 positions: no neighbour of a draw says anything about it, and every number of
    draws of a token, by seed and by position, is as far from its mean as chance would have it."""
    uniform_NTV = torch.exp(-torch.exp(-grid(list(range(128)), 128, 5).double()))
    centred_NTV = (uniform_NTV - 0.5) * 12**0.5
    index_N = torch.arange(128)
    for seeds in (0, 1, 2, 3, 5, 32):
        for places in (0, 1, 2, 3, 5, 32):
            for tokens in (0, 1):
                if seeds == places == tokens == 0:
                    continue
                for other in ("xor", "shift"):
                    step = (lambda i, by: i ^ by) if other == "xor" else (lambda i, by: (i + by) % 128)
                    moved_NTV = centred_NTV[step(index_N, seeds)][:, step(index_N, places)].roll(tokens, -1)
                    correlation = float((centred_NTV * moved_NTV).mean())
                    bound = 4 * (2 / centred_NTV.numel()) ** 0.5  # a xor meets each pair twice
                    assert abs(correlation) < bound, (seeds, places, tokens, other)
    drawn_NT = (LOGITS_V[:5] + grid(list(range(128)), 128, 5)).argmax(-1)
    p = float(LOGITS_V[:5].softmax(0)[0])
    for dim in (0, 1):
        count_N = (drawn_NT == 0).sum(dim).double()
        spread = float(((count_N - 128 * p) ** 2).mean() / (128 * p * (1 - p)))
        assert abs(spread - 1) < 4 * (2 / 128) ** 0.5, "seeds must not be one multiset of draws"


def test_noise_is_finite_for_a_real_vocabulary() -> None:
    noise = gumbel(0, torch.arange(50), torch.arange(151_936))
    assert noise.isfinite().all()
    assert abs(float(noise.mean()) - 0.57722) < 0.002  # Euler's constant: the mean of a Gumbel


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1e-31, 1e-20, 1e-8])
def test_a_temperature_at_the_edge_of_float32_is_greedy(temperature: float) -> None:
    """Logits over 1e-38 are infinite, all of them that are above 0, and noise decided among them."""
    logits_NV = torch.tensor([[3.0, 5.0, 4.0], [-3.0, -5.0, -4.0]])
    for seed in range(4):
        assert Sampler(temperature=temperature, seed=seed).pick(logits_NV, 7).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [float("inf"), float("nan"), -1.0, -1e-40])
def test_what_is_no_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(DataError, match=r"temperature is .*; it must be 0 .greedy. or a finite number"):
        Sampler(temperature=temperature)


def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampler().pick(torch.tensor([[0.0, 2.0, 2.0]]), 9).tolist() == [1]


def test_the_noise_of_a_position_is_the_same_whoever_asks_and_when() -> None:
    rows, cpu = NoiseRows(seed=9), torch.device("cpu")
    for first, count in ((4, 3), (5, 4), (4, 1), (90, MEMO_ROWS + 5), (6, 2)):
        expected = gumbel(9, torch.arange(first, first + count), torch.arange(50))
        assert torch.equal(rows.at(first, count, 50, cpu), expected)
    assert rows.at(4, 1, 20, cpu).shape == (1, 20)


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=0.3, seed=1), Sampler(temperature=1.0, top_p=0.8)])
def test_a_drafter_that_knows_the_target_ranks_its_pick_first(sampler: Sampler) -> None:
    """The coupling: the noise that will decide is in the rank: with q = p, what will be drawn is drafted."""
    logits_NV = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    for position, logits_V in enumerate(logits_NV):
        ranked_1V = sampler.ahead(position, 1, 30, torch.device("cpu")).rank(
            0, logits_V.log_softmax(-1)[None], torch.arange(30)
        )
        assert ranked_1V.argmax() == sampler.pick(logits_V[None], position)
        assert abs(float(ranked_1V.exp().sum()) - 1) < 1e-5


def test_ranks_tell_how_often_a_draft_will_be_picked() -> None:
    """At temperature 1, when target and drafter differ by Gumbel noise, a rank is the frequency of being picked."""
    seed, position, draws = 3, 7, 20_000
    logq_V = LOGITS_V.log_softmax(0)
    ranked_V = (
        Sampler(temperature=1.0, seed=seed)
        .ahead(position, 1, 6, torch.device("cpu"))
        .rank(0, logq_V[None], torch.arange(6))[0]
    )
    apart_NV = -torch.log(-torch.log(torch.rand(draws, 6, generator=torch.Generator().manual_seed(1))))
    noise_1V = gumbel(seed, torch.tensor([position]), torch.arange(6))
    assert_follows((logq_V + apart_NV + noise_1V).argmax(-1), ranked_V.exp())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_greedy_pick_is_surer_than_a_draw(dtype: torch.dtype) -> None:
    """Chances of 1, 2 and 4 in 7 are 1, 4 and 16 in 21 for the largest, up to any factor, and known in float32."""
    logit_NC = torch.tensor([[1.0, 2.0, 4.0], [3.0, 6.0, 12.0]]).log().to(dtype)
    ranked_NC = Sampler().ahead(9, 1, 30, torch.device("cpu")).rank(0, logit_NC, torch.arange(3))
    assert ranked_NC.dtype == torch.float32
    torch.testing.assert_close(ranked_NC.exp(), torch.tensor([[1.0, 4.0, 16.0]] * 2) / 21, rtol=0, atol=1e-2)
    unknown_NC = Ahead(None, None).rank(0, logit_NC, torch.arange(3))
    torch.testing.assert_close(unknown_NC.exp(), torch.tensor([[1.0, 2.0, 4.0]] * 2) / 7, rtol=0, atol=1e-2)


def test_a_temperature_may_be_a_whole_number() -> None:
    """JSON's 2 is no float, which transformers' own warper insists on."""
    logits_1V = LOGITS_V[None]
    assert Sampler(temperature=2).pick(logits_1V, 3) == Sampler(temperature=2.0).pick(logits_1V, 3)
