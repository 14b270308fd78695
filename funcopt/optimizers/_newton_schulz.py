"""Matrices made nearly orthogonal by Newton-Schulz iterations: by plain operators, and faster.

The map leaves the singular vectors of a matrix as they are and takes each singular value near 1. It
divides the matrix by its norm and then iterates, with X of no more rows than columns,

    G = X X^T,    X <- a X + (b G + c G G) X.

The plain form has torch's operators in torch's order, so that its bits are those of
`torch.optim.Muon`. The faster form has the same bits wherever each element of a product of matrices
is summed up alike, whatever the size of the product: where that was tried, it was so. Where bits
may differ from torch's, products in bfloat16 are those of `_products`.

By the Gram matrix, several iterations are made on G alone, which is smaller than X if that is wide:
with U = b G + c G G, it takes G to (a + U) G (a + U), and X is multiplied by the product of all
a + U at the end. All these matrices are symmetric and commute. What rounding adds to G where it is
near zero grows by a^2 in each iteration, though, so that G is made anew from X after a few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._core import transforms
from .._core.tensors import differentiable_norm, vector_norm
from .._core.types import Number
from . import _products


class Iteration(NamedTuple):
    """The numbers of the iteration, and how often it is made."""

    a: Number
    b: Number
    c: Number
    eps: Number  # the least that a matrix is divided by
    steps: int
    gram: bool  # whether a wide matrix is seen by way of its Gram matrix
    dtype: torch.dtype | None = None  # of the iterations, if not that of the matrix


def orthogonalize(matrix: Tensor, own: Iteration) -> Tensor:
    """Return a matrix, or each of a stack of them, made nearly orthogonal, by plain operators."""
    tall = matrix.size(-2) > matrix.size(-1)
    wide = matrix.mT if tall else matrix
    wide = _normalized(wide, _norm(wide), own)
    wide = _iterated(wide, own, _PLAIN)
    return wide.mT if tall else wide


Product: TypeAlias = Callable[..., Tensor]
"""A symmetric `left @ right`, or `beta * own + alpha * left @ right` of five arguments."""


class Operators(NamedTuple):
    """How products of matrices are made."""

    symmetric: Product  # as above
    composed: Product  # of `left, right, a, b`: the symmetric `left @ right + a * right + b * left`
    applied: Product  # of `left, right, a`: `left @ right + a * right`, not symmetric


def _iterated(wide: Tensor, own: Iteration, by: Operators) -> Tensor:
    """Return a matrix of norm 1 after the iterations."""
    if own.gram and 2 * wide.size(-1) >= 3 * wide.size(-2):
        made = 0
        while made < own.steps:
            count = min(_MOST_LATER if made else _MOST_AT_FIRST, own.steps - made)
            wide = _by_gram(wide, own, count, by)
            made += count
        return wide
    for _ in range(own.steps):
        gram = by.symmetric(wide, wide.mT)
        update = by.symmetric(gram, gram, gram, own.b, own.c)
        wide = by.applied(update, wide, own.a)
    return wide


# So many iterations are made before the Gram matrix is made anew. With five, in bfloat16, what came
# out was as near to that of float64 as by plain iterations, where singular values are far apart.
_MOST_AT_FIRST, _MOST_LATER = 3, 2


def _by_gram(wide: Tensor, own: Iteration, count: int, by: Operators) -> Tensor:
    """Return a matrix after some iterations."""
    gram = by.symmetric(wide, wide.mT)
    update = by.symmetric(gram, gram, gram, own.b, own.c)
    # The product of all a + U is `scale` times the identity, and `rest`: the diagonal rounds less.
    scale, rest = own.a, update
    for _ in range(count - 1):
        half = by.symmetric(update, gram, gram, own.a, 1.0)
        gram = by.symmetric(half, update, half, own.a, 1.0)
        update = by.symmetric(gram, gram, gram, own.b, own.c)
        rest = by.composed(update, rest, own.a, scale)
        scale = scale * own.a
    return by.applied(rest, wide, scale)


def _product(left: Tensor, right: Tensor, *rest: Any) -> Tensor:
    return _sum(left, right, *rest) if rest else left @ right


def _composed(product: Product, left: Tensor, right: Tensor, a: Number, b: Number) -> Tensor:
    both = right * _in(a, right) + left * _in(b, left)
    return product(left, right, both, 1.0, 1.0)


def _applied(left: Tensor, right: Tensor, a: Number) -> Tensor:
    return _sum(left, right, right, a, 1.0)


def _norm(matrix: Tensor) -> Tensor:
    """Return the Frobenius norm of each matrix, in a shape that divides them."""
    dims = None if matrix.ndim == 2 else (-2, -1)
    if transforms.transformed() or transforms.has_derivative(matrix):
        return differentiable_norm(matrix, 2.0, dims)
    return vector_norm(matrix, 2.0, dims, keepdim=dims is not None)


def _normalized(matrix: Tensor, norm: Tensor, own: Iteration) -> Tensor:
    """Return matrices divided by their norms, in the dtype of the iterations."""
    made = matrix / _at_least(norm, own.eps)
    return made if own.dtype is None else made.to(own.dtype)


def _at_least(norm: Tensor, eps: Number) -> Tensor:
    if isinstance(eps, Tensor):
        return torch.maximum(norm, eps.to(norm.dtype))
    return norm.clamp(min=eps)


def _sum(left: Tensor, right: Tensor, own: Tensor, beta: Number, alpha: Number) -> Tensor:
    """Return `beta * own + alpha * left @ right`, by one operator if the numbers are Python's."""
    if isinstance(beta, Tensor) or isinstance(alpha, Tensor):
        return own * _in(beta, own) + (left @ right) * _in(alpha, own)
    if own.ndim == 2:
        return torch.addmm(own, left, right, beta=beta, alpha=alpha)
    flat = [tensor.flatten(0, -3) for tensor in (own, left, right)]
    return torch.baddbmm(*flat, beta=beta, alpha=alpha).view_as(own)


