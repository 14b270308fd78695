"""Memory for the in-place kernels: fresh copies for `update`, the tensors themselves for `update_`.

The kernels want the tensors of a leaf laid out alike and densely. Whatever is not is copied into
the parameter's layout, so that any strides are served and none slows down the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._operands import Leaves, write, written

__all__ = ["borrow", "copies", "give_back"]


def copies(leaves: Leaves) -> Leaves:
    """Return the leaves in memory that a kernel may write, aligned; the gradients as they are."""
    params = [param.clone() for param in leaves.params]  # dense, in the parameter's own layout
    if _all_contiguous(leaves):
        moments = ([tensor.clone() for tensor in column] for column in leaves[2:])
        return Leaves(params, leaves.grads, *moments)
    return Leaves(
        params,
        _map(_aligned, leaves.grads, params),
        *(_map(_copy, column, params) for column in leaves[2:]),
    )


def borrow(leaves: Leaves) -> Leaves:
    """Return the leaves themselves, or aligned copies of those that a kernel could not take."""
    if _all_contiguous(leaves):
        return leaves
    params = [param if _is_dense(param) else param.clone() for param in leaves.params]
    return Leaves(params, *(_map(_aligned, column, params) for column in leaves[1:]))


def give_back(borrowed: Leaves, leaves: Leaves) -> None:
    """Write what was computed on copies into the tensors that were copied."""
    if borrowed is not leaves:
        for computed, own in zip(written(borrowed), written(leaves), strict=True):
            for new, old in zip(computed, own, strict=True):
                if new is not old:
                    write(old, new)
    moved = [tensor for column in written(leaves) for tensor in column]
    if torch.is_inference_mode_enabled():  # where tensors have no version
        moved = [tensor for tensor in moved if not tensor.is_inference()]
    torch.autograd.graph.increment_version(moved)


def _all_contiguous(leaves: Leaves) -> bool:
    """Whether nothing needs aligning, which is so nearly always and can be had quickly."""
    return all(
        all(map(Tensor.is_contiguous, column)) and not any(map(Tensor.is_neg, column))
        for column in leaves
    )


def _map(
    function: Callable[[Tensor, Tensor], Tensor], tensors: list[Tensor], params: list[Tensor]
) -> list[Tensor]:
    return [function(tensor, param) for tensor, param in zip(tensors, params, strict=bool(tensors))]


def _aligned(tensor: Tensor, param: Tensor) -> Tensor:
    if tensor.stride() == param.stride() and not tensor.is_neg():
        return tensor
    return torch.empty_like(param).copy_(tensor)


def _copy(tensor: Tensor, param: Tensor) -> Tensor:
    copy = tensor.clone()
    return copy if copy.stride() == param.stride() else torch.empty_like(param).copy_(copy)


def _is_dense(param: Tensor) -> bool:
    if param.is_neg():
        return False
    if param.is_contiguous():
        return True
    return param.stride() == torch.empty_like(param, device="meta").stride()
