"""Trees are paired by key, never by position."""

import dataclasses
import threading
from collections import OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch.fx.immutable_collections import immutable_dict

from funcopt import AdamW, Clip, Ema
from funcopt._core import pytree

from ..cases import Point, assert_same_bits, leaves, random_like, run, trees


@pytest.mark.parametrize("name", trees())
def test_a_tree_survives_flattening(name):
    tree = trees()[name]
    flat, structure = pytree.flatten(tree)
    assert_same_bits(pytree.unflatten(structure, flat), tree)


def test_paths_are_the_expressions_that_reach_the_leaves():
    tree = {"layer": [torch.ones(1), (torch.ones(2),)], "out": Point(torch.ones(3), {0: None})}
    flat, structure = pytree.flatten(tree)
    for path, leaf in zip(pytree.paths(structure, "tree"), flat, strict=True):
        assert eval(path, {"tree": tree}) is leaf


SAME_KEYS = {
    "dict in another order": lambda a, b: {"b": b, "a": a},
    "OrderedDict in another order": lambda a, b: OrderedDict([("b", b), ("a", a)]),
    "OrderedDict": lambda a, b: OrderedDict(a=a, b=b),
    "defaultdict": lambda a, b: defaultdict(list, b=b, a=a),
}


@pytest.mark.parametrize("params_kind", SAME_KEYS)
@pytest.mark.parametrize("grads_kind", SAME_KEYS)
def test_mappings_pair_by_key_whatever_their_kind_and_order(params_kind, grads_kind):
    # Both leaves have one shape, so that pairing them wrongly would go unnoticed.
    a, b, grad_a, grad_b = torch.randn(4, 3)
    opt = AdamW(lr=0.1)
    params = SAME_KEYS[params_kind](a, b)
    moved, state = opt.update(SAME_KEYS[grads_kind](grad_a, grad_b), opt.init(params), params)
    expected, _ = opt.update([grad_a, grad_b], opt.init([a, b]), [a, b])
    assert torch.equal(moved["a"], expected[0])
    assert torch.equal(moved["b"], expected[1])
    assert type(moved) is type(params)
    assert list(moved) == list(params)
    assert list(state.exp_avg) == list(params)


def test_a_state_in_another_order_keeps_its_own():
    a, b = torch.randn(2, 3)
    opt = AdamW(lr=0.1)
    params = {"a": a, "b": b}
    _, state = run(opt, params, [random_like(params)])
    turned = state._replace(exp_avg=dict(reversed(state.exp_avg.items())))
    grads = random_like(params)
    moved, after = opt.update(grads, turned, params)
    expected, _ = opt.update(grads, state, params)
    assert_same_bits(moved, expected)
    assert list(after.exp_avg) == ["b", "a"]
    assert list(after.exp_avg_sq) == ["a", "b"]


def test_lists_and_tuples_pair_by_position():
    params = (torch.ones(2), torch.zeros(2))
    moved, _ = AdamW().update([torch.ones(2), torch.ones(2)], AdamW().init(params), params)
    assert isinstance(moved, tuple)


class Box:
    def __init__(self, *content):
        self.content = content


def test_a_node_registered_with_either_library_is_a_node():
    class TorchBox(Box):
        pass

    class OptreeBox(Box):
        pass

    torch_pytree.register_pytree_node(
        TorchBox, lambda box: (list(box.content), None), lambda leaves, _: TorchBox(*leaves)
    )
    optree.register_pytree_node(
        OptreeBox,
        lambda box: (box.content, None),
        lambda _, leaves: OptreeBox(*leaves),
        namespace=optree.registry.__GLOBAL_NAMESPACE,
    )
    for kind in (TorchBox, OptreeBox):
        params = {"box": kind(torch.ones(2), torch.zeros(3))}
        opt = AdamW()
        moved, state = opt.update(params, opt.init(params), params)
        assert isinstance(moved["box"], kind)
        assert len(leaves(state.exp_avg)) == 2


