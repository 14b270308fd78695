"""Adaptive clipping: optax's numbers up to the layout of weights, unit by unit."""

import math

import pytest
import torch
from torch.func import grad, vmap

from funcopt import AdamW, ClipAdaptive, interop

from ..cases import assert_close, assert_same_bits, clone, leaves, random_like, tree_map, trees

# Without running means, exp_avg is the gradient that the inner optimizer was given, to the bit.
SHOWING = AdamW(lr=0.1, betas=(0.0, 0.0), moments=None)
INF, NAN = math.inf, math.nan


def clipped(opt, grads, params):
    """Return the gradients that the inner optimizer was given."""
    return opt.update(grads, opt.init(params), params)[1].inner.exp_avg


def by_hand(grad, param, clipping, eps=1e-3):
    """Return a clipped gradient, one unit after the other, in float64."""
    if grad.ndim > 1:
        units = [by_hand(g, p, clipping, eps) for g, p in zip(grad, param, strict=True)]
        return torch.stack(units) if units else grad
    return one_unit(grad, param, clipping, eps)


def one_unit(grad, param, clipping, eps):
    wide = torch.complex128 if grad.is_complex() else torch.float64
    norm = grad.to(wide).abs().square().sum().sqrt().item()
    most = clipping * max(param.to(wide).abs().square().sum().sqrt().item(), eps)
    return grad if norm <= most else (grad.to(wide) * (most / max(norm, 1e-6))).to(grad.dtype)


def units_by_hand(grad, param, clipping, eps=1e-3):
    """The same where a unit has several dimensions."""
    flat = (t.flatten(1) if t.ndim > 1 else t for t in (grad, param))
    return by_hand(*flat, clipping, eps).reshape(grad.shape)


