"""The step on real tensors whose values can be read: the one place where a kernel is chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from .._core import transforms
from .._core.threads import on_one_thread
from .._core.types import Number
from ..optimizers._adam import equations, foreach, fused, triton
from . import memory
from .layout import Batch, Layout, layout_of
from .rule import Leaves, Moved, Scalars, Variant, written

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


_BY_NAME: dict[str, Kernel] = {
    "triton": cast(Kernel, triton),
    "fused": cast(Kernel, fused),
    "foreach": cast(Kernel, foreach),
    "plain": cast(Kernel, equations),
}

# In the order in which "auto" tries them: the fastest first, the one that refuses nothing last.
_IN_PLACE = ("fused", "triton", "foreach", "plain")
_OUT_OF_PLACE = ("triton", "fused", "foreach", "plain")

KERNELS = ("auto", *_BY_NAME)


def unserved(kernel: str, device: torch.device) -> str | None:
    """Say why a kernel that was asked for by name cannot serve leaves on a device, if so."""
    return None if kernel == "auto" else _BY_NAME[kernel].refusal(transforms.stand_in(device), None)


def move(
    leaves: Leaves, scalars: Scalars | list[Scalars], variant: Variant, layout: Layout
) -> Moved:
    """Return the leaves after one step, in fresh memory."""
    plan = _plan(leaves, scalars, variant, layout, in_place=False)
    if len(plan) == 1 and len(plan[0][0].batches) == 1:  # of all leaves, in order
        ((part, own),) = plan
        return _move_batch(leaves, part.batches[0], part, own, variant)
    moved = Moved([], [], [], [])
    places: list[int] = []
    for part, own in plan:
        for batch in part.batches:
            places.extend(batch.indices)
            results = _move_batch(leaves.take(batch.indices), batch, part, own, variant)
            for column, tensors in zip(moved, results, strict=True):
                column.extend(tensors)
    return moved if places == sorted(places) else _in_order(moved, places)


def move_(
    leaves: Leaves, scalars: Scalars | list[Scalars], variant: Variant, layout: Layout
) -> None:
    """Move the leaves in place. Whatever can be refused is refused before anything is written."""
    plan = _plan(leaves, scalars, variant, layout, in_place=True)
    borrowed = leaves if layout.ready else memory.borrow(leaves)
    for part, own in plan:
        for batch in part.batches:
            _step_batch_(borrowed.take(batch.indices), batch, part, own, variant)
    memory.give_back(borrowed, leaves)


def _move_batch(
    leaves: Leaves, batch: Batch, part: _Part, scalars: Scalars, variant: Variant
) -> Moved:
    if batch.sizes is not None:
        packed = memory.packed(leaves)
        _step_batch_(packed, batch, part, scalars, variant)
        return memory.unpacked(written(packed), batch.sizes)
    if part.kernel is triton:
        aligned = leaves if part.aligned else memory.borrow(leaves)
        return triton.step(aligned, scalars, variant)
    copied = memory.copies(leaves, aligned=part.aligned)
    _step_batch_(copied, batch, part, scalars, variant)
    return written(copied)


def _in_order(moved: Moved, places: list[int]) -> Moved:
    order = sorted(range(len(places)), key=places.__getitem__)
    return Moved(*([column[position] for position in order] if column else [] for column in moved))


class _Part(NamedTuple):
    """Leaves that can be moved together, batch by batch."""

    batches: list[Batch]
    kernel: Kernel
    aligned: bool  # they are just tensors, those of a leaf in one layout
    stacked: bool  # leaves have a first dimension of members, with numbers of their own


def _plan(
    leaves: Leaves,
    scalars: Scalars | list[Scalars],
    variant: Variant,
    layout: Layout,
    *,
    in_place: bool,
) -> list[tuple[_Part, Scalars]]:
    """Decide who moves what, with which numbers."""
    pairs: list[tuple[_Part, Scalars]] = []
    for indices, own in _by_numbers(scalars):
        if indices is None and own.read:  # what kernel serves does not depend on their values
            parts = layout.plans.get((variant.kernel, in_place))
            if parts is None:
                parts = _parts(leaves, None, own, variant, layout, in_place)
                layout.plans[variant.kernel, in_place] = parts
        else:
            parts = _parts(leaves, indices, own, variant, layout, in_place)
        pairs.extend((part, own) for part in parts)
    return pairs


def _parts(
    leaves: Leaves,
    indices: list[int] | None,
    scalars: Scalars,
    variant: Variant,
    layout: Layout,
    in_place: bool,
) -> list[_Part]:
    parts = []
    seen = layout if indices is None else layout_of(leaves.take(indices))
    for there in seen.batches_in_place if in_place else seen.batches:
        batches = there if indices is None else [batch.among(indices) for batch in there]
        device = leaves.params[batches[0].indices[0]].device
        kernel = _choose(device, scalars, variant, seen, in_place)
        aligned = seen.plain and seen.ready
        part = _Part(batches, kernel, aligned, stacked=_are_stacked(scalars))
        parts.append(_of_members(part, leaves, scalars, variant) if part.stacked else part)
    return parts


def _by_numbers(
    scalars: Scalars | list[Scalars],
) -> Iterable[tuple[list[int] | None, Scalars]]:
    """Group leaves by the values of their numbers; None stands for all of them."""
    if isinstance(scalars, Scalars):
        return [(None, _read(scalars))]
    distinct = {id(own): own for own in scalars}
    read = {key: _read(own) for key, own in distinct.items()}
    groups: dict[object, tuple[list[int], Scalars]] = {}
    for index, own in enumerate(scalars):
        values = read[id(own)]
        key = tuple(number if isinstance(number, float) else id(number) for number in values)
        groups.setdefault(key, ([], values))[0].append(index)
    return groups.values()


def _read(scalars: Scalars) -> Scalars:
    """Replace tensors by their values, where reading them is free and the members agree."""
    return scalars if scalars.read else Scalars(*map(_value, scalars))


def _value(number: Number) -> Number:
    if not isinstance(number, Tensor):
        return number
    if not transforms.on_host(number) or not transforms.all_plain([number]):
        return number.detach()
    values: list[float] = (number if number.ndim == 1 else number.reshape(-1)).tolist()
    if values and values.count(values[0]) == len(values):
        return float(values[0])
    return number.detach()


def _choose(
    device: torch.device, scalars: Scalars, variant: Variant, layout: Layout, in_place: bool
) -> Kernel:
    tensors = [] if scalars.read else [n for n in scalars if isinstance(n, Tensor)]
    if not layout.plain or (tensors and not transforms.all_plain(tensors)):
        return _BY_NAME["plain"]  # a subclass knows operators only
    device = transforms.stand_in(device)
    if variant.kernel == "auto":
        # Triton would serve the CPU in its interpreter, which is there for tests of it alone.
        fused_first = (in_place and _is_one(scalars.grad_factor)) or device.type == "cpu"
        order = _IN_PLACE if fused_first else _OUT_OF_PLACE
        serving = (
            k for k in map(_BY_NAME.__getitem__, order) if k.refusal(device, scalars) is None
        )
        return next(serving)
    kernel = _BY_NAME[variant.kernel]
    reason = kernel.refusal(device, scalars)
    if reason is not None:
        raise ValueError(
            f"kernel={variant.kernel!r} cannot serve leaves on {device}: {reason}. kernel='auto' "
            f"takes the fastest one that can."
        )
    return kernel


def _are_stacked(scalars: Scalars) -> bool:
    """Whether leaves have a first dimension of members, each with numbers of its own."""
    return not scalars.read and any(isinstance(n, Tensor) and n.ndim > 0 for n in scalars)


def _of_members(part: _Part, leaves: Leaves, scalars: Scalars, variant: Variant) -> _Part:
    """Make one batch of all, and if the members are small move them together."""
    indices = sorted(chain.from_iterable(batch.indices for batch in part.batches))
    part = part._replace(batches=[Batch(indices)])
    if variant.kernel != "auto" or part.kernel is triton:
        return part
    # Along each dimension in which numbers differ, all have its size, or 1.
    shapes = [n.shape for n in scalars if isinstance(n, Tensor) and n.ndim > 0]
    members = math.prod(map(max, zip(*shapes, strict=True)))
    elements = sum(leaves.params[index].numel() for index in indices)
    small = members > 1 and elements < _WORTH_A_CALL * members * len(indices)
    return part._replace(kernel=_BY_NAME["plain"]) if small else part


def _step_batch_(
    leaves: Leaves, batch: Batch, part: _Part, scalars: Scalars, variant: Variant
) -> None:
    if batch.small:
        on_one_thread(_step_, leaves, part, scalars, variant)
    else:
        _step_(leaves, part, scalars, variant)


def _step_(leaves: Leaves, part: _Part, scalars: Scalars, variant: Variant) -> None:
    if part.stacked and part.kernel is not plain and part.kernel is not triton:
        for member, own in _members(leaves, scalars):
            part.kernel.step_(member, own, variant)
    elif part.kernel is triton or _is_one(scalars.grad_factor):
        part.kernel.step_(leaves, scalars, variant)
    else:
        for piece in memory.scaled(leaves, scalars.grad_factor):
            part.kernel.step_(piece, scalars, variant)


def _is_one(factor: Number) -> bool:
    return isinstance(factor, float) and factor == 1.0


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
