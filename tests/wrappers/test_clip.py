"""Clipping by norm: torch's numbers, optax's but for an epsilon, and what is not finite."""

import math

import pytest
import torch
from torch.func import grad, vmap

from funcopt import AdamW, Clip, interop

from ..cases import (
    assert_close,
    assert_same_bits,
    attempt,
    clone,
    leaves,
    random_like,
    tree_map,
    trees,
)

# Without running means, exp_avg is the gradient that the inner optimizer was given, to the bit.
SHOWING = AdamW(lr=0.1, betas=(0.0, 0.0), moments=None)
ORDERS = [2.0, 1.0, 0.5, 3.0, math.inf]
MODES = ["propagate", "skip"]
INF, NAN = math.inf, math.nan


def clipped(opt, grads, params):
    """Return the gradients that the inner optimizer was given, and the norm that was found."""
    state = opt.update(grads, opt.init(params), params)[1]
    return state.inner.exp_avg, state.norm


def torchs(grads, max_norm, order):
    """Return gradients clipped by torch, and their norm."""
    params = [None if g is None else torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for param, g in zip(params, grads, strict=True):
        if g is not None:
            param.grad = g.clone()
    given = [param for param in params if param is not None]
    norm = torch.nn.utils.clip_grad_norm_(given, max_norm, norm_type=order)
    return [None if param is None else param.grad for param in params], norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6, torch.tensor(0.5, dtype=torch.float64)])
@pytest.mark.parametrize("order", ORDERS)
def test_bits_are_torchs(order, max_norm, dtype):
    params = [torch.randn(s, dtype=dtype) for s in [(3, 4), (), (5,), (2, 3, 4)]]
    for scale in (1e-3, 1.0, 1e3):
        grads = [g * scale for g in random_like(params)]
        expected, norm = torchs(grads, float(max_norm), order)
        ours, our_norm = clipped(Clip(SHOWING, max_norm, order), grads, params)
        assert_same_bits(ours, expected)
        assert_same_bits(our_norm, norm)


def test_two_dtypes_and_a_missing_gradient_are_torchs():
    params = [torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(4)]
    grads = [torch.randn(3), torch.randn(2, dtype=torch.float64), None]
    expected, norm = torchs(grads, 0.5, 2.0)
    (one, two, left), our_norm = clipped(Clip(SHOWING, 0.5), grads, params)
    assert_close([one, two, our_norm], [*expected[:2], norm], rtol=1e-7)
    assert_same_bits(left, torch.zeros(4))
    assert our_norm.dtype is torch.float64


