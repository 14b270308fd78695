"""RAdam: its state, its equations, its rule, and the optimizer as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core.tensors import choose, double, fit
from .._core.types import (
    ELEMENTWISE_BY_RULE,
    Extras,
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
from ._terms import foreach_moments_, foreach_with_decay_, with_decay
from .adamw import HYPERPARAMS, new_moments


@state_class
class RAdamState(NamedTuple):
    """The state of `RAdam`: tensors only, in trees of the shape of the parameters.

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
    lr: Number
    correction1: Number
    correction2_root: Number
    eps: Number
    is_rectified: Number  # 1 if the second moment has seen enough to divide by it, else 0
    rectification: Number


def coefficients(numbers: Any, _options: Any) -> Coefficients:
    """Return what the numbers of a step come to, in float64."""
    step, lr, beta1, beta2, eps, weight_decay, *_ = numbers
    power, longest = beta2**step, 2 / (1 - beta2) - 1
    length = longest - 2 * step * power / (1 - power)
    is_rectified = length > _LONG_ENOUGH
    # Where it is not, any numbers for which what follows has derivatives.
    rho, rho_inf = choose(is_rectified, length, 6.0), choose(is_rectified, longest, 6.0)
    square = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    return Coefficients(
        beta2,
        1 - beta1,
        1 - beta2,
        1 - lr * weight_decay,
        weight_decay,
        lr,
        1 - beta1**step,
        (1 - power) ** 0.5,
        eps,
        is_rectified.double() if isinstance(is_rectified, Tensor) else float(is_rectified),
        square**0.5,
    )


_LONG_ENOUGH = 5.0


def _equations(
    param: Tensor, grad: Tensor, slots: tuple[Tensor, ...], own: Coefficients, options: Any
) -> list[Tensor]:
    """One step of one leaf, in the order of operations of torch.optim's single-tensor RAdam."""
    param, grad = with_decay(param, grad, own, options)
    exp_avg, exp_avg_sq = new_moments(grad, slots[0], slots[1], own)
    step = exp_avg / own.correction1 * own.lr
    if isinstance(own.is_rectified, Tensor):
        is_rectified = own.is_rectified.bool()
        denominator = torch.where(is_rectified, safe_sqrt(exp_avg_sq) + own.eps, 1.0)
        divided = step * (own.correction2_root / denominator) * own.rectification
        step = torch.where(is_rectified, divided, step)
    elif own.is_rectified:
        denominator = safe_sqrt(exp_avg_sq) + own.eps
        step = step * (own.correction2_root / denominator) * own.rectification
    return [param - step, exp_avg, exp_avg_sq]


def _foreach_(inputs: StepInputs, numbers: Any, options: Any) -> None:
    params, grads, (exp_avgs, exp_avg_sqs), _ = inputs
    unfitted = coefficients(numbers._make(map(double, numbers)), options)
    own = Coefficients(*(fit(number, params[0]) for number in unfitted))
    grads = foreach_with_decay_(params, grads, own.decay, numbers.weight_decay, options)
    foreach_moments_(exp_avgs, exp_avg_sqs, grads, numbers)
    steps = list(torch._foreach_div(exp_avgs, own.correction1))
    torch._foreach_mul_(steps, own.lr)
    if isinstance(own.is_rectified, Tensor) or own.is_rectified:
        factors = list(torch._foreach_sqrt(exp_avg_sqs))
        torch._foreach_add_(factors, numbers.eps)
        torch._foreach_reciprocal_(factors)
        torch._foreach_mul_(factors, own.correction2_root)
        divided = list(torch._foreach_mul(steps, factors))
        torch._foreach_mul_(divided, own.rectification)
        if isinstance(own.is_rectified, Tensor):  # on the device, where its value is not read
            chosen = zip(divided, steps, strict=True)
            steps = [torch.where(own.is_rectified.bool(), yes, no) for yes, no in chosen]
        else:
            steps = divided
    torch._foreach_sub_(params, steps)


_NEEDED = (
    "add",
    "add_",
    "addcmul_",
    "div",
    "lerp_",
    "mul",
    "mul_",
    "neg",
    "reciprocal_",
    "sqrt",
    "sub_",
)

