"""Matrices made nearly orthogonal by Newton-Schulz iterations: by plain operators, and faster.

The map leaves the singular vectors of a matrix as they are and takes each singular value near 1. It
divides the matrix by its norm and then iterates, with X of no more rows than columns,

    G = X X^T,    X <- a X + (b G + c G G) X.

The plain form has torch's operators in torch's order, so that its bits are those of
`torch.optim.Muon`. The faster form has the same bits wherever each element of a product of matrices
is summed up alike, whatever the size of the product: where that was tried, it was so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import transforms
from .._core.tensors import differentiable_norm, vector_norm
from .._core.types import Number


class Iteration(NamedTuple):
    """The numbers of the iteration, and how often it is made."""

    a: Number
    b: Number
    c: Number
    eps: Number  # the least that a matrix is divided by
    steps: int


def orthogonalize(matrix: Tensor, own: Iteration) -> Tensor:
    """Return a matrix, or each of a stack of them, made nearly orthogonal, by plain operators."""
    tall = matrix.size(-2) > matrix.size(-1)
    wide = matrix.mT if tall else matrix
    wide = wide / _at_least(_norm(wide), own.eps)
    for _ in range(own.steps):
        gram = wide @ wide.mT
        update = _sum(gram, own.b, gram, gram, own.c)
        wide = _sum(wide, own.a, update, wide, 1.0)
    return wide.mT if tall else wide


def _norm(matrix: Tensor) -> Tensor:
    """Return the Frobenius norm of each matrix, in a shape that divides them."""
    dims = None if matrix.ndim == 2 else (-2, -1)
    if transforms.followed((matrix,)):
        return differentiable_norm(matrix, 2.0, dims)
    return vector_norm(matrix, 2.0, dims, keepdim=dims is not None)


def _at_least(norm: Tensor, eps: Number) -> Tensor:
    if isinstance(eps, Tensor):
        return torch.maximum(norm, eps.to(norm.dtype))
    return norm.clamp(min=eps)


def _sum(own: Tensor, beta: Number, left: Tensor, right: Tensor, alpha: Number) -> Tensor:
    """Return `beta * own + alpha * left @ right`, by one operator if the numbers are Python's."""
    if isinstance(beta, Tensor) or isinstance(alpha, Tensor):
        return own * _in(beta, own) + (left @ right) * _in(alpha, own)
    if own.ndim == 2:
        return torch.addmm(own, left, right, beta=beta, alpha=alpha)
    flat = [tensor.flatten(0, -3) for tensor in (own, left, right)]
    return torch.baddbmm(*flat, beta=beta, alpha=alpha).view_as(own)


def _in(number: Number, matrix: Tensor) -> Number:
    return number.to(matrix.dtype) if isinstance(number, Tensor) else number


# From so many rows on, products of matrices take so much longer than the calls for them that a
# symmetric one is made in parts on the CPU: those on and above the diagonal.
_MANY_ROWS = 256
# On the CPU matrices are stacked where products have the same bits as without, which was found in
# bfloat16 from so many rows on; and as long as a stack stays in the cache.
_FEWEST_ROWS = 17
_MOST_ON_CPU = 1 << 16
_MOST_ON_DEVICES = 1 << 27


def stacks(
    shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device
) -> Iterator[list[int]]:
    """Yield which matrices go together: those of one shape, as many as are worth it."""
    by_shape: dict[torch.Size, list[int]] = {}
    for index, shape in enumerate(shapes):
        by_shape.setdefault(shape, []).append(index)
    for shape, indices in by_shape.items():
        most = _MOST_ON_DEVICES
        if device.type == "cpu":
            same_bits = dtype is torch.bfloat16 and min(shape) >= _FEWEST_ROWS
            most = _MOST_ON_CPU if same_bits else 0
        length = max(1, most // max(shape.numel(), 1))
        for start in range(0, len(indices), length):
            yield indices[start : start + length]


def orthogonalize_all(matrices: Sequence[Tensor], own: Any) -> Sequence[Tensor]:
    """Return matrices of one shape made nearly orthogonal, while nobody follows operators.

    They are plain, of one dtype and on one device; the numbers of the `Iteration` are Python's.
    """
    if len(matrices) == 1 or matrices[0].ndim > 2:
        return [_of_one(matrix, own) for matrix in matrices]
    return _of_stack(matrices, own)


def _of_one(matrix: Tensor, own: Any) -> Tensor:
    """Return what `orthogonalize` does, of symmetric products a half."""
    if not _worth_halves(matrix):
        return orthogonalize(matrix, own)
    tall = matrix.size(-2) > matrix.size(-1)
    wide = matrix.mT if tall else matrix
    wide = wide / _at_least(_norm(wide), own.eps)
    # The matrices of a leaf that is a stack, each by itself.
    several = [_iterated(one, own) for one in wide.reshape(-1, *wide.shape[-2:])]
    made = several[0] if wide.ndim == 2 else torch.stack(several).view_as(wide)
    return made.mT if tall else made


def _worth_halves(matrix: Tensor) -> bool:
    rows = min(matrix.shape[-2:])
    alike = matrix.dtype is torch.bfloat16 and matrix.device.type == "cpu"
    return alike and rows >= _MANY_ROWS and matrix.numel() > 0


def _iterated(wide: Tensor, own: Any) -> Tensor:
    for _ in range(own.steps):
        update = _square(_gram(wide), own)
        wide = torch.addmm(wide, update, wide, beta=own.a)
    return wide


def _of_stack(matrices: Sequence[Tensor], own: Any) -> Sequence[Tensor]:
    """Return the same of matrices of one shape, each with the norm that it has by itself."""
    norms = torch.stack([vector_norm(matrix, 2.0) for matrix in matrices])
    stack = torch.stack(list(matrices))
    tall = stack.size(-2) > stack.size(-1)
    wide = stack.mT if tall else stack
    wide = wide / _at_least(norms, own.eps)[:, None, None]
    for _ in range(own.steps):
        gram = wide @ wide.mT
        update = torch.baddbmm(gram, gram, gram, beta=own.b, alpha=own.c)
        wide = torch.baddbmm(wide, update, wide, beta=own.a)
    return (wide.mT if tall else wide).unbind()


def _gram(wide: Tensor) -> Tensor:
    """Return the product of a matrix and its transpose."""
    made = wide.new_empty(wide.size(0), wide.size(0))
    for start, stop in _bands(wide):
        torch.mm(wide[start:stop], wide[start:].mT, out=made[start:stop, start:])
        made[stop:, start:stop] = made[start:stop, stop:].mT
    return made


def _square(gram: Tensor, own: Any) -> Tensor:
    """Return `b * gram + c * gram @ gram` of a symmetric matrix."""
    made = torch.empty_like(gram)
    for start, stop in _bands(gram):
        band = made[start:stop, start:]
        torch.addmm(
            gram[start:stop, start:],
            gram[start:stop],
            gram[:, start:],
            beta=own.b,
            alpha=own.c,
            out=band,
        )
        made[stop:, start:stop] = made[start:stop, stop:].mT
    return made


def _bands(wide: Tensor) -> Iterator[tuple[int, int]]:
    """Yield where the rows start and stop that are made by one call."""
    rows, columns = wide.shape
    count = 2 if columns < 2 * rows and rows < 2 * _MANY_ROWS + 1 else 4
    edges = [rows * band // count for band in range(count + 1)]
    return pairwise(edges)
