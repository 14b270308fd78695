"""The step on real tensors whose values can be read: the one place where a kernel is chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from .. import _transforms
from .._hyperparameters import check_number
from .._types import Number
from . import _memory, foreach, fused, plain
from ._operands import PUBLIC_NAMES, Leaves, Moved, Scalars, Variant, written

__all__ = ["KERNELS", "move", "move_", "unserved"]

# Below this many elements in the average leaf of a member, a kernel call for each member costs
# more than the plain operators on all members at once.
_WORTH_A_CALL = 512


class Kernel(Protocol):
    """A kernel: a module with these two functions."""

    def refusal(self, device: torch.device, scalars: Scalars | None) -> str | None:
        """Say why leaves on this device (with these numbers, if given) cannot be served."""

    def step_(self, leaves: Leaves, scalars: Scalars, variant: Variant) -> None:
        """Move leaves of one dtype and device, laid out alike and densely, in place."""


# In the order in which "auto" tries them: the fastest first, the one that refuses nothing last.
_BY_NAME: dict[str, Kernel] = {
    "fused": cast(Kernel, fused),
    "foreach": cast(Kernel, foreach),
    "plain": cast(Kernel, plain),
}

KERNELS = ("auto", *_BY_NAME)


def unserved(kernel: str, device: torch.device) -> str | None:
    """Say why a kernel that was asked for by name cannot serve leaves on a device, if so."""
    return None if kernel == "auto" else _BY_NAME[kernel].refusal(device, None)


def move(leaves: Leaves, scalars: list[Scalars], variant: Variant) -> Moved:
    """Return the leaves after one step, in fresh memory."""
    parts = _plan(leaves, scalars, variant)
    copied = _memory.copies(leaves)
    _execute(parts, copied, variant)
    return written(copied)


def move_(leaves: Leaves, scalars: list[Scalars], variant: Variant) -> None:
    """Move the leaves in place. Whatever can be refused is refused before anything is written."""
    parts = _plan(leaves, scalars, variant)
    borrowed = _memory.borrow(leaves)
    _execute(parts, borrowed, variant)
    _memory.give_back(borrowed, leaves)


class _Part(NamedTuple):
    """Leaves that can be moved together."""

    indices: list[int]
    scalars: Scalars
    kernel: Kernel


def _plan(leaves: Leaves, scalars: list[Scalars], variant: Variant) -> list[_Part]:
    read: dict[int, tuple[Scalars, object]] = {}
    for own in dict(zip(map(id, scalars), scalars, strict=True)).values():
        values = _read(own)
        read[id(own)] = values, tuple(n if isinstance(n, float) else id(n) for n in values)
    kinds = [(param.device, param.dtype) for param in leaves.params]
    groups: dict[object, list[int]] = {}
    if len(read) == 1 and len(set(kinds)) == 1:
        groups[kinds[0]] = list(range(len(kinds)))
    else:
        for index, (kind, own) in enumerate(zip(kinds, scalars, strict=True)):
            groups.setdefault((kind, read[id(own)][1]), []).append(index)
    return [
        _choose(indices, leaves, read[id(scalars[indices[0]])][0], variant)
        for indices in groups.values()
    ]


def _read(scalars: Scalars) -> Scalars:
    """Replace tensors by their values, where reading them is free and the members agree."""
    return Scalars(*map(_value, Scalars._fields, scalars))


def _value(name: str, number: Number) -> Number:
    if not isinstance(number, Tensor):
        return number
    if number.device.type != "cpu" or not _transforms.all_plain([number]):
        return number.detach()
    values = [number.item()] if number.ndim == 0 else number.detach().reshape(-1).tolist()
    for value in values:
        check_number(PUBLIC_NAMES.get(name, name), value)
    if values and values.count(values[0]) == len(values):
        return float(values[0])
    return number.detach()


def _choose(indices: list[int], leaves: Leaves, scalars: Scalars, variant: Variant) -> _Part:
    params = [leaves.params[index] for index in indices]
    tensors = [number for number in scalars if isinstance(number, Tensor)]
    if not _transforms.all_plain(params + tensors):
        return _Part(indices, scalars, _BY_NAME["plain"])  # a subclass knows operators only
    device = params[0].device
    if variant.kernel != "auto":
        kernel = _BY_NAME[variant.kernel]
        reason = kernel.refusal(device, scalars)
        if reason is not None:
            raise ValueError(
                f"kernel={variant.kernel!r} cannot serve {params[0].dtype} leaves on {device}: "
                f"{reason}. kernel='auto' takes the fastest one that can."
            )
        return _Part(indices, scalars, kernel)
    # Along each dimension in which numbers differ, all have its size, or 1.
    members = math.prod(map(max, zip(*(n.shape for n in tensors if n.ndim > 0), strict=True)))
    if members > 1:
        elements = sum(param.numel() for param in params)
        if elements < _WORTH_A_CALL * members * len(params):
            return _Part(indices, scalars, _BY_NAME["plain"])
    serving = (k for k in _BY_NAME.values() if k.refusal(device, scalars) is None)
    return _Part(indices, scalars, next(serving))


def _execute(parts: list[_Part], leaves: Leaves, variant: Variant) -> None:
    for part in parts:
        own = leaves if len(part.indices) == len(leaves.params) else leaves.take(part.indices)
        if part.kernel is plain:
            plain.step_(own, part.scalars, variant)
            continue
        for member, scalars in _members(own, part.scalars):
            part.kernel.step_(member, scalars, variant)


def _members(leaves: Leaves, scalars: Scalars) -> Iterator[tuple[Leaves, Scalars]]:
    """Split stacked leaves into members, each with numbers of its own."""
    values = [n.tolist() if isinstance(n, Tensor) and n.ndim > 0 else n for n in scalars]
    return _split(leaves, values)


def _split(leaves: Leaves, values: list[Any]) -> Iterator[tuple[Leaves, Scalars]]:
    if not any(isinstance(value, list) for value in values):
        yield leaves, Scalars(*values)
        return
    members = [[tensor.unbind(0) for tensor in column] for column in leaves]
    for i in range(leaves.params[0].shape[0]):
        own = Leaves(*([slices[i] for slices in column] for column in members))
        yield from _split(own, [_nth(value, i) for value in values])


def _nth(value: Any, i: int) -> Any:
    """Number i of a dimension, which may have been left at size 1 because all share one."""
    if not isinstance(value, list):
        return value
    return value[i] if len(value) > 1 else value[0]
