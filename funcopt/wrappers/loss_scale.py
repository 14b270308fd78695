"""Loss scaling: gradients of a loss times a number, which is adapted from step to step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core import transforms
from .._core.inner import InnerStateT, InnerT_co, OptimizerLike
from .._core.types import (
    COUNT,
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
from .._engine.hyperparameters import (
    check_count,
    detached,
    normalize,
    normalize_fields,
    number_at,
    numbers_of,
)
from .._engine.registration import register_optimizer, state_class
from .._engine.stacked import Finish, Stack
from .._engine.stacked_wrappers import plan_stacked, plans_members
from .._engine.update_if import update_if, update_if_
from ._finite import (
    all_finite_everywhere,
    decide,
    device_for_state,
    finite_members,
    zeros_unless,
)
from ._shared import (
    Gradients,
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
class LossScaleState(NamedTuple, Generic[InnerStateT]):
    """The state of `LossScale`. Its own tensors are where the parameters are.

    Attributes:
        scale: What the next loss is to be multiplied by: a float32 tensor of shape ().
        growth_tracker: How many updates were made since the scale last changed, or was about to: an
            int64 tensor of shape ().
        inner: The state of the inner optimizer.
        step: How many updates were made, skipped ones not among them, if a hyperparameter is a
            schedule: a float64 tensor of shape (); else `()`.
    """

    scale: Tensor
    growth_tracker: Tensor
    inner: InnerStateT
    step: Tree = ()


_INIT_SCALE = Hyperparam(
    "init_scale",
    Range(
        "must be at least 2**-126 and at most 2**127, as float32 holds it",
        lambda value: 2.0**-126 <= value <= 2.0**127,
    ),
)


@register_optimizer
@dataclass(frozen=True)
class LossScale(Generic[InnerT_co]):
    r"""Update with the gradients of a scaled loss, and find the scale for the next one.

    In float16, small gradients vanish, unless the loss is multiplied by a large number. That is
    `state.scale`, with which the gradients come in:

        grads = torch.func.grad(lambda params: loss(params) * state.scale)(params)
        params, state = opt.update(grads, state, params)

    With the scale $s_t$, gradients $g_t$, and $n_t$ updates since the scale last changed,

    $$ \theta_t = \mathrm{inner}(g_t / s_t,\ \theta_{t-1}), \qquad
       s_{t+1} = \begin{cases}
           s_t \cdot \mathrm{growth\_factor} & \text{if } n_t = \mathrm{growth\_interval} \\
           s_t & \text{otherwise,}
       \end{cases} $$

    unless an element of a gradient is infinite or NaN. Then neither parameters nor inner state
    move, and $s_{t+1} = s_t \cdot \mathrm{backoff\_factor}$.

    The numbers are those of `torch.amp.GradScaler`: a scale that would overflow does not grow. But
    one that falls, as it does if nothing is ever finite, stops at the smallest normal number, where
    torch's goes on to 0 and lets NaN through. What gradients are multiplied by is the reciprocal in
    float32, as in torch, also where they are in float64: let the scale and its factors be powers of
    two, and nothing is lost. The gradients that were given are left as they are.

    Keep the parameters in float32, and compute the loss in float16 (by autocast, or a cast within
    it): gradients have the dtype of their parameter. GradScaler refuses those in float16. Here they
    are divided in float32, but rounded to 16 bits again, in which what is too small is lost.

    Nothing is ever read back from a GPU: there, under vmap, and where operators are recorded
    (compile, export), each call makes an inner update, and what holds is chosen element by element.
    No derivative flows through the scale.

    The order of wrappers matters. What is inside of a `LossScale` sees gradients of the true size:
    `LossScale(Clip(Adam(), 1.0))` clips these. `LossScale(Accumulate(Adam(), 8))` leaves a bad
    gradient out of the sum of eight, and may rescale in between; `Accumulate(LossScale(Adam()),
    8)` keeps one scale, `state.inner.scale`, for all eight, and skips them together.

    Args:
        inner: The optimizer that is given the unscaled gradients.
        init_scale: The first scale: from 2**-126 to 2**127; a number or 0-dim tensor.
        growth_factor: What the scale is multiplied by to grow: above 1; a number, a 0-dim tensor,
            or a schedule, which is called with the count of updates made so far (skipped ones not
            among them) and returns one of the others.
        backoff_factor: What it is multiplied by after gradients that were not finite: above 0 and
            below 1; likewise.
        growth_interval: How many updates in a row make it grow: a whole number of at least 1;
            likewise, a tensor being of a floating-point dtype.

    Raises:
        TypeError: If `inner` is no optimizer, or a hyperparameter is of the wrong type.
        ValueError: If one is out of range, NaN or infinite.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.LossScale(funcopt.SGD(lr=0.1), init_scale=2.0**10)
        >>> params = {"w": torch.ones(2)}
        >>> state = opt.init(params)
        >>> def loss(params):
        ...     return params["w"].half().square().sum()
        >>> grads = torch.func.grad(lambda params: loss(params) * state.scale)(params)
        >>> grads
        {'w': tensor([2048., 2048.])}
        >>> params, state = opt.update(grads, state, params)
        >>> params  # moved by the true gradient, which is 2
        {'w': tensor([0.8000, 0.8000])}
    """

    traits: ClassVar[Traits] = Traits(
        shardable=True, packable=True, complex_as_pairs=True, sees_overflow=True
    )
    hyperparams: ClassVar[tuple[Hyperparam, ...]] = (
        _INIT_SCALE,
        Hyperparam(
            "growth_factor", Range("must be finite and above 1", lambda v: 1.0 < v < math.inf)
        ),
        Hyperparam("backoff_factor", Range("must be above 0 and below 1", lambda v: 0.0 < v < 1.0)),
        Hyperparam("growth_interval", COUNT),
    )

    inner: InnerT_co
    init_scale: Number = 2.0**16
    growth_factor: Number | Schedule = 2.0
    backoff_factor: Number | Schedule = 0.5
    growth_interval: Number | Schedule = 2000

    def __post_init__(self) -> None:
        """Check and normalize every hyperparameter."""
        check_is_optimizer("inner", self.inner)
        object.__setattr__(self, "init_scale", normalize(_INIT_SCALE, self.init_scale))
        normalize_fields(self, self.hyperparams)

    def init(self: LossScale[OptimizerLike[StateT]], params: Tree) -> LossScaleState[StateT]:
        """Return the state before the first update: the first scale and the inner state.

        Raises:
            ValueError: If `init_scale` is not a single number.
        """
        init_scale = number_at(_INIT_SCALE, self.init_scale, ())
        place = device_for_state(gather_params(self, params).moving)
        scale = (
            init_scale.detach().to(device=place, dtype=torch.float32, copy=True)
            if isinstance(init_scale, Tensor)
            else torch.full((), init_scale, dtype=torch.float32, device=place)
        )
        tracker = torch.zeros((), dtype=torch.int64, device=place)
        return LossScaleState(
            scale, tracker, self.inner.init(params), first_count_if_scheduled(self, place)
        )

    def update(
        self: LossScale[OptimizerLike[StateT]],
        grads: Tree,
        state: LossScaleState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, LossScaleState[StateT]]:
        """Return the new parameters and the new state, in fresh memory.

        The gradients are those of the loss times `state.scale`. A skipped step has the derivative
        of doing nothing.
        """
        gradients, numbers = self._gather(grads, state, params)
        finite = all_finite_everywhere(gradients, state.scale)
        should_update = decide(finite)
        recorded = should_update is not True and records(self, gradients, state, numbers)
        if recorded or transforms.transformed():
            gradients = gradients.replace(zeros_unless(should_update, gradients.tensors))
        given, inverse = gradients.tree, _inverse(state.scale)
        new_params, inner = update_if(
            should_update, self.inner, given, state.inner, params, recorded, inverse
        )
        scale, tracker = _rescale(state, finite, numbers)
        return new_params, LossScaleState(
            scale, tracker, inner, next_count(state.step, should_update)
        )

    def update_(
        self: LossScale[OptimizerLike[StateT]],
        grads: Tree,
        state: LossScaleState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, LossScaleState[StateT]]:
        """Do the same as `update` in place."""
        gradients, numbers = self._gather(grads, state, params)
        check_wrapper_inplace(numbers, own_tensors(state, "scale", "growth_tracker"), gradients)
        finite = all_finite_everywhere(gradients, state.scale)
        should_update = decide(finite)
        inverse = _inverse(state.scale)
        update_if_(should_update, self.inner, gradients.tree, state.inner, params, inverse)
        scale, tracker = _rescale(state, finite, numbers)
        write_fields_and_count(state, should_update, scale=scale, growth_tracker=tracker)
        return params, state

    def _plan_members(self, stack: Stack) -> Finish | None:
        """Return what updates stacked members, each with a scale of its own."""
        state: LossScaleState = stack.state
        check_state(state, LossScaleState)
        stack = stack.multiplied()
        own = {"scale": (state.scale, None), "tracker": (state.growth_tracker, torch.int64)}
        numbers, gradients = numbers_of_members(self, stack, **own), gather_stack(self, stack)
        if numbers is None or gradients is None:
            return None
        finite, inverse = finite_members(gradients.tensors, stack.active), _inverse(state.scale)
        moving = stack.where(finite)._replace(state=state.inner, grad_scale=inverse)
        finish = plan_stacked(self.inner, moving)
        if finish is None:
            return None
        scale, tracker = _rescale(state, finite, numbers)

        def update() -> tuple[Tree, LossScaleState]:
            new_params, inner = finish()
            pairs = (state.scale, scale), (state.growth_tracker, tracker)
            new_scale, new_tracker = renewed(stack, *pairs)
            return new_params, LossScaleState(new_scale, new_tracker, inner)

        return update

    def _gather(
        self, grads: Tree, state: LossScaleState, params: Tree
    ) -> tuple[Gradients, dict[str, Number]]:
        check_state(state, LossScaleState)
        check_scalar("state.scale", state.scale)
        check_count(state.growth_tracker, lambda: "state.growth_tracker")
        numbers = numbers_of(self, state.step)
        return gather_gradients(self, grads, params), numbers


plans_members(LossScale, LossScale._plan_members)


def _rescale(
    state: LossScaleState, finite: Tensor, numbers: dict[str, Number]
) -> tuple[Tensor, Tensor]:
    """Return the scale for the next loss, and the updates made since it changed."""
    scale, tracker = state.scale.detach(), state.growth_tracker.detach() + 1
    full = tracker >= detached(numbers["growth_interval"])
    grown = _product(scale, numbers["growth_factor"])
    grown = torch.where(full & grown.isfinite(), grown, scale)
    shrunk = _product(scale, numbers["backoff_factor"]).clamp(min=torch.finfo(scale.dtype).tiny)
    return torch.where(finite, grown, shrunk), tracker.masked_fill(~finite | full, 0)


def _inverse(scale: Tensor) -> Tensor:
    """Return what gradients are multiplied by: rounded once, with the bits of GradScaler's."""
    return scale.detach().reciprocal()


def _product(scale: Tensor, factor: Number) -> Tensor:
    """Return the scale times a factor that float32 need not hold: rounded once, as torch does."""
    return (scale.double() * detached(factor)).to(scale.dtype)