SHAPES = [(), (5,), (4, 3), (1, 6), (6, 1), (3, 2, 4), (3, 2, 2, 2), (2, 1, 2, 2, 2), (0,)]
SHAPES += [(0, 3), (3, 0)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES += [torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clipping", [0.0, 0.3, 1.0, 1e6, torch.tensor(0.3, dtype=torch.float64)])
def test_each_unit_is_held_to_a_fraction_of_its_parameters(clipping, dtype):
    params = [torch.randn(shape).to(dtype) for shape in SHAPES]
    grads = [torch.randn(shape).to(dtype) for shape in SHAPES]
    given = clone((grads, params))
    ours = clipped(ClipAdaptive(SHOWING, clipping), grads, params)
    rtol = 4 * torch.finfo(dtype).eps
    for own, g, p in zip(ours, grads, params, strict=True):
        assert own.dtype is dtype
        assert_close(own, units_by_hand(g, p, float(clipping)), rtol=rtol, atol=1e-7)
    assert_same_bits((grads, params), given)


def test_the_layout_of_memory_does_not_matter():
    conv = torch.randn(6, 4, 3, 2).to(memory_format=torch.channels_last)
    turned, matrix = torch.randn(2, 3, 4, 6).permute(3, 2, 1, 0), torch.randn(5, 4).T
    params, grads = [conv, turned, matrix], [turned.clone(), conv, torch.randn(8, 5)[::2]]
    ours = clipped(ClipAdaptive(SHOWING, 0.3), grads, params)
    for own, g, p in zip(ours, grads, params, strict=True):
        assert_close(own, units_by_hand(g, p, 0.3))


def test_units_within_keep_their_bits_also_beside_units_that_are_clipped():
    params = torch.tensor([[3.0, 4.0], [0.03, 0.04]])
    grads = torch.tensor([[0.1, 0.7], [0.1, 0.7]])
    both = {"w": grads, "b": grads[0].clone()}, {"w": params, "b": params[0].clone()}
    ours = clipped(ClipAdaptive(SHOWING, 0.5), *both)
    assert_same_bits([ours["w"][0], ours["b"]], [grads[0], grads[0]])
    assert_close(ours["w"][1].norm(), torch.tensor(0.025))


def test_gradients_of_which_no_unit_is_clipped_are_not_copied():
    class Seeing(AdamW):
        def update(self, grads, state, params):
            seen.append(grads)
            return super().update(grads, state, params)

    seen = []
    params = {"a": torch.ones(2, 3), "b": torch.ones(3), "c": torch.ones(0, 3), "d": torch.ones(2)}
    grads = {name: torch.full_like(p, 0.1) for name, p in params.items()} | {"b": torch.ones(3)}
    opt = ClipAdaptive(Seeing(), 0.5)
    opt.update(grads, opt.init(params), params)
    assert [name for name in params if seen[0][name] is grads[name]] == ["a", "c", "d"]


@pytest.mark.parametrize("bad", [INF, NAN])
def test_what_is_not_finite_makes_its_own_unit_nan(bad):
    grads = torch.tensor([[1.0, bad], [0.0, 0.1]])
    ours = clipped(ClipAdaptive(SHOWING, 0.5), [grads], [torch.ones(2, 2)])[0]
    assert ours[0, 1].isnan()
    assert_same_bits(ours[1], grads[1])


def test_a_leaf_without_gradient_is_left_to_the_inner_optimizer():
    params = [torch.ones(2, 2), torch.ones(3)]
    opt = ClipAdaptive(AdamW(lr=0.1), 0.5)
    moved, state = opt.update([None, torch.ones(3)], opt.init(params), params)
    assert_same_bits((moved[0], state.inner.exp_avg[0]), (params[0], torch.zeros(2, 2)))
    assert_close(state.inner.exp_avg[1], torch.full((3,), 0.05))
    opt.update([None, None], opt.init(params), params)


@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_optax_gives_the_same_on_transposed_weights_over_20_steps(eps):
    optax = pytest.importorskip("optax", reason="optax comes with the extra `benchmark` alone")
    numpy = pytest.importorskip("numpy")

    def turned(tensor):
        """Outputs last: (in, out), HWIO."""
        return tensor.permute(*range(2, tensor.ndim), 1, 0) if tensor.ndim > 1 else tensor

    def back(tensor):
        last = tensor.ndim - 1
        return tensor.permute(last, last - 1, *range(last - 1)) if tensor.ndim > 1 else tensor

    shapes = {"linear": (4, 3), "conv": (5, 2, 3, 3), "conv3d": (2, 3, 2, 2, 2), "bias": (4,)}
    params = {name: torch.randn(shape) for name, shape in shapes.items()} | {
        "gain": torch.zeros(())
    }
    params["linear"][1] = 0.0
    theirs = optax.chain(optax.adaptive_grad_clip(0.1, eps), optax.adamw(0.1, weight_decay=0.01))
    their_params = {name: turned(p).numpy() for name, p in params.items()}
    their_state = theirs.init(their_params)
    opt = ClipAdaptive(AdamW(lr=0.1), 0.1, eps)
    state = opt.init(params)
    for step in range(20):
        grads = tree_map(lambda g, step=step: g * 0.5**step, random_like(params))
        given = {name: turned(g).numpy() for name, g in grads.items()}
        updates, their_state = theirs.update(given, their_state, their_params)
        their_params = optax.apply_updates(their_params, updates)
        params, state = opt.update(grads, state, params)
        for name, own in params.items():
            assert_close(own, back(torch.from_numpy(numpy.array(their_params[name]))), 1e-4, 1e-5)


def test_members_have_hyperparameters_of_their_own_under_vmap():
    clippings, floors = torch.tensor([0.1, 1.0, 100.0]), torch.tensor([1e-3, 10.0, 1e-3])
    params = {"w": torch.randn(3, 4, 2), "b": torch.randn(3, 2), "g": torch.randn(3)}
    grads = random_like(params)
    opts = ClipAdaptive(AdamW(lr=0.1), clippings, floors)
    state = vmap(lambda opt, p: opt.init(p))(opts, params)
    moved, state = vmap(lambda opt, g, s, p: opt.update(g, s, p))(opts, grads, state, params)
    for i in range(3):
        member = ClipAdaptive(AdamW(lr=0.1), clippings[i].item(), floors[i].item())
        own = {name: p[i] for name, p in params.items()}
        expected = member.update({n: g[i] for n, g in grads.items()}, member.init(own), own)
        assert_close(tree_map(lambda leaf, i=i: leaf[i], (moved, state)), expected)


@pytest.mark.parametrize("limit", [0.3, 50.0])
def test_derivatives_are_the_limits_of_differences(limit):
    torch.manual_seed(0)
    inputs = [torch.tensor(limit), torch.tensor(0.7), torch.randn(3, 2), torch.randn(2)]
    inputs += [torch.tensor([[0.1, 0.2], [2.0, 1.0], [1.0, -3.0]]), torch.randn(2)]
    inputs = [x.double().requires_grad_() for x in inputs]

    def after(clipping, eps, a, b, p, q):
        opt = ClipAdaptive(AdamW(lr=0.1, eps=0.1), clipping, eps)
        return tuple(opt.update([a, b], opt.init([p, q]), [p, q])[0])

    assert torch.autograd.gradcheck(after, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(after, inputs)


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.complex64], ids=str)
def test_derivatives_of_both_orders_are_finite_at_zero(dtype, eps):
    weight = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]).to(dtype)
    slopes = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]).to(dtype)
    scalar, empty = torch.zeros((), dtype=dtype), torch.zeros(0, 3, dtype=dtype)

    def after(clipping, eps, grads, params):
        opt = ClipAdaptive(AdamW(lr=0.1, eps=0.1), clipping, eps)
        moved = opt.update(grads, opt.init(params), params)[0]
        return sum(p.abs().square().sum().float() for p in moved)

    def slope(*args):
        return sum(g.abs().square().sum().float() for g in leaves(grad(after, (0, 1, 2, 3))(*args)))

    args = torch.tensor(0.5), torch.tensor(eps), [slopes, scalar, empty], [weight, scalar, empty]
    for function in (after, slope):
        assert all(g.isfinite().all() for g in leaves(grad(function, (0, 1, 2, 3))(*args)))


