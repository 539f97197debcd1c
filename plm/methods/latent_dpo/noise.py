"""Random numbers by counting: what is drawn is a function of a key alone, not of who draws beside whom.

A key is an int64. `fold` makes keys out of keys, `normals` reads a key as the start of a SplitMix64 stream (Steele, Lea
& Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). Integers wrap around alike on every device, so
a user gets the same draws alone, in a crowd, on a CPU and on a GPU.

Axes: D numbers of a row, C draws per key.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; ``>>`` alone repeats the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def mix(value: Tensor) -> Tensor:
    """Scramble 64 bits one-to-one, SplitMix64's last step: ``(...)`` int64 -> ``(...)`` int64.

    >>> mix(torch.tensor([0, 1])).tolist()
    [0, 6238072747940578789]
    """
    value = (value ^ _shifted(value, 30)) * _FIRST
    value = (value ^ _shifted(value, 27)) * _SECOND
    return value ^ _shifted(value, 31)


def fold(key: Tensor, value: Tensor | int) -> Tensor:
    """A new key out of a key and a number; the order of folding matters."""
    return mix(mix(key + _GOLDEN) + value)


def row_keys(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """A key for every row by its content, as float32, where ``mask`` is True: ``(..., D)`` each -> ``(...)``."""
    bits = (values.float() + 0.0).contiguous().view(torch.int32).long()  # + 0.0: there are two zeros
    place = torch.arange(values.shape[-1], device=values.device)
    keys = mix(bits + (place + 1) * _GOLDEN)
    return (keys if mask is None else keys * mask).sum(-1)


def normals(key: Tensor, count: int) -> Tensor:
    """Standard normal numbers by Box and Muller: ``(...)`` int64 -> ``(..., C)`` float32, at most 5.8 in size."""
    place = torch.arange((count + 1) // 2, device=key.device)
    bits = mix(key[..., None] + (place + 1) * _GOLDEN)
    radius = ((_shifted(bits, 40) + 1).float() * 2.0**-24).log().mul_(-2.0).sqrt_()
    angle = (bits & (2**24 - 1)).float() * (math.tau * 2.0**-24)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], -1)[..., :count]
