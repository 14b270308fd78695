"""SGD: its state, its equations, its kernels, its rule, and the optimizer as a value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core import transforms
from .._core.tensors import double, fit, is_narrow
from .._core.types import (
    AT_LEAST_ZERO,
    ELEMENTWISE_BY_RULE,
    Extras,
    Hyperparam,
    Number,
    NumberTree,
    ParamsT,
    Range,
    Schedule,
    Tree,
)
from .._engine import kernels
from .._engine.prepare import init
from .._engine.registration import check_fields, register_optimizer, state_class
from .._engine.rule import Slot, StepInputs, UpdateRule
from .._engine.update import update, update_
from ._terms import add_decay, add_scaled


@state_class
class SGDState(NamedTuple):
    """The state of `SGD`: tensors only, in trees of the shape of the parameters.

    Attributes:
        step: How many updates were made, as in `AdamWState`.
        momentum_buffer: The running sum of the gradients; `()` if momentum is the number 0.
        key: A key of random bits, as in `AdamWState`.
    """

    step: Tree
    momentum_buffer: Tree
    key: Tree = ()


class Coefficients(NamedTuple):
    """What the numbers of a step come to."""

    weight_decay: Number
    momentum: Number
    gain: Number  # what the buffer takes of the gradient: at the first update all of it
    descent: Number  # minus the learning rate


def coefficients(numbers: Any, _options: Any) -> Coefficients:
    """Return what the numbers of a step come to, in float64."""
    step, lr, momentum, dampening, weight_decay, *_ = numbers
    gain: Number = 1.0
    if isinstance(dampening, Tensor) or dampening != 0:
        later = (step != 1).double() if isinstance(step, Tensor) else float(step != 1)
        gain = 1 - dampening * later
    return Coefficients(weight_decay, momentum, gain, -lr)


def _equations(
    param: Tensor, grad: Tensor, slots: tuple[Tensor, ...], own: Coefficients, options: Any
) -> list[Tensor]:
    """One step of one leaf, in the order of operations of torch.optim's single-tensor SGD."""
    grad = add_decay(-grad if options.maximize else grad, param, own.weight_decay)
    buffers = [add_scaled(buffer * own.momentum, grad, own.gain) for buffer in slots]
    for buffer in buffers:
        grad = add_scaled(grad, buffer, own.momentum) if options.nesterov else buffer
    return [add_scaled(param, grad, own.descent), *buffers]


def _foreach_(inputs: StepInputs, numbers: Any, options: Any) -> None:
    params, grads, slots, _ = inputs
    own = coefficients(numbers._make(map(double, numbers)), options)
    if options.maximize:
        grads = list(torch._foreach_neg(grads))
    if numbers.weight_decay != 0:
        grads = list(torch._foreach_add(grads, params, alpha=numbers.weight_decay))
    for buffers in slots:
        torch._foreach_mul_(buffers, numbers.momentum)
        _add_scaled_(buffers, grads, own.gain)
        if options.nesterov:
            grads = list(torch._foreach_add(grads, buffers, alpha=numbers.momentum))
        else:
            grads = buffers
    _add_scaled_(params, grads, own.descent)


def _add_scaled_(tensors: list[Tensor], others: list[Tensor], scale: Number) -> None:
    if isinstance(scale, Tensor):  # on the device, where its value is not read
        torch._foreach_add_(tensors, torch._foreach_mul(others, fit(scale, others[0])))
    else:
        torch._foreach_add_(tensors, others, alpha=scale)


_FOREACH = kernels.foreach(_foreach_, ("add", "add_", "mul", "mul_", "neg"))


def fused_is_wrong(param: Tensor) -> bool:
    """Whether torch's fused kernel gives wrong numbers for a parameter.

    In torch 2.13 it does for 16-bit ones of 16 elements and more on the CPU.
    """
    return param.device.type == "cpu" and is_narrow(param.dtype)


def _fused_(inputs: StepInputs, numbers: Any, options: Any) -> None:
    device = inputs.params[0].device
    if fused_is_wrong(inputs.params[0]) or (inputs.slots and numbers.momentum == 0):
        # At a momentum of 0 torch's kernel would leave the buffers alone.
        _FOREACH.step_(inputs, numbers, options)
        return
    # Told that this is the first step, torch's kernel copies the gradient into the buffer. The
    # buffer is zeros then, so that adding all of the gradient to it comes to the same.
    first = isinstance(numbers.step, float) and numbers.step == 1
    torch._fused_sgd_(
        inputs.params,
        inputs.grads,
        inputs.slots[0] if inputs.slots else [],
        weight_decay=numbers.weight_decay,
        momentum=numbers.momentum,
        lr=kernels.fused_lr(numbers.lr, device),
        dampening=0.0 if first else numbers.dampening,
        nesterov=options.nesterov,
        maximize=options.maximize,
        is_first_step=False,
    )


_FUSED = kernels.fused(_fused_, "_fused_sgd_")


def _fused_unsupported_reason(device: torch.device, numbers: Any) -> str | None:
    step, dampening = (0.0, 0.0) if numbers is None else (numbers.step, numbers.dampening)
    # The counts of members are read one by one.
    unread = isinstance(step, Tensor) and (step.ndim == 0 or not transforms.on_host(step))
    if unread and (isinstance(dampening, Tensor) or dampening != 0):
        return "with dampening it has to know the count of updates, whose value cannot be read"
    return _FUSED.unsupported_reason(device, numbers)


