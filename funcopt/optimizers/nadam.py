"""NAdam: its state, its equations, its rule, and the optimizer as a value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core.tensors import double, fit
from .._core.types import (
    AT_LEAST_ZERO,
    ELEMENTWISE_BY_RULE,
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
    add_quotient,
    foreach_add_quotients_,
    foreach_moments_,
    foreach_with_decay_,
    with_decay,
)
from .adamw import HYPERPARAMS, new_moments


@state_class
class NAdamState(NamedTuple):
    """The state of `NAdam`: tensors only, in trees of the shape of the parameters.

    Attributes:
        step: How many updates were made, as in `AdamWState`.
        exp_avg: The running mean of the gradients.
        exp_avg_sq: The running mean of their squares.
        key: A key of random bits, as in `AdamWState`.
    """

    step: Tree
    exp_avg: Tree
    exp_avg_sq: Tree
    key: Tree = ()


class Coefficients(NamedTuple):
    """What the numbers of a step come to."""

    beta2: Number
    gain1: Number  # 1 - beta1
    gain2: Number  # 1 - beta2
    decay: Number  # what decoupled weight decay leaves of the parameter
    weight_decay: Number
    correction2: Number
    eps: Number
    descent_by_grad: Number  # minus the learning rate, with the share of the gradient
    descent_by_mean: Number  # and with that of the running mean


def coefficients(numbers: Any, _options: Any) -> Coefficients:
    """Return what the numbers of a step come to, in float64."""
    step, lr, beta1, beta2, eps, weight_decay, momentum_decay, *_ = numbers
    mu = beta1 * (1.0 - 0.5 * (_BASE ** (step * momentum_decay)))
    mu_next = beta1 * (1.0 - 0.5 * (_BASE ** ((step + 1) * momentum_decay)))
    product = mu_product(step, beta1, momentum_decay)
    return Coefficients(
        beta2,
        1 - beta1,
        1 - beta2,
        1 - lr * weight_decay,
        weight_decay,
        1 - beta2**step,
        eps,
        -lr * (1.0 - mu) / (1.0 - product),
        -lr * mu_next / (1.0 - product * mu_next),
    )


_BASE = 0.96  # of the schedule of momenta, as in torch
_TERMS = 60  # each is half of the one before, or less
_NOTHING = 1e-18  # what is less changes no digit of 1


def mu_product(step: Number, beta1: Number, momentum_decay: Number) -> Number:
    """Return the product of all momenta so far, without having kept it.

    With q = 0.96 ** momentum_decay it is that of beta1 * (1 - q**i / 2) for i from 1 to the count
    of updates t. The logarithm of 1 - q**i / 2 is minus the sum over k of q**(i k) / (k 2**k), and
    the sum of q**(i k) over all i is a geometric series: q**k (1 - q**(k t)) / (1 - q**k).
    """
    log_q = momentum_decay * math.log(_BASE)
    if isinstance(step, Tensor) or isinstance(beta1, Tensor) or isinstance(log_q, Tensor):
        return _product_of_tensors(step, beta1, log_q)
    product: float = beta1**step
    total = 0.0
    for k in range(1, _TERMS + 1) if product > _NOTHING else ():
        x, weight = k * log_q, 0.5**k / k
        if weight * step < _NOTHING:
            break
        total += weight * (math.exp(x) * math.expm1(x * step) / math.expm1(x) if x else step)
    return product * math.exp(-total)


def _product_of_tensors(step: Number, beta1: Number, log_q: Number) -> Number:
    tensors = [number for number in (step, beta1, log_q) if isinstance(number, Tensor)]
    # Numbers of shape () on the CPU meet tensors on any device.
    places = [tensor.device for tensor in tensors if tensor.device.type != "cpu"]
    place = places[0] if places else torch.device("cpu")
    orders = torch.arange(1, _TERMS + 1, dtype=torch.float64, device=place)
    count, exponents = _with_dim_of_orders(step), _with_dim_of_orders(log_q) * orders
    sums = count * _mean_growth(exponents * count) / _mean_growth(exponents)
    total = (sums * exponents.exp() * 0.5**orders / orders).sum(-1)
    product: Number = beta1**step * (-total).exp()
    return product


def _with_dim_of_orders(number: Number) -> Number:
    """Give a number of each member a dimension behind; one of shape () fits as it is."""
    return number.unsqueeze(-1) if isinstance(number, Tensor) and number.ndim > 0 else number


def _mean_growth(x: Tensor) -> Tensor:
    """Return (e**x - 1) / x, and near 0, where its derivatives would lose digits, its series."""
    small = x.abs() < _SMALL
    near = x.masked_fill(~small, 0.0)
    away = x.masked_fill(small, -1.0)
    series = 1 + near / 2 * (1 + near / 3 * (1 + near / 4))
    return torch.where(small, series, torch.expm1(away) / away)


_SMALL = 1e-4


def _equations(
    param: Tensor, grad: Tensor, slots: tuple[Tensor, ...], own: Coefficients, options: Any
) -> list[Tensor]:
    """One step of one leaf, in the order of operations of torch.optim's single-tensor NAdam."""
    param, grad = with_decay(param, grad, own, options)
    exp_avg, exp_avg_sq = new_moments(grad, slots[0], slots[1], own)
    denominator = safe_sqrt(exp_avg_sq / own.correction2) + own.eps
    param = add_quotient(param, grad, denominator, own.descent_by_grad)
    param = add_quotient(param, exp_avg, denominator, own.descent_by_mean)
    return [param, exp_avg, exp_avg_sq]


