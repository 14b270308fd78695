"""Whether gradients are finite, found out without waiting for a GPU. Wrappers skip steps by it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._core import tensors, transforms
from .._core.tensors import view_as_real
from .._dtensor.reductions import over_shards
from ._shared import Gradients, read

# A leaf of at most so many elements is copied beside others, which takes less time than a call.
_SMALL = 1024


def all_finite(leaves: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return whether every element is finite: a bool tensor of shape () on the device of `like`.

    Tensors on the CPU are read once, and nothing of their size is allocated; on a device one call
    asks all of them. No derivative is asked for.
    """
    given = [leaf for leaf in leaves if leaf.numel() > 0]
    with torch.no_grad():
        kinds = [] if not given or transforms.on_host(given[0]) else _by_kind(given)
        if kinds and not any(_is_slow(own[0]) for own in kinds) and tensors.use_foreach(given):
            largest = [torch.stack(tensors.norms(own, math.inf)) for own in kinds]
            return _all([own.isfinite().all() for own in largest], like)
    parts = [view_as_real(leaf.detach()) for leaf in given]
    if transforms.readable() and transforms.all_plain(parts) and all(p.is_cpu for p in parts):
        parts = _suspects(_pooled(parts))
    return _all([_are_finite(extremes) for extremes in _by_kind(_extremes(parts))], like)


def finite_members(leaves: Sequence[Tensor], active: Tensor | None) -> Tensor:
    """Return which members of stacked leaves on the CPU have finite elements alone: a bool of each.

    Of those that are not active, any.
    """
    finite = torch.ones(len(leaves[0]), dtype=torch.bool, device=leaves[0].device)
    for leaf in leaves:
        rows = leaf.reshape(len(leaf), -1)
        suspect = ~rows.sum(1).isfinite()  # as in `_suspects`
        suspects = (suspect if active is None else suspect & active).nonzero().squeeze(1)
        if len(suspects):
            finite[suspects] &= rows[suspects].isfinite().all(1)
    return finite


def _is_slow(leaf: Tensor) -> bool:
    """Whether the largest element of such leaves says nothing, or takes long.

    On the CPU that is twenty times slower than to sum up. Of a complex number the absolute value
    may overflow where its parts do not.
    """
    return leaf.is_complex() or transforms.on_host(leaf)


def _all(conditions: list[Tensor], like: Tensor) -> Tensor:
    there = [condition.to(like.device) for condition in conditions]
    if not there:
        return torch.ones((), dtype=torch.bool, device=like.device)
    return there[0] if len(there) == 1 else torch.stack(there).all()


def all_finite_everywhere(gradients: Gradients, like: Tensor) -> Tensor:
    """Return whether every element of all gradients is finite, of sharded ones as wholes."""
    leaves = gradients.leaves

    def here(indices: Sequence[int]) -> Tensor:
        given = [leaves[index] for index in indices]
        return all_finite([grad for grad in given if grad is not None], like)

    return over_shards(gradients.params, here, torch.Tensor.all)


def _pooled(parts: list[Tensor]) -> list[Tensor]:
    """Return the tensors, with the small ones of a dtype and device copied into one."""
    large = [part for part in parts if part.numel() > _SMALL]
    small = [part.reshape(-1) for part in parts if part.numel() <= _SMALL]
    return large + [torch.cat(same) for same in _by_kind(small)]


def _suspects(parts: list[Tensor]) -> list[Tensor]:
    """Return those tensors whose sum is not finite: the only ones that may have such an element.

    An element that is infinite or NaN makes the sum so. A sum of finite numbers may overflow, too,
    but seldom does. To sum up takes half the time of an exact answer.
    """
    sums = [part.sum() for part in parts]
    return [part for part, total in zip(parts, sums, strict=True) if not math.isfinite(total)]


def _extremes(parts: list[Tensor]) -> list[Tensor]:
    """Return for each tensor numbers that are finite only if all of its elements are."""
    if transforms.transformed() or any(part.is_cpu for part in parts):
        # On the CPU, the norm that takes the largest element is twenty times slower.
        return [torch.stack([part.amin(), part.amax()]) for part in parts]
    return tensors.norms(parts, math.inf)


def _are_finite(numbers: list[Tensor]) -> Tensor:
    return torch.stack(numbers).isfinite().all()


def _by_kind(tensors: list[Tensor]) -> list[list[Tensor]]:
    if len({(tensor.device, tensor.dtype) for tensor in tensors}) == 1:
        return [tensors]
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(kinds.values())


def decide(condition: Tensor) -> bool | Tensor:
    """Return the value of a condition if it can be read without waiting, else the condition."""
    value = read(condition)
    return condition if value is None else bool(value)


def zeros_unless(condition: bool | Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Return tensors, or zeros if a condition does not hold, where its value is not known.

    The update is made in any case then, and its derivative is multiplied by 0 where it is not
    chosen. With a gradient that is infinite or NaN in it, that would be 0 * NaN.
    """
    if not isinstance(condition, Tensor):
        return tensors
    return [torch.where(condition.to(tensor.device), tensor, 0) for tensor in tensors]


def device_for_state(params: Sequence[Tensor]) -> torch.device:
    """Return the device for what is computed of gradients, so that no device is waited for.

    It is the first that is not the CPU, if there is one.
    """
    others = [param.device for param in params if param.device.type != "cpu"]
    return others[0] if others else torch.device("cpu")