_RULE = UpdateRule(
    state=SGDState,
    slots=(Slot("momentum_buffer", option="momentum"),),
    hyperparams=(
        Hyperparam("lr", AT_LEAST_ZERO),
        Hyperparam("momentum", AT_LEAST_ZERO),
        Hyperparam("dampening", Range("must be finite", math.isfinite)),
        Hyperparam("weight_decay", AT_LEAST_ZERO),
    ),
    options=("nesterov", "maximize"),
    coefficients=coefficients,
    equations=_equations,
    kernels={
        "native": "funcopt.optimizers._native:SGD",
        "fused": _FUSED._replace(unsupported_reason=_fused_unsupported_reason),
        "foreach": _FOREACH,
    },
    traits=ELEMENTWISE_BY_RULE,
)


@register_optimizer
@dataclass(frozen=True)
class SGD:
    r"""Stochastic gradient descent, with momentum.

    With gradient $g_t$, learning rate $\eta$, weight decay $\lambda$, momentum $\mu$ and dampening
    $\tau$,

    $$ d_t = g_t + \lambda\,\theta_{t-1}, \qquad b_1 = d_1, \qquad
       b_t = \mu\,b_{t-1} + (1 - \tau)\,d_t, $$

    $$ \theta_t = \theta_{t-1} - \eta\,b_t, \qquad \text{with nesterov} \qquad
       \theta_t = \theta_{t-1} - \eta\,(d_t + \mu\,b_t), $$

    and without momentum $\theta_t = \theta_{t-1} - \eta\,d_t$.

    An `SGD` is a frozen value and a pytree whose leaves are those hyperparameters that are tensors:
    map over it with vmap to sweep them, differentiate with respect to it to learn them.

    The equations are those of `torch.optim.SGD`; Nesterov's momentum is in the form of Sutskever et
    al., *On the importance of initialization and momentum in deep learning* (ICML 2013). On the
    CPU, in float32 and float64, the same kernel gives torch's bits, `"native"` as for `AdamW`.
    Unlike torch's, the state has a count of updates. The first of them, which takes no dampening,
    is the one that the count says is the first: if a leaf has no gradient then, its own first one
    is dampened, unless `step_per_leaf` counts the updates of each leaf, as torch does in effect.
    16-bit leaves are computed in float32 by every kernel, where torch's fused one is wrong on the
    CPU. A complex leaf is a pair of real ones, which rounds otherwise than torch's complex
    products.

    Args:
        lr: Learning rate: at least 0; a number, a 0-dim tensor, or a schedule, as for `AdamW`.
        momentum: At least 0; likewise. At the number 0 there is no buffer, and no dampening. A
            tensor or a schedule has a buffer, also where its value is 0.
        dampening: What is kept from the buffer of each gradient but the first: finite; likewise.
        weight_decay: At least 0, times the parameter added to the gradient; likewise.
        nesterov: Look ahead by the momentum. It wants momentum, and the number 0 for dampening.
        maximize: Ascend instead of descending.
        step_per_leaf: Count the updates of each leaf, so that a leaf whose gradient is None at the
            first update has its own first one later, as in torch.optim; a schedule then sees each
            leaf's own count. Off: one count for the tree, advanced by every update.
        kernel: `"auto"` takes the fastest that is right for the tensors; `"native"` (CPU alone),
            `"fused"`, `"foreach"` and `"plain"` name one. Tracers and forward mode always see plain
            operators.
        differentiable: Whether plain autograd records an update, as for `AdamW`.
        moments: The dtype of the momentum buffer, as for `AdamW`.
        rounding: How what is kept in 16 bits is rounded, as for `AdamW`.
        seed: The key of a new state where `rounding` is `"stochastic"`, as for `AdamW`.

    Raises:
        TypeError: If a hyperparameter is of the wrong type.
        ValueError: If one is out of range, NaN or infinite, or if `nesterov` has no momentum, or
            has dampening.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.SGD(lr=0.1, momentum=0.9)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = opt.init(params)
        >>> for _ in range(2):
        ...     params, state = opt.update({"w": torch.tensor([0.5, -0.5])}, state, params)
        >>> params, state.momentum_buffer
        ({'w': tensor([0.8550, 2.1450])}, {'w': tensor([ 0.9500, -0.9500])})
    """

    rule: ClassVar[UpdateRule] = _RULE

    lr: Number | Schedule | NumberTree = 1e-3
    momentum: Number | Schedule | NumberTree = 0.0
    dampening: Number | Schedule | NumberTree = 0.0
    weight_decay: Number | Schedule | NumberTree = 0.0
    nesterov: bool = False
    maximize: bool = False
    step_per_leaf: bool = False
    kernel: Literal["auto", "native", "fused", "foreach", "plain"] = "auto"
    differentiable: bool | None = None
    moments: torch.dtype | Literal["auto"] | None = "auto"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: Number = 0

    def __post_init__(self) -> None:
        """Check and normalize every hyperparameter."""
        check_fields(self)
        if self.nesterov and (_is_zero(self.momentum) or not _is_zero(self.dampening)):
            raise ValueError(
                f"nesterov=True with momentum={self.momentum} and dampening={self.dampening}: it "
                f"needs momentum, and no dampening. Give momentum=0.9, say, and dampening=0."
            )

    def init(self, params: Tree) -> SGDState:
        """Return the state before the first update: zeros."""
        state: SGDState = init(self, params)
        return state

    def update(
        self, grads: Tree, state: SGDState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, SGDState]:
        """Return the new parameters and the new state, in fresh memory."""
        return update(self, grads, state, params)

    def update_(
        self, grads: Tree, state: SGDState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, SGDState]:
        """Do the same as `update`, written into `params` and `state`, which are returned."""
        return update_(self, grads, state, params)


def _is_zero(given: object) -> bool:
    return isinstance(given, float) and given == 0.0
