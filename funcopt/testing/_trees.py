"""Trees from leaves: every sort of node, and two of the kit's own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .._core import pytree
from .._core.types import Tree


class Pair(NamedTuple):
    """A NamedTuple node."""

    first: Tree
    rest: Tree


class Box:
    """A node of a class of its own, registered with both pytree libraries."""

    def __init__(self, content: Iterable[Tree]) -> None:
        self.content = list(content)

    def __repr__(self) -> str:
        return f"Box({self.content!r})"


pytree.register_node(
    Box,
    lambda box: (box.content, len(box.content)),
    lambda _, content: Box(content),
    lambda box: [f"content[{i}]" for i in range(len(box.content))],
)


def _dict(children: list[Tree]) -> Tree:
    return {f"p{index}": child for index, child in enumerate(children)}


_NODES: dict[str, Callable[[list[Tree]], Tree]] = {
    "dict": _dict,
    "list": list,
    "tuple": tuple,
    "leaf": lambda children: children[0] if len(children) == 1 else _dict(children),
    "OrderedDict": lambda children: OrderedDict(reversed(_dict(children).items())),
    "namedtuple": lambda children: Pair(children[0], children[1:]) if children else (),
    "unsorted dict": lambda children: dict(reversed(_dict(children).items())),
    "custom": Box,
}

NODES = tuple(_NODES)


def assemble(leaves: list[Any], kinds: list[str]) -> Tree:
    """Nest leaves in nodes of the given kinds: the first outside, the second around the rest."""
    outer, inner = kinds
    if len(leaves) < 3:
        return _NODES[outer](leaves)
    return _NODES[outer]([leaves[0], _NODES[inner](leaves[1:])])
