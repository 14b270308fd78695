"""Several trees that are alike made into one: members stacked, or chosen between.

Tensors are joined, and so are numbers of optimizers and schedules, which become tensors where they
differ. All else must be the same in all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._core import pytree
from .._core.types import Tree, kind_of
from .hyperparameters import short
from .registration import is_registered

_Where: TypeAlias = Callable[[], str]
"""Returns the path of a part, without the root: for messages alone, since to find it takes long."""


class Merger(NamedTuple):
    """Makes one tree of several that are alike: their tensors are joined, all else is the same."""

    roots: Sequence[str]  # what messages call the trees
    join: Callable[[Sequence[Tensor]], Tensor]
    number_shape: tuple[int, ...]  # of the tensor that is made of a number
    remedy: str

    def merge(self, trees: Sequence[Tree], where: _Where, in_value: bool = False) -> Tree:
        """Return the tree that is made of these, which are at that path.

        In a value (an optimizer, a schedule) numbers that differ become tensors.
        """
        flat = [pytree.flatten_above(tree, is_registered) for tree in trees]
        structure = flat[0][1]
        for root, (_, other) in zip(self.roots, flat, strict=True):
            if not pytree.same(structure, other):
                raise ValueError(self._mismatch(structure, root, other, where()))
        columns = zip(*(leaves for leaves, _ in flat), strict=True)
        merged = [
            self._merge_leaves(column, partial(_path_of_leaf, where, structure, index), in_value)
            for index, column in enumerate(columns)
        ]
        return pytree.unflatten(structure, merged)

    def _merge_leaves(self, column: Sequence[Any], where: _Where, in_value: bool) -> Any:
        first = column[0]
        if any(map(is_registered, column)):
            return self._merge_values(column, where)
        if all(isinstance(leaf, Tensor) for leaf in column):
            return self._join(column, where)
        for root, leaf in zip(self.roots, column, strict=True):
            if _agree(first, leaf):
                continue
            if in_value and all(isinstance(own, Tensor) or _is_number(own) for own in column):
                return self._join(self._as_tensors(column), where)
            raise ValueError(self._difference(first, root, leaf, where()))
        return first

    def _merge_values(self, column: Sequence[Any], where: _Where) -> Any:
        """Merge optimizers, or schedules, field by field, and let their class check the result."""
        first = column[0]
        for root, value in zip(self.roots, column, strict=True):
            if type(value) is not type(first):
                raise ValueError(self._difference(first, root, value, where()))
        names = [field.name for field in dataclasses.fields(first) if field.init]
        fields = {name: [getattr(value, name) for value in column] for name in names}
        news = {
            name: self.merge(fields[name], partial(_path_of_field, where, name), in_value=True)
            for name in names
        }
        try:
            return dataclasses.replace(first, **news)
        except (TypeError, ValueError) as error:
            raise ValueError(self._refusal(fields, news, where(), error)) from error

    def _join(self, column: Sequence[Tensor], where: _Where) -> Tensor:
        first = column[0]
        for root, leaf in zip(self.roots, column, strict=True):
            for name in ("shape", "dtype", "device"):
                if getattr(leaf, name) != getattr(first, name):
                    raise ValueError(self._difference(first, root, leaf, where()))
        return self.join(column)

    def _as_tensors(self, column: Sequence[Any]) -> list[Tensor]:
        """Return numbers as tensors like those beside them, all in float64, which loses nothing."""
        like = next((leaf for leaf in column if isinstance(leaf, Tensor)), None)
        shape = self.number_shape if like is None else like.shape
        device = torch.device("cpu") if like is None else like.device
        return [
            leaf.double()
            if isinstance(leaf, Tensor)
            else torch.full(shape, leaf, dtype=torch.float64, device=device)
            for leaf in column
        ]

    def _difference(self, first: Any, root: str, other: Any, path: str) -> str:
        """Say in what two trees differ that must not."""
        return (
            f"{self.roots[0]}{path} is {_shown(first)} and {root}{path} is {_shown(other)}: what "
            f"may differ are the values of tensors of one shape, dtype and device, and numbers of "
            f"optimizers and schedules. {self.remedy}"
        )

    def _mismatch(self, own: pytree.Structure, root: str, other: pytree.Structure, at: str) -> str:
        """Say in what the structures of two trees differ."""
        here, there = (pytree.paths(structure, at) for structure in (own, other))
        missing = [root + path for path in here if path not in there]
        extra = [root + path for path in there if path not in here]
        parts = [f"it has no {pytree.some(missing)}"] * bool(missing)
        parts += [f"{pytree.some(extra)} is not in {self.roots[0]}"] * bool(extra)
        return (
            f"{root}{at} does not have the structure of {self.roots[0]}{at}: "
            f"{' and '.join(parts) or 'the nodes are of other types, or in another order'}. "
            f"All members must have one structure. {self.remedy}"
        )

    def _refusal(
        self, fields: dict[str, list[Any]], news: dict[str, Any], path: str, error: Exception
    ) -> str:
        """Say which numbers a class does not take as a tensor: those that were none before."""
        parts = [
            f"{root}{path}.{name} is {_shown(value)}"
            for name, values in fields.items()
            if isinstance(news[name], Tensor) and not any(isinstance(v, Tensor) for v in values)
            for root, value in zip(self.roots, values, strict=True)
        ]
        return (
            f"{pytree.some(parts) or self.roots[0] + path}: where members differ, these numbers "
            f"must become a tensor, and that is refused: {error} {self.remedy}"
        )


def _agree(one: Any, other: Any) -> bool:
    """Whether what is no tensor is the same in two members. True is not 1 here."""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    alike = type(one) is type(other) or (_is_number(one) and _is_number(other))
    return alike and bool(one == other)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """Return what a message says of a value: of a tensor how it looks."""
    return f"{kind_of(value)} on {value.device}" if isinstance(value, Tensor) else short(value)


def _path_of_leaf(where: _Where, structure: pytree.Structure, index: int) -> str:
    return pytree.path(structure, where(), index)


def _path_of_field(where: _Where, name: str) -> str:
    return f"{where()}.{name}"