def test_keys_that_read_alike_are_not_confused():
    class Key(str):
        def __repr__(self):
            return "key"

        __hash__ = str.__hash__

    params = {Key("a"): torch.ones(2), Key("b"): torch.zeros(2)}
    grads = dict(reversed(params.items()))
    with pytest.raises(ValueError, match="grads does not have the structure of params"):
        AdamW().update(grads, AdamW().init(params), params)


def test_long_lists_of_missing_leaves_are_cut_short_in_the_message():
    params = {f"p{i}": torch.ones(1) for i in range(10)}
    with pytest.raises(ValueError, match=r"grads\['p2'\], ... \(10 in all\)"):
        AdamW().update({}, AdamW().init(params), params)


def test_torchs_own_dict_node_pairs_by_key_in_any_order():
    params = immutable_dict(a=torch.zeros(1), b=torch.zeros(1))
    opt = AdamW(lr=0.1)
    grads = immutable_dict(b=torch.ones(1), a=-torch.ones(1))
    moved, _ = opt.update(grads, opt.init(params), params)
    assert moved["a"] > 0 > moved["b"]
    with pytest.raises(ValueError, match=r"no grads\['a'\], grads\['b'\]"):
        opt.update(immutable_dict(c=grads["a"], d=grads["b"]), opt.init(params), params)


def test_a_registered_dataclass_is_a_node_with_names():
    @dataclasses.dataclass
    class Layer:
        weight: torch.Tensor
        bias: torch.Tensor

    torch_pytree.register_dataclass(Layer)
    params = Layer(torch.ones(2), torch.ones(3))
    opt = AdamW()
    moved, _ = opt.update(params, opt.init(params), params)
    assert isinstance(moved, Layer)
    with pytest.raises(ValueError, match=r"grads\.bias: shape \(2,\), the parameter has \(3,\)"):
        opt.update(Layer(torch.ones(2), torch.ones(2)), opt.init(params), params)


@dataclasses.dataclass
class Affine:
    weight: Any
    bias: Any


torch_pytree.register_dataclass(Affine)


@pytest.mark.parametrize("method", ["update", "update_"])
@pytest.mark.parametrize("wrap", [lambda opt: opt, lambda opt: Clip(opt, 1.0), Ema])
def test_none_in_a_field_of_a_dataclass_is_no_gradient(wrap, method):
    opt = wrap(AdamW(lr=0.1, step_per_leaf=True))
    params = {"in": Affine(torch.ones(2), torch.ones(3)), "out": [Affine(torch.ones(1), None)]}
    plain = {"w": torch.ones(2), "b": torch.ones(3), "o": torch.ones(1)}
    expected, _ = opt.update(
        {"w": torch.ones(2), "b": None, "o": torch.ones(1)}, opt.init(plain), plain
    )
    grads = {"in": Affine(torch.ones(2), None), "out": [Affine(torch.ones(1), None)]}
    moved, _ = getattr(opt, method)(grads, opt.init(params), params)
    assert torch.equal(moved["in"].weight, expected["w"])
    assert torch.equal(moved["in"].bias, torch.ones(3))
    assert torch.equal(moved["out"][0].weight, expected["o"])
    assert moved["out"][0].bias is None


def test_what_is_not_none_in_a_field_of_a_dataclass_is_missed():
    opt, params = AdamW(), {"in": Affine(torch.ones(2), torch.ones(3)), "out": torch.ones(1)}
    state = opt.init(params)
    for grads, missing in (
        ({"in": Affine(torch.ones(2), None)}, r"no grads\['out'\] for params\['out'\]"),
        ({"in": None, "out": None}, r"no grads\['in'\]\.weight, grads\['in'\]\.bias for"),
        ({"in": Affine(None, [torch.ones(3)]), "out": None}, r"no grads\['in'\]\.bias for"),
        ({"in": {"weight": torch.ones(2)}, "out": None}, r"no grads\['in'\]\.weight"),
    ):
        with pytest.raises(ValueError, match=missing):
            opt.update(grads, state, params)
    bad = state._replace(exp_avg={"in": Affine(torch.ones(2), None), "out": torch.ones(1)})
    with pytest.raises(TypeError, match=r"state\.exp_avg\['in'\]\.bias is None: a moment must"):
        opt.update(params, bad, params)


