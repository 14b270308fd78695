"""Moments in a dtype of their own: which one, that kernels agree, and what it is good for."""

import pytest
import torch
from torch.func import grad, vmap

from funcopt import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    Clip,
    Compensated,
    Lion,
    NAdam,
    Partition,
    RAdam,
    RMSprop,
)
from funcopt._engine import compensated

from ..cases import assert_close, assert_same_bits, clone, leaves, random_like, tree_map

HALVES = [torch.bfloat16, torch.float16]
KINDS = {
    "AdamW": (AdamW, {"amsgrad": True, "weight_decay": 0.1}),
    "Adam": (Adam, {"weight_decay": 0.1}),
    "SGD": (SGD, {"momentum": 0.9, "nesterov": True}),
    "Lion": (Lion, {"weight_decay": 0.1}),
    "RAdam": (RAdam, {"weight_decay": 0.1}),
    "NAdam": (NAdam, {"weight_decay": 0.1}),
    "Adagrad": (Adagrad, {"weight_decay": 0.1}),
    "RMSprop": (RMSprop, {"weight_decay": 0.1}),
}


def moments_of(state):
    return leaves(state[1:])


def run(opt, params, steps=4, update="update"):
    generator = torch.Generator().manual_seed(3)
    state = opt.init(params)
    for _ in range(steps):
        grads = {
            name: torch.randn(param.shape, generator=generator).to(param.dtype)
            for name, param in params.items()
        }
        params, state = getattr(opt, update)(grads, state, params)
    return params, state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "moments", "expected"),
    [
        (torch.bfloat16, "auto", torch.float32),
        (torch.float16, "auto", torch.float32),
        (torch.float32, "auto", torch.float32),
        (torch.float64, "auto", torch.float64),
        (torch.complex64, "auto", torch.complex64),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float32, torch.float32),
        (torch.complex128, torch.float32, torch.complex64),
    ],
)
def test_moments_are_kept_in_the_dtype_that_was_asked_for(kind, dtype, moments, expected):
    make, options = KINDS[kind]
    opt = make(lr=0.01, moments=moments, **options)
    params = {
        "w": torch.randn(5, 3, dtype=torch.float64).to(dtype),
        "b": torch.ones((), dtype=dtype),
    }
    given = clone(params)
    moved, state = run(opt, params)
    assert {leaf.dtype for leaf in moments_of(state)} == {expected}
    assert {leaf.dtype for leaf in leaves(moved)} == {dtype}
    assert_same_bits(run(opt, given, update="update_"), (moved, state))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("moments", [torch.float32, *HALVES])
def test_kernels_agree_on_them(kind, dtype, moments):
    make, options = KINDS[kind]
    params = {"w": torch.randn(700, 3).to(dtype), "b": torch.randn(17).to(dtype)}
    expected = run(make(lr=0.01, moments=moments, kernel="plain", **options), params)
    for kernel in [name for name in make.rule.kernel_names if name not in ("plain", "triton")]:
        moved, state = run(make(lr=0.01, moments=moments, kernel=kernel, **options), params)
        bound = 2 * max(torch.finfo(dtype).eps, torch.finfo(moments).eps)
        assert_close(moved, expected[0], rtol=bound, atol=bound)
        assert_close(state, expected[1], rtol=bound, atol=bound)


def test_members_of_a_vmap_keep_them_as_one_alone_does():
    opt = AdamW(lr=0.1, moments=torch.bfloat16)
    params = {"w": torch.randn(3, 40), "b": torch.randn(3)}
    grads = random_like(params)
    moved, state = vmap(opt.update)(grads, vmap(opt.init)(params), params)
    for i in range(3):
        single, own = (tree_map(lambda leaf, i=i: leaf[i], tree) for tree in (params, grads))
        alone, alone_state = opt.update(own, opt.init(single), single)
        assert_same_bits(tree_map(lambda leaf, i=i: leaf[i], (moved, state)), (alone, alone_state))


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_derivatives_reach_moments_in_their_dtype(kind):
    param, gradient = torch.randn(5).bfloat16(), torch.randn(5).bfloat16()
    opt = kind(lr=0.1, eps=1e-3)
    state = opt.init(param)._replace(exp_avg=torch.randn(5), exp_avg_sq=torch.rand(5))

    def loss(exp_avg, param):
        moved, _ = opt.update(gradient, state._replace(exp_avg=exp_avg), param)
        return moved.float().sum()

    of_moment, of_param = grad(loss, argnums=(0, 1))(state.exp_avg, param)
    assert of_moment.dtype is torch.float32
    assert of_param.dtype is torch.bfloat16
    wide = kind(lr=0.1, eps=1e-3, kernel="plain")
    other = grad(
        lambda m: wide.update(gradient.float(), state._replace(exp_avg=m), param.float())[0].sum()
    )(state.exp_avg)
    assert_close(of_moment, other, rtol=1e-2, atol=1e-3)


def test_groups_of_a_partition_keep_their_own():
    inner = {"x": AdamW(moments=None), "y": AdamW()}
    params = {"a": torch.ones(3).bfloat16(), "b": torch.ones(3).bfloat16()}
    _, state = run(Partition(inner, {"a": "x", "b": "y"}), params)
    assert state.inner["x"].exp_avg["a"].dtype is torch.bfloat16
    assert state.inner["y"].exp_avg["b"].dtype is torch.float32


