"""Interleaved timing: every round takes one sample of every candidate, in an order of its own.

A machine that others use as well is slower in some minutes than in others. Candidates timed one
after another would each meet another machine. Here each round meets all candidates, and what is
compared are times of the same round; the median over rounds then leaves out the rounds in which
something came in between.
"""

from __future__ import annotations

import random
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from .load import Load
from .results import Figure, Row, Target

__all__ = [
    "Absent",
    "Candidate",
    "Measured",
    "Settings",
    "Step",
    "attempt",
    "clock_of",
    "compare",
    "in_turn",
]

Step = Callable[[], object]
Clock = Callable[[], float]
Result = TypeVar("Result")

# However slow a workload is, so many rounds are taken where as many were asked for.
_FEWEST_ROUNDS = 5


class Absent(Exception):  # noqa: N818 - it is no error
    """Raised where a candidate cannot be measured here. The message says why."""


class Candidate(NamedTuple):
    """Something to be timed."""

    name: str
    build: Callable[[], Step]  # makes all it needs, and returns what is timed
    required: bool = False  # whether its failure is ours; that of others is reported in the table


@dataclass(frozen=True)
class Settings:
    """How much to measure, and where."""

    device: torch.device
    rounds: int
    seconds: float  # of measuring, for each workload


class Measured(NamedTuple):
    """Seconds for a step, for each candidate one number for each round."""

    seconds: dict[str, list[float]]
    missing: dict[str, str]  # why the other candidates were not measured
    load: float | None = None  # the share of the machine that other programs took meanwhile

    def caution(self) -> str:
        """Say so if other programs were in the way."""
        # Those suffer most whose threads wait for each other, so that ratios suffer, too.
        if self.load is None or self.load < 0.05:
            return ""
        return f"(Other programs took {self.load:.0%} of the machine meanwhile: not to be trusted.)"

    def ratio(self, name: str, *to: str, factor: float = 1.0) -> Figure | None:
        """Return the time of a candidate as a multiple of what others took together, by round.

        Args:
            name: The candidate.
            to: The others. They are added up.
            factor: Multiplies the ratio.

        Returns:
            The median over the rounds, with quartiles; None if one of them was not measured.
        """
        if not self.seconds.keys() >= {name, *to}:
            return None
        others = zip(*(self.seconds[other] for other in to), strict=True)
        pairs = zip(self.seconds[name], map(sum, others), strict=True)
        return Figure.median([factor * own / other for own, other in pairs])

    def row(
        self,
        name: str,
        *to: str,
        label: str = "",
        factor: float = 1.0,
        target: Target | None = None,
        note: str = "",
        drawn: bool = True,
    ) -> Row:
        """Return a row with the ratio, or with why there is none."""
        absent = [other for other in (name, *to) if other in self.missing]
        reasons = [
            self.missing[other] if other == name else f"{other} {self.missing[other]}"
            for other in absent
        ]
        figure = self.ratio(name, *to, factor=factor)
        return Row(label or name, figure, target, "; ".join(reasons) or note, drawn)


def compare(
    candidates: Sequence[Candidate], settings: Settings, clock: Clock | None = None
) -> Measured:
    """Time candidates against each other.

    Args:
        candidates: The candidates, of different names.
        settings: How many rounds to take, and how much time for all.
        clock: Returns the time in seconds once the device has done all that it was told to do.
    """
    clock = clock or clock_of(settings.device)
    # Work on a GPU has a fixed price for waiting until it is done, which a sample has to dwarf.
    shortest = 2e-3 if settings.device.type == "cpu" else 2e-2
    steps: dict[str, Step] = {}
    calls: dict[str, int] = {}
    missing: dict[str, str] = {}
    for candidate in candidates:
        found = attempt(candidate, lambda step: (step, _calls_for(step, shortest, clock)))
        if isinstance(found, str):
            missing[candidate.name] = found
        else:
            steps[candidate.name], calls[candidate.name] = found
    load = Load()
    seconds = _interleave(steps, calls, settings, clock)
    return Measured(seconds, missing, load.of_others())


def attempt(candidate: Candidate, measure: Callable[[Step], Result]) -> Result | str:
    """Build a candidate and measure something of it; return why that cannot be, if it cannot."""
    try:
        return measure(candidate.build())
    except Absent as reason:
        return str(reason)
    except Exception as error:
        if candidate.required:
            raise
        first, *_ = [*str(error).strip().splitlines(), ""]
        return f"fails: {type(error).__name__}: {textwrap.shorten(first, 100)}"


def _calls_for(step: Step, shortest: float, clock: Clock) -> int:
    """Return how many calls make a sample that lasts long enough."""

    def lasts(calls: int) -> float:
        first = calls * _sample(step, calls, clock)
        if first >= 10 * shortest:
            return first
        # Something may have come in between, and made it last.
        return min(first, *(calls * _sample(step, calls, clock) for _ in range(2)))

    step()  # the first call compiles, allocates, and fills caches
    calls = 1
    while lasts(calls) < shortest:
        calls *= 2
    return calls


def _interleave(
    steps: dict[str, Step], calls: dict[str, int], settings: Settings, clock: Clock
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffled = list(steps), random.Random(0)
    start = clock()
    for done in range(settings.rounds):
        if done >= _FEWEST_ROUNDS and clock() - start > settings.seconds:
            break
        shuffled.shuffle(order)
        for name in order:
            seconds[name].append(_sample(steps[name], calls[name], clock))
    return seconds


def _sample(step: Step, calls: int, clock: Clock) -> float:
    """Return the seconds that a step takes."""
    step()  # pays for what the candidate before left behind: cold caches, threads that spin
    start = clock()
    for _ in range(calls):
        step()
    return (clock() - start) / calls


def in_turn(update: Callable[..., tuple[Any, Any]], grads: Any, state: Any, params: Any) -> Step:
    """Return a step on the results of the last one, as in training."""

    def step() -> None:
        nonlocal params, state
        params, state = update(grads, state, params)

    return step


def clock_of(device: torch.device) -> Clock:
    """Return a clock that waits until the device has done all that it was told to do."""
    if device.type == "cpu":
        return time.perf_counter

    def now() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return now
