"""A step of stacked members without a vmap: one call of a kernel, with numbers of each member.

Stacked leaves of an elementwise rule are leaves like others; only the numbers differ along their
first dimension, and kernels know such numbers. So members whose gradients are there already need
no vmap for the step, which costs small ones more than the step itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.tensors import compute_dtype, copies_of, fit
from .._core.types import Hyperparam, Number, Tree, own_traits
from . import dispatch
from .checks import are_apart, check_inplace, check_state
from .counts import Counts, next_key, read_if_same
from .hyperparameters import check_counts, check_values, number_at
from .memory import Layout
from .prepare import Prepared, is_kept, prepare, recall, trees_of
from .rule import Setup, StepInputs, StepOutputs, UpdateRule


class Stack(NamedTuple):
    """What an update of stacked members is given.

    Attributes:
        grads: The gradients, a tree of tensors of shape (members, ...), as the other two.
        state: The state, whose count is of shape (members,).
        params: The parameters.
        active: Which members move: a bool tensor of shape (members,); None if all do.
        in_place: Whether to write parameters and state over the old, or in fresh memory.
        grad_scale: What the gradients are multiplied by: a tensor of shape (members,); None is 1.
        wrapped: Whether a wrapper hands it on. Then a mask or a scale must change no bit, so that
            members move as the kernel moves them that would serve them without.
    """

    grads: Tree
    state: Any
    params: Tree
    active: Tensor | None
    in_place: bool
    grad_scale: Tensor | None = None
    wrapped: bool = False

    @property
    def members(self) -> int:
        """How many members there are."""
        return len(pytree.flatten(self.params)[0][0])

    def where(self, condition: Tensor) -> Stack:
        """Return it for those members alone for which a condition holds, which can be read."""
        active = condition if self.active is None else condition & self.active
        return self._replace(active=None if bool(active.all()) else active)

    def multiplied(self) -> Stack:
        """Return it with gradients that are multiplied, in their dtypes and in fresh memory."""
        scale = self.grad_scale
        if scale is None:
            return self
        leaves, structure = pytree.flatten(self.grads)
        products = []
        for leaf in leaves:
            wide = leaf.to(compute_dtype(leaf.dtype))
            products.append((wide * fit(scale, wide)).to(leaf.dtype))
        return self._replace(grads=pytree.unflatten(structure, products), grad_scale=None)


Finish: TypeAlias = Callable[[], tuple[Tree, Any]]
"""Makes an update that was planned: nothing can be refused any more."""


def update_stacked_by_rule(
    opt: Any, grads: Tree, state: Any, params: Tree, active: Tensor | None, *, in_place: bool
) -> tuple[Tree, Any] | None:
    """Return what the update of each member makes of it; None, and nothing done, if that is slow.

    What is followed for derivatives, traced or mapped over is for the caller, and so are leaves
    that kernels do not serve as they lie, and optimizers that are made by no rule.

    Raises:
        TypeError: As an update does.
        ValueError: As an update does, or if a number or a leaf is not one for each member.
    """
    finish = plan_by_rule(opt, Stack(grads, state, params, active, in_place))
    return None if finish is None else finish()


def plan_by_rule(opt: Any, given: Stack) -> Finish | None:
    """Return what makes such an update, checked; None if that is slow. Nothing is written yet."""
    grads, state, params, active, in_place, *_ = given
    rule: UpdateRule | None = getattr(opt, "rule", None)
    count: Any = getattr(state, "step", ())
    key: Any = getattr(state, "key", ())
    if rule is None or not _is_served(opt, rule, state, active):
        return None
    if active is not None and active.ndim == 0:  # one for all
        active = active.expand(count.shape)
    setup, moving = rule.setup_of(opt), _moving(active)
    if moving == count.shape[0]:
        active = None
    stack = _recalled(opt, rule, setup, grads, state, params)
    if stack is None or (in_place and not _are_apart(stack, count)):
        stack = _gathered(opt, rule, grads, state, params, in_place=in_place)
    numbers = None if stack is None else _numbers(rule, opt, count, key, active)
    if stack is None or numbers is None:
        return None
    if moving == 0:
        return partial(_stay, rule, setup, stack, given)
    if given.wrapped and (active is not None or given.grad_scale is not None):
        unmasked = numbers._replace(active=1.0)
        parts = _plan(opt, rule, stack, unmasked, setup.options, in_place=in_place)
        kernels = [part.kernel for part, _ in parts]
        fit_all = all(kernel.takes_members for kernel in kernels)
        if given.grad_scale is not None:
            if not fit_all or not all(kernel.scales_gradients for kernel in kernels):
                return plan_by_rule(opt, given.multiplied())
            numbers = numbers._replace(grad_scale=read_if_same(given.grad_scale.double()))
        if active is not None and not fit_all:
            return None
    plan = _plan(opt, rule, stack, numbers, setup.options, in_place=in_place)
    return partial(_make, rule, setup, stack, plan, numbers.active, given)


def _stay(rule: UpdateRule, setup: Setup, stack: _Stack, given: Stack) -> tuple[Tree, Any]:
    """Return what was given, or copies, since nobody moves."""
    if given.in_place:
        return given.params, given.state
    with torch.no_grad() if stack.layout.params_require_grad else nullcontext():
        outputs = StepOutputs.of([copies_of(column) for column in stack.inputs.targets.columns])
        return _built(rule, setup, stack, outputs, given.state.step.clone(), given.state)


def _make(
    rule: UpdateRule, setup: Setup, stack: _Stack, plan: dispatch.Plan, moves: Any, given: Stack
) -> tuple[Tree, Any]:
    """Make a step; `moves` is 1.0, or one of 1.0 and 0.0 for each member."""
    inputs, layout, state = stack.inputs, stack.layout, given.state
    with torch.no_grad() if layout.params_require_grad else nullcontext():
        if given.in_place:
            dispatch.run_(inputs, plan, setup.options, layout)
            state.step.add_(moves)
            return given.params, state
        outputs = dispatch.run(inputs, plan, setup.options, layout)
        return _built(rule, setup, stack, outputs, state.step + moves, state)


def _built(
    rule: UpdateRule, setup: Setup, stack: _Stack, outputs: StepOutputs, count: Tensor, state: Any
) -> tuple[Tree, Any]:
    new_params, *slots = stack.rebuild(outputs)
    return new_params, rule.state_of(setup, [count, *slots], next_key(state))


def _is_served(opt: Any, rule: UpdateRule, state: Any, active: Tensor | None) -> bool:
    """Whether all members can take one step, and nobody follows it."""
    if (
        not own_traits(opt).by_rule
        or not rule.traits.elementwise
        or transforms.transformed()
        or transforms.observed()
    ):
        return False
    setup = rule.setup_of(opt)
    if setup.options.differentiable or setup.trees:
        return False
    check_state(state, rule.state)
    count = state.step
    if not _is_plain(count):  # of each leaf, say
        return False
    if active is None:
        return True
    if active.ndim > 0 and active.shape != count.shape:
        raise ValueError(
            f"active has shape {tuple(active.shape)} for {len(count)} members: must have shape "
            f"({len(count)},), one bool for each."
        )
    return True


def _moving(active: Tensor | None) -> int | None:
    """Return how many members move, if that is known: all are told by no mask."""
    if active is None or not transforms.on_host(active):
        return None
    return int(active.count_nonzero())


class _Stack(NamedTuple):
    """Stacked trees laid out flat, checked."""

    inputs: StepInputs
    layout: Layout
    rebuild: Callable[[StepOutputs], list[Tree]]  # makes trees of parameters and slots


def _recalled(
    opt: Any, rule: UpdateRule, setup: Setup, grads: Tree, state: Any, params: Tree
) -> _Stack | None:
    """Lay out trees that look as some that were checked, without checking anything."""
    recalled = recall(trees_of(opt, rule, setup.kept, grads, state, params))
    if recalled is None or transforms.may_be_dual():
        return None
    inputs, structure, layout, _ = recalled
    if (
        not layout.fast_path_ok
        or layout.params_require_grad
        or layout.plans.get("members") != state.step.shape[0]
        or not is_kept(setup, layout)
        or (setup.options.rounding == "stochastic" and not _is_plain(state.key))
    ):
        return None
    return _Stack(
        inputs, layout, lambda outs: [pytree.unflatten(structure, own) for own in outs.columns]
    )


def _are_apart(stack: _Stack, count: Tensor) -> bool:
    return not count.is_inference() and are_apart([*chain(*stack.inputs.columns), count])


def _gathered(
    opt: Any, rule: UpdateRule, grads: Tree, state: Any, params: Tree, *, in_place: bool
) -> _Stack | None:
    """Lay out trees with every check; None if kernels do not serve them as they lie."""
    prepared = _prepare(opt, rule, grads, state, params)
    layout, count = prepared.layout, state.step
    if prepared.watched or layout is None or not layout.fast_path_ok:
        return None
    if in_place:
        counts = Counts(pytree.Paired([count], pytree.flatten(count)[1], None), per_leaf=False)
        check_inplace(rule, prepared._replace(counts=counts), [count], [])
    return _Stack(prepared.inputs, layout, prepared.rebuild)


def _prepare(opt: Any, rule: UpdateRule, grads: Tree, state: Any, params: Tree) -> Prepared:
    """Lay out stacked trees flat, checked as if they were of one: what differs are the counts."""
    members = len(state.step)
    one = state._replace(step=_ONE)
    if isinstance(getattr(state, "key", ()), Tensor):
        one = one._replace(key=_ONE)
    prepared = prepare(opt, rule, grads, one, params)
    layout = prepared.layout
    found = None if layout is None else layout.plans.get("members")
    if found != members:
        for index, param in enumerate(prepared.inputs.params):
            if param.ndim == 0 or len(param) != members:
                raise ValueError(
                    f"{prepared.path('params', index)} has shape {tuple(param.shape)}, and "
                    f"state.step has {members} members: dimension 0 of every tensor must be the "
                    f"member."
                )
        if layout is not None:
            layout.plans["members"] = members
    return prepared


# In place of a count that is there for each member.
_ONE = torch.ones((), dtype=torch.float64, device="cpu")


def _is_plain(count: Any) -> bool:
    return (
        type(count) is Tensor
        and count.ndim == 1
        and count.dtype is torch.float64
        and not count.requires_grad
    )


def _numbers(rule: UpdateRule, opt: Any, count: Tensor, key: Any, active: Tensor | None) -> Any:
    """Return the numbers of the members, checked: each one for all, or of shape (members,).

    None if a derivative may be asked for by way of one, or it is of a subclass.
    """
    step = _step(count)
    numbers = _hyperparams(rule, opt, count)
    of_key = key.detach() if isinstance(key, Tensor) else 0.0
    moves: Any = 1.0 if active is None else active.to(torch.float64)
    return None if numbers is None else rule.numbers(step, *numbers, of_key, moves)


def _step(count: Tensor) -> Number:
    """Return the counts after the update, checked: one number, if all members have the same."""
    read = read_if_same(count)
    if isinstance(read, float):
        check_counts([read + 1])
        return read + 1
    new = count + 1
    check_counts([new])
    return new


class _Checked(NamedTuple):
    """Hyperparameters of members that were checked, until one of their tensors is written.

    Attributes:
        members: How many there are.
        versions: The tensors among them, each with its version.
        numbers: Their values, read where all members have the same.
        plans: Plans made with them: by whether in place and by where numbers are, for which leaves
            and options, and their parts.
    """

    members: int
    versions: list[tuple[Tensor, int]]
    numbers: list[Number]
    plans: dict[Any, tuple[Layout, Any, list[dispatch.Part]]]

    def hold(self, members: int) -> bool:
        """Whether they are as they were."""
        if self.members != members:
            return False
        for tensor, version in self.versions:  # noqa: SIM110  # a generator takes longer than this
            if tensor._version != version:
                return False
        return True


def _plan(
    opt: Any, rule: UpdateRule, stack: _Stack, numbers: Any, options: Any, *, in_place: bool
) -> dispatch.Plan:
    """Decide who moves what; as last time, if it was asked of such leaves and numbers then."""
    checked: _Checked | None = vars(opt).get("_checked")
    scale = numbers.grad_scale
    kinds = (
        in_place,
        type(scale) is float and scale == 1.0,
        *[getattr(number, "device", None) for number in numbers],
    )
    if checked is not None and not isinstance(numbers.key, Tensor):
        last = checked.plans.get(kinds)
        if last is not None and last[0] is stack.layout and last[1] == options:
            return [(part, numbers) for part in last[2]]
    plan = dispatch.plan(rule, stack.inputs, numbers, options, stack.layout, in_place=in_place)
    if checked is not None:
        checked.plans[kinds] = stack.layout, options, [part for part, _ in plan]
    return plan


def _hyperparams(rule: UpdateRule, opt: Any, count: Tensor) -> list[Number] | None:
    """Return what the hyperparameters of the members are. Tensors are checked if they changed."""
    checked: _Checked | None = vars(opt).get("_checked")
    if checked is not None and checked.hold(count.shape[0]):
        return checked.numbers
    numbers: list[Any] = []
    for own, given in zip(rule.hyperparams, rule.hyperparams_of(opt), strict=True):
        number = given
        if not isinstance(given, (float, Tensor)):
            number = _scheduled(own, given, count)
        if isinstance(number, Tensor):
            check_of_members(own, number, len(count))
        numbers.append(number)
    tensors = [number for number in numbers if isinstance(number, Tensor)]
    if any(map(transforms.has_derivative, tensors)) or not transforms.all_plain(tensors):
        return None
    read = list(map(read_if_same, numbers))
    if not any(map(Tensor.is_inference, tensors)) and all(
        isinstance(given, (float, Tensor)) for given in rule.hyperparams_of(opt)
    ):
        versions = [(tensor, tensor._version) for tensor in tensors]
        checked = _Checked(len(count), versions, read, {})
        object.__setattr__(opt, "_checked", checked)
    return read


def check_of_members(own: Hyperparam, number: Tensor, members: int) -> None:
    """Refuse a hyperparameter that is not one number for each member, or for all, or out of range.

    Raises:
        ValueError: If it is.
    """
    if number.ndim > 1 or (number.ndim == 1 and len(number) != members):
        raise ValueError(
            f"{own.path} has shape {tuple(number.shape)} for {members} members: must have shape "
            f"({members},), one for each, or ()."
        )
    check_values(own, number)


def _scheduled(own: Any, schedule: Any, count: Tensor) -> Tensor:
    """Return what a schedule gives for the count of each member."""

    def at(one: Tensor) -> Tensor:
        number = number_at(own, schedule, one)
        if isinstance(number, float):
            return torch.full((), number, dtype=torch.float64, device=count.device)
        return number

    values: Tensor = torch.func.vmap(at)(count)
    return values
