"""What schedules are made of: phases from one value to the next, on numbers and tensors alike.

Each function here takes Python numbers and tensors in any mixture. Where a tensor decides, both
sides are computed and one is taken, so that there is one graph and a row of steps is a row of
values; what is not taken is kept finite, so that its derivative is zero and not NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from .._core import transforms
from .._core.tensors import choose
from .._core.types import Number
from .._engine.counts import value_of
from ._checks import check_step

ScheduleT = TypeVar("ScheduleT")

Shape: TypeAlias = Callable[[Number], Number]
"""How far the value has come, from 0 to 1, once so much of the phase is over, of 0 to below 1."""


def linear(progress: Number) -> Number:
    """Come as far as the phase has."""
    return progress


def cosine(power: Number) -> Shape:
    """Leave and arrive slowly, along half a wave, or a power of it."""
    # cos(x/2)**2 is (1 + cos(x)) / 2, and is above 0 all the way, where a power is differentiable.
    return lambda progress: 1 - _cos(math.pi / 2 * progress) ** (2 * power)


def falling_power(power: Number) -> Shape:
    """Let what is left of the way be a power of what is left of the phase."""
    return lambda progress: 1 - (1 - progress) ** power


def _square_root(progress: Number) -> Number:
    """Leave with a jump, at an infinite slope, which is taken for 0."""
    under_way = progress > 0
    return choose(under_way, choose(under_way, progress, 1.0) ** 0.5, 0.0)


SHAPES: dict[str, Shape] = {
    "constant": lambda progress: 0 * progress,
    "linear": linear,
    "cosine": cosine(1.0),
    "sqrt": _square_root,
}


def phases(
    step: Number, values: Sequence[Number], boundaries: Sequence[Number], shapes: Sequence[Shape]
) -> Number:
    """Return the value at a step, given those at step 0 and at each boundary, where a phase ends.

    A phase may be empty. Beyond the last, the value stays.
    """
    value = values[0]
    begin: Number = 0.0
    for start, end, boundary, shape in zip(
        values[:-1], values[1:], boundaries, shapes, strict=True
    ):
        inside = start + (end - start) * shape(_progress(step - begin, boundary - begin))
        value = choose(step < begin, value, choose(step < boundary, inside, end))
        begin = boundary
    return value


def _progress(elapsed: Number, length: Number) -> Number:
    """How much of a phase is over, from 0 to below 1; outside of it 0."""
    inside = (elapsed >= 0) & (elapsed < length)
    return choose(inside, elapsed / choose(length > 0, length, 1.0), 0.0)


def floor(number: Number) -> Number:
    """Round down to a whole number."""
    return torch.floor(number) if isinstance(number, Tensor) else float(math.floor(number))


def _cos(angle: Number) -> Number:
    return torch.cos(angle) if isinstance(angle, Tensor) else math.cos(angle)


def wide(*numbers: Number) -> tuple[Number, ...]:
    """Return numbers that can be reckoned with: tensors in float64, and if one is, the first is."""
    widened = [n.to(torch.float64) if isinstance(n, Tensor) else n for n in numbers]
    first, tensor = widened[0], next((n for n in widened if isinstance(n, Tensor)), None)
    if tensor is not None and not isinstance(first, Tensor):
        widened[0] = torch.full((), first, dtype=torch.float64, device=tensor.device)
    return tuple(widened)


def by_step(
    value_at: Callable[[ScheduleT, Number], Number],
) -> Callable[[ScheduleT, Number], Number]:
    """Let the method of a schedule be called with a number or a tensor, and give back the same.

    A count that can be read at no price, as in a training loop, is read: a dozen operators on
    tensors of one element take longer than to move small parameters.
    """

    @functools.wraps(value_at)
    def called(schedule: ScheduleT, step: Number) -> Number:
        return as_given(step, value_at(schedule, known(step)))

    return called


def known(step: Number) -> Number:
    """Return a step as a number, if it is one or can be read, and checked; or as a tensor."""
    if isinstance(step, Tensor) and not (
        step.ndim or transforms.observed() or transforms.watched((step,))
    ):
        step = value_of(step)
    check_step(step)
    return choose(step >= 0, step, 0.0) if isinstance(step, Tensor) else step


def as_given(step: Number, value: Number) -> Number:
    """Return a value as a float64 tensor of the shape of the step, if the step is a tensor."""
    if not isinstance(step, Tensor):
        return value
    if isinstance(value, Tensor):
        return value + torch.zeros_like(step, dtype=torch.float64)
    return torch.full_like(step, value, dtype=torch.float64)
