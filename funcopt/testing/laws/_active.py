"""What an update that is told `active=False` must leave alone."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from ..._core.types import Tree
from .._compare import NotApplicable, compare, compare_moved
from .._subject import Step, clone, leaves_of, run, tree_map
from ._transforms import member_of, stack

_LAW = "inactive_updates_change_nothing"

# Of three members, the one between two that are active.
_RESTING = 1


def inactive_updates_change_nothing(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """An update that is not active keeps every bit, whatever the gradients are.

    So it is out of place and in place. Under vmap, the mask has a bool for each member: those that
    are active move as they do without a mask.
    """
    if not _takes_active(opt.update):
        raise NotApplicable("its update takes no active=")
    for step in run(opt, params, gradient_sequence):
        before = step.params, step.state
        for active in (False, _bools(False, step.params)):
            for grads in _whatever(step.grads):
                kept = opt.update(grads, step.state, step.params, active=active)
                compare_moved(f"{_LAW} (active={active})", step.number, kept, before)
                _keeps_in_place(opt, step, grads, active)
    _members_rest(opt, params, gradient_sequence)


def _takes_active(update: Callable[..., Any]) -> bool:
    """Whether an update may be given `active`, by its name or among others."""
    given = inspect.signature(update, follow_wrapped=False).parameters.values()
    return any(own.name == "active" or own.kind is own.VAR_KEYWORD for own in given)


def _bools(value: bool | list[bool], like: Tree) -> Tensor:
    leaves = leaves_of(like)
    return torch.tensor(value, device=leaves[0].device if leaves else "cpu")


def _whatever(grads: Tree) -> Iterator[Tree]:
    """Yield gradients as they are, and such that would spoil whatever they go into."""
    yield grads
    for value in (math.nan, math.inf):
        yield tree_map(lambda grad, value=value: torch.full_like(grad, value), grads)


def _keeps_in_place(opt: Any, step: Step, grads: Tree, active: bool | Tensor) -> None:
    update_ = getattr(opt, "update_", None)
    if not callable(update_) or not _takes_active(update_):
        return
    params, state = clone(step.params), clone(step.state)
    result = update_(grads, state, params, active=active)
    law, before = f"{_LAW} (in place, active={active})", (step.params, step.state)
    compare_moved(law, step.number, (params, state), before)
    compare(law, step.number, "result", result, before)


def _members_rest(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    try:
        moved, sequence = stack(params), list(map(stack, gradient_sequence))
    except NotApplicable:  # there is nothing that members could be made of
        return
    active = _bools([True, False, True], params)
    state = vmap(opt.init)(moved)

    def update(grads: Tree, state: Tree, params: Tree, active: Tensor) -> Any:
        return opt.update(grads, state, params, active=active)

    for number, grads in enumerate(sequence, 1):
        everyone = vmap(opt.update)(grads, state, moved)
        for bad in _whatever(grads):
            given = _with_member(grads, bad)
            chosen = vmap(update)(given, state, moved, active)
            for index, is_active in enumerate(active.tolist()):
                wanted = everyone if is_active else (moved, state)
                own = tuple(member_of(tree, index) for tree in chosen)
                name = f"{_LAW} (member {index}, active={is_active})"
                expected = tuple(member_of(tree, index) for tree in wanted)
                compare_moved(name, number, own, expected)
        moved, state = everyone


def _with_member(grads: Tree, others: Tree) -> Tree:
    """Return gradients of which those of the resting member are others."""
    found = iter(leaves_of(others))

    def replaced(grad: Tensor) -> Tensor:
        rests = torch.arange(len(grad), device=grad.device) == _RESTING
        return torch.where(rests.view(-1, *[1] * (grad.ndim - 1)), next(found), grad)

    return tree_map(replaced, grads)
