"""The average of the parameters: optax's with debiasing, torch's without."""

import math

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from funcopt import Accumulate, AdamW, Clip, Ema, Frozen, Partition, averaged, interop
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


def trajectory(opt, params, gradients):
    """Return the parameters after each update, those at first in front, and the averages."""
    state = opt.init(params)
    rows = [(params, state.average)]
    for grads in gradients:
        params, state = opt.update(grads, state, params)
        rows.append((params, state.average))
    return zip(*rows, strict=True)


def double(tree):
    return tree_map(lambda t: t.to(torch.complex128 if t.is_complex() else torch.float64), tree)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999, torch.tensor(0.9)])
@pytest.mark.parametrize("name", trees())
def test_debiased_it_is_the_weighted_mean_of_the_new_parameters(name, decay):
    params = trees()[name]
    opt = Ema(AdamW(lr=0.1), decay)
    points, averages = trajectory(opt, params, [random_like(params) for _ in range(5)])
    assert_same_bits(averages[0], params)
    assert_same_bits(averages[1], points[1])
    for t in range(1, 6):
        shares = [float(decay) ** (t - i) for i in range(1, t + 1)]
        mean = tree_map(
            lambda *p, s=shares: sum(a * b for a, b in zip(s, p, strict=True)) / sum(s),
            *double(points[1 : t + 1]),
        )
        assert_close(double(averages[t]), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_from_the_first_parameters_on_it_is_torchs(in_place, dtype):
    """To the bit, but for complex numbers."""
    swa = torch.optim.swa_utils
    model = torch.nn.Linear(5, 3, dtype=dtype)
    theirs = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(model)
    params = {name: p.detach() for name, p in model.named_parameters()}
    opt = Ema(AdamW(lr=0.1), 0.9, debias=False)
    state, own = opt.init(params), clone(params)
    for _ in range(20):
        own, state = (opt.update_ if in_place else opt.update)(random_like(own), state, own)
        for name, p in params.items():
            p.copy_(own[name])
        theirs.update_parameters(model)
        expected = {name: p.detach() for name, p in theirs.module.named_parameters()}
        if dtype.is_complex:
            assert_close(state.average, expected)
        else:
            assert_same_bits(state.average, expected)
        assert state.weight == 1


@pytest.mark.parametrize("debias", [True, False])
def test_optax_gives_the_same_over_20_steps(debias):
    optax = pytest.importorskip("optax", reason="optax comes with the extra `benchmark` alone")
    numpy = pytest.importorskip("numpy")
    params = {"b": torch.randn(3), "a": torch.randn(2, 3)}
    theirs = optax.ema(0.9, debias=debias)
    their_state = theirs.init({name: p.numpy() for name, p in params.items()})
    opt = Ema(AdamW(lr=0.1), 0.9)
    state = opt.init(params)
    for _ in range(20):
        params, state = opt.update(random_like(params), state, params)
        new = {name: p.numpy() for name, p in params.items()}
        expected, their_state = theirs.update(new, their_state)
        scale = 1.0 if debias else state.weight
        for name, own in state.average.items():
            wanted = torch.from_numpy(numpy.array(expected[name]))
            assert_close((own * scale).float(), wanted, 1e-5, 1e-6)
        assert state.n_averaged == int(their_state.count)


@pytest.mark.parametrize("debias", [True, False])
def test_it_moves_nothing_itself(debias):
    params = trees()["nested"]
    gradients = [random_like(params) for _ in range(4)]
    ours, state = run(Ema(AdamW(lr=0.1), 0.9, debias), params, gradients)
    assert_same_bits((ours, state.inner), run(AdamW(lr=0.1), params, gradients))


def test_the_weight_stays_exact_where_the_decay_is_close_to_1():
    decay = 1 - 2.0**-20
    _, state = run(Ema(AdamW(), decay), torch.ones(1), [torch.ones(1)] * 50)
    assert state.weight.item() == pytest.approx(-math.expm1(50 * math.log1p(-(2.0**-20))), 1e-13)
    state = Ema(AdamW(), 0.3, debias=False).init(torch.ones(1))
    far = state._replace(n_averaged=torch.tensor(2.0**25, dtype=torch.float64))
    _, far = Ema(AdamW(), 0.3, debias=False).update(torch.ones(1), far, torch.ones(1))
    assert far.n_averaged == 2**25 + 1
    assert far.weight == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("in_place", [False, True])
def test_16_bit_parameters_are_averaged_in_float32(in_place, dtype):
    """In 16 bits, a thousandth of the way would be no way at all."""
    params = torch.zeros(2, dtype=dtype)
    opt = Ema(AdamW(lr=1.0, weight_decay=0.0), 0.999, debias=False)
    step = opt.update_ if in_place else opt.update
    state = opt.init(params)
    expected = torch.zeros(2, dtype=torch.float64)
    for _ in range(5):
        params, state = step(-torch.ones(2, dtype=dtype), state, params)
        assert params.dtype is dtype
        expected = 0.999 * expected + 0.001 * params.double()
    assert state.average.dtype is torch.float32
    assert_close(state.average.double(), expected, rtol=1e-5)
    assert_same_bits(averaged(state, params), expected.to(dtype))


def test_the_average_is_read_as_parameters_from_any_state_that_holds_one():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)).to(torch.bfloat16)
    params = dict(model.named_parameters())
    opt = Accumulate(Clip(Ema(AdamW(lr=0.1), 0.5), 1.0), 1)
    params, state = opt.update(tree_map(torch.ones_like, params), opt.init(params), params)
    average = averaged(state, params)
    assert_same_bits(average, tree_map(torch.detach, params))
    assert list(average) == list(params)
    assert functional_call(model, average, torch.ones(3, dtype=torch.bfloat16)).shape == (1,)
    turned = dict(reversed(params.items()))
    assert list(averaged(state, turned)) == list(turned)
    twice = Ema(Ema(AdamW(), 0.5), 0.9)
    state = twice.init(params)
    assert_same_bits(averaged(state, params), tree_map(torch.detach, params))


