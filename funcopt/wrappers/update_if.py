"""An inner update that is made if a condition holds, and what stands for it if it does not."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.tensors import copies_of, write
from .._core.types import Optimizer, Tree
from .._engine.checks import check_dense
from .._engine.prepare import keep_requiring
from .._engine.registration import at_rest
from .scaled import update_scaled, update_scaled_

__all__ = ["choose", "copies", "keep_leaves_requiring", "update_if", "update_if_"]


def update_if(
    condition: bool | Tensor,
    opt: Optimizer[Any],
    grads: Tree,
    state: Tree,
    params: Tree,
    recorded: bool,
    factor: Tensor | None = None,
) -> tuple[Tree, Tree]:
    """Return what an update makes of parameters and state if a condition holds, else copies.

    Leaves that the optimizer leaves at rest are in either case the very tensors that were given.

    Args:
        condition: True or False where that is known: then only one thing is done. Where it is not
            (a tensor of shape (), for each member of a vmap its own, or on a device that is not to
            be waited for), both are, and one is chosen.
        opt: The optimizer.
        grads: The gradients.
        state: Its state.
        params: The parameters.
        recorded: Whether plain autograd records a copy and a choice, as `records` says.
        factor: What the gradients are multiplied by, of shape (); None for 1.
    """
    if condition is True:
        return update_scaled(opt, grads, factor, state, params)
    olds, structure = pytree.flatten((params, state))
    if condition is False:
        leaves, inner = pytree.flatten(
            state
        )  # at which the inner optimizer does not look this time
        check_dense(leaves, partial(pytree.path, inner, "state.inner"))
        resting = _resting(opt, params)
        with torch.set_grad_enabled(recorded):
            others = iter(copies([old for i, old in enumerate(olds) if i not in resting]))
        chosen = [old if i in resting else next(others) for i, old in enumerate(olds)]
    else:
        moved = update_scaled(opt, grads, factor, state, params)
        news, structure = pytree.flatten(moved)
        with torch.set_grad_enabled(recorded):
            chosen = choose(condition, news, olds)
    new_params, new_state = pytree.unflatten(structure, chosen)
    keep_leaves_requiring(new_params, params)
    return new_params, new_state


def update_if_(
    condition: bool | Tensor,
    opt: Optimizer[Any],
    grads: Tree,
    state: Tree,
    params: Tree,
    factor: Tensor | None = None,
) -> None:
    """Do the same in place. What is to be checked of the tensors, the optimizer checks."""
    if condition is True:
        update_scaled_(opt, grads, factor, state, params)
    elif isinstance(condition, Tensor):
        leaves, resting = pytree.flatten((params, state))[0], _resting(opt, params)
        leaves = [leaf for index, leaf in enumerate(leaves) if index not in resting]
        with torch.no_grad():
            olds = copies(leaves)
        update_scaled_(opt, grads, factor, state, params)
        with torch.no_grad():
            for leaf, chosen in zip(leaves, choose(condition, leaves, olds), strict=True):
                write(leaf, chosen)


def _resting(opt: Optimizer[Any], params: Tree) -> Collection[int]:
    return at_rest(opt, *pytree.flatten(params))


def choose(
    condition: bool | Tensor, news: Sequence[Tensor], olds: Sequence[Tensor]
) -> list[Tensor]:
    """Return the new tensors if a condition holds, else the old. What is both is left as it is."""
    if isinstance(condition, bool):
        return list(news if condition else olds)
    return [
        old if new is old else torch.where(condition.to(old.device), new, old)
        for new, old in zip(news, olds, strict=True)
    ]


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of tensors, in the same layout."""
    if transforms.tracing() or transforms.transformed() or not transforms.all_plain(tensors):
        return [tensor.clone() for tensor in tensors]
    return copies_of(tensors)


def keep_leaves_requiring(new_params: Tree, params: Tree) -> None:
    """Let copies of parameters require a gradient where the old did, but for a transform's sake."""
    if not transforms.transformed() and not transforms.tracing():
        keep_requiring(pytree.flatten(new_params)[0], pytree.flatten(params)[0])
