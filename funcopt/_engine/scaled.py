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
from .prepare import multiplied
from .update import update_scaled as update_scaled_by_rule

Trees: TypeAlias = tuple[Tree, Tree]

# By the very type: a subclass may have an update of its own.
_handing_on: dict[type, Callable[..., Trees]] = {}


def hands_on(kind: type, update: Callable[..., Trees]) -> None:
    """Let optimizers of a type take gradients and a number to multiply them by, unmultiplied.

    It is called as `update_scaled` is.
    """
    _handing_on[kind] = update


def update_scaled(
    opt: Optimizer[Any],
    grads: Tree,
    grad_scale: Tensor | None,
    state: Tree,
    params: Tree,
    *,
    in_place: bool = False,
) -> Trees:
    """Return what an update makes of parameters and state, by checked gradients times a number.

    The number is of shape (), None for 1. The products are rounded to the dtypes of the gradients.
    """
    update = opt.update_ if in_place else opt.update
    if grad_scale is None:
        return update(grads, state, params)
    own = update_scaled_by_rule if own_traits(opt).by_rule else _handing_on.get(type(opt))
    if own is None:
        return update(multiplied(grads, grad_scale), state, params)
    return own(opt, grads, grad_scale, state, params, in_place=in_place)