def test_an_average_of_the_dtype_is_not_copied():
    params = {"w": torch.ones(3)}
    state = Ema(AdamW()).init(params)
    assert averaged(state, params)["w"] is state.average["w"]


def test_a_state_without_an_average_or_with_several_is_refused():
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(ValueError, match="holds the states of 2 Emas"):
        averaged([Ema(AdamW()).init(params)] * 2, params)
    with pytest.raises(ValueError, match="holds no average: wrap"):
        averaged(AdamW().init(params), params)
    with pytest.raises(ValueError, match="order is averaged"):
        averaged(params, Ema(AdamW()).init(params))
    with pytest.raises(ValueError, match=r"state\.average does not have the structure"):
        averaged(Ema(AdamW()).init(params), {"a": torch.ones(2)})


def test_a_schedule_is_called_with_the_count_and_weights_as_it_goes():
    seen = []

    def decay(count):
        seen.append(count.item())
        return (1 + count) / (10 + count)

    params = torch.randn(4, dtype=torch.float64)
    opt = Ema(AdamW(lr=0.1), decay)
    points, averages = trajectory(opt, params, [random_like(params) for _ in range(4)])
    assert seen == [0.0, 1.0, 2.0, 3.0]
    total, weight = torch.zeros(4, dtype=torch.float64), 0.0
    for t, point in enumerate(points[1:]):
        kept = (1 + t) / (10 + t)
        total, weight = kept * total + (1 - kept) * point, kept * weight + 1 - kept
        assert_close(averages[t + 1], total / weight, rtol=1e-12)
    a_value = Ema(AdamW(), Linear(torch.tensor(0.0), 0.9, 10))
    assert a_value.update(params, a_value.init(params), params)[1].weight == 1
    wrong = Ema(AdamW(), lambda count: 1.5)
    with pytest.raises(ValueError, match=r"decay=1.5 from its schedule"):
        wrong.update(params, wrong.init(params), params)


def test_frozen_leaves_and_those_without_a_gradient_are_averaged_as_they_are():
    params = {"a": torch.randn(3), "b": torch.randn(2), "c": torch.randn(2)}
    inner = {"move": AdamW(lr=0.1), "rest": Frozen()}
    opt = Ema(Partition(inner, {"a": "move", "b": "move", "c": "rest"}), 0.7)
    state, moved = opt.init(params), clone(params)
    for _ in range(3):
        moved, state = opt.update({"a": torch.ones(3), "b": None, "c": None}, state, moved)
    assert_same_bits({k: state.average[k] for k in "bc"}, {k: params[k] for k in "bc"})
    assert (state.average["a"] != params["a"]).all()


