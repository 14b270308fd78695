"""An inner state in buckets: each a DTensor, of which every process holds its share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from .._core import pytree
from .._core.types import Tree, is_dense, shown_layout
from ._buckets import Bucket, by_path, is_bucketed, keep_whole, lay_out, part
from ._collectives import Ranks

_REMEDY = (
    "the state was made with another bucket_bytes, or for other parameters. Make it with init() of "
    "this optimizer, or move it over with gather_state and scatter_state."
)


class Sharding(NamedTuple):
    """How leaves are laid in buckets, and these shared out among processes.

    A whole bucket is a tensor of one dimension, of as many elements as its leaves have. It does not
    depend on the number of processes, so that a checkpoint of it fits any number; but where each
    share has whole leaves, it does.
    """

    buckets: dict[str, Bucket]
    ranks: Ranks
    mesh: DeviceMesh | None

    @classmethod
    def of(
        cls,
        leaves: Sequence[Tensor],
        structure: pytree.Structure,
        bucket_bytes: int,
        mesh: DeviceMesh | None,
        *,
        by_leaf: bool = False,
    ) -> Sharding:
        """Lay out these leaves, in the order of their paths; by leaf: none in two shares."""
        ranks, order = Ranks.of(mesh), by_path(structure)
        if not by_leaf:
            found = lay_out(leaves, order, bucket_bytes)
        else:
            found = lay_out(leaves, order, bucket_bytes * ranks.size)
            found = [keep_whole(bucket, leaves, ranks.size) for bucket in found]
        return cls({bucket.name: bucket for bucket in found}, ranks, mesh)

    def parts(self, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return this process's share of each bucket, in fresh memory."""
        return {
            name: part(bucket, leaves, *self.ranks.span(bucket.numel))
            for name, bucket in self.buckets.items()
        }

    def distributed(self, tree: Tree) -> Tree:
        """Return a tree whose buckets are DTensors, given this process's shares of them."""

        def distributed(_: str, shares: dict[str, Tensor]) -> dict[str, Tensor]:
            placed: dict[str, Tensor] = {}
            for name, share in shares.items():
                shape = torch.Size([self.buckets[name].numel])
                placed[name] = DTensor.from_local(
                    share, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=(1,)
                )
            return placed

        return tree if self.mesh is None else _map_buckets(tree, distributed)

    def local(self, tree: Tree, root: str) -> Tree:
        """Return a tree with this process's shares of its buckets, checked, in the same memory."""

        def local(path: str, found: dict[str, Any]) -> dict[str, Tensor]:
            if found.keys() != self.buckets.keys():
                raise ValueError(
                    f"{root}{path} has {len(found)} buckets, where these parameters fill "
                    f"{len(self.buckets)}: {_REMEDY}"
                )
            for name, leaf in found.items():
                self._check(f"{root}{path}[{name!r}]", leaf, self.buckets[name].numel)
            return {n: x.to_local() if isinstance(x, DTensor) else x for n, x in found.items()}

        return _map_buckets(tree, local)

    def _check(self, path: str, leaf: object, numel: int) -> None:
        wanted = DTensor if self.mesh is not None else Tensor
        if not isinstance(leaf, wanted) or (self.mesh is None and isinstance(leaf, DTensor)):
            where = "over the mesh" if self.mesh is not None else "on one process alone"
            raise TypeError(
                f"{path} is of type {type(leaf).__name__}: {where} it must be a "
                f"{wanted.__name__}. Make the state with init() of this optimizer."
            )
        if not is_dense(leaf):
            raise TypeError(
                f"{path} has {shown_layout(leaf)}: a bucket is a dense tensor. {_REMEDY}"
            )
        if tuple(leaf.shape) != (numel,):
            raise ValueError(
                f"{path}: shape {tuple(leaf.shape)}, the bucket has ({numel},): {_REMEDY}"
            )
        if isinstance(leaf, DTensor):
            if leaf.device_mesh != self.mesh:
                raise ValueError(
                    f"{path} is on {leaf.device_mesh}, this optimizer on {self.mesh}. Move the "
                    f"state over with gather_state and scatter_state."
                )
            if tuple(leaf.placements) != (Shard(0),):
                raise ValueError(
                    f"{path} has placements {tuple(leaf.placements)}, where each process holds its "
                    f"share: (Shard(dim=0),). Redistribute it."
                )


def separate(state: Tree, names: Sequence[str], *, writing: bool) -> Iterator[Tree]:
    """Yield for each bucket the state of an optimizer that has that one alone.

    What is beside the buckets, such as a count, is written once: if `writing`, all but the last
    have a copy of it.
    """
    nodes, structure = pytree.flatten_above(state, is_bucketed)
    for name in names:
        copied = writing and name != names[-1]
        own = [
            {name: node[name]} if is_bucketed(node) else node.clone() if copied else node
            for node in nodes
        ]
        yield pytree.unflatten(structure, own)


def join(states: Sequence[Tree]) -> Tree:
    """Put states of one bucket each together. What is beside the buckets is the same in all."""
    flattened = [pytree.flatten_above(state, is_bucketed) for state in states]
    columns = zip(*(nodes for nodes, _ in flattened), strict=True)
    joined = [
        {name: share for node in column for name, share in node.items()}
        if is_bucketed(column[-1])
        else column[-1]
        for column in columns
    ]
    return pytree.unflatten(flattened[-1][1], joined)


def _map_buckets(tree: Tree, function: Callable[[str, dict[str, Any]], dict[str, Tensor]]) -> Tree:
    """Return a tree with others in place of its dicts of buckets: `function(path, buckets)`."""
    nodes, structure = pytree.flatten_above(tree, is_bucketed)
    if not any(map(is_bucketed, nodes)):
        return tree
    paths = pytree.paths(structure, "")
    mapped = [
        function(path, node) if is_bucketed(node) else node
        for path, node in zip(paths, nodes, strict=True)
    ]
    return pytree.unflatten(structure, mapped)
