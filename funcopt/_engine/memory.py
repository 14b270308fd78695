"""Memory for kernels: fresh copies for `update`, the tensors themselves for `update_`.

The kernels want the tensors of a leaf laid out alike and densely. Whatever is not is copied into
the parameter's layout, so that any strides are served and none slows down the others. Copies of
many small leaves are laid side by side, where a kernel finds them as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .._core import arithmetic
from .._core.arithmetic import write
from .._core.pages import copies_of, is_mapped
from .._core.types import Number
from .layout import IN_CACHE, cut
from .rule import StepInputs, StepOutputs

__all__ = ["borrow", "copies", "give_back", "packed", "scaled", "unpacked", "write_all"]


def copies(inputs: StepInputs, *, aligned: bool) -> StepInputs:
    """Return the leaves in memory that a kernel may write, aligned; the gradients as they are.

    Args:
        inputs: The leaves.
        aligned: Whether they are just tensors, those of a leaf in one layout.
    """
    if aligned:
        clone_all = copies_of if any(map(is_mapped, inputs.params)) else _clone_all
        slots = tuple(map(clone_all, inputs.slots))
        return StepInputs(clone_all(inputs.params), inputs.grads, slots)
    params = [param.clone() for param in inputs.params]  # dense, in the parameter's own layout
    grads = _map(_aligned, inputs.grads, params)
    return StepInputs(params, grads, tuple(_map(_copy, column, params) for column in inputs.slots))


def _each_clone(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


# One call for a list, where torch has it.
_clone_all: Callable[[list[Tensor]], list[Tensor]] = getattr(torch, "_foreach_clone", _each_clone)


def packed(inputs: StepInputs) -> StepInputs:
    """Return contiguous leaves laid side by side in fresh memory, as one leaf."""
    return StepInputs.of([torch.cat(column)] for column in inputs.columns)


def unpacked(outputs: StepOutputs, sizes: list[int]) -> StepOutputs:
    """Return the leaves that lie side by side in one.

    They share a storage but no element, and are no views in the eyes of autograd: each has a
    version of its own. This is far quicker than to allocate each of them.
    """
    split = torch.unsafe_split_with_sizes
    return StepOutputs.of([list(split(column[0], sizes)) for column in outputs.columns])


def scaled(inputs: StepInputs, grad_scale: Number) -> Iterator[StepInputs]:
    """Yield leaves of one dtype and device piece by piece, with gradients times a number.

    The pieces are parts of the leaves, a large one in many, to be moved before the next is asked
    for: products are made where the last ones were, so that they never leave the cache. None but a
    leaf's last ends within a vector, so a kernel moves the pieces as it does the whole, to the bit.
    The gradients themselves are not written, as torch's fused kernel would that scales by itself.
    """
    if inputs.params[0].is_meta:
        yield inputs  # which have no values, so that nothing is made of them
        return
    if not inputs.params[0].is_cpu:
        yield inputs._replace(grads=arithmetic.scaled(inputs.grads, grad_scale))
        return
    whole = []
    products: Tensor | None = None
    for index, param in enumerate(inputs.params):
        tensors = [column[index] for column in inputs.columns]
        if param.numel() <= IN_CACHE or not all(map(Tensor.is_contiguous, tensors)):
            whole.append(index)
            continue
        if products is None:
            products = torch.empty_like(param.view(-1)[:IN_CACHE])
        parts = [torch.split(tensor.view(-1), IN_CACHE) for tensor in tensors]
        for piece, grad, *slots in zip(*parts, strict=True):
            product = torch.mul(grad, grad_scale, out=products[: grad.numel()])
            yield StepInputs([piece], [product], tuple([slot] for slot in slots))
    for batch in cut(whole, inputs.params):
        piece = inputs.take(batch.indices)
        yield piece._replace(grads=arithmetic.scaled(piece.grads, grad_scale))


def borrow(inputs: StepInputs) -> StepInputs:
    """Return the leaves themselves, or aligned copies of those that a kernel could not take."""
    params = [param if _is_dense(param) else param.clone() for param in inputs.params]
    others = (_map(_aligned, column, params) for column in inputs.columns[1:])
    return StepInputs.of([params, *others])


def give_back(borrowed: StepInputs, inputs: StepInputs) -> None:
    """Write what was computed on copies into the tensors that were copied."""
    targets = inputs.targets.columns
    if borrowed is not inputs:
        for news, olds in zip(borrowed.targets.columns, targets, strict=True):
            for new, old in zip(news, olds, strict=True):
                if new is not old:
                    write(old, new)
    moved = [tensor for column in targets for tensor in column]
    if torch.is_inference_mode_enabled():  # where tensors have no version
        moved = [tensor for tensor in moved if not tensor.is_inference()]
    torch.autograd.graph.increment_version(moved)


def write_all(inputs: StepInputs, outputs: StepOutputs) -> None:
    """Write what came of a step into the leaves."""
    for olds, news in zip(inputs.targets.columns, outputs.columns, strict=True):
        for old, new in zip(olds, news, strict=True):
            write(old, new)


def _map(
    function: Callable[[Tensor, Tensor], Tensor], tensors: list[Tensor], params: list[Tensor]
) -> list[Tensor]:
    return [function(tensor, param) for tensor, param in zip(tensors, params, strict=True)]


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
