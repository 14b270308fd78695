"""What an update may be told besides gradients, state and parameters: `active` and `value`.

Both are taken care of around the outermost optimizer, so that no wrapper has to hand them on. An
update that is not active is not made, or is made and not chosen. A value is put into the states of
those optimizers that go by one, for the time of the update: so it gets to them through every
wrapper that hands their state on, which each must do anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.types import Tree, is_dense, kind_of, optimizers_in
from .checks import sharding
from .recorded import is_recorded
from .stacked import update_stacked_by_rule
from .update_if import update_if, update_if_

Update: TypeAlias = Callable[..., tuple[Tree, Tree]]


def update_with_extras(
    update: Update, in_place: bool, opt: Any, grads: Tree, state: Tree, params: Tree, extras: Any
) -> tuple[Tree, Tree]:
    """Return what an update makes of parameters and state, if it is active, and told a value.

    Raises:
        TypeError: If an argument has another name, or is of the wrong type.
        ValueError: If it is a tensor of another shape.
    """
    unknown = extras.keys() - {"active", "value"}
    if unknown:
        raise TypeError(
            f"{update.__name__}() was given {pytree.some(sorted(unknown))}: besides grads, state "
            f"and params it takes active= and value=."
        )
    active, value = extras.get("active"), extras.get("value")
    own = _with_members.get(type(opt))
    if own is not None and active is False:
        value = None  # which may be one for each member, and is looked at by nobody
    elif own is not None:
        of_each = None if active is True else active
        own = partial(own, active=of_each, value=value, in_place=in_place)
        shards = sharding()
        if shards is not None and shards.has_sharded(params):
            own = partial(_on_local_parts, own, in_place)
        return own(opt, grads, state, params)
    told = None if value is None else _told(opt, state, value)
    if told is not None:
        new_params, new_state = update(opt, grads, told, params, active=active)
        return (params, state) if in_place else (new_params, _put(new_state, ()))
    condition = True if active is None else _condition(active)
    if condition is True:
        return update(opt, grads, state, params)
    if in_place:
        update_if_(condition, opt, grads, state, params)
        return params, state
    return _update_if(condition, opt, grads, state, params)


def _on_local_parts(own: Update, in_place: bool, *args: Any) -> tuple[Tree, Tree]:
    if transforms.compiling():
        return transforms.uncompiled(_on_local_parts, own, in_place, *args)
    from .._dtensor import methods  # noqa: PLC0415  # which nobody needs who has no DTensors

    updated: tuple[Tree, Tree] = (methods.update_ if in_place else methods.update)(own, *args)
    return updated


# By the very type.
_with_members: dict[type, Update] = {}


def takes_extras_of_members(kind: type, update: Update) -> None:
    """Let optimizers of a type take `active` and `value` of shape (members,) themselves.

    It is called as `update(opt, grads, state, params, active=..., value=..., in_place=...)`.
    """
    _with_members[kind] = update


def check_is_mask(active: object) -> None:
    """Refuse what says of nobody whether it is active."""
    if not isinstance(active, Tensor) or active.dtype is not torch.bool or not is_dense(active):
        raise TypeError(f"active is {kind_of(active)}: must be a bool, or a bool tensor.")


def _condition(active: bool | Tensor) -> bool | Tensor:
    """Return whether an update is active, read if that is free."""
    if isinstance(active, bool):
        return active
    check_is_mask(active)
    if active.ndim != 0:
        raise ValueError(
            f"active has shape {tuple(active.shape)}: must have shape (), one bool for the update. "
            f"One for each member goes to Members(opt), or is mapped over by torch.func.vmap."
        )
    at_hand = transforms.readable() and transforms.on_host(active)
    return bool(active) if at_hand and transforms.all_plain([active]) else active


def _update_if(
    condition: bool | Tensor, opt: Any, grads: Tree, state: Tree, params: Tree
) -> tuple[Tree, Tree]:
    trees = (params, grads, state)
    flat, structures = zip(*map(pytree.flatten, trees), strict=True)
    columns = [[leaf for leaf in leaves if isinstance(leaf, Tensor)] for leaves in flat]
    recorded = is_recorded(opt, *columns)
    mapped = not recorded and not transforms.observed() and transforms.in_vmaps_alone()
    if mapped and isinstance(condition, Tensor):
        made = transforms.beneath_vmap(partial(_beneath, (opt, grads, state, params, condition)))
        if made is not None:
            return made
    elif isinstance(condition, Tensor) and (recorded or transforms.transformed()):
        # Where it is not chosen, the derivative of the update is multiplied by 0. With a gradient
        # that is infinite or NaN in it, that would be NaN.
        zeroed = [
            torch.where(condition.to(leaf.device), leaf, 0) if isinstance(leaf, Tensor) else leaf
            for leaf in flat[1]
        ]
        grads = pytree.unflatten(structures[1], zeroed)
    return update_if(condition, opt, grads, state, params, recorded)


def _beneath(given: tuple[Any, ...], members: transforms.Members) -> tuple[Tree, Tree] | None:
    """Update the members of a vmap as a stack, beneath it; None, and nothing done, if that is slow.

    So nothing is computed for those who do not move.
    """
    leaves, structure = pytree.flatten(given)
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for index in places:
        tensor, dim = members.unwrap(leaves[index])
        if tensor.requires_grad:
            return None
        leaves[index] = tensor if dim is None else tensor.movedim(dim, 0)
    made = update_stacked_by_rule(*pytree.unflatten(structure, leaves), in_place=False)
    if made is None:
        return None
    news, structure = pytree.flatten(made)
    wrapped = [members.wrap(leaf) if isinstance(leaf, Tensor) else leaf for leaf in news]
    new_params, new_state = pytree.unflatten(structure, wrapped)
    return new_params, new_state


# By the very type of the optimizer: the type of its state.
_going_by_value: dict[type, type] = {}


def goes_by_value(kind: type, state: type) -> None:
    """Let optimizers of a type be told the value of an update, in the field `value` of their state.

    There they find a tensor of shape (), which they return as it is, or `()` if there is no value.
    """
    _going_by_value[kind] = state


def _told(opt: Any, state: Tree, value: Any) -> Tree | None:
    """Return a state with a value for all that go by one; None if nobody does."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or not is_dense(value):
            raise TypeError(
                f"value is {kind_of(value)}: must be a floating-point number or tensor."
            )
        if value.ndim != 0:
            raise ValueError(
                f"value has shape {tuple(value.shape)}: must have shape (), one score. One for "
                f"each member goes to Members(opt), or is mapped over by torch.func.vmap."
            )
        own = value.detach()
    elif not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"value is {kind_of(value)}: must be a number, or a tensor of shape ().")
    else:
        own = torch.full((), value, dtype=torch.float64, device="cpu")
    return _put(state, own) if any(type(p) in _going_by_value for p in optimizers_in(opt)) else None


