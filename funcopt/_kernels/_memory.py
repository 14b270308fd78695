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
    return Leaves(
        params,
        _map(_aligned, leaves.grads, params),
        *(_map(_copy, column, params) for column in leaves[2:]),
    )


def borrow(leaves: Leaves) -> Leaves:
    """Return the leaves themselves, or aligned copies of those that a kernel could not take."""
    params = [param if _is_dense(param) else param.clone() for param in leaves.params]
    return Leaves(params, *(_map(_aligned, column, params) for column in leaves[1:]))


def give_back(borrowed: Leaves, leaves: Leaves) -> None:
    """Write what was computed on copies into the tensors that were copied."""
    for computed, own in zip(written(borrowed), written(leaves), strict=True):
        for new, old in zip(computed, own, strict=True):
            if new is not old:
                write(old, new)
    moved = (tensor for column in written(leaves) for tensor in column)
    torch.autograd.graph.increment_version([t for t in moved if not t.is_inference()])


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