def test_a_state_in_another_dtype_is_refused_also_once_it_is_known():
    params = {"w": torch.ones(3, dtype=torch.bfloat16)}
    ours, theirs = AdamW(), AdamW(moments=None)
    states = {"float32": ours.init(params), "bfloat16": theirs.init(params)}
    for _ in range(3):
        ours.update(params, states["float32"], params)
        theirs.update(params, states["bfloat16"], params)
    message = r"state.exp_avg\['w'\]: dtype .*bfloat16, .* keeps .*float32.*moments=torch.bfloat16"
    with pytest.raises(ValueError, match=message):
        ours.update(params, states["bfloat16"], params)
    with pytest.raises(ValueError, match=r"dtype .*float32, .* keeps .*bfloat16"):
        theirs.update_(params, states["float32"], params)
    assert_same_bits(theirs.init(params), states["bfloat16"])


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"moments=torch\.int8: must be 'auto'"):
        AdamW(moments=torch.int8)
    with pytest.raises(ValueError, match="no complex dtype of that precision"):
        AdamW(moments=torch.bfloat16).init({"w": torch.ones(2, dtype=torch.complex64)})


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_second_moment_rises_to_a_constant_gradient_and_falls_from_it(dtype, rounding):
    """In 16 bits and rounded to the nearest it does neither, which test_adamw.py has."""
    moments = "auto" if rounding == "nearest" else None
    opt = AdamW(lr=0.0, moments=moments, rounding=rounding)
    ones = {"w": torch.ones(4096, dtype=dtype)}
    state = opt.init(ones)
    for count, gradient, end in ((3000, 1.0, 1 - 0.999**3000), (1000, 0.0, 0.367 * 0.95)):
        grads = {"w": torch.full((4096,), gradient, dtype=dtype)}
        for _ in range(count):
            opt.update_(grads, state, ones)
        assert state.exp_avg_sq["w"].float().mean().item() == pytest.approx(end, rel=0.02)


@pytest.mark.parametrize("size", [1e-3, 9000.0])
def test_moments_beside_float16_neither_underflow_nor_overflow(size):
    """In float16, the square of 1e-3 is a few units of the last place, that of 9000 infinite."""
    params, wide = {"w": torch.zeros(3, dtype=torch.float16)}, {"w": torch.zeros(3)}
    opt = AdamW(lr=1e-3)
    state, wide_state = opt.init(params), opt.init(wide)
    for _ in range(300):
        opt.update_({"w": torch.full((3,), size, dtype=torch.float16)}, state, params)
        opt.update_({"w": torch.full((3,), size, dtype=torch.float16).float()}, wide_state, wide)
    assert_close(state.exp_avg_sq, wide_state.exp_avg_sq, rtol=1e-5)
    assert_close(params["w"].float(), wide["w"], rtol=2e-2)


COMPENSATED = [
    AdamW(lr=0.01),
    AdamW(lr=1e-3, amsgrad=True, moments=torch.bfloat16, maximize=True),
    Adam(lr=1e-3, weight_decay=0.1, moments=torch.float16),
    SGD(lr=0.01),
    SGD(lr=1e-3, momentum=0.9, nesterov=True, weight_decay=0.1),
    Lion(lr=1e-4),
]


@pytest.mark.parametrize("update", ["update", "update_"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("inner", COMPENSATED, ids=repr)
def test_compensated_parameters_have_the_same_bits_in_one_pass(inner, dtype, update, monkeypatch):
    def odd(size):
        return torch.tensor([torch.inf, -torch.inf, torch.nan, 65504.0, 1.0, 0.0, -0.0])[:size]

    params = {
        "a": torch.randn(700, 3).to(dtype),
        "b": torch.randn(17).to(dtype),
        "c": torch.tensor(1e5).to(dtype),
        "d": odd(7).to(dtype),
    }
    opt = Compensated(inner)
    found = run(opt, clone(params), 20, update)
    grads, state = random_like(params), found[1]
    made = compensated.update_compensated(
        opt._as_one(), grads, state.inner, state.compensation, found[0], in_place=False
    )
    assert made is not None  # that it goes this way
    monkeypatch.setattr(Compensated, "_as_one", lambda _: None)
    expected = run(Compensated(inner), clone(params), 20, update)
    clean = [tree_map(lambda leaf: leaf.nan_to_num(7.0), tree) for tree in (found, expected)]
    assert_same_bits(*clean)


def test_compensated_leaves_that_changed_their_looks_are_served_with_care():
    opt, inner = Compensated(AdamW(lr=0.1)), Clip(AdamW(lr=0.1), 1.0)
    params, state = run(opt, {"w": torch.randn(3, 4).bfloat16()})
    turned = {"w": params["w"].T.contiguous().T}
    grads = random_like(params)
    assert_same_bits(opt.update(grads, state, turned), opt.update(grads, state, params))
    none, _ = opt.update({"w": None}, state, params)
    assert_same_bits(none, params)
    assert Compensated(inner)._as_one() is None
    wrong = state.inner._replace(exp_avg={"w": torch.zeros(3, 4).bfloat16()})
    with pytest.raises(ValueError, match="exp_avg"):
        opt.update(grads, state._replace(inner=wrong), params)
