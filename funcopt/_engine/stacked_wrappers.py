"""A step of stacked members by wrappers: each hands the stack on, down to the one call of a kernel.

What a wrapper computes of each member, such as a norm, it computes of the stack along the other
dimensions, and what it decides for each member goes on as a mask. First the whole update is
planned, from the outside to the inside, which writes nothing; then it is made. So nothing is
half-written where somebody within cannot serve the stack, and all goes by a vmap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.tensors import copies_of
from .._core.types import Tree, own_traits
from .checks import are_apart
from .memory import known_flat, layout_of
from .rule import StepInputs
from .stacked import Finish, Stack, plan_by_rule

Plan: TypeAlias = Callable[[Any, Stack], Finish | None]

# By the very type: a subclass may have an update of its own.
_plans: dict[type, Plan] = {}


def plans_members(kind: type, plan: Plan) -> None:
    """Let wrappers of a type update stacked members without a vmap.

    It is called as `plan(opt, stack)`, and returns what makes the update, or None if it cannot be
    made so. It writes nothing itself. All tensors of the stack are on the CPU, dense and just
    tensors, each has the members along its first dimension, and nobody follows what is done with
    them. A mask can be read, and is neither of all members nor of none.
    """
    _plans[kind] = plan


def plan_stacked(opt: Any, stack: Stack) -> Finish | None:
    """Return what makes an update of stacked members within another one; None if that is slow.

    Nothing is written yet.

    Raises:
        TypeError: As an update does.
        ValueError: As an update does, or if a number or a leaf is not one for each member.
    """
    if stack.active is not None and not bool(stack.active.any()):
        return lambda: _unmoved(stack)
    own = _plans.get(type(opt))
    if own is not None:
        return own(opt, stack)
    if own_traits(opt).rests:
        return lambda: (stack.params, stack.state)
    return plan_by_rule(opt, stack._replace(wrapped=True))


def update_stacked(
    opt: Any, grads: Tree, state: Any, params: Tree, active: Tensor | None, *, in_place: bool
) -> tuple[Tree, Any] | None:
    """Return what the update of each member makes of it; None, and nothing done, if that is slow.

    What is followed for derivatives, traced or mapped over is for the caller, and so are leaves
    that kernels do not serve as they lie.

    Args:
        opt: An optimizer whose numbers are the same in all members, or of shape (members,).
        grads: The gradients, a tree of tensors of shape (members, ...), as the other two.
        state: The state, whose numbers are of shape (members,).
        params: The parameters.
        active: Which members move: a bool tensor of shape (members,); None if all do.
        in_place: Whether to write parameters and state over the old, or in fresh memory.

    Raises:
        TypeError: As an update does.
        ValueError: As an update does, or if a number or a leaf is not one for each member.
    """
    stack = Stack(grads, state, params, active, in_place)
    if type(opt) not in _plans:
        finish = plan_by_rule(opt, stack)
        return None if finish is None else finish()
    if not _is_plain(stack):
        return None
    with torch.no_grad():
        finish = plan_stacked(opt, stack if active is None else stack.where(active))
        made = None if finish is None else finish()
    return (params, state) if made is not None and in_place else made


def _unmoved(stack: Stack) -> tuple[Tree, Any]:
    """Return what was given, or copies."""
    if stack.in_place:
        return stack.params, stack.state
    leaves, structure = pytree.flatten((stack.params, stack.state))
    copied: tuple[Tree, Any] = pytree.unflatten(structure, copies_of(leaves))
    return copied


def _is_plain(stack: Stack) -> bool:
    """Whether nothing has to be asked about the tensors of a stack, as nearly always."""
    if transforms.transformed() or transforms.observed() or transforms.may_be_dual():
        return False
    tensors = pytree.flatten((stack.params, stack.grads, stack.state))[0]
    if not tensors or not transforms.all_plain(tensors) or tensors[0].ndim == 0:
        return False
    members = len(tensors[0])
    if members == 0 or not _are_ready(tensors, members):
        return False
    active = stack.active
    if active is not None and (type(active) is not Tensor or not _is_ready(active, members)):
        return False
    return not stack.in_place or are_apart(tensors)


def _are_ready(tensors: list[Tensor], members: int) -> bool:
    """Whether all are; those that look as some that were looked at are not looked at again."""
    layout = known_flat(tensors, (len(tensors),))
    if layout is not None and layout.plans.get("stack") == members:
        return True
    ready = all(_is_ready(tensor, members) for tensor in tensors)
    if ready:
        layout_of(StepInputs(tensors, [], ())).plans["stack"] = members
    return ready


def _is_ready(tensor: Tensor, members: int) -> bool:
    return (
        tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.requires_grad
        and not tensor.is_inference()
        and not tensor.is_complex()
        and not tensor.is_neg()
        and tensor.ndim > 0
        and tensor.shape[0] == members
        and tensor.is_contiguous()
    )
