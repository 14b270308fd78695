"""Functions of whole leaves, of which each process has a part: each made by one process.

The parts of a leaf are sent to one process, which makes the function of the whole, and sends to
each the part of the result that lies there. So a process sends its parts twice, at most, whatever
the number of processes: `torch.Tensor.full_tensor` on all would send the whole, and each would make
all that one makes here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .members import span_of
from .shards import Place

Function: TypeAlias = Callable[[list[Tensor]], Sequence[Tensor]]
"""Of whole leaves, each by itself, tensors of the same shape and dtype."""


def on_wholes(
    parts: Sequence[Tensor], places: Sequence[Place | None], function: Function
) -> list[Tensor]:
    """Return the parts that lie here of a function of whole leaves.

    All processes must call it alike. A leaf that is whole on each process is computed on each, and
    not sent. One that is cut along several dimensions of its mesh is sent whole to all.

    Args:
        parts: What lies here of each leaf: all of one dtype, on one device.
        places: How the parts of each lie; None is a plain tensor.
        function: Is called with some of the leaves, on each process with others.
    """
    results = list(parts)
    whole: list[int] = []
    by_group: dict[tuple[Any, int], list[int]] = {}
    for index, place in enumerate(places):
        dim = _cut_along(place)
        if dim is None:
            whole.append(index)
        else:
            by_group.setdefault((place and place.mesh, dim), []).append(index)
    gathered = [_whole(parts[index], places[index]) for index in whole]
    for index, made in zip(whole, function(gathered) if whole else (), strict=True):
        results[index] = _part(made, places[index])
    for (mesh, dim), indices in by_group.items():
        leaves = [_Leaf.of(places[index], dim) for index in indices]
        moved = _exchanged([parts[index] for index in indices], leaves, mesh, dim, function)
        for index, part in zip(indices, moved, strict=True):
            results[index] = part
    return results


def _cut_along(place: Place | None) -> int | None:
    """Return the one dimension of the mesh along which a leaf is cut in equal parts, if so."""
    if place is None:
        return None
    cut = [dim for dim, own in enumerate(place.placements) if not own.is_replicate()]
    plain = sys.modules["torch.distributed.tensor"].Shard
    if len(cut) != 1 or type(place.placements[cut[0]]) is not plain:
        return None
    return cut[0] if place.mesh.size(cut[0]) > 1 else None


def _whole(part: Tensor, place: Place | None) -> Tensor:
    if place is None or all(own.is_replicate() for own in place.placements):
        return part
    kind = sys.modules["torch.distributed.tensor"].DTensor
    strides = torch.empty(place.shape, device="meta").stride()
    made: Tensor = kind.from_local(
        part.contiguous(), place.mesh, place.placements, shape=place.shape, stride=strides
    ).full_tensor()
    return made


def _part(whole: Tensor, place: Place | None) -> Tensor:
    if place is None or all(own.is_replicate() for own in place.placements):
        return whole
    tensors = sys.modules["torch.distributed.tensor"]
    everywhere = [tensors.Replicate()] * place.mesh.ndim
    made = tensors.DTensor.from_local(whole, place.mesh, everywhere)
    own: Tensor = made.redistribute(placements=place.placements).to_local()
    return own


class _Leaf(NamedTuple):
    """A leaf that is cut along one of its dimensions, in shares for so many processes."""

    shape: torch.Size
    dim: int
    ranks: int

    @classmethod
    def of(cls, place: Any, mesh_dim: int) -> _Leaf:
        dim = place.placements[mesh_dim].dim % len(place.shape)
        return cls(place.shape, dim, place.mesh.size(mesh_dim))

    def lengths(self) -> list[int]:
        """Return how long the part of each process is in the dimension that is cut."""
        spans = [span_of(self.shape[self.dim], self.ranks, rank) for rank in range(self.ranks)]
        return [stop - start for start, stop in spans]

    def part_shape(self, rank: int) -> torch.Size:
        lengths = self.lengths()
        return torch.Size((*self.shape[: self.dim], lengths[rank], *self.shape[self.dim + 1 :]))

    def cost(self) -> int:
        """Return about what a function of the whole takes, as for products of matrices."""
        rows = self.shape[0]
        return self.shape.numel() * max(1, min(rows, self.shape.numel() // max(rows, 1)))


def owners(costs: Sequence[int], ranks: int) -> list[int]:
    """Return which process makes what, so that all take about as long: the costly things first."""
    loads, found = [0] * ranks, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        rank = loads.index(min(loads))
        found[index] = rank
        loads[rank] += costs[index]
    return found


def _exchanged(
    parts: list[Tensor], leaves: list[_Leaf], mesh: Any, mesh_dim: int, function: Function
) -> list[Tensor]:
    """Return parts of the results, after parts are sent to who makes a whole, and back."""
    ranks, rank = mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim)
    owned = owners([leaf.cost() for leaf in leaves], ranks)
    theirs = [[i for i, owner in enumerate(owned) if owner == other] for other in range(ranks)]
    own, group = theirs[rank], mesh.get_group(mesh_dim)
    sent = [[parts[i] for i in indices] for indices in theirs]
    wanted = [[leaves[i].part_shape(other) for i in own] for other in range(ranks)]
    received = _all_to_all(sent, wanted, parts[0], group)
    wholes = [
        torch.cat([column[position] for column in received], leaves[i].dim)
        for position, i in enumerate(own)
    ]
    made = function(wholes) if wholes else ()
    cut = [
        torch.split(whole, leaves[i].lengths(), leaves[i].dim)
        for whole, i in zip(made, own, strict=True)
    ]
    back = [[pieces[other] for pieces in cut] for other in range(ranks)]
    shapes = [[leaves[i].part_shape(rank) for i in indices] for indices in theirs]
    results = list(parts)
    for indices, column in zip(theirs, _all_to_all(back, shapes, parts[0], group), strict=True):
        for index, part in zip(indices, column, strict=True):
            results[index] = part
    return results


def _all_to_all(
    sent: list[list[Tensor]], wanted: list[list[torch.Size]], like: Tensor, group: Any
) -> list[list[Tensor]]:
    """Send tensors to each process, and return those of these shapes that come from each."""
    flat = torch.cat([like.new_empty(0), *(part.reshape(-1) for own in sent for part in own)])
    given = [sum(part.numel() for part in own) for own in sent]
    taken = [sum(shape.numel() for shape in own) for own in wanted]
    received = like.new_empty(sum(taken))
    size = like.element_size()  # as bytes, which every backend sends
    torch.distributed.all_to_all_single(
        received.view(torch.uint8),
        flat.view(torch.uint8),
        [count * size for count in taken],
        [count * size for count in given],
        group,
    )
    found = []
    for start, own in zip(accumulate(taken, initial=0), wanted, strict=False):
        ends = list(accumulate((shape.numel() for shape in own), initial=start))
        found.append(
            [received[a:b].view(shape) for a, b, shape in zip(ends, ends[1:], own, strict=False)]
        )
    return found
