"""Kernels: from lists of tensors and numbers to lists of tensors. No tree and no policy comes here.

`run` asks who is watching and takes one of three ways: the plain operators where each of them is
watched (`plain`), one rule for the whole step under vmap and reverse mode (`_rules`), and otherwise
the fastest kernel that is right for these tensors (`_eager`). `move` is this last way, for those
who know that nobody watches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._core import transforms
from .._core.recording import recording
from ..optimizers._adam import equations
from . import dispatch
from .autograd import ruled_step
from .dispatch import KERNELS, move, move_, unserved
from .layout import Layout, forget, known, layout_of
from .rule import (
    PUBLIC_NAMES,
    Leaves,
    Moved,
    Scalars,
    Variant,
    real,
    unreal,
    write,
    write_all,
    written,
)

__all__ = [
    "KERNELS",
    "PUBLIC_NAMES",
    "Layout",
    "Leaves",
    "Moved",
    "Scalars",
    "Variant",
    "forget",
    "known",
    "layout_of",
    "move",
    "move_",
    "recording",
    "run",
    "run_",
    "unserved",
    "write",
    "written",
]


def run(
    leaves: Leaves, scalars: Scalars | list[Scalars], variant: Variant, layout: Layout | None = None
) -> Moved:
    """Return the leaves after one step, in fresh memory.

    The step can be differentiated under a transform, and wherever gradients are being recorded:
    enter `recording` first, which decides that.

    Args:
        leaves: The tensors of leaves that have a gradient, checked: alike within a leaf, dense in
            layout (any strides), of floating-point or complex dtype.
        scalars: The numbers of all leaves, or for each leaf its own. Leaves that share theirs then
            share the object.
        variant: What is fixed.
        layout: What is known of the leaves, if anything is.
    """
    if layout.real if layout else not any(map(Tensor.is_complex, leaves.params)):
        return _run(leaves, scalars, variant, layout)
    moved = _run(_real(leaves), scalars, variant, None)
    return Moved(
        *(
            [unreal(tensor, like) for tensor, like in zip(column, leaves.params, strict=False)]
            for column in moved
        )
    )


def run_(
    leaves: Leaves, scalars: Scalars | list[Scalars], variant: Variant, layout: Layout | None = None
) -> None:
    """Move the leaves in place, with the same numbers as `run`, while no gradient is recorded."""
    if layout is None or transforms.observed() or _any_lazy(leaves, layout):
        write_all(leaves, run(leaves, scalars, variant, layout))
    elif layout.real:
        dispatch.move_(leaves, scalars, variant, layout)
    else:
        reals = _real(leaves)
        dispatch.move_(reals, scalars, variant, layout_of(reals))


def _run(
    leaves: Leaves, scalars: Scalars | list[Scalars], variant: Variant, layout: Layout | None
) -> Moved:
    numbers = [scalars] if isinstance(scalars, Scalars) else scalars
    if transforms.watched_by_operator(*leaves, *numbers):
        return equations.step(leaves, scalars, variant)
    if transforms.transformed() or torch.is_grad_enabled():
        return _by_rule(leaves, scalars, variant)
    return dispatch.move(leaves, scalars, variant, layout or layout_of(leaves))


def _by_rule(leaves: Leaves, scalars: Scalars | list[Scalars], variant: Variant) -> Moved:
    """Take one ruled step for each set of numbers: a rule knows one set."""
    if isinstance(scalars, Scalars):
        return ruled_step(leaves, scalars, variant)
    groups: dict[int, list[int]] = {}
    for index, own in enumerate(scalars):
        groups.setdefault(id(own), []).append(index)
    moved = Moved(*map(list, written(leaves)))
    for indices in groups.values():
        part = ruled_step(leaves.take(indices), scalars[indices[0]], variant)
        for column, tensors in zip(moved, part, strict=True):
            for index, tensor in zip(indices, tensors, strict=bool(tensors)):
                column[index] = tensor
    return moved


def _real(leaves: Leaves) -> Leaves:
    return Leaves(*([real(tensor) for tensor in column] for column in leaves))


def _any_lazy(leaves: Leaves, layout: Layout) -> bool:
    """Whether a tensor to be written is a conjugate view, whose memory does not hold its values."""
    return not layout.ready and any(any(map(Tensor.is_conj, column)) for column in written(leaves))
