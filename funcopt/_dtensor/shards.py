"""Sharded tensors: what is known of them while an update works on their local parts.

A DTensor is a tensor whose parts lie on many processes. Arithmetic on one of its own costs several
times what it costs on its local part, and half the list operators do not know it. So the methods of
an optimizer never see one: before them each DTensor is replaced by its local part (`methods` does
that), which is a plain tensor, and what depends on more than its elements is asked for here: which
DTensor it represents, and whether the parts of two leaves lie alike.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from itertools import repeat
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.types import Tree

P = ParamSpec("P")
R = TypeVar("R")

DTensor: TypeAlias = Any  # whose module is imported by whoever makes one, never from here


_BUILT_FOR_PROCESSES = torch.distributed.is_available()


_found: type | None = transforms.find_dtensor()


def dtensor() -> type | None:
    """Return the type of sharded tensors, if its module was imported: else there are none."""
    global _found  # noqa: PLW0603  # found once: a compiler takes long to look at all modules
    if transforms.compiling():  # perhaps imported by the compiler just now: no guard on that
        return transforms.find_dtensor()
    if _found is None:
        _found = transforms.find_dtensor()
    return _found


def has_sharded(tree: Tree) -> bool:
    """Whether a leaf of a tree is sharded. None is where there are no processes to share it."""
    if not _BUILT_FOR_PROCESSES or not torch.distributed.is_initialized():
        return False
    kind = dtensor()
    if kind is None or (type(tree) is dict and transforms.all_plain(tree.values())):
        return False
    if type(tree) is dict and any(type(leaf) is kind for leaf in tree.values()):
        return True  # as a rule by the first
    return any(issubclass(own, kind) for own in set(map(type, pytree.flatten(tree)[0])))


def local_part(tensor: DTensor) -> Tensor:
    """Return the part of a DTensor that lies here, in the same memory. Call it under `no_grad`.

    It requires a gradient where the whole does, and has a history where the whole has one, but no
    derivative goes through it.
    """
    local: Any = tensor.to_local()
    if type(local) is not Tensor and hasattr(local, "wait"):
        local = local.wait()  # that of a collective still under way
    part: Tensor = local
    if not tensor.requires_grad:
        return part.detach() if part.requires_grad else part
    part = part.detach().requires_grad_()
    if not tensor.is_leaf:
        with torch.enable_grad():
            part = part.view_as(part)
    return part


# What a DTensor holds here, and how it lies: private to torch, and read without the detour by way
# of `to_local()`, which takes twenty times as long. FSDP2 does so, too.
_held_by = operator.attrgetter("_local_tensor")
_spec_of = operator.attrgetter("_spec")


def held_by(tensors: Sequence[DTensor]) -> list[Tensor]:
    """Return the very tensors that DTensors hold here, where `specs_of` finds their specs."""
    return list(map(_held_by, tensors))


def specs_of(tensors: Sequence[Any]) -> list[Any] | None:
    """Return how DTensors lie, for comparison; None if one is none, or torch does not say so."""
    kind = dtensor()
    if not hasattr(kind, "_local_tensor"):
        return None
    try:
        return list(map(_spec_of, tensors))
    except AttributeError:
        return None


def wholes_of_parts(
    parts: Sequence[Tensor], specs: Sequence[Any], requires_grad: Sequence[bool] | None = None
) -> list[Any]:
    """Return the DTensors that lie by these specs, and of which these are the local parts.

    What FSDP2 does, too, without the check of arguments that takes ten times as long; and without
    `__init__`, which does nothing, and takes twice as long as all else.
    """
    kind: Any = _found
    create, requiring = kind.__new__, requires_grad or repeat(False)
    try:
        return list(map(create, repeat(kind), parts, specs, requiring))
    except TypeError:  # a torch that wants the last one by its name, which takes a fifth longer
        return [
            create(kind, part, spec, requires_grad=requires)
            for part, spec, requires in zip(parts, specs, requiring, strict=False)
        ]


def part_or_leaf(leaf: Any) -> Any:
    """Return the part of a DTensor that lies here, and any other leaf as it is."""
    kind = dtensor()
    return local_part(leaf) if kind is not None and isinstance(leaf, kind) else leaf


class Place(NamedTuple):
    """How the parts of a DTensor lie."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size

    def __str__(self) -> str:
        names = "" if self.mesh.mesh_dim_names is None else f" {self.mesh.mesh_dim_names}"
        return f"placements {self.placements} on a mesh of shape {tuple(self.mesh.shape)}{names}"


def place_of(tensor: DTensor) -> Place:
    return Place(tensor.device_mesh, tensor.placements, tensor.shape)


class _Part(NamedTuple):
    """A tensor of an update, and what it represents."""

    tensor: Tensor
    whole: Tensor
    place: Place | None  # None if it is plain, and represents itself