def test_order_decides_how_often_the_same_parameters_count():
    gradients = [torch.ones(2)] * 4
    inside = run(Accumulate(Ema(AdamW(), 0.5), 2), torch.ones(2), gradients)[1].inner
    outside = run(Ema(Accumulate(AdamW(), 2), 0.5), torch.ones(2), gradients)[1]
    assert (inside.n_averaged, outside.n_averaged) == (2, 4)
    broken = [torch.ones(2), torch.tensor([1.0, math.nan])]
    skipped = run(Clip(Ema(AdamW(), 0.5), 1.0, nonfinite="skip"), torch.ones(2), broken)[1].inner
    assert skipped.n_averaged == 1


@pytest.mark.parametrize("debias", [True, False])
def test_members_have_decays_of_their_own_under_vmap(debias):
    decay = torch.tensor([0.0, 0.5, 0.99], dtype=torch.float64)
    params = {"w": torch.randn(3, 4), "b": torch.randn(3, 2).bfloat16()}
    gradients = [random_like(params) for _ in range(3)]
    opts = Ema(AdamW(lr=0.1), decay, debias)
    state = vmap(lambda opt, p: opt.init(p))(opts, params)
    moved = params
    for grads in gradients:
        moved, state = vmap(lambda opt, g, s, p: opt.update(g, s, p))(opts, grads, state, moved)
    for i in range(3):
        own = tree_map(lambda p, i=i: p[i], params)
        each = [tree_map(lambda g, i=i: g[i], grads) for grads in gradients]
        expected = run(Ema(AdamW(lr=0.1), decay[i].item(), debias), own, each)
        assert_close(tree_map(lambda leaf, i=i: leaf[i], (moved, state)), expected)


