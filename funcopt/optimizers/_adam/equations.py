r"""The equations in plain differentiable operators: the definition, and what every tracer sees.

With gradient $g_t$ (negated if maximize), moments $m$ and $v$, and $\hat v = v$ or, for amsgrad,
its running maximum:

$$ m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad
   v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 $$

$$ \theta_t = (1 - \eta\lambda)\,\theta_{t-1} - \frac{\eta}{1 - \beta_1^t}\,
   \frac{m_t}{\sqrt{\hat v_t} / \sqrt{1 - \beta_2^t} + \epsilon} $$

The order of the operations is that of torch.optim's single-tensor AdamW, so that in float32 and
float64 the bits are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..._core import transforms
from ..._core.types import Number
from ..._engine.rule import Leaves, Moved, Scalars, Variant, compute_dtype, fit, for_each, write_all

__all__ = ["Corrections", "Gains", "double", "new_moments", "refusal", "root", "step", "step_"]


def double(number: Number) -> Number:
    """Return a number in float64, as Python's are: `1 - beta**t` loses its digits in less."""
    return number.double() if isinstance(number, Tensor) else number


def root(squares: Tensor) -> Tensor:
    """The square root, with derivative zero at zero.

    There `sqrt` has an infinite one, and infinity times a zero gradient is NaN; but at zero the
    second moment does not move the parameter to first order, so zero is also the true value. The
    first fill keeps the infinity out of the backward pass, the second sets the value.
    """
    if not transforms.followed((squares,)):
        return squares.sqrt()
    zero = squares == 0
    return squares.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


class Corrections:
    """The two bias corrections of a step, and the step size that comes of the first."""

    __slots__ = ("correction1", "correction2_root", "step_size")

    def __init__(self, scalars: Scalars) -> None:
        step, beta1, beta2 = double(scalars.step), double(scalars.beta1), double(scalars.beta2)
        self.correction1: Number = 1 - beta1**step
        self.correction2_root: Number = (1 - beta2**step) ** 0.5
        self.step_size: Number = double(scalars.lr) / self.correction1


def step(leaves: Leaves, scalars: Scalars | list[Scalars], variant: Variant) -> Moved:
    """Return the leaves after one step, with the same numbers or each with its own."""
    moved = Moved([], [], [], [])
    stored = [param.dtype for param in leaves.params]
    for dtype, (column, fitted) in zip(stored, _each(leaves, scalars), strict=True):
        stepped = _step_one(column, fitted, variant)
        if dtype is not stepped[0].dtype:
            stepped = [tensor.to(dtype) for tensor in stepped]
        for tensors, tensor in zip(moved, stepped, strict=False):
            tensors.append(tensor)
    return moved


def step_(leaves: Leaves, scalars: Scalars, variant: Variant) -> None:
    """Move the leaves in place, with the same numbers, where nobody may follow the operators."""
    if not transforms.all_plain(chain.from_iterable(leaves)):
        # A subclass may lack operators in place, or return copies of what it holds.
        write_all(leaves, step(leaves, scalars, variant))
        return
    for index, (column, fitted) in enumerate(_each(leaves, scalars)):
        _step_one_(column, fitted, variant)
        own = [tensors[index] for tensors in leaves if tensors]
        if own[0] is not column[0]:  # computed in another dtype
            for old, new in zip(own, column, strict=True):
                if old is not leaves.grads[index]:
                    old.copy_(new)


def _each(
    leaves: Leaves, scalars: Scalars | list[Scalars]
) -> Iterator[tuple[list[Tensor], _Fitted]]:
    """Yield the tensors of each leaf in the dtype to compute in, and the numbers to fit them."""
    corrections: dict[int, Corrections] = {}
    fitted: dict[object, _Fitted] = {}
    for index, own in enumerate(for_each(scalars, len(leaves.params))):
        column = [tensors[index] for tensors in leaves if tensors]
        param = column[0]
        computed = compute_dtype(param.dtype)
        if param.dtype is not computed:
            column = [tensor.to(computed) for tensor in column]
        # A tracer pays for every operator, so the numbers are made to fit once for leaves alike.
        alike = id(own), computed, param.device, param.ndim
        if alike not in fitted:
            if id(own) not in corrections:
                corrections[id(own)] = Corrections(own)
            fitted[alike] = _Fitted.to(column[0], own, corrections[id(own)])
        yield column, fitted[alike]


