"""Memory for the in-place kernels: fresh copies for `update`, the tensors themselves for `update_`.

The kernels want the tensors of a leaf laid out alike and densely. Whatever is not is copied into
the parameter's layout, so that any strides are served and none slows down the others. Copies of
many small leaves are laid side by side, where a kernel finds them as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .._core.pages import copies_of, is_mapped
from .._core.types import Number
from ..optimizers._adam import foreach
from .layout import IN_CACHE, cut
from .rule import Leaves, Moved, write, written

__all__ = ["borrow", "copies", "give_back", "packed", "scaled", "unpacked"]


def copies(leaves: Leaves, *, aligned: bool) -> Leaves:
    """Return the leaves in memory that a kernel may write, aligned; the gradients as they are.

    Args:
        leaves: The leaves.
        aligned: Whether they are just tensors, those of a leaf in one layout.
    """
    if aligned:
        clone_all = copies_of if any(map(is_mapped, leaves.params)) else _clone_all
        params, grads, *moments = leaves
        return Leaves(clone_all(params), grads, *(clone_all(c) if c else [] for c in moments))
    params = [param.clone() for param in leaves.params]  # dense, in the parameter's own layout
    return Leaves(
        params,
        _map(_aligned, leaves.grads, params),
        *(_map(_copy, column, params) for column in leaves[2:]),
    )


def _each_clone(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


# One call for a list, where torch has it.
_clone_all: Callable[[list[Tensor]], list[Tensor]] = getattr(torch, "_foreach_clone", _each_clone)


def packed(leaves: Leaves) -> Leaves:
    """Return contiguous leaves laid side by side in fresh memory, as one leaf."""
    return Leaves(*([torch.cat(column)] if column else [] for column in leaves))


def unpacked(leaf: Moved, sizes: list[int]) -> Moved:
    """Return the leaves that lie side by side in one.

    They share a storage but no element, and are no views in the eyes of autograd: each has a
    version of its own. This is far quicker than to allocate each of them.
    """
    split = torch.unsafe_split_with_sizes
    return Moved(*(list(split(column[0], sizes)) if column else [] for column in leaf))


def scaled(leaves: Leaves, factor: Number) -> Iterator[Leaves]:
    """Yield leaves of one dtype and device piece by piece, with gradients times a number.

    The pieces are parts of the leaves, a large one in many, to be moved before the next is asked
    for: products are made where the last ones were, so that they never leave the cache. None but a
    leaf's last ends within a vector, so a kernel moves the pieces as it does the whole, to the bit.
    The gradients themselves are not written, as torch's fused kernel would that scales by itself.
    """
    if leaves.params[0].is_meta:
        yield leaves  # which have no values, so that nothing is made of them
        return
    if not leaves.params[0].is_cpu:
        yield leaves._replace(grads=foreach.scaled(leaves.grads, factor))
        return
    whole = []
    products: Tensor | None = None
    for index, param in enumerate(leaves.params):
        tensors = [column[index] for column in leaves if column]
        if param.numel() <= IN_CACHE or not all(map(Tensor.is_contiguous, tensors)):
            whole.append(index)
            continue
        parts = [torch.split(tensor.view(-1), IN_CACHE) for tensor in tensors]
        if products is None:
            products = torch.empty_like(parts[1][0])
        for columns in zip(*parts, strict=True):
            lists = [[piece] for piece in columns]
            lists[1] = [torch.mul(columns[1], factor, out=products[: columns[1].numel()])]
            yield Leaves(*lists, *([[]] * (len(Leaves._fields) - len(lists))))
    for batch in cut(whole, leaves.params):
        piece = leaves.take(batch.indices)
        yield piece._replace(grads=foreach.scaled(piece.grads, factor))


def borrow(leaves: Leaves) -> Leaves:
    """Return the leaves themselves, or aligned copies of those that a kernel could not take."""
    params = [param if _is_dense(param) else param.clone() for param in leaves.params]
    return Leaves(params, *(_map(_aligned, column, params) for column in leaves[1:]))


def give_back(borrowed: Leaves, leaves: Leaves) -> None:
    """Write what was computed on copies into the tensors that were copied."""
    if borrowed is not leaves:
        for computed, own in zip(written(borrowed), written(leaves), strict=True):
            for new, old in zip(computed, own, strict=True):
                if new is not old:
                    write(old, new)
    params, _, exp_avgs, exp_avg_sqs, max_exp_avg_sqs = leaves
    moved = [*params, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs]
    if torch.is_inference_mode_enabled():  # where tensors have no version
        moved = [tensor for tensor in moved if not tensor.is_inference()]
    torch.autograd.graph.increment_version(moved)


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
