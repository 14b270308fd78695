"""Lookahead: the numbers of optax, with the slow parameters in the state."""

import math

import pytest
import torch
from torch.func import grad, jvp, vmap

from funcopt import Accumulate, AdamW, Clip, Ema, Lookahead, interop
from funcopt.schedules import Linear

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


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, torch.tensor(0.8)])
@pytest.mark.parametrize("name", trees())
def test_every_so_many_updates_slow_and_fast_meet(name, alpha, in_place):
    params = trees(torch.float64)[name]
    opt, inner = Lookahead(AdamW(lr=0.1), 3, alpha), AdamW(lr=0.1)
    step = opt.update_ if in_place else opt.update
    slow, fast, bare_state = clone(params), clone(params), inner.init(params)
    state = opt.init(params)
    for number in range(1, 8):
        grads = random_like(params)
        params, state = step(grads, state, params)
        fast, bare_state = inner.update(grads, bare_state, fast)
        if number % 3 == 0:
            slow = tree_map(lambda s, f: s + float(alpha) * (f - s), slow, fast)
            fast = clone(slow)
        assert_close((params, state.slow_params), (fast, slow), rtol=1e-12, atol=1e-14)
        assert_close(state.inner, bare_state, rtol=1e-12)
        assert state.steps_since_sync == number % 3
        if number % 3 == 0:
            assert_same_bits(params, state.slow_params)


def test_all_the_way_it_is_the_inner_optimizer_to_the_bit():
    params = trees()["nested"]
    gradients = [random_like(params) for _ in range(5)]
    ours, state = run(Lookahead(AdamW(lr=0.1), 2, alpha=1.0), params, gradients)
    assert_same_bits((ours, state.inner), run(AdamW(lr=0.1), params, gradients))


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("every", "alpha"), [(1, 0.5), (3, 0.8), (6, 0.5)])
def test_optax_gives_the_same_over_20_steps(every, alpha, reset):
    optax = pytest.importorskip("optax", reason="optax comes with the extra `benchmark` alone")
    numpy = pytest.importorskip("numpy")
    params = {"b": torch.randn(3), "a": torch.randn(2, 3)}
    theirs = optax.lookahead(optax.adamw(0.1, weight_decay=0.01), every, alpha, reset_state=reset)
    pair = optax.LookaheadParams.init_synced({name: p.numpy() for name, p in params.items()})
    their_state = theirs.init(pair)
    opt = Lookahead(AdamW(lr=0.1), every, alpha, reset_state=reset)
    state = opt.init(params)
    for _ in range(20):
        grads = random_like(params)
        given = {name: g.numpy() for name, g in grads.items()}
        updates, their_state = theirs.update(given, their_state, pair)
        pair = optax.apply_updates(pair, updates)
        params, state = opt.update(grads, state, params)
        for name, own in params.items():
            assert_close(own, torch.from_numpy(numpy.array(pair.fast[name])), 1e-4, 1e-5)
            slow = torch.from_numpy(numpy.array(pair.slow[name]))
            assert_close(state.slow_params[name], slow, 1e-4, 1e-5)
        assert state.steps_since_sync == int(their_state.steps_since_sync)
        assert state.inner.step == int(their_state.fast_state[0].count)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_restart_is_that_of_a_new_optimizer_at_the_slow_parameters(in_place):
    params = trees()["nested"]
    inner = Ema(AdamW(lr=Linear(0.1, 0.01, 4)), 0.5)
    opt = Lookahead(inner, 2, reset_state=True)
    step = opt.update_ if in_place else opt.update
    gradients = [random_like(params) for _ in range(3)]
    state = opt.init(params)
    for grads in gradients[:2]:
        params, state = step(grads, state, params)
    expected = inner.init(params)
    assert_same_bits(state.inner, expected)
    expected = inner.update(gradients[2], expected, params)
    params, state = step(gradients[2], state, params)
    assert_same_bits((params, state.inner), expected)


def test_an_update_in_between_leaves_the_slow_parameters_where_they_are_in_place():
    params = torch.ones(3)
    opt = Lookahead(AdamW(lr=0.1), 2)
    state = opt.init(params)
    version, memory = state.slow_params._version, state.slow_params.data_ptr()
    opt.update_(torch.ones(3), state, params)
    assert state.slow_params._version == version
    opt.update_(torch.ones(3), state, params)
    assert state.slow_params._version > version
    assert state.slow_params.data_ptr() == memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.8, torch.tensor(0.8)])
