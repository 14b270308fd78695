"""What wrappers compute of stacked members: numbers of each, and rows of those who are active.

An update of a wrapper for stacked members is a function `_plan_members(self, stack)`. It checks its
state, finds its numbers, lets the inner optimizer plan its part, and returns a function that makes
the update. In that one nothing is refused any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import tensors
from .._core.tensors import compute_dtype, copies_of, fit, is_narrow
from .._core.types import Number, Optimizer
from .._engine.counts import read_if_same
from .._engine.stacked import Stack, check_of_members
from ._shared import Gradients, gather_gradients


def numbers_of_members(
    opt: Any, stack: Stack, **own: tuple[Any, torch.dtype | None]
) -> dict[str, Number] | None:
    """Return the hyperparameters of a wrapper, each for all members or of shape (members,).

    None if the wrapper needs a vmap: if one is a schedule, or has a derivative to follow, or if one
    of the wrapper's own tensors is no number of each member. These are given by name, with the
    dtype that each must have; None is any floating-point one.

    Raises:
        ValueError: If a number is out of range, or not one for each member.
    """
    counts = isinstance(getattr(stack.state, "step", ()), Tensor) and "step" not in own
    if counts or not all(map(_is_number, own.values())):  # what is counted is for a schedule
        return None
    numbers: dict[str, Number] = {}
    for hyperparam in opt.hyperparams:
        given = hyperparam.of(opt)
        if isinstance(given, Tensor):
            if type(given) is not Tensor or not given.is_cpu or given.requires_grad:
                return None
            check_of_members(hyperparam, given, stack.members)
        elif not isinstance(given, (float, int)):
            return None
        numbers[hyperparam.name] = given
    return numbers


def _is_number(own: tuple[Any, torch.dtype | None]) -> bool:
    value, dtype = own
    if not isinstance(value, Tensor) or value.ndim != 1:
        return False
    return value.is_floating_point() if dtype is None else value.dtype is dtype


def gather_stack(opt: Optimizer[Any], stack: Stack) -> Gradients | None:
    """Return gradients beside the parameters, checked; None if one is missing, or leaves rest."""
    gradients = gather_gradients(opt, stack.grads, stack.params)
    whole = not gradients.resting and all(leaf is not None for leaf in gradients.leaves)
    return gradients if whole else None


def renewed(stack: Stack, *pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Return new numbers of the active members beside the old ones of the others.

    Each pair is of the old ones and the new. If the update is in place, they are written there.
    """
    news = []
    for old, new in pairs:
        own = new if stack.active is None else torch.where(_beside(stack.active, old), new, old)
        news.append(old.copy_(own) if stack.in_place else own)
    return news


# A run of rows with so many elements is worth calls of its own. Shorter ones are copied together.
_WORTH_CALLS = 4096
# To take rows out reads and writes them once more, before they are computed with.
_FEW = 3


def are_few(rows: Tensor, members: int) -> bool:
    """Whether so few of the members are active that it is worth to take their rows out."""
    return _FEW * len(rows) <= members


def change_rows_(
    active: Tensor | None,
    change_: Callable[..., object],
    targets: Sequence[Tensor],
    *others: Sequence[Tensor],
    numbers: Sequence[Number] = (),
) -> None:
    """Let a function write over tensors, and where there is a mask over the active rows alone.

    It is called leaf by leaf as `change_(target, *others, *numbers)`. The numbers are for all
    members, or of shape (members,) and come with the rows.
    """
    some = _Some.of(active)
    for target, *own in zip(targets, *others, strict=True):
        if some is None:
            change_(target, *own, *numbers)
        elif some.lie_in_runs(target):
            for parts in zip(*map(some.runs_in, (target, *own, *numbers)), strict=True):
                change_(*parts)
        else:
            first, *rest = map(some.rows_in, (target, *own, *numbers))
            change_(first, *rest)
            target.index_copy_(0, some.rows, first)


