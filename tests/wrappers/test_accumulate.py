"""Accumulation: one big batch in parts, and the numbers of optax.MultiSteps."""

import math

import pytest
import torch
from torch.func import grad, jvp, vmap

from funcopt import Accumulate, AdamW, Clip, interop
from funcopt.testing import check_optimizer, laws

from ..cases import (
    assert_close,
    assert_same_bits,
    attempt,
    clone,
    leaves,
    random_like,
    run,
    tree_map,
    trees,
)

# Without running means, exp_avg is the gradient that the inner optimizer was given, to the bit.
SHOWING = AdamW(lr=0.1, betas=(0.0, 0.0), moments=None)


class Counting(AdamW):
    """Counts the inner updates that are made."""

    calls = 0

    def update(self, grads, state, params):
        Counting.calls += 1
        return super().update(grads, state, params)

    def update_(self, grads, state, params):
        Counting.calls += 1
        return super().update_(grads, state, params)


def _name(law):
    return law.__name__ if callable(law) else None


def mean_of(gradients):
    """Return the mean of trees."""
    return tree_map(lambda *parts: sum(parts) / len(parts), *gradients)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", trees())
@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_so_many_calls_the_mean_is_one_step(every, name, in_place):
    params = trees(torch.float64)[name]
    opt, inner = Accumulate(AdamW(lr=0.1), every), AdamW(lr=0.1)
    step = opt.update_ if in_place else opt.update
    bare, bare_state = clone(params), inner.init(params)
    state = opt.init(params)
    for _ in range(3):
        gradients = [random_like(params) for _ in range(every)]
        for number, grads in enumerate(gradients[:-1], 1):
            params, state = step(grads, state, params)
            assert_same_bits((params, state.inner), (bare, bare_state))
            assert state.mini_step == number
        params, state = step(gradients[-1], state, params)
        bare, bare_state = inner.update(mean_of(gradients), bare_state, bare)
        assert_close((params, state.inner), (bare, bare_state), rtol=1e-12, atol=1e-14)
        assert state.mini_step == 0
        assert not any(leaf.any() for leaf in leaves(state.acc_grads))


def test_of_one_call_it_is_the_inner_optimizer_to_the_bit():
    params = trees()["nested"]
    gradients = [random_like(params) for _ in range(5)]
    ours, state = run(Accumulate(AdamW(lr=0.1), 1), params, gradients)
    bare, bare_state = run(AdamW(lr=0.1), params, gradients)
    assert_same_bits((ours, state.inner), (bare, bare_state))


def test_parts_of_a_batch_train_as_the_batch():
    x, y = torch.randn(32, 3, dtype=torch.float64), torch.randn(32, dtype=torch.float64)

    def loss(w, x, y):
        return (x @ w - y).square().mean()

    w = torch.randn(3, dtype=torch.float64)
    opt, inner = Accumulate(AdamW(lr=0.1), 4), AdamW(lr=0.1)
    state, whole, whole_state = opt.init(w), w, inner.init(w)
    for _ in range(5):
        whole, whole_state = inner.update(grad(loss)(whole, x, y), whole_state, whole)
        for part in range(4):
            rows = slice(8 * part, 8 * part + 8)
            w, state = opt.update(grad(loss)(w, x[rows], y[rows]), state, w)
    assert_close(w, whole, rtol=1e-12)


@pytest.mark.parametrize("every", [1, 3, 4])
def test_optax_gives_the_same_over_20_steps(every):
    optax = pytest.importorskip("optax", reason="optax comes with the extra `benchmark` alone")
    numpy = pytest.importorskip("numpy")
    params = {"b": torch.randn(3), "a": torch.randn(2, 3)}
    theirs = optax.MultiSteps(optax.adamw(0.1, weight_decay=0.01), every)
    their_params = {name: p.numpy() for name, p in params.items()}
    their_state = theirs.init(their_params)
    opt = Accumulate(AdamW(lr=0.1), every)
    state = opt.init(params)
    for _ in range(20):
        grads = random_like(params)
        given = {name: g.numpy() for name, g in grads.items()}
        updates, their_state = theirs.update(given, their_state, their_params)
        their_params = optax.apply_updates(their_params, updates)
        params, state = opt.update(grads, state, params)
        for name, own in params.items():
            assert_close(own, torch.from_numpy(numpy.array(their_params[name])), 1e-4, 1e-5)
        assert state.mini_step == int(their_state.mini_step)
        assert state.inner.step == int(their_state.gradient_step)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_gradients_are_summed_in_float32(dtype):
    """In 16 bits, 1 / 4096 more is nothing beside 1."""
    params = torch.zeros(1).to(dtype)
    opt = Accumulate(SHOWING, 257)
    state = opt.init(params)
    assert state.acc_grads.dtype is torch.float32
    for size in (1.0, *[1 / 256] * 256):
        params, state = opt.update(torch.full((1,), size).to(dtype), state, params)
    assert params.dtype is dtype
    assert_same_bits(state.inner.exp_avg, torch.tensor([2 / 257]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128], ids=str)
