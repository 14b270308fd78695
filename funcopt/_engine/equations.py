"""The equations of a rule on all leaves, in plain operators: right everywhere, and seen by tracers.

What holds for every optimizer alike is decided here: the dtype to compute in, and how numbers meet
leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import Tensor

from .._core import transforms
from .._core.arithmetic import compute_dtype, double, fit, write
from .rule import StepInputs, StepOutputs, UpdateRule

__all__ = ["numbers_for_each", "safe_sqrt", "step", "step_"]


def safe_sqrt(squares: Tensor) -> Tensor:
    """The square root, with derivative zero at zero.

    There `sqrt` has an infinite one, and infinity times a zero gradient is NaN; but at zero the
    second moment does not move the parameter to first order, so zero is also the true value. The
    first fill keeps the infinity out of the backward pass, the second sets the value.
    """
    if not transforms.followed((squares,)):
        return squares.sqrt()
    zero = squares == 0
    return squares.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def step(
    rule: UpdateRule, inputs: StepInputs, numbers: Any | list[Any], options: Any
) -> StepOutputs:
    """Return the leaves after one step, with the same numbers or each with its own."""
    rows: list[list[Tensor]] = []
    for (param, grad, *slots), own in _each(rule, inputs, numbers, options):
        dtype = inputs.params[len(rows)].dtype
        row = rule.equations(param, grad, tuple(slots), own, options)
        rows.append([new if new.dtype is dtype else new.to(dtype) for new in row])
    columns = list(map(list, zip(*rows, strict=True)))
    return StepOutputs.of(columns or [[] for _ in inputs.targets.columns])


def step_(rule: UpdateRule, inputs: StepInputs, numbers: Any, options: Any) -> None:
    """Do the same in place, leaf by leaf, so that no more than one leaf is there twice."""
    equations_ = rule.equations_
    # A subclass may lack operators in place, or return copies of what it holds.
    plain = transforms.all_plain(chain(*inputs.columns))
    for index, (row, own) in enumerate(_each(rule, inputs, numbers, options)):
        param, grad, *slots = row
        if equations_ is not None and plain:
            equations_(param, grad, tuple(slots), own, options)
            news = [param, *slots]
        else:
            news = list(rule.equations(param, grad, tuple(slots), own, options))
        olds = [column[index] for column in inputs.targets.columns]
        for old, new in zip(olds, news, strict=True):
            if new is not old:
                write(old, new)


def _each(
    rule: UpdateRule, inputs: StepInputs, numbers: Any | list[Any], options: Any
) -> Iterator[tuple[list[Tensor], Any]]:
    """Yield the tensors of each leaf in the dtype to compute in, and the coefficients to fit."""
    coefficients: dict[int, Any] = {}
    fitted: dict[object, Any] = {}
    for index, own in enumerate(numbers_for_each(numbers, len(inputs.params))):
        row = [column[index] for column in inputs.columns]
        dtype = compute_dtype(row[0].dtype)
        row = [tensor if tensor.dtype is dtype else tensor.to(dtype) for tensor in row]
        # A tracer pays for every operator, so the numbers are made to fit once for leaves alike.
        alike = id(own), dtype, row[0].device, row[0].ndim
        if alike not in fitted:
            if id(own) not in coefficients:
                coefficients[id(own)] = rule.coefficients(own._make(map(double, own)), options)
            fitted[alike] = _fitted(coefficients[id(own)], row[0])
        yield row, fitted[alike]


def _fitted(coefficients: Any, leaf: Tensor) -> Any:
    return coefficients._make(fit(number, leaf) for number in coefficients)


def numbers_for_each(numbers: Any | list[Any], count: int) -> list[Any]:
    """Return the numbers of each leaf, where they may be given once for all."""
    return numbers if isinstance(numbers, list) else [numbers] * count