def _in(number: Number, matrix: Tensor) -> Number:
    return number.to(matrix.dtype) if isinstance(number, Tensor) else number


_PLAIN = Operators(_product, partial(_composed, _product), _applied)


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
    if own.gram and own.dtype is None and _products.serve(matrices[0]):
        return _by_tiles(matrices, own)
    if len(matrices) == 1 or matrices[0].ndim > 2:
        return [_of_one(matrix, own) for matrix in matrices]
    return _of_stack(matrices, own)


def _of_one(matrix: Tensor, own: Any) -> Tensor:
    """Return what `orthogonalize` does, of symmetric products a half."""
    if not _worth_halves(matrix):
        return orthogonalize(matrix, own)
    tall = matrix.size(-2) > matrix.size(-1)
    wide = matrix.mT if tall else matrix
    wide = _normalized(wide, _norm(wide), own)
    # The matrices of a leaf that is a stack, each by itself.
    several = [_iterated(one, own, _IN_BANDS) for one in wide.reshape(-1, *wide.shape[-2:])]
    made = several[0] if wide.ndim == 2 else torch.stack(several).view_as(wide)
    return made.mT if tall else made


def _worth_halves(matrix: Tensor) -> bool:
    rows = min(matrix.shape[-2:])
    alike = matrix.dtype is torch.bfloat16 and matrix.device.type == "cpu"
    return alike and rows >= _MANY_ROWS and matrix.numel() > 0


def _of_stack(matrices: Sequence[Tensor], own: Any) -> Sequence[Tensor]:
    """Return the same of matrices of one shape, each with the norm that it has by itself."""
    norms = torch.stack([vector_norm(matrix, 2.0) for matrix in matrices])
    stack = torch.stack(list(matrices))
    tall = stack.size(-2) > stack.size(-1)
    wide = stack.mT if tall else stack
    wide = _normalized(wide, norms[:, None, None], own)
    wide = _iterated(wide, own, _PLAIN)
    return (wide.mT if tall else wide).unbind()


def _by_half(left: Tensor, right: Tensor, *rest: Any) -> Tensor:
    """Return a symmetric product, of which what is below the diagonal is copied."""
    rows = left.size(0)
    made = left.new_empty(rows, rows)
    for start, stop in _bands(left):
        band, factors = made[start:stop, start:], (left[start:stop], right[:, start:])
        if rest:
            own, beta, alpha = rest
            torch.addmm(own[start:stop, start:], *factors, beta=beta, alpha=alpha, out=band)
        else:
            torch.mm(*factors, out=band)
        made[stop:, start:stop] = made[start:stop, stop:].mT
    return made


def _bands(wide: Tensor) -> Iterator[tuple[int, int]]:
    """Yield where the rows start and stop that are made by one call."""
    rows, columns = wide.shape
    count = 2 if columns < 2 * rows and rows < 2 * _MANY_ROWS + 1 else 4
    edges = [rows * band // count for band in range(count + 1)]
    return pairwise(edges)


_IN_BANDS = Operators(_by_half, partial(_composed, _by_half), _applied)


def _by_tiles(matrices: Sequence[Tensor], own: Any) -> Sequence[Tensor]:
    """Return matrices of one shape made nearly orthogonal by the products of the extension."""
    if len(matrices) > 1:
        return _by_tiles([torch.stack(list(matrices))], own)[0].unbind()
    (matrix,) = matrices
    stack = matrix.reshape(-1, *matrix.shape[-2:])
    tall = stack.size(-2) > stack.size(-1)
    wide = stack.mT if tall else stack
    norms = [vector_norm(one, 2.0) for one in wide]
    wide = _normalized(wide, torch.stack(norms)[:, None, None], own)
    wide = _iterated(wide, own, _IN_TILES)
    return [(wide.mT if tall else wide).reshape(matrix.shape)]


def _symmetric_tiles(left: Tensor, right: Tensor, *rest: Any) -> Tensor:
    if not rest:
        return _products.symmetric(left, right)
    matrix, beta, alpha = rest
    return _products.symmetric(left, right, (matrix, beta), alpha=alpha)


def _composed_tiles(left: Tensor, right: Tensor, a: float, b: float) -> Tensor:
    return _products.symmetric(left, right, (right, a), (left, b))


def _applied_tiles(left: Tensor, right: Tensor, a: float) -> Tensor:
    return _products.whole(left, right, (right, a))


_IN_TILES = Operators(_symmetric_tiles, _composed_tiles, _applied_tiles)
