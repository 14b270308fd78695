"""Trees: flatten, rebuild, name the leaves, pair two trees by key. The one file that knows pytrees.

Optree does the work. Its namespace "torch" is the one into which torch mirrors whatever is
registered with `torch.utils._pytree`, and it falls back on optree's own global registry, so a node
type that a user registered with either library is a node here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import optree
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

# Imported for its effect: this is what mirrors torch's registry into optree. A torch without it
# still works, save for node types registered with torch alone.
with contextlib.suppress(ImportError):
    importlib.import_module("torch.utils._cxx_pytree")

from . import transforms
from .types import Tree

_NAMESPACE = "torch"
if transforms.OLD_DYNAMO:
    from . import old_dynamo

    old_dynamo.let_it_trace(_NAMESPACE)

Structure: TypeAlias = optree.PyTreeSpec
"""The shape of a tree without its leaves: hashable, comparable, enough to rebuild the tree."""

NodeT = TypeVar("NodeT")


def flatten(tree: Tree) -> tuple[list[Any], Structure]:
    """Return the leaves of a tree, in order, and its structure. `None` is a leaf."""
    if transforms.compiling():
        return optree.tree_flatten(tree, none_is_leaf=True, namespace=_NAMESPACE)
    if type(tree) is dict and _CERTAIN_LEAVES.issuperset(map(type, tree.values())):
        return _flatten_dict(tree)
    if type(tree) in _CERTAIN_LEAVES:
        return [tree], _LEAF
    leaves, structure = optree.tree_flatten(tree, none_is_leaf=True, namespace=_NAMESPACE)
    if _mirror(leaves):
        return flatten(tree)
    return leaves, structure


def _flatten_dict(tree: dict[Any, Any]) -> tuple[list[Any], Structure]:
    """Flatten a dict of leaves, which is what `named_parameters` gives: its structure is its keys.

    Optree makes it anew at each call; here the structure of keys that came before is remembered.
    """
    keys = tuple(tree)
    found = _structures.get(keys) if _are_strings(keys) else None
    if found is None:
        numbered: Tree = {key: position for position, key in enumerate(keys)}
        positions, structure = optree.tree_flatten(
            numbered, none_is_leaf=True, namespace=_NAMESPACE
        )
        found = _taker(list(keys), [keys[position] for position in positions]), structure
        if _are_strings(keys):
            if len(_structures) >= _MOST_STRUCTURES:
                _structures.clear()
            _structures[keys] = found
    take, structure = found
    return take(tree), structure


def _taker(given: list[Any], keys: list[Any]) -> Callable[[Any], list[Any]]:
    """Return the function that takes the values at keys, in this order, out of such a dict."""
    if keys == given:
        return lambda tree: list(tree.values())
    take = operator.itemgetter(*keys)
    return lambda tree: list(take(tree))


def _are_strings(keys: tuple[Any, ...]) -> bool:
    """Whether keys that are equal are the same: others may not be, as 1 and True."""
    return _STRING.issuperset(map(type, keys))


_CERTAIN_LEAVES = frozenset((Tensor, torch.nn.Parameter, type(None)))
_A_LEAF: Tree = 0
_LEAF = optree.tree_structure(_A_LEAF, none_is_leaf=True, namespace=_NAMESPACE)

_STRING = frozenset((str,))
_MOST_STRUCTURES = 256
# How to take the leaves out of a dict with these keys, and its structure.
_structures: dict[tuple[Any, ...], tuple[Callable[[Any], list[Any]], Structure]] = {}


class NotKnownError(Exception):
    """Raised where the tree is needed of which a `FlatTree` has the leaves alone."""


class FlatTree:
    """The leaves of a tree that was checked before in all but how its leaves look now.

    It stands for such a tree in a step that is like one before, to which leaves are enough. Any
    other step flattens its trees, and raises `NotKnownError` before anything was done.
    """

    __slots__ = "leaves", "structure"

    def __init__(self, leaves: list[Any], structure: Structure) -> None:
        """Take the leaves, and the structure of what is to come of them."""
        self.leaves, self.structure = leaves, structure


def _refuse_flat(_: FlatTree) -> tuple[list[Any], None]:
    raise NotKnownError


def columns_of_dicts(trees: Sequence[Tree]) -> tuple[list[list[Any]], Structure] | None:
    """Return the values of dicts that have the same keys in the same order, seen before as leaves.

    Whether the values are leaves this time is for the caller to find out: it compares them with the
    leaves of last time. Trees that are flat already have theirs. None where this shortcut does not
    apply.
    """
    if type(trees[0]) is FlatTree:
        return [tree.leaves for tree in trees], trees[0].structure
    if type(trees[0]) is not dict or not _are_strings(keys := tuple(trees[0])):
        return None
    found = _structures.get(keys)
    if found is None:
        return None
    for tree in trees[1:]:
        if type(tree) is not dict or tuple(tree) != keys:
            return None
    take, structure = found
    return list(map(take, trees)), structure


def _mirror(leaves: list[Any]) -> bool:
    """Tell optree of node types that only torch's Python registry knows, as it does of dataclasses.

    Return whether these supposed leaves were of any. That a type is no node is not remembered: it
    may be registered at any time.
    """
    nodes = [kind for kind in set(map(type, leaves)) if kind in torch_pytree.SUPPORTED_NODES]
    for kind in nodes:
        node = torch_pytree.SUPPORTED_NODES[kind]
        register: Any = optree.register_pytree_node
        try:
            register(
                kind,
                node.flatten_fn,
                lambda context, children, node=node: node.unflatten_fn(list(children), context),
                namespace=_NAMESPACE,
            )
        except ValueError:  # another thread was faster
            one = next(leaf for leaf in leaves if type(leaf) is kind)
            if optree.tree_is_leaf(one, none_is_leaf=True, namespace=_NAMESPACE):
                raise
    return bool(nodes)


def flatten_above(tree: Tree, is_leaf: Callable[[Any], bool]) -> tuple[list[Any], Structure]:
    """Return the subtrees for which `is_leaf` holds, with the other leaves, and what holds them."""
    flat = optree.tree_flatten(tree, is_leaf, none_is_leaf=True, namespace=_NAMESPACE)
    if transforms.compiling() or not _mirror([leaf for leaf in flat[0] if not is_leaf(leaf)]):
        return flat
    return flatten_above(tree, is_leaf)


def list_structure(length: int) -> Structure:
    """Return the structure of a list of so many leaves."""
    leaves: Tree = [_A_LEAF] * length
    return optree.tree_structure(leaves, none_is_leaf=True, namespace=_NAMESPACE)


def unflatten(structure: Structure, leaves: Iterable[Any]) -> Tree:
    """Return the tree of this structure with these leaves."""
    return optree.tree_unflatten(structure, leaves)


def tree_map(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """Return a tree of what a function makes of each leaf; None, as of a gradient, stays None."""
    leaves, structure = flatten(tree)
    return unflatten(structure, [None if leaf is None else function(leaf) for leaf in leaves])


def same(one: Structure, other: Structure) -> bool:
    """Whether two trees have the same structure."""
    if transforms.OLD_DYNAMO and transforms.compiling():
        return old_dynamo.same(one, other)
    return one is other or bool(one == other)


def paths(structure: Structure, root: str) -> list[str]:
    """Return for each leaf the Python expression that reaches it, such as `params['0.weight']`."""
    walk = _walk(structure)
    if walk is None:
        return [root + accessor.codify("") for accessor in structure.accessors()]
    # By the keys that torch knows of its nodes, which optree was not told of.
    keys = dict(walk)
    return [root + torch_pytree.keystr(keys[index]) for index in range(structure.num_leaves)]


def path(structure: Structure, root: str, index: int) -> str:
    """Return the path of one leaf."""
    return paths(structure, root)[index]


def names(structure: Structure) -> list[str]:
    """Return for each leaf its keys joined by dots, as modules name parameters: `0.weight`."""
    walk = _walk(structure)
    if walk is not None:
        return [".".join(map(_key, keys)) for _, keys in sorted(walk, key=lambda step: step[0])]
    return [".".join(map(_key, accessor)) for accessor in structure.accessors()]


def insertion_order(structure: Structure) -> list[int]:
    """Return the leaves in the order in which dicts were filled, whether or not that is ours."""
    walk = _walk(structure)
    return list(range(structure.num_leaves)) if walk is None else [index for index, _ in walk]


def _key(entry: Any) -> str:
    """A key of torch (of a dict, a sequence, an attribute), or an entry of optree, in words."""
    for attribute in ("key", "idx", "name", "field", "entry"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _walk(structure: Structure) -> list[tuple[int, Any]] | None:
    """Each leaf and its keys, in the order in which torch finds them, that of insertion.

    None where torch does not know a node, or was not told of its keys.
    """
    numbered = unflatten(structure, range(structure.num_leaves))
    try:
        found, _ = torch_pytree.tree_flatten_with_path(numbered)
    except ValueError:
        return None
    walk = [(leaf, keys) for keys, leaf in found if isinstance(leaf, int)]
    return walk if len(dict(walk)) == structure.num_leaves else None


class Paired(NamedTuple):
    """The leaves of one tree, in the order of another tree's leaves."""

    leaves: list[Any]
    structure: Structure
    order: list[int] | None  # order[i]: where leaf i stands in its own tree; None: just there

    def rebuild(self, leaves: Sequence[Any]) -> Tree:
        """Return a tree like the one that was paired, from leaves in the order of the other."""
        if self.structure is _LEAF:
            return leaves[0]
        if self.order is None:
            return unflatten(self.structure, leaves)
        own: list[Any] = [None] * len(leaves)
        for position, leaf in zip(self.order, leaves, strict=True):
            own[position] = leaf
        return unflatten(self.structure, own)


