"""Schedules made of values, of schedules, or of two hyperparameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .._core.tensors import choose
from .._core.types import AT_LEAST_ZERO, Hyperparam, Number, Schedule
from .._engine.hyperparameters import check_choice, normalize
from .._engine.registration import register_dataclass
from ._checks import check_pieces, check_step
from ._phases import SHAPES, as_given, by_step, known, phases, wide

# Half of what float64 can hold, so that rounding leads nowhere beyond that.
_LARGEST = 2.0**1023


@register_dataclass
@dataclass(frozen=True)
class Piecewise:
    """Given values at step 0 and at each boundary; between them held, or interpolated.

    Held, it is torch's `MultiStepLR` and `ConstantLR` and optax's `piecewise_constant_schedule`;
    interpolated, optax's `piecewise_interpolate_schedule`; with the values themselves, where those
    take factors.

    Args:
        values: At least 0 each: one at step 0, and one at each boundary.
        boundaries: Above 0, and ascending.
        shape: How a value goes to the next: `"constant"` (with a jump), `"linear"`, `"cosine"` or
            `"sqrt"`.

    Example:
        >>> from funcopt.schedules import Piecewise
        >>> schedule = Piecewise(values=(1.0, 0.1, 0.01), boundaries=(30, 60))
        >>> [schedule(step) for step in (29, 30, 60)]
        [1.0, 0.1, 0.01]
    """

    values: tuple[Number, ...]
    boundaries: tuple[Number, ...]
    shape: str = "constant"

    def __post_init__(self) -> None:
        check_pieces(self, "values")
        check_choice("shape", self.shape, SHAPES)

    @by_step
    def __call__(self, step: Number) -> Number:
        step, *numbers = wide(step, *self.values, *self.boundaries)
        values, boundaries = numbers[: len(self.values)], numbers[len(self.values) :]
        return phases(step, values, boundaries, [SHAPES[self.shape]] * len(boundaries))


@register_dataclass
@dataclass(frozen=True)
class Join:
    """One schedule after the other: torch's `SequentialLR`, optax's `join_schedules`.

    Args:
        schedules: Each is called with the updates made since its boundary; outside of its phase it
            is asked for its step 0.
        boundaries: Where the second begins, and each after it: above 0, and ascending.

    Example:
        >>> from funcopt.schedules import Exponential, Join, Linear
        >>> schedule = Join((Linear(0.0, 1.0, steps=10), Exponential(1.0, rate=0.5)), (10,))
        >>> schedule(5), schedule(10), schedule(11)
        (0.5, 1.0, 0.5)
    """

    schedules: tuple[Schedule, ...]
    boundaries: tuple[Number, ...]

    def __post_init__(self) -> None:
        check_pieces(self, "schedules")
        for index, schedule in enumerate(self.schedules):
            if not callable(schedule):
                raise TypeError(
                    f"schedules[{index}]={schedule!r}: must be a schedule or a function of the "
                    f"step. For a number, give Constant."
                )

    def __call__(self, step: Number) -> Number:
        at, *boundaries = wide(known(step), *self.boundaries)
        begins, ends = (0.0, *boundaries), (*boundaries, math.inf)
        value: Number = 0.0
        for schedule, begin, end in zip(self.schedules, begins, ends, strict=True):
            begun = at >= begin
            elapsed: Any = as_given(step, choose(begun & (at < end), at - begin, 0.0))
            value = choose(begun, schedule(elapsed), value)
        return as_given(step, value)


@register_dataclass
@dataclass(frozen=True)
class Decoupled:
    """A weight decay that does not depend on the learning rate it will be multiplied by.

    `weight_decay / lr` at each step, so that `weight_decay` of each parameter is taken, to the
    rounding. Where the learning rate is 0 it is 0: there, nothing moves and nothing decays. Where
    it is so small that the quotient would be infinite (below 1e-308 of the weight decay), it is
    2**1023, and what is taken goes to 0 with the learning rate.

    Args:
        weight_decay: What is to be taken of a parameter in a step: at least 0; a number, a 0-dim
            tensor or a schedule.
        lr: That of the optimizer, also as one of these. A tensor in it is a leaf of both; the
            derivative with respect to it is the sum of the two.

    Example:
        >>> import funcopt
        >>> from funcopt.schedules import Cosine, Decoupled
        >>> lr = Cosine(peak=1e-2, steps=100, warmup_steps=10)
        >>> opt = funcopt.Lion(lr=lr, weight_decay=Decoupled(1e-3, lr))
        >>> opt.weight_decay(5), opt.weight_decay(10)
        (0.2, 0.1)
    """

    weight_decay: Number | Schedule
    lr: Number | Schedule

    def __post_init__(self) -> None:
        for name in ("weight_decay", "lr"):
            own = Hyperparam(name, AT_LEAST_ZERO)
            kept = normalize(own, getattr(self, name), schedule=True)
            object.__setattr__(self, name, kept)

    def __call__(self, step: Number) -> Number:
        check_step(step)
        decay, lr = wide(_at(self.weight_decay, step), _at(self.lr, step))
        # The least learning rate by which to divide: at 0 it would be none.
        divides = (lr > 0) & (lr >= decay / _LARGEST)
        quotient = decay / choose(divides, lr, 1.0)
        return as_given(step, choose(divides, quotient, choose(lr > 0, _LARGEST, 0.0)))


def _at(given: Number | Schedule, step: Any) -> Number:
    return given(step) if callable(given) else given
