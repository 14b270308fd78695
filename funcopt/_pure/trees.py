"""The trees of a state beside the parameters, checked: leaf by leaf and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import pytree
from .._core.types import Tree, is_dense, kind_of
from .._engine.checks import check_alike, of_members
from .source import Kind, is_elementwise
from .state import Fields, LeafState

# What torch's elementwise classes keep for a leaf as one number; all else is like the leaf.
_SCALARS = frozenset(("step", "eta", "mu", "mu_product"))

_ROOTS = ("state.slots", "state.numbers", "state.made")


class States(NamedTuple):
    """The states of the leaves, in the order of the parameters, and the trees that hold them."""

    leaves: list[LeafState]
    fields: list[dict[str, pytree.Paired]]

    def rebuild(self, states: Sequence[LeafState]) -> Fields:
        """Return trees like those that were given, of other states."""
        slots, numbers, made = (
            {
                name: paired.rebuild([own[index].get(name, ()) for own in states])
                for name, paired in field.items()
            }
            for index, field in enumerate(self.fields)
        )
        return slots, numbers, made

    def by_path(self) -> dict[str, Tensor]:
        """Return all tensors by their paths."""
        found = {}
        for root, field in zip(_ROOTS, self.fields, strict=True):
            for name, paired in field.items():
                for path, leaf in zip(_paths(paired, root, name), paired.leaves, strict=True):
                    if isinstance(leaf, Tensor):
                        found[path] = leaf
        return found


def gather_states(
    kind: Kind, state: Any, params: Tree, leaves: Sequence[Tensor], structure: pytree.Structure
) -> States:
    """Return the states of the leaves, checked.

    Raises:
        TypeError: If a leaf of a tree is no dense tensor, or a field no dict.
        ValueError: If a tree does not match the parameters, or a leaf its parameter.
    """
    fields: list[dict[str, pytree.Paired]] = []
    for root, trees in zip(_ROOTS, state[: len(_ROOTS)], strict=True):
        if not isinstance(trees, Mapping):
            raise TypeError(
                f"{root} is {kind_of(trees)}: it must be a dict of trees, by name. Make the state "
                f"with init() of this optimizer."
            )
        fields.append(
            {n: _pair(own, f"{root}[{n!r}]", params, structure) for n, own in trees.items()}
        )
    for root, field in zip(_ROOTS, fields, strict=True):
        for name, own in field.items():
            like = root == _ROOTS[0] and is_elementwise(kind) and name not in _SCALARS
            is_number = root != _ROOTS[0] or (is_elementwise(kind) and not like)
            path = partial(pytree.path, structure, f"{root}[{name!r}]")
            if like:
                check_alike(own.leaves, leaves, path, "what is kept of it")
            else:
                _check(own.leaves, path, single=is_number)
            if is_number and root == _ROOTS[0]:
                _check_counts(own.leaves, leaves, path)
    rows = zip(*(_rows(field, len(leaves)) for field in fields), strict=True)
    return States([LeafState(*row) for row in rows], fields)


def _rows(field: Mapping[str, pytree.Paired], count: int) -> list[dict[str, Tensor]]:
    """Return what each leaf has, by name."""
    columns = {name: paired.leaves for name, paired in field.items()}
    return [
        {name: own[index] for name, own in columns.items() if isinstance(own[index], Tensor)}
        for index in range(count)
    ]


def _check(column: Sequence[Any], path: Callable[[int], str], *, single: bool) -> None:
    for index, leaf in enumerate(column):
        if _is_absent(leaf):
            continue
        if not isinstance(leaf, Tensor) or not is_dense(leaf):
            raise TypeError(
                f"{path(index)} is {kind_of(leaf)}: it must be a dense tensor. Make the state with "
                f"init() of this optimizer."
            )
        if single and leaf.ndim != 0:
            raise ValueError(
                f"{path(index)} has shape {tuple(leaf.shape)}: it must have shape ().{of_members()}"
                f" A state that vmap(init) made belongs to vmap(update)."
            )


def _check_counts(
    column: Sequence[Any], params: Sequence[Tensor], path: Callable[[int], str]
) -> None:
    """Refuse numbers at which a class would fail when it has moved other leaves already."""
    for index, (own, param) in enumerate(zip(column, params, strict=True)):
        if _is_absent(own):
            continue
        if own.is_complex() or own.dtype is torch.bool:
            raise ValueError(
                f"{path(index)} has dtype {own.dtype}: it must be a real number, such "
                f"as init() makes."
            )
        if own.device not in (param.device, torch.device("cpu")):
            raise ValueError(
                f"{path(index)} is on {own.device}, and its parameter on {param.device}: it must "
                f"be there or on the CPU, as init() makes it."
            )


def _is_absent(leaf: object) -> bool:
    return type(leaf) is tuple and not leaf


def _pair(tree: Tree, root: str, params: Tree, structure: pytree.Structure) -> pytree.Paired:
    """Pair a tree with the parameters, in which `()` may stand for a leaf."""
    leaves, own = pytree.flatten(tree)
    if pytree.same(own, structure):
        return pytree.Paired(leaves, own, None)
    leaves, own = pytree.flatten_above(tree, _is_absent)
    if not any(map(_is_absent, leaves)):
        return pytree.pair(tree, root, structure)
    outer, whole = pytree.flatten_above(params, _is_absent)
    empty = {
        path for path, leaf in zip(pytree.paths(whole, ""), outer, strict=True) if _is_absent(leaf)
    }
    positions = {path: position for position, path in enumerate(pytree.paths(own, ""))}
    wanted = pytree.paths(structure, "")
    missing = [path for path in wanted if path not in positions]
    if missing or positions.keys() - empty - set(wanted):
        lacking = missing or sorted(positions.keys() - empty - set(wanted))
        raise ValueError(
            f"{root} does not have the structure of params: they differ in "
            f"{pytree.some([root + path for path in lacking])}. Make the state with init() from "
            f"these parameters."
        )
    order = [positions[path] for path in wanted]
    found = [leaves[position] for position in order]
    return pytree.Paired(found, own, order) if not empty else pytree.Paired(found, structure, None)


def _paths(paired: pytree.Paired, root: str, name: str) -> list[str]:
    """Return the paths of the leaves, in the order of the parameters."""
    paths = pytree.paths(paired.structure, f"{root}[{name!r}]")
    return paths if paired.order is None else [paths[position] for position in paired.order]