class Gains(NamedTuple):
    """The numbers of the running means, so that they combine with leaves alike."""

    beta2: Number
    gain1: Number  # 1 - beta1
    gain2: Number  # 1 - beta2

    @classmethod
    def to(cls, leaf: Tensor, scalars: Scalars) -> Gains:
        """Make the numbers fit a leaf."""
        gain1, gain2 = 1 - double(scalars.beta1), 1 - double(scalars.beta2)
        return cls(fit(scalars.beta2, leaf), fit(gain1, leaf), fit(gain2, leaf))


class _Fitted(NamedTuple):
    """All numbers of a step, so that they combine with leaves alike."""

    gains: Gains
    decay: Number
    descent: Number  # minus the step size
    correction2_root: Number
    eps: Number

    @classmethod
    def to(cls, leaf: Tensor, scalars: Scalars, corrections: Corrections) -> _Fitted:
        return cls(
            Gains.to(leaf, scalars),
            fit(1 - double(scalars.lr) * double(scalars.weight_decay), leaf),
            fit(-corrections.step_size, leaf),
            fit(corrections.correction2_root, leaf),
            fit(scalars.eps, leaf),
        )


def _step_one(column: list[Tensor], fitted: _Fitted, variant: Variant) -> list[Tensor]:
    param, grad, exp_avg, exp_avg_sq, *maxima = column
    if variant.maximize:
        grad = -grad
    exp_avg, exp_avg_sq = new_moments(grad, exp_avg, exp_avg_sq, fitted.gains)
    if variant.amsgrad:
        maxima = [torch.maximum(maxima[0], exp_avg_sq)]
    largest = maxima[0] if variant.amsgrad else exp_avg_sq
    denominator = root(largest) / fitted.correction2_root + fitted.eps
    param = torch.addcdiv(param * fitted.decay, exp_avg * fitted.descent, denominator)
    return [param, exp_avg, exp_avg_sq, *maxima]


def _step_one_(column: list[Tensor], fitted: _Fitted, variant: Variant) -> None:
    """Do the same in place, which spares most of the memory that operators would ask for."""
    param, grad, exp_avg, exp_avg_sq, *maxima = column
    beta2, gain1, gain2 = fitted.gains
    if variant.maximize:
        grad = -grad
    exp_avg.lerp_(grad, gain1)
    exp_avg_sq.mul_(beta2)
    if isinstance(gain2, Tensor):
        exp_avg_sq.addcmul_(grad * gain2, grad)
    else:
        exp_avg_sq.addcmul_(grad, grad, value=gain2)
    for largest in maxima:
        largest.copy_(torch.maximum(largest, exp_avg_sq))
    denominator = root(maxima[0] if maxima else exp_avg_sq)
    denominator.div_(fitted.correction2_root).add_(fitted.eps)
    param.mul_(fitted.decay)
    if isinstance(fitted.descent, Tensor):
        param.addcdiv_(exp_avg * fitted.descent, denominator)
    else:
        param.addcdiv_(exp_avg, denominator, value=fitted.descent)


def refusal(_device: torch.device, _scalars: Scalars | None) -> str | None:
    """Refuse nothing: operators serve whatever device, number or tensor subclass torch does."""
    return None


def new_moments(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gains: Gains
) -> tuple[Tensor, Tensor]:
    """Return the two running means after a gradient (negated if maximize)."""
    squares = exp_avg_sq * gains.beta2
    if isinstance(gains.gain2, Tensor):
        squares = torch.addcmul(squares, grad * gains.gain2, grad)
    else:
        squares = torch.addcmul(squares, grad, grad, value=gains.gain2)
    return torch.lerp(exp_avg, grad, gains.gain1), squares
