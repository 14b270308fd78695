"""RMSprop: its state, its equations, its rule, and the optimizer as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core.tensors import double
from .._core.types import (
    AT_LEAST_ZERO,
    ELEMENTWISE_BY_RULE,
    FRACTION,
    Extras,
    Hyperparam,
    Number,
    NumberTree,
    ParamsT,
    Schedule,
    Tree,
)
from .._engine import kernels
from .._engine.dispatch import safe_sqrt
from .._engine.prepare import init
from .._engine.registration import check_fields, register_optimizer, state_class
from .._engine.rule import Slot, StepInputs, UpdateRule
from .._engine.update import update, update_
from ._terms import (
    add_decay,
    add_product,
    add_quotient,
    add_scaled,
    foreach_add_quotients_,
    foreach_add_scaled_,
    foreach_decayed_grads,
)


@state_class
class RMSpropState(NamedTuple):
    """The state of `RMSprop`: tensors only, in trees of the shape of the parameters.

    Attributes:
        step: How many updates were made, as in `AdamWState`.
        square_avg: The running mean of the squares of the gradients.
        momentum_buffer: The running sum of the steps; `()` if momentum is the number 0.
        grad_avg: The running mean of the gradients; `()` unless centered.
        key: A key of random bits, as in `AdamWState`.
    """

    step: Tree
    square_avg: Tree
    momentum_buffer: Tree
    grad_avg: Tree
    key: Tree = ()


class Coefficients(NamedTuple):
    """What the numbers of a step come to."""

    alpha: Number
    gain: Number  # 1 - alpha
    eps: Number
    weight_decay: Number
    momentum: Number
    descent: Number  # minus the learning rate


def coefficients(numbers: Any, _options: Any) -> Coefficients:
    """Return what the numbers of a step come to, in float64."""
    _, lr, alpha, eps, weight_decay, momentum, *_ = numbers
    return Coefficients(alpha, 1 - alpha, eps, weight_decay, momentum, -lr)


def _equations(
    param: Tensor, grad: Tensor, slots: tuple[Tensor, ...], own: Coefficients, options: Any
) -> list[Tensor]:
    """One step of one leaf, in the order of operations of torch.optim's single-tensor RMSprop."""
    grad = add_decay(-grad if options.maximize else grad, param, own.weight_decay)
    square_avg, *others = slots
    square_avg = add_product(square_avg * own.alpha, grad, grad, own.gain)
    variance, means = square_avg, []
    if options.centered:
        means = [torch.lerp(others.pop(), grad, own.gain)]
        # Where the gradients hardly differ, rounding may make it negative; torch then gives NaN.
        variance = torch.addcmul(square_avg, means[0], means[0], value=-1).clamp(min=0)
    denominator = safe_sqrt(variance) + own.eps
    buffers = [add_quotient(buffer * own.momentum, grad, denominator, 1) for buffer in others]
    if buffers:
        param = add_scaled(param, buffers[0], own.descent)
    else:
        param = add_quotient(param, grad, denominator, own.descent)
    return [param, square_avg, *buffers, *means]


def _foreach_(inputs: StepInputs, numbers: Any, options: Any) -> None:
    params, grads, (square_avgs, *others), _ = inputs
    own = coefficients(numbers._make(map(double, numbers)), options)
    grads = foreach_decayed_grads(grads, params, numbers.weight_decay, maximize=options.maximize)
    torch._foreach_mul_(square_avgs, own.alpha)
    torch._foreach_addcmul_(square_avgs, grads, grads, own.gain)
    if options.centered:
        means = others.pop()
        torch._foreach_lerp_(means, grads, 1 - numbers.alpha)
        denominators = list(torch._foreach_addcmul(square_avgs, means, means, -1))
        torch._foreach_clamp_min_(denominators, 0)
        torch._foreach_sqrt_(denominators)
    else:
        denominators = list(torch._foreach_sqrt(square_avgs))
    torch._foreach_add_(denominators, own.eps)
    for buffers in others:
        torch._foreach_mul_(buffers, own.momentum)
        torch._foreach_addcdiv_(buffers, grads, denominators)
        foreach_add_scaled_(params, buffers, own.descent)
    if not others:
        foreach_add_quotients_(params, grads, denominators, own.descent)


_HYPERPARAMS = (
    Hyperparam("lr", AT_LEAST_ZERO),
    Hyperparam("alpha", FRACTION),
    Hyperparam("eps", AT_LEAST_ZERO),
    Hyperparam("weight_decay", AT_LEAST_ZERO),
    Hyperparam("momentum", AT_LEAST_ZERO),
)
_NEEDED = (
    "add",
    "add_",
    "addcdiv_",
    "addcmul",
    "addcmul_",
    "clamp_min_",
    "lerp_",
    "mul",
    "mul_",
    "neg",
    "sqrt",
    "sqrt_",
)

