"""Shares of buckets that hold whole leaves, and these leaves, for who has to see whole ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import pytree
from .._core.types import Tree
from ._buckets import Bucket, count, is_bucketed, shaped
from ._shards import Sharding

_PREFIX = "leaf "


class _Own(NamedTuple):
    """A leaf of this process: where it lies in the share of its bucket, and what it is like."""

    bucket: str
    start: int
    like: Tensor


class OwnLeaves:
    """The leaves that are whole in this process's shares.

    An inner optimizer sees them as a dict. A process without a leaf in a bucket has one without
    elements there, so that what the inner optimizer keeps for it tells the dtype.
    """

    def __init__(
        self, sharding: Sharding, leaves: Sequence[Tensor], structure: pytree.Structure
    ) -> None:
        """Find them."""
        paths = pytree.paths(structure, "")
        self._lengths: dict[str, int] = {}
        self._own: dict[str, _Own] = {}
        for name, bucket in sharding.buckets.items():
            start, stop = sharding.ranks.span(bucket.numel)
            self._lengths[name] = stop - start
            found = list(_between(bucket, start, stop))
            for index, begin in found:
                own = _Own(name, begin - start, leaves[index])
                self._own[f"{_PREFIX}{paths[index]}"] = own
            if not found:
                like = leaves[bucket.indices[0]]
                nothing = torch.empty(0, 1, dtype=like.dtype, device=like.device)
                self._own[f"{_PREFIX}of none in {name}"] = _Own(name, 0, nothing)

    def of(self, shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the leaves that lie in these shares, in the same memory."""
        return {
            path: shaped(shares[own.bucket][own.start : own.start + count(own.like)], own.like)
            for path, own in self._own.items()
        }

    def shares(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return shares with these leaves, in fresh memory."""
        made: dict[str, Tensor] = {}
        for path, own in self._own.items():
            leaf = leaves[path].detach()
            if own.bucket not in made:
                made[own.bucket] = leaf.new_zeros(self._lengths[own.bucket])
            made[own.bucket][own.start : own.start + leaf.numel()].copy_(leaf.reshape(-1))
        return made

    def of_state(self, state: Tree) -> Tree:
        """Return a state with leaves in place of its shares."""
        nodes, structure = pytree.flatten_above(state, is_bucketed)
        return pytree.unflatten(
            structure, [self.of(node) if is_bucketed(node) else node for node in nodes]
        )

    def shares_of_state(self, state: Tree) -> Tree:
        """Return a state with shares in place of its leaves."""
        nodes, structure = pytree.flatten_above(state, self._are_leaves)
        return pytree.unflatten(
            structure, [self.shares(node) if self._are_leaves(node) else node for node in nodes]
        )

    def _are_leaves(self, node: Any) -> bool:
        return isinstance(node, dict) and len(node) > 0 and node.keys() == self._own.keys()


def _between(bucket: Bucket, start: int, stop: int) -> list[tuple[int, int]]:
    """Return the leaves of a bucket in a share of it, each with where it starts."""
    return [
        (index, begin)
        for index, (begin, _) in zip(bucket.indices, pairwise(bucket.offsets), strict=True)
        if start <= begin < stop
    ]
