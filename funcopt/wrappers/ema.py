"""An exponential moving average of the parameters, kept beside them in the state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core import pytree
from .._core.inner import InnerStateT, InnerT_co, OptimizerLike
from .._core.tensors import compute_dtype, write
from .._core.types import (
    BELOW_ONE,
    ELEMENTWISE,
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
from .._engine.counts import device_for_count, first_count, fresh
from .._engine.hyperparameters import check_flag, normalize_fields, numbers_of
from .._engine.registration import register_optimizer, state_class
from .._engine.stacked import Finish, Stack
from .._engine.stacked_wrappers import plan_stacked, plans_members
from ._shadow_params import ShadowParams, copy_params
from ._shared import check_scalar, gather_gradients, known_value, records
from ._stacks import gather_stack, lerp_rows, numbers_of_members, renewed


@state_class
class EmaState(NamedTuple, Generic[InnerStateT]):
    """The state of `Ema`, in which `average` has the shape of the parameters.

    Attributes:
        n_averaged: How many updates were made: a float64 tensor of shape (), on the GPU if all
            parameters are on one, else on the CPU.
        weight: The share of the average that parameters have, those in it: 1 without debiasing,
            else `1 - decay**count`, from 0 at first. Likewise a tensor.
        average: The average, at any time as it is to be used: in float32 for 16-bit parameters,
            else in the parameter's dtype. At first it is the parameters themselves, and of a leaf
            at rest (as under `Frozen`) it always is that leaf.
        inner: The state of the inner optimizer.
    """

    n_averaged: Tensor
    weight: Tensor
    average: Tree
    inner: InnerStateT


@register_optimizer
@dataclass(frozen=True)
class Ema(Generic[InnerT_co]):
    r"""Average the parameters after each inner update, exponentially, in the state.

    With decay $d$ and the parameters $\theta_t$ after update $t$,

    $$ w_t = d\,w_{t-1} + (1 - d), \qquad
       a_t = a_{t-1} + \frac{1 - d}{w_t} (\theta_t - a_{t-1}). $$

    With `debias`, $w_0 = 0$, so that $w_t = 1 - d^t$ and

    $$ a_t = \frac{1 - d}{1 - d^t} \sum_{i=1}^{t} d^{t-i} \theta_i, $$

    which is what `optax.ema` makes of the new parameters: an average of those alone, from the
    first update on. (Optax keeps $w_t a_t$ and divides when it is read. Here $a_t$ itself is kept,
    which takes the same pass over memory, and can be used as it is.) Without, $w_0 = 1$ and
    $a_0 = \theta_0$, so that

    $$ a_t = d\,a_{t-1} + (1 - d)\,\theta_t, $$

    to the bit what `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(decay)` makes
    of float32 and float64 parameters, if its `update_parameters` is called before the first step
    (that call copies the parameters) and after each.

    The average of 16-bit parameters is kept in float32: in 16 bits, a step of a thousandth would
    be rounded away. `averaged` gives it in the parameters' own dtypes.

    The order of wrappers matters. `Accumulate(Ema(Adam()), 8)` averages when the parameters move,
    every eighth call; `Ema(Accumulate(Adam(), 8))` counts the same parameters eight times over.
    Likewise a step that `Clip(Ema(Adam()), 1.0, nonfinite="skip")` skips is not averaged.

    Args:
        inner: The optimizer that moves the parameters.
        decay: The share that stays: at least 0 and below 1; a number, a 0-dim tensor, or a
            schedule, which is called with the count of updates made so far (0 at the first) and
            returns one of the others.
        debias: Whether the average is of the new parameters alone, or also of those at `init`.

    Raises:
        TypeError: If `inner` is no optimizer, or a hyperparameter is of the wrong type.
        ValueError: If `decay` is out of range or NaN.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.Ema(funcopt.SGD(lr=0.1), decay=0.5)
        >>> params = {"w": torch.ones(2)}
        >>> state = opt.init(params)
        >>> for _ in range(2):
        ...     params, state = opt.update({"w": torch.ones(2)}, state, params)
        >>> params, state.average  # (0.5 * 0.9 + 0.8) / 1.5
        ({'w': tensor([0.8000, 0.8000])}, {'w': tensor([0.8333, 0.8333])})
    """

    traits: ClassVar[Traits] = ELEMENTWISE

    hyperparams: ClassVar[tuple[Hyperparam, ...]] = (Hyperparam("decay", BELOW_ONE),)

    inner: InnerT_co
    decay: Number | Schedule = 0.999
    debias: bool = True

    def __post_init__(self) -> None:
        """Check and normalize every hyperparameter."""
        check_is_optimizer("inner", self.inner)
        normalize_fields(self, self.hyperparams)
        check_flag("debias", self.debias)

    def init(self: Ema[OptimizerLike[StateT]], params: Tree) -> EmaState[StateT]:
        """Return the state before the first update: the parameters for an average."""
        average, leaves = copy_params(self, params, compute_dtype)
        count = first_count(device_for_count(leaves))
        weight = torch.zeros_like(count) if self.debias else torch.ones_like(count)
        return EmaState(count, weight, average, self.inner.init(params))

    def update(
        self: Ema[OptimizerLike[StateT]],
        grads: Tree,
        state: EmaState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, EmaState[StateT]]:
        """Return the new parameters and the new state, which says whether it is debiased."""
        average, numbers = self._gather(grads, state, params)
        recorded = records(self, average.gradients, state, numbers)
        new_params, inner = self.inner.update(grads, state.inner, params)
        with torch.set_grad_enabled(recorded):
            weight, share = _advance(state.weight, **numbers)
            moved = average.lerp(pytree.flatten(new_params)[0], share)
        count, weight = state.n_averaged.detach() + 1, fresh(weight, state.weight)
        return new_params, EmaState(count, weight, average.paired.rebuild(moved), inner)

    def update_(
        self: Ema[OptimizerLike[StateT]],
        grads: Tree,
        state: EmaState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, EmaState[StateT]]:
        """Do the same as `update` in place."""
        average, numbers = self._gather(grads, state, params)
        own = {"state.weight": state.weight, "state.n_averaged": state.n_averaged}
        average.check_wrapper_inplace(numbers, own)
        with torch.no_grad():
            weight, share = _advance(state.weight, **numbers)
            self.inner.update_(grads, state.inner, params)
            average.lerp_(average.gradients.params, share)
            write(state.weight, fresh(weight, state.weight))
            write(state.n_averaged, state.n_averaged + 1)
        return params, state

    def _plan_members(self, stack: Stack) -> Finish | None:
        """Return what updates stacked members, each with a count and a weight of its own."""
        state: EmaState = stack.state
        check_state(state, EmaState)
        own = {"n_averaged": (state.n_averaged, None), "weight": (state.weight, None)}
        numbers, gradients = numbers_of_members(self, stack, **own), gather_stack(self, stack)
        if numbers is None or gradients is None:
            return None
        average = ShadowParams.gather(gradients, "state.average", state.average, compute_dtype)
        finish = plan_stacked(self.inner, stack._replace(state=state.inner))
        if finish is None:
            return None
        weight, share = _advance(state.weight, **numbers)
        count = state.n_averaged + 1

        def update() -> tuple[Tree, EmaState]:
            new_params, inner = finish()
            news = pytree.flatten(new_params)[0]
            moved = lerp_rows(stack, average.leaves, news, share)
            pairs = (state.n_averaged, count), (state.weight, fresh(weight, state.weight))
            n_averaged, own_weight = renewed(stack, *pairs)
            return new_params, EmaState(
                n_averaged, own_weight, average.paired.rebuild(moved), inner
            )

        return update

    def _gather(
        self, grads: Tree, state: EmaState, params: Tree
    ) -> tuple[ShadowParams, dict[str, Number]]:
        check_state(state, EmaState)
        check_scalar("state.n_averaged", state.n_averaged)
        check_scalar("state.weight", state.weight)
        gradients = gather_gradients(self, grads, params)
        average = ShadowParams.gather(gradients, "state.average", state.average, compute_dtype)
        return average, numbers_of(self, state.n_averaged)


plans_members(Ema, Ema._plan_members)


def _advance(weight: Tensor, decay: Number) -> tuple[Number, Number]:
    """Return the weight after an update, and the share that the newest parameters have of it."""
    before, kept = known_value(weight), known_value(decay)
    if before is None or kept is None:
        return _advanced(weight, decay.to(weight) if isinstance(decay, Tensor) else decay)
    return _advanced(before, kept)


def _advanced(weight: Number, decay: Number) -> tuple[Number, Number]:
    new = 1 - decay
    after = weight + new * (1 - weight)  # in this form, a weight of 1 stays exactly 1
    return after, new / after
