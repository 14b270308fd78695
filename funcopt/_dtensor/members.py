"""Stacks whose members lie on many processes: dimension 0 says which, and is the one sharded.

Each member lies whole in one process. So the update of the members here is that of a stack of them,
in which nothing is reduced over processes; what is said of all members is cut to those here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._core import pytree
from .._core.types import Tree
from .methods import stride_of_whole
from .shards import Parts, Place, current_parts, dtensor, local_part, place_of, work_on

Where: TypeAlias = Callable[[], str]
"""Returns a path, which takes long to find, and is for messages alone."""


class Share(NamedTuple):
    """The members that are here."""

    place: Place  # of a tensor of them
    where: Where  # its path, for messages
    start: int
    stop: int

    @property
    def members(self) -> int:
        """How many there are on all processes."""
        return self.place.shape[0]

    def check(self, where: Where, place: Place | None) -> None:
        """Refuse a tensor that does not lie as the parameters do.

        Raises:
            ValueError: If it does not.
        """
        mesh, placements = self.place.mesh, self.place.placements
        if place is None:
            raise ValueError(
                f"{where()} is a plain tensor, and {self.where()} is a DTensor with {self.place}: "
                f"what members have must lie as they do. Give distribute_tensor(tensor, mesh, "
                f"placements), or if it is the local part already, DTensor.from_local()."
            )
        if (place.mesh, place.placements) != (mesh, placements):
            raise ValueError(
                f"{where()} has {place}, and {self.where()} has {self.place}: what members have "
                f"must lie as they do, and nothing is moved silently. Bring it there with "
                f".redistribute(placements={list(placements)})."
            )
        if len(place.shape) == 0 or place.shape[0] != self.members:
            raise ValueError(
                f"{where()} has shape {tuple(place.shape)}, and {self.where()} has {self.members} "
                f"members: dimension 0 of every tensor must be the member."
            )

    def cut(self, tree: Tree, root: str) -> Tree:
        """Return a tree with what of each tensor is for the members here, in the same memory.

        A tensor of shape () is for all. A plain tensor is the same on every process, and has one
        row for each member there is.

        Raises:
            ValueError: If a tensor has another number of rows, or is a DTensor that lies otherwise.
        """
        leaves, structure = pytree.flatten(tree)
        kind: Any = dtensor()
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            where = partial(pytree.path, structure, root, index)
            if not isinstance(leaf, kind):
                leaves[index] = self.cut_plain(leaf, where) if leaf.ndim else leaf
                continue
            place = place_of(leaf)
            if leaf.ndim or not all(own.is_replicate() for own in place.placements):
                self.check(where, place)
            with torch.no_grad():
                leaves[index] = local_part(leaf)
        return pytree.unflatten(structure, leaves)

    def cut_plain(self, tensor: Tensor, where: Where) -> Tensor:
        """Return the rows of a plain tensor that are those of the members here."""
        if len(tensor) != self.members:
            raise ValueError(
                f"{where()} has shape {tuple(tensor.shape)} for {self.members} members: must have "
                f"one row for each member on all processes, of which each takes its own, or be a "
                f"DTensor with {self.place}."
            )
        return tensor.narrow(0, self.start, self.stop - self.start)

    def whole(self, tree: Tree) -> Tree:
        """Return a tree with DTensors of all members in place of tensors of those here."""
        kind: Any = dtensor()

        def joined(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            shape = torch.Size((self.members, *leaf.shape[1:]))
            return dtensor_of(leaf, self.place._replace(shape=shape), kind)

        return pytree.tree_map(joined, tree)


def share_of(place: Place, where: Where) -> Share:
    """Return which members of a tensor are here.

    Raises:
        RuntimeError: If this process is not on its mesh.
        ValueError: If something else than its members is sharded.
    """
    mesh, size = place.mesh, (place.shape or (0,))[0]
    sharded = sharded_dim(place, where)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise RuntimeError(
            f"this process is not on the mesh {mesh}, on which {where()} lies: it has no members. "
            f"Update on the processes of the mesh alone."
        )
    if sharded is None:
        return Share(place, where, 0, size)
    return Share(place, where, *span_of(size, mesh.size(sharded), coordinate[sharded]))


def shared_out(parts: Parts | None, **trees: Tree) -> Share | None:
    """Return which members of trees are here; None if no tensor is sharded. Parameters come first.

    What an update has made of DTensors on its way lies as they do.

    Raises:
        RuntimeError: As `share_of`, or if the parameters are none of this update.
        ValueError: As `share_of`, or if another tensor lies otherwise than the first.
    """
    tensors = list(_tensors(trees))
    if parts is None or not tensors:
        return None
    first, leaf = tensors[0]
    if not parts.knows(leaf):
        raise RuntimeError(
            f"{first()} stands for no tensor of this update: an optimizer around Members made it, "
            f"so it is not known which members are here. It must hand on its own parameters."
        )
    known = [(where, own, parts.place(own)) for where, own in tensors if parts.knows(own)]
    places = [(place, where) for where, _, place in known if place is not None]
    if not places:
        return None
    share = share_of(*places[0])
    for where, own, place in known:
        share.check(where, place)
        if len(own) != share.stop - share.start:
            raise ValueError(
                f"{where()} has {len(own)} of {share.members} members here: must have those from "
                f"{share.start} to {share.stop}, as distribute_tensor() shares them out."
            )
    return share


def _tensors(trees: dict[str, Tree]) -> Iterator[tuple[Where, Tensor]]:
    for root, tree in trees.items():
        leaves, structure = pytree.flatten(tree)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                yield partial(pytree.path, structure, root, index), leaf


def init(make: Callable[[Any, Tree], Tree], inner: Any, params: Tree) -> Tree:
    """Return the state of members whose parameters are DTensors, as DTensors that lie alike.

    Args:
        make: Returns the state of a stack of plain tensors by the optimizer of each member.
        inner: That optimizer.
        params: The parameters.

    Raises:
        RuntimeError: As `share_of`.
        ValueError: As `shared_out` and `Share.cut`.
    """
    leaves, structure = pytree.flatten(params)
    parts = Parts()
    here = pytree.unflatten(structure, parts.represent(leaves, followed=True))
    share = shared_out(parts, params=here)
    if share is None:
        return make(inner, params)
    trees = (share.cut(inner, "inner"), here)
    if share.start < share.stop:
        return share.whole(make(*trees))
    # Of no members vmap makes nothing: so what one would have tells how the tensors look.
    state = make(*(pytree.tree_map(_one_row, tree) for tree in trees))
    return share.whole(pytree.tree_map(_no_row, state))


def update(
    make: Callable[..., tuple[Tree, Tree]],
    inner: Any,
    grads: Tree,
    state: Tree,
    params: Tree,
    told: dict[str, Any],
    *,
    in_place: bool,
) -> tuple[Tree, Tree]:
    """Update the members here, whose trees are of local parts, without a word to other processes.

    Args:
        make: Updates a stack of plain tensors: it is called as `make(inner, grads, state, params,
            in_place=in_place, **told)`.
        inner: The optimizer of each member, whose numbers may be DTensors, or those of all.
        grads: The gradients.
        state: The state.
        params: The parameters.
        told: What the update is told of each member, or of all.
        in_place: Whether to write parameters and state over the old.

    Raises:
        RuntimeError: As `shared_out`.
        ValueError: As `shared_out` and `Share.cut`; or if parameters are plain beside DTensors.
    """
    share = shared_out(current_parts(), params=params, grads=grads, state=state)
    if share is None:
        _refuse_dtensors(inner=inner, **told)
    else:
        inner = share.cut(inner, "inner")
        told = {name: share.cut(own, name) for name, own in told.items()}
        if share.start == share.stop:  # a kernel has nothing to do, and vmap maps over nothing
            return (params, state) if in_place else pytree.tree_map(_copy, (params, state))
    return work_on(None, make, inner, grads, state, params, in_place=in_place, **told)


def _refuse_dtensors(**trees: Tree) -> None:
    kind: Any = dtensor()
    for where, leaf in _tensors(trees):
        if isinstance(leaf, kind):
            raise ValueError(
                f"{where()} is a DTensor with {place_of(leaf)}, and params has none: what is said "
                f"of members lies as their parameters do. Distribute these, or give "
                f".full_tensor()."
            )


def _copy(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


def _one_row(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or leaf.ndim == 0:
        return leaf
    return leaf.new_zeros((1, *leaf.shape[1:]))


def _no_row(leaf: Any) -> Any:
    return leaf[:0].clone() if isinstance(leaf, Tensor) else leaf


def sharded_dim(place: Place, where: Where) -> int | None:
    """Return along which dimension of the mesh members are sharded; None if all are everywhere."""
    shard: Any = sys.modules["torch.distributed.tensor"].Shard
    dims = [dim for dim, own in enumerate(place.placements) if not own.is_replicate()]
    members = [dim for dim in dims if type(place.placements[dim]) is shard]
    if len(dims) > 1 or dims != members or any(place.placements[dim].dim for dim in dims):
        raise ValueError(
            f"{where()} has {place}: each member must lie whole in one process, so that dimension "
            f"0 alone, which is the member, may be sharded, along one dimension of the mesh. Bring "
            f"it there with .redistribute(placements=[Shard(0)]), and all that members have."
        )
    return dims[0] if dims else None


def span_of(members: int, size: int, rank: int) -> tuple[int, int]:
    """Return where the members of a process start and end, as DTensor shares them out."""
    share = -(-members // size)
    return min(rank * share, members), min((rank + 1) * share, members)


def dtensor_of(part: Tensor, place: Place, kind: Any) -> Any:
    """Return the DTensor that lies like this, and of which this is the local part."""
    return kind.from_local(
        part,
        place.mesh,
        place.placements,
        run_check=False,
        shape=place.shape,
        stride=stride_of_whole(part, place.shape),
    )
