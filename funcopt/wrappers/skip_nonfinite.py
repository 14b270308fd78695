"""Skipping: no update is made where a gradient is infinite or NaN."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core import transforms
from .._core.inner import InnerStateT, InnerT_co, OptimizerLike
from .._core.types import (
    Extras,
    Hyperparam,
    Number,
    ParamsT,
    Range,
    Schedule,
    StateT,
    Traits,
    Tree,
    check_is_optimizer,
)
from .._engine.checks import check_state
from .._engine.counts import next_count
from .._engine.hyperparameters import check_count, detached, normalize_fields, numbers_of
from .._engine.registration import register_optimizer, state_class
from .._engine.stacked import Finish, Stack
from .._engine.stacked_wrappers import plan_stacked, plans_members
from .._engine.update_if import update_if, update_if_
from ._finite import all_finite_everywhere, decide, device_for_state, finite_members, zeros_unless
from ._shared import (
    Gradients,
    check_overflow_is_seen,
    check_scalar,
    check_wrapper_inplace,
    first_count_if_scheduled,
    gather_gradients,
    gather_params,
    own_tensors,
    records,
    write_fields_and_count,
)
from ._stacks import gather_stack, numbers_of_members, renewed


@state_class
class SkipNonfiniteState(NamedTuple, Generic[InnerStateT]):
    """The state of `SkipNonfinite`. Its own tensors are where the parameters are.

    Attributes:
        consecutive: How many calls in a row, up to the last, had a gradient that was not finite: an
            int64 tensor of shape ().
        total: How many had in all, skipped or let through: likewise.
        last_finite: Whether the last gradients were finite: a bool tensor of shape (), True at
            first.
        inner: The state of the inner optimizer.
        step: How many updates were made, skipped ones not among them, if `max_consecutive` is a
            schedule: a float64 tensor of shape (); else `()`.
    """

    consecutive: Tensor
    total: Tensor
    last_finite: Tensor
    inner: InnerStateT
    step: Tree = ()


_MOST = Range(
    "must be a whole number of at least 0, or infinite (never let one through)",
    lambda value: value == math.inf or (0.0 <= value < math.inf and value == int(value)),
    whole=True,
)


@register_optimizer
@dataclass(frozen=True)
class SkipNonfinite(Generic[InnerT_co]):
    """Update if all gradients are finite; else move neither the parameters nor the inner state.

    One element that is infinite or NaN is enough to skip the whole step: the inner count of updates
    stands still, and the counts in the state go on. After `max_consecutive` skipped calls in a row,
    those that follow are let through as they are, until gradients are finite again.

    Calls and counts are those of `optax.apply_if_finite`, whose `notfinite_count` and
    `total_notfinite` are `consecutive` and `total` here. It differs in this: `max_consecutive` may
    be infinite, and is if it is not given, so that nothing that is not finite ever gets through; it
    may be a tensor; and the counts are in int64, where optax's stop at the largest int32.

    Nothing is ever read back from a GPU: there, under vmap, and where operators are recorded
    (compile, export), each call makes an inner update, and what holds is chosen element by element.
    On the CPU the gradients are read once more, and a skipped `update_` does nothing else.

    The order of wrappers matters. `SkipNonfinite(Accumulate(Adam(), 8))` leaves one bad gradient
    out of the sum, `Accumulate(SkipNonfinite(Adam()), 8)` all eight. `Clip` makes all gradients
    NaN or 0 where its norm is not finite: `SkipNonfinite(Clip(Adam(), 1.0))` sees them before.
    `LossScale` must see an overflow to lower its scale: it belongs outside.

    Args:
        inner: The optimizer that is given the finite gradients.
        max_consecutive: How many calls in a row are skipped at most: a whole number of at least 0,
            or infinity; a number, a 0-dim tensor of a floating-point dtype, or a schedule, which is
            called with the count of updates made so far (skipped ones not among them).

    Raises:
        TypeError: If `inner` is no optimizer, or `max_consecutive` is of the wrong type.
        ValueError: If `max_consecutive` is no whole number, or below 0, or if it is infinite and
            `inner` has a `LossScale`, whose scale would never fall.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.SkipNonfinite(funcopt.SGD(lr=0.1))
        >>> params = {"w": torch.ones(2)}
        >>> state = opt.init(params)
        >>> params, state = opt.update({"w": torch.tensor([1.0, torch.nan])}, state, params)
        >>> params, state.total, state.inner.step
        ({'w': tensor([1., 1.])}, tensor(1), tensor(0., dtype=torch.float64))
    """

    traits: ClassVar[Traits] = Traits(shardable=True, packable=True, complex_as_pairs=True)
    hyperparams: ClassVar[tuple[Hyperparam, ...]] = (Hyperparam("max_consecutive", _MOST),)

    inner: InnerT_co
    max_consecutive: Number | Schedule = math.inf

    def __post_init__(self) -> None:
        """Check and normalize the number of calls."""
        check_is_optimizer("inner", self.inner)
        normalize_fields(self, self.hyperparams)
        if isinstance(self.max_consecutive, float):  # which is infinite
            check_overflow_is_seen("SkipNonfinite", self.inner)

    def init(
        self: SkipNonfinite[OptimizerLike[StateT]], params: Tree
    ) -> SkipNonfiniteState[StateT]:
        """Return the state before the first update: counts of 0 and the inner state."""
        place = device_for_state(gather_params(self, params).moving)
        return SkipNonfiniteState(
            torch.zeros((), dtype=torch.int64, device=place),
            torch.zeros((), dtype=torch.int64, device=place),
            torch.ones((), dtype=torch.bool, device=place),
            self.inner.init(params),
            first_count_if_scheduled(self, place),
        )

    def update(
        self: SkipNonfinite[OptimizerLike[StateT]],
        grads: Tree,
        state: SkipNonfiniteState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, SkipNonfiniteState[StateT]]:
        """Return the new parameters and the new state, in fresh memory.

        A skipped step has the derivative of doing nothing.
        """
        gradients, numbers = self._gather(grads, state, params)
        counts, should_update = _judge(gradients, state, **numbers)
        recorded = should_update is not True and records(self, gradients, state, numbers)
        if recorded or transforms.transformed():
            gradients = gradients.replace(zeros_unless(should_update, gradients.tensors))
        given = gradients.tree
        new_params, inner = update_if(
            should_update, self.inner, given, state.inner, params, recorded
        )
        return new_params, SkipNonfiniteState(*counts, inner, next_count(state.step, should_update))

    def update_(
        self: SkipNonfinite[OptimizerLike[StateT]],
        grads: Tree,
        state: SkipNonfiniteState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, SkipNonfiniteState[StateT]]:
        """Do the same as `update` in place."""
        gradients, numbers = self._gather(grads, state, params)
        names = state._fields[:3]
        check_wrapper_inplace(numbers, own_tensors(state, *names), gradients)
        counts, should_update = _judge(gradients, state, **numbers)
        update_if_(should_update, self.inner, gradients.tree, state.inner, params)
        write_fields_and_count(state, should_update, **dict(zip(names, counts, strict=True)))
        return params, state

    def _plan_members(self, stack: Stack) -> Finish | None:
        """Return what updates stacked members, of which each is skipped by itself."""
        state: SkipNonfiniteState = stack.state
        check_state(state, SkipNonfiniteState)
        stack = stack.multiplied()
        numbers = numbers_of_members(
            self,
            stack,
            consecutive=(state.consecutive, torch.int64),
            total=(state.total, torch.int64),
            last_finite=(state.last_finite, torch.bool),
        )
        gradients = gather_stack(self, stack)
        if numbers is None or gradients is None:
            return None
        finite = finite_members(gradients.tensors, stack.active)
        counts, should_update = _count(finite, state, **numbers)
        moving = stack.where(should_update)
        finish = plan_stacked(self.inner, moving._replace(state=state.inner))
        if finish is None:
            return None

        def update() -> tuple[Tree, SkipNonfiniteState]:
            new_params, inner = finish()
            olds = state.consecutive, state.total, state.last_finite
            consecutive, total, last = renewed(stack, *zip(olds, counts, strict=True))
            return new_params, SkipNonfiniteState(consecutive, total, last, inner)

        return update

    def _gather(
        self, grads: Tree, state: SkipNonfiniteState, params: Tree
    ) -> tuple[Gradients, dict[str, Number]]:
        check_state(state, SkipNonfiniteState)
        check_count(state.consecutive, lambda: "state.consecutive")
        check_count(state.total, lambda: "state.total")
        check_scalar("state.last_finite", state.last_finite, torch.bool)
        numbers = numbers_of(self, state.step)
        return gather_gradients(self, grads, params), numbers


plans_members(SkipNonfinite, SkipNonfinite._plan_members)


def _judge(
    gradients: Gradients, state: SkipNonfiniteState, max_consecutive: Number
) -> tuple[tuple[Tensor, Tensor, Tensor], bool | Tensor]:
    """Return the tensors of the new state, and whether the inner update is made."""
    finite = all_finite_everywhere(gradients, state.last_finite)
    counts, should_update = _count(finite, state, max_consecutive)
    return counts, decide(should_update)


def _count(
    finite: Tensor, state: SkipNonfiniteState, max_consecutive: Number
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return the tensors of the new state, and whether the inner update is made: of each member."""
    consecutive = (state.consecutive.detach() + 1).masked_fill(finite, 0)
    enough = consecutive > detached(max_consecutive)
    counts = consecutive, state.total.detach() + ~finite, finite
    return counts, finite | enough
