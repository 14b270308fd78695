"""An inner update that is made if a condition holds, and copies or the old values if it does not.

Wrappers that skip updates, or make one of several calls, go by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.tensors import choose, copies_of, write
from .._core.types import Optimizer, Tree, at_rest
from .checks import check_dense
from .prepare import are_shards, keep_requiring, may_recall, multiplied
from .scaled import update_scaled
from .update_where import update_where

# By the very type: a subclass may have an update of its own.
_handing_on: dict[type, Callable[..., tuple[Tree, Tree] | None]] = {}


def hands_on_condition(kind: type, update: Callable[..., tuple[Tree, Tree] | None]) -> None:
    """Let wrappers of a type take a condition on a device, to hand it on to the kernel.

    It is called as `update_by_kernel` is, but with gradients that are multiplied.
    """
    _handing_on[kind] = update


def update_by_kernel(
    condition: Tensor,
    opt: Optimizer[Any],
    grads: Tree,
    grad_scale: Tensor | None,
    state: Tree,
    params: Tree,
    *,
    in_place: bool,
) -> tuple[Tree, Tree] | None:
    """Update if a condition holds, which the kernel reads; None, and nothing done, if none can."""
    own = _handing_on.get(type(opt))
    if own is None:
        return update_where(condition, opt, grads, grad_scale, state, params, in_place=in_place)
    # What is asked of sharded gradients is asked once: all processes ask together, and whether one
    # of them can go this way depends on how its own parts lie.
    if are_shards() or not may_recall():
        return None
    if grad_scale is not None:
        grads = multiplied(grads, grad_scale)
    return own(opt, condition, grads, state, params, in_place=in_place)


def update_if(
    condition: bool | Tensor,
    opt: Optimizer[Any],
    grads: Tree,
    state: Tree,
    params: Tree,
    recorded: bool,
    grad_scale: Tensor | None = None,
) -> tuple[Tree, Tree]:
    """Return the parameters and the state after an update if a condition holds, else copies.

    Leaves at rest are in either case the tensors that were given. Where the condition is known,
    only one of the two is done. Else it is a tensor of shape (), as for the members of a vmap, or
    on a device that is not to be waited for: then both are done, and one is chosen, by the kernel
    that makes the update if it can.

    Whether plain autograd records a copy and a choice, `records` says. What the gradients are
    multiplied by is as for `update_scaled`.
    """
    if condition is True:
        return update_scaled(opt, grads, grad_scale, state, params)
    if condition is not False and not recorded:
        made = update_by_kernel(condition, opt, grads, grad_scale, state, params, in_place=False)
        if made is not None:
            return made
    olds, structure = pytree.flatten(params)
    own, state_structure = pytree.flatten(state)
    before = [*olds, *own]
    if condition is False:
        # The inner optimizer, which else checks its state, does not see it this time.
        check_dense(own, partial(pytree.path, state_structure, "state.inner"))
        resting = at_rest(opt, olds, structure)
        with torch.set_grad_enabled(recorded):
            others = iter(copies([old for i, old in enumerate(before) if i not in resting]))
        after = [old if i in resting else next(others) for i, old in enumerate(before)]
    else:
        new_params, new_state = update_scaled(opt, grads, grad_scale, state, params)
        news, structure = pytree.flatten(new_params)
        own, state_structure = pytree.flatten(new_state)
        with torch.set_grad_enabled(recorded):
            after = choose_each(condition, [*news, *own], before)
    count = len(olds)
    keep_requiring(after[:count], olds)
    chosen = pytree.unflatten(structure, after[:count])
    return chosen, pytree.unflatten(state_structure, after[count:])


def update_if_(
    condition: bool | Tensor,
    opt: Optimizer[Any],
    grads: Tree,
    state: Tree,
    params: Tree,
    grad_scale: Tensor | None = None,
) -> None:
    """Do the same in place. The optimizer checks the tensors, if it makes the update."""
    if condition is True:
        update_scaled(opt, grads, grad_scale, state, params, in_place=True)
    elif isinstance(condition, Tensor):
        if update_by_kernel(condition, opt, grads, grad_scale, state, params, in_place=True):
            return
        resting = at_rest(opt, *pytree.flatten(params))
        leaves = pytree.flatten((params, state))[0]
        leaves = [leaf for index, leaf in enumerate(leaves) if index not in resting]
        with torch.no_grad():
            olds = copies(leaves)
        update_scaled(opt, grads, grad_scale, state, params, in_place=True)
        with torch.no_grad():
            for leaf, chosen in zip(leaves, choose_each(condition, leaves, olds), strict=True):
                write(leaf, chosen)


def choose_each(
    condition: bool | Tensor, news: Sequence[Tensor], olds: Sequence[Tensor]
) -> list[Tensor]:
    """Return the new tensors if a condition holds, else the old, wherever the two differ."""
    if isinstance(condition, bool):
        return list(news if condition else olds)
    return [
        old if new is old else choose(condition.to(old.device), new, old)
        for new, old in zip(news, olds, strict=True)
    ]


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of tensors, in the same layout."""
    if transforms.tracing() or transforms.transformed() or not transforms.all_plain(tensors):
        return [tensor.clone() for tensor in tensors]
    return copies_of(tensors)
