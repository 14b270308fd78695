"""Some steps in a row, as a function from tensors to tensors that can be called again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._core import pytree
from .._core.pytree import Structure
from . import autocast
from .checkpoint import checkpoint
from .closures import Closure
from .looks import checked_carry, checked_out, taken
from .probe import is_followed_back
from .randomness import Drawn, generators_of

Split: TypeAlias = Callable[[int], list[int]]
"""How many steps go into each segment, of so many; nothing if they are not to be divided."""


class Loop(NamedTuple):
    """What all segments of an unroll have in common."""

    closure: Closure
    structure: Structure  # of the carry
    split: Split
    recursive: bool  # whether segments are divided likewise when they are made again


class Made(NamedTuple):
    """What steps have made: the leaves of the last carry, and those of each output, stacked."""

    leaves: list[Any]
    outs: list[Tensor | None]
    structure: Structure | None  # of an output; None if there was no step


def run(loop: Loop, lifted: Sequence[Tensor], leaves: list[Any], first: int, count: int) -> Made:
    """Make so many steps from this one on, in segments if a derivative is to go back through."""
    lengths = loop.split(count)
    tensors = [*lifted, *_tensors(leaves)]
    if not lengths or not is_followed_back(tensors):
        return run_plainly(loop.closure.rebuild(lifted), loop.structure, leaves, first, count)
    parts = []
    for length in lengths:
        segment = _Segment(loop, len(lifted), leaves, first, length)
        made = segment.made_of(checkpoint(segment, *lifted, *_tensors(leaves)))
        leaves, first = made.leaves, first + length
        parts.append(made)
    return Made(leaves, joined(torch.cat, [part.outs for part in parts]), parts[0].structure)


def run_plainly(
    step: Callable[..., Any], structure: Structure, leaves: list[Any], first: int, count: int
) -> Made:
    """Make so many steps from this one on, one after another."""
    outs: list[list[Tensor | None]] = []
    found = None
    for index in range(first, first + count):
        carry, out = taken(step, pytree.unflatten(structure, leaves), index)
        news = checked_carry(carry, structure, leaves, index)
        own, shape = checked_out(out, found, outs[0] if outs else None, index)
        leaves, found = news, shape
        outs.append(own)
    return Made(leaves, joined(torch.stack, outs), found)


class _Segment:
    """Some steps in a row, as a function of the tensors closed over and those of the carry.

    What else is in the carry, such as a Python number, is remembered from the first call. Every
    other call must come to the same.
    """

    def __init__(self, loop: Loop, lifted: int, leaves: list[Any], first: int, count: int) -> None:
        self._loop, self._lifted, self._first, self._count = loop, lifted, first, count
        self._leaves = _without_tensors(leaves)
        self._autocast = autocast.now()
        self._drawn = Drawn(generators_of(_tensors(leaves), loop.closure.generators))
        self._ends: Made | None = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Make the steps; return the tensors of the last carry and of the outputs."""
        made = autocast.call(self._autocast, self._drawn.call, self._run, tensors)
        if self._ends is None:
            self._ends = Made(
                _without_tensors(made.leaves), _without_tensors(made.outs), made.structure
            )
        return (*_tensors(made.leaves), *_tensors(made.outs))

    def _run(self, tensors: Sequence[Tensor]) -> Made:
        lifted, own = tensors[: self._lifted], tensors[self._lifted :]
        leaves = _with_tensors(self._leaves, own)
        if not self._loop.recursive:
            step = self._loop.closure.rebuild(lifted)
            return run_plainly(step, self._loop.structure, leaves, self._first, self._count)
        return run(self._loop, lifted, leaves, self._first, self._count)

    def made_of(self, tensors: Sequence[Tensor]) -> Made:
        """Return what the steps have made, from the tensors that a call has returned."""
        assert self._ends is not None
        leaves, outs, structure = self._ends
        count = len(_places(leaves))
        return Made(
            _with_tensors(leaves, tensors[:count]), _with_tensors(outs, tensors[count:]), structure
        )


class _Place:
    """Stands where a tensor was."""


_PLACE = _Place()


def _without_tensors(leaves: Sequence[Any]) -> list[Any]:
    return [_PLACE if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _places(leaves: Sequence[Any]) -> list[int]:
    return [index for index, leaf in enumerate(leaves) if leaf is _PLACE]


def _with_tensors(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    full = list(leaves)
    for index, tensor in zip(_places(leaves), tensors, strict=True):
        full[index] = tensor
    return full


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def joined(
    join: Callable[[list[Tensor]], Tensor], parts: Sequence[Sequence[Tensor | None]]
) -> list[Tensor | None]:
    """Stack or concatenate what belongs together of several outputs; None stays None."""
    columns = zip(*parts, strict=True)
    return [None if column[0] is None else join(_tensors(column)) for column in columns]
