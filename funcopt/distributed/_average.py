"""The mean of tensors over processes, in flat buckets of one dtype and device.

While one bucket is reduced the one before it is used, so that only two are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._core import pytree, transforms
from .._core.tensors import compute_dtype, view_as_real
from .._core.types import Tree
from ._buckets import by_path, count, shaped
from ._checks import check_averageable, check_mesh, check_untransformed
from ._collectives import Started, one_ahead, start_sum

# The bytes at which a bucket is full. A tensor that is larger has one to itself.
_FULL = 2**25


def average_gradients(grads: Tree, mesh: DeviceMesh | None) -> Tree:
    """Return the mean of gradients over processes, the same bits on each.

    Give it to an optimizer that clips or skips by the gradients of all leaves, around
    `Zero1(..., gradients="averaged")`, with a `Partition` in between if there are groups: then all
    processes see the same gradients, and clip or skip alike.

    Args:
        grads: The gradients of this process: a tree of dense tensors, which is not written. Keys,
            shapes and dtypes are the same on every process, and None is at the same places.
        mesh: The processes: a `DeviceMesh` of one dimension; None for this one alone.

    Returns:
        A tree like `grads`, in its dtypes and in fresh memory, which tensors may share, each its
        own part. 16-bit gradients are averaged in float32. Nothing is recorded by autograd.

    Raises:
        RuntimeError: Under a transform of `torch.func`.
        TypeError: If `mesh` is no mesh, or a gradient is sharded, or no dense floating-point or
            complex tensor.
        ValueError: If `mesh` has several dimensions, or this process is not on it.

    Example:
        >>> import torch, funcopt
        >>> from funcopt.distributed import Zero1, average_gradients
        >>> inner = {
        ...     "decay": Zero1(funcopt.Adam(weight_decay=0.1), None, gradients="averaged"),
        ...     "no_decay": Zero1(funcopt.Adam(weight_decay=0.0), None, gradients="averaged"),
        ... }
        >>> opt = funcopt.Clip(funcopt.Partition(inner, funcopt.decay_label), 1.0)
        >>> params = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
        >>> state = opt.init(params)
        >>> grads = average_gradients({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, None)
        >>> params, state = opt.update(grads, state, params)
        >>> state.norm
        tensor(2.4495)
    """
    if transforms.compiling():
        return transforms.uncompiled(average_gradients, grads, mesh)
    check_mesh(mesh)
    check_untransformed("average_gradients", grads)
    leaves, structure = pytree.flatten(grads)
    given = [index for index in by_path(structure) if leaves[index] is not None]
    check_averageable([leaves[index] for index in given], structure, given)
    averaged = list(leaves)
    for position, mean in means([leaves[index] for index in given], mesh):
        index = given[position]
        averaged[index] = mean.to(leaves[index].dtype).view_as(leaves[index])
    return pytree.unflatten(structure, averaged)


def means(tensors: Sequence[Tensor], mesh: DeviceMesh | None) -> Iterator[tuple[int, Tensor]]:
    """Yield for each tensor its index and its mean over the processes, the same bits on each.

    Every process must give tensors of the same shapes and dtypes in the same order, and take all
    results. 16-bit tensors have a mean in float32. Nothing is written or recorded by autograd.
    """
    buckets = list(_filled(tensors))
    flats = one_ahead(_start([tensors[i] for i in indices], mesh) for indices in buckets)
    for indices, flat in zip(buckets, flats, strict=True):
        likes = [tensors[index] for index in indices]
        parts = torch.unsafe_split_with_sizes(flat, list(map(count, likes)))
        yield from zip(indices, map(shaped, parts, likes), strict=True)


def _filled(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield the indices that go into a bucket together."""
    open_buckets: dict[object, tuple[list[int], int]] = {}
    for index, tensor in enumerate(tensors):
        kind = compute_dtype(tensor.dtype).to_real(), tensor.device
        size = tensor.numel() * compute_dtype(tensor.dtype).itemsize
        indices, filled = open_buckets.get(kind, ([], 0))
        if indices and filled + size > _FULL:
            yield indices
            indices, filled = [], 0
        open_buckets[kind] = [*indices, index], filled + size
    for indices, _ in open_buckets.values():
        yield indices


def _start(tensors: list[Tensor], mesh: DeviceMesh | None) -> Started:
    """Begin to average tensors, laid end to end."""
    with torch.no_grad():
        wide = [
            view_as_real(tensor.to(compute_dtype(tensor.dtype))).reshape(-1) for tensor in tensors
        ]
        flat = torch.cat(wide)
        if mesh is None or mesh.size() == 1 or flat.numel() == 0:
            return Started(None, lambda: flat)
        flat.div_(mesh.size())  # before they are added up, so that no sum overflows
        return Started(start_sum(flat, mesh.get_group()), lambda: flat)
