"""Gumbel noise that is a function of (seed, position, token) and of nothing else.

Plain and speculative decoding meet the same noise at the same position, whatever was drafted, so that they pick the
same token: a drafter-invariant coupling (Daliri, Musco and Suresh 2024). A counter-based hash rather than a generator:
no state to carry, any subset of positions or tokens at will, the same bits on every device.
Axes: N row, T position, V vocabulary.
"""

import hashlib
import struct

import torch

MEMO_ROWS = 64
"""Positions whose noise is kept: drafting, verification and the next round meet the same ones."""
BLOCK = 32
"""Positions that are hashed together on a GPU."""


def _signed(x: int) -> int:
    """The int32 with the bits of an unsigned 32-bit number."""
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >> 31 else x


def mix_(x: torch.Tensor) -> torch.Tensor:
    """The 32-bit finaliser `lowbias32` (Wellons, public domain), in place, on int32 that wraps like unsigned."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        high = (x >> shift).bitwise_and_((1 << (32 - shift)) - 1)  # an unsigned shift
        x.bitwise_xor_(high)
        if factor != 1:
            x.mul_(_signed(factor))
    return x


def _words(seed: int) -> tuple[int, ...]:
    """Four numbers of 32 bits that have nothing in common for different seeds, however close the seeds are."""
    return struct.unpack("<4I", hashlib.sha256(str(seed).encode()).digest()[:16])


def _key(position_N: torch.Tensor, first: int, second: int) -> torch.Tensor:
    return mix_(mix_(position_N.int() ^ _signed(first)).add_(_signed(second)))


def gumbel(seed: int, position_N: torch.Tensor, token_V: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise [N,V] in float32 for absolute positions [N] and token ids [V].

    Each position has two independent keys of 32 bits, and the token is hashed with one after the other: with one key,
    two rows whose keys differ in their low bits alone would be permutations of each other. The keys come from the
    hashed seed: of `position ^ seed`, seeds 0 and 1 would share their noise at positions p and p ^ 1. -log1p(-u) keeps
    full precision where it decides: at the large end, which small u give.
    """
    first, second, third, fourth = _words(seed)
    key_N1, other_N1 = _key(position_N, first, second)[:, None], _key(position_N, third, fourth)[:, None]
    bits_NV = mix_(mix_(token_V.int() ^ key_N1).add_(other_N1))
    uniform_NV = bits_NV.double().add_((bits_NV < 0) * 2.0**32).add_(0.5).mul_(2.0**-32)
    uniform_NV = uniform_NV.float().clamp_max_(1 - 2.0**-24)
    return uniform_NV.neg_().log1p_().neg_().log_().neg_()


class NoiseRows:
    """The noise of recent positions over a whole vocabulary: each position is hashed once, whoever asks first."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._row: dict[int, torch.Tensor] = {}
        self._token_V = torch.empty(0)

    def at(self, first: int, count: int, vocab: int, device: torch.device) -> torch.Tensor:
        """[T,V] for the positions from `first` on."""
        if self._token_V.numel() != vocab or self._token_V.device != device:
            self._token_V, self._row = torch.arange(vocab, device=device), {}
        wanted = range(first, first + count)
        missing = [position for position in wanted if position not in self._row]
        if missing:
            # On a GPU a block at a time: 80 small launches, whatever the number of rows.
            block = 1 if device.type == "cpu" else BLOCK
            span = range(missing[0], max(missing[-1] + 1, missing[0] + block))
            noise_TV = gumbel(self.seed, torch.arange(span.start, span.stop, device=device), self._token_V)
            self._row |= zip(span, noise_TV, strict=True)
        rows = [self._row[position] for position in wanted]
        while len(self._row) > max(MEMO_ROWS, count + BLOCK):
            self._row.pop(next(iter(self._row)))
        return rows[0][None] if count == 1 else torch.stack(rows)
