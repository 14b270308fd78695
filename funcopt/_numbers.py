"""The numbers of one update: what the hyperparameters are after so many, and the count itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._hyperparameters import check_zero_dim, normalize
from ._kernels import Scalars
from ._types import Number, Schedule

__all__ = ["numbers_at", "with_factor"]

# The hyperparameters as messages call them, in the order of `Scalars`.
_NAMES = ("lr", "betas[0]", "betas[1]", "eps", "weight_decay")
_FLOAT = frozenset((float,))


def numbers_at(
    given: tuple[Any, ...], olds: Sequence[Tensor], news: Sequence[Number]
) -> list[Scalars]:
    """Return the numbers of an update for each count of updates.

    Args:
        given: The hyperparameters, in the order of `Scalars`: numbers, tensors or schedules.
        olds: The counts before the update, by which schedules go.
        news: The counts after it. Leaves that share one share the numbers.
    """
    if _FLOAT.issuperset(map(type, given)):
        if len(news) == 1 or not _FLOAT.issuperset(map(type, news)):
            return [Scalars(_detached(new), *given) for new in news]
        shared = {new: Scalars(new, *given) for new in dict.fromkeys(news)}
        return [shared[new] for new in news]
    named = list(zip(_NAMES, given, strict=True))
    return [
        Scalars(_detached(new), *(_number_at(name, number, old) for name, number in named))
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
    """Return a count without a derivative: none flows through how often was counted.

    It is asked of no count whether it has one: in forward mode it does not require a gradient.
    """
    return count.detach() if isinstance(count, Tensor) else count


def _number_at(name: str, given: Number | Schedule, count: Tensor) -> Number:
    """Return the number that a hyperparameter is after so many updates."""
    if isinstance(given, (float, Tensor)):
        number = given
    else:  # a schedule gets a copy, and may do with it what it likes
        number = normalize(name, given(count.detach().clone()), source=" from its schedule")
    check_zero_dim(name, number)
    return number