_RULE = UpdateRule(
    state=RMSpropState,
    slots=(
        Slot("square_avg"),
        Slot("momentum_buffer", option="momentum"),
        Slot("grad_avg", option="centered"),
    ),
    hyperparams=_HYPERPARAMS,
    options=("centered", "maximize"),
    coefficients=coefficients,
    equations=_equations,
    kernels={"foreach": kernels.foreach(_foreach_, _NEEDED)},
    traits=ELEMENTWISE_BY_RULE,
)


@register_optimizer
@dataclass(frozen=True)
class RMSprop:
    r"""RMSprop: gradients divided by the root of the running mean of their squares.

    With gradient $g_t$, learning rate $\eta$, weight decay $\lambda$ and momentum $\mu$,

    $$ d_t = g_t + \lambda\,\theta_{t-1}, \qquad
       v_t = \alpha\,v_{t-1} + (1 - \alpha)\,d_t^2, $$

    $$ b_t = \mu\,b_{t-1} + \frac{d_t}{\sqrt{v_t} + \epsilon}, \qquad
       \theta_t = \theta_{t-1} - \eta\,b_t. $$

    If centered, $v_t - m_t^2$ stands in place of $v_t$ in the root, where
    $m_t = \alpha\,m_{t-1} + (1 - \alpha)\,d_t$ is the running mean of the gradients. An `RMSprop`
    is a frozen value and a pytree whose leaves are those hyperparameters that are tensors: map over
    it with vmap to sweep them, differentiate with respect to it to learn them.

    It is from Hinton's lecture 6e of *Neural Networks for Machine Learning* (2012), centered as in
    Graves, *Generating Sequences With Recurrent Neural Networks* (2013), with the equations of
    `torch.optim.RMSprop`. On the CPU, in float32 and float64, the same kernel gives torch's bits.
    If centered, rounding may make $v_t - m_t^2$ negative where the gradients hardly change: torch
    then gives NaN, and here it is taken for 0. 16-bit leaves are computed in float32 by every
    kernel. A complex leaf is a pair of real ones.

    Args:
        lr: Learning rate: at least 0; a number, a 0-dim tensor, or a schedule, as for `AdamW`.
        alpha: Decay rate of the running means: at least 0 and at most 1; likewise.
        eps: Added to the denominator: at least 0; likewise. At 0, a zero gradient at the first step
            gives 0 / 0.
        weight_decay: At least 0, times the parameter added to the gradient; likewise.
        momentum: At least 0; likewise. At the number 0 there is no buffer. A tensor or a schedule
            has a buffer, also where its value is 0.
        centered: Divide by the root of the variance, not of the mean square.
        maximize: Ascend instead of descending.
        step_per_leaf: Count the updates of each leaf; a schedule then sees each leaf's own count.
            Off: one count for the tree, advanced by every update.
        kernel: `"auto"` takes the fastest that is right for the tensors; `"foreach"` and `"plain"`
            name one. Tracers and forward mode always see plain operators.
        differentiable: Whether plain autograd records an update, as for `AdamW`.
        moments: The dtype of the running means and the buffer, as for `AdamW`.
        rounding: How what is kept in 16 bits is rounded, as for `AdamW`.
        seed: The key of a new state where `rounding` is `"stochastic"`, as for `AdamW`.

    Raises:
        TypeError: If a hyperparameter is of the wrong type.
        ValueError: If one is out of range, NaN or infinite.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.RMSprop(lr=0.1, alpha=0.75)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = opt.init(params)
        >>> params, state = opt.update({"w": torch.tensor([0.5, -0.5])}, state, params)
        >>> params
        {'w': tensor([0.8000, 2.2000])}
    """

    rule: ClassVar[UpdateRule] = _RULE

    lr: Number | Schedule | NumberTree = 1e-2
    alpha: Number | Schedule | NumberTree = 0.99
    eps: Number | Schedule | NumberTree = 1e-8
    weight_decay: Number | Schedule | NumberTree = 0.0
    momentum: Number | Schedule | NumberTree = 0.0
    centered: bool = False
    maximize: bool = False
    step_per_leaf: bool = False
    kernel: str = "auto"
    differentiable: bool | None = None
    moments: torch.dtype | str | None = "auto"
    rounding: str = "nearest"
    seed: Number = 0

    def __post_init__(self) -> None:
        """Check and normalize every hyperparameter."""
        check_fields(self)

    def init(self, params: Tree) -> RMSpropState:
        """Return the state before the first update: zeros."""
        state: RMSpropState = init(self, params)
        return state

    def update(
        self, grads: Tree, state: RMSpropState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, RMSpropState]:
        """Return the new parameters and the new state, in fresh memory."""
        return update(self, grads, state, params)

    def update_(
        self, grads: Tree, state: RMSpropState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, RMSpropState]:
        """Do the same as `update`, written into `params` and `state`, which are returned."""
        return update_(self, grads, state, params)
