"""What is found: figures, what they are held to, and the rows and sections that they stand in."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Figure", "Row", "Section", "Target", "above", "at_least", "at_most", "below", "shown"]


class Figure(NamedTuple):
    """A number; if it is a median, with its quartiles."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def median(cls, values: Sequence[float]) -> Figure:
        """Return the median and the quartiles of some values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)


class Target(NamedTuple):
    """What a figure is held to. It is judged as it is shown, so that the table explains itself."""

    sense: str
    bound: float

    def __str__(self) -> str:
        return f"{self.sense} {shown(self.bound)}"

    def holds(self, figure: Figure) -> bool:
        """Whether a figure reaches the target."""
        value = figure.value
        judged = value if math.isinf(value) else float(shown(value))
        return bool(_SENSES[self.sense](judged, self.bound))


_SENSES = {"≤": operator.le, "<": operator.lt, ">": operator.gt, "≥": operator.ge}


def at_most(bound: float) -> Target:
    return Target("≤", bound)


def below(bound: float) -> Target:
    return Target("<", bound)


def above(bound: float) -> Target:
    return Target(">", bound)


def at_least(bound: float) -> Target:
    return Target("≥", bound)


class Row(NamedTuple):
    """A line of a table."""

    label: str
    figure: Figure | None  # None: not measured, and the note says why
    target: Target | None = None
    note: str = ""
    drawn: bool = True  # whether it is a ratio to the baseline, which the picture shows

    @property
    def verdict(self) -> str:
        """Whether the target holds, in a word or two; empty if there is none."""
        if self.target is None:
            return ""
        if self.figure is None:
            return "not judged"
        return "yes" if self.target.holds(self.figure) else "no"


class Section(NamedTuple):
    """A table, with what it needs to be read."""

    title: str
    size: str  # of what is measured, in a few words
    about: str
    unit: str  # what the figures are: the heading of their column
    rows: list[Row]
    drawn: bool = True  # whether its figures are times as ratios to a baseline


def shown(value: float) -> str:
    """Write a number with as many digits as anyone would read."""
    if math.isinf(value):
        return "not done"
    size = abs(value)
    digits = 3 if 0 < size < 0.095 else 2 if size < 20 else 1 if size < 100 else 0
    return f"{value:.{digits}f}"