def told_members(state: Tree, value: Any, members: int) -> Tree | None:
    """Return a state with the value of each member for all that go by one.

    None if it is no such value, or has a history or a subclass: then that is for a vmap.
    """
    if isinstance(value, Tensor):
        if type(value) is not Tensor or not value.is_floating_point() or not value.is_cpu:
            return None
        if value.requires_grad or value.ndim > 1 or (value.ndim == 1 and len(value) != members):
            return None
        own = value.expand(members) if value.ndim == 0 else value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        own = torch.full((members,), value, dtype=torch.float64, device="cpu")
    else:
        return None
    return _put(state, own)


def forget_value(state: Tree) -> Tree:
    """Return a state without the value of the update that it was told."""
    return _put(state, ())


def keep_value(new: Tree, old: Tree) -> Tree:
    """Return a state as `init` makes it that is told what another one of the same optimizer is.

    Whoever lets an optimizer start anew within an update, chooses between two such states.
    """
    kinds = _going_by_value.values()
    nodes, _ = pytree.flatten_above(old, lambda node: type(node) in kinds)
    return next((_put(new, node.value) for node in nodes if type(node) in kinds), new)


def _put(state: Tree, value: Any) -> Tree:
    """Return a state with another value in each that goes by one, at any depth.

    Each has a copy of its own, since a state may be written as a whole, where no two of its tensors
    may share memory, and what was given must not be written.
    """
    kinds = _going_by_value.values()
    nodes, structure = pytree.flatten_above(state, lambda node: type(node) in kinds)
    news = [_with_value(node, value) if type(node) in kinds else node for node in nodes]
    return pytree.unflatten(structure, news)


def _with_value(node: Any, value: Any) -> Any:
    own = value
    if isinstance(value, Tensor):
        own = value.clone(memory_format=torch.contiguous_format)
    fields = {**node._asdict(), "value": own, "inner": _put(node.inner, value)}
    return type(node)(**fields)  # as `_replace` does, which Dynamo of torch 2.11 cannot return