@pytest.mark.parametrize("debias", [True, False])
def test_derivatives_are_the_limits_of_differences(debias):
    decay = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    params = torch.randn(3, dtype=torch.float64, requires_grad=True)
    gradients = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def after(decay, lr, params, *gradients):
        opt = Ema(AdamW(lr=lr, eps=0.1, differentiable=True), decay, debias)
        return run(opt, params, gradients)[1].average

    given = decay, lr, params, *gradients
    assert torch.autograd.gradcheck(after, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(after, given)


@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("debias", [True, False])
def test_training_is_differentiated_in_both_modes(debias, decay):
    def after(decay):
        w = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
        opt = Ema(AdamW(lr=0.1), decay, debias)
        state = opt.init(w)
        for _ in range(4):
            w, state = opt.update(grad(lambda w: w.pow(4).sum())(w), state, w)
        return state.average.square().sum()

    decay, h = torch.tensor(decay, dtype=torch.float64), 1e-5
    up, down = (decay + h, decay - h) if decay > 0 else (decay + 2 * h, decay)
    difference = (after(up) - after(down)) / (2 * h)
    rtol = 1e-7 if decay > 0 else 1e-4
    assert_close(grad(after)(decay), difference, rtol=rtol)
    assert_close(jvp(after, (decay,), (torch.ones_like(decay),))[1], difference, rtol=rtol)
    decays = torch.stack([decay, decay + 0.1])
    assert_close(vmap(grad(after))(decays), torch.stack([grad(after)(d) for d in decays]))


@pytest.mark.by_day(1)
@pytest.mark.parametrize("in_place", [False, True])
def test_one_compiled_graph_takes_every_step(in_place):
    torch.compiler.reset()
    opt = Ema(Clip(AdamW(lr=0.1), 0.5), 0.9)
    step = torch.compile(
        opt.update_ if in_place else opt.update, fullgraph=True, backend="aot_eager"
    )
    params = {"w": torch.randn(3).bfloat16(), "b": torch.randn(2, dtype=torch.float64)}
    own, state = clone(params), opt.init(params)
    try:
        for _ in range(4):
            grads = random_like(params)
            expected = opt.update(grads, clone(state), clone(own))
            own, state = step(grads, state, own)
            assert_close((own, state), expected)
            torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")


def test_a_checkpoint_goes_on_to_the_bit():
    opt = Accumulate(Ema(Clip(AdamW(lr=0.1), 0.5), 0.9), 2)
    params = trees()["nested"]
    gradients = [random_like(params) for _ in range(7)]
    expected = run(opt, params, gradients)
    params, state = run(opt, params, gradients[:3])
    saved = interop.to_state_dict({"params": params, "state": state})
    loaded = interop.from_state_dict({"params": params, "state": opt.init(params)}, clone(saved))
    params, state = loaded["params"], loaded["state"]
    for grads in gradients[3:]:
        params, state = opt.update(grads, state, params)
    assert_same_bits((params, state), expected)


def test_parameters_that_require_a_gradient_grow_no_graph():
    opt = Ema(AdamW(lr=0.1), 0.9)
    params = {"w": torch.nn.Parameter(torch.ones(3)), "frozen": torch.ones(2)}
    state = opt.init(params)
    assert not any(leaf.requires_grad for leaf in leaves(state))
    for _ in range(3):
        grads = grad(lambda p: p["w"].pow(2).sum() + p["frozen"].sum())(params)
        params, state = opt.update(grads, state, params)
        assert params["w"].is_leaf
        assert params["w"].requires_grad
        assert not any(leaf.requires_grad for leaf in leaves(state))
    stacked = torch.ones(2, 3, requires_grad=True)
    moved, state = vmap(lambda p: opt.update(p.detach(), opt.init(p), p))(stacked)
    assert not any(leaf.requires_grad for leaf in leaves((moved, state)))


def test_update_in_place_refuses_before_it_writes():
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    grads = tree_map(lambda p: 3 * p, params)
    opt = Ema(AdamW(), 0.9)
    state = opt.init(params)

    def with_b(leaf):
        return state._replace(average={**state.average, "b": leaf})

    asked = {**grads, "b": torch.ones(3, requires_grad=True)}
    learnt = Ema(AdamW(), torch.tensor(0.9, requires_grad=True))
    wrong = Ema(AdamW(), lambda count: 2.0)
    assert "grads['b']: shape (2,)" in attempt(opt, {**grads, "b": torch.ones(2)}, state, params)
    assert "'c'" in attempt(opt, {"a": grads["a"], "c": grads["b"]}, state, params)
    assert "state.average['b'] does not go" in attempt(opt, grads, with_b(torch.ones(4)), params)
    assert "torch.float32" in attempt(opt, grads, with_b(torch.ones(3).double()), params)
    assert attempt(opt, asked, state, params).startswith("grads['b'] requires a gradient")
    assert attempt(learnt, grads, state, params).startswith("decay requires a gradient")
    assert "from its schedule" in attempt(wrong, grads, state, params)
    history = with_b(torch.ones(3, requires_grad=True))
    assert attempt(opt, grads, history, params).startswith("state.average['b'] requires")
    assert "state.average['a'] shares" in attempt(opt, state.average, state, params)
    assert "params['a'] shares its memory with state.average['a']" in attempt(
        opt, grads, state, averaged(state, params)
    )
    assert "strides" in attempt(opt, grads, with_b(torch.ones(1).expand(3)), params)
    assert "EmaState" in attempt(opt, grads, state.inner, params)
    assert "state.weight" in attempt(opt, grads, state._replace(weight=torch.ones(2)), params)
    counted = state._replace(n_averaged=torch.ones(2))
    assert "state.n_averaged" in attempt(opt, grads, counted, params)
    tied = {"a": params["b"][:2], "b": params["b"]}
    assert "shares its memory" in attempt(opt, grads, state, tied)
    stacked = tree_map(lambda leaf: leaf[None], (grads, opt.init(params), params))
    with pytest.raises(RuntimeError, match=r"Use update\(\)"):
        vmap(opt.update_)(*stacked)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, math.nan, torch.tensor(1.0), "1", None, True])
def test_a_decay_is_at_least_0_and_below_1(decay):
    with pytest.raises((TypeError, ValueError), match="decay"):
        Ema(AdamW(), decay)


def test_other_arguments_are_checked():
    with pytest.raises(TypeError, match="inner"):
        Ema(AdamW)
    with pytest.raises(TypeError, match="debias"):
        Ema(AdamW(), 0.9, debias=1)
    params = torch.ones(2)
    opt = Ema(AdamW(), torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match=r"decay has shape \(2,\)"):
        opt.update(params, opt.init(params), params)