@pytest.mark.parametrize("in_place", [False, True])
def test_16_bit_parameters_are_rounded_once(in_place, alpha, dtype):
    params = torch.randn(50).to(dtype)
    opt = Lookahead(AdamW(lr=0.1), 1, alpha)
    state, start = opt.init(params), params.double()
    fast, _ = AdamW(lr=0.1).update(grads := torch.randn(50).to(dtype), state.inner, params)
    params, state = (opt.update_ if in_place else opt.update)(grads, state, params)
    assert state.slow_params.dtype is dtype
    assert_close(params, (start + 0.8 * (fast.double() - start)).to(dtype), 0, 1e-7)


def test_order_decides_what_is_counted():
    gradients = [torch.ones(2)] * 4
    inside = run(Accumulate(Lookahead(AdamW(), 5), 2), torch.ones(2), gradients)[1].inner
    outside = run(Lookahead(Accumulate(AdamW(), 2), 5), torch.ones(2), gradients)[1]
    assert (inside.steps_since_sync, outside.steps_since_sync) == (2, 4)


def test_lookaheads_nest():
    params = torch.randn(4, dtype=torch.float64)
    opt = Lookahead(Lookahead(AdamW(lr=0.1), 1, 0.5), 2, 0.25)
    gradients = [torch.randn(4, dtype=torch.float64) for _ in range(2)]
    moved, state = run(opt, params, gradients)
    point, inner_state = params, AdamW(lr=0.1).init(params)
    for grads in gradients:
        fast, inner_state = AdamW(lr=0.1).update(grads, inner_state, point)
        point = point + 0.5 * (fast - point)
    assert_close(moved, params + 0.25 * (point - params), rtol=1e-12)
    assert_close(state.inner.slow_params, point, rtol=1e-12)


@pytest.mark.parametrize("reset", [False, True])
def test_members_meet_each_in_its_own_update(reset):
    every = torch.tensor([1.0, 2.0, 3.0])
    alpha = torch.tensor([0.5, 0.8, 1.0], dtype=torch.float64)
    params = {"w": torch.randn(3, 4), "b": torch.randn(3)}
    gradients = [random_like(params) for _ in range(5)]
    opts = Lookahead(AdamW(lr=0.1), every, alpha, reset)
    state = vmap(lambda opt, p: opt.init(p))(opts, params)
    moved = params
    for grads in gradients:
        moved, state = vmap(lambda opt, g, s, p: opt.update(g, s, p))(opts, grads, state, moved)
    for i in range(3):
        own = tree_map(lambda p, i=i: p[i], params)
        each = [tree_map(lambda g, i=i: g[i], grads) for grads in gradients]
        expected = run(Lookahead(AdamW(lr=0.1), i + 1, alpha[i].item(), reset), own, each)
        assert_close(tree_map(lambda leaf, i=i: leaf[i], (moved, state)), expected, atol=1e-6)


