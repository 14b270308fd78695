"""The step of a training loop, once it goes round: nothing is left to check or to decide.

Most steps are like the one before, on other numbers: dicts of leaves that look as they did, no
transform, nothing with a history. Then everything but where tensors start was found out before, and
to ask again would take longer than to move small leaves. Any doubt leads back to the long way,
which finds the same numbers, or the words for what is wrong.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import _engine
from .._core import modes, pytree, transforms
from .._core.checks import are_apart
from .._core.types import Tree
from . import Layout, Leaves, Scalars, Variant
from .counts import fresh, value_of
from .prepare import keep_requiring, recall

__all__ = ["Routine", "find_routine", "have_history"]


class Routine(NamedTuple):
    """A step that is like one before, but for its numbers, which must have no history."""

    leaves: Leaves
    structure: pytree.Structure  # of every tree
    layout: Layout
    step: Tensor  # how many updates were made
    new_step: float  # and after this one

    def move(self, numbers: Scalars, variant: Variant) -> list[Tree]:
        """Return the new tree of parameters, the new count, and the new trees of moments."""
        if not self.layout.params_require_grad:
            moved = _engine.move(self.leaves, numbers, variant, self.layout)
        else:
            moved = modes.without_gradients(
                _engine.move, self.leaves, numbers, variant, self.layout
            )
            keep_requiring(moved.params, self.leaves.params)
        new_params, *moments = (pytree.unflatten(self.structure, column) for column in moved[:3])
        maxima = pytree.unflatten(self.structure, moved[3]) if variant.amsgrad else ()
        return [new_params, fresh(self.new_step, self.step), *moments, maxima]

    def move_(self, numbers: Scalars, variant: Variant) -> None:
        """Move the leaves and the count in place."""
        if not self.layout.params_require_grad:
            _engine.move_(self.leaves, numbers, variant, self.layout)
        else:
            move_ = _engine.move_
            modes.without_gradients(move_, self.leaves, numbers, variant, self.layout)
        self.step.fill_(self.new_step)


def find_routine(
    trees: list[Tree], step: object, kernel: str, *, writing: bool = False
) -> Routine | None:
    """Return the step on these trees, if all but the numbers in it is as it was in one before.

    Args:
        trees: The parameters, gradients and moments.
        step: How many updates were made.
        kernel: The kernel that the user named.
        writing: Whether parameters, moments and count are to be written.
    """
    watched = transforms.transformed() or transforms.observed()
    if watched or not isinstance(step, Tensor) or step.ndim > 0 or step.is_inference():
        return None
    count = value_of(step)
    recalled = None if isinstance(count, Tensor) else recall(trees)
    if isinstance(count, Tensor) or recalled is None or not recalled.layout.calm:
        return None
    if transforms.may_be_dual() and transforms.any_dual(*recalled.leaves, (step,)):
        return None
    if kernel != "auto" and any(_engine.unserved(kernel, d) for d in recalled.layout.devices):
        return None
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs = recalled.leaves
    tensors = params
    if writing:
        if recalled.layout.params_require_grad and not all(param.is_leaf for param in params):
            return None
        tensors = [*params, *grads, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs, step]
    return Routine(*recalled, step, count + 1) if are_apart(tensors) else None


def have_history(numbers: Scalars) -> bool:
    """Whether a derivative of the step may be asked for by way of its numbers."""
    return not numbers.read and any(
        isinstance(number, Tensor) and transforms.has_derivative(number) for number in numbers
    )
