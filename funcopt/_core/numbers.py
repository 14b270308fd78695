"""The numbers of one update: what the hyperparameters are after so many, and the count itself.

A hyperparameter is given as a number, as a tensor or as a schedule. What it is at an update is
found here and nowhere else, and is checked here, as far as its value can be read without waiting: a
tensor may have been filled with another value since the optimizer was built.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._engine import Scalars
from . import transforms
from .checks import check_count
from .hyperparameters import check_number, check_values, check_zero_dim, normalize, short
from .types import Number, Schedule, Tree

__all__ = ["call_schedule", "has_schedule", "number_at", "numbers_at", "numbers_of", "with_factor"]

# The hyperparameters as messages call them, in the order of `Scalars`.
_NAMES = ("lr", "betas[0]", "betas[1]", "eps", "weight_decay")
_FLOAT = frozenset((float,))
_INTEGERS = frozenset((torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8))


def number_at(name: str, given: Number | Schedule, count: Tree) -> Number:
    """Return the number that a hyperparameter is after so many updates.

    Args:
        name: The hyperparameter, as its range is listed and as messages call it.
        given: A number, a tensor or a schedule, as `normalize` keeps them.
        count: How many updates were made: a tensor, if this is a schedule.

    Raises:
        TypeError: If a schedule returns no number.
        ValueError: If the number is out of range, as far as it can be read without waiting, or
            stacked.
    """
    if isinstance(given, (float, int, Tensor)):
        return _checked(name, given)
    return _from_schedule(name, given, count)


def has_schedule(opt: object, names: Iterable[str]) -> bool:
    """Whether one of these hyperparameters is a schedule."""
    return any(not isinstance(getattr(opt, name), (float, int, Tensor)) for name in names)


def numbers_of(opt: object, names: Iterable[str], step: Tree) -> dict[str, Number]:
    """Return what these hyperparameters of a wrapper are at an update, by name.

    Args:
        opt: The wrapper.
        names: Its hyperparameters.
        step: The count of updates in its state, or `()` if there is none.

    Raises:
        TypeError: As `number_at`.
        ValueError: As `number_at`, or if there is a schedule and no count.
    """
    if isinstance(step, Tensor):
        check_count(step, lambda: "state.step")
    numbers = {}
    for name in names:
        given = getattr(opt, name)
        if not isinstance(given, (float, int)):
            if not isinstance(given, Tensor) and not isinstance(step, Tensor):
                raise ValueError(
                    f"{name} is a schedule, and the state has no count to call it with: state.step "
                    f"is {step!r}. Make the state with init() of this optimizer, or let it count "
                    f"from here: state._replace(step=torch.zeros((), dtype=torch.float64))."
                )
            given = number_at(name, given, step)
        numbers[name] = given
    return numbers


def numbers_at(
    given: tuple[Any, ...], olds: Sequence[Tensor], news: Sequence[Number]
) -> list[Scalars]:
    """Return the numbers of an update for each count of updates.

    Args:
        given: The hyperparameters, in the order of `Scalars`: numbers, tensors or schedules.
        olds: The counts before the update, by which schedules go.
        news: The counts after it. Leaves that share one share the numbers.
    """
    for new in dict.fromkeys(news) if len(news) > 1 else news:
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
    value = float(factor.item()) if transforms.on_host(factor) else factor
    shared = {id(own): own._replace(grad_factor=value) for own in numbers}
    return [shared[id(own)] for own in numbers]


def _detached(count: Number) -> Number:
    """Return a count without a derivative: none flows through how often was counted.

    It is asked of no count whether it has one: in forward mode it does not require a gradient.
    """
    return count.detach() if isinstance(count, Tensor) else count


def _check_count(count: Number) -> None:
    if isinstance(count, Tensor):
        check_values("step", count)
    else:
        check_number("step", count)


def _from_schedule(name: str, schedule: Schedule, count: Tensor) -> Number:
    value: Any = call_schedule(name, schedule, count)
    if isinstance(value, Tensor) and value.dtype in _INTEGERS:  # as of torch.where(count < 9, 4, 8)
        value = value.to(torch.float64)
    number: Number = normalize(name, value, source=" from its schedule")
    check_zero_dim(name, number)
    return number


def call_schedule(name: str, schedule: Schedule, count: Tensor) -> Number:
    """Call a schedule with a copy of a count, with which it may do what it likes.

    Raises:
        RuntimeError: If it fails under vmap, where the count has no one value to go by. What a
            tracer has to say of a value that it does not know is left as it is.
    """
    given = count.detach().clone()
    if transforms.readable() or transforms.tracing():
        return schedule(given)
    try:
        return schedule(given)
    except RuntimeError as error:
        raise RuntimeError(
            f"{name}={short(schedule)} failed under vmap, where the count is that of many members: "
            f"no schedule can decide by its value, as by `if count < 10`, nor read it, as by "
            f"float(count). Write torch.where(count < 10, a, b) and other functions of torch, or "
            f"take funcopt.schedules.Piecewise or Join. What it failed with is above."
        ) from error


def _checked(name: str, number: Number) -> Number:
    check_zero_dim(name, number)
    if isinstance(number, Tensor):
        check_values(name, number)
    return number