def test_other_gradients_are_summed_in_their_own_dtype(dtype):
    params = torch.randn(4, dtype=dtype)
    gradients = [torch.randn(4, dtype=dtype).conj() for _ in range(3)]
    opt = Accumulate(SHOWING, 3)
    assert opt.init(params).acc_grads.dtype is dtype
    state = run(opt, params, gradients)[1]
    assert_close(state.inner.exp_avg, sum(gradients) / 3)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_leaf_is_left_alone_if_it_had_no_gradient_in_any_call(in_place):
    params = [torch.ones(2), torch.ones(2), torch.ones(2)]
    opt = Accumulate(AdamW(lr=0.1, step_per_leaf=True), 3)
    step = opt.update_ if in_place else opt.update
    state = opt.init(params)
    one = torch.ones(2)
    for grads in ([one, None, None], [one, None, 3 * one], [one, None, None]):
        params, state = step(grads, state, params)
    assert [int(count) for count in state.inner.step] == [1, 0, 1]
    assert_same_bits(params[1], one)
    assert_close(state.inner.exp_avg, [0.1 * one, 0 * one, 0.1 * one])
    assert not state.given.any()
    for grads in ([None, one, None],) * 3:
        params, state = step(grads, state, params)
    assert [int(count) for count in state.inner.step] == [1, 1, 1]


@pytest.mark.parametrize("in_place", [False, True])
def test_the_inner_update_is_made_in_the_last_call_alone(in_place):
    opt = Accumulate(Counting(), 4)
    params = torch.ones(3)
    state = opt.init(params)
    Counting.calls = 0
    for number in range(1, 13):
        step = opt.update_ if in_place else opt.update
        params, state = step(torch.ones(3), state, params)
        assert Counting.calls == number // 4
    Counting.calls = 0
    grad(lambda p: sum(opt.update(g, opt.init(p), p)[0].sum() for g in [p, p]))(params)
    assert Counting.calls == 0


def test_a_call_that_only_adds_allocates_nothing_in_place():
    opt = Accumulate(AdamW(), 2)
    params = torch.ones(3)
    state = opt.init(params)
    memory = state.acc_grads.data_ptr()
    opt.update_(torch.full((3,), 2.0), state, params)
    assert_same_bits(state.acc_grads, torch.full((3,), 2.0))
    assert state.acc_grads.data_ptr() == memory


def test_order_decides_whether_the_mean_or_each_gradient_is_clipped():
    grads = [torch.tensor([30.0]), torch.tensor([0.5]), torch.tensor([-29.0]), torch.tensor([0.5])]
    param = torch.ones(1)
    mean_clipped = run(Accumulate(Clip(SHOWING, 1.0), 4), param, grads)[1].inner.inner.exp_avg
    each_clipped = run(Clip(Accumulate(SHOWING, 4), 1.0), param, grads)[1].inner.inner.exp_avg
    assert_close(mean_clipped, torch.tensor([0.5]))  # 2 / 4, which is within the norm
    assert_close(each_clipped, torch.tensor([0.25]))  # 1 / 4: the large two cancel out


# Not `agrees_with_itself_in_float64`, which knows nothing of a mean that is rounded to 16 bits
# before its norm is taken, nor of two clipped gradients that cancel but for their rounding.
@pytest.mark.parametrize(
    "law",
    [law for law in laws.LAWS if law is not laws.agrees_with_itself_in_float64],
    ids=lambda law: law.__name__,
)
@pytest.mark.parametrize(
    "opt",
    [
        Accumulate(Clip(AdamW(lr=0.1), 0.5, nonfinite="skip"), 2),
        Clip(Accumulate(AdamW(lr=0.1), 2), 0.5, nonfinite="skip"),
    ],
    ids=["the mean", "each"],
)
def test_in_either_order_the_laws_hold(opt, law, examples):
    report = check_optimizer(opt, laws=[law], max_examples=examples(law))
    assert report.ok, report


