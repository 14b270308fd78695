"""The table of schedules that the tests run over, each with its values by plain arithmetic."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from funcopt.schedules import (
    Constant,
    Cosine,
    Decoupled,
    Exponential,
    InverseSquareRoot,
    Join,
    Linear,
    OneCycle,
    OneCycleMomentum,
    Piecewise,
    Polynomial,
    WarmupStableDecay,
)


class Case(NamedTuple):
    schedule: Any
    expected: Callable[[float], float]  # the value at a step, worked out by hand
    boundaries: tuple[float, ...] = ()  # where it is not smooth


def wave(progress: float) -> float:
    """Half a cosine wave, from 1 to 0."""
    return (1 + math.cos(math.pi * progress)) / 2


def warmed(t: float, *, peak: float, warmup: float, start: float, then: float) -> float:
    return start + (peak - start) * t / warmup if t < warmup else then


CASES = {
    "constant": Case(Constant(0.3), lambda t: 0.3),
    "linear": Case(
        Linear(start=0.2, end=0.5, steps=8), lambda t: 0.2 + 0.3 * min(t / 8, 1), (0, 8)
    ),
    "polynomial": Case(
        Polynomial(start=0.4, end=0.1, steps=10, power=3),
        lambda t: 0.1 + 0.3 * (1 - min(t / 10, 1)) ** 3,
        (0, 10),
    ),
    "polynomial of a root": Case(
        Polynomial(start=0.1, end=0.4, steps=10, power=0.5),
        lambda t: 0.4 - 0.3 * (1 - min(t / 10, 1)) ** 0.5,
        (0, 10),
    ),
    "cosine": Case(Cosine(peak=0.3, steps=12), lambda t: 0.3 * wave(min(t / 12, 1)), (0,)),
    "cosine with warmup": Case(
        Cosine(peak=0.3, steps=12, warmup_steps=4, start=0.1, end=0.02, power=1.5),
        lambda t: warmed(
            t,
            peak=0.3,
            warmup=4,
            start=0.1,
            then=0.02 + 0.28 * wave(min(max(t - 4, 0) / 8, 1)) ** 1.5,
        ),
        (0, 4),
    ),
    "warmup, stable, decay": Case(
        WarmupStableDecay(peak=0.3, steps=12, warmup_steps=3, decay_steps=5, start=0.1, end=0.05),
        lambda t: warmed(
            t,
            peak=0.3,
            warmup=3,
            start=0.1,
            then=0.3 - 0.25 * min(max(t - 7, 0) / 5, 1),
        ),
        (0, 3, 7, 12),
    ),
    "warmup, stable, decay by a root": Case(
        WarmupStableDecay(peak=0.3, steps=12, warmup_steps=3, decay_steps=5, shape="sqrt"),
        lambda t: warmed(
            t,
            peak=0.3,
            warmup=3,
            start=0.0,
            then=0.3 * (1 - math.sqrt(min(max(t - 7, 0) / 5, 1))),
        ),
        (0, 3, 7, 12),
    ),
    "exponential": Case(
        Exponential(start=0.5, rate=0.8, steps=3, end=0.1),
        lambda t: max(0.5 * 0.8 ** (t / 3), 0.1),
        (0, 21.637565),
    ),
    "staircase": Case(
        Exponential(start=0.5, rate=0.8, steps=3, staircase=True),
        lambda t: 0.5 * 0.8 ** (t // 3),
        (0, 3, 6, 9, 12, 15),
    ),
    "inverse square root": Case(
        InverseSquareRoot(peak=0.5, warmup_steps=4, start=0.1),
        lambda t: warmed(t, peak=0.5, warmup=4, start=0.1, then=0.5 * math.sqrt(4 / max(t, 4))),
        (0, 4),
    ),
    "piecewise": Case(
        Piecewise(values=(0.5, 0.2, 0.3), boundaries=(4, 9)),
        lambda t: 0.5 if t < 4 else 0.2 if t < 9 else 0.3,
        (4, 9),
    ),
    "piecewise, interpolated": Case(
        Piecewise(values=(0.5, 0.2, 0.3), boundaries=(4, 9), shape="linear"),
        lambda t: 0.5 - 0.3 * t / 4 if t < 4 else 0.2 + 0.1 * min((t - 4) / 5, 1),
        (0, 4, 9),
    ),
    "one cycle": Case(
        OneCycle(peak=0.5, steps=11, pct_start=0.4),
        lambda t: (
            0.5 - 0.48 * wave(t / 3.4)
            if t < 3.4
            else 2e-6 + (0.5 - 2e-6) * wave(min((t - 3.4) / 6.6, 1))
        ),
        (0,),
    ),
    "one cycle in three phases": Case(
        OneCycle(peak=0.5, steps=11, pct_start=0.4, three_phase=True, shape="linear"),
        lambda t: (
            0.02 + 0.48 * t / 3.4
            if t < 3.4
            else 0.5 - 0.48 * (t - 3.4) / 3.4
            if t < 6.8
            else 0.02 + (2e-6 - 0.02) * min((t - 6.8) / 3.2, 1)
        ),
        (0, 3.4, 6.8, 10),
    ),
    "momentum of one cycle": Case(
        OneCycle(peak=0.5, steps=11, pct_start=0.4).momentum(),
        lambda t: (
            0.85 + 0.1 * wave(t / 3.4) if t < 3.4 else 0.95 - 0.1 * wave(min((t - 3.4) / 6.6, 1))
        ),
        (0,),
    ),
    "momentum of one cycle in three phases": Case(
        OneCycleMomentum(
            steps=11,
            pct_start=0.4,
            base_momentum=0.2,
            max_momentum=0.6,
            three_phase=True,
            shape="linear",
        ),
        lambda t: (
            0.6 - 0.4 * t / 3.4 if t < 3.4 else 0.2 + 0.4 * (t - 3.4) / 3.4 if t < 6.8 else 0.6
        ),
        (0, 3.4, 6.8, 10),
    ),
    "join": Case(
        Join((Linear(0.1, 0.5, 5), Exponential(0.5, 0.9), Constant(0.2)), boundaries=(5, 9)),
        lambda t: 0.1 + 0.08 * t if t < 5 else 0.5 * 0.9 ** (t - 5) if t < 9 else 0.2,
        (0, 5, 9),
    ),
    "decoupled": Case(
        Decoupled(0.02, Linear(0.1, 0.5, 5)),
        lambda t: 0.02 / (0.1 + 0.08 * min(t, 5)),
        (0, 5),
    ),
}


def in_tensors(value: Any, tensor: Callable[[float], Any] | None = None) -> Any:
    """The same schedule with every number a float64 tensor, or what is made of it instead."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **{n: in_tensors(v, tensor) for n, v in fields.items()})
    if isinstance(value, tuple):
        return tuple(in_tensors(member, tensor) for member in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return tensor(value) if tensor else torch.tensor(value, dtype=torch.float64)
    return value
