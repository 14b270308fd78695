"""What an old Dynamo traces in place of what it cannot: the answers must be the same."""

import time
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass

import optree
import pytest
import torch

from funcopt import AdamW, AdamWState
from funcopt._core import old_dynamo, transforms

from ..cases import Point, trees

registered = optree.register_pytree_node.get
KINDS = [
    torch.Tensor, int, str, list, tuple, dict, OrderedDict, defaultdict, deque, type(None), Point,
    time.struct_time, AdamW, AdamWState, frozenset,
]  # fmt: skip


@pytest.mark.parametrize("namespace", ["torch", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_a_node_is_flattened_as_optree_flattens_it(kind, namespace, monkeypatch):
    ordered = {kind: registered(kind, namespace="torch") for kind in (dict, defaultdict)}
    monkeypatch.setattr(old_dynamo, "_ordered", ordered)
    traced = old_dynamo._registered(kind, namespace=namespace)
    assert traced is registered(kind, namespace=namespace)


def test_structures_are_the_same_if_their_nodes_and_keys_are():
    others = ({"a": 1, "b": 2}, {"a": 1, "c": 2}, [1, 2], (1, 2), Point(1, 2), (1, (2,)))
    structures = [
        optree.tree_structure(tree, none_is_leaf=True, namespace="torch")
        for tree in (*trees().values(), *others)
    ]
    for one in structures:
        for other in structures:
            assert old_dynamo.same(one, other) == (one == other)


def test_each_torch_is_asked_in_its_own_way_whether_it_exports():
    own = old_dynamo.exporting if transforms.OLD_DYNAMO else torch.compiler.is_exporting
    assert transforms.exporting is own


def test_nothing_is_being_exported():
    assert not old_dynamo.exporting()


def test_what_is_half_built_has_a_hash_and_the_rest_has_its_own():
    @dataclass(frozen=True)
    class Rate:
        value: float

    own = hash(Rate(0.5))
    old_dynamo.let_it_hash(Rate)
    assert hash(Rate(0.5)) == own
    assert hash(object.__new__(Rate)) == 0