def test_one_compiled_graph_takes_every_hyperparameter():
    torch.compiler.reset()
    step = torch.compile(
        lambda clipping, eps, *given: ClipAdaptive(AdamW(lr=0.1), clipping, eps).update(*given),
        fullgraph=True,
        backend="aot_eager",
    )
    params = {"w": torch.randn(3, 2), "b": torch.randn(2)}
    state = ClipAdaptive(AdamW()).init(params)
    for clipping in (0.1, 10.0, 0.5):
        grads = random_like(params)
        result = step(torch.tensor(clipping), torch.tensor(1e-3), grads, state, params)
        expected = ClipAdaptive(AdamW(lr=0.1), clipping).update(grads, state, params)
        assert_close(result, expected)
        torch.compiler.set_stance("fail_on_recompile")
    torch.compiler.set_stance("default")


def test_a_compiled_step_in_place_is_the_pure_one():
    torch.compiler.reset()
    opt = ClipAdaptive(AdamW(lr=0.1), 0.5)
    params = {"w": torch.randn(3, 2), "b": torch.randn(2)}
    own, state = clone(params), opt.init(params)
    step = torch.compile(opt.update_, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        grads = random_like(params)
        expected = opt.update(grads, clone(state), clone(own))
        step(grads, state, own)
        assert_close((own, state), expected)


def test_a_checkpoint_goes_on_to_the_bit():
    opt = ClipAdaptive(AdamW(lr=0.1), 0.5)
    params = trees()["nested"]
    params, state = opt.update(random_like(params), opt.init(params), params)
    loaded = interop.from_state_dict(opt.init(params), interop.to_state_dict(state))
    grads = random_like(params)
    assert_same_bits(opt.update(grads, loaded, params), opt.update(grads, state, params))


def test_parameters_that_require_a_gradient_grow_no_graph():
    """Though the norms are those of the parameters, which are what requires it."""
    opt = ClipAdaptive(AdamW(lr=0.1), 0.01)
    params = {"w": torch.ones(3, 2, requires_grad=True)}
    state = opt.init(params)
    for _ in range(2):
        grads = grad(lambda p: p["w"].pow(2).sum())(params)
        assert grads["w"].requires_grad  # torch.func.grad leaves a history at a parameter
        params, state = opt.update(grads, state, params)
        assert params["w"].is_leaf
        assert params["w"].requires_grad
        assert not any(leaf.requires_grad for leaf in leaves(state))
    stacked = torch.ones(2, 3, requires_grad=True)
    moved, state = vmap(opt.update)(stacked.detach(), vmap(opt.init)(stacked), stacked)
    assert not any(leaf.requires_grad for leaf in leaves((moved, state)))


def test_what_is_asked_to_be_differentiated_is_followed_through_the_parameters_too():
    params = torch.tensor([[1.0, 2.0]], requires_grad=True)
    opt = ClipAdaptive(AdamW(lr=0.1, eps=1.0, differentiable=True), 0.1)
    moved = opt.update(torch.ones(1, 2), opt.init(params), params)[0]
    (recorded,) = torch.autograd.grad(moved.sum(), params)
    ours = grad(lambda p: opt.update(torch.ones(1, 2), opt.init(p), p)[0].sum())(params.detach())
    assert_close(recorded, ours)
    assert (ours - (1 - 0.1 * 0.01)).abs().min() > 1e-4  # more than weight decay


def test_update_in_place_refuses_before_it_writes():
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    learnt = ClipAdaptive(AdamW(), eps=torch.tensor(0.5, requires_grad=True))
    opt = ClipAdaptive(AdamW())
    state = opt.init(params)
    before = clone((state, params))
    asked = {"a": torch.ones(2), "b": torch.ones(3, requires_grad=True)}
    for optimizer, grads, own_state, error, words in (
        (learnt, params, state, RuntimeError, "eps requires a gradient"),
        (opt, asked, state, RuntimeError, r"grads\['b'\] requires a gradient"),
        (opt, {"a": params["a"], "b": torch.ones(2)}, state, ValueError, r"grads\['b'\]: shape"),
        (opt, params, state.inner, TypeError, "ClipAdaptiveState"),
    ):
        with pytest.raises(error, match=words):
            optimizer.update_(grads, own_state, params)
    assert_same_bits((state, params), before)


@pytest.mark.parametrize("name", ["clipping", "eps"])
def test_bad_values_are_refused(name):
    for value in (-1.0, NAN, INF, "1", None):
        with pytest.raises((TypeError, ValueError), match=f"{name}="):
            ClipAdaptive(AdamW(), **{name: value})
    stacked = ClipAdaptive(AdamW(), **{name: torch.ones(2)})
    with pytest.raises(ValueError, match=rf"{name} has shape \(2,\)"):
        stacked.update(torch.ones(2), stacked.init(torch.ones(2)), torch.ones(2))


def test_leaves_on_two_devices_are_clipped_where_they_are():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        params = {"a": torch.ones(2), "b": torch.ones(3, device="meta")}
        opt = ClipAdaptive(AdamW())
        moved, _ = opt.update(clone(params), opt.init(params), params)
    assert [moved[name].device.type for name in "ab"] == ["cpu", "meta"]
