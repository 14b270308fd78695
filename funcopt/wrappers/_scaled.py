"""An update by gradients times a number: inside the step where it can be, else by a pass before it.

A pass over the gradients that writes them anew takes longer than a step in place, most of it for
fresh memory. A kernel multiplies on its way through them, where nobody watches. Whoever hands an
update on to other optimizers can hand on the number, too, and says so with `hands_on`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from .._core.types import Optimizer, Tree, own_traits
from .._engine import driver
from .._engine.driver import multiplied

Trees: TypeAlias = tuple[Tree, Tree]
_Scaled: TypeAlias = Callable[[Any, Tree, Tensor, Tree, Tree], Trees]

# By the very type: a subclass may have an update of its own.
_handing_on: dict[type, tuple[_Scaled, _Scaled]] = {}


def hands_on(kind: type, update: _Scaled, update_: _Scaled) -> None:
    """Let optimizers of a type take gradients and a number to multiply them by, unmultiplied."""
    _handing_on[kind] = update, update_


def update_scaled(
    opt: Optimizer[Any], grads: Tree, grad_scale: Tensor | None, state: Tree, params: Tree
) -> Trees:
    """Return what an update makes of parameters and state, by gradients times a number.

    Args:
        opt: The optimizer.
        grads: The gradients, which were checked.
        grad_scale: The number, of shape (); None for 1. The products are rounded to the dtypes of
            the gradients.
        state: The state of the optimizer.
        params: The parameters.
    """
    if grad_scale is None:
        return opt.update(grads, state, params)
    if own_traits(opt).by_rule:
        return driver.update_scaled(opt, grads, grad_scale, state, params)
    if type(opt) in _handing_on:
        return _handing_on[type(opt)][0](opt, grads, grad_scale, state, params)
    return opt.update(multiplied(grads, grad_scale), state, params)


def update_scaled_(
    opt: Optimizer[Any], grads: Tree, grad_scale: Tensor | None, state: Tree, params: Tree
) -> Trees:
    """Do the same in place. What is to be checked of the tensors, the optimizer checks."""
    if grad_scale is None:
        return opt.update_(grads, state, params)
    if own_traits(opt).by_rule:
        return driver.update_scaled_(opt, grads, grad_scale, state, params)
    if type(opt) in _handing_on:
        return _handing_on[type(opt)][1](opt, grads, grad_scale, state, params)
    return opt.update_(multiplied(grads, grad_scale), state, params)
