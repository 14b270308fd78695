"""Updates by gradients times a number: the bits of a pass before them, without it."""

import pytest
import torch

from funcopt import SGD, Adagrad, Adam, AdamW, Clip, Frozen, Lion, NAdam, Partition, RAdam, RMSprop
from funcopt._core.types import own_traits
from funcopt._engine import scaled
from funcopt._engine import update as engine
from funcopt._engine.scaled import update_scaled

from ..cases import KERNELS, assert_same_bits, clone, leaves, random_like, tree_map, trees

HALF = torch.tensor(0.3)
SHAPES = [(), (1,), (33,), (0,), (64, 64), (300_001,), (1000, 600)]


def by_label(**inner):
    return Partition(inner, lambda name, leaf: "small" if leaf.numel() < 1000 else "large")


OPTIMIZERS = {
    **{kernel: AdamW(lr=0.1, kernel=kernel) for kernel in KERNELS},
    "amsgrad, ascending": AdamW(lr=0.1, amsgrad=True, maximize=True),
    "a schedule": AdamW(lr=lambda step: 0.1 / (1 + step)),
    "Partition": by_label(small=AdamW(lr=0.1), large=AdamW(lr=0.2)),
    "Partition, of a Clip": by_label(small=Clip(AdamW(lr=0.1), 0.5), large=AdamW(lr=0.2)),
    "Partition, frozen": by_label(small=Frozen(), large=AdamW(lr=0.2)),
    "Clip": Clip(AdamW(lr=0.1), 0.5),
}


def dict_of(dtype=torch.float32):
    return {f"leaf {i}": torch.randn(shape).to(dtype) for i, shape in enumerate(SHAPES)}


