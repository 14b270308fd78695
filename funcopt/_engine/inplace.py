"""What `update_` refuses: whatever writing in place would make wrong, found before it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .._core import transforms
from .._core.types import Number
from .checks import are_apart, check_distinct, starts
from .dispatch import is_read
from .layout import Layout
from .prepare import Prepared
from .rule import UpdateRule

__all__ = [
    "check_apart",
    "check_inplace",
    "check_no_history",
    "check_not_among",
    "check_unwatched",
    "check_writable",
]

_FLOAT = frozenset((float,))


def check_inplace(
    rule: UpdateRule, prepared: Prepared, counts: list[Number], numbers: list[Any]
) -> None:
    """Refuse to write in place where that would lose a derivative or memory.

    Args:
        rule: The rule of the optimizer.
        prepared: The update.
        counts: What is to be written into the counts: a float where the count was read.
        numbers: The numbers of the leaves that move.

    Raises:
        RuntimeError: Under a transform of `torch.func` or forward mode, or if anything that goes
            into the update carries history.
        ValueError: If a tensor to be written is expanded, or starts where another one or a gradient
            does.
    """
    check_unwatched(*prepared.inputs.columns, prepared.counts.tensors, *numbers)
    if prepared.layout is not None and _is_plainly_fine(prepared, prepared.layout, counts, numbers):
        return
    check_no_history(_history(rule, prepared, numbers))
    if prepared.layout is not None:  # while operators are traced there is no memory yet
        for root, tensors in prepared.written().items():
            check_writable(tensors, partial(prepared.path, root))
        columns = prepared.written()
        places = [(root, index) for root, found in columns.items() for index in range(len(found))]
        check_apart(
            list(chain.from_iterable(columns.values())),
            prepared.inputs.grads,
            lambda position: prepared.path(*places[position]),
            partial(prepared.path, "grads"),
        )


def check_unwatched(*columns: Iterable[object]) -> None:
    """Refuse to write in place under a transform, or what is of tensors that have a tangent."""
    if transforms.watched(*columns):
        raise RuntimeError(
            "update_() writes in place, which a transform (vmap, grad, jvp, ...) cannot follow. "
            "Use update()."
        )


def _is_plainly_fine(
    prepared: Prepared, layout: Layout, new_counts: list[Number], numbers: Iterable[Any]
) -> bool:
    """Whether nothing can stand against it, as nearly always; else the fault is looked for.

    The layout vouches for the leaves, save for where they start and for parameters' histories. A
    count that was read vouches for itself: only a plain one without history is.
    """
    counts = prepared.counts.tensors
    tensors = [*chain.from_iterable(prepared.inputs.columns), *counts]
    return (
        layout.writable
        and _FLOAT.issuperset(map(type, new_counts))
        and all(map(is_read, numbers))
        and not any(map(Tensor.is_inference, counts))
        and not (layout.params_require_grad and any(not p.is_leaf for p in prepared.inputs.params))
        and are_apart(tensors)
    )


def check_apart(
    targets: Sequence[Tensor],
    grads: Sequence[Tensor],
    path: Callable[[int], str],
    grad_path: Callable[[int], str],
) -> None:
    """Refuse tensors that would be written over another one, or over a gradient still read."""
    pointers = starts([*targets, *grads])
    if pointers is not None and len(set(pointers)) == len(pointers):
        return
    check_distinct(targets, path, "one would be written over the other")
    if pointers is None:  # fake tensors have no memory to share
        return
    check_not_among(grads, targets, grad_path, "a tensor that is to be written")


def check_not_among(
    tensors: Sequence[Tensor], others: Sequence[Tensor], path: Callable[[int], str], what: str
) -> None:
    """Refuse tensors that start in memory where one of the others does.

    Args:
        tensors: The tensors.
        others: The others.
        path: Names tensor i.
        what: What one of the others is, for the message.
    """
    taken = {tensor.data_ptr() for tensor in others if tensor.numel() > 0}
    for index, tensor in enumerate(tensors):
        if tensor.numel() > 0 and tensor.data_ptr() in taken and not tensor.is_meta:
            raise ValueError(
                f"{path(index)} shares its memory with {what}. Clone it, or use update()."
            )


def check_no_history(found: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse the first of these tensors, each of which has a derivative to lose, by its name."""
    for name, tensor in found:
        raise RuntimeError(
            f"{name} {'has a history' if tensor.grad_fn else 'requires a gradient'}, which writing "
            f"in place would lose. Use update(), or detach it if no derivative is wanted."
        )


def _history(
    rule: UpdateRule, prepared: Prepared, numbers: Iterable[Any]
) -> Iterator[tuple[str, Tensor]]:
    """Yield what would have its derivative lost, by name."""
    for own in numbers:
        for path, number in zip(rule.paths.values(), own, strict=True):
            if isinstance(number, Tensor) and number.requires_grad:
                yield path, number
    columns = {"grads": prepared.inputs.grads, **prepared.written()}
    for root, tensors in columns.items():
        for index, tensor in enumerate(tensors):
            # A parameter that merely requires a gradient is what everyone trains.
            if tensor.requires_grad and not (root == "params" and tensor.is_leaf):
                yield prepared.path(root, index), tensor


def check_writable(tensors: Sequence[Tensor], path: Callable[[int], str]) -> None:
    """Refuse tensors of inference mode outside of it, and those whose elements share memory."""
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
