"""One law from the first step to the last."""

from __future__ import annotations

from dataclasses import dataclass

from .._core.tensors import choose
from .._core.types import Number
from .._engine.registration import register_dataclass
from ._checks import check_fields, check_together
from ._phases import by_step, falling_power, floor, linear, phases, wide


@register_dataclass
@dataclass(frozen=True)
class Constant:
    """One value at every step, as `optax.constant_schedule`.

    Args:
        value: At least 0; a number or 0-dim tensor.

    Example:
        >>> from funcopt.schedules import Constant
        >>> Constant(0.1)(5)
        0.1
    """

    value: Number

    def __post_init__(self) -> None:
        check_fields(self)

    @by_step
    def __call__(self, step: Number) -> Number:
        _, value = wide(step, self.value)
        return value


@register_dataclass
@dataclass(frozen=True)
class Linear:
    """A straight line, then `end`: torch's `LinearLR`, optax's `linear_schedule`.

    Args:
        start: The value at step 0: at least 0; a number or 0-dim tensor, as all of these.
        end: The value from step `steps` on: at least 0.
        steps: The length of the line: above 0.

    Example:
        >>> from funcopt.schedules import Linear
        >>> Linear(start=0.0, end=1.0, steps=4)(1)
        0.25
    """

    start: Number
    end: Number
    steps: Number

    def __post_init__(self) -> None:
        check_fields(self)

    @by_step
    def __call__(self, step: Number) -> Number:
        step, start, end, steps = wide(step, self.start, self.end, self.steps)
        return phases(step, (start, end), (steps,), (linear,))


@register_dataclass
@dataclass(frozen=True)
class Polynomial:
    r"""A power of what is left: torch's `PolynomialLR`, optax's `polynomial_schedule`.

    With $T$ steps, $e + (s - e)(1 - t/T)^p$.

    Args:
        start: The value at step 0, $s$: at least 0.
        end: The value from step `steps` on, $e$: at least 0.
        steps: Above 0.
        power: The exponent $p$: above 0; 1 is a straight line.

    Example:
        >>> from funcopt.schedules import Polynomial
        >>> Polynomial(start=1.0, end=0.0, steps=4, power=2)(2)
        0.25
    """

    start: Number
    end: Number
    steps: Number
    power: Number

    def __post_init__(self) -> None:
        check_fields(self)

    @by_step
    def __call__(self, step: Number) -> Number:
        step, start, end, steps, power = wide(step, self.start, self.end, self.steps, self.power)
        return phases(step, (start, end), (steps,), (falling_power(power),))


@register_dataclass
@dataclass(frozen=True)
class Exponential:
    r"""A decay by the same factor in each step, or in each so many, down to `end`.

    $\max(s\,r^{t/T}, e)$: torch's `ExponentialLR`, and `StepLR` as a staircase; optax's
    `exponential_decay`, of the decays among which it is all, and none of the growths.

    Args:
        start: The value at step 0, $s$: at least 0.
        rate: The factor $r$: above 0 and at most 1.
        steps: How many steps take the factor once, $T$: above 0.
        staircase: Take it all at once after each `steps`, instead of by and by.
        end: The value at which the decay stops, $e$: at least 0.

    Example:
        >>> from funcopt.schedules import Exponential
        >>> Exponential(start=1.0, rate=0.5)(3)
        0.125
        >>> Exponential(start=1.0, rate=0.5, steps=10, staircase=True)(19)
        0.5
    """

    start: Number
    rate: Number
    steps: Number = 1
    staircase: bool = False
    end: Number = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

    @by_step
    def __call__(self, step: Number) -> Number:
        step, start, rate, steps, end = wide(step, self.start, self.rate, self.steps, self.end)
        times = step / steps
        value = start * rate ** (floor(times) if self.staircase else times)
        return choose(value > end, value, end)


@register_dataclass
@dataclass(frozen=True)
class InverseSquareRoot:
    r"""A linear warmup, then $p\sqrt{w/t}$, which falls without end.

    From Vaswani et al., *Attention Is All You Need* (2017).

    Args:
        peak: The value after the warmup, $p$: at least 0.
        warmup_steps: The length of the warmup, $w$: above 0.
        start: The value at step 0: at least 0.

    Example:
        >>> from funcopt.schedules import InverseSquareRoot
        >>> [InverseSquareRoot(peak=1.0, warmup_steps=4)(step) for step in (2, 4, 16)]
        [0.5, 1.0, 0.5]
    """

    peak: Number
    warmup_steps: Number
    start: Number = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_together(
            [self.warmup_steps],
            lambda warmup: warmup > 0,
            "warmup_steps={}: must be above 0. Give it 1 for hardly any.",
        )

    @by_step
    def __call__(self, step: Number) -> Number:
        step, start, peak, warmup = wide(step, self.start, self.peak, self.warmup_steps)
        warm = step < warmup
        rising = phases(step, (start, peak), (warmup,), (linear,))
        return choose(warm, rising, peak * (warmup / choose(warm, warmup, step)) ** 0.5)
