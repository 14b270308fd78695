"""AdamW: its state, its equations, its rule, and the optimizer as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Unpack

import torch
from torch import Tensor

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
from .._engine.dispatch import safe_sqrt
from .._engine.prepare import init
from .._engine.registration import check_fields, register_optimizer, state_class
from .._engine.rule import Slot, UpdateRule
from .._engine.update import update, update_


@state_class
class AdamWState(NamedTuple):
    """The state of `AdamW`: tensors only, in trees of the shape of the parameters.

    Attributes:
        step: How many updates were made: a float64 tensor of shape (), on the GPU if all
            parameters are on one, else on the CPU; with `step_per_leaf` a tree of them. In float64
            it counts on where float32 stops, at 2**24.
        exp_avg: The running mean of the gradients.
        exp_avg_sq: The running mean of their squares.
        max_exp_avg_sq: The largest `exp_avg_sq` so far; `()` unless amsgrad.
        key: A key of random bits: a float64 tensor of shape (); `()` unless
            `rounding="stochastic"`.
    """

    step: Tree
    exp_avg: Tree
    exp_avg_sq: Tree
    max_exp_avg_sq: Tree
    key: Tree = ()


class Coefficients(NamedTuple):
    """What the numbers of a step come to, in Adam as in AdamW."""

    beta2: Number
    gain1: Number  # 1 - beta1
    gain2: Number  # 1 - beta2
    decay: Number  # what decoupled weight decay leaves of the parameter
    weight_decay: Number
    descent: Number  # minus the learning rate after its bias correction
    correction2_root: Number
    eps: Number


def coefficients(numbers: Any, _options: Any) -> Coefficients:
    """Return what the numbers of a step come to, in float64."""
    step, lr, beta1, beta2, eps, weight_decay, *_ = numbers
    return Coefficients(
        beta2,
        1 - beta1,
        1 - beta2,
        1 - lr * weight_decay,
        weight_decay,
        -(lr / (1 - beta1**step)),
        (1 - beta2**step) ** 0.5,
        eps,
    )


def new_moments(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, own: Any
) -> tuple[Tensor, Tensor]:
    """Return the two running means after a gradient (negated if maximize).

    Of the coefficients it takes `beta2`, `gain1` and `gain2`.
    """
    squares = exp_avg_sq * own.beta2
    if isinstance(own.gain2, Tensor):
        squares = torch.addcmul(squares, grad * own.gain2, grad)
    else:
        squares = torch.addcmul(squares, grad, grad, value=own.gain2)
    return torch.lerp(exp_avg, grad, own.gain1), squares


def descend(
    param: Tensor, grad: Tensor, slots: tuple[Tensor, ...], own: Coefficients
) -> list[Tensor]:
    """Return a parameter, which weight decay has been at, and the slots after a gradient."""
    exp_avg, exp_avg_sq = new_moments(grad, slots[0], slots[1], own)
    maxima = [torch.maximum(largest, exp_avg_sq) for largest in slots[2:]]
    denominator = safe_sqrt(maxima[0] if maxima else exp_avg_sq) / own.correction2_root + own.eps
    return [
        torch.addcdiv(param, exp_avg * own.descent, denominator),
        exp_avg,
        exp_avg_sq,
        *maxima,
    ]


def descend_(param: Tensor, grad: Tensor, slots: tuple[Tensor, ...], own: Coefficients) -> None:
    """Do the same in place, which spares most of the memory that operators would ask for."""
    exp_avg, exp_avg_sq, *maxima = slots
    exp_avg.lerp_(grad, own.gain1)
    exp_avg_sq.mul_(own.beta2)
    if isinstance(own.gain2, Tensor):
        exp_avg_sq.addcmul_(grad * own.gain2, grad)
    else:
        exp_avg_sq.addcmul_(grad, grad, value=own.gain2)
    for largest in maxima:
        largest.copy_(torch.maximum(largest, exp_avg_sq))
    denominator = safe_sqrt(maxima[0] if maxima else exp_avg_sq)
    denominator.div_(own.correction2_root).add_(own.eps)
    if isinstance(own.descent, Tensor):
        param.addcdiv_(exp_avg * own.descent, denominator)
    else:
        param.addcdiv_(exp_avg, denominator, value=own.descent)


def _equations(
    param: Tensor, grad: Tensor, slots: tuple[Tensor, ...], own: Coefficients, options: Any
) -> list[Tensor]:
    """One step of one leaf, in the order of operations of torch.optim's single-tensor AdamW."""
    return descend(param * own.decay, -grad if options.maximize else grad, slots, own)


