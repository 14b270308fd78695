"""Scores of parameters: which of two is better, and reading them where that is free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._core.types import Number, Range
from ._shared import check_scalar, known_value

MODES = ("min", "max")

PATIENCE = Range(
    "must be a whole number of at least 0, or infinite",
    lambda value: value == math.inf or (0.0 <= value < math.inf and value == int(value)),
    whole=True,
)


def worst(mode: str) -> float:
    """Return the score than which every other one is better."""
    return math.inf if mode == "min" else -math.inf


def is_better(
    value: Number, best: Number, mode: str, threshold: Number, *, relative: bool = False
) -> bool | Tensor:
    """Whether a score is better than the best one by more than a threshold. A NaN never is."""
    if mode == "min":
        return value < (best * (1.0 - threshold) if relative else best - threshold)
    return value > (best * (1.0 + threshold) if relative else best + threshold)


def check_scores(state: Any, names: tuple[str, ...]) -> bool:
    """Refuse fields of a state that are no float64 numbers; return whether it was told a score."""
    for name in names:
        check_scalar(f"state.{name}", getattr(state, name), torch.float64)
    if isinstance(state.value, tuple) and state.value == ():
        return False
    check_scalar("state.value", state.value)
    return True


def read_all(given: Mapping[str, Number], place: torch.device) -> dict[str, Number]:
    """Return numbers as Python numbers if all can be read at once, else their tensors in float64.

    These are moved to a place, where the numbers of the state are.
    """
    known: dict[str, Number] = {}
    for name, number in given.items():
        value = known_value(number) if isinstance(number, Tensor) else float(number)
        if value is None:
            return {
                name: own.to(place, torch.float64) if isinstance(own, Tensor) else own
                for name, own in given.items()
            }
        known[name] = value
    return known
