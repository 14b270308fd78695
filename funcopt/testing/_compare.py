"""How two results are held against each other: the tolerances, and the message of a broken law."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core import pytree
from .._core.types import Tree

# How many units in the last place two results of the same equations may differ by, per step: in the
# element itself, and in the largest element of its leaf. They collect the roundings of some ten
# operations; of fewer in 16 bits, where these are large enough to hide a defect.
ROUNDING: dict[torch.dtype, float] = {
    **dict.fromkeys((torch.float16, torch.bfloat16), 4.0),
    **dict.fromkeys((torch.float32, torch.float64, torch.complex64, torch.complex128), 16.0),
}

# To the bit; a NaN equals a NaN.
EXACT: dict[torch.dtype, float] = dict.fromkeys(ROUNDING, 0.0)


class LawBroken(AssertionError):  # noqa: N818
    """A law does not hold. The message names the law, the path, the step, and both values."""


class NotApplicable(Exception):  # noqa: N818
    """A law says nothing about this optimizer. The message says why."""


def compare(
    law: str,
    step: int,
    root: str,
    actual: Tree,
    expected: Tree,
    ulps: dict[torch.dtype, float] = EXACT,
    before: Tree = None,
) -> None:
    """Hold one tree of tensors, named `root` in messages, against another.

    The first leaf that differs in structure, shape, dtype, or by more than so many units in the
    last place breaks the law. `before` is what both came of: a number that is small because two
    large ones cancelled has the rounding of the large ones.
    """
    wanted, structure = pytree.flatten(expected)
    try:
        leaves = pytree.pair(actual, root, structure).leaves
    except ValueError as error:
        raise LawBroken(
            f"{law}: step {step}, {root}: got a tree of other leaves: {error}"
        ) from None
    olds = wanted if before is None else pytree.pair(before, root, structure).leaves
    for index, (one, other, old) in enumerate(zip(leaves, wanted, olds, strict=True)):
        reason = _difference(one, other, old, ulps)
        if reason is not None:
            path = pytree.paths(structure, root)[index]
            raise LawBroken(f"{law}: step {step}, {path}: {reason}")


def compare_moved(
    law: str,
    step: int,
    actual: tuple[Tree, Tree],
    expected: tuple[Tree, Tree],
    ulps: dict[torch.dtype, float] = EXACT,
    before: tuple[Tree, Tree] = (None, None),
) -> None:
    """Hold the parameters and the state that an update returned against others."""
    for root, one, other, old in zip(MOVED, actual, expected, before, strict=True):
        compare(law, step, root, one, other, ulps, old)


# What an update returns.
MOVED = ("params", "state")


def unlike(one: Tensor, other: Tensor) -> str | None:
    """Say in what a tensor is not made like another, if in anything."""
    for name in ("shape", "dtype", "device"):
        if getattr(one, name) != getattr(other, name):
            return f"got {name} {getattr(one, name)}, expected {getattr(other, name)}"
    return None


def _difference(one: Any, other: Any, old: Any, ulps: dict[torch.dtype, float]) -> str | None:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        same = type(one) is type(other) and one == other
        return None if same else f"got {one!r}, expected {other!r}"
    one, other = one.detach(), other.detach()
    reason = unlike(one, other)
    if reason is not None or one.numel() == 0:
        return reason
    wrong = ~_within(one, other, old.detach(), ulps.get(one.dtype, 0.0))
    if not bool(wrong.any()):
        return None
    where = tuple(int(i) for i in wrong.nonzero()[0])
    got, wanted = one[where].item(), other[where].item()
    return f"got {got:.9g}, expected {wanted:.9g} at index {where}"


def _within(one: Tensor, other: Tensor, old: Tensor, ulps: float) -> Tensor:
    same = (one == other) | (one.isnan() & other.isnan())
    if ulps == 0.0:
        return same
    ulp = torch.finfo(one.dtype).eps
    wide_one, wide_other = wide(one), wide(other)
    size = torch.maximum(wide_other.abs(), wide(old).abs())
    size = torch.where(size.isfinite(), size, 0.0)
    # Below the normal range the steps between numbers no longer shrink.
    allowed = ulps * (ulp * (size + size.max()) + torch.finfo(one.dtype).tiny * ulp)
    return same | ((wide_one - wide_other).abs() <= allowed)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype in which results are held against each other."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