def _foreach_(inputs: StepInputs, numbers: Any, options: Any) -> None:
    params, grads, (exp_avgs, exp_avg_sqs), _ = inputs
    own = coefficients(numbers._make(map(double, numbers)), options)
    grads = foreach_with_decay_(params, grads, own.decay, numbers.weight_decay, options)
    foreach_moments_(exp_avgs, exp_avg_sqs, grads, numbers)
    denominators = list(torch._foreach_div(exp_avg_sqs, fit(own.correction2, params[0])))
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, numbers.eps)
    foreach_add_quotients_(params, grads, denominators, own.descent_by_grad)
    foreach_add_quotients_(params, exp_avgs, denominators, own.descent_by_mean)


_HYPERPARAMS = (*HYPERPARAMS, Hyperparam("momentum_decay", AT_LEAST_ZERO))
_NEEDED = (
    "add",
    "add_",
    "addcdiv_",
    "addcmul_",
    "div",
    "lerp_",
    "mul",
    "mul_",
    "neg",
    "sqrt_",
)

_RULE = UpdateRule(
    state=NAdamState,
    slots=(Slot("exp_avg"), Slot("exp_avg_sq")),
    hyperparams=_HYPERPARAMS,
    options=("decoupled_weight_decay", "maximize"),
    coefficients=coefficients,
    equations=_equations,
    kernels={
        "foreach": kernels.foreach(_foreach_, _NEEDED, {own.name: own.path for own in _HYPERPARAMS})
    },
    traits=ELEMENTWISE_BY_RULE,
)


