r"""The adjoint of a step: how cotangents of its results become cotangents of what went in.

With $D = \sqrt{\hat v_t} / \sqrt{b_2} + \epsilon$, $u = m_t / D$, $a = \eta / b_1$, where $b_1$ and
$b_2$ are the bias corrections, and a bar over what a cotangent belongs to:

$$ \bar D = a\,\bar\theta_t\,u / D \qquad
   \bar{\hat v} \mathrel{+}= \bar D / (2 \sqrt{b_2 \hat v}) \qquad
   \bar m \mathrel{+}= -a\,\bar\theta_t / D $$

$$ \bar\theta_{t-1} = (1 - \eta\lambda)\,\bar\theta_t \qquad
   \bar m_{t-1} = \beta_1 \bar m \qquad \bar v_{t-1} = \beta_2 \bar v \qquad
   \bar g = (1 - \beta_1)\,\bar m + 2 (1 - \beta_2)\,g\,\bar v $$

It is written in plain differentiable operators, so that it has an adjoint of its own. What is kept
is what went into the step; the moments after it are computed again, in the precision of the step.
Those that were stored may have been rounded to 16 bits, and the moments before the step could not
be had from them at all where beta = 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from .._types import Number
from ._operands import Leaves, Scalars, Variant, compute_dtype, fit
from .plain import Corrections, double, new_moments, root

__all__ = ["Saved", "adjoint"]


class Saved(NamedTuple):
    """What is kept between a step and its adjoint: the gradient and, at the least, two moments."""

    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]  # empty unless amsgrad
    params: list[Tensor]  # empty unless the derivative of lr or weight decay is wanted


def adjoint(
    saved: Saved,
    scalars: Scalars,
    variant: Variant,
    needs: Scalars,
    cotangents: list[list[Tensor | None]],
) -> tuple[list[Tensor | None], list[list[Tensor | None]]]:
    """Return the cotangents of the numbers and of the leaves before the step.

    Args:
        saved: What the step kept.
        scalars: The numbers of the step.
        variant: What is fixed.
        needs: For each number, whether its cotangent is wanted.
        cotangents: The cotangents of the columns of `Moved`; None stands for zeros.

    Returns:
        In the order of `Scalars` and of `Leaves`, with None for what is zero or unwanted.
    """
    corrections = Corrections(scalars)
    of_numbers: dict[str, Tensor] = {}
    of_leaves: list[list[Tensor | None]] = [[] for _ in Leaves._fields]
    for index, grad in enumerate(saved.grads):
        leaf = _step_again([_widen(column, index) for column in saved], scalars, variant)
        after = [_widen(column, index) for column in cotangents]
        pulled = _pull_back(leaf, after, scalars, corrections)
        before = _before(leaf, pulled, scalars, variant)
        for column, cotangent in zip(of_leaves, before, strict=False):
            column.append(None if cotangent is None else cotangent.to(grad.dtype))
        for name, part in _of_numbers(leaf, pulled, scalars, corrections, needs):
            total = _sum_to(part, getattr(scalars, name))
            of_numbers[name] = of_numbers[name] + total if name in of_numbers else total
    return [of_numbers.get(name) for name in Scalars._fields], of_leaves


class _Leaf(NamedTuple):
    """One leaf, in the dtype to compute in: what went into the step, and what came of it."""

    grad: Tensor  # negated if maximize
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    param: Any  # a tensor if the derivative of lr or weight decay is wanted, else None
    new_exp_avg: Tensor
    new_exp_avg_sq: Tensor
    largest: Tensor


class _Pulled(NamedTuple):
    """The cotangents after the step of one leaf, each with everything that depends on it."""

    param: Tensor | None
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    old_max_exp_avg_sq: Tensor | None
    direction: Tensor  # u
    denominator: Tensor | None  # the cotangent of D


def _widen(column: list[Any], index: int) -> Any:
    tensor = column[index] if column else None
    return None if tensor is None else tensor.to(compute_dtype(tensor.dtype))


def _step_again(column: list[Any], scalars: Scalars, variant: Variant) -> _Leaf:
    grad, exp_avg, exp_avg_sq, max_exp_avg_sq, param = column
    if variant.maximize:
        grad = -grad
    moments = new_moments(grad, exp_avg, exp_avg_sq, scalars)
    largest = moments[1] if max_exp_avg_sq is None else torch.maximum(max_exp_avg_sq, moments[1])
    return _Leaf(grad, exp_avg, exp_avg_sq, max_exp_avg_sq, param, *moments, largest)


def _pull_back(
    leaf: _Leaf, cotangents: list[Tensor | None], scalars: Scalars, corrections: Corrections
) -> _Pulled:
    of_param, of_exp_avg, of_exp_avg_sq, of_max = cotangents
    correction2_root = fit(corrections.correction2_root, leaf.largest)
    denominator = root(leaf.largest) / correction2_root + fit(scalars.eps, leaf.largest)
    direction = leaf.new_exp_avg / denominator
    of_denominator = of_largest = None
    if of_param is not None:
        ratio = of_param * fit(corrections.step_size, of_param) / denominator
        of_denominator = ratio * direction
        of_exp_avg = _add(of_exp_avg, -ratio)
        of_largest = of_denominator * _half_inverse_root(leaf.largest) / correction2_root
    if leaf.max_exp_avg_sq is None:
        of_exp_avg_sq = _add(of_exp_avg_sq, of_largest)
    elif (of_max := _add(of_max, of_largest)) is not None:
        share = _share_of_new(leaf.new_exp_avg_sq, leaf.max_exp_avg_sq)
        of_exp_avg_sq = _add(of_exp_avg_sq, of_max * share)
        of_max = of_max * (1 - share)
    return _Pulled(of_param, of_exp_avg, of_exp_avg_sq, of_max, direction, of_denominator)


def _half_inverse_root(squares: Tensor) -> Tensor:
    """The derivative of `plain.root`: zero at zero, and no infinity on the way back either."""
    zero = squares == 0
    return 0.5 * squares.masked_fill(zero, 1.0).rsqrt().masked_fill(zero, 0.0)


def _share_of_new(new: Tensor, old: Tensor) -> Tensor:
    """How much of the maximum is the new second moment: all, none or, at a tie, half (as torch)."""
    return 0.5 * ((new > old).to(new.dtype) + (new >= old).to(new.dtype))


def _before(
    leaf: _Leaf, pulled: _Pulled, scalars: Scalars, variant: Variant
) -> tuple[Tensor | None, ...]:
    """The cotangents of the leaf before the step, in the order of `Leaves`."""
    decay = 1 - double(scalars.lr) * double(scalars.weight_decay)
    beta1, beta2 = double(scalars.beta1), double(scalars.beta2)
    through_avg = _times(pulled.exp_avg, 1 - beta1)
    through_sq = _times(pulled.exp_avg_sq, 2 * (1 - beta2))
    of_grad = _add(through_avg, None if through_sq is None else through_sq * leaf.grad)
    if variant.maximize and of_grad is not None:
        of_grad = -of_grad
    return (
        _times(pulled.param, decay),
        of_grad,
        _times(pulled.exp_avg, beta1),
        _times(pulled.exp_avg_sq, beta2),
        *((pulled.old_max_exp_avg_sq,) if variant.amsgrad else ()),
    )


def _of_numbers(
    leaf: _Leaf,
    pulled: _Pulled,
    scalars: Scalars,
    corrections: Corrections,
    needs: Scalars,
) -> Iterator[tuple[str, Tensor]]:
    """The wanted cotangents of the numbers, as far as they come of one leaf, before summing."""
    step, lr, beta1, beta2, _, weight_decay = map(double, scalars)
    if needs.beta1 and pulled.exp_avg is not None:
        yield "beta1", pulled.exp_avg * (leaf.exp_avg - leaf.grad)
    if needs.beta2 and pulled.exp_avg_sq is not None:
        yield "beta2", pulled.exp_avg_sq * (leaf.exp_avg_sq - leaf.grad**2)
    if pulled.param is None or pulled.denominator is None:
        return
    descent = -pulled.param * pulled.direction
    if needs.lr:
        yield "lr", _times(descent, 1 / corrections.correction1)
        yield "lr", _times(-pulled.param * leaf.param, weight_decay)
    if needs.weight_decay:
        yield "weight_decay", _times(-pulled.param * leaf.param, lr)
    if needs.eps:
        yield "eps", pulled.denominator
    if needs.beta1:  # through the first bias correction, and so on below through the second
        yield "beta1", _times(descent, lr * step * beta1 ** (step - 1) / corrections.correction1**2)
    if needs.beta2:
        slope = step * beta2 ** (step - 1) / (2 * corrections.correction2_root**3)
        yield "beta2", _times(pulled.denominator * root(leaf.largest), slope)


def _add(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


@overload
def _times(tensor: Tensor, number: Number) -> Tensor: ...
@overload
def _times(tensor: Tensor | None, number: Number) -> Tensor | None: ...
def _times(tensor: Tensor | None, number: Number) -> Tensor | None:
    return None if tensor is None else tensor * fit(number, tensor)


def _sum_to(part: Tensor, number: Tensor) -> Tensor:
    """Sum over everything that a number was spread over."""
    shape = number.shape + (1,) * (part.ndim - number.ndim)
    return part.sum_to_size(shape).reshape(number.shape).to(number.device, number.dtype)
