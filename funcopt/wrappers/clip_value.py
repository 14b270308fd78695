"""Clipping by value: elements of gradients held between two values before the inner update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core import transforms
from .._core.inner import InnerStateT, InnerT_co, OptimizerLike
from .._core.tensors import fit, is_mapped, view_as_complex_like, view_as_real
from .._core.types import (
    AT_LEAST_ZERO,
    Extras,
    Hyperparam,
    Number,
    ParamsT,
    Schedule,
    StateT,
    Traits,
    Tree,
    check_is_optimizer,
)
from .._engine.checks import check_state
from .._engine.counts import next_count
from .._engine.hyperparameters import normalize_fields, numbers_of
from .._engine.registration import register_optimizer, state_class
from .._engine.stacked import Finish, Stack
from .._engine.stacked_wrappers import plan_stacked, plans_members
from ._shared import (
    Gradients,
    check_wrapper_inplace,
    device_of_tensors,
    first_count_if_scheduled,
    gather_gradients,
    own_tensors,
    write_fields_and_count,
)
from ._stacks import gather_stack, make_rows, numbers_of_members


@state_class
class ClipValueState(NamedTuple, Generic[InnerStateT]):
    """The state of `ClipValue`.

    Attributes:
        inner: The state of the inner optimizer.
        step: How many updates were made, if `max_value` is a schedule: a float64 tensor of shape
            (), on the GPU if all parameters are on one, else on the CPU; else `()`.
    """

    inner: InnerStateT
    step: Tree = ()


@register_optimizer
@dataclass(frozen=True)
class ClipValue(Generic[InnerT_co]):
    r"""Hold each element of the gradients between `-max_value` and `max_value`, then update.

    $$ g' = \min(\max(g, -c), c) $$

    The numbers are those of `torch.nn.utils.clip_grad_value_` and of `optax.clip`. A NaN stays one.
    A complex leaf, which torch refuses, is a pair of real ones.

    Args:
        inner: The optimizer that is given the clipped gradients.
        max_value: The largest value: at least 0; a number, a 0-dim tensor, or a schedule, which is
            called with the count of updates made so far and returns one of the others.

    Raises:
        TypeError: If `inner` is no optimizer, or `max_value` is of the wrong type.
        ValueError: If `max_value` is negative, NaN or infinite.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.ClipValue(funcopt.SGD(lr=0.1), max_value=0.5)
        >>> params = torch.ones(2)
        >>> params, state = opt.update(torch.tensor([3.0, -0.1]), opt.init(params), params)
        >>> params
        tensor([0.9500, 1.0100])
    """

    traits: ClassVar[Traits] = Traits(elementwise=True)

    hyperparams: ClassVar[tuple[Hyperparam, ...]] = (Hyperparam("max_value", AT_LEAST_ZERO),)

    inner: InnerT_co
    max_value: Number | Schedule

    def __post_init__(self) -> None:
        """Check and normalize the hyperparameter."""
        check_is_optimizer("inner", self.inner)
        normalize_fields(self, self.hyperparams)

    def init(self: ClipValue[OptimizerLike[StateT]], params: Tree) -> ClipValueState[StateT]:
        """Return the state before the first update: the inner state."""
        inner = self.inner.init(params)
        return ClipValueState(inner, first_count_if_scheduled(self, device_of_tensors(params)))

    def update(
        self: ClipValue[OptimizerLike[StateT]],
        grads: Tree,
        state: ClipValueState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, ClipValueState[StateT]]:
        """Return the new parameters and the new state, in fresh memory."""
        gradients, numbers = self._gather(grads, state, params)
        clipped = _clip(gradients, **numbers)
        new_params, inner = self.inner.update(clipped, state.inner, params)
        return new_params, ClipValueState(inner, next_count(state.step))

    def update_(
        self: ClipValue[OptimizerLike[StateT]],
        grads: Tree,
        state: ClipValueState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, ClipValueState[StateT]]:
        """Do the same in place, but for the clipped gradients, which are copies."""
        gradients, numbers = self._gather(grads, state, params)
        check_wrapper_inplace(numbers, own_tensors(state), gradients)
        self.inner.update_(_clip(gradients, **numbers), state.inner, params)
        write_fields_and_count(state)
        return params, state

    def _plan_members(self, stack: Stack) -> Finish | None:
        """Return what updates stacked members, which may have values of their own."""
        state: ClipValueState = stack.state
        check_state(state, ClipValueState)
        stack = stack.multiplied()
        numbers, gradients = numbers_of_members(self, stack), gather_stack(self, stack)
        if numbers is None or gradients is None:
            return None
        clipped = make_rows(
            stack.active, _clamped, gradients.tensors, numbers=list(numbers.values())
        )
        given = gradients.replace(clipped).tree
        finish = plan_stacked(self.inner, stack._replace(state=state.inner, grads=given))
        if finish is None:
            return None

        def update() -> tuple[Tree, ClipValueState]:
            new_params, inner = finish()
            return new_params, ClipValueState(inner)

        return update

    def _gather(
        self, grads: Tree, state: ClipValueState, params: Tree
    ) -> tuple[Gradients, dict[str, Number]]:
        check_state(state, ClipValueState)
        numbers = numbers_of(self, state.step)
        return gather_gradients(self, grads, params), numbers


plans_members(ClipValue, ClipValue._plan_members)


def _clip(gradients: Gradients, max_value: Number) -> Tree:
    return gradients.replace([_clamped(grad, max_value) for grad in gradients.tensors]).tree


def _clamped(grad: Tensor, most: Number) -> Tensor:
    pair = view_as_real(grad)
    if isinstance(most, Tensor):
        most = fit(most, pair)
        return view_as_complex_like(torch.minimum(torch.maximum(pair, -most), most), grad)
    if most > torch.finfo(grad.dtype).max:  # infinite in this dtype, in which torch refuses it
        return grad
    if _is_within(pair, most):
        return grad
    clipped = pair.clamp(-most, most)
    if transforms.has_derivative(pair) or transforms.watched([pair]):
        # A value at its bound has the derivative of one within. That of clamp is 0 from 2.15 on.
        clipped = torch.where(pair.abs() <= most, pair, clipped)
    return view_as_complex_like(clipped, grad)


def _is_within(grad: Tensor, most: float) -> bool:
    """Whether a gradient is known to have no element to clip, so that it need not be copied.

    It is looked through only where a copy would be in memory fresh from the system, of which it
    takes a fraction of the time. In other memory a copy takes as long.
    """
    if not transforms.readable() or not transforms.all_plain([grad]):
        return False
    if grad.requires_grad or not is_mapped(grad):
        return False
    low, high = grad.aminmax()
    return bool(-most <= low) and bool(high <= most)