def pair_all(
    trees: Sequence[Tree], roots: Sequence[str], params: Tree, leaves: list[Any], own: Structure
) -> list[Paired]:
    """Pair the leaves of several trees with those of the parameters, whose leaves these are.

    A compiler reads every line that flattens a tree, which takes it a tenth of a second. Dicts that
    hold their leaves themselves, under the same keys in the same order, need none of that.

    Raises:
        ValueError: As `pair`.
    """
    is_plain = type(params) is dict and all(map(operator.is_, params.values(), leaves))
    keys = list(params) if is_plain else []
    return [
        Paired(list(tree.values()), own, None)
        if is_plain and _holds_leaves(tree, keys)
        else pair(tree, root, own)
        for tree, root in zip(trees, roots, strict=True)
    ]


def _holds_leaves(tree: Tree, keys: list[Any]) -> bool:
    return (
        type(tree) is dict
        and list(tree) == keys
        and all(type(leaf) in _CERTAIN_LEAVES for leaf in tree.values())
    )


def pair(tree: Tree, root: str, structure: Structure, optional: Collection[int] = ()) -> Paired:
    """Pair the leaves of `tree` with those of the parameters, by key.

    Two dicts with the same keys in another order, or an OrderedDict and a dict, pair as one would
    wish; flattening both and zipping would pair their leaves wrongly, and silently.

    None in a field of a dataclass, which torch makes no leaf of, is one here, as None elsewhere is.
    For `optional` leaves that are missing there is None, and no way to rebuild. Messages call the
    tree by `root`.

    Raises:
        ValueError: If a leaf of either tree has no counterpart in the other.
    """
    leaves, own = flatten(tree)
    if same(own, structure):
        return Paired(leaves, own, None)
    positions = {path: position for position, path in enumerate(paths(own, ""))}
    wanted = paths(structure, "")
    missing = {index for index, path in enumerate(wanted) if path not in positions}
    empty = _empty_fields(tree, structure, missing)
    absent = {wanted[index] for index in missing.intersection((*optional, *empty))}
    paired = len(positions) == len(leaves) and set(positions) | absent == set(wanted)
    if paired and not any("<flat index " in path for path in wanted):
        order = [positions.get(path, -1) for path in wanted]
        found = [leaves[i] if i >= 0 else None for i in order]
        return Paired(found, structure, None) if empty else Paired(found, own, order)
    raise ValueError(_mismatch(root, list(positions), [p for p in wanted if p not in absent]))


