"""An update by gradients times a number: inside the step where it can be, else by a pass before it.

A pass over the gradients that writes them anew takes longer than a step in place, most of it for
fresh memory. `AdamW` multiplies on its way through them, where nobody watches. Whoever hands an
update on to other optimizers can hand on the number, too, by joining with `hands_on`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from . import _lists, _transforms, _tree
from ._adamw import AdamW, AdamWState
from ._kernels import Scalars, Variant
from ._routine import Routine, have_history
from ._types import Optimizer, Tree

__all__ = ["hands_on", "update_scaled", "update_scaled_"]

Trees: TypeAlias = tuple[Tree, Tree]
_Scaled: TypeAlias = Callable[[Any, Tree, Tensor, Tree, Tree], Trees]

# By the very type: a subclass may have an update of its own.
_handing_on: dict[type, tuple[_Scaled, _Scaled]] = {}


def hands_on(kind: type, update: _Scaled, update_: _Scaled) -> None:
    """Let optimizers of a type take gradients and a number to multiply them by, unmultiplied."""
    _handing_on[kind] = update, update_


def update_scaled(
    opt: Optimizer[Any], grads: Tree, factor: Tensor | None, state: Tree, params: Tree
) -> Trees:
    """Return what an update makes of parameters and state, by gradients times a number.

    Args:
        opt: The optimizer.
        grads: The gradients, which were checked.
        factor: The number, of shape (); None for 1. The products are rounded to the dtypes of the
            gradients.
        state: The state of the optimizer.
        params: The parameters.
    """
    if factor is None:
        return opt.update(grads, state, params)
    if type(opt) in _handing_on:
        return _handing_on[type(opt)][0](opt, grads, factor, state, params)
    step = _unwatched_step(opt, grads, factor, state, params)
    if step is not None:
        new_params, *new_state = step.routine.move(step.numbers, step.variant)
        return new_params, AdamWState(*new_state)
    return opt.update(_product(grads, factor), state, params)


def update_scaled_(
    opt: Optimizer[Any], grads: Tree, factor: Tensor | None, state: Tree, params: Tree
) -> Trees:
    """Do the same in place. What is to be checked of the tensors, the optimizer checks."""
    if factor is None:
        return opt.update_(grads, state, params)
    if type(opt) in _handing_on:
        return _handing_on[type(opt)][1](opt, grads, factor, state, params)
    step = _unwatched_step(opt, grads, factor, state, params, writing=True)
    if step is not None:
        step.routine.move_(step.numbers, step.variant)
        return params, state
    return opt.update_(_product(grads, factor), state, params)


class _Step(NamedTuple):
    routine: Routine
    numbers: Scalars
    variant: Variant


def _unwatched_step(
    opt: object, grads: Tree, factor: Tensor, state: Tree, params: Tree, *, writing: bool = False
) -> _Step | None:
    """The step that multiplies on its way, of an optimizer that has one, if nobody watches."""
    if type(opt) is not AdamW or factor.requires_grad or not _transforms.all_plain([factor]):
        return None
    routine = opt._find_routine(grads, state, params, writing=writing)
    if routine is None:
        return None
    (numbers,) = opt._numbers([routine.step], [routine.new_step])
    if have_history(numbers):
        return None
    value = float(factor.item()) if factor.is_cpu else factor
    return _Step(routine, numbers._replace(grad_factor=value), opt._variant())


def _product(grads: Tree, factor: Tensor) -> Tree:
    leaves, structure = _tree.flatten(grads)
    products = iter(_lists.scaled([leaf for leaf in leaves if leaf is not None], factor))
    return _tree.unflatten(structure, [None if leaf is None else next(products) for leaf in leaves])