@pytest.mark.parametrize("reset", [False, True])
def test_derivatives_are_the_limits_of_differences(reset):
    alpha = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    params = torch.randn(3, dtype=torch.float64, requires_grad=True)
    gradients = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(5)]

    def after(alpha, lr, params, *gradients):
        opt = Lookahead(AdamW(lr=lr, eps=0.1), 2, alpha, reset)
        moved, state = run(opt, params, gradients)
        return moved, state.slow_params

    given = alpha, lr, params, *gradients
    assert torch.autograd.gradcheck(after, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(after, given)


def test_training_is_differentiated_in_both_modes():
    def after(alpha):
        w = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
        opt = Lookahead(AdamW(lr=0.1), 2, alpha)
        state = opt.init(w)
        for _ in range(5):
            w, state = opt.update(grad(lambda w: w.pow(4).sum())(w), state, w)
        return w.square().sum()

    alpha, h = torch.tensor(0.6, dtype=torch.float64), 1e-5
    difference = (after(alpha + h) - after(alpha - h)) / (2 * h)
    assert_close(grad(after)(alpha), difference, rtol=1e-7)
    assert_close(jvp(after, (alpha,), (torch.ones_like(alpha),))[1], difference, rtol=1e-7)
    alphas = torch.stack([alpha, alpha / 2])
    assert_close(vmap(grad(after))(alphas), torch.stack([grad(after)(a) for a in alphas]))


@pytest.mark.by_day(1)
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_one_compiled_graph_takes_every_step(in_place, reset):
    torch.compiler.reset()
    opt = Lookahead(Clip(AdamW(lr=0.1), 0.5), 2, reset_state=reset)
    step = torch.compile(
        opt.update_ if in_place else opt.update, fullgraph=True, backend="aot_eager"
    )
    params = {"w": torch.randn(3).bfloat16(), "b": torch.randn(2, dtype=torch.float64)}
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


def test_a_checkpoint_between_two_meetings_goes_on_to_the_bit():
    opt = Accumulate(Lookahead(Clip(AdamW(lr=0.1), 0.5), 3), 1)
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
    opt = Lookahead(AdamW(lr=0.1), 2)
    params = {"w": torch.nn.Parameter(torch.ones(3)), "frozen": torch.ones(2)}
    state = opt.init(params)
    for _ in range(5):
        grads = grad(lambda p: p["w"].pow(2).sum() + p["frozen"].sum())(params)
        params, state = opt.update(grads, state, params)
        assert params["w"].is_leaf
        assert params["w"].requires_grad
        assert not params["frozen"].requires_grad
        assert not any(leaf.requires_grad for leaf in leaves(state))
    stacked = torch.ones(2, 3, requires_grad=True)
    moved, state = vmap(lambda p: opt.update(p.detach(), opt.init(p), p))(stacked)
    assert not any(leaf.requires_grad for leaf in leaves((moved, state)))


@pytest.mark.parametrize("wanted", [True, False])
def test_the_start_has_a_history_where_an_update_is_to_be_recorded(wanted):
    start = torch.ones(3, requires_grad=True)
    opt = Lookahead(AdamW(differentiable=wanted), 1, alpha=0.25)
    params, _ = opt.update(torch.ones(3), opt.init(start), start)
    assert (params.grad_fn is not None) == wanted
    if wanted:
        assert_close(torch.autograd.grad(params.sum(), start)[0], 1 - 0.25e-5 * torch.ones(3))


@pytest.mark.parametrize("updates_before", [0, 1])
def test_update_in_place_refuses_before_it_writes(updates_before):
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    grads = tree_map(lambda p: 3 * p, params)
    opt = Lookahead(AdamW(), 2, reset_state=True)
    state = opt.init(params)
    for _ in range(updates_before):
        opt.update_(grads, state, params)

    def with_b(leaf):
        return state._replace(slow_params={**state.slow_params, "b": leaf})

    asked = {**grads, "b": torch.ones(3, requires_grad=True)}
    learnt = Lookahead(AdamW(), 2, torch.tensor(0.5, requires_grad=True))
    assert "grads['b']: shape (2,)" in attempt(opt, {**grads, "b": torch.ones(2)}, state, params)
    assert "'c'" in attempt(opt, {"a": grads["a"], "c": grads["b"]}, state, params)
    assert "state.slow_params['b'] does not" in attempt(opt, grads, with_b(torch.ones(4)), params)
    assert "torch.float32" in attempt(opt, grads, with_b(torch.ones(3).double()), params)
    assert attempt(opt, asked, state, params).startswith("grads['b'] requires a gradient")
    assert attempt(learnt, grads, state, params).startswith("alpha requires a gradient")
    history = with_b(torch.ones(3, requires_grad=True))
    assert attempt(opt, grads, history, params).startswith("state.slow_params['b'] requires")
    assert "state.slow_params['a'] shares" in attempt(opt, state.slow_params, state, params)
    assert "params['a'] shares its memory" in attempt(opt, grads, state, state.slow_params)
    assert "strides" in attempt(opt, grads, with_b(torch.ones(1).expand(3)), params)
    assert "LookaheadState" in attempt(opt, grads, state.inner, params)
    counted = state._replace(steps_since_sync=torch.ones(2))
    assert "state.steps_since_sync" in attempt(opt, grads, counted, params)
    tied = {"a": params["b"][:2], "b": params["b"]}
    assert "shares its memory" in attempt(opt, grads, state, tied)
    stacked = tree_map(lambda leaf: leaf[None], (grads, opt.init(params), params))
    with pytest.raises(RuntimeError, match=r"Use update\(\)"):
        vmap(opt.update_)(*stacked)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("every", value) for value in (0, 1.5, math.nan, math.inf, torch.tensor(2), "2", None)),
        *(("alpha", value) for value in (-0.1, 1.1, math.nan, torch.tensor(2.0), "1", None, True)),
        ("reset_state", 1),
        ("inner", AdamW),
    ],
)
def test_bad_arguments_are_refused(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        Lookahead(**{"inner": AdamW(), name: value})


def test_stacked_numbers_need_a_vmap():
    params, two = torch.ones(2), torch.tensor([1.0, 1.0])
    for opt, name in ((Lookahead(AdamW(), two), "every"), (Lookahead(AdamW(), 2, two), "alpha")):
        with pytest.raises(ValueError, match=rf"{name} has shape \(2,\)"):
            opt.update(params, opt.init(params), params)
    assert repr(Lookahead(AdamW(), 4.0)) == "Lookahead(AdamW(), every=4)"
