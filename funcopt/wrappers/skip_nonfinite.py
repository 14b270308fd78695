"""Bad steps left out: no update where a gradient is infinite or NaN."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._core import transforms
from .._core.tensors import write
from .._core.types import Number, Optimizer, Schedule, Traits, Tree, is_dense
from .._engine.checks import check_count, check_optimizer, check_state, kind_of
from .._engine.hyperparameters import has_schedule, normalize_fields, numbers_of
from .._engine.prepare import first_count, next_step
from .._engine.registration import register_optimizer
from .._engine.rule import Hyperparam, Range
from .base import (
    Gradients,
    check_inplace,
    check_overflow_is_seen,
    gather_gradients,
    gather_params,
    records,
    with_step,
    write_step,
)
from .finite import all_finite_everywhere, decide, place_for, zeros_unless
from .update_if import update_if, update_if_

__all__ = ["SkipNonfinite", "SkipNonfiniteState"]

ParamsT = TypeVar("ParamsT")


class SkipNonfiniteState(NamedTuple):
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
    inner: Any
    step: Tree = ()


_MOST = Range(
    "must be a whole number of at least 0, or infinite (never let one through)",
    lambda value: value == math.inf or (0.0 <= value < math.inf and value == int(value)),
    whole=True,
)


@register_optimizer
@dataclass(frozen=True)
class SkipNonfinite:
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

    The order of wrappers matters. `SkipNonfinite(Accumulate(AdamW(), 8))` leaves one bad gradient
    out of the sum, `Accumulate(SkipNonfinite(AdamW()), 8)` all eight. `Clip` makes all gradients
    NaN or 0 where its norm is not finite: `SkipNonfinite(Clip(AdamW(), 1.0))` sees them before.
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
        >>> opt = funcopt.SkipNonfinite(funcopt.AdamW(lr=0.1))
        >>> params = {"w": torch.ones(2)}
        >>> state = opt.init(params)
        >>> params, state = opt.update({"w": torch.tensor([1.0, torch.nan])}, state, params)
        >>> params, state.total, state.inner.step
        ({'w': tensor([1., 1.])}, tensor(1), tensor(0., dtype=torch.float64))
    """

    traits: ClassVar[Traits] = Traits(shardable=True, packable=True, complex_as_pairs=True)
    hyperparams: ClassVar[tuple[Hyperparam, ...]] = (Hyperparam("max_consecutive", _MOST),)

    inner: Optimizer[Any]
    max_consecutive: Number | Schedule = math.inf

    def __post_init__(self) -> None:
        """Check and normalize the number of calls."""
        check_optimizer("inner", self.inner)
        normalize_fields(self, self.hyperparams)
        if isinstance(self.max_consecutive, float):  # which is infinite
            check_overflow_is_seen("SkipNonfinite", self.inner)

    def init(self, params: Tree) -> SkipNonfiniteState:
        """Return the state before the first update: counts of 0 and the inner state.

        Args:
            params: The parameters, as for the inner optimizer.

        Raises:
            TypeError: If a leaf is not a dense floating-point or complex tensor.
            ValueError: If two leaves share their memory.

        Example:
            >>> import torch, funcopt
            >>> state = funcopt.SkipNonfinite(funcopt.AdamW()).init(torch.ones(2))
            >>> state.consecutive, state.total, state.last_finite
            (tensor(0), tensor(0), tensor(True))
        """
        place = place_for(gather_params(self, params).moving)
        return SkipNonfiniteState(
            torch.zeros((), dtype=torch.int64, device=place),
            torch.zeros((), dtype=torch.int64, device=place),
            torch.ones((), dtype=torch.bool, device=place),
            self.inner.init(params),
            first_count(place) if has_schedule(self) else (),
        )

    def update(
        self, grads: Tree, state: SkipNonfiniteState, params: ParamsT
    ) -> tuple[ParamsT, SkipNonfiniteState]:
        """Return the new parameters and the new state, in fresh memory.

        Args:
            grads: The gradients: a tree with the keys of `params`, each like its parameter in
                shape, dtype and device, or None.
            state: The state that `init` or the last update returned.
            params: The parameters.

        Returns:
            The pair `(new_params, new_state)`. A skipped step has the derivative of doing nothing.

        Raises:
            TypeError: As the inner optimizer, or if the state is of another type.
            ValueError: As the inner optimizer, or if `max_consecutive` is no single number, or out
                of range since it was given.

        Example:
            >>> import torch, funcopt
            >>> opt = funcopt.SkipNonfinite(funcopt.AdamW(lr=0.1), max_consecutive=1)
            >>> params, nan = torch.ones(1), torch.tensor([torch.nan])
            >>> state = opt.init(params)
            >>> params, state = opt.update(nan, state, params)
            >>> params
            tensor([1.])
            >>> params, state = opt.update(nan, state, params)  # the second in a row
            >>> params
            tensor([nan])
        """
        gradients, numbers = self._gather(grads, state, params)
        counts, moves = _judge(gradients, state, **numbers)
        recorded = moves is not True and records(self, gradients, state, numbers)
        given = gradients.tree
        if recorded or transforms.transformed():
            given = gradients.replace(zeros_unless(moves, gradients.tensors)).tree
        new_params, inner = update_if(moves, self.inner, given, state.inner, params, recorded)
        return new_params, SkipNonfiniteState(*counts, inner, next_step(state.step, moves))

    def update_(
        self, grads: Tree, state: SkipNonfiniteState, params: ParamsT
    ) -> tuple[ParamsT, SkipNonfiniteState]:
        """Do the same as `update`, written into `params` and `state`, which are returned.

        Args:
            grads: The gradients, as for `update`.
            state: The state, which is overwritten.
            params: The parameters, which are overwritten.

        Returns:
            The pair `(params, state)`: the trees that were given.

        Raises:
            RuntimeError: Under a transform of `torch.func`, or if anything has a history.
            TypeError: As `update`.
            ValueError: As `update`, and as the inner optimizer's `update_`.

        Example:
            >>> import torch, funcopt
            >>> opt = funcopt.SkipNonfinite(funcopt.AdamW(lr=0.1))
            >>> w = torch.ones(1)
            >>> state = opt.init(w)
            >>> for grad in (torch.ones(1), torch.tensor([torch.inf])):
            ...     _ = opt.update_(grad, state, w)
            >>> w, state.consecutive
            (tensor([0.8990]), tensor(1))
        """
        gradients, numbers = self._gather(grads, state, params)
        own = {f"state.{name}": getattr(state, name) for name in state._fields[:3]}
        check_inplace(numbers, with_step(own, state), gradients)
        counts, moves = _judge(gradients, state, **numbers)
        update_if_(moves, self.inner, gradients.tree, state.inner, params)
        for old, new in zip(own.values(), counts, strict=True):
            write(old, new)
        write_step(state, moves)
        return params, state

    def _gather(
        self, grads: Tree, state: SkipNonfiniteState, params: Tree
    ) -> tuple[Gradients, dict[str, Number]]:
        check_state(state, SkipNonfiniteState)
        check_count(state.consecutive, lambda: "state.consecutive")
        check_count(state.total, lambda: "state.total")
        _check_last_finite(state.last_finite)
        numbers = numbers_of(self, state.step)
        return gather_gradients(self, grads, params), numbers


def _judge(
    gradients: Gradients, state: SkipNonfiniteState, max_consecutive: Number
) -> tuple[tuple[Tensor, Tensor, Tensor], bool | Tensor]:
    """Return the tensors of the new state, and whether the inner update is made."""
    finite = all_finite_everywhere(gradients, state.last_finite)
    consecutive = (state.consecutive.detach() + 1).masked_fill(finite, 0)
    most = max_consecutive
    enough = consecutive > (most.detach() if isinstance(most, Tensor) else most)
    counts = consecutive, state.total.detach() + ~finite, finite
    return counts, decide(finite | enough)


def _check_last_finite(value: object) -> None:
    if (
        not isinstance(value, Tensor)
        or not is_dense(value)
        or value.dtype is not torch.bool
        or value.ndim != 0
    ):
        raise ValueError(
            f"state.last_finite is {kind_of(value)}: it must be a bool tensor of shape (), as "
            f"init() makes it. A state that vmap(init) made belongs to vmap(update)."
        )
