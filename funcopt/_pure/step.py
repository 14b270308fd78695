"""One step of a class on copies: where nobody watches, for a derivative, for members of a vmap."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, optim

from .._core import pytree, transforms
from .._core.tensors import recording, write
from .._core.types import Tree
from .source import (
    Kind,
    build,
    explained,
    in_plain_operators,
    is_elementwise,
    is_of_torch,
    may_have_derivative,
    name_of,
    numbers_after,
)
from .state import (
    LeafState,
    check_has_state,
    check_keeps_nothing_else,
    is_made,
    outside_of_state,
)

R = TypeVar("R")


class Leaves(NamedTuple):
    """What a step is made of, leaf by leaf."""

    params: list[Tensor]
    grads: list[Tensor | None]
    states: list[LeafState]

    @property
    def kept(self) -> list[Tensor]:
        """All tensors of the states."""
        return [own for state in self.states for field in state for own in field.values()]


def for_each_member(function: Callable[..., R], *trees: Tree) -> R:
    """Call a function of trees; under vmap, for each member by itself, beneath the vmap.

    So a class may read the values of its tensors, and each member has the bits that it has alone.
    """
    if transforms.observed() or not transforms.in_vmaps_alone():
        return function(*trees)
    made: R = transforms.beneath_vmap(partial(_beneath, function, trees))
    return made


def _beneath(
    function: Callable[..., Any], trees: tuple[Tree, ...], members: transforms.Members
) -> Any:
    leaves, structure = pytree.flatten(trees)
    pairs = [members.unwrap(leaf) for leaf in leaves]
    columns: list[list[Any]] = []
    for index in range(members.size):
        own = [leaf if dim is None else leaf.select(dim, index) for leaf, dim in pairs]
        results, made = pytree.flatten(for_each_member(function, *pytree.unflatten(structure, own)))
        columns.append(results)
    stacked = [
        members.wrap(torch.stack(column)) if isinstance(column[0], Tensor) else column[0]
        for column in zip(*columns, strict=True)
    ]
    return pytree.unflatten(made, stacked)


def stepped(
    kind: Kind, hyperparameters: Mapping[str, Any], count: Tree, leaves: Leaves
) -> tuple[list[Tensor], list[LeafState]]:
    """Return parameters and states after one step, in fresh memory.

    Raises:
        RuntimeError: If the class cannot make the step where it is watched.
        TypeError: If it keeps something outside of the state of its parameters.
        ValueError: If a number is none, or has a derivative that the class would lose.
    """
    values = numbers_after(kind, hyperparameters, count)
    numbers = [own for own in pytree.flatten(values)[0] if isinstance(own, Tensor)]
    given, others = [grad for grad in leaves.grads if grad is not None], [*leaves.kept, *numbers]
    choice = values.get("differentiable") if "differentiable" in hyperparameters else None
    tensors = [*leaves.params, *given, *others]
    with recording(leaves.params, given, others, choice):
        recorded = torch.is_grad_enabled()
        forward = transforms.needs_plain_operators(tensors) and not transforms.observed()
        followed = recorded or forward
        if transforms.transformed():  # where a tensor does not say whether it has a derivative
            touched = any(map(may_have_derivative, tensors))
            recorded, followed = recorded and touched, forward or touched
        if recorded or forward:
            values = in_plain_operators(kind, values, forward=forward)
        elif followed:  # members of a vmap, perhaps, in which no value can be read
            with contextlib.suppress(ValueError):
                values = in_plain_operators(kind, values, forward=False)
        with torch.set_grad_enabled(recorded):
            if followed:
                return _followed(kind, values, leaves, tensors, is_own=choice is True)
            return _moved(kind, values, _copied(leaves, torch.clone, of_torch=is_of_torch(kind)))


def _copied(leaves: Leaves, copy: Callable[[Tensor], Tensor], *, of_torch: bool) -> Leaves:
    """Return copies of what a step may write: of gradients, too, if the class is not torch's."""
    grads = [grad if grad is None or of_torch else copy(grad) for grad in leaves.grads]
    return Leaves(
        [copy(p) for p in leaves.params], grads, [_mapped(copy, s) for s in leaves.states]
    )


def _mapped(function: Callable[[Tensor], Tensor], state: LeafState) -> LeafState:
    return LeafState(*({n: function(own) for n, own in field.items()} for field in state))


def _followed(
    kind: Kind,
    values: Mapping[str, Any],
    leaves: Leaves,
    tensors: Sequence[Tensor],
    *,
    is_own: bool,
) -> tuple[list[Tensor], list[LeafState]]:
    """Make a step that a derivative or a transform follows, of copies that can hold its results.

    What is mapped over by a vmap cannot be written into what is not. So all copies are chosen by a
    condition that depends on every tensor, and holds.

    Where the path is the class's own, as of one with `differentiable=True`, its bits are, too. Else
    the count of steps is in float64: what is computed of it comes of Python numbers elsewhere.
    """
    copy: Callable[[Tensor], Tensor] = torch.clone
    if transforms.transformed():
        parts = [t.detach().real if t.is_complex() else t.detach() for t in tensors]
        nothing = [t.reshape(-1)[:0].sum(dtype=torch.float32) for t in parts]
        holds = sum(nothing[1:], nothing[0]) == 0

        def copy(tensor: Tensor) -> Tensor:
            return torch.where(holds.to(tensor.device), tensor, tensor)

    params, grads, states = _copied(leaves, copy, of_torch=False)
    dtype = None if is_own else torch.float64
    counted = [
        _with_counts(own, old, dtype) for own, old in zip(states, leaves.states, strict=True)
    ]
    moved, news = _moved(kind, values, Leaves(params, grads, counted), followed=True)
    return moved, [
        own._replace(slots={n: slot.to(old.slots[n].dtype) for n, slot in own.slots.items()})
        for own, old in zip(news, leaves.states, strict=True)
    ]


