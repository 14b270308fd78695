"""Adafactor: its state, its equations, its rules, and the optimizer as a value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core import tensors
from .._core.tensors import double, fit, norms
from .._core.types import (
    AT_LEAST_ZERO,
    Extras,
    Hyperparam,
    Number,
    NumberTree,
    ParamsT,
    Range,
    Schedule,
    Traits,
    Tree,
)
from .._engine import kernels
from .._engine.dispatch import safe_sqrt
from .._engine.prepare import init
from .._engine.registration import check_fields, register_optimizer, state_class
from .._engine.rule import Slot, StepInputs, UpdateRule
from .._engine.update import update, update_


@state_class
class AdafactorState(NamedTuple):
    """The state of `Adafactor`: tensors only, in trees of the structure of the parameters.

    A leaf of two or more dimensions has factors of the second moment and an empty `variance`, of
    shape (0,). One of fewer has a `variance`, and its factors are empty.

    Attributes:
        step: How many updates were made, as in `AdamWState`.
        row_var: The running mean of the squares of the gradients over each row, of shape
            (..., n, 1) beside a parameter of shape (..., n, m).
        col_var: The same over each column, of shape (..., 1, m).
        variance: The running mean of the squares themselves.
        key: A key of random bits, as in `AdamWState`.
    """

    step: Tree
    row_var: Tree
    col_var: Tree
    variance: Tree
    key: Tree = ()


class Coefficients(NamedTuple):
    """What the numbers of a step come to."""

    gain: Number  # 1 - beta2, which falls with the count
    rate: Number  # the step, as a share of the size of the leaf
    decay: Number  # what weight decay leaves of the parameter
    eps1: Number | None  # None is the machine epsilon of the leaf
    eps2: Number
    d: Number


def coefficients(numbers: Any, _options: Any) -> Coefficients:
    """Return what the numbers of a step come to, in float64."""
    step, lr, beta2_decay, eps1, eps2, d, weight_decay, *_ = numbers
    rate = _smaller(lr, 1 / step**0.5)
    return Coefficients(step**beta2_decay, rate, 1 - lr * weight_decay, eps1, eps2, d)


def _coefficients_by_dtype(numbers: Any, _options: Any) -> Coefficients:
    step, lr, beta2_decay, eps2, *others = numbers
    return coefficients((step, lr, beta2_decay, None, eps2, *others), _options)


def _smaller(one: Number, other: Number) -> Number:
    if isinstance(one, Tensor):
        return torch.minimum(one, other) if isinstance(other, Tensor) else one.clamp(max=other)
    return other.clamp(max=one) if isinstance(other, Tensor) else min(one, other)


def _equations(
    param: Tensor, grad: Tensor, slots: tuple[Tensor, ...], own: Coefficients, options: Any
) -> list[Tensor]:
    """One step of one leaf, whole."""
    row_var, col_var, variance = slots
    grad = -grad if options.maximize else grad
    eps1 = torch.finfo(param.dtype).eps if own.eps1 is None else own.eps1
    rate = _at_least(_root_mean_square(param), own.eps2) * own.rate
    squares = grad.square()
    if grad.ndim > 1:
        row_var = torch.lerp(row_var, _mean(squares, -1), own.gain)
        col_var = torch.lerp(col_var, _mean(squares, -2), own.gain)
        # Divided first, as the product of two means of small squares could vanish.
        estimate = row_var / _at_least(_mean(row_var, -2), eps1) * col_var
    else:
        variance = estimate = torch.lerp(variance, squares, own.gain)
    # The root is clamped and not what it is of, as the square of a small eps1 would be 0.
    step = grad / _at_least(safe_sqrt(estimate), eps1)
    rate = rate / _at_least(_root_mean_square(step) / own.d, 1.0)
    return [param * own.decay - step * rate, row_var, col_var, variance]


def _at_least(tensor: Tensor, bound: Any) -> Tensor:
    return torch.clamp(tensor, min=bound)


def _root_mean_square(tensor: Tensor) -> Tensor:
    return safe_sqrt(tensor.square().sum() / max(tensor.numel(), 1))


def _mean(tensor: Tensor, dim: int) -> Tensor:
    """Return the mean along a dimension, and 0 of nothing."""
    return tensor.sum(dim, keepdim=True) / max(tensor.shape[dim], 1)


def _foreach_(
    coefficients_of: Callable[[Any, Any], Coefficients],
    inputs: StepInputs,
    numbers: Any,
    options: Any,
) -> None:
    """Make the step in place: of vectors by one call for all, of matrices one after another."""
    params, grads, (row_vars, col_vars, variances), _ = inputs
    if not params:
        return
    own = coefficients_of(numbers._make(map(double, numbers)), options)
    eps1 = torch.finfo(params[0].dtype).eps if own.eps1 is None else own.eps1
    sizes = _sizes(params)
    if options.maximize:
        grads = list(torch._foreach_neg(grads))
    vectors = [index for index, grad in enumerate(grads) if grad.ndim < 2]
    steps = list(grads)
    if vectors:
        few = [grads[i] for i in vectors], [variances[i] for i in vectors]
        made = _of_vectors(*few, own.gain, eps1)
        for index, step in zip(vectors, made, strict=True):
            steps[index] = step
    for index, grad in enumerate(grads):
        if grad.ndim > 1:
            steps[index] = _of_matrix(grad, row_vars[index], col_vars[index], own.gain, eps1)
    rates = sizes.clamp_(min=fit(own.eps2, sizes)).mul_(fit(own.rate, sizes))
    rates /= (_sizes(steps) / fit(own.d, sizes)).clamp_(min=1.0)
    if isinstance(own.decay, Tensor) or own.decay != 1.0:
        torch._foreach_mul_(params, fit(own.decay, params[0]))
    torch._foreach_mul_(steps, rates.tolist() if rates.is_cpu else list(rates.unbind()))
    torch._foreach_sub_(params, steps)


def _of_vectors(
    grads: list[Tensor], variances: list[Tensor], gain: Number, eps1: Number
) -> list[Tensor]:
    """Write the second moments of vectors, and return what the gradients come to by them."""
    tensors.lerp_(variances, list(torch._foreach_mul(grads, grads)), gain)
    steps = list(torch._foreach_sqrt(variances))
    if isinstance(eps1, Tensor):
        steps = [step.clamp_(min=fit(eps1, step)) for step in steps]
    else:
        torch._foreach_clamp_min_(steps, eps1)
    return list(torch._foreach_div(grads, steps))


def _of_matrix(
    grad: Tensor, row_var: Tensor, col_var: Tensor, gain: Number, eps1: Number
) -> Tensor:
    """Write the factors of a matrix, and return what its gradient comes to by them."""
    squares = grad.square()
    for factor, dim in ((row_var, -1), (col_var, -2)):
        factor.lerp_(_mean(squares, dim), fit(gain, factor))
    share = row_var / _at_least(_mean(row_var, -2), eps1)
    estimate = torch.mul(share, col_var, out=squares)
    return torch.div(grad, estimate.sqrt_().clamp_(min=fit(eps1, grad)), out=squares)


def _sizes(leaves: list[Tensor]) -> Tensor:
    """Return the root mean square of each leaf, one after another."""
    roots = [max(leaf.numel(), 1) ** 0.5 for leaf in leaves]
    return torch.stack(list(torch._foreach_div(norms(leaves, 2.0), roots)))


def _row_shape(shape: torch.Size) -> tuple[int, ...]:
    return (*shape[:-1], 1) if len(shape) > 1 else (0,)


def _col_shape(shape: torch.Size) -> tuple[int, ...]:
    return (*shape[:-2], 1, shape[-1]) if len(shape) > 1 else (0,)


def _variance_shape(shape: torch.Size) -> tuple[int, ...]:
    return (0,) if len(shape) > 1 else tuple(shape)


_AT_MOST_ZERO = Range("must be finite and at most 0", lambda value: -math.inf < value <= 0.0)
_AT_LEAST_ONE = Range("must be finite and at least 1", lambda value: 1.0 <= value < math.inf)
_EPS1 = Hyperparam("eps1", AT_LEAST_ZERO, "eps[0]")
_HYPERPARAMS = (
    Hyperparam("lr", AT_LEAST_ZERO),
    Hyperparam("beta2_decay", _AT_MOST_ZERO),
    _EPS1,
    Hyperparam("eps2", AT_LEAST_ZERO, "eps[1]"),
    Hyperparam("d", _AT_LEAST_ONE),
    Hyperparam("weight_decay", AT_LEAST_ZERO),
)


_PATHS = {own.name: own.path for own in _HYPERPARAMS}
_NEEDED = ("mul", "mul_", "sub_", "neg", "sqrt", "div", "clamp_min_")


def _rule(*, eps1: bool) -> UpdateRule:
    """Return the rule with a number eps1, or without."""
    coefficients_of = coefficients if eps1 else _coefficients_by_dtype
    step_ = partial(_foreach_, coefficients_of)
    return UpdateRule(
        state=AdafactorState,
        slots=(
            Slot("row_var", shape_of=_row_shape),
            Slot("col_var", shape_of=_col_shape),
            Slot("variance", shape_of=_variance_shape),
        ),
        hyperparams=tuple(own for own in _HYPERPARAMS if eps1 or own is not _EPS1),
        options=("maximize",),
        coefficients=coefficients_of,
        equations=_equations,
        kernels={"foreach": kernels.foreach(step_, _NEEDED, _PATHS)},
        traits=Traits(leafwise=True, linear=True),
        real_only=True,
    )


class _RuleByEps:
    """What an `Adafactor` has as `rule`: one without a number eps1 if that is None.

    Of the class itself, which has that default, it is the one without.
    """

    def __init__(self) -> None:
        self.by_dtype, self.by_number = _rule(eps1=False), _rule(eps1=True)
        self.traits = self.by_dtype.traits

    def __get__(self, opt: Any, owner: type) -> UpdateRule:
        return self.by_dtype if opt is None or opt.eps[0] is None else self.by_number


@register_optimizer
@dataclass(frozen=True)
class Adafactor:
    r"""Adafactor: the second moment of a matrix kept as a row and a column.

    With gradient $g_t$, learning rate $\eta$, weight decay $\lambda$, and
    $\mathrm{rms}(x) = \sqrt{\mathrm{mean}(x^2)}$ over a whole leaf,

    $$ \gamma_t = t^{\tau}, \qquad
       \alpha_t = \max(\epsilon_2, \mathrm{rms}(\theta_{t-1}))\,\min(\eta, 1 / \sqrt t). $$

    A leaf of two or more dimensions is taken as matrices in its last two. With means over the
    columns $j$ of each row, and over the rows $i$ of each column,

    $$ r_t = (1 - \gamma_t)\,r_{t-1} + \gamma_t\,\mathrm{mean}_j(g_t^2), \qquad
       c_t = (1 - \gamma_t)\,c_{t-1} + \gamma_t\,\mathrm{mean}_i(g_t^2), \qquad
       v_t = \frac{r_t\,c_t}{\max(\mathrm{mean}_i(r_t), \epsilon_1)}. $$

    A leaf of fewer dimensions keeps $v_t = (1 - \gamma_t)\,v_{t-1} + \gamma_t\,g_t^2$ itself. Then

    $$ u_t = \frac{g_t}{\max(\sqrt{v_t}, \epsilon_1)}, \qquad
       \theta_t = (1 - \eta\lambda)\,\theta_{t-1}
       - \frac{\alpha_t\,u_t}{\max(1, \mathrm{rms}(u_t) / d)}. $$

    So a matrix of n by m has n + m numbers of state, where `AdamW` has 2 n m. An `Adafactor` is a
    frozen value and a pytree whose leaves are those hyperparameters that are tensors: map over it
    with vmap to sweep them, differentiate with respect to it to learn them.

    The algorithm is that of Shazeer and Stern, *Adafactor: Adaptive Learning Rates with Sublinear
    Memory Cost* (ICML 2018), as `torch.optim.Adafactor` has it: $\epsilon_1$ bounds what is divided
    by, where the paper adds it to the squares; $\eta$, which in the paper is 0.01, is also what
    weight decay is multiplied by; and there is no first moment. Results differ from torch's by
    rounding: in float32 and float64 by a few units in the last place in a hundred steps. They
    differ beyond that in two places. Where `eps[0]` is so small that its square is 0, torch gives
    NaN for a zero gradient, and this does not. And 16-bit leaves are computed in float32, with the
    $\epsilon_1$ and, unless `moments` says otherwise, the state of that dtype, where torch takes
    those of 16 bits; of a param group of several dtypes, torch takes the $\epsilon_1$ of the first.

    Leaves are seen whole: they must not be sharded, and how a leaf is cut into several makes a
    difference. Complex leaves are refused, as in torch.

    Args:
        lr: The largest rate by which a leaf moves, relative to its size: at least 0; a number, a
            0-dim tensor, or a schedule, as for `AdamW`. From update number `1 / lr**2` on, the rate
            is `1 / sqrt(t)`.
        beta2_decay: The exponent by which the weight of a new gradient falls: at most 0; likewise.
            At 0, the second moment is that of the last gradient alone.
        eps: A pair. The first is the least that gradients are divided by: at least 0, and likewise
            a number, tensor or schedule; or None, which is the machine epsilon of the dtype that a
            leaf is computed in, 2**-23 in float32. At 0, a zero gradient gives 0 / 0. The second is
            the least size that a leaf is taken to have, by which one of zeros moves at all: at
            least 0; likewise a number, tensor or schedule.
        d: How large the root mean square of what a leaf is moved by may be before the rate is
            applied: at least 1; likewise.
        weight_decay: At least 0, times the learning rate taken from the parameter; likewise.
        maximize: Ascend instead of descending.
        step_per_leaf: Count the updates of each leaf, so that a leaf whose gradient is sometimes
            None has its own rates, as in torch.optim; a schedule then sees each leaf's own count.
            Off: one count for the tree, advanced by every update.
        kernel: `"auto"` takes the fastest that is right for the tensors; `"foreach"` and `"plain"`
            name one. Tracers, transforms and derivatives always see plain operators.
        differentiable: Whether plain autograd records an update, as for `AdamW`.
        moments: The dtype of the state's factors and variances, as for `AdamW`.
        rounding: How what is kept in 16 bits is rounded, as for `AdamW`.
        seed: The key of a new state where `rounding` is `"stochastic"`, as for `AdamW`.

    Raises:
        TypeError: If a hyperparameter is of the wrong type.
        ValueError: If one is out of range, NaN or infinite.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.Adafactor(lr=0.1)
        >>> params = {"w": torch.ones(2, 3), "b": torch.zeros(3)}
        >>> state = opt.init(params)
        >>> params, state = opt.update({"w": torch.ones(2, 3), "b": torch.ones(3)}, state, params)
        >>> params["w"][0], state.row_var["w"].shape, state.col_var["w"].shape
        (tensor([0.9000, 0.9000, 0.9000]), torch.Size([2, 1]), torch.Size([1, 3]))
    """

    rule: ClassVar[_RuleByEps] = _RuleByEps()

    lr: Number | Schedule | NumberTree = 1e-2
    beta2_decay: Number | Schedule | NumberTree = -0.8
    eps: tuple[Number | Schedule | NumberTree | None, Number | Schedule | NumberTree] = (None, 1e-3)
    d: Number | Schedule | NumberTree = 1.0
    weight_decay: Number | Schedule | NumberTree = 0.0
    maximize: bool = False
    step_per_leaf: bool = False
    kernel: str = "auto"
    differentiable: bool | None = None
    moments: torch.dtype | str | None = "auto"
    rounding: str = "nearest"
    seed: Number = 0

    def __post_init__(self) -> None:
        """Check and normalize every hyperparameter."""
        if not isinstance(self.eps, tuple | list) or len(self.eps) != 2:
            raise TypeError(f"eps={self.eps!r}: must be a pair, such as (None, 0.001).")
        object.__setattr__(self, "eps", tuple(self.eps))  # by which the rule is chosen
        check_fields(self)

    def init(self, params: Tree) -> AdafactorState:
        """Return the state before the first update: zeros."""
        state: AdafactorState = init(self, params)
        return state

    def update(
        self, grads: Tree, state: AdafactorState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, AdafactorState]:
        """Return the new parameters and the new state, in fresh memory."""
        return update(self, grads, state, params)

    def update_(
        self, grads: Tree, state: AdafactorState, params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, AdafactorState]:
        """Do the same as `update`, written into `params` and `state`, which are returned."""
        return update_(self, grads, state, params)
