"""Rounding to 16 bits by chance, in plain operators: the definition, which the kernels have too.

A number becomes one of its two neighbours in the narrower dtype, each with the probability that
makes the mean the number itself. The bits that decide are a function of a key and a counter, by
Philox 4x32-10 of Salmon et al., *Parallel random numbers: as easy as 1, 2, 3* (SC 2011). The
counter says which element of which column of which leaf is rounded, at which update. So nothing is
drawn from a generator, and no bit depends on the device, the kernel, the layout or the threads.

A leaf is cut into blocks of 512 elements in the order of its indices. The call of Philox number
64 * b + i serves the elements i, 64 + i, ..., 448 + i of block b: with the low halves of its four
words, then with the high ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._core import transforms
from .._core.types import Number

_BLOCK, _CALLS = 512, 64
_WORD = 0xFFFFFFFF
# The multipliers of Philox, and what is added to its key each round.
_LEFT, _RIGHT = 0xD2511F53, 0xCD9E8D57
_LOW, _HIGH = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return four words of 32 bits for a counter of four, by a key of two: all int64."""
    one, two, three, four = counter
    low, high = key
    for _ in range(_ROUNDS):
        # The product wraps at 64 bits, whose upper half is read without its sign.
        left, right = one * _LEFT, three * _RIGHT
        one, two = ((right >> 32) & _WORD) ^ two ^ low, right & _WORD
        three, four = ((left >> 32) & _WORD) ^ four ^ high, left & _WORD
        low, high = (low + _LOW) & _WORD, (high + _HIGH) & _WORD
    return one, two, three, four


def random_bits(
    key: Number, step: Number, leaf: int, column: int, shape: torch.Size, device: torch.device
) -> Tensor:
    """Return 16 random bits for each element of a leaf, as int32.

    Args:
        key: A whole number below 2**53, or a tensor with a dimension for each vmap, of members.
        step: The count of updates, of a shape that goes with the key's.
        leaf: Which leaf of the tree it is.
        column: Which of its results: 0 for the parameter, then the slots.
        shape: That of the leaf, dimensions of members included.
        device: Where to make them.
    """
    members = key.ndim if isinstance(key, Tensor) else 0
    size = math.prod(shape[members:])
    blocks = -(-size // _BLOCK)
    call = torch.arange(blocks * _CALLS, dtype=torch.int64, device=device)
    key, count = whole(key, device), whole(step, device)
    counter = (
        call & _WORD,
        torch.full_like(call, column | leaf << 3),
        count & _WORD,
        ((call >> 32) & 0xFFFF) | (((count >> 32) << 16) & _WORD),
    )
    words = philox(counter, (key & _WORD, key >> 32))
    lead = words[0].shape[:-1]
    parts = [word.reshape(*lead, blocks, 1, _CALLS) for word in words]
    both = torch.cat([*(part & 0xFFFF for part in parts), *(part >> 16 for part in parts)], dim=-2)
    flat = both.reshape(*lead, blocks * _BLOCK)[..., :size]
    return flat.reshape((*lead, *shape[members:])).to(torch.int32)


def whole(number: Number, device: torch.device) -> Tensor:
    """Return a number in int64, with a last dimension of size 1."""
    if isinstance(number, Tensor):
        return number.detach().to(device, torch.int64).unsqueeze(-1)
    return torch.full((1,), int(number), dtype=torch.int64, device=device)


def round_stochastically(values: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values in bfloat16 or float16, by 16 random bits for each.

    What is finite stays finite. Derivatives pass as through rounding to the nearest: as they are.
    """
    wide = values.detach().to(torch.float32)
    rounded = (_bfloat16 if dtype is torch.bfloat16 else _float16)(wide.abs(), random)
    by_chance = torch.where(torch.isfinite(wide), torch.copysign(rounded, wide), wide).to(dtype)
    if not transforms.followed((values,)):
        return by_chance
    nearest = values.to(dtype)
    zero = nearest.detach() - nearest  # with the derivative; subtracted, it keeps the sign of zero
    return torch.where(torch.isfinite(zero), by_chance - zero, by_chance)


def _bfloat16(size: Tensor, random: Tensor) -> Tensor:
    """Add to the digits that are dropped, of which there are 16."""
    bits = size.view(torch.int32)
    rounded = ((bits.clamp(max=0x7F7FFFFF) + random) >> 16 << 16).clamp(max=0x7F7F0000)
    return rounded.view(torch.float32)


def _float16(size: Tensor, random: Tensor) -> Tensor:
    """Do the same with 13 digits; below 2**-14, numbers are multiples of 2**-24."""
    bits = size.view(torch.int32).clamp(max=0x7F7FFFFF)
    normal = ((bits + (random >> 3)) >> 13 << 13).view(torch.float32)
    multiple = torch.where(size < 2.0**-14, size, 0.0) * 2.0**24
    whole = multiple.floor()
    up = ((multiple - whole) * 65536.0 > random).to(torch.float32)
    return torch.where(size < 2.0**-14, (whole + up) * 2.0**-24, normal).clamp(max=65504.0)
