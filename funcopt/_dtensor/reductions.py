"""Numbers of all leaves, such as a norm, where each process has parts of some of them.

Every process adds its own. Collectives depend on the parameters and their placements alone, which
are the same everywhere, so that no process waits for one that another does not make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .shards import Parts, current_parts


def over_shards(
    params: Sequence[Tensor],
    reduce_local: Callable[[Sequence[int]], Tensor],
    join: Callable[[Tensor], Tensor],
) -> Tensor:
    """Reduce all of these leaves to one scalar, the same on every process, such as their norm.

    This takes one collective for each mesh and dimension of it along which a leaf is sharded. For
    one result for each leaf, call it for each. All leaves are among the parameters, also those
    without a gradient, which may be others elsewhere.

    `reduce_local` gives the number, of shape (), of what is here of the leaves at these indices;
    `join` that of parts put together, from theirs, of shape (n,).
    """
    parts = current_parts()
    if parts is None:
        return reduce_local(range(len(params)))
    by_mesh: dict[Any, dict[tuple[int, ...], list[int]]] = {}
    for index, param in enumerate(params):
        mesh, dims = _cuts(parts, param)
        by_mesh.setdefault(mesh, {}).setdefault(dims, []).append(index)
    numbers = []
    # In an order of all meshes there are, so that no two processes wait for each other.
    for mesh in sorted(by_mesh, key=_rank_lists):
        groups = by_mesh[mesh]
        cuts = sorted(groups)
        own = torch.stack([reduce_local(groups[dims]) for dims in cuts])
        numbers.append(own if mesh is None else _across(mesh, cuts, own, join))
    if len(numbers) > 1:  # sorted, so that all processes add the same in the same order
        numbers = [torch.cat(numbers).sort().values]
    return join(numbers[0]) if numbers else reduce_local([])


def _rank_lists(mesh: Any) -> list[int]:
    return [] if mesh is None else [*mesh.mesh.shape, *mesh.mesh.flatten().tolist()]


def _cuts(parts: Parts, param: Any) -> tuple[Any, tuple[int, ...]]:
    """Return the mesh that has the parts of a leaf, and along which of its dimensions they differ.

    None if all is here, as it is of a leaf that is replicated.
    """
    if not isinstance(param, Tensor):  # as what is frozen may be
        return None, ()
    if not parts.knows(param):
        raise RuntimeError(
            "a number of all leaves, such as their norm, was asked of parameters that stand for no "
            "tensors of this update: an optimizer around this one made them. It must hand on its "
            "own parameters."
        )
    place = parts.place(param)
    if place is None:
        return None, ()
    dims = tuple(i for i, own in enumerate(place.placements) if not own.is_replicate())
    return (place.mesh, dims) if dims else (None, ())


def _across(
    mesh: Any, cuts: list[tuple[int, ...]], own: Tensor, join: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return numbers of wholes from those of the parts here, each cut along some dimensions."""
    if mesh.get_coordinate() is None:
        raise RuntimeError(
            f"this process is not on the mesh {mesh}, on which a parameter lies: it cannot know a "
            f"number of all leaves, such as their norm. Update on the processes of the mesh alone."
        )
    for dim in range(mesh.ndim):
        if mesh.size(dim) > 1 and any(dim in cut for cut in cuts):
            columns = _gathered(own, mesh, dim).unbind(1)
            # Of replicas the first one counts, so that all go on with the same bits.
            own = torch.stack(
                [join(c) if dim in cut else c[0] for c, cut in zip(columns, cuts, strict=True)]
            )
    return own


def _gathered(own: Tensor, mesh: Any, dim: int) -> Tensor:
    """Return the numbers of all processes along a dimension of the mesh, one row for each."""
    there = own.detach().to(mesh.device_type)
    rows = [torch.empty_like(there) for _ in range(mesh.size(dim))]
    torch.distributed.all_gather(rows, there, group=mesh.get_group(dim))
    return torch.stack(rows).to(own.device)
