"""Several updates in place, each of an optimizer on its own leaves: all are made, or none is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.tensors import write
from .._core.types import Optimizer, Tree, own_traits
from .._dtensor.shards import whole_of
from .._engine.checks import check_apart, check_unwatched, check_writable
from .._engine.scaled import update_scaled
from .._engine.update import check_update_


class Update(NamedTuple):
    """One update: the optimizer and what it takes."""

    opt: Optimizer[Any]
    grads: dict[str, Any]
    state: Tree
    params: dict[str, Any]
    grad_scale: Tensor | None = None  # what the gradients are multiplied by; None for 1

    def make(self, *, in_place: bool) -> tuple[Tree, Tree]:
        """Return the new parameters and the new state."""
        opt, grads, state, params, grad_scale = self
        return update_scaled(opt, grads, grad_scale, state, params, in_place=in_place)


def update_together_(updates: Mapping[str, Update]) -> None:
    """Do the updates in place, by label. If one of them is refused, nothing was written.

    Each optimizer checks everything before it writes, but only for its own leaves. So all but one
    of the updates are made sure of before anything is written. An optimizer that is made by a rule
    is checked without being run. Any other makes its update out of place, by `update`, which finds
    whatever is wrong; its results are written at the end. The remaining update is then made in
    place as the first one: if it is refused, nothing was written yet. It is the largest of those
    that would have to be made out of place, if there are any.

    Raises:
        Exception: Whatever `update_` of one of the optimizers raises.
        ValueError: If a tensor to be written shares its memory with another one, or a gradient, of
            any group.
    """
    check_unwatched()
    moving = {
        label: update for label, update in updates.items() if not own_traits(update.opt).rests
    }
    if len(moving) > 1 and not transforms.tracing():  # when there is no memory yet
        _check_groups_apart(updates, moving)
    *others, first = sorted(updates, key=lambda label: _weight(updates[label]))
    sure = [label for label in others if _is_sure(updates[label])]
    moved = [_moved(label, updates[label]) for label in others if label not in sure]
    for label in (first, *sure):
        updates[label].make(in_place=True)
    with torch.no_grad():
        for olds, news in moved:
            for old, new in zip(olds, news, strict=True):
                write(old, new)


def _weight(update: Update) -> tuple[int, int]:
    """Return how much memory it would take to make sure of an update, in an order to sort by."""
    if own_traits(update.opt).rests:
        return 0, 0
    kind = 1 if own_traits(update.opt).by_rule else 2
    if transforms.tracing():  # when sizes may not be known, and nothing is written yet
        return kind, 0
    # Of wholes, so that the order is the same on every process: in it they may wait for each other.
    return kind, sum(whole_of(param).numel() for param in update.params.values())


def _check_groups_apart(updates: Mapping[str, Update], moving: Mapping[str, Update]) -> None:
    """Refuse memory that two optimizers share, which neither of them can see."""
    params = {name: leaf for update in moving.values() for name, leaf in update.params.items()}
    grads = {
        name: grad
        for update in moving.values()
        for name, grad in update.grads.items()
        if grad is not None
    }
    states, structure = pytree.flatten({label: update.state for label, update in updates.items()})
    names, grad_names = list(params), list(grads)

    def path(index: int) -> str:
        if index < len(names):
            return f"params[{names[index]!r}]"
        return pytree.path(structure, "state.inner", index - len(names))

    targets = [*params.values(), *states]
    check_apart(targets, list(grads.values()), path, lambda index: f"grads[{grad_names[index]!r}]")


def _is_sure(update: Update) -> bool:
    """Check an update in place without making it; return whether it is now sure to succeed."""
    opt, grads, state, params, _ = update
    if own_traits(opt).rests:
        return True
    if not own_traits(opt).by_rule or not params:
        return False
    return check_update_(opt, grads, state, params)


def _moved(label: str, update: Update) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors to be written, and what is to be written into them, checked."""
    new_params, new_state = update.make(in_place=False)
    old, structure = pytree.flatten((update.params, update.state))
    new = pytree.pair((new_params, new_state), "state", structure).leaves
    changed = [index for index in range(len(old)) if new[index] is not old[index]]

    def path(position: int) -> str:
        inside = pytree.path(structure, "", changed[position])
        root = "params" if inside.startswith("[0]") else f"state.inner[{label!r}]"
        return root + inside[len("[0]") :]

    olds, news = [old[index] for index in changed], [new[index] for index in changed]
    for position, (own, moved) in enumerate(zip(olds, news, strict=True)):
        is_recorded = moved.requires_grad and not own.requires_grad
        if is_recorded or not (own.is_leaf and moved.is_leaf) or transforms.any_dual((moved,)):
            raise RuntimeError(
                f"{path(position)} has a history, its own or that of a gradient, a state tensor or "
                f"a hyperparameter, which writing in place would lose. Use update(), or detach it "
                f"if no derivative is wanted."
            )
    if not transforms.tracing():
        check_writable(olds, path)
    return olds, news
