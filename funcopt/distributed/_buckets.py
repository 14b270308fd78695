"""Buckets: leaves of one dtype laid side by side, so that one collective serves many of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .._core import pytree
from .._core.tensors import view_as_real

_PREFIX = "bucket "


class Bucket(NamedTuple):
    """Where leaves lie in a flat tensor. A complex leaf is laid down as pairs of real numbers.

    The leaves are parameters, or what a state holds for each of them, perhaps in another dtype.
    """

    name: str
    indices: list[int]  # of its leaves, in order
    offsets: list[int]  # where each of them starts, and where the last one ends; a leaf ends with
    # zeros if it is shorter than that

    @property
    def numel(self) -> int:
        """The number of elements."""
        return self.offsets[-1]


@lru_cache(maxsize=64)
def by_path(structure: pytree.Structure) -> list[int]:
    """Return the leaves of a tree in the order of their paths, which is the same everywhere.

    Another process, or a checkpoint, may have filled its dicts in another order.
    """
    paths = pytree.paths(structure, "")
    return sorted(range(len(paths)), key=paths.__getitem__)


def is_bucketed(node: object) -> bool:
    """Whether a node of a state is a dict of buckets, which stands for a tree of leaves."""
    return (
        isinstance(node, dict)
        and len(node) > 0
        and all(isinstance(key, str) and key.startswith(_PREFIX) for key in node)
    )


def lay_out(leaves: Sequence[Tensor], order: Sequence[int], bucket_bytes: int) -> list[Bucket]:
    """Return buckets that hold the leaves in this order, each of one dtype and device.

    A bucket is closed once it holds so many bytes. So the layout depends on the leaves alone, and
    not on the number of processes.
    """
    buckets: list[list[int]] = []
    filling: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
    for index in order:
        leaf = leaves[index]
        kind = leaf.dtype.to_real(), leaf.device
        if kind not in filling:
            filling[kind] = [], 0
            buckets.append(filling[kind][0])
        indices, nbytes = filling[kind]
        indices.append(index)
        filling[kind] = indices, nbytes + leaf.numel() * leaf.element_size()
        if filling[kind][1] >= bucket_bytes:
            del filling[kind]
    return [
        Bucket(
            f"{_PREFIX}{position}",
            indices,
            list(accumulate((count(leaves[index]) for index in indices), initial=0)),
        )
        for position, indices in enumerate(buckets)
    ]


def keep_whole(bucket: Bucket, leaves: Sequence[Tensor], ranks: int) -> Bucket:
    """Return a bucket of which so many equal shares hold whole leaves, about as much in each.

    Between the leaves of two shares there are zeros. Where there are fewer leaves than processes,
    the last ones have zeros alone.
    """
    loads: list[int] = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    sizes = {index: count(leaves[index]) for index in bucket.indices}
    # The largest first, each to who has least: the first of those that have as little.
    for index in sorted(bucket.indices, key=lambda index: -sizes[index]):
        rank = min(range(ranks), key=lambda rank: (loads[rank], len(shares[rank])))
        shares[rank].append(index)
        loads[rank] += sizes[index]
    length = max(loads)
    indices: list[int] = []
    starts: list[int] = []
    for rank, own in enumerate(shares):
        start = rank * length
        for index in own:
            starts.append(start)
            start += sizes[index]
        indices += own
    return Bucket(bucket.name, indices, [*starts, length * ranks])


def whole(bucket: Bucket, leaves: Sequence[Tensor], length: int) -> Tensor:
    """Return the leaves of a bucket side by side in fresh memory, with zeros up to a length."""
    flats = []
    for index, (begin, end) in zip(bucket.indices, pairwise(bucket.offsets), strict=True):
        flats += _filled(_flat(leaves[index]), end - begin)
    if length > bucket.numel:
        flats.append(flats[0].new_zeros(length - bucket.numel))
    return torch.cat(flats)


def _filled(flat: Tensor, length: int) -> list[Tensor]:
    """Return a tensor, and zeros that fill it up to a length."""
    missing = length - flat.numel()
    return [flat, flat.new_zeros(missing)] if missing > 0 else [flat]


def part(bucket: Bucket, leaves: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Return what `whole` has from `start` to `stop`, in fresh memory, without making the rest.

    It has the dtype of these leaves, also if it is empty.
    """
    pieces = []
    for index, (begin, end) in zip(bucket.indices, pairwise(bucket.offsets), strict=True):
        low, high = max(begin, start), min(end, stop)
        if low < high:
            flat = _flat(leaves[index])
            own = flat if high - low == end - begin else flat[low - begin : high - begin]
            pieces += _filled(own, high - low)
    if not pieces:
        like = leaves[bucket.indices[0]]
        return torch.empty(0, dtype=like.dtype.to_real(), device=like.device)
    return torch.cat(pieces)


def cut(bucket: Bucket, flat: Tensor, likes: Sequence[Tensor]) -> list[Tensor]:
    """Return the leaves of a bucket, which share the memory of this flat tensor.

    The tensor may be longer than the bucket, and of another dtype than the leaves. All leaves of
    the tree, `likes`, give the shapes, and say which are complex; one that is not contiguous gets
    memory of its own in the same layout.
    """
    sizes = [end - begin for begin, end in pairwise(bucket.offsets)]
    parts = torch.unsafe_split_with_sizes(flat[: bucket.numel], sizes)
    return [
        _laid_like(own[: count(likes[index])], likes[index])
        for own, index in zip(parts, bucket.indices, strict=True)
    ]


def _laid_like(flat: Tensor, like: Tensor) -> Tensor:
    own = shaped(flat, like)
    return own if like.is_contiguous() else torch.empty_like(like, dtype=own.dtype).copy_(own)


def shaped(flat: Tensor, like: Tensor) -> Tensor:
    """Return a flat part of a bucket in the shape of its leaf."""
    if like.is_complex():
        # An odd offset is no place for a complex number.
        return torch.view_as_complex(flat.clone().view(*like.shape, 2))
    return flat if like.ndim == 1 else flat.view(like.shape)


def count(leaf: Tensor) -> int:
    """Return how many elements of a bucket a leaf takes."""
    return leaf.numel() * (2 if leaf.is_complex() else 1)


def _flat(leaf: Tensor) -> Tensor:
    return view_as_real(leaf).reshape(-1)
