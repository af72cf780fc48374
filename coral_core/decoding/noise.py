"""Gumbel noise that is a function of (seed, position, token) and of nothing else.

Plain and speculative decoding meet the same noise at the same position, whatever was drafted, so that they pick the
same token: a drafter-invariant coupling (Daliri, Musco and Suresh 2024). A counter-based hash rather than a generator:
no state to carry, any subset of positions or tokens at will, the same bits on every device.
Axes: N row, V vocabulary.
"""

import torch

_32_BITS = 0xFFFFFFFF


def mix(x: torch.Tensor) -> torch.Tensor:
    """The 32-bit finaliser `lowbias32` (Wellons, public domain) on int64 holding unsigned 32-bit values."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _32_BITS
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _32_BITS
    return x ^ (x >> 16)


def gumbel(seed: int, position_N: torch.Tensor, token_XV: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise [N,V] in float32 for absolute positions [N] and token ids [V] or [N,V].

    Two rounds of hashing with independent keys per position. -log1p(-u) keeps full precision where it decides: at
    the large end, which small u give.
    """
    low = torch.tensor(seed & _32_BITS, device=position_N.device)
    high = torch.tensor((seed >> 32) & _32_BITS, device=position_N.device)
    key_N1 = mix(mix(position_N ^ low) ^ high)[:, None]
    other_N1 = mix(key_N1 ^ 0x9E3779B9)
    bits_NV = mix((mix(token_XV ^ key_N1) + other_N1) & _32_BITS)
    uniform_NV = ((bits_NV.double() + 0.5) * 2.0**-32).float().clamp_max(1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform_NV))
