"""The whole course of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from .._core.tensors import choose
from .._core.types import Number
from .._engine.hyperparameters import check_choice
from .._engine.registration import register_dataclass
from ._checks import check_fields, check_together
from ._phases import SHAPES, by_step, cosine, linear, phases, wide


@register_dataclass
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
        check_fields(self)
        check_together(
            (self.warmup_steps, self.steps),
            lambda warmup, steps: warmup < steps,
            "warmup_steps={}: must be below steps={}, which counts the warmup too. Shorten the "
            "warmup, or lengthen the whole.",
        )

    @by_step
    def __call__(self, step: Number) -> Number:
        step, start, peak, end, warmup, steps, power = wide(
            step, self.start, self.peak, self.end, self.warmup_steps, self.steps, self.power
        )
        return phases(step, (start, peak, end), (warmup, steps), (linear, cosine(power)))


@register_dataclass
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
        check_fields(self)
        check_choice("shape", self.shape, SHAPES)
        check_together(
            (self.warmup_steps, self.decay_steps, self.steps),
            lambda warmup, decay, steps: warmup + decay <= steps,
            "warmup_steps={} and decay_steps={}: together at most steps={}, which counts them too. "
            "Shorten one, or lengthen the whole.",
        )

    @by_step
    def __call__(self, step: Number) -> Number:
        step, start, peak, end, warmup, decay, steps = wide(
            step, self.start, self.peak, self.end, self.warmup_steps, self.decay_steps, self.steps
        )
        boundaries = (warmup, steps - decay, steps)
        shapes = (linear, SHAPES["constant"], SHAPES[self.shape])
        return phases(step, (start, peak, peak, end), boundaries, shapes)


@register_dataclass
@dataclass(frozen=True)
class OneCycle:
    """Up to a peak and down to almost nothing, to the numbers of torch's `OneCycleLR`.

    As there, it begins at `peak / div_factor`, reaches the peak at step `pct_start * steps - 1`,
    and ends at step `steps - 1` at the first value divided by `final_div_factor`. Optax counts one
    more step in each phase: for its one-cycle schedules, see `Piecewise`.

    That is the learning rate alone. Unless it is told `cycle_momentum=False`, `OneCycleLR` also
    lets the momentum, which is the first beta of an Adam, fall and rise the other way round. For
    all of what it does, give `momentum()` of the same schedule as well:
    `Adam(lr=cycle, betas=(cycle.momentum(), 0.999))`.

    Args:
        peak: At least 0.
        steps: How long all of it takes: above 0.
        pct_start: Which part of it rises: above 0 and at most 1, and one step at least.
        div_factor: Above 0.
        final_div_factor: Above 0.
        three_phase: Fall back to the first value in as long as it took to rise (`pct_start` is then
            about a half at most), and only then to the last.
        shape: `"cosine"`, `"linear"`, `"sqrt"` or `"constant"`. The first two are torch's `"cos"`
            and `"linear"`.

    Example:
        >>> import funcopt
        >>> from funcopt.schedules import OneCycle
        >>> cycle = OneCycle(peak=1.0, steps=10)
        >>> [round(cycle(step), 3) for step in (0, 1, 2, 9)]
        [0.04, 0.52, 1.0, 0.0]
        >>> opt = funcopt.Adam(lr=cycle, betas=(cycle.momentum(), 0.999))
        >>> [round(opt.betas[0](step), 3) for step in (0, 1, 2, 9)]
        [0.95, 0.9, 0.85, 0.95]
    """

    peak: Number
    steps: Number
    pct_start: Number = 0.3
    div_factor: Number = 25.0
    final_div_factor: Number = 1e4
    three_phase: bool = False
    shape: str = "cosine"

    def __post_init__(self) -> None:
        _check_cycle(self)

    def momentum(
        self, base_momentum: Number = 0.85, max_momentum: Number = 0.95
    ) -> OneCycleMomentum:
        """Return the schedule of the momentum that goes with this one, as a first beta.

        Args:
            base_momentum: The least, at the peak of the learning rate: at least 0 and below 1.
            max_momentum: The largest, at the first step and the last: at least 0 and below 1.

        Example:
            >>> from funcopt.schedules import OneCycle
            >>> OneCycle(peak=1.0, steps=10).momentum(base_momentum=0.8)(2)
            0.8
        """
        return OneCycleMomentum(
            self.steps, self.pct_start, base_momentum, max_momentum, self.three_phase, self.shape
        )

    @by_step
    def __call__(self, step: Number) -> Number:
        step, peak, steps, pct_start, div_factor, final_div_factor = wide(
            step, self.peak, self.steps, self.pct_start, self.div_factor, self.final_div_factor
        )
        start = peak / div_factor
        values = (start, peak, start, start / final_div_factor)
        return _cycle(step, values, steps, pct_start, self)


@register_dataclass
@dataclass(frozen=True)
class OneCycleMomentum:
    """The momentum of torch's `OneCycleLR`: down while the learning rate goes up, and up again.

    `OneCycle.momentum` makes the one that goes with a learning rate. In the third phase, if there
    is one, it stays at `max_momentum`.

    Args:
        steps: How long all of it takes: above 0.
        pct_start: Which part of it falls: above 0 and at most 1, and one step at least.
        base_momentum: The least: at least 0 and below 1.
        max_momentum: The largest: at least 0 and below 1.
        three_phase: Rise again in as long as it took to fall.
        shape: `"cosine"`, `"linear"`, `"sqrt"` or `"constant"`.

    Example:
        >>> from funcopt.schedules import OneCycleMomentum
        >>> [round(OneCycleMomentum(steps=10)(step), 3) for step in (0, 1, 2, 9)]
        [0.95, 0.9, 0.85, 0.95]
    """

    steps: Number
    pct_start: Number = 0.3
    base_momentum: Number = 0.85
    max_momentum: Number = 0.95
    three_phase: bool = False
    shape: str = "cosine"

    def __post_init__(self) -> None:
        _check_cycle(self)

    @by_step
    def __call__(self, step: Number) -> Number:
        step, steps, pct_start, least, most = wide(
            step, self.steps, self.pct_start, self.base_momentum, self.max_momentum
        )
        return _cycle(step, (most, least, most, most), steps, pct_start, self)


def _check_cycle(cycle: OneCycle | OneCycleMomentum) -> None:
    check_fields(cycle)
    check_choice("shape", cycle.shape, SHAPES)
    part = (cycle.pct_start, cycle.steps)
    check_together(
        part,
        lambda pct_start, steps: pct_start * steps >= 1,
        "pct_start={}, steps={}: their product must be at least 1. Raise one of them.",
    )
    check_together(
        part,
        lambda pct_start, steps: not cycle.three_phase or 2 * pct_start * steps - 1 <= steps,
        "pct_start={}, steps={}: rise and fall, which take as long, must end before the whole. "
        "Lower pct_start to a half.",
    )


def _cycle(
    step: Number,
    values: tuple[Number, ...],
    steps: Number,
    pct_start: Number,
    cycle: OneCycle | OneCycleMomentum,
) -> Number:
    """Return the value at a step, of a cycle with as many phases, and of such a shape, as this.

    Given are the values at the first step, after the first phase, after the second of three, and at
    the last step.
    """
    turn = pct_start * steps - 1
    boundaries: tuple[Number, ...] = (turn, 2 * turn, steps - 1)
    if not cycle.three_phase:
        boundaries, values = (turn, steps - 1), (values[0], values[1], values[3])
    # There may be no last phase, as at pct_start=1. Nothing falls then, as in torch.
    *before, end = values
    end = choose(boundaries[-2] < boundaries[-1], end, before[-1])
    return phases(step, (*before, end), boundaries, [SHAPES[cycle.shape]] * len(boundaries))
