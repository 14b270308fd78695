"""Adagrad: its state, its equations, its rule, and the optimizer as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core.pytree import tree_map
from .._core.tensors import double, fit, view_as_complex_like, view_as_real
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
from .._engine.hyperparameters import normalize
from .._engine.prepare import init
from .._engine.registration import check_fields, register_optimizer, state_class
from .._engine.rule import Slot, StepInputs, UpdateRule
from .._engine.update import update, update_
from ._terms import add_decay, add_quotient, foreach_add_quotients_, foreach_decayed_grads


@state_class
class AdagradState(NamedTuple):
    """The state of `Adagrad`: tensors only, in trees of the shape of the parameters.

    Attributes:
        step: How many updates were made, as in `AdamWState`.
        sum: The sum of the squares of the gradients, and of what it began with.
        key: A key of random bits, as in `AdamWState`.
    """

    step: Tree
    sum: Tree
    key: Tree = ()


class Coefficients(NamedTuple):
    """What the numbers of a step come to."""

    eps: Number
    weight_decay: Number
    descent: Number  # minus the learning rate after its decay


def coefficients(numbers: Any, _options: Any) -> Coefficients:
    """Return what the numbers of a step come to, in float64."""
    step, lr, lr_decay, eps, weight_decay, *_ = numbers
    return Coefficients(eps, weight_decay, -(lr / (1 + (step - 1) * lr_decay)))


def _equations(
    param: Tensor, grad: Tensor, slots: tuple[Tensor, ...], own: Coefficients, options: Any
) -> list[Tensor]:
    """One step of one leaf, in the order of operations of torch.optim's single-tensor Adagrad."""
    grad = add_decay(-grad if options.maximize else grad, param, own.weight_decay)
    total = torch.addcmul(slots[0], grad, grad)
    denominator = safe_sqrt(total) + own.eps
    return [add_quotient(param, grad, denominator, own.descent), total]


def _foreach_(inputs: StepInputs, numbers: Any, options: Any) -> None:
    params, grads, (sums,), _ = inputs
    own = coefficients(numbers._make(map(double, numbers)), options)
    grads = foreach_decayed_grads(grads, params, numbers.weight_decay, maximize=options.maximize)
    torch._foreach_addcmul_(sums, grads, grads)
    denominators = list(torch._foreach_sqrt(sums))
    torch._foreach_add_(denominators, numbers.eps)
    foreach_add_quotients_(params, grads, denominators, own.descent)


_HYPERPARAMS = (
    Hyperparam("lr", AT_LEAST_ZERO),
    Hyperparam("lr_decay", AT_LEAST_ZERO),
    Hyperparam("eps", AT_LEAST_ZERO),
    Hyperparam("weight_decay", AT_LEAST_ZERO),
)
# Not among the numbers of a step: the state alone depends on it.
_FIRST_SUM = Hyperparam("initial_accumulator_value", AT_LEAST_ZERO)

_RULE = UpdateRule(
    state=AdagradState,
    slots=(Slot("sum"),),
    hyperparams=_HYPERPARAMS,
    options=("maximize",),
    coefficients=coefficients,
    equations=_equations,
    kernels={
        "foreach": kernels.foreach(
            _foreach_, ("add", "add_", "addcdiv_", "addcmul_", "mul", "neg", "sqrt")
        )
    },
    traits=ELEMENTWISE_BY_RULE,
)