def times(grads, factor):
    return tree_map(lambda g: (g * factor.to(g.dtype)).to(g.dtype), grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bits_are_those_of_multiplied_gradients(name, dtype):
    opt, params = OPTIMIZERS[name], dict_of(dtype)
    state = opt.init(params)
    in_place, own_state = clone((params, state))
    for factor in (HALF, torch.tensor(0.0), torch.tensor(-2.0), torch.tensor(1e-30)):
        grads = random_like(params)
        given = clone(grads)
        params, state = opt.update(times(grads, factor), state, params)
        moved = update_scaled(opt, grads, factor, own_state, in_place)
        update_scaled(opt, grads, factor, own_state, in_place, in_place=True)
        assert_same_bits(moved, (params, state))
        assert_same_bits((in_place, own_state), (params, state))
        assert_same_bits(grads, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_16_bit_gradients_are_multiplied_in_float32_and_rounded(kernel, dtype):
    opt, params = AdamW(lr=0.1, kernel=kernel), dict_of(dtype)
    grads = tree_map(lambda p: torch.randn_like(p) * 1000, params)
    factor = torch.tensor(1e-3)
    products = tree_map(lambda g: (g.float() * factor).to(dtype), grads)
    state = opt.init(params)
    expected = opt.update(products, state, params)
    assert_same_bits(update_scaled(opt, grads, factor, state, params), expected)
    assert_same_bits(update_scaled(opt, grads, factor, state, params, in_place=True), expected)


@pytest.mark.parametrize("name", [*KERNELS, "Partition"])
def test_no_scaled_copy_of_all_gradients_is_made(name, monkeypatch):
    opt, params = OPTIMIZERS[name], dict_of()
    grads, state = random_like(params), opt.init(params)
    for module in (scaled, engine):
        monkeypatch.setattr(module, "multiplied", None)
    update_scaled(opt, grads, HALF, state, params)
    update_scaled(opt, grads, HALF, state, params, in_place=True)


@pytest.mark.parametrize("per_leaf", [False, True])
def test_neither_for_a_nested_tree_nor_where_gradients_are_missing(per_leaf, monkeypatch):
    opt = AdamW(lr=lambda step: 0.1 / (1 + step), amsgrad=True, step_per_leaf=per_leaf)
    params = {"layer": [torch.randn(300, 1000), torch.randn(3)], "out": torch.randn(5)}
    grads = {"layer": [torch.randn(300, 1000), None], "out": torch.randn(5)}
    products = {"layer": [grads["layer"][0] * HALF, None], "out": grads["out"] * HALF}
    state = opt.init(params)
    _, state = opt.update(products, state, params)
    expected = opt.update(products, state, params)
    for module in (scaled, engine):
        monkeypatch.setattr(module, "multiplied", None)
    assert_same_bits(update_scaled(opt, grads, HALF, state, params), expected)
    assert_same_bits(update_scaled(opt, grads, HALF, state, params, in_place=True), expected)


@pytest.mark.parametrize("name", trees())
def test_any_tree_is_served(name):
    opt, params = AdamW(lr=0.1), trees()[name]
    grads, state = random_like(params), opt.init(params)
    expected = opt.update(times(grads, HALF), state, params)
    assert_same_bits(update_scaled(opt, grads, HALF, state, params), expected)
    assert_same_bits(update_scaled(opt, grads, HALF, state, params, in_place=True), expected)


def test_strides_complex_leaves_and_missing_gradients_are_served():
    opt = AdamW(lr=0.1)
    params = {
        "transposed": torch.randn(700, 500).T,
        "complex": torch.randn(3, dtype=torch.complex64),
        "large": torch.randn(1 << 19),
        "without": torch.ones(2),
    }
    for left in (["complex", "without"], ["without"], []):
        own = {key: p for key, p in params.items() if key not in left}
        grads = {**random_like(own), **({} if left else {"without": None})}
        state = opt.init(own)
        products = {k: None if g is None else g * HALF for k, g in grads.items()}
        expected = opt.update(products, state, own)
        assert_same_bits(update_scaled(opt, grads, HALF, state, own), expected)
        assert_same_bits(update_scaled(opt, grads, HALF, state, own, in_place=True), expected)


def test_a_nan_reaches_every_parameter():
    opt, params = AdamW(), {"w": torch.ones(3)}
    (moved, _) = update_scaled(opt, params, torch.tensor(torch.nan), opt.init(params), params)
    assert moved["w"].isnan().all()


def test_parameters_go_on_requiring_a_gradient():
    opt, params = AdamW(), {"w": torch.nn.Parameter(torch.ones(3))}
    moved, state = update_scaled(opt, {"w": torch.ones(3)}, HALF, opt.init(params), params)
    assert moved["w"].requires_grad
    assert moved["w"].is_leaf
    assert not any(leaf.requires_grad for leaf in leaves(state))


def test_a_factor_that_is_learnt_has_its_derivative():
    opt, params = AdamW(lr=0.1), {"w": torch.ones(3, dtype=torch.float64)}

    def moved(factor):
        first = update_scaled(opt, params, factor, opt.init(params), params)[1]
        return first.exp_avg["w"].sum()

    factor = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(moved, factor)
    assert torch.func.grad(moved)(factor) == pytest.approx(0.3)
    with pytest.raises(RuntimeError, match="has a history"):
        update_scaled(opt, params, factor, opt.init(params), clone(params), in_place=True)


def test_a_subclass_keeps_its_own_update():
    class Still(AdamW):
        def update(self, grads, state, params):
            return params, state

        update_ = update

    params = {"w": torch.ones(3)}
    state = Still().init(params)
    assert update_scaled(Still(), params, HALF, state, params) == (params, state)
    assert update_scaled(Still(), params, HALF, state, params, in_place=True) == (params, state)


def test_those_who_hand_on_are_known_by_their_very_type():
    assert set(scaled._handing_on) == {Partition}
    for kind in (AdamW, Adam, Lion, RAdam, NAdam, Adagrad, RMSprop, SGD):
        assert own_traits(kind()).by_rule