def _empty_fields(tree: Tree, structure: Structure, missing: set[int]) -> list[int]:
    """Return which of the missing leaves are None in a field of a dataclass."""
    found = []
    for index, keys in (_walk(structure) or ()) if missing else ():
        with contextlib.suppress(AttributeError, LookupError, TypeError):  # no such field
            node = functools.reduce(lambda node, key: key.get(node), keys[:-1], tree)
            if index in missing and dataclasses.is_dataclass(node) and keys[-1].get(node) is None:
                found.append(index)
    return found


_REMEDIES = {
    "grads": "Give each parameter one gradient under the same key, or None where it has none",
    "state.average": "Make the state with init() from these parameters. Of a Zero1, whose state "
    "lies in buckets, averaged() takes what gather_state() makes of it",
    "updates": "Give what update() returned for these parameters",
    "labels": "Give each parameter one label under the same key; patterns are compiled: re.compile",
}


def _mismatch(root: str, found: list[str], wanted: list[str]) -> str:
    there, needed = set(found), set(wanted)
    missing = [path for path in wanted if path not in there]
    extra = [root + path for path in found if path not in needed]
    parts = []
    if missing:
        lacking, params = ([name + path for path in missing] for name in (root, "params"))
        parts.append(f"no {some(lacking)} for {some(params)}")
    if extra:
        parts.append(f"{some(extra)} without a parameter of that path")
    if not parts:
        parts.append("leaves that cannot be told apart by their paths")
    remedy = _REMEDIES.get(root, "Make the state with init() from these parameters")
    return f"{root} does not have the structure of params: {' and '.join(parts)}. {remedy}."


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first of these names, and how many there are if there are more."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"


def register_node(
    cls: type[NodeT],
    flatten_node: Callable[[NodeT], tuple[list[Any], Any]],
    unflatten_node: Callable[[Any, Iterable[Any]], NodeT],
    names: Callable[[NodeT], list[str]],
) -> None:
    """Make a class a pytree node for `torch.func` and for optree.

    To flatten a node gives the children and the hashable rest. The children to unflatten from may
    be anything: transforms rebuild a node around placeholders.
    """

    def flatten_with_keys(node: NodeT) -> tuple[list[tuple[Any, Any]], Any]:
        children, context = flatten_node(node)
        keys = [torch_pytree.GetAttrKey(name) for name in names(node)]
        return list(zip(keys, children, strict=True)), context

    torch_pytree.register_pytree_node(
        cls,
        flatten_node,
        lambda children, context: unflatten_node(context, children),
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
    register: Any = optree.register_pytree_node  # typed for Collections, of which it uses nothing
    register(cls, flatten_node, unflatten_node, namespace=optree.registry.__GLOBAL_NAMESPACE)


_register_flat: Any = optree.register_pytree_node
_register_flat(FlatTree, _refuse_flat, FlatTree, namespace=_NAMESPACE)