def _equations_(
    param: Tensor, grad: Tensor, slots: tuple[Tensor, ...], own: Coefficients, options: Any
) -> None:
    param.mul_(own.decay)
    descend_(param, -grad if options.maximize else grad, slots, own)


HYPERPARAMS = (
    Hyperparam("lr", AT_LEAST_ZERO),
    Hyperparam("beta1", BELOW_ONE, "betas[0]"),
    Hyperparam("beta2", BELOW_ONE, "betas[1]"),
    Hyperparam("eps", AT_LEAST_ZERO),
    Hyperparam("weight_decay", AT_LEAST_ZERO),
)
SLOTS = (Slot("exp_avg"), Slot("exp_avg_sq"), Slot("max_exp_avg_sq", option="amsgrad"))

_RULE = UpdateRule(
    state=AdamWState,
    slots=SLOTS,
    hyperparams=HYPERPARAMS,
    options=("amsgrad", "maximize"),
    coefficients=coefficients,
    equations=_equations,
    equations_=_equations_,
    kernels={
        "native": "funcopt.optimizers._native:ADAMW",
        "triton": "funcopt.optimizers._adam.triton:ADAMW_TRITON",
        "fused": "funcopt.optimizers._adam.kernels:ADAMW_FUSED",
        "foreach": "funcopt.optimizers._adam.kernels:ADAMW_FOREACH",
    },
    adjoint="funcopt.optimizers._adam.adjoint:ADAMW_ADJOINT",
    traits=ELEMENTWISE_BY_RULE,
)


