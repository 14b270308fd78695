"""What wrappers compute of stacked members: numbers of each, and rows of those who are active.

An update of a wrapper for stacked members is a function `_plan_members(self, stack)`. It checks its
state, finds its numbers, lets the inner optimizer plan its part, and returns a function that makes
the update. In that one nothing is refused any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
    rows = None if active is None else active.nonzero().squeeze(1)
    if active is None or rows is None or len(rows) == len(active):
        for target, *own in zip(targets, *others, strict=True):
            change_(target, *own, *numbers)
        return
    runs = runs_of(rows)
    for target, *own in zip(targets, *others, strict=True):
        if target.numel() // len(target) * len(rows) >= _WORTH_CALLS * len(runs):
            for start, length in runs:
                parts = (tensor.narrow(0, start, length) for tensor in (target, *own))
                change_(*parts, *(_narrowed(number, start, length) for number in numbers))
        else:
            first, *rest = (tensor.index_select(0, rows) for tensor in (target, *own))
            change_(first, *rest, *(_selected(number, rows) for number in numbers))
            target.index_copy_(0, rows, first)


def runs_of(rows: Tensor) -> list[tuple[int, int]]:
    """Return where rows that lie side by side start, and how many they are."""
    runs: list[tuple[int, int]] = []
    for row in rows.tolist():
        if runs and runs[-1][0] + runs[-1][1] == row:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((row, 1))
    return runs


def _beside(active: Tensor, tensor: Tensor) -> Tensor:
    """Return a mask of members so that it meets a tensor at the front."""
    return active.reshape(active.shape + (1,) * (tensor.ndim - 1))


def _narrowed(number: Number, start: int, length: int) -> Number:
    if not isinstance(number, Tensor) or number.ndim == 0:
        return number
    return number.narrow(0, start, length)


def _selected(number: Number, rows: Tensor) -> Number:
    if not isinstance(number, Tensor) or number.ndim == 0:
        return number
    return number.index_select(0, rows)


def lerp_rows(
    stack: Stack, starts: Sequence[Tensor], ends: Sequence[Tensor], weight: Number
) -> list[Tensor]:
    """Return starts moved by a share of the way to the ends, of active members alone.

    They are the starts themselves if the update is in place, else fresh.
    """
    weight = read_if_same(weight)
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
