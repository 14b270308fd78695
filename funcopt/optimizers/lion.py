"""Lion: its state, its equations, its rule, and the optimizer as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core.tensors import double, fit
from .._core.types import (
    AT_LEAST_ZERO,
    BELOW_ONE,
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
from .._engine.prepare import init
from .._engine.registration import check_fields, register_optimizer, state_class
from .._engine.rule import Slot, StepInputs, UpdateRule
from .._engine.update import update, update_


@state_class
class LionState(NamedTuple):
    """The state of `Lion`: tensors only, in trees of the shape of the parameters.

    Attributes:
        step: How many updates were made, as in `AdamWState`.
        exp_avg: The running mean of the gradients.
        key: A key of random bits, as in `AdamWState`.
    """

    step: Tree
    exp_avg: Tree
    key: Tree = ()


class Coefficients(NamedTuple):
    """What the numbers of a step come to."""

    beta1: Number
    beta2: Number
    gain1: Number  # 1 - beta1
    gain2: Number  # 1 - beta2
    weight_decay: Number
    descent: Number  # minus the learning rate


def coefficients(numbers: Any, _options: Any) -> Coefficients:
    """Return what the numbers of a step come to, in float64."""
    _, lr, beta1, beta2, weight_decay, *_ = numbers
    return Coefficients(beta1, beta2, 1 - beta1, 1 - beta2, weight_decay, -lr)


def _equations(
    param: Tensor, grad: Tensor, slots: tuple[Tensor, ...], own: Coefficients, options: Any
) -> list[Tensor]:
    """One step of one leaf, in the order of operations of optax."""
    grad, (exp_avg,) = -grad if options.maximize else grad, slots
    sign = (grad * own.gain1 + exp_avg * own.beta1).sign()
    # A product and a sum, each rounded, as optax has them: add(alpha=...) rounds once.
    direction = sign + param * own.weight_decay
    return [param + direction * own.descent, grad * own.gain2 + exp_avg * own.beta2]


def _foreach_(inputs: StepInputs, numbers: Any, options: Any) -> None:
    params, grads, (exp_avgs,), _ = inputs
    own = coefficients(numbers._make(map(double, numbers)), options)
    if options.maximize:
        grads = list(torch._foreach_neg(grads))
    directions = list(torch._foreach_mul(grads, own.gain1))
    torch._foreach_add_(directions, torch._foreach_mul(exp_avgs, own.beta1))
    torch._foreach_sign_(directions)
    torch._foreach_add_(directions, torch._foreach_mul(params, own.weight_decay))
    torch._foreach_mul_(directions, fit(own.descent, params[0]))
    torch._foreach_add_(params, directions)
    torch._foreach_mul_(exp_avgs, own.beta2)
    torch._foreach_add_(exp_avgs, torch._foreach_mul(grads, own.gain2))


_HYPERPARAMS = (
    Hyperparam("lr", AT_LEAST_ZERO),
    Hyperparam("beta1", BELOW_ONE, "betas[0]"),
    Hyperparam("beta2", BELOW_ONE, "betas[1]"),
    Hyperparam("weight_decay", AT_LEAST_ZERO),
)
_FOREACH = kernels.foreach(
    _foreach_, ("add_", "mul", "mul_", "neg", "sign_"), {own.name: own.path for own in _HYPERPARAMS}
)

_RULE = UpdateRule(
    state=LionState,
    slots=(Slot("exp_avg"),),
    hyperparams=_HYPERPARAMS,
    options=("maximize",),
    coefficients=coefficients,
    equations=_equations,
    kernels={"native": "funcopt.optimizers._native:LION", "foreach": _FOREACH},
    traits=ELEMENTWISE_BY_RULE,
)


@register_optimizer
@dataclass(frozen=True)
class Lion:
    r"""Lion, which moves every element by the learning rate, in the direction of a running mean.

    With gradient $g_t$, learning rate $\eta$ and weight decay $\lambda$,

    $$ \theta_t = \theta_{t-1}
       - \eta\,\bigl(\operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t)
       + \lambda\,\theta_{t-1}\bigr), \qquad
       m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t. $$

    It has one slot where Adam has two. Its steps are larger than Adam's, so that its learning rate
    is three to ten times smaller, and its weight decay as many times larger. A `Lion` is a frozen
    value and a pytree whose leaves are those hyperparameters that are tensors: map over it with
    vmap to sweep them, differentiate with respect to it to learn them. Through the sign itself no
    derivative flows.

    The equations are those of Chen et al., *Symbolic Discovery of Optimization Algorithms* (NeurIPS
    2023), with the defaults and the order of operations of `optax.lion`. 16-bit leaves are computed
    in float32 by every kernel. A complex leaf is a pair of real ones, each with a sign of its own;
    optax divides it by its absolute value.

    Args:
        lr: Learning rate: at least 0; a number, a 0-dim tensor, or a schedule, as for `AdamW`.
        betas: How much of the running mean is in the direction, and how much of it is kept: each at
            least 0 and below 1, and each likewise a number, tensor or schedule.
        weight_decay: At least 0, multiplied by the learning rate; likewise.
        maximize: Ascend instead of descending.
        step_per_leaf: Count the updates of each leaf; a schedule then sees each leaf's own count.
            Off: one count for the tree, advanced by every update.
        kernel: `"auto"` takes the fastest that is right for the tensors; `"native"` (CPU alone),
            `"foreach"` and `"plain"` name one. Tracers and forward mode always see plain operators.
        differentiable: Whether plain autograd records an update, as for `AdamW`.
        moments: The dtype of the running mean, as for `AdamW`.
        rounding: How what is kept in 16 bits is rounded, as for `AdamW`.
        seed: The key of a new state where `rounding` is `"stochastic"`, as for `AdamW`.

    Raises:
        TypeError: If a hyperparameter is of the wrong type.
        ValueError: If one is out of range, NaN or infinite.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.Lion(lr=0.1, weight_decay=0.0)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = opt.init(params)
        >>> params, state = opt.update({"w": torch.tensor([0.5, -5.0])}, state, params)
        >>> params
        {'w': tensor([0.9000, 2.1000])}
    """

    rule: ClassVar[UpdateRule] = _RULE

    lr: Number | Schedule | NumberTree = 1e-4
    betas: tuple[Number | Schedule | NumberTree, Number | Schedule | NumberTree] = (0.9, 0.99)
    weight_decay: Number | Schedule | NumberTree = 1e-3
    maximize: bool = False
    step_per_leaf: bool = False
    kernel: Literal["auto", "native", "foreach", "plain"] = "auto"
    differentiable: bool | None = None
    moments: torch.dtype | Literal["auto"] | None = "auto"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: Number = 0

    def __post_init__(self) -> None:
        """Check and normalize every hyperparameter."""
        check_fields(self)

    def init(self, params: Tree) -> LionState:
        """Return the state before the first update: zeros."""
        state: LionState = init(self, params)
        return state

    def update(
        self, grads: Tree, state: LionState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, LionState]:
        """Return the new parameters and the new state, in fresh memory."""
        return update(self, grads, state, params)

    def update_(
        self, grads: Tree, state: LionState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, LionState]:
        """Do the same as `update`, written into `params` and `state`, which are returned."""
        return update_(self, grads, state, params)
