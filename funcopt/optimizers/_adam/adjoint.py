r"""The adjoint of a step: how cotangents of its results become cotangents of what went in.

With $r = \sqrt{\hat v_t}$ and $c = \sqrt{b_2}$ the denominator of the step is
$D = r / c + \epsilon = E / c$, where $E = r + c\,\epsilon$. With $a = \eta / b_1$, the bias
corrections $b_1$ and $b_2$, and a bar over what a cotangent belongs to:

$$ q = \bar\theta_t / E \qquad w = m_t / E \qquad
   \bar m \mathrel{+}= -a\,c\,q \qquad
   \bar{\hat v} \mathrel{+}= \frac{a\,c}{2}\,\frac{q\,w}{r} $$

$$ \bar\theta_{t-1} = (1 - \eta\lambda)\,\bar\theta_t \qquad
   \bar m_{t-1} = \beta_1 \bar m \qquad \bar v_{t-1} = \beta_2 \bar v \qquad
   \bar g = (1 - \beta_1)\,\bar m + 2 (1 - \beta_2)\,g\,\bar v $$

A number has the sum of what comes of all elements that it was spread over (`_of_numbers`,
`_sum_to`); of the learning rate that is

$$ \bar\eta = -\sum \bar\theta_t \left( \frac{c}{b_1}\,w + \lambda\,\theta_{t-1} \right). $$

It is written in plain differentiable operators, so that it has an adjoint of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ..._core import transforms
from ..._core.tensors import compute_dtype, double, fit
from ..._core.types import Number
from ..._engine.rule import Adjoint, StepInputs, StepOutputs
from ..adamw import Coefficients, coefficients, new_moments


class _Kept(NamedTuple):
    """What is kept between a step and its adjoint: the gradient and, at the least, two moments."""

    grads: list[Tensor]
    exp_avgs: list[Tensor]  # the moments before the step, unless those after it are kept
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]  # before the step; empty unless amsgrad
    params: list[Tensor]  # empty unless the derivative of lr or weight decay is wanted
    new_exp_avgs: list[Tensor]
    new_exp_avg_sqs: list[Tensor]


def _keep(inputs: StepInputs, outputs: StepOutputs, needs: Any) -> _Kept:
    """Return what the adjoint of a step needs of it.

    That is the gradient and two moments, which cost no memory of their own: those after this step
    are those before the next. Those after it save computing them again; but in 16 bits they were
    rounded, and the derivative of a beta asks for those before it, which cannot be had from them.
    """
    exp_avgs, exp_avg_sqs, *maxima = inputs.slots
    largest = maxima[0] if maxima else []
    params = inputs.params if needs.lr or needs.weight_decay else []
    moments = zip(inputs.grads, exp_avgs, strict=True)
    rounded = any(compute_dtype(grad.dtype) is not kept.dtype for grad, kept in moments)
    if rounded or needs.beta1 or needs.beta2:
        return _Kept(inputs.grads, exp_avgs, exp_avg_sqs, largest, params, [], [])
    return _Kept(inputs.grads, [], [], largest, params, *outputs.slots[:2])


def _pull_back(
    kept: Sequence[list[Tensor]],
    numbers: Any,
    options: Any,
    needs: Any,
    cotangents: list[list[Tensor | None]],
) -> tuple[list[Tensor | None], list[list[Tensor | None]]]:
    if _is_faster_as_one(kept, numbers):
        return _pull_back_as_one(kept, numbers, options, needs, cotangents)
    saved = _Kept(*kept)
    own = coefficients(numbers._make(map(double, numbers)), options)
    of_numbers: dict[str, Tensor] = {}
    of_leaves: list[list[Tensor | None]] = [[] for _ in range(len(cotangents) + 1)]
    for index, grad in enumerate(saved.grads):
        dtype = compute_dtype(grad.dtype)
        leaf = _step_again([_widen(column, index, dtype) for column in saved], own, options)
        after = [_widen(column, index, dtype) for column in cotangents]
        pulled = _through_step(leaf, after, own)
        before = _before(leaf, pulled, numbers, own, options)
        kept_in = (saved.exp_avgs or saved.new_exp_avgs)[index].dtype
        for place, (column, cotangent) in enumerate(zip(of_leaves, before, strict=True)):
            column.append(_cast(cotangent, grad.dtype if place < 2 else kept_in))
        for name, part in _of_numbers(leaf, pulled, numbers, own, needs):
            total = _sum_to(part, getattr(numbers, name))
            of_numbers[name] = of_numbers[name] + total if name in of_numbers else total
    return [of_numbers.get(name) for name in numbers._fields[:-1]], of_leaves


# Of a leaf with more elements, the operators take longer than their calls do.
_SMALL = 1 << 14


def _is_faster_as_one(kept: Sequence[list[Tensor]], numbers: Any) -> bool:
    """Whether leaves are better joined to one, so that each operator is called once for all.

    They are where nothing more is to be differentiated, which would keep the copies.
    """
    grads = kept[0]
    return (
        len(grads) > 1
        and not transforms.followed()
        and transforms.all_plain(grads)
        and all(grad.numel() <= _SMALL and not grad.is_complex() for grad in grads)
        and all(len({(t.dtype, t.device) for t in column}) <= 1 for column in kept)
        and not any(isinstance(number, Tensor) and number.ndim > 0 for number in numbers)
    )


def _pull_back_as_one(
    kept: Sequence[list[Tensor]],
    numbers: Any,
    options: Any,
    needs: Any,
    cotangents: list[list[Tensor | None]],
) -> tuple[list[Tensor | None], list[list[Tensor | None]]]:
    """Do the same with all leaves joined to one."""
    like = kept[0]
    before = [[_join(column)] if column else [] for column in kept]
    after = [[_joined(column, like)] for column in cotangents]
    by_number, by_leaf = _pull_back(before, numbers, options, needs, after)
    # A leaf of which no result has a cotangent has none itself, and not zeros.
    is_met = [any(own is not None for own in leaf) for leaf in zip(*cotangents, strict=True)]
    apart: list[list[Tensor | None]] = []
    for (whole,) in by_leaf:
        parts = [None] * len(like) if whole is None else _part(whole, like)
        apart.append([part if met else None for part, met in zip(parts, is_met, strict=True)])
    return by_number, apart


def _joined(column: list[Tensor | None], like: list[Tensor]) -> Tensor | None:
    """Return the cotangents of all leaves in one, of which some may be missing: these are zeros."""
    known = next((own for own in column if own is not None), None)
    if known is None:
        return None
    filled = [
        torch.zeros_like(leaf, dtype=known.dtype) if own is None else own
        for own, leaf in zip(column, like, strict=True)
    ]
    return _join(filled)


# In one call of C for all leaves. torch leaves both untyped.
_join: Callable[[list[Tensor]], Tensor] = _flatten_dense_tensors
_part: Callable[[Tensor, list[Tensor]], Sequence[Tensor]] = _unflatten_dense_tensors


ADAMW_ADJOINT = Adjoint(_keep, _pull_back)


class _Leaf(NamedTuple):
    """One leaf, in the dtype to compute in: what went into the step, and what came of it."""

    grad: Tensor  # negated if maximize
    exp_avg: Any  # a tensor if the derivative of a beta is wanted, else perhaps None
    exp_avg_sq: Any
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
    root: Tensor  # r itself
    direction: Tensor  # w
    product: Tensor | None  # q w


def _widen(column: list[Any], index: int, dtype: torch.dtype) -> Any:
    return _cast(column[index], dtype) if column else None


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype is dtype else tensor.to(dtype)


def _step_again(column: list[Any], own: Coefficients, options: Any) -> _Leaf:
    grad, exp_avg, exp_avg_sq, max_exp_avg_sq, param, new_exp_avg, new_exp_avg_sq = column
    if options.maximize:
        grad = -grad
    if new_exp_avg is None:
        fitted = Coefficients(*(fit(number, grad) for number in own))
        new_exp_avg, new_exp_avg_sq = new_moments(grad, exp_avg, exp_avg_sq, fitted)
    largest = new_exp_avg_sq
    if max_exp_avg_sq is not None:
        largest = torch.maximum(max_exp_avg_sq, new_exp_avg_sq)
    before = grad, exp_avg, exp_avg_sq, max_exp_avg_sq, param
    return _Leaf(*before, new_exp_avg, new_exp_avg_sq, largest)


def _through_step(leaf: _Leaf, cotangents: list[Tensor | None], own: Coefficients) -> _Pulled:
    of_param, of_exp_avg, of_exp_avg_sq, *maxima = cotangents
    of_max = maxima[0] if maxima else None
    zero = leaf.largest == 0
    if transforms.followed():
        # This may be differentiated in its turn, and no infinity must come back from a root.
        safe_root = leaf.largest.masked_fill(zero, 1.0).sqrt()
        root = safe_root.masked_fill(zero, 0.0)
    else:
        safe_root = root = leaf.largest.sqrt()
    denominator = root + fit(own.eps * own.correction2_root, root)
    direction = leaf.new_exp_avg / denominator
    product = of_largest = None
    scale = -own.descent * own.correction2_root
    if of_param is not None:
        quotient = of_param / denominator
        product = quotient * direction
        of_exp_avg = _plus(of_exp_avg, quotient, -scale)
        of_largest = _of_square(product, safe_root, zero)
    if leaf.max_exp_avg_sq is None:
        of_exp_avg_sq = _plus(of_exp_avg_sq, of_largest, 0.5 * scale)
    elif (of_max := _plus(of_max, of_largest, 0.5 * scale)) is not None:
        share = _share_of_new(leaf.new_exp_avg_sq, leaf.max_exp_avg_sq)
        of_exp_avg_sq = _plus(of_exp_avg_sq, of_max * share, 1.0)
        of_max = of_max * (1 - share)
    return _Pulled(of_param, of_exp_avg, of_exp_avg_sq, of_max, root, direction, product)


def _of_square(of_root: Tensor, safe_root: Tensor, zero: Tensor) -> Tensor:
    """Twice the cotangent of a square, of that of its root: as for `safe_sqrt`, zero at zero."""
    return (of_root / safe_root).masked_fill(zero, 0.0)


def _share_of_new(new: Tensor, old: Tensor) -> Tensor:
    """How much of the maximum is the new second moment: all, none or, at a tie, half (as torch)."""
    return 0.5 * ((new > old).to(new.dtype) + (new >= old).to(new.dtype))


def _before(
    leaf: _Leaf, pulled: _Pulled, numbers: Any, own: Coefficients, options: Any
) -> tuple[Tensor | None, ...]:
    """The cotangents of the leaf before the step, in the order of `StepInputs`."""
    of_grad = _times(pulled.exp_avg, own.gain1)
    if pulled.exp_avg_sq is not None:
        of_grad = _add_product(of_grad, pulled.exp_avg_sq, leaf.grad, 2 * own.gain2)
    if options.maximize and of_grad is not None:
        of_grad = -of_grad
    return (
        _times(pulled.param, own.decay),
        of_grad,
        _times(pulled.exp_avg, double(numbers.beta1)),
        _times(pulled.exp_avg_sq, own.beta2),
        *((pulled.old_max_exp_avg_sq,) if options.amsgrad else ()),
    )


def _of_numbers(
    leaf: _Leaf, pulled: _Pulled, numbers: Any, own: Coefficients, needs: Any
) -> Iterator[tuple[str, Tensor]]:
    """The wanted cotangents of the numbers, as far as they come of one leaf, before summing."""
    step, lr, beta1, beta2, _, weight_decay, *_ = map(double, numbers)
    if needs.beta1 and pulled.exp_avg is not None:
        yield "beta1", pulled.exp_avg * (leaf.exp_avg - leaf.grad)
    if needs.beta2 and pulled.exp_avg_sq is not None:
        yield "beta2", pulled.exp_avg_sq * (leaf.exp_avg_sq - leaf.grad**2)
    if pulled.param is None or pulled.product is None:
        return
    correction1, root = 1 - beta1**step, own.correction2_root
    of_step_size = _times(-pulled.param * pulled.direction, root)
    if needs.lr:
        yield "lr", _times(of_step_size, 1 / correction1)
        yield "lr", _times(-pulled.param * leaf.param, weight_decay)
    if needs.weight_decay:
        yield "weight_decay", _times(-pulled.param * leaf.param, lr)
    if needs.eps:
        yield "eps", _times(pulled.product, -own.descent * root**2)
    if needs.beta1:  # through the first bias correction, and so on below through the second
        yield "beta1", _times(of_step_size, lr * step * beta1 ** (step - 1) / correction1**2)
    if needs.beta2:
        slope = step * beta2 ** (step - 1) / (2 * root)
        yield "beta2", _times(pulled.product * pulled.root, -own.descent * slope)


def _plus(base: Tensor | None, tensor: Tensor | None, number: Number) -> Tensor | None:
    """Return base + number * tensor, where None stands for zeros."""
    if tensor is None:
        return base
    if base is None:
        return _times(tensor, number)
    if isinstance(number, Tensor):
        return base + _times(tensor, number)
    return torch.add(base, tensor, alpha=number)


@overload
def _times(tensor: Tensor, number: Number) -> Tensor: ...
@overload
def _times(tensor: Tensor | None, number: Number) -> Tensor | None: ...
def _times(tensor: Tensor | None, number: Number) -> Tensor | None:
    return None if tensor is None else tensor * fit(number, tensor)


def _add_product(base: Tensor | None, one: Tensor, other: Tensor, number: Number) -> Tensor:
    if base is None or isinstance(number, Tensor):
        product = _times(one, number) * other
        return product if base is None else base + product
    return torch.addcmul(base, one, other, value=number)


def _sum_to(part: Tensor, number: Tensor) -> Tensor:
    """Sum over everything that a number was spread over."""
    shape = number.shape + (1,) * (part.ndim - number.ndim)
    return part.sum_to_size(shape).reshape(number.shape).to(number.device, number.dtype)
