"""How optimizers and states show themselves, and that states are loaded from files as they are."""

import io
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch

import funcopt
from funcopt import SGD, AdamW, Clip, Frozen, Members, Partition
from funcopt._core.show import show
from funcopt._engine.registration import state_class

from ..cases import assert_same_bits
from ..every_optimizer import OPTIMIZERS


def params():
    return {"w": torch.randn(20, 30), "b": torch.randn(3)}


def test_an_optimizer_shows_what_differs_from_the_default():
    assert repr(AdamW()) == "AdamW()"
    assert repr(AdamW(lr=3e-4, betas=(0.9, 0.95))) == "AdamW(lr=0.0003, betas=(0.9, 0.95))"
    assert (
        repr(Clip(SGD(lr=0.1, momentum=0.9), 1.0))
        == "Clip(SGD(lr=0.1, momentum=0.9), max_norm=1.0)"
    )
    assert repr(AdamW(lr=1e-3, weight_decay=1e-2)) == "AdamW()"


def test_what_an_optimizer_shows_makes_an_equal_one():
    names = vars(funcopt) | {"tensor": torch.tensor, "torch": torch, "inf": torch.inf}
    for opt in (
        AdamW(lr=torch.tensor(0.5), amsgrad=True),
        Clip(SGD(lr=0.1), 2.0, norm_type=torch.inf),
        Frozen(),
    ):
        assert eval(repr(opt), dict(names)) == opt


def test_a_tensor_is_shown_by_its_shape_where_it_is_large():
    assert repr(AdamW(lr=torch.tensor([0.5, 0.25]))) == "AdamW(lr=tensor([0.5000, 0.2500]))"
    assert repr(Members(AdamW(lr=torch.rand(64)))) == "Members(AdamW(lr=float32[64]))"
    assert show(torch.ones(5, 5, dtype=torch.bfloat16, device="meta")) == "bfloat16[5, 5] on meta"


def test_a_state_shows_shapes_and_no_long_tree_in_full():
    shown = repr(SGD(lr=0.1, momentum=0.9).init(params()))
    assert "'w': float32[20, 30]" in shown
    assert "'b': tensor([0., 0., 0.])" in shown
    assert "\n" not in shown
    many = AdamW().init([torch.ones(100) for _ in range(50)])
    assert repr(many).count("float32[100], ... 42 more]") == 2


def test_nobody_s_own_repr_is_replaced():
    partition = Partition({"a": AdamW(), "b": Frozen()}, lambda name, leaf: "a")
    assert repr(partition).startswith("Partition({'a': AdamW(), 'b': Frozen()}, ")
    assert repr(funcopt.pure(torch.optim.SGD, lr=0.1)) == "pure(torch.optim.SGD, lr=0.1)"


def test_a_notebook_shows_what_a_state_takes():
    state = Clip(AdamW(), 1.0).init(params())
    table = state._repr_html_()
    assert table.startswith("<table><caption>ClipState</caption>")
    assert "<td>norm</td><td>1</td><td>1</td><td>float32</td><td>4</td>" in table
    taken = 4 + 8 + 2 * 4 * 603
    assert (
        f"<td>all</td><td>6</td><td>1,208</td><td>float32, float64</td><td>{taken:,}</td>" in table
    )


def test_an_ordered_dict_shows_shapes_too():
    state = SGD(momentum=0.9).init(OrderedDict(w=torch.ones(20, 30)))
    assert "momentum_buffer=OrderedDict({'w': float32[20, 30]})" in repr(state)


def test_every_public_state_shows_itself_so():
    modules = (funcopt, funcopt.distributed)
    states = [
        own for module in modules for name, own in vars(module).items() if name.endswith("State")
    ]
    assert len(states) > 20
    assert all(hasattr(own, "_repr_html_") for own in states)


def test_what_a_table_says_is_escaped():
    @state_class
    class Named(NamedTuple):
        field: object

    assert "<script>" not in Named._repr_html_(Named({"<script>": torch.ones(1)}))


@pytest.mark.parametrize("opt", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_state_is_loaded_from_a_file_with_weights_only(opt):
    state = opt.init(params())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded) is type(state)
    assert_same_bits(loaded, state)