@register_optimizer
@dataclass(frozen=True)
class AdamW:
    r"""Adam with decoupled weight decay.

    With gradient $g_t$, learning rate $\eta$ and weight decay $\lambda$,

    $$ m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
       v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, $$

    $$ \theta_t = \theta_{t-1} - \eta\lambda\,\theta_{t-1}
       - \eta\,\frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}. $$

    An `AdamW` is a frozen value and a pytree whose leaves are those hyperparameters that are
    tensors: map over it with vmap to sweep them, differentiate with respect to it to learn them.
    Two are equal if all they hold is, tensors by dtype, shape, device and values.
    Make such tensors in float64, to get the bits of the Python number, and on the CPU, also beside
    parameters on a GPU, where their value can be read without waiting. A learning rate on a GPU, as
    a schedule gives one there, is never read; the fused kernel takes it rounded to float32.

    The equations are those of Loshchilov and Hutter, *Decoupled Weight Decay Regularization*
    (ICLR 2019), with weight decay times the learning rate as in `torch.optim.AdamW`; amsgrad is
    from Reddi et al., *On the Convergence of Adam and Beyond* (ICLR 2018), with the maximum taken
    before the bias correction, again as in torch. On the CPU, in float32 and float64, the same
    kernel gives torch's bits; `"native"` gives those of torch's fused one on whole vectors, and
    rounds each element alike, wherever it lies. 16-bit leaves are computed in float32 by every
    kernel, so that zero gradients in float16 leave all but weight decay at rest, where torch's
    foreach gives NaN. A complex leaf is a pair of real ones.

    Args:
        lr: Learning rate: at least 0; a number, a 0-dim tensor, or a schedule, which is called with
            the count of updates made so far (0 at the first) and returns one of the others. Or a
            tree of these like the parameters, or like the top of them, for leaves of their own; in
            it, a tensor may also have the shape of its leaf, with a number for each element.
        betas: Decay rates of the two running means: each at least 0 and below 1, and each likewise
            a number, tensor or schedule. The bias corrections take the present value for all steps.
        eps: Added to the denominator: at least 0; likewise. At 0, a zero gradient at the first step
            gives 0 / 0.
        weight_decay: At least 0, multiplied by the learning rate; likewise.
        amsgrad: Divide by the largest second moment so far.
        maximize: Ascend instead of descending.
        step_per_leaf: Count the updates of each leaf, so that a leaf whose gradient is sometimes
            None has its own bias corrections, as in torch.optim; a schedule then sees each leaf's
            own count. Off: one count for the tree, advanced by every update.
        kernel: `"auto"` takes the fastest that is right for the tensors; `"native"` (CPU alone),
            `"fused"`, `"triton"` (CUDA alone), `"foreach"` and `"plain"` name one. Tracers and
            forward mode always see plain operators.
        differentiable: Whether plain autograd records an update. None: if a state tensor or a
            hyperparameter requires a gradient, or if a gradient depends on anything that does,
            other than these parameters. Under a transform of `torch.func` always.
        moments: The dtype of the moments: `"auto"` is float32 beside 16-bit parameters, else the
            parameter's; None is the parameter's, as in torch; or `torch.float32`, `torch.bfloat16`
            or `torch.float16`. In bfloat16 the second moment stalls: `v * 0.999` rounds back to v,
            so that it never falls, and rises to a quarter of its limit or to several times it.
        rounding: How what is kept in 16 bits is rounded, parameters as well as moments: `"nearest"`
            rounds a step below half a unit in the last place away; `"stochastic"` rounds up or down
            with the probability that makes the mean right. Which of them is a function of the key
            in the state, of the count, and of the place of an element in its leaf and of that in
            the tree, to the bit the same on each kernel and device. What is finite stays finite,
            and derivatives pass as through `"nearest"`. It looks at whole leaves, so that DTensors
            and `Zero1` are refused; `Compensated` serves these.
        seed: The key in a new state: a whole number of at least 0 and below 2**53, or a tensor,
            which may differ between the members of a vmap.

    Raises:
        TypeError: If a hyperparameter is of the wrong type.
        ValueError: If one is out of range, NaN or infinite.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.AdamW(lr=0.1)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = opt.init(params)
        >>> params, state = opt.update({"w": torch.tensor([0.5, -0.5])}, state, params)
        >>> params
        {'w': tensor([0.8990, 2.0980])}
    """

    rule: ClassVar[UpdateRule] = _RULE

    lr: Number | Schedule | NumberTree = 1e-3
    betas: tuple[Number | Schedule | NumberTree, Number | Schedule | NumberTree] = (0.9, 0.999)
    eps: Number | Schedule | NumberTree = 1e-8
    weight_decay: Number | Schedule | NumberTree = 1e-2
    amsgrad: bool = False
    maximize: bool = False
    step_per_leaf: bool = False
    kernel: Literal["auto", "native", "triton", "fused", "foreach", "plain"] = "auto"
    differentiable: bool | None = None
    moments: torch.dtype | Literal["auto"] | None = "auto"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: Number = 0

    def __post_init__(self) -> None:
        """Check and normalize every hyperparameter."""
        check_fields(self)

    def init(self, params: Tree) -> AdamWState:
        """Return the state before the first update: zeros.

        Example:
            >>> import torch, funcopt
            >>> funcopt.AdamW().init([torch.ones(2)])  # doctest: +NORMALIZE_WHITESPACE
            AdamWState(step=tensor(0., dtype=torch.float64), exp_avg=[tensor([0., 0.])],
                       exp_avg_sq=[tensor([0., 0.])], max_exp_avg_sq=(), key=())
        """
        state: AdamWState = init(self, params)
        return state

    def update(
        self, grads: Tree, state: AdamWState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, AdamWState]:
        """Return the new parameters and the new state, in fresh memory.

        Example:
            >>> import torch, funcopt
            >>> opt = funcopt.AdamW(lr=1e-2)
            >>> params = [torch.ones(2), torch.ones(2)]
            >>> state = opt.init(params)
            >>> params, state = opt.update([torch.ones(2), None], state, params)
            >>> params
            [tensor([0.9899, 0.9899]), tensor([1., 1.])]
        """
        return update(self, grads, state, params)

    def update_(
        self, grads: Tree, state: AdamWState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, AdamWState]:
        """Do the same as `update`, written into `params` and `state`, which are returned.

        Example:
            >>> import torch, funcopt
            >>> opt = funcopt.AdamW(lr=0.1)
            >>> w = torch.nn.Parameter(torch.ones(2))
            >>> state = opt.init(w)
            >>> _ = opt.update_(torch.ones(2), state, w)
            >>> w
            Parameter containing:
            tensor([0.8990, 0.8990], requires_grad=True)
        """
        return update_(self, grads, state, params)