def test_members_complete_each_in_its_own_call():
    every = torch.tensor([1.0, 2.0, 3.0])
    params = {"w": torch.randn(3, 4), "b": torch.randn(3)}
    gradients = [random_like(params) for _ in range(6)]
    opts = Accumulate(AdamW(lr=0.1), every)
    state = vmap(lambda opt, p: opt.init(p))(opts, params)
    moved = params
    for grads in gradients:
        moved, state = vmap(lambda opt, g, s, p: opt.update(g, s, p))(opts, grads, state, moved)
    for i in range(3):
        own = {name: p[i] for name, p in params.items()}
        each = [{name: g[i] for name, g in grads.items()} for grads in gradients]
        expected = run(Accumulate(AdamW(lr=0.1), i + 1), own, each)
        assert_close(tree_map(lambda leaf, i=i: leaf[i], (moved, state)), expected)


@pytest.mark.parametrize("calls", [3, 4])
def test_derivatives_are_the_limits_of_differences(calls):
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    params = torch.randn(3, dtype=torch.float64, requires_grad=True)
    gradients = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(calls)]

    def after(lr, params, *gradients):
        return run(Accumulate(AdamW(lr=lr, eps=0.1), 2), params, gradients)[0]

    # An odd last gradient moves nothing yet: its derivative is zero.
    assert torch.autograd.gradcheck(after, (lr, params, *gradients), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(after, (lr, params, *gradients))


def test_training_is_differentiated_in_both_modes():
    def after(lr):
        w = torch.ones(3, dtype=torch.float64)
        opt = Accumulate(AdamW(lr=lr), 2)
        state = opt.init(w)
        for _ in range(4):
            w, state = opt.update(grad(lambda w: w.pow(4).sum())(w), state, w)
        return w.square().sum()

    lr, h = torch.tensor(0.1, dtype=torch.float64), 1e-5
    difference = (after(lr + h) - after(lr - h)) / (2 * h)
    assert_close(grad(after)(lr), difference, rtol=1e-7)
    assert_close(jvp(after, (lr,), (torch.ones_like(lr),))[1], difference, rtol=1e-7)
    lrs = torch.stack([lr, 2 * lr])
    assert_close(vmap(grad(after))(lrs), torch.stack([grad(after)(lr), grad(after)(2 * lr)]))


@pytest.mark.by_day(1)
@pytest.mark.parametrize("in_place", [False, True])
def test_one_compiled_graph_takes_every_call(in_place):
    torch.compiler.reset()
    opt = Accumulate(Clip(AdamW(lr=0.1), 0.5), 2)
    step = torch.compile(
        opt.update_ if in_place else opt.update, fullgraph=True, backend="aot_eager"
    )
    params = {"w": torch.randn(3), "b": torch.randn(2, dtype=torch.float64)}
    own, state = clone(params), opt.init(params)
    try:
        for _ in range(5):
            grads = random_like(params)
            expected = opt.update(grads, clone(state), clone(own))
            own, state = step(grads, state, own)
            assert_close((own, state), expected)
            torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")


def test_a_checkpoint_in_the_middle_of_a_sum_goes_on_to_the_bit():
    opt = Accumulate(Clip(AdamW(lr=0.1), 0.5), 3)
    params = trees()["nested"]
    gradients = [random_like(params) for _ in range(7)]
    expected = run(opt, params, gradients)
    params, state = run(opt, params, gradients[:4])
    saved = interop.to_state_dict({"params": params, "state": state})
    loaded = interop.from_state_dict({"params": params, "state": opt.init(params)}, clone(saved))
    params, state = loaded["params"], loaded["state"]
    for grads in gradients[4:]:
        params, state = opt.update(grads, state, params)
    assert_same_bits((params, state), expected)


def test_parameters_that_require_a_gradient_grow_no_graph():
    opt = Accumulate(AdamW(lr=0.1), 2)
    params = {"w": torch.ones(3, requires_grad=True), "frozen": torch.ones(2)}
    state = opt.init(params)
    for _ in range(5):
        grads = grad(lambda p: p["w"].pow(2).sum() + p["frozen"].sum())(params)
        assert grads["w"].requires_grad  # torch.func.grad leaves a history at a parameter
        params, state = opt.update(grads, state, params)
        assert params["w"].is_leaf
        assert params["w"].requires_grad
        assert not params["frozen"].requires_grad
        assert not any(leaf.requires_grad for leaf in leaves(state))


@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 3)])
def test_stacked_parameters_that_require_a_gradient_grow_no_graph_under_vmap(shape):
    opt = Accumulate(AdamW(lr=0.1), 2)

    def step(state, params):
        return opt.update(grad(lambda p: p.pow(2).sum())(params), state, params)

    init = opt.init
    for _ in shape[1:]:
        init, step = vmap(init), vmap(step)
    params = torch.ones(shape, requires_grad=True)
    state = init(params)
    for _ in range(3):
        params, state = step(state, params)
        assert not any(leaf.requires_grad for leaf in leaves((params, state)))
        params.requires_grad_()


