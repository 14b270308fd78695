"""Random generators whose states are put back, so that steps draw again what they drew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .._core import transforms

P = ParamSpec("P")
R = TypeVar("R")


def generators_of(
    tensors: Iterable[Tensor], others: Sequence[torch.Generator]
) -> list[torch.Generator]:
    """Return torch's own generators of the CPU and of these tensors' GPUs, and the others."""
    found = [torch.default_generator]
    if not transforms.capturing():
        indices = {tensor.device.index or 0 for tensor in tensors if tensor.is_cuda}
        found += [torch.cuda.default_generators[index] for index in sorted(indices)]
    return [*found, *others]


def undone(
    generators: Iterable[torch.Generator],
    function: Callable[P, R],
    *args: P.args,
    **kwargs: P.kwargs,
) -> R:
    """Call a function, and leave generators as they were before."""
    before = [(generator, generator.get_state()) for generator in generators]
    try:
        return function(*args, **kwargs)
    finally:
        put_back(before)


def put_back(states: Iterable[tuple[torch.Generator, Tensor]]) -> None:
    """Give generators the states that they had."""
    for generator, state in states:
        generator.set_state(state)


class Drawn:
    """What a function draws from some generators: the same at each call."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        """Take the generators; their states are noted when the function is called first."""
        self._generators = generators
        self._starts: list[tuple[torch.Generator, Tensor]] | None = None

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function; at each call after the first one, generators are left as they were."""
        if self._starts is not None:
            again = [generator for generator, _ in self._starts]
            return undone(again, partial(self._again, function), *args, **kwargs)
        starts = [(generator, generator.get_state()) for generator in self._generators]
        result = function(*args, **kwargs)
        # Of what nobody drew from there is nothing to keep.
        self._starts = [
            (generator, start)
            for generator, start in starts
            if not torch.equal(start, generator.get_state())
        ]
        return result

    def _again(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        put_back(self._starts or ())
        return function(*args, **kwargs)