def make_rows(
    active: Tensor | None,
    make: Callable[..., Tensor],
    *columns: Sequence[Tensor],
    numbers: Sequence[Number] = (),
) -> list[Tensor]:
    """Return what a function makes of tensors, and where there is a mask of the active rows.

    What is in the others is nobody's. The function is called leaf by leaf as `make(*tensors,
    *numbers)`, likewise.
    """
    some, made = _Some.of(active), []
    for own in zip(*columns, strict=True):
        if some is None:
            made.append(make(*own, *numbers))
        elif some.lie_in_runs(own[0]):
            whole: Tensor | None = None
            parts = zip(*map(some.runs_in, (*own, *numbers)), strict=True)
            for run, given in zip(some.runs, parts, strict=True):
                new = make(*given)
                if whole is None:
                    whole = new.new_empty((some.members, *new.shape[1:]))
                whole.narrow(0, *run).copy_(new)
            made.extend(() if whole is None else (whole,))
        elif not are_few(some.rows, some.members):
            made.append(make(*own, *numbers))
        else:
            new = make(*map(some.rows_in, (*own, *numbers)))
            whole = new.new_empty((some.members, *new.shape[1:]))
            made.append(whole.index_copy_(0, some.rows, new))
    return made


class _Some(NamedTuple):
    """The active ones of several members."""

    members: int
    rows: Tensor  # their indices
    runs: list[list[int]]  # where those that lie side by side start, and how many they are
    sizes: list[int]  # how many rows follow each other that are not active, and that are, by turns

    @classmethod
    def of(cls, active: Tensor | None) -> _Some | None:
        """Return which are active: None if all are."""
        rows = None if active is None else active.nonzero().squeeze(1)
        if active is None or rows is None or len(rows) == len(active):
            return None
        runs, sizes, end = runs_of(rows), [], 0
        for start, length in runs:
            sizes += [start - end, length]
            end = start + length
        return cls(len(active), rows, runs, [*sizes, len(active) - end])

    def lie_in_runs(self, tensor: Tensor) -> bool:
        """Whether so much of a tensor lies side by side that each run is worth calls of its own."""
        elements = tensor.numel() // self.members
        return elements * len(self.rows) >= _WORTH_CALLS * len(self.runs) > 0

    def runs_in(self, part: Number) -> Iterable[Any]:
        """Return for each run the rows of a tensor, in its memory, or a number for all."""
        if not isinstance(part, Tensor) or part.ndim == 0:
            return repeat(part, len(self.runs))
        return part.split_with_sizes(self.sizes)[1::2]

    def rows_in(self, part: Number) -> Any:
        """Return copies of the rows of a tensor, or a number for all."""
        if not isinstance(part, Tensor) or part.ndim == 0:
            return part
        return part.index_select(0, self.rows)


def runs_of(rows: Tensor) -> list[list[int]]:
    """Return where rows that lie side by side start, and how many they are."""
    starts = torch.ones_like(rows, dtype=torch.bool)
    starts[1:] = rows[1:] != rows[:-1] + 1
    found = starts.nonzero().squeeze(1)
    ends = torch.cat((found[1:], found.new_full((1,), len(rows))))
    runs: list[list[int]] = torch.stack((rows[found], ends - found), 1).tolist()
    return runs if len(rows) else []


def shared(active: Tensor | None, number: Number) -> Number:
    """Return a number of members as a Python number if all that are active share it."""
    if active is None or not isinstance(number, Tensor) or number.ndim == 0:
        return read_if_same(number)
    same = read_if_same(number[active])
    return number if isinstance(same, Tensor) else same


def _beside(active: Tensor, tensor: Tensor) -> Tensor:
    """Return a mask of members so that it meets a tensor at the front."""
    return active.reshape(active.shape + (1,) * (tensor.ndim - 1))


def lerp_rows(
    stack: Stack, starts: Sequence[Tensor], ends: Sequence[Tensor], weight: Number
) -> list[Tensor]:
    """Return starts moved by a share of the way to the ends, of active members alone.

    They are the starts themselves if the update is in place, else fresh.
    """
    weight = shared(stack.active, weight)
    if stack.active is None and not stack.in_place:
        return [_lerp(*pair, weight) for pair in zip(starts, ends, strict=True)]
    targets = rewritten(stack, starts)
    change_rows_(stack.active, lerp_, targets, ends, numbers=[weight])
    return targets


def rewritten(stack: Stack, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors that an update may write over: these if it is in place, else copies."""
    return list(tensors) if stack.in_place else copies_of(tensors)


def _lerp(start: Tensor, end: Tensor, weight: Number) -> Tensor:
    [moved] = tensors.lerp([start], [end], fit(weight, start.to(compute_dtype(start.dtype))))
    return moved


def lerp_(start: Tensor, end: Tensor, weight: Number) -> None:
    """Move stacked tensors a share of the way, which may differ between members, in place."""
    if is_narrow(start.dtype):
        start.copy_(_lerp(start, end, weight))
    else:
        start.lerp_(end.to(start.dtype), fit(weight, start))