def test_histories_are_recorded_as_the_inner_optimizer_is_told():
    for inner, wanted in (
        (AdamW(differentiable=True), True),
        (Clip(AdamW(differentiable=True), 1.0), True),
        (AdamW(differentiable=False), False),
        (AdamW(), False),
    ):
        opt = Accumulate(inner, 2)
        start = torch.ones(3, requires_grad=True)
        params, state = start, opt.init(start)
        for _ in range(2):
            (g,) = torch.autograd.grad(params.pow(4).sum(), params, create_graph=True)
            params, state = opt.update(g, state, params)
        assert (params.grad_fn is not None) == wanted, inner
        if wanted:
            assert torch.autograd.grad(params.sum(), start)[0].abs().min() > 0


@pytest.mark.parametrize("calls_before", [0, 1])
def test_update_in_place_refuses_before_it_writes(calls_before):
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    grads = tree_map(lambda p: 3 * p, params)
    opt = Accumulate(AdamW(), 2)
    state = opt.init(params)
    for _ in range(calls_before):
        opt.update_(grads, state, params)
    short = state._replace(acc_grads={**state.acc_grads, "b": torch.ones(4)})
    wide = state._replace(acc_grads={**state.acc_grads, "b": torch.ones(3, dtype=torch.float64)})
    asked = {**grads, "b": torch.ones(3, requires_grad=True)}
    learnt = state._replace(acc_grads={**state.acc_grads, "b": torch.ones(3, requires_grad=True)})
    assert "grads['b']: shape (2,)" in attempt(opt, {**grads, "b": torch.ones(2)}, state, params)
    assert "'c'" in attempt(opt, {"a": grads["a"], "c": grads["b"]}, state, params)
    assert attempt(opt, grads, short, params).startswith("state.acc_grads['b'] is not the sum")
    assert attempt(opt, grads, wide, params).startswith("state.acc_grads['b'] is not the sum")
    assert attempt(opt, asked, state, params).startswith("grads['b'] requires a gradient")
    assert attempt(opt, grads, learnt, params).startswith("state.acc_grads['b'] requires")
    assert "state.acc_grads['a'] shares" in attempt(opt, state.acc_grads, state, params)
    assert "AccumulateState" in attempt(opt, grads, state.inner, params)
    assert "state.mini_step" in attempt(
        opt, grads, state._replace(mini_step=torch.zeros(2)), params
    )
    assert "state.given" in attempt(opt, grads, state._replace(given=torch.zeros(1)), params)
    if calls_before:  # the inner optimizer speaks in the last call, and nothing is written then
        tied = {"a": params["b"][:2], "b": params["b"]}
        assert "shares its memory" in attempt(opt, grads, state, tied)
    stacked = tree_map(lambda leaf: leaf[None], (grads, opt.init(params), params))
    with pytest.raises(RuntimeError, match=r"Use update\(\)"):
        vmap(opt.update_)(*stacked)


@pytest.mark.parametrize(
    "every", [0, -1, 1.5, math.nan, math.inf, torch.tensor(0.5), torch.tensor(2), "2", True, None]
)
def test_every_is_a_whole_number_from_1(every):
    with pytest.raises((TypeError, ValueError), match="every"):
        Accumulate(AdamW(), every)


def test_every_is_shown_as_it_was_given():
    assert Accumulate(AdamW(), 4).every == 4
    assert "every=4)" in repr(Accumulate(AdamW(), 4.0))


def test_a_stacked_every_needs_a_vmap():
    params = torch.ones(2)
    opt = Accumulate(AdamW(), torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"every has shape \(2,\)"):
        opt.update(params, opt.init(params), params)


@pytest.mark.parametrize("how", ["update", "update_", "vmap", "compile"])
def test_a_sum_that_is_cut_short_is_divided_by_what_is_in_it(how):
    inner = AdamW(lr=0.1)
    params, grads = torch.ones(2), torch.ones(2)
    state = Accumulate(inner, 8).init(params)
    for _ in range(2):
        _, state = Accumulate(inner, 8).update(grads, state, params)
    opt = Accumulate(inner, 3 if how != "vmap" else torch.tensor(3.0))
    expected = inner.update(grads, inner.init(params), params)
    if how == "vmap":
        stacked = tree_map(lambda leaf: torch.stack([leaf, leaf]), (grads, state, params))
        found = tree_map(lambda leaf: leaf[1], vmap(opt.update)(*stacked))
    elif how == "compile":
        torch.compiler.reset()
        found = torch.compile(opt.update, fullgraph=True, backend="aot_eager")(grads, state, params)
    else:
        found = getattr(opt, how)(grads, state, params)
    assert_close((found[0], found[1].inner), expected)
    assert found[1].mini_step == 0