@register_optimizer
@dataclass(frozen=True)
class Adagrad:
    r"""Adagrad: gradients divided by the root of the sum of their squares.

    With gradient $g_t$, learning rate $\eta$, its decay $\delta$ and weight decay $\lambda$,

    $$ d_t = g_t + \lambda\,\theta_{t-1}, \qquad s_t = s_{t-1} + d_t^2, \qquad
       \theta_t = \theta_{t-1}
       - \frac{\eta}{1 + (t - 1)\,\delta}\,\frac{d_t}{\sqrt{s_t} + \epsilon}. $$

    The sum never falls, so that steps become small by themselves: it suits gradients that are
    mostly zero, as those of embeddings are. An `Adagrad` is a frozen value and a pytree whose
    leaves are those hyperparameters that are tensors: map over it with vmap to sweep them,
    differentiate with respect to it to learn them.

    The equations are those of Duchi et al., *Adaptive Subgradient Methods for Online Learning and
    Stochastic Optimization* (JMLR 2011), as `torch.optim.Adagrad` has them. On the CPU, in float32
    and float64, the kernels give the bits of torch's plain and foreach ones. 16-bit leaves are
    computed in float32 by every kernel. A complex leaf is a pair of real ones. Gradients are dense.

    Args:
        lr: Learning rate: at least 0; a number, a 0-dim tensor, or a schedule, as for `AdamW`.
        lr_decay: At least 0; likewise. After `t` updates, the learning rate is divided by
            `1 + t * lr_decay`.
        weight_decay: At least 0, times the parameter added to the gradient; likewise.
        initial_accumulator_value: What the sums of a new state are: at least 0, a number or a 0-dim
            tensor. Of a complex leaf, both parts begin with it.
        eps: Added to the denominator: at least 0; likewise. At 0, gradients that have been zero so
            far give 0 / 0, unless the sum began with more.
        maximize: Ascend instead of descending.
        step_per_leaf: Count the updates of each leaf, so that a leaf whose gradient is sometimes
            None has its own decay of the learning rate, as in torch.optim; a schedule then sees
            each leaf's own count. Off: one count for the tree, advanced by every update.
        kernel: `"auto"` takes the fastest that is right for the tensors; `"foreach"` and `"plain"`
            name one. Tracers and forward mode always see plain operators.
        differentiable: Whether plain autograd records an update, as for `AdamW`.
        moments: The dtype of the sums, as for `AdamW`. In 16 bits, rounded to the nearest, they
            soon stop to grow.
        rounding: How what is kept in 16 bits is rounded, as for `AdamW`.
        seed: The key of a new state where `rounding` is `"stochastic"`, as for `AdamW`.

    Raises:
        TypeError: If a hyperparameter is of the wrong type.
        ValueError: If one is out of range, NaN or infinite.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.Adagrad(lr=0.1)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = opt.init(params)
        >>> for _ in range(4):
        ...     params, state = opt.update({"w": torch.tensor([0.5, -0.5])}, state, params)
        >>> params, state.sum
        ({'w': tensor([0.7216, 2.2784])}, {'w': tensor([1., 1.])})
    """

    rule: ClassVar[UpdateRule] = _RULE

    lr: Number | Schedule | NumberTree = 1e-2
    lr_decay: Number | Schedule | NumberTree = 0.0
    weight_decay: Number | Schedule | NumberTree = 0.0
    initial_accumulator_value: Number = 0.0
    eps: Number | Schedule | NumberTree = 1e-10
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
        _FIRST_SUM.put(self, normalize(_FIRST_SUM, self.initial_accumulator_value))

    def init(self, params: Tree) -> AdagradState:
        """Return the state before the first update: sums of `initial_accumulator_value`."""
        state: AdagradState = init(self, params)
        first = self.initial_accumulator_value
        if isinstance(first, float) and first == 0:
            return state
        return state._replace(sum=tree_map(lambda zeros: _raised(zeros, first), state.sum))

    def update(
        self, grads: Tree, state: AdagradState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, AdagradState]:
        """Return the new parameters and the new state, in fresh memory."""
        return update(self, grads, state, params)

    def update_(
        self, grads: Tree, state: AdagradState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, AdagradState]:
        """Do the same as `update`, written into `params` and `state`, which are returned."""
        return update_(self, grads, state, params)


def _raised(zeros: Tensor, value: Number) -> Tensor:
    """Return a tensor plus a number, which is added to both parts of a complex one."""
    real = view_as_real(zeros)
    return view_as_complex_like(real + fit(value, real), zeros)
