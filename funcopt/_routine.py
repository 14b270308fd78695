"""The step of a training loop, once it goes round: nothing is left to check or to decide.

Most steps are like the one before, on other numbers: dicts of leaves that look as they did, nobody
who watches, nothing with a history. Then everything but where tensors start was found out before,
and to ask again would take longer than to move small leaves. Any doubt leads back to the long way,
which finds the same numbers, or the words for what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import _kernels, _transforms, _tree
from ._counts import fresh, value_of
from ._kernels import Layout, Leaves, Scalars, Variant
from ._types import Number, Tree
from ._work import recall

__all__ = ["Routine", "routine"]

Numbers: TypeAlias = Callable[[Sequence[Tensor], Sequence[Number]], list[Scalars]]
"""Gives the numbers of an update from the counts before it and after it."""


class Routine(NamedTuple):
    """A step that is like one before."""

    leaves: Leaves
    structure: _tree.Structure  # of every tree
    layout: Layout
    step: Tensor  # how many updates were made
    new_step: float  # and after this one

    def move(self, numbers: Numbers, variant: Variant) -> list[Tree] | None:
        """Return the new tree of parameters, the new count, and the new trees of moments.

        None if there is more to it: a number has a history, or leaves share memory.
        """
        params = self.leaves.params
        own = self._numbers(numbers)
        if own is None or not _are_apart(params):
            return None
        if not self.layout.params_require_grad:
            moved = _kernels.move(self.leaves, own, variant, self.layout)
        else:
            with torch.no_grad():
                moved = _kernels.move(self.leaves, own, variant, self.layout)
            for new, old in zip(moved.params, params, strict=True):
                if old.requires_grad:
                    new.requires_grad_()
        new_params, *moments = (_tree.unflatten(self.structure, column) for column in moved[:3])
        maxima = _tree.unflatten(self.structure, moved[3]) if variant.amsgrad else ()
        return [new_params, fresh(self.new_step, self.step), *moments, maxima]

    def move_(self, numbers: Numbers, variant: Variant) -> bool:
        """Move the leaves and the count in place, and return whether that was all there is to it.

        If not, nothing was written: a number or a parameter has a history, or tensors share memory.
        """
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs = self.leaves
        tensors = [*params, *grads, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs, self.step]
        own = self._numbers(numbers)
        if own is None or not _are_apart(tensors):
            return False
        if not self.layout.params_require_grad:  # to enter no_grad takes longer than a small leaf
            _kernels.move_(self.leaves, own, variant, self.layout)
        elif all(param.is_leaf for param in params):
            with torch.no_grad():
                _kernels.move_(self.leaves, own, variant, self.layout)
        else:
            return False
        self.step.fill_(self.new_step)
        return True

    def _numbers(self, numbers: Numbers) -> Scalars | None:
        """The numbers of this step; None if one has a history."""
        (own,) = numbers([self.step], [self.new_step])
        return None if not own.read and _has_history(own) else own


def routine(trees: list[Tree], step: object, kernel: str) -> Routine | None:
    """Return the step on these trees, if all but the numbers in them is as it was before.

    Args:
        trees: The parameters, gradients and moments.
        step: How many updates were made.
        kernel: The kernel that the user named.
    """
    if _transforms.watched() or _transforms.tracing():
        return None
    if not isinstance(step, Tensor) or step.ndim > 0 or step.is_inference():
        return None
    count = value_of(step)
    recalled = None if isinstance(count, Tensor) else recall(trees)
    if isinstance(count, Tensor) or recalled is None or not recalled.layout.calm:
        return None
    if kernel != "auto" and any(_kernels.unserved(kernel, d) for d in recalled.layout.devices):
        return None
    return Routine(*recalled, step, count + 1)


def _are_apart(tensors: list[Tensor]) -> bool:
    """Whether all start at different places in memory."""
    return len(set(map(Tensor.data_ptr, tensors))) == len(tensors)


def _has_history(numbers: Iterable[object]) -> bool:
    return any(isinstance(number, Tensor) and number.requires_grad for number in numbers)
