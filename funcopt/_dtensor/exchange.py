"""Members of a stack on many processes taken and chosen: each is sent to those who want it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .members import Share, Where, dtensor_of, sharded_dim, share_of, span_of
from .shards import dtensor, local_part, place_of


def take(leaf: Tensor, positions: Sequence[int], where: Where, *, single: bool) -> Any:
    """Return the members of a DTensor at these positions, as a DTensor sharded as it is.

    This takes one all-to-all, in which each process gets the members that it is to have, each once.

    Args:
        leaf: The DTensor.
        positions: Which members, the same on every process.
        where: Returns its path.
        single: Whether all processes get the members, instead of a share of them.

    Raises:
        RuntimeError: As `share_of`, or if a derivative would be lost.
        ValueError: As `share_of`.
    """
    if leaf.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{where()} is a DTensor that requires a gradient, and none goes back to the process "
            f"that a member came from. Take it under torch.no_grad(), or its .detach()."
        )
    kind: Any = dtensor()
    place = place_of(leaf)
    share = share_of(place, where)
    dim = sharded_dim(place, where)
    with torch.no_grad():
        part = local_part(leaf).detach().resolve_conj().resolve_neg()
        if dim is None:
            wanted: Sequence[int] = positions
            rows = part
        else:
            size, rank = place.mesh.size(dim), place.mesh.get_coordinate()[dim]
            spans = [
                (0, len(positions)) if single else span_of(len(positions), size, r)
                for r in range(size)
            ]
            needs = [sorted(set(positions[slice(*span)])) for span in spans]
            rows = _sent(part, share, needs, dim)
            found = {row: index for index, row in enumerate(needs[rank])}
            wanted = [found[row] for row in positions[slice(*spans[rank])]]
        made = rows.index_select(0, _indices(wanted, rows))
    if single:
        replicate = sys.modules["torch.distributed.tensor"].Replicate()
        everywhere = place._replace(
            placements=(replicate,) * place.mesh.ndim, shape=torch.Size(place.shape[1:])
        )
        return dtensor_of(made.squeeze(0), everywhere, kind)
    shape = torch.Size((len(positions), *place.shape[1:]))
    return dtensor_of(made, place._replace(shape=shape), kind)


def select(mask: Tensor, pair: Sequence[Any]) -> Any:
    """Return each member from one DTensor where a mask is True, else from another one.

    Args:
        mask: One bool for each member there is, the same on every process.
        pair: The DTensors, which lie alike.

    Raises:
        RuntimeError: As `share_of`.
        ValueError: As `share_of`, or if the two do not lie alike.
    """
    kind: Any = dtensor()
    one, other = (place_of(leaf) if isinstance(leaf, kind) else None for leaf in pair)
    if one is None or other is None or one != other:
        shown = [f"a DTensor with {own}" if own else "a plain tensor" for own in (one, other)]
        raise ValueError(
            f"a tensor of new is {shown[0]}, and that of old is {shown[1]}: both must lie alike, "
            f"and nothing is moved silently. Bring one there with .redistribute(placements=...)."
        )
    own = share_of(one, lambda: "a tensor of new").cut_plain(mask, lambda: "mask")
    new, old = (leaf.to_local() for leaf in pair)
    chosen = torch.where(own.to(new.device).reshape(-1, *(1,) * (new.ndim - 1)), new, old)
    return dtensor_of(chosen, one, kind)


def _sent(part: Tensor, share: Share, needs: Sequence[Sequence[int]], dim: int) -> Tensor:
    """Return the members that this process needs, in order, each from the process that has it."""
    mesh, row = share.place.mesh, part.shape[1:]
    size, rank = mesh.size(dim), mesh.get_coordinate()[dim]
    given = [[i - share.start for i in need if share.start <= i < share.stop] for need in needs]
    spans = [span_of(share.members, size, other) for other in range(size)]
    taken = [sum(start <= i < stop for i in needs[rank]) for start, stop in spans]
    sent = part.index_select(0, _indices([i for rows in given for i in rows], part))
    received = part.new_empty((sum(taken), *row))
    if math.prod(row) == 0 or size == 1:
        return sent if size == 1 else received
    torch.distributed.all_to_all_single(
        _bytes(received), _bytes(sent), taken, list(map(len, given)), mesh.get_group(dim)
    )
    return received


def _bytes(rows: Tensor) -> Tensor:
    """View rows as bytes, which every backend sends."""
    return rows.view(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)


def _indices(positions: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(positions, dtype=torch.int64, device=like.device)
