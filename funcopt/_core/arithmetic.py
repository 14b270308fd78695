"""Arithmetic that optimizers and wrappers share: in which dtype, by which operators, and written how.

On lists of tensors it is one call for a whole list, where nobody sees each operator. The `_foreach_`
functions are private in name only: torch documents them as the building blocks of its own
optimizers. A torch that lacked one would be served tensor by tensor, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

import torch
from torch import Tensor

from . import transforms
from .types import Number

__all__ = [
    "add",
    "add_",
    "compute_dtype",
    "double",
    "fit",
    "norms",
    "scaled",
    "use_foreach",
    "vector_norm",
    "view_as_complex_like",
    "view_as_real",
    "write",
]

vector_norm: Callable[[Tensor, float], Tensor] = torch.linalg.vector_norm

_HAS_FOREACH = all(
    hasattr(torch, f"_foreach_{name}") for name in ("add", "add_", "lerp", "lerp_", "mul", "norm")
)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: 16-bit leaves are stored in 16 bits and computed in 32.

    In float16 itself, an eps of 1e-8 is zero, and a zero gradient makes 0 / 0.
    """
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def double(number: Number) -> Number:
    """Return a number in float64, as Python's are: `1 - beta**t` loses its digits in less."""
    return number.double() if isinstance(number, Tensor) else number


@overload
def fit(number: Tensor, leaf: Tensor) -> Tensor: ...
@overload
def fit(number: Number, leaf: Tensor) -> Number: ...
def fit(number: Number, leaf: Tensor) -> Number:
    """Return a number so that it combines with a leaf: in its dtype, on its device, aligned.

    A number of shape (B,) meets a leaf of shape (B, ...) at the front, where broadcasting would
    meet it at the back. For a complex leaf it has the dtype of the real part.
    """
    if not isinstance(number, Tensor):
        return number
    dtype = leaf.real.dtype if leaf.is_complex() else leaf.dtype
    number = number.to(device=leaf.device, dtype=dtype)
    if number.ndim == 0:
        return number
    return number.reshape(number.shape + (1,) * (leaf.ndim - number.ndim))


def view_as_real(tensor: Tensor) -> Tensor:
    """View a complex tensor as pairs of real ones, which is how elementwise optimizers treat it."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def view_as_complex_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Undo `view_as_real`, for a tensor that came of `like`."""
    return torch.view_as_complex(tensor) if like.is_complex() else tensor


def write(old: Tensor, new: Tensor) -> None:
    """Write a tensor's new value into it."""
    if transforms.tracing():
        # Compiled by torch 2.13, `copy_` is silently dropped for a float64 tensor of shape (),
        # which is what a count of updates is. Writing through a view is not.
        old[...] = new
    else:
        old.copy_(new)


def norms(tensors: Sequence[Tensor], order: float) -> list[Tensor]:
    """Return the norm of each tensor, of 16-bit ones in float32. None is empty."""
    wide = [_wide(tensor) for tensor in tensors]
    if wide and use_foreach(wide):
        return list(torch._foreach_norm(wide, order))
    return [_followed_norm(tensor, order) for tensor in wide]


def _followed_norm(tensor: Tensor, order: float) -> Tensor:
    if not tensor.requires_grad and not transforms.transformed():
        return vector_norm(tensor, order)
    # At zero the second derivative is NaN: the first of a norm is 0 / 0 there, which torch sets to
    # 0, but not its own derivative.
    zero = (tensor == 0).all()
    return vector_norm(tensor.masked_fill(zero, 1.0), order).masked_fill(zero, 0.0)


def scaled(tensors: Sequence[Tensor], scale: Number) -> list[Tensor]:
    """Return tensors times a number (if a tensor, of shape ()), each in its own dtype."""
    results = list(tensors)
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(index)
    for indices in by_kind.values():
        dtype = tensors[indices[0]].dtype
        wide = [_wide(tensors[index]) for index in indices]
        own = fit(scale, wide[0])
        numbers = [scale] if isinstance(scale, Tensor) else []
        if use_foreach([*(tensors[index] for index in indices), *numbers]):
            products = list(torch._foreach_mul(wide, own))
        else:
            products = [tensor * own for tensor in wide]
        for index, product in zip(indices, products, strict=True):
            results[index] = product.to(dtype)
    return results


def add(tensors: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """Return sums, in the dtypes of the first."""
    if tensors and use_foreach([*tensors, *others]):
        return list(torch._foreach_add(tensors, others))
    return [tensor + other for tensor, other in zip(tensors, others, strict=True)]


def add_(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Add to tensors in place."""
    if tensors and use_foreach([*tensors, *others]):
        torch._foreach_add_(tensors, others)
        return
    for tensor, other in zip(tensors, others, strict=True):
        tensor.add_(other)


def _wide(tensor: Tensor) -> Tensor:
    dtype = compute_dtype(tensor.dtype)
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def use_foreach(tensors: Sequence[Tensor]) -> bool:
    """Whether one call for a list will do, since nobody sees each operator."""
    return (
        _HAS_FOREACH
        and not transforms.observed()
        and not transforms.watched(tensors)
        and transforms.all_plain(tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )
