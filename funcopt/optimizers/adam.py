"""Adam: AdamW's equations with coupled weight decay, its rule, and the optimizer as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core.types import ELEMENTWISE_BY_RULE, Extras, Number, NumberTree, ParamsT, Schedule, Tree
from .._engine.hyperparameters import check_flag
from .._engine.prepare import init
from .._engine.registration import check_fields, register_optimizer, state_class
from .._engine.rule import UpdateRule
from .._engine.update import update, update_
from ._adam.nesterov import RuleByOption, looking_ahead
from ._terms import add_decay
from .adamw import HYPERPARAMS, SLOTS, Coefficients, coefficients, descend, descend_


@state_class
class AdamState(NamedTuple):
    """The state of `Adam`: tensors only, in trees of the shape of the parameters.

    Attributes:
        step: How many updates were made, as in `AdamWState`.
        exp_avg: The running mean of the gradients.
        exp_avg_sq: The running mean of their squares.
        max_exp_avg_sq: The largest `exp_avg_sq` so far; `()` unless amsgrad.
        key: A key of random bits, as in `AdamWState`.
    """

    step: Tree
    exp_avg: Tree
    exp_avg_sq: Tree
    max_exp_avg_sq: Tree
    key: Tree = ()


def _equations(
    param: Tensor, grad: Tensor, slots: tuple[Tensor, ...], own: Coefficients, options: Any
) -> list[Tensor]:
    """One step of one leaf, in the order of operations of torch.optim's single-tensor Adam."""
    grad = add_decay(-grad if options.maximize else grad, param, own.weight_decay)
    return descend(param, grad, slots, own)


def _equations_(
    param: Tensor, grad: Tensor, slots: tuple[Tensor, ...], own: Coefficients, options: Any
) -> None:
    grad = add_decay(-grad if options.maximize else grad, param, own.weight_decay)
    descend_(param, grad, slots, own)


_RULE = UpdateRule(
    state=AdamState,
    slots=SLOTS,
    hyperparams=HYPERPARAMS,
    options=("amsgrad", "maximize"),
    coefficients=coefficients,
    equations=_equations,
    equations_=_equations_,
    kernels={
        "native": "funcopt.optimizers._native:ADAM",
        "fused": "funcopt.optimizers._adam.kernels:ADAM_FUSED",
        "foreach": "funcopt.optimizers._adam.kernels:ADAM_FOREACH",
    },
    traits=ELEMENTWISE_BY_RULE,
)


@register_optimizer
@dataclass(frozen=True)
class Adam:
    r"""Adam, with coupled weight decay: the decay is part of the gradient.

    With gradient $g_t$, learning rate $\eta$ and weight decay $\lambda$,

    $$ d_t = g_t + \lambda\,\theta_{t-1}, \qquad
       m_t = \beta_1 m_{t-1} + (1 - \beta_1) d_t, \qquad
       v_t = \beta_2 v_{t-1} + (1 - \beta_2) d_t^2, $$

    $$ \theta_t = \theta_{t-1}
       - \eta\,\frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}. $$

    Without weight decay that is `AdamW`; with it, `AdamW` is mostly the better one, since there the
    decay is not divided by the second moment. An `Adam` is a frozen value and a pytree whose leaves
    are those hyperparameters that are tensors: map over it with vmap to sweep them, differentiate
    with respect to it to learn them.

    The equations are those of Kingma and Ba, *Adam: A Method for Stochastic Optimization* (ICLR
    2015), with weight decay as in `torch.optim.Adam`; amsgrad is from Reddi et al., *On the
    Convergence of Adam and Beyond* (ICLR 2018), with the maximum taken before the bias correction,
    again as in torch. On the CPU, in float32 and float64, the same kernel gives torch's bits,
    `"native"` as for `AdamW`. 16-bit leaves are computed in float32 by every kernel. A complex leaf
    is a pair of real ones.

    Args:
        lr: Learning rate: at least 0; a number, a 0-dim tensor, or a schedule, as for `AdamW`.
        betas: Decay rates of the two running means: each at least 0 and below 1, and each likewise
            a number, tensor or schedule. The bias corrections take the present value for all steps.
        eps: Added to the denominator: at least 0; likewise. At 0, a zero gradient at the first step
            gives 0 / 0.
        weight_decay: At least 0, times the parameter added to the gradient; likewise.
        amsgrad: Divide by the largest second moment so far.
        maximize: Ascend instead of descending.
        nesterov: Let the running mean look one gradient ahead: in place of
            $m_t / (1 - \beta_1^t)$ stands $\beta_1 m_t / (1 - \beta_1^{t+1})
            + (1 - \beta_1)\,d_t / (1 - \beta_1^t)$, as in `optax.adam`, which torch lacks. Only
            `"foreach"` and `"plain"` serve it.
        step_per_leaf: Count the updates of each leaf, so that a leaf whose gradient is sometimes
            None has its own bias corrections, as in torch.optim; a schedule then sees each leaf's
            own count. Off: one count for the tree, advanced by every update.
        kernel: `"auto"` takes the fastest that is right for the tensors; `"native"` (CPU alone),
            `"fused"`, `"foreach"` and `"plain"` name one. Tracers and forward mode always see plain
            operators.
        differentiable: Whether plain autograd records an update, as for `AdamW`.
        moments: The dtype of the moments, as for `AdamW`.
        rounding: How what is kept in 16 bits is rounded, as for `AdamW`.
        seed: The key of a new state where `rounding` is `"stochastic"`, as for `AdamW`.

    Raises:
        TypeError: If a hyperparameter is of the wrong type.
        ValueError: If one is out of range, NaN or infinite.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.Adam(lr=0.1)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = opt.init(params)
        >>> params, state = opt.update({"w": torch.tensor([0.5, -0.5])}, state, params)
        >>> params
        {'w': tensor([0.9000, 2.1000])}
    """

    rule: ClassVar[RuleByOption] = RuleByOption(_RULE, looking_ahead(_RULE))

    lr: Number | Schedule | NumberTree = 1e-3
    betas: tuple[Number | Schedule | NumberTree, Number | Schedule | NumberTree] = (0.9, 0.999)
    eps: Number | Schedule | NumberTree = 1e-8
    weight_decay: Number | Schedule | NumberTree = 0.0
    amsgrad: bool = False
    maximize: bool = False
    nesterov: bool = False
    step_per_leaf: bool = False
    kernel: Literal["auto", "native", "fused", "foreach", "plain"] = "auto"
    differentiable: bool | None = None
    moments: torch.dtype | Literal["auto"] | None = "auto"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: Number = 0

    def __post_init__(self) -> None:
        """Check and normalize every hyperparameter."""
        check_flag("nesterov", self.nesterov)  # by which the rule is chosen
        check_fields(self)

    def init(self, params: Tree) -> AdamState:
        """Return the state before the first update: zeros."""
        state: AdamState = init(self, params)
        return state

    def update(
        self, grads: Tree, state: AdamState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, AdamState]:
        """Return the new parameters and the new state, in fresh memory."""
        return update(self, grads, state, params)

    def update_(
        self, grads: Tree, state: AdamState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, AdamState]:
        """Do the same as `update`, written into `params` and `state`, which are returned."""
        return update_(self, grads, state, params)