class Parts:
    """The tensors of one update by which DTensors are represented, and those that are just plain.

    Tensors that the update makes on its way are not among them: these come of tensors that are, and
    lie as they do.
    """

    def __init__(self) -> None:
        self._by_id: dict[int, _Part] = {}  # which keeps them, so that no id is given away

    def represent(self, leaves: list[Any], *, followed: bool) -> list[Any]:
        """Return leaves with the local parts of DTensors in place of these.

        A part requires a gradient if its DTensor does and is followed.
        """
        kind = dtensor()
        with torch.no_grad():
            return [
                self._represented(leaf, kind, followed) if isinstance(leaf, Tensor) else leaf
                for leaf in leaves
            ]

    def _represented(self, leaf: Tensor, kind: type | None, followed: bool) -> Tensor:
        if kind is None or not isinstance(leaf, kind):
            self._by_id[id(leaf)] = _Part(leaf, leaf, None)
            return leaf
        part = local_part(leaf)
        if id(part) in self._by_id or (part.requires_grad and not followed):
            part = part.detach()
        self._by_id[id(part)] = _Part(part, leaf, place_of(leaf))
        return part

    def sharded(self) -> list[tuple[Tensor, Tensor]]:
        """Return the local parts, each with the DTensor that it represents."""
        return [(p.tensor, p.whole) for p in self._by_id.values() if p.place is not None]

    def whole_of(self, tensor: Any) -> Any:
        """Return the tensor that a part represents, None if it is none of these."""
        part = self._by_id.get(id(tensor))
        return None if part is None else part.whole

    def place(self, tensor: Any) -> Place | None:
        """Return how the tensor lies that a part represents; None if it is plain.

        Raises:
            KeyError: If it is none of these.
        """
        return self._by_id[id(tensor)].place

    def add(self, tensor: Tensor, like: Tensor) -> None:
        """Let a tensor represent what one of the parts does."""
        self._by_id[id(tensor)] = self._by_id[id(like)]._replace(tensor=tensor)

    def knows(self, tensor: Any) -> bool:
        """Whether this is one of the parts."""
        return id(tensor) in self._by_id


_current: ContextVar[Parts | None] = ContextVar("parts", default=None)


def current_parts() -> Parts | None:
    """Return the tensors of the update under way, None if it has no DTensors."""
    # What is compiled has no DTensors in it: an update of some stays out of the graph.
    return None if transforms.compiling() else _current.get()


def work_on(parts: Parts | None, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function that knows what the tensors represent it works on; None: just themselves."""
    before = _current.get()
    try:
        _current.set(parts)
        return function(*args, **kwargs)
    finally:
        _current.set(before)


def whole_of(leaf: Any) -> Any:
    """Return the DTensor that a leaf of this update represents, or the leaf if it is none."""
    parts = current_parts()
    whole = None if parts is None else parts.whole_of(leaf)
    return leaf if whole is None else whole


def stand_for(tensor: Tensor, leaf: Tensor) -> None:
    """Let a tensor that an optimizer hands on in place of a leaf represent what the leaf does.

    It is known until the update is done, also to an optimizer that asks for a number of all leaves.
    """
    parts = current_parts()
    if parts is not None and parts.knows(leaf):
        parts.add(tensor, leaf)


def wholes_in(tree: Tree) -> Tree:
    """Return a tree with the DTensors of this update in place of the parts that represent them."""
    parts = current_parts()
    if parts is None:
        return tree
    leaves, structure = pytree.flatten(tree)
    return pytree.unflatten(structure, list(map(whole_of, leaves)))


def agree(params: Sequence[Tensor], columns: Sequence[Sequence[Tensor]]) -> bool:
    """Whether leaves that look like their parameters here lie as they do elsewhere, too.

    This is asked in eager code alone.
    """
    parts = _current.get()
    if parts is None:
        return True
    places = [parts.place(param) for param in params if parts.knows(param)]
    return len(places) == len(params) and all(
        not parts.knows(leaf) or parts.place(leaf) == place
        for column in columns
        for leaf, place in zip(column, places, strict=bool(column))
    )


def check_placed(
    leaves: Sequence[Any], params: Sequence[Any], path: Callable[[int], str], what: str
) -> None:
    """Refuse leaves whose parts do not lie as those of their parameters."""
    parts, kind = current_parts(), dtensor()
    if kind is None:
        return
    for index, (leaf, param) in enumerate(zip(leaves, params, strict=True)):
        if not isinstance(leaf, Tensor) or not isinstance(param, Tensor):
            continue
        if parts is not None and not (parts.knows(leaf) and parts.knows(param)):
            continue
        own, wanted = (
            parts.place(tensor)
            if parts is not None
            else (place_of(tensor) if isinstance(tensor, kind) else None)
            for tensor in (leaf, param)
        )
        if own != wanted:
            raise ValueError(f"{path(index)} {_difference(own, wanted, what)}")


def _difference(own: Place | None, wanted: Place | None, what: str) -> str:
    if own is None:
        return (
            f"is a plain tensor, the parameter is a DTensor with {wanted}: {what} must lie as its "
            f"parameter does. Give distribute_tensor(tensor, param.device_mesh, param.placements), "
            f"or if it is the local part already, DTensor.from_local()."
        )
    if wanted is None:
        return (
            f"is a DTensor with {own}, the parameter is a plain tensor: {what} must lie as its "
            f"parameter does. Give .full_tensor(), or distribute the parameter."
        )
    if own.shape != wanted.shape:
        return (
            f"has shape {tuple(own.shape)}, the parameter has {tuple(wanted.shape)}. Nothing is "
            f"broadcast: give both the same shape."
        )
    remedy = (
        "with .redistribute(placements=param.placements)"
        if own.mesh == wanted.mesh
        else "by way of .full_tensor() and distribute_tensor()"
    )
    return (
        f"has {own}, the parameter has {wanted}: {what} must lie as its parameter does, and "
        f"nothing is moved silently. Bring it there {remedy}."
    )
