"""A frozen dataclass as a pytree: the tensors among its fields are leaves, the rest is structure."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import pytree
from .old_dynamo import let_it_hash

__all__ = ["register_dataclass"]

DataclassT = TypeVar("DataclassT")


class _Static(NamedTuple):
    """What of an optimizer is no leaf: all but the tensors among its fields."""

    structure: pytree.Structure
    dynamic: tuple[bool, ...]  # for each leaf of that structure, whether it is a tensor
    leaves: tuple[Any, ...]  # the others


def register_dataclass(cls: type[DataclassT], advice: str = "") -> type[DataclassT]:
    """Make a frozen dataclass a pytree node for `torch.func` and for optree.

    Fields may be trees themselves: of a pair of numbers, or of another such value, the tensors are
    leaves. Two values are equal if their tensors are, in value, dtype, shape and device, and all
    else is; a hash knows nothing of the values of tensors, which may be filled with others. A wrong
    call of the class names the arguments there are.

    Args:
        cls: The dataclass.
        advice: What the message of such a call says besides.

    Returns:
        The class, so that this can stand above its definition.
    """
    dataclass: Any = cls  # which is more than its type says
    fields = [field.name for field in dataclasses.fields(dataclass)]

    def flatten(opt: DataclassT) -> tuple[list[Any], _Static]:
        if "_placeholders" in vars(opt):
            children, static = vars(opt)["_placeholders"]
            return children, static
        leaves, structure = pytree.flatten({name: getattr(opt, name) for name in fields})
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)], _Static(
            structure,
            tuple(isinstance(leaf, Tensor) for leaf in leaves),
            tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor)),
        )

    def unflatten(static: _Static, children: Iterable[Any]) -> DataclassT:
        # Not through __init__: transforms rebuild a node around placeholders, which no check knows.
        children = list(children)
        tensors, others = iter(children), iter(static.leaves)
        leaves = [next(tensors if dynamic else others) for dynamic in static.dynamic]
        opt = object.__new__(cls)
        for name, value in pytree.unflatten(static.structure, leaves).items():
            object.__setattr__(opt, name, value)
        if not all(isinstance(child, Tensor) for child in children):
            # What is no tensor would not be found to be a leaf again, so remember that it is one.
            object.__setattr__(opt, "_placeholders", (children, static))
        return opt

    def names(opt: DataclassT) -> list[str]:
        _, static = flatten(opt)
        paths = pytree.paths(static.structure, "")
        return [
            path.replace("['", "", 1).replace("']", "", 1)
            for path, dynamic in zip(paths, static.dynamic, strict=True)
            if dynamic
        ]

    pytree.register_node(cls, flatten, unflatten, names)
    dataclass.__eq__, dataclass.__hash__ = _comparing(fields)
    let_it_hash(cls)
    dataclass.__init__ = _explaining(dataclass.__init__, cls.__name__, fields, advice)
    return cls


def _comparing(
    fields: list[str],
) -> tuple[Callable[[Any, object], Any], Callable[[Any], int]]:
    """Return what says whether two values with these fields are equal, and what hashes one."""

    def equal(opt: Any, other: object) -> Any:
        if type(other) is not type(opt):
            return NotImplemented
        return all(_are_equal(getattr(opt, name), getattr(other, name)) for name in fields)

    def hashed(opt: Any) -> int:
        return hash((type(opt), *(_hashable(getattr(opt, name)) for name in fields)))

    return equal, hashed


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two fields are equal, or two parts of them."""
    for kind in (tuple, list):
        if isinstance(one, kind) and isinstance(other, kind):
            return len(one) == len(other) and all(map(_are_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_are_equal(one[key], other[key]) for key in one)
    if one is other:
        return True
    if not isinstance(one, Tensor) and not isinstance(other, Tensor):
        return bool(one == other)
    if _hashable(one) != _hashable(other):
        return False
    try:
        return torch.equal(one, other)
    except (NotImplementedError, RuntimeError) as error:
        raise RuntimeError(
            "whether two optimizers are equal depends on tensors whose values cannot be read here: "
            "they are mapped over, traced, or on the meta device. Compare them outside."
        ) from error


def _hashable(value: Any) -> Any:
    """Return what of a field goes into a hash: of a tensor not the values, which may change."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.device
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return frozenset((key, _hashable(part)) for key, part in value.items())
    return value if isinstance(value, Hashable) else type(value)


def _explaining(
    init: Callable[..., None], name: str, fields: list[str], advice: str
) -> Callable[..., None]:
    """Make the error of a wrong call list the arguments."""

    @functools.wraps(init)
    def explained(*args: Any, **kwargs: Any) -> None:
        try:
            init(*args, **kwargs)
        except TypeError as error:
            own = error.__traceback__
            if own is None or own.tb_next is not None:  # then it is from within
                raise
            found = str(error).partition("() ")[2] or str(error)
            takes = ", ".join(fields) or "no arguments"
            raise TypeError(f"{name}() {found}. It takes {takes}. {advice}".rstrip()) from None

    return explained