@pytest.mark.parametrize("order", ORDERS)
def test_the_norm_is_that_of_all_elements_and_the_clipped_one_is_within(order):
    params = trees(torch.float64)["nested"]
    grads = random_like(params)
    every = torch.cat([g.reshape(-1) for g in leaves(grads)]).abs()
    norm = every.max() if order == INF else every.pow(order).sum() ** (1 / order)
    ours, our_norm = clipped(Clip(SHOWING, 0.25, order), grads, params)
    assert_close(our_norm, norm, rtol=1e-12)
    assert_close(ours, tree_map(lambda g: g * 0.25 / (norm + 1e-6), grads), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_16_bit_gradients_are_taken_in_float32(dtype):
    """In float16 it would be infinite. Torch's own sum of so many equal squares is off by 1e-4."""
    grads = [torch.full((500, 500), 300.0).to(dtype), torch.tensor(-2.0).to(dtype)]
    exact = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    ours, norm = clipped(Clip(SHOWING, 1.0), grads, tree_map(torch.zeros_like, grads))
    assert norm.dtype is torch.float32
    assert norm.item() == pytest.approx(exact, rel=2e-4)
    for own, given in zip(ours, grads, strict=True):
        assert own.dtype is dtype
        wanted = (given.double() / (exact + 1e-6)).to(dtype)
        assert_close(own, wanted, rtol=torch.finfo(dtype).eps + 2e-4, atol=6e-8)


def test_gradients_within_the_norm_keep_their_bits():
    params = trees()["nested"]
    grads = random_like(params)
    assert_same_bits(clipped(Clip(SHOWING, 1e3), grads, params)[0], grads)


@pytest.mark.parametrize("name", trees())
def test_steps_are_those_of_adamw_on_clipped_gradients(name):
    params = trees()[name]
    opt, inner = Clip(AdamW(lr=0.1), 0.7), AdamW(lr=0.1)
    state, bare_state, bare = opt.init(params), inner.init(params), params
    for _ in range(5):
        grads = random_like(params)
        scaled, norm = torchs(leaves(grads), 0.7, 2.0) if leaves(grads) else ([], torch.zeros(()))
        given = iter(scaled)
        bare, bare_state = inner.update(
            tree_map(lambda g, given=given: next(given), grads), bare_state, bare
        )
        params, state = opt.update(grads, state, params)
        assert_same_bits(params, bare)
        assert_same_bits(state.norm, norm)


@pytest.mark.parametrize("max_norm", [0.5, 5.0])
def test_optax_gives_the_same_but_for_the_epsilon_over_20_steps(max_norm):
    optax = pytest.importorskip("optax", reason="optax comes with the extra `benchmark` alone")
    numpy = pytest.importorskip("numpy")
    params = {"b": torch.randn(3), "a": torch.randn(2, 3)}
    theirs = optax.chain(optax.clip_by_global_norm(max_norm), optax.sgd(1.0))
    their_params = {name: p.numpy() for name, p in params.items()}
    their_state = theirs.init(their_params)
    for _ in range(20):
        grads = random_like(params)
        given = {name: g.numpy() for name, g in grads.items()}
        updates, their_state = theirs.update(given, their_state, their_params)
        ours, norm = clipped(Clip(SHOWING, max_norm), grads, params)
        for name, own in ours.items():
            expected = -torch.from_numpy(numpy.array(updates[name]))
            assert_close(own, expected, rtol=1e-6 / norm.item() + 1e-6, atol=0)


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_norm_that_is_not_finite_goes_on_or_is_skipped_as_asked(bad, in_place):
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    good = {"a": torch.ones(2), "b": torch.ones(3)}
    broken = {"a": torch.tensor([1.0, bad]), "b": torch.ones(3)}
    for mode in MODES:
        opt = Clip(AdamW(lr=0.1), 1.0, nonfinite=mode)
        step = opt.update_ if in_place else opt.update
        before, state = step(good, opt.init(params), clone(params))
        kept = clone((before, state.inner))
        moved, state = step(broken, state, before)
        assert not state.norm.isfinite()
        if mode == "skip":
            assert_same_bits((moved, state.inner), kept)
        else:
            assert state.inner.step == 2
            expected = torchs(list(broken.values()), 1.0, 2.0)[0]
            assert torch.equal(moved["a"].isnan(), expected[0].isnan())
            assert torch.equal(moved["b"].isnan(), expected[1].isnan())
        moved, state = step(good, state, moved)
        assert_close(state.norm, torch.tensor(5.0).sqrt())


def test_each_member_of_a_vmap_skips_for_itself():
    params = torch.ones(3, 2)
    grads = torch.tensor([[1.0, 2.0], [NAN, 1.0], [INF, 1.0]])
    opt = Clip(AdamW(lr=0.1), 1.0, nonfinite="skip")
    state = vmap(opt.init)(params)
    moved, state = vmap(opt.update)(grads, state, params)
    assert_same_bits(state.inner.step, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    assert_same_bits(moved[1:], params[1:])
    assert_close(moved[0], opt.update(grads[0], opt.init(params[0]), params[0])[0])


def test_a_skipped_step_has_the_derivative_of_doing_nothing():
    opt = Clip(AdamW(lr=torch.tensor(0.1)), torch.tensor(1.0), nonfinite="skip")

    def after(opt, grads, params):
        return opt.update(grads, opt.init(params), params)[0].sum()

    for bad in (INF, NAN):
        grads = torch.tensor([1.0, bad])
        slopes = grad(after, (0, 1, 2))(opt, grads, torch.ones(2))
        assert_same_bits(
            [*leaves(slopes)], [*map(torch.tensor, (0.0, 0.0, [0.0, 0.0], [1.0, 1.0]))]
        )
        recorded = grads.clone().requires_grad_()
        moved = opt.update(recorded, opt.init(torch.ones(2)), torch.ones(2))[0]
        (slope,) = torch.autograd.grad(moved.sum(), recorded)
        assert_same_bits(slope, torch.zeros(2))


@pytest.mark.parametrize("mode", MODES)
def test_members_have_max_norms_of_their_own_under_vmap(mode):
    max_norms = torch.tensor([0.1, 1.0, 100.0])
    params = {"w": torch.randn(3, 4), "b": torch.randn(3)}
    grads = random_like(params)
    opts = Clip(AdamW(lr=0.1), max_norms, nonfinite=mode)
    state = vmap(lambda opt, p: opt.init(p))(opts, params)
    moved, state = vmap(lambda opt, g, s, p: opt.update(g, s, p))(opts, grads, state, params)
    for i in range(3):
        member = Clip(AdamW(lr=0.1), max_norms[i].item(), nonfinite=mode)
        own = {name: p[i] for name, p in params.items()}
        expected = member.update({n: g[i] for n, g in grads.items()}, member.init(own), own)
        assert_close(tree_map(lambda leaf, i=i: leaf[i], (moved, state)), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [2.0, 1.0, 3.0, INF])
@pytest.mark.parametrize("limit", [0.5, 50.0])
def test_derivatives_are_the_limits_of_differences(limit, order, mode):
    torch.manual_seed(0)
    a, b = torch.randn(3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    params = [torch.ones_like(a), torch.ones_like(b)]

    def after(max_norm, a, b):
        opt = Clip(AdamW(lr=0.1, eps=0.1), max_norm, order, mode)
        return tuple(opt.update([a, b], opt.init(params), params)[0])

    inputs = [x.requires_grad_() for x in (torch.tensor(limit, dtype=torch.float64), a, b)]
    assert torch.autograd.gradcheck(after, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(after, inputs)


@pytest.mark.parametrize("zeros", [("a",), ("a", "b")])
def test_second_derivatives_are_finite_where_a_leaf_has_a_zero_gradient(zeros):
    params = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(3, dtype=torch.float64)}
    grads = {n: torch.zeros_like(p) if n in zeros else p.clone() for n, p in params.items()}
    opt = Clip(AdamW(lr=0.1), 0.5)

    def after(grads):
        moved = opt.update(grads, opt.init(params), params)[0]
        return sum(p.square().sum() for p in moved.values())

    def slope(grads):
        return sum(g.square().sum() for g in grad(after)(grads).values())

    assert all(g.isfinite().all() for g in grad(slope)(grads).values())


@pytest.mark.by_day(1)
@pytest.mark.parametrize("mode", MODES)
def test_one_compiled_graph_takes_every_max_norm(mode):
    torch.compiler.reset()
    step = torch.compile(
        lambda max_norm, *given: Clip(AdamW(lr=0.1), max_norm, nonfinite=mode).update(*given),
        fullgraph=True,
        backend="aot_eager",
    )
    params = {"w": torch.randn(3), "b": torch.randn(2)}
    state = Clip(AdamW(), 1.0).init(params)
    for max_norm, bad in ((0.1, 1.0), (10.0, 1.0), (0.5, NAN)):
        grads = {"w": torch.randn(3), "b": torch.randn(2) * bad}
        result = step(torch.tensor(max_norm), grads, state, params)
        expected = Clip(AdamW(lr=0.1), max_norm, nonfinite=mode).update(grads, state, params)
        for one, other in zip(leaves(result), leaves(expected), strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)
        torch.compiler.set_stance("fail_on_recompile")
    torch.compiler.set_stance("default")


@pytest.mark.by_day(1)
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_step_in_place_is_the_pure_one(mode):
    torch.compiler.reset()
    opt = Clip(AdamW(lr=0.1), 0.5, nonfinite=mode)
    params = {"w": torch.randn(3), "b": torch.randn(2)}
    own, state = clone(params), opt.init(params)
    step = torch.compile(opt.update_, fullgraph=True, backend="aot_eager")
    for scale in (1.0, INF if mode == "skip" else 2.0, 0.1):
        grads = tree_map(lambda g, scale=scale: g * scale, random_like(params))
        expected = opt.update(grads, clone(state), clone(own))
        step(grads, state, own)
        assert_close((own, state.inner), (expected[0], expected[1].inner))


def test_a_checkpoint_goes_on_to_the_bit():
    opt = Clip(AdamW(lr=0.1), 0.5)
    params = trees()["nested"]
    gradients = [random_like(params) for _ in range(4)]
    state = opt.init(params)
    for grads in gradients[:2]:
        params, state = opt.update(grads, state, params)
    saved = interop.to_state_dict({"params": params, "state": state})
    loaded = interop.from_state_dict({"params": params, "state": opt.init(params)}, clone(saved))
    assert_same_bits(loaded, {"params": params, "state": state})
    assert_same_bits(
        opt.update(gradients[2], loaded["state"], loaded["params"]),
        opt.update(gradients[2], state, params),
    )


@pytest.mark.parametrize("mode", MODES)
def test_parameters_that_require_a_gradient_grow_no_graph(mode):
    opt = Clip(AdamW(lr=0.1), 0.5, nonfinite=mode)
    params = {"w": torch.ones(3, requires_grad=True)}
    state = opt.init(params)
    for bad in (1.0, NAN, 1.0):
        slopes = grad(lambda p: p["w"].pow(2).sum())(params)
        grads = tree_map(lambda g, bad=bad: g * bad, slopes)
        assert grads["w"].requires_grad  # torch.func.grad leaves a history at a parameter
        params, state = opt.update(grads, state, params)
        assert params["w"].is_leaf
        assert params["w"].requires_grad
        assert not any(leaf.requires_grad for leaf in leaves(state))


@pytest.mark.parametrize("mode", MODES)
def test_stacked_parameters_that_require_a_gradient_grow_no_graph_under_vmap(mode):
    opt = Clip(AdamW(lr=0.1), 0.5, nonfinite=mode)
    params = torch.ones(2, 3, requires_grad=True)
    state = vmap(opt.init)(params)

    def step(state, params):
        return opt.update(grad(lambda p: p.pow(2).sum())(params), state, params)

    params, state = vmap(step)(state, params)
    assert not any(leaf.requires_grad for leaf in leaves((params, state)))


def test_a_max_norm_that_requires_a_gradient_gets_one():
    max_norm = torch.tensor(0.5, requires_grad=True)
    opt = Clip(AdamW(lr=0.1, eps=1.0), max_norm)
    moved, state = opt.update(torch.ones(2), opt.init(torch.ones(2)), torch.ones(2))
    (slope,) = torch.autograd.grad(moved.sum(), max_norm)
    assert slope < 0
    assert not state.norm.requires_grad


def test_update_in_place_refuses_before_it_writes():
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    grads = tree_map(lambda p: 3 * p, params)
    opt = Clip(AdamW(), 0.5)
    state = opt.init(params)
    tied = {"a": params["b"][:2], "b": params["b"]}
    shared = state._replace(norm=grads["a"][0])
    learnt = Clip(AdamW(), torch.tensor(0.5, requires_grad=True))
    asked = {**grads, "b": torch.ones(3, requires_grad=True)}
    renamed = {"a": grads["a"], "c": grads["b"]}
    assert "'b'" in attempt(opt, renamed, state, params)
    assert "shares its memory" in attempt(opt, grads, state, tied)
    assert attempt(opt, grads, shared, params).startswith("state.norm shares its memory")
    assert attempt(learnt, grads, state, params).startswith("max_norm requires a gradient")
    assert attempt(opt, asked, state, params).startswith("grads['b'] requires a gradient")
    assert "ClipState" in attempt(opt, grads, state.inner, params)
    with pytest.raises(RuntimeError, match=r"Use update\(\)"):
        vmap(opt.update_)(
            tree_map(lambda g: g[None], grads),
            vmap(opt.init)(tree_map(lambda p: p[None], params)),
            tree_map(lambda p: p[None], params),
        )


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_norm": -1.0}, ValueError, "max_norm=-1.0: max_norm must be finite and at least 0"),
        ({"max_norm": NAN}, ValueError, "max_norm=nan"),
        ({"max_norm": INF}, ValueError, "max_norm=inf"),
        ({"max_norm": "1"}, TypeError, "max_norm='1'"),
        ({"norm_type": 0}, ValueError, "norm_type=0.0: norm_type must be above 0"),
        ({"norm_type": NAN}, ValueError, "norm_type=nan"),
        ({"norm_type": torch.tensor(2.0)}, TypeError, "norm_type is a tensor"),
        ({"nonfinite": "raise"}, ValueError, "nonfinite='raise': must be one of propagate, skip"),
        ({"inner": AdamW}, TypeError, "must be an optimizer"),
        ({"inner": 0.1}, TypeError, "inner=0.1: must be an optimizer"),
    ],
)
def test_bad_hyperparameters_are_refused(options, error, words):
    with pytest.raises(error) as refused:
        Clip(**{"inner": AdamW(), "max_norm": 1.0, **options})
    assert words in str(refused.value)


def test_a_stacked_max_norm_needs_a_vmap():
    opt = Clip(AdamW(), torch.ones(2))
    params = torch.ones(2)
    with pytest.raises(ValueError, match=r"max_norm has shape \(2,\)"):
        opt.update(params, opt.init(params), params)


def test_a_stacked_state_needs_a_vmap():
    opt = Clip(AdamW(), 1.0)
    params = torch.ones(2)
    with pytest.raises(ValueError, match=r"state.norm is of torch.float32 and shape \(2,\)"):
        opt.update(params, opt.init(params)._replace(norm=torch.ones(2)), params)


def test_leaves_on_two_devices_share_one_norm():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        params = {"a": torch.ones(2), "b": torch.ones(3, device="meta")}
        opt = Clip(AdamW(), 0.5)
        state = opt.init(params)
        moved, state = opt.update(clone(params), state, params)
    assert [moved[name].device.type for name in "ab"] == ["cpu", "meta"]
    assert state.norm.device.type == "meta"
