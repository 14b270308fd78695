"""An optimizer as a pytree: the tensors among its fields are leaves, the rest is structure."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from . import _tree
from ._entry import wrap_methods
from ._old_dynamo import let_it_hash
from ._resting import as_inner, leaves_at_rest

__all__ = ["register_optimizer"]

OptimizerT = TypeVar("OptimizerT")


class _Static(NamedTuple):
    """What of an optimizer is no leaf: all but the tensors among its fields."""

    structure: _tree.Structure
    dynamic: tuple[bool, ...]  # for each leaf of that structure, whether it is a tensor
    leaves: tuple[Any, ...]  # the others


def register_optimizer(cls: type[OptimizerT]) -> type[OptimizerT]:
    """Make a frozen dataclass a pytree node for `torch.func` and for optree.

    Fields may be trees themselves: of a pair of betas, or of an inner optimizer, the tensors are
    leaves. Its methods run with autocast turned off, and those that update are given the local
    parts of DTensors in place of these. One with a field `inner` leaves at rest what that one does.
    A wrong call of the class names the arguments there are, and says where parameters go.

    Returns:
        The class, so that this can stand above its definition.
    """
    dataclass: Any = cls  # which is more than its type says
    fields = [field.name for field in dataclasses.fields(dataclass)]

    def flatten(opt: OptimizerT) -> tuple[list[Any], _Static]:
        if "_placeholders" in vars(opt):
            children, static = vars(opt)["_placeholders"]
            return children, static
        leaves, structure = _tree.flatten({name: getattr(opt, name) for name in fields})
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)], _Static(
            structure,
            tuple(isinstance(leaf, Tensor) for leaf in leaves),
            tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor)),
        )

    def unflatten(static: _Static, children: Iterable[Any]) -> OptimizerT:
        # Not through __init__: transforms rebuild a node around placeholders, which no check knows.
        children = list(children)
        tensors, others = iter(children), iter(static.leaves)
        leaves = [next(tensors if dynamic else others) for dynamic in static.dynamic]
        opt = object.__new__(cls)
        for name, value in _tree.unflatten(static.structure, leaves).items():
            object.__setattr__(opt, name, value)
        if not all(isinstance(child, Tensor) for child in children):
            # What is no tensor would not be found to be a leaf again, so remember that it is one.
            object.__setattr__(opt, "_placeholders", (children, static))
        return opt

    def names(opt: OptimizerT) -> list[str]:
        _, static = flatten(opt)
        paths = _tree.paths(static.structure, "")
        return [
            path.replace("['", "", 1).replace("']", "", 1)
            for path, dynamic in zip(paths, static.dynamic, strict=True)
            if dynamic
        ]

    _tree.register_node(cls, flatten, unflatten, names)
    wrap_methods(cls)
    let_it_hash(cls)
    if "inner" in fields:
        leaves_at_rest(cls, as_inner)
    dataclass.__init__ = _explaining(dataclass.__init__, cls.__name__, fields)
    return cls


def _explaining(init: Callable[..., None], name: str, fields: list[str]) -> Callable[..., None]:
    """Make the error of a wrong call list the arguments, and say where parameters go."""

    @functools.wraps(init)
    def explained(*args: Any, **kwargs: Any) -> None:
        try:
            init(*args, **kwargs)
        except TypeError as error:
            own = error.__traceback__
            if own is None or own.tb_next is not None:  # then it is from within
                raise
            found = str(error).partition("() ")[2] or str(error)
            raise TypeError(
                f"{name}() {found}. It takes {', '.join(fields)}. Parameters are given to init(): "
                f"opt = {name}(...); state = opt.init(params)."
            ) from None

    return explained
