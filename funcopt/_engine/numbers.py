"""The numbers of one update: what the hyperparameters are after so many, and the count itself.

A hyperparameter is given as a number, as a tensor or as a schedule. What it is at an update is
found here and nowhere else, and is checked here, as far as its value can be read without waiting: a
tensor may have been filled with another value since the optimizer was built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._core import transforms
from .._core.hyperparameters import (
    Hyperparam,
    Range,
    call_schedule,
    check_number,
    check_values,
    check_zero_dim,
    normalize,
)
from .._core.types import Number, Schedule, Tree
from .checks import check_count
from .rule import UpdateRule

__all__ = [
    "has_schedule",
    "number_at",
    "numbers_at",
    "numbers_of",
    "with_grad_scale",
]

_FLOAT = frozenset((float,))
_INTEGERS = frozenset((torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8))


def number_at(own: Hyperparam, given: Number | Schedule, count: Tree) -> Number:
    """Return the number that a hyperparameter is after so many updates.

    Args:
        own: The hyperparameter.
        given: A number, a tensor or a schedule, as `normalize` keeps them.
        count: How many updates were made: a tensor, if this is a schedule.

    Raises:
        TypeError: If a schedule returns no number.
        ValueError: If the number is out of range, as far as it can be read without waiting, or
            stacked.
    """
    if isinstance(given, (float, int, Tensor)):
        return _checked(own, given)
    return _from_schedule(own, given, count)


def has_schedule(opt: Any) -> bool:
    """Whether one of the hyperparameters of a wrapper is a schedule."""
    return any(not isinstance(own.of(opt), (float, int, Tensor)) for own in opt.hyperparams)


def numbers_of(opt: Any, step: Tree) -> dict[str, Number]:
    """Return what the hyperparameters of a wrapper are at an update, by name.

    Args:
        opt: The wrapper.
        step: The count of updates in its state, or `()` if there is none.

    Raises:
        TypeError: As `number_at`.
        ValueError: As `number_at`, or if there is a schedule and no count.
    """
    if isinstance(step, Tensor):
        check_count(step, lambda: "state.step")
    numbers = {}
    for own in opt.hyperparams:
        given = own.of(opt)
        if not isinstance(given, (float, int)):
            if not isinstance(given, Tensor) and not isinstance(step, Tensor):
                raise ValueError(
                    f"{own.path} is a schedule, and the state has no count to call it with: "
                    f"state.step is {step!r}. Make the state with init() of this optimizer, or let "
                    f"it count from here: "
                    f"state._replace(step=torch.zeros((), dtype=torch.float64))."
                )
            given = number_at(own, given, step)
        numbers[own.name] = given
    return numbers


def numbers_at(
    rule: UpdateRule, opt: Any, olds: Sequence[Tensor], news: Sequence[Number]
) -> list[Any]:
    """Return the numbers of an update for each count of updates.

    Args:
        rule: The rule, whose NamedTuple `numbers` they are.
        opt: The optimizer.
        olds: The counts before the update, by which schedules go.
        news: The counts after it. Leaves that share one share the numbers.
    """
    given = rule.hyperparams_of(opt)
    for new in dict.fromkeys(news) if len(news) > 1 else news:
        _check_count(new)
    if _FLOAT.issuperset(map(type, given)):
        if len(news) == 1 or not _FLOAT.issuperset(map(type, news)):
            return [rule.numbers(_detached(new), *given) for new in news]
        shared = {new: rule.numbers(new, *given) for new in dict.fromkeys(news)}
        return [shared[new] for new in news]
    pairs = list(zip(rule.hyperparams, given, strict=True))
    for own, number in pairs:
        if isinstance(number, Tensor):
            _checked(own, number)  # once, however many counts there are
    return [
        rule.numbers(
            _detached(new),
            *(
                n if isinstance(n, (float, Tensor)) else _from_schedule(own, n, old)
                for own, n in pairs
            ),
        )
        for old, new in zip(olds, news, strict=True)
    ]


def with_grad_scale(numbers: list[Any], grad_scale: Tensor | None) -> list[Any]:
    """Return the numbers with one that gradients are multiplied by; None is 1."""
    if grad_scale is None:
        return numbers
    value = float(grad_scale.item()) if transforms.on_host(grad_scale) else grad_scale
    shared = {id(own): own._replace(grad_scale=value) for own in numbers}
    return [shared[id(own)] for own in numbers]


def _detached(count: Number) -> Number:
    """Return a count without a derivative: none flows through how often was counted.

    It is asked of no count whether it has one: in forward mode it does not require a gradient.
    """
    return count.detach() if isinstance(count, Tensor) else count


def _check_count(count: Number) -> None:
    if isinstance(count, Tensor):
        check_values(_STEP, count)
    else:
        check_number(_STEP, count)


_STEP = Hyperparam(
    "step",
    Range("must be finite and count the updates from 1", lambda value: 1.0 <= value < math.inf),
)


def _from_schedule(own: Hyperparam, schedule: Schedule, count: Tensor) -> Number:
    value: Any = call_schedule(own.path, schedule, count)
    if isinstance(value, Tensor) and value.dtype in _INTEGERS:  # as of torch.where(count < 9, 4, 8)
        value = value.to(torch.float64)
    number: Number = normalize(own, value, source=" from its schedule")
    check_zero_dim(own.path, number)
    return number


def _checked(own: Hyperparam, number: Number) -> Number:
    check_zero_dim(own.path, number)
    if isinstance(number, Tensor):
        check_values(own, number)
    return number