_RULE = UpdateRule(
    state=RAdamState,
    slots=(Slot("exp_avg"), Slot("exp_avg_sq")),
    hyperparams=HYPERPARAMS,
    options=("decoupled_weight_decay", "maximize"),
    coefficients=coefficients,
    equations=_equations,
    kernels={
        "foreach": kernels.foreach(_foreach_, _NEEDED, {own.name: own.path for own in HYPERPARAMS})
    },
    traits=ELEMENTWISE_BY_RULE,
)


@register_optimizer
@dataclass(frozen=True)
class RAdam:
    r"""Adam that begins without dividing by the second moment, while that has seen too little.

    With gradient $g_t$, learning rate $\eta$ and weight decay $\lambda$,

    $$ d_t = g_t + \lambda\,\theta_{t-1}, \qquad
       m_t = \beta_1 m_{t-1} + (1 - \beta_1) d_t, \qquad
       v_t = \beta_2 v_{t-1} + (1 - \beta_2) d_t^2, $$

    $$ \hat m_t = \frac{m_t}{1 - \beta_1^t}, \qquad
       \rho_\infty = \frac{2}{1 - \beta_2} - 1, \qquad
       \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}. $$

    If $\rho_t > 5$,

    $$ \theta_t = \theta_{t-1} - \eta\,\hat m_t\,\frac{\sqrt{1 - \beta_2^t}}{\sqrt{v_t} + \epsilon}
       \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\rho_\infty}
       {(\rho_\infty - 4)(\rho_\infty - 2)\rho_t}}, $$

    else $\theta_t = \theta_{t-1} - \eta\,\hat m_t$. If weight decay is decoupled, $d_t = g_t$, and
    $\theta_{t-1}$ is multiplied by $1 - \eta\lambda$ first. With the default betas, the first five
    steps are not divided; with $\beta_2 \le 2/3$, none ever is. An `RAdam` is a frozen value and a
    pytree whose leaves are those hyperparameters that are tensors: map over it with vmap to sweep
    them, differentiate with respect to it to learn them.

    The equations are those of Liu et al., *On the Variance of the Adaptive Learning Rate and
    Beyond* (ICLR 2020), with the threshold 5 and eps outside of the bias correction as in
    `torch.optim.RAdam`. On the CPU, in float32 and float64, both kernels give the bits of torch's
    plain one, from which torch's foreach one differs by rounding. 16-bit leaves are computed in
    float32 by every kernel. A complex leaf is a pair of real ones.

    Args:
        lr: Learning rate: at least 0; a number, a 0-dim tensor, or a schedule, as for `AdamW`.
        betas: Decay rates of the two running means: each at least 0 and below 1, and each likewise
            a number, tensor or schedule. The bias corrections take the present value for all steps.
        eps: Added to the denominator: at least 0; likewise. At 0, gradients that are all zero
            give 0 / 0 once they are divided.
        weight_decay: At least 0, times the parameter added to the gradient; likewise.
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
        >>> opt = funcopt.RAdam(lr=0.1)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = opt.init(params)
        >>> params, state = opt.update({"w": torch.tensor([0.5, -0.5])}, state, params)
        >>> params
        {'w': tensor([0.9500, 2.0500])}
    """

    rule: ClassVar[UpdateRule] = _RULE

    lr: Number | Schedule | NumberTree = 1e-3
    betas: tuple[Number | Schedule | NumberTree, Number | Schedule | NumberTree] = (0.9, 0.999)
    eps: Number | Schedule | NumberTree = 1e-8
    weight_decay: Number | Schedule | NumberTree = 0.0
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

    def init(self, params: Tree) -> RAdamState:
        """Return the state before the first update: zeros."""
        state: RAdamState = init(self, params)
        return state

    def update(
        self, grads: Tree, state: RAdamState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, RAdamState]:
        """Return the new parameters and the new state, in fresh memory."""
        return update(self, grads, state, params)

    def update_(
        self, grads: Tree, state: RAdamState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, RAdamState]:
        """Do the same as `update`, written into `params` and `state`, which are returned."""
        return update_(self, grads, state, params)
