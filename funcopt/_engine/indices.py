"""Which members are meant by indices of all kinds."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from .._core import transforms
from .._core.types import kind_of

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


def positions_of(indices: Any, count: int) -> Tensor:
    """Return which members are meant, from 0: an int64 tensor of shape `()` or `(taken,)`."""
    given = indices if isinstance(indices, Tensor) else _from_python(indices)
    if given.dtype == torch.bool:
        if given.shape != (count,):
            raise ValueError(
                f"indices is a mask of shape {tuple(given.shape)} for {count} members: must have "
                f"shape ({count},), one bool for each."
            )
        return given.nonzero().squeeze(1)
    if given.dtype not in _INTEGERS:
        raise TypeError(f"indices is {kind_of(given)}: must be of int64, or of bool for a mask.")
    if given.ndim > 1:
        raise ValueError(
            f"indices has shape {tuple(given.shape)}: must have shape (taken,), or () for one "
            f"member. Flatten it."
        )
    for index in transforms.values_at_hand(given) or ():
        if not -count <= index < count:
            raise IndexError(
                f"indices has {index:.0f}, and there are {count} members: must be from {-count} to "
                f"{count - 1}."
            )
    given = given.long()
    return torch.where(given < 0, given + count, given)


def _from_python(indices: Any) -> Tensor:
    """Return as a tensor what was given as an integer, or as a list of integers or bools."""
    cpu = torch.device("cpu")
    try:
        if isinstance(indices, (bool, str)):
            raise TypeError
        if hasattr(indices, "__index__") and not hasattr(indices, "__len__"):
            return torch.tensor(operator.index(indices), dtype=torch.int64, device=cpu)
        # Of numpy, and of tensors in a list, a bool would pass for an integer, or for none.
        given = [own.item() if getattr(own, "ndim", None) == 0 else own for own in indices]
        flags = [isinstance(index, bool) for index in given]
        if any(flags):
            if not all(flags):
                raise TypeError
            return torch.tensor(given, dtype=torch.bool, device=cpu)
        return torch.tensor(list(map(operator.index, given)), dtype=torch.int64, device=cpu)
    except TypeError:
        raise TypeError(
            f"indices={indices!r}: must be an integer, a list or tensor of integers, or a mask of "
            f"bools, one for each member."
        ) from None


def listed_of(positions: Tensor, count: int) -> list[int]:
    """Return which members are meant, read, and checked where they were not before."""
    rows: list[int] = positions.reshape(-1).tolist()
    for row in rows:
        if not 0 <= row < count:
            raise IndexError(f"indices has {row}, and there are {count} members.")
    return rows
