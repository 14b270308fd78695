"""Normal random numbers as a function of a key and a count, with no generator and no state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._core.types import Number
from .rounding import philox, whole

_WORD = 0xFFFFFFFF
# Stochastic rounding has columns 0 to 6 of the same counter, so that one key serves both.
_COLUMN = 7


def normal_like(tensor: Tensor, key: Number, step: Number, leaf: int = 0) -> Tensor:
    r"""Return standard normal random numbers in the shape, dtype and device of a tensor.

    Each is a function of the key, the count, the number of the leaf and the place of the element in
    it, by Philox 4x32-10 and the Box-Muller transform in float64:

    $$ \sqrt{-2 \ln u}\,\cos(2 \pi v), \qquad \sqrt{-2 \ln u}\,\sin(2 \pi v). $$

    So an update that adds them comes out the same for the same state, also after a checkpoint, and
    works under vmap and compile, where torch's own generators do not serve. A complex number has a
    variance of 1 in all, as in `torch.randn`.

    Args:
        tensor: A floating-point or complex tensor, of which no value is read.
        key: A whole number of at least 0 and below 2**53, as a number or a tensor of shape (). The
            members of a vmap that have the same key have the same numbers.
        step: The count of updates, likewise.
        leaf: Which leaf of a tree it is, so that leaves of one shape have different numbers: at
            least 0 and below 2**29.

    Returns:
        A tensor like the one that was given, without a history.

    Example:
        >>> import torch
        >>> from funcopt import extend
        >>> noise = extend.normal_like(torch.zeros(1000), key=7, step=0)
        >>> torch.equal(noise, extend.normal_like(torch.zeros(1000), key=7, step=0))
        True
        >>> torch.equal(noise, extend.normal_like(torch.zeros(1000), key=7, step=1))
        False
    """
    shape = (*tensor.shape, 2) if tensor.is_complex() else tuple(tensor.shape)
    size = math.prod(shape)
    call = torch.arange(-(-size // 4), dtype=torch.int64, device=tensor.device)
    own, count = whole(key, tensor.device), whole(step, tensor.device)
    counter = (
        call & _WORD,
        torch.full_like(call, _COLUMN | leaf << 3),
        count & _WORD,
        ((call >> 32) & 0xFFFF) | (((count >> 32) << 16) & _WORD),
    )
    words = philox(counter, (own & _WORD, own >> 32))
    one, two, three, four = ((word.to(torch.float64) + 0.5) * 2.0**-32 for word in words)
    numbers = [*_normal_pair(one, two), *_normal_pair(three, four)]
    values = torch.stack(numbers, dim=-1).flatten()[:size].reshape(shape)
    if tensor.is_complex():
        return torch.view_as_complex(values * math.sqrt(0.5)).to(tensor.dtype)
    return values.to(tensor.dtype)


def _normal_pair(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return two independent normal numbers, from two that are uniform between 0 and 1."""
    radius, angle = (-2.0 * one.log()).sqrt(), (2.0 * math.pi) * other
    return radius * angle.cos(), radius * angle.sin()
