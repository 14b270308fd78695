"""Arithmetic on lists of tensors: one call for a whole list where nobody follows each operator.

The `_foreach_` functions are private in name only: torch documents them as the building blocks of
its own optimizers. A torch that lacked one would be served tensor by tensor, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._engine.rule import compute_dtype
from ..optimizers._adam import foreach
from . import transforms

__all__ = ["add", "add_", "fit", "norms", "scaled", "vector_norm"]

vector_norm: Callable[[Tensor, float], Tensor] = torch.linalg.vector_norm

_AT_ONCE = all(hasattr(torch, name) for name in ("_foreach_add", "_foreach_add_", "_foreach_norm"))


def norms(tensors: Sequence[Tensor], order: float) -> list[Tensor]:
    """Return the norm of each tensor, of 16-bit ones in float32. None is empty."""
    wide = [_wide(tensor) for tensor in tensors]
    if wide and _at_once(wide):
        return list(torch._foreach_norm(wide, order))
    return [_followed_norm(tensor, order) for tensor in wide]


def _followed_norm(tensor: Tensor, order: float) -> Tensor:
    if not tensor.requires_grad and not transforms.transformed():
        return vector_norm(tensor, order)
    # At zero the second derivative is NaN: the first of a norm is 0 / 0 there, which torch sets to
    # 0, but not its own derivative.
    zero = (tensor == 0).all()
    return vector_norm(tensor.masked_fill(zero, 1.0), order).masked_fill(zero, 0.0)


def scaled(tensors: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """Return tensors times a number, a tensor of shape (), each in its own dtype."""
    results = list(tensors)
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(index)
    for indices in by_kind.values():
        own = [tensors[index] for index in indices]
        products = (
            foreach.scaled(own, scale)
            if _at_once([*own, scale])
            else [(_wide(tensor) * fit(scale, _wide(tensor))).to(tensor.dtype) for tensor in own]
        )
        for index, product in zip(indices, products, strict=True):
            results[index] = product
    return results


def fit(number: Tensor, tensor: Tensor) -> Tensor:
    """Return a number on the device of a tensor, in its dtype or that of its parts."""
    part = tensor.real if tensor.is_complex() else tensor
    return number.to(device=part.device, dtype=part.dtype)


def add(tensors: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """Return sums, in the dtypes of the first."""
    if tensors and _at_once([*tensors, *others]):
        return list(torch._foreach_add(tensors, others))
    return [tensor + other for tensor, other in zip(tensors, others, strict=True)]


def add_(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Add to tensors in place."""
    if tensors and _at_once([*tensors, *others]):
        torch._foreach_add_(tensors, others)
        return
    for tensor, other in zip(tensors, others, strict=True):
        tensor.add_(other)


def _wide(tensor: Tensor) -> Tensor:
    dtype = compute_dtype(tensor.dtype)
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _at_once(tensors: Sequence[Tensor]) -> bool:
    return (
        _AT_ONCE
        and not transforms.observed()
        and not transforms.watched(tensors)
        and transforms.all_plain(tensors)
        and not any(tensor.requires_grad for tensor in tensors)
    )
