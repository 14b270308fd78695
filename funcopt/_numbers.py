"""The numbers of one update: what the hyperparameters are after so many, and the count itself.

A hyperparameter is given as a number, as a tensor or as a schedule. What it is at an update is
found here and nowhere else, and is checked here, as far as its value can be read without waiting: a
tensor may have been filled with another value since the optimizer was built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._hyperparameters import check_number, check_values, check_zero_dim, normalize
from ._kernels import Scalars
from ._types import Number, Schedule

__all__ = ["number_at", "numbers_at", "with_factor"]

# The hyperparameters as messages call them, in the order of `Scalars`.
_NAMES = ("lr", "betas[0]", "betas[1]", "eps", "weight_decay")
_FLOAT = frozenset((float,))


def number_at(name: str, given: Number | Schedule, count: Tensor) -> Number:
    """Return the number that a hyperparameter is after so many updates.

    Args:
        name: The hyperparameter, as its range is listed and as messages call it.
        given: A number, a tensor or a schedule, as `normalize` keeps them.
        count: How many updates were made, for a schedule.

    Raises:
        TypeError: If a schedule returns no number.
        ValueError: If the number is out of range, as far as it can be read without waiting, or
            stacked.
    """
    if isinstance(given, (float, int, Tensor)):
        return _checked(name, given)
    return _from_schedule(name, given, count)


def numbers_at(
    given: tuple[Any, ...], olds: Sequence[Tensor], news: Sequence[Number]
) -> list[Scalars]:
    """Return the numbers of an update for each count of updates.

    Args:
        given: The hyperparameters, in the order of `Scalars`: numbers, tensors or schedules.
        olds: The counts before the update, by which schedules go.
        news: The counts after it. Leaves that share one share the numbers.
    """
    for new in dict.fromkeys(news):
        _check_count(new)
    if _FLOAT.issuperset(map(type, given)):
        if len(news) == 1 or not _FLOAT.issuperset(map(type, news)):
            return [Scalars(_detached(new), *given) for new in news]
        shared = {new: Scalars(new, *given) for new in dict.fromkeys(news)}
        return [shared[new] for new in news]
    named = list(zip(_NAMES, given, strict=True))
    for name, number in named:
        if isinstance(number, Tensor):
            _checked(name, number)  # once, however many counts there are
    return [
        Scalars(
            _detached(new),
            *(
                n if isinstance(n, (float, Tensor)) else _from_schedule(name, n, old)
                for name, n in named
            ),
        )
        for old, new in zip(olds, news, strict=True)
    ]


def with_factor(numbers: list[Scalars], factor: Tensor | None) -> list[Scalars]:
    """Return the numbers with one that gradients are multiplied by; None is 1."""
    if factor is None:
        return numbers
    value = float(factor.item()) if factor.is_cpu else factor
    shared = {id(own): own._replace(grad_factor=value) for own in numbers}
    return [shared[id(own)] for own in numbers]


def _detached(count: Number) -> Number:
    """Return a count without history: no derivative flows through how often was counted."""
    return count.detach() if isinstance(count, Tensor) and count.requires_grad else count


def _check_count(count: Number) -> None:
    if isinstance(count, Tensor):
        check_values("step", count)
    else:
        check_number("step", count)


def _from_schedule(name: str, schedule: Schedule, count: Tensor) -> Number:
    # A schedule gets a copy, and may do with it what it likes.
    number: Number = normalize(name, schedule(count.detach().clone()), source=" from its schedule")
    check_zero_dim(name, number)
    return number


def _checked(name: str, number: Number) -> Number:
    check_zero_dim(name, number)
    if isinstance(number, Tensor):
        check_values(name, number)
    return number