def test_several_threads_may_be_the_first_to_give_a_registered_dataclass(monkeypatch):
    @dataclasses.dataclass
    class First:
        weight: torch.Tensor

    torch_pytree.register_dataclass(First)
    register, together = optree.register_pytree_node, threading.Barrier(3, timeout=60)

    def registering(*args, **kwargs):
        together.wait()  # for the others, which found no such node either
        return register(*args, **kwargs)

    monkeypatch.setattr(optree, "register_pytree_node", registering)
    with ThreadPoolExecutor(3) as pool:
        states = pool.map(lambda _: AdamW().init(First(torch.ones(2))), range(3))
        assert [state.exp_avg.weight.tolist() for state in states] == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("register", ["dataclass", "node", "optree"])
def test_a_class_may_be_registered_after_it_was_refused(register):
    @dataclasses.dataclass
    class Late:
        weight: torch.Tensor

    params = {"layer": Late(torch.ones(2))}
    opt = AdamW()
    for _ in range(2):
        with pytest.raises(TypeError, match="or register its type as a pytree node"):
            opt.init(params)
    if register == "dataclass":
        torch_pytree.register_dataclass(Late)
    elif register == "node":
        torch_pytree.register_pytree_node(
            Late, lambda node: ([node.weight], None), lambda leaves, _: Late(*leaves)
        )
    else:
        optree.register_pytree_node(
            Late,
            lambda node: ([node.weight], None),
            lambda _, leaves: Late(*leaves),
            namespace=optree.registry.__GLOBAL_NAMESPACE,
        )
    moved, _ = opt.update(params, opt.init(params), params)
    assert isinstance(moved["layer"], Late)
    assert moved["layer"].weight.tolist() == pytest.approx([0.99899, 0.99899])


def test_nodes_without_keys_pair_only_if_they_are_alike():
    class Bag(Box):
        pass

    torch_pytree.register_pytree_node(
        Bag,
        lambda bag: (list(bag.content), len(bag.content)),
        lambda leaves, _: Bag(*leaves),
    )
    params = Bag(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="grads does not have the structure of params"):
        AdamW().update(Bag(torch.ones(2)), AdamW().init(params), params)


def test_dicts_that_were_seen_before_are_still_looked_into():
    opt = AdamW(lr=0.1)
    params = {"a": torch.ones(2), "b": torch.zeros(2)}
    state = opt.init(params)
    expected, _ = opt.update(params, state, params)
    for odd in (
        {"a": params["a"]},
        {**params, "c": params["a"]},
        {"a": params["a"], "c": params["b"]},
    ):
        with pytest.raises(ValueError, match="grads does not have the structure of params"):
            opt.update(odd, state, params)
    with pytest.raises(TypeError, match=r"grads\['b'\] is of type float"):
        opt.update({"a": params["a"], "b": 1.0}, state, params)
    nested = {"a": params["a"], "b": [params["b"]]}
    with pytest.raises(ValueError, match="grads does not have the structure of params"):
        opt.update(nested, state, params)
    moved, _ = opt.update(dict(reversed(params.items())), state, params)
    assert_same_bits(moved, expected)
    assert list(moved) == ["a", "b"]


def test_keys_that_are_equal_but_not_the_same_keep_their_types():
    class Name(str):
        pass

    opt = AdamW()
    for keys in (["a"], [Name("a")], [1], [True], [1.0]):
        params = {key: torch.ones(2) for key in keys}
        moved, state = opt.update(params, opt.init(params), params)
        moved, state = opt.update(params, state, moved)
        assert [(type(key), key) for key in moved] == [(type(key), key) for key in keys]
        assert [type(key) for key in state.exp_avg] == [type(key) for key in keys]
