"""The whole course of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from .._hyperparameters import check_choice, check_flag
from .._node import register_optimizer
from .._types import Number
from ._checks import check_numbers, check_steps, check_together
from ._phases import SHAPES, by_step, cosine, linear, phases, wide

__all__ = ["Cosine", "OneCycle", "WarmupStableDecay"]


@register_optimizer
@dataclass(frozen=True)
class Cosine:
    r"""Half a cosine wave down to `end`, after a linear warmup if there is one.

    Over the $T$ steps after the warmup, $e + (p - e)\,((1 + \cos(\pi t/T)) / 2)^q$. These are
    `optax.warmup_cosine_decay_schedule` and `cosine_decay_schedule`, and torch's
    `CosineAnnealingLR`, which however rises again beyond its end, where this stays. For warm
    restarts, `Join` several.

    Args:
        peak: The value after the warmup, $p$: at least 0.
        steps: How long all of it takes, the warmup included: above 0.
        warmup_steps: Below `steps`; 0 for no warmup.
        start: The value at step 0, if there is a warmup: at least 0.
        end: The value from step `steps` on, $e$: at least 0.
        power: The exponent of the wave, $q$: above 0.

    Example:
        >>> from funcopt.schedules import Cosine
        >>> [round(Cosine(peak=1.0, steps=6, warmup_steps=2)(step), 2) for step in range(7)]
        [0.0, 0.5, 1.0, 0.85, 0.5, 0.15, 0.0]
    """

    peak: Number
    steps: Number
    warmup_steps: Number = 0
    start: Number = 0.0
    end: Number = 0.0
    power: Number = 1.0

    def __post_init__(self) -> None:
        """Check every number, and the warmup against the whole."""
        check_numbers(self, "peak", "start", "end", "power")
        check_steps(self, "steps", "warmup_steps")
        check_together(
            (self.warmup_steps, self.steps),
            lambda: self.warmup_steps < self.steps,
            lambda: (
                f"warmup_steps={self.warmup_steps}: must be below steps={self.steps}, which counts "
                f"the warmup too. Shorten the warmup, or lengthen the whole."
            ),
        )

    @by_step
    def __call__(self, step: Number) -> Number:
        """Return the value after so many updates."""
        step, start, peak, end, warmup, steps, power = wide(
            step, self.start, self.peak, self.end, self.warmup_steps, self.steps, self.power
        )
        return phases(step, (start, peak, end), (warmup, steps), (linear, cosine(power)))


@register_optimizer
@dataclass(frozen=True)
class WarmupStableDecay:
    """A linear warmup, a plateau, and a decay at the end.

    From Hu et al., *MiniCPM* (2024). Hägele et al., *Scaling Laws and Compute-Optimal Training
    Beyond Fixed Training Durations* (2024), found best a decay by `"sqrt"`.

    Args:
        peak: The value of the plateau: at least 0.
        steps: How long all of it takes: above 0, and at least `warmup_steps + decay_steps`.
        warmup_steps: At least 0.
        decay_steps: At least 0.
        start: The value at step 0, if there is a warmup: at least 0.
        end: The value from step `steps` on: at least 0.
        shape: How the decay goes: `"linear"`, `"cosine"`, `"sqrt"` (one minus the square root of
            the time), or `"constant"`, which drops at the end.

    Example:
        >>> from funcopt.schedules import WarmupStableDecay
        >>> schedule = WarmupStableDecay(peak=1.0, steps=8, warmup_steps=2, decay_steps=4)
        >>> [schedule(step) for step in range(9)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    peak: Number
    steps: Number
    warmup_steps: Number
    decay_steps: Number
    start: Number = 0.0
    end: Number = 0.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        """Check every number, and the phases against the whole."""
        check_numbers(self, "peak", "start", "end")
        check_steps(self, "steps", "warmup_steps", "decay_steps")
        check_choice("shape", self.shape, SHAPES)
        check_together(
            (self.warmup_steps, self.decay_steps, self.steps),
            lambda: self.warmup_steps + self.decay_steps <= self.steps,
            lambda: (
                f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps}: together at "
                f"most steps={self.steps}, which counts them too. Shorten one, or lengthen the "
                f"whole."
            ),
        )

    @by_step
    def __call__(self, step: Number) -> Number:
        """Return the value after so many updates."""
        step, start, peak, end, warmup, decay, steps = wide(
            step, self.start, self.peak, self.end, self.warmup_steps, self.decay_steps, self.steps
        )
        boundaries = (warmup, steps - decay, steps)
        shapes = (linear, SHAPES["constant"], SHAPES[self.shape])
        return phases(step, (start, peak, peak, end), boundaries, shapes)


@register_optimizer
@dataclass(frozen=True)
class OneCycle:
    """Up to a peak and down to almost nothing, to the numbers of torch's `OneCycleLR`.

    As there, it begins at `peak / div_factor`, reaches the peak at step `pct_start * steps - 1`,
    and ends at step `steps - 1` at the first value divided by `final_div_factor`. Optax counts one
    more step in each phase: for its one-cycle schedules, see `Piecewise`.

    Args:
        peak: At least 0.
        steps: How long all of it takes: above 0.
        pct_start: Which part of it rises: above 0 and at most 1, and one step at least.
        div_factor: Above 0.
        final_div_factor: Above 0.
        three_phase: Fall back to the first value in as long as it took to rise (`pct_start` is then
            about a half at most), and only then to the last.
        shape: `"cosine"`, `"linear"`, `"sqrt"` or `"constant"`.

    Example:
        >>> from funcopt.schedules import OneCycle
        >>> [round(OneCycle(peak=1.0, steps=10)(step), 3) for step in (0, 1, 2, 9)]
        [0.04, 0.52, 1.0, 0.0]
    """

    peak: Number
    steps: Number
    pct_start: Number = 0.3
    div_factor: Number = 25.0
    final_div_factor: Number = 1e4
    three_phase: bool = False
    shape: str = "cosine"

    def __post_init__(self) -> None:
        """Check every number, and that no phase is of a negative length."""
        check_numbers(self, "peak", "pct_start", "div_factor", "final_div_factor")
        check_steps(self, "steps")
        check_flag("three_phase", self.three_phase)
        check_choice("shape", self.shape, SHAPES)
        part = (self.pct_start, self.steps)
        check_together(
            part,
            lambda: self.pct_start * self.steps >= 1,
            lambda: (
                f"pct_start={self.pct_start}, steps={self.steps}: their product must be at least "
                f"1. Raise one of them."
            ),
        )
        check_together(
            part,
            lambda: not self.three_phase or 2 * self.pct_start * self.steps - 1 <= self.steps,
            lambda: (
                f"pct_start={self.pct_start}, steps={self.steps}: rise and fall, which take as "
                f"long, must end before the whole. Lower pct_start to a half."
            ),
        )

    @by_step
    def __call__(self, step: Number) -> Number:
        """Return the value after so many updates."""
        step, peak, steps, pct_start, div_factor, final_div_factor = wide(
            step, self.peak, self.steps, self.pct_start, self.div_factor, self.final_div_factor
        )
        start = peak / div_factor
        end = start / final_div_factor
        rise = pct_start * steps - 1
        values = (start, peak, start, end) if self.three_phase else (start, peak, end)
        boundaries = (rise, 2 * rise, steps - 1) if self.three_phase else (rise, steps - 1)
        return phases(step, values, boundaries, [SHAPES[self.shape]] * len(boundaries))
