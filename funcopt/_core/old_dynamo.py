"""What `torch.compile` before torch 2.13 has to be told before it can compile an update.

Some things were wrong with Dynamo until then. It cannot compare `sys.version_info`, as optree does
to find out how a node is flattened. It cannot compare two structures of trees. It takes every
compilation for an export. And it asks for the hash of an object that is only half built. Each is
put right here, in the one way that it can trace; what this asks for is private to torch and optree.
Where optree keeps its registry elsewhere, an update that is compiled breaks into several graphs,
and is right.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict, namedtuple
from typing import Any

import optree
import torch

# How optree flattens what is registered with it: by type, or by namespace and type.
_nodes: Any = getattr(optree.registry, "_NODETYPE_REGISTRY", None)
# How it flattens dicts in a namespace where they keep the order in which they were filled.
_ordered: dict[type, Any] = {}


def exporting() -> bool:
    """Whether code is being compiled for an export."""
    flag: bool = torch.compiler._is_exporting_flag
    return flag


def same(one: optree.PyTreeSpec, other: optree.PyTreeSpec) -> bool:
    """Whether two structures have the same nodes with the same keys."""
    return (
        one.type is other.type
        and one.entries() == other.entries()
        and all(map(same, one.children(), other.children()))
    )


def let_it_hash(cls: type) -> None:
    """Give a frozen dataclass a hash while it has no fields yet, as an object made in a graph."""
    own: Any = cls.__hash__

    def hash_of(value: Any) -> int:
        return int(own(value)) if vars(value) else 0

    cls.__hash__ = hash_of  # type: ignore[assignment]


def let_it_trace(namespace: str) -> None:
    """Let Dynamo trace how optree finds out about a node.

    Args:
        namespace: One in which dicts keep the order in which they were filled.
    """
    registered: Any = optree.register_pytree_node.get
    if _nodes is not None:
        for kind in (dict, defaultdict):
            _ordered[kind] = registered(kind, namespace=namespace)
        with contextlib.suppress(ValueError):  # by which it says that it was told before
            torch.compiler.substitute_in_graph(registered, skip_signature_check=True)(_registered)


def _registered(cls: type, /, *, namespace: str = "") -> Any:
    if (namespace, cls) in _nodes:
        return _nodes[namespace, cls]
    if cls in _ordered and optree._C.is_dict_insertion_ordered(namespace):
        return _ordered[cls]
    if cls in _nodes:
        return _nodes[cls]
    if optree.is_structseq_class(cls):
        return _nodes[optree.typing.StructSequence]
    return _nodes[namedtuple] if optree.is_namedtuple_class(cls) else None
