"""What `update_` refuses: whatever writing in place would make wrong, found before it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from . import _transforms
from ._checks import check_distinct
from ._kernels import PUBLIC_NAMES, Scalars
from ._work import Work

__all__ = ["check_inplace"]


def check_inplace(work: Work, numbers: Iterable[Scalars]) -> None:
    """Refuse to write in place where that would lose a derivative or memory.

    Raises:
        RuntimeError: Under a transform of `torch.func` or forward mode, or if anything that goes
            into the update carries history.
        ValueError: If a tensor to be written is expanded, or starts where another one or a gradient
            does.
    """
    if _transforms.transformed() or _transforms.forward_mode():
        raise RuntimeError(
            "update_() writes in place, which a transform (vmap, grad, jvp, ...) cannot follow. "
            "Use update()."
        )
    for name, tensor in _history(work, numbers):
        raise RuntimeError(
            f"{name} {'has a history' if tensor.grad_fn else 'requires a gradient'}, which writing "
            f"in place would lose. Use update(), or detach it if no derivative is wanted."
        )
    if _transforms.tracing():
        return
    written = work.written()
    for root, tensors in written.items():
        _check_writable(tensors, partial(work.path, root))
    places = [(root, index) for root, tensors in written.items() for index in range(len(tensors))]
    check_distinct(
        [tensor for tensors in written.values() for tensor in tensors],
        lambda position: work.path(*places[position]),
        "one would be written over the other",
    )
    _check_not_written(work, written)


def _check_not_written(work: Work, written: Mapping[str, Sequence[Tensor]]) -> None:
    """Refuse gradients that a kernel might read after it has written over them."""
    grads = work.leaves().grads
    targets = [tensor for tensors in written.values() for tensor in tensors]
    if not _transforms.all_plain(grads + targets):  # fake tensors have no memory to share
        return
    places = {tensor.data_ptr() for tensor in targets if tensor.numel() > 0}
    if places.isdisjoint(map(Tensor.data_ptr, grads)):
        return
    for index, grad in enumerate(grads):
        if grad.numel() > 0 and grad.data_ptr() in places and not grad.is_meta:
            raise ValueError(
                f"{work.path('grads', index)} shares its memory with a tensor that is to be "
                f"written. Clone it, or use update()."
            )


def _history(work: Work, numbers: Iterable[Scalars]) -> Iterator[tuple[str, Tensor]]:
    """Yield what would have its derivative lost, by name."""
    for own in numbers:
        for name, number in own._asdict().items():
            if isinstance(number, Tensor) and number.requires_grad:
                yield PUBLIC_NAMES.get(name, name), number
    for root, tensors in {"grads": work.leaves().grads, **work.written()}.items():
        for index, tensor in enumerate(tensors):
            # A parameter that merely requires a gradient is what everyone trains.
            if tensor.requires_grad and not (root == "params" and tensor.is_leaf):
                yield work.path(root, index), tensor


def _check_writable(tensors: list[Tensor], path: Callable[[int], str]) -> None:
    if not torch.is_inference_mode_enabled() and any(map(Tensor.is_inference, tensors)):
        index = [tensor.is_inference() for tensor in tensors].index(True)
        raise RuntimeError(
            f"{path(index)} was made in inference mode, outside of which it cannot be written. "
            f"Use update(), or clone it first."
        )
    if all(map(Tensor.is_contiguous, tensors)):
        return
    for index, tensor in enumerate(tensors):
        if any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ValueError(
                f"{path(index)} has strides {tensor.stride()} at shape {tuple(tensor.shape)}: "
                f"several elements share one place in memory. Clone it first."
            )