def _with_counts(state: LeafState, old: LeafState, dtype: torch.dtype | None) -> LeafState:
    """Return a state whose counts have no derivative, and one value if the members agree.

    The count of steps is in the dtype, if one is given.
    """
    slots = dict(state.slots)
    for name in ("step", "eta", "mu"):
        if name in old.slots and old.slots[name].ndim == 0:
            count = old.slots[name].detach()
            values = transforms.values_at_hand(count)
            if values and len(set(values)) == 1:
                count = torch.full((), values[0], dtype=count.dtype, device=count.device)
            own = dtype if name == "step" else None
            slots[name] = count.to(own or count.dtype, copy=True)
    return state._replace(slots=slots)


def _moved(
    kind: Kind, values: Mapping[str, Any], leaves: Leaves, *, followed: bool = False
) -> tuple[list[Tensor], list[LeafState]]:
    """Let the class move these very tensors; return them, and the states after it."""
    moving = [index for index, grad in enumerate(leaves.grads) if grad is not None]
    states, grads = list(leaves.states), [grad for grad in leaves.grads if grad is not None]
    olds = [states[index] for index in moving]
    news = _run(kind, values, [leaves.params[i] for i in moving], grads, olds, followed=followed)
    for index, new in zip(moving, news, strict=True):
        states[index] = new
    return leaves.params, states


def _run(
    kind: Kind,
    values: Mapping[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[LeafState],
    *,
    followed: bool = False,
) -> list[LeafState]:
    """Let the class make its step in these very tensors; return the states after it."""
    if not params:
        return []
    check_has_state(kind, values, states)
    followed_sgd = followed and issubclass(kind, optim.SGD)
    kept = [dict(own.slots) if followed_sgd else own.as_kept() for own in states]
    firsts = [followed_sgd and not is_made(own) for own in states]
    try:
        opt = _built(kind, values, params, firsts)
        for param, grad, own in zip(params, grads, kept, strict=True):
            param.grad = grad
            opt.state[param] = own
        before = {} if is_of_torch(kind) else outside_of_state(opt)
        opt.step()
    except Exception as error:
        raise RuntimeError(explained(kind, error)) from error
    for param in params:
        param.grad = None
    if not is_of_torch(kind):
        check_keeps_nothing_else(opt, before)
    owner = name_of(kind)
    return [own.after(opt.state[p], owner) for p, own in zip(params, states, strict=True)]


def _built(
    kind: Kind, values: Mapping[str, Any], params: Sequence[Tensor], firsts: Sequence[bool]
) -> optim.Optimizer:
    """Return an instance with these parameters, some of which are SGD's and make their first step.

    Torch's SGD takes the derivative off the gradient that it copies into its first buffer. Where a
    derivative follows the step, the gradient is added to a buffer of zeros, which has its value.
    """
    if True not in firsts:
        return build(kind, params, values)
    new = [param for param, is_first in zip(params, firsts, strict=True) if is_first]
    old = [param for param, is_first in zip(params, firsts, strict=True) if not is_first]
    opt = build(kind, new, {**values, "dampening": 0.0})
    if old:
        opt.add_param_group({"params": old, "dampening": values.get("dampening", 0.0)})
    return opt


def step_(kind: Kind, hyperparameters: Mapping[str, Any], count: Tree, leaves: Leaves) -> None:
    """Write parameters and states after one step over those before it.

    Torch's elementwise classes step in the memory of what they are given. Others may fail at a leaf
    when they have moved some, so that their step is computed first.
    """
    values = numbers_after(kind, hyperparameters, count)
    moving = [index for index, grad in enumerate(leaves.grads) if grad is not None]
    params = [leaves.params[index].detach() for index in moving]
    grads = [grad.detach() for grad in leaves.grads if grad is not None]
    states = [leaves.states[index] for index in moving]
    if not is_elementwise(kind):
        params, grads = [own.clone() for own in params], [own.clone() for own in grads]
        states = [_mapped(torch.clone, own) for own in states]
    news = _run(kind, values, params, grads, states)
    targets = [leaves.params[index] for index in moving]
    olds = [leaves.states[index] for index in moving]
    for target, param in zip(targets, params, strict=True):
        if not is_elementwise(kind):
            write(target, param)
    for old, new in zip(olds, news, strict=True):
        for own, made in zip(old, new, strict=True):
            for name, tensor in own.items():
                if made[name] is not tensor:
                    write(tensor, made[name])
