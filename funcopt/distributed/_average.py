"""The mean of tensors over processes: in flat buckets, so that traffic goes by bytes, not leaves.

A bucket holds tensors of one dtype and device. Its reduction runs while the one before it is being
used, so that no more than two are there at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._kernels._operands import compute_dtype, real, unreal
from ._collectives import start_sum

__all__ = ["means"]

# The bytes at which a bucket is full. A tensor that is larger has one to itself.
_FULL = 2**25


class _Bucket(NamedTuple):
    """Tensors laid end to end."""

    indices: list[int]
    flat: Tensor
    work: Any  # the reduction under way; None where there is one process


def means(tensors: Sequence[Tensor], mesh: DeviceMesh | None) -> Iterator[tuple[int, Tensor]]:
    """Yield for each tensor its index and its mean over the processes, the same bits on each.

    Every process must come here with tensors of the same shapes and dtypes in the same order, and
    take all that there are. Nothing is recorded by autograd.

    Args:
        tensors: What is averaged, and not written. 16-bit tensors are averaged in float32, and
            their mean stays in it.
        mesh: The processes, in one dimension; None for this one alone.
    """
    previous: _Bucket | None = None
    for indices in _filled(tensors):
        bucket = _reducing([tensors[index] for index in indices], indices, mesh)
        if previous is not None:
            yield from _taken_apart(previous, tensors)
        previous = bucket
    if previous is not None:
        yield from _taken_apart(previous, tensors)


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


def _reducing(tensors: list[Tensor], indices: list[int], mesh: DeviceMesh | None) -> _Bucket:
    with torch.no_grad():
        wide = [real(tensor.to(compute_dtype(tensor.dtype))).reshape(-1) for tensor in tensors]
        flat = torch.cat(wide)
        if mesh is None or mesh.size() == 1 or flat.numel() == 0:
            return _Bucket(indices, flat, None)
        flat.div_(mesh.size())  # before they are added up, so that no sum overflows
        return _Bucket(indices, flat, start_sum(flat, mesh.get_group()))


def _taken_apart(bucket: _Bucket, tensors: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    if bucket.work is not None:
        bucket.work.wait()
    rest: Any = bucket.flat
    for index in bucket.indices:
        like = tensors[index]
        shape = (*like.shape, 2) if like.is_complex() else like.shape
        count = like.numel() * (2 if like.is_complex() else 1)
        own, rest = rest[:count], rest[count:]
        if like.is_complex():
            own = own.clone()  # an odd offset is no place for a complex number
        yield index, unreal(own.view(shape), like)
