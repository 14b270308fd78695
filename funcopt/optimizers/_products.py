"""Products of matrices in bfloat16 on the CPU by the compiled extension: of symmetric ones a half.

They serve on x86 processors on which they are faster than torch's: those that have AVX-512 with
bfloat16 and no matrix registers; and those with AVX2 alone, where torch multiplies bfloat16 element
by element, and these are made in float32. Terms are summed up in float32, always in the same order,
and a result is rounded once: no bit depends on threads, nor on the matrices beside it.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor

Addend: TypeAlias = tuple[Tensor, float]
"""A matrix, and what it is multiplied by."""


def serve(matrix: Tensor) -> bool:
    """Return whether products of such matrices are made here: not of those without elements."""
    if matrix.device.type != "cpu" or matrix.dtype is not torch.bfloat16 or not matrix.numel():
        return False
    extension = _extension()
    return extension is not None and extension.has_products()


def _extension() -> Any:
    """Return the extension, or None where it was not built."""
    from . import _native  # noqa: PLC0415  # loaded when it is first asked for

    return _native.extension


def _dense(stack: Tensor) -> Tensor:
    """Return a stack that lies row by row, or column by column."""
    return stack if stack.is_contiguous() or stack.mT.is_contiguous() else stack.contiguous()


def symmetric(left: Tensor, right: Tensor, *addends: Addend, alpha: float = 1.0) -> Tensor:
    """Return `alpha * left @ right` and the sum of addends, which are symmetric as the product is.

    All are stacks of matrices, [number, rows, columns].
    """
    return _product(True, _dense(left), _dense(right), addends, alpha)


def whole(left: Tensor, right: Tensor, *addends: Addend, alpha: float = 1.0) -> Tensor:
    """Return the same of a symmetric `left` and a `right` that need not be, nor the addends.

    The result lies as `right` does, row by row or column by column.
    """
    left, right = _dense(left), _dense(right)
    if right.is_contiguous():
        return _product(False, left, right, addends, alpha)
    turned = [(matrix.mT, factor) for matrix, factor in addends]
    return _product(False, right.mT, left, turned, alpha).mT


def _product(is_symmetric: bool, left: Tensor, right: Tensor, addends: Any, alpha: float) -> Tensor:
    number, rows, depth = left.shape
    columns = right.size(-1)
    addends = [(matrix.contiguous(), factor) for matrix, factor in addends]
    made = left.new_empty(number, rows, columns)
    _extension().product(
        is_symmetric,
        torch.get_num_threads(),
        number,
        rows,
        columns,
        depth,
        left.data_ptr(),
        not left.is_contiguous(),
        right.data_ptr(),
        right.is_contiguous(),
        made.data_ptr(),
        alpha,
        tuple(chain.from_iterable((matrix.data_ptr(), factor) for matrix, factor in addends)),
    )
    return made