@register_optimizer
@dataclass(frozen=True)
class NAdam:
    r"""Adam with Nesterov's momentum, which grows over the first updates.

    With gradient $g_t$, learning rate $\eta$, weight decay $\lambda$ and momentum decay $\psi$,

    $$ d_t = g_t + \lambda\,\theta_{t-1}, \qquad
       m_t = \beta_1 m_{t-1} + (1 - \beta_1) d_t, \qquad
       v_t = \beta_2 v_{t-1} + (1 - \beta_2) d_t^2, $$

    $$ \mu_t = \beta_1 \bigl(1 - \tfrac12\,0.96^{\,t \psi}\bigr), \qquad
       \hat m_t = \frac{\mu_{t+1}\,m_t}{1 - \prod_{i=1}^{t+1} \mu_i}
       + \frac{(1 - \mu_t)\,d_t}{1 - \prod_{i=1}^{t} \mu_i}, \qquad
       \theta_t = \theta_{t-1}
       - \eta\,\frac{\hat m_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}. $$

    If weight decay is decoupled, $d_t = g_t$, and $\theta_{t-1}$ is multiplied by
    $1 - \eta\lambda$ first. An `NAdam` is a frozen value and a pytree whose leaves are those
    hyperparameters that are tensors: map over it with vmap to sweep them, differentiate with
    respect to it to learn them. `Adam(nesterov=True)` is the other form of the same idea, in which
    the momentum does not grow.

    The equations are those of Dozat, *Incorporating Nesterov Momentum into Adam* (2016), as
    `torch.optim.NAdam` has them. The product of the $\mu_i$ is computed anew at each update from
    the count, in float64. torch keeps it in its state, as `mu_product`, in float32.
    Results differ from torch's by the rounding of that, and by nothing else: on the CPU, in
    float32 they are equal nearly everywhere. 16-bit leaves are computed in float32 by every kernel.
    A complex leaf is a pair of real ones.

    Args:
        lr: Learning rate: at least 0; a number, a 0-dim tensor, or a schedule, as for `AdamW`.
        betas: Decay rates of the two running means: each at least 0 and below 1, and each likewise
            a number, tensor or schedule. The bias corrections, and the product of momenta, take the
            present value for all steps.
        eps: Added to the denominator: at least 0; likewise. At 0, a zero gradient at the first step
            gives 0 / 0.
        weight_decay: At least 0, times the parameter added to the gradient; likewise.
        momentum_decay: How fast the momentum grows from half of `betas[0]` to all of it: at least
            0; likewise. The present value holds for all steps.
        decoupled_weight_decay: Multiply weight decay by the learning rate, and take it from the
            parameter, as `AdamW` does.
        maximize: Ascend instead of descending.
        step_per_leaf: Count the updates of each leaf, so that a leaf whose gradient is sometimes
            None has its own bias corrections, as in torch.optim; a schedule then sees each leaf's
            own count. Off: one count for the tree, advanced by every update.
        kernel: `"auto"` takes the fastest that is right for the tensors; `"foreach"` and `"plain"`
            name one. Tracers and forward mode always see plain operators.
        differentiable: Whether plain autograd records an update, as for `AdamW`.
        moments: The dtype of the moments, as for `AdamW`.
        rounding: How what is kept in 16 bits is rounded, as for `AdamW`.
        seed: The key of a new state where `rounding` is `"stochastic"`, as for `AdamW`.

    Raises:
        TypeError: If a hyperparameter is of the wrong type.
        ValueError: If one is out of range, NaN or infinite.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.NAdam(lr=0.1)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = opt.init(params)
        >>> params, state = opt.update({"w": torch.tensor([0.5, -0.5])}, state, params)
        >>> params
        {'w': tensor([0.8944, 2.1056])}
    """

    rule: ClassVar[UpdateRule] = _RULE

    lr: Number | Schedule | NumberTree = 2e-3
    betas: tuple[Number | Schedule | NumberTree, Number | Schedule | NumberTree] = (0.9, 0.999)
    eps: Number | Schedule | NumberTree = 1e-8
    weight_decay: Number | Schedule | NumberTree = 0.0
    momentum_decay: Number | Schedule | NumberTree = 4e-3
    decoupled_weight_decay: bool = False
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

    def init(self, params: Tree) -> NAdamState:
        """Return the state before the first update: zeros."""
        state: NAdamState = init(self, params)
        return state

    def update(
        self, grads: Tree, state: NAdamState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, NAdamState]:
        """Return the new parameters and the new state, in fresh memory."""
        return update(self, grads, state, params)

    def update_(
        self, grads: Tree, state: NAdamState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, NAdamState]:
        """Do the same as `update`, written into `params` and `state`, which are returned."""
        return update_(self, grads, state, params)
