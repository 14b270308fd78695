"""Clipping by value: the numbers of torch and optax, element by element."""

import math

import pytest
import torch
from torch.func import vmap

from funcopt import AdamW, ClipValue, ClipValueState, interop

from ..cases import assert_close, assert_same_bits, clone, leaves, random_like, tree_map, trees

# Without running means, exp_avg is the gradient that the inner optimizer was given, to the bit.
SHOWING = AdamW(lr=0.1, betas=(0.0, 0.0), moments=None)


def clipped(opt, grads, params):
    """Return the gradients that the inner optimizer was given."""
    return opt.update(grads, opt.init(params), params)[1].inner.exp_avg


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("max_value", [0.0, 0.5, torch.tensor(0.5, dtype=torch.float64), 6e4])
def test_bits_are_torchs(max_value, dtype):
    grad = torch.tensor([-3.0, -0.5, -0.1, 0.0, 0.4, 1e3, math.inf, -math.inf, math.nan]).to(dtype)
    param = torch.nn.Parameter(torch.zeros_like(grad))
    param.grad = grad.clone()
    torch.nn.utils.clip_grad_value_([param], float(max_value))
    given = clone([grad])
    state = ClipValue(SHOWING, max_value).init([param.detach()])
    ours = clipped(ClipValue(SHOWING, max_value), given, [param.detach()])
    assert_same_bits(ours, [param.grad])
    assert_same_bits(given, [grad])
    assert state == (state.inner, ())


def test_a_value_beyond_the_range_of_a_dtype_clips_nothing():
    """Torch refuses it."""
    grad = torch.tensor([-6e4, 1.0], dtype=torch.float16)
    for value in (1e9, torch.tensor(1e9)):
        assert_same_bits(clipped(ClipValue(SHOWING, value), grad, torch.zeros_like(grad)), grad)


def test_complex_gradients_are_pairs_of_real_ones_and_none_passes():
    grads = [torch.tensor([3.0 - 0.25j, 0.125 - 9.0j]).conj(), None]
    params = [torch.zeros(2, dtype=torch.complex64), torch.ones(2)]
    ours = clipped(ClipValue(SHOWING, 0.5), grads, params)
    assert_same_bits(ours, [torch.tensor([0.5 + 0.25j, 0.125 + 0.5j]), torch.zeros(2)])


def test_optax_gives_the_same_over_20_steps():
    optax = pytest.importorskip("optax", reason="optax comes with the extra `benchmark` alone")
    numpy = pytest.importorskip("numpy")
    params = {"b": torch.randn(3), "a": torch.randn(2, 3)}
    clip = optax.clip(0.5)
    state = clip.init({name: p.numpy() for name, p in params.items()})
    for _ in range(20):
        grads = random_like(params)
        theirs, state = clip.update({name: g.numpy() for name, g in grads.items()}, state)
        for name, own in clipped(ClipValue(SHOWING, 0.5), grads, params).items():
            assert_same_bits(own, torch.from_numpy(numpy.array(theirs[name])))


def test_members_have_values_of_their_own_under_vmap():
    values = torch.tensor([0.1, 1.0, 100.0])
    params = torch.randn(3, 4)
    grads = torch.randn(3, 4)
    opts = ClipValue(AdamW(lr=0.1), values)
    state = vmap(lambda opt, p: opt.init(p))(opts, params)
    moved, state = vmap(lambda opt, g, s, p: opt.update(g, s, p))(opts, grads, state, params)
    for i in range(3):
        member = ClipValue(AdamW(lr=0.1), values[i].item())
        expected = member.update(grads[i], member.init(params[i]), params[i])
        assert_close(tree_map(lambda leaf, i=i: leaf[i], (moved, state)), expected)


def test_derivatives_are_the_limits_of_differences():
    params = torch.ones(5, dtype=torch.float64)

    def after(max_value, grads):
        opt = ClipValue(AdamW(lr=0.1, eps=0.1), max_value)
        return opt.update(grads, opt.init(params), params)[0]

    limit = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    grads = torch.tensor([-2.0, -0.3, 0.1, 0.7, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(after, (limit, grads), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(after, (limit, grads))


def test_a_checkpoint_goes_on_to_the_bit():
    opt = ClipValue(AdamW(lr=0.1), 0.5)
    params = trees()["nested"]
    params, state = opt.update(random_like(params), opt.init(params), params)
    saved = interop.to_state_dict(state)
    loaded = interop.from_state_dict(opt.init(params), saved)
    grads = random_like(params)
    assert_same_bits(opt.update(grads, loaded, params), opt.update(grads, state, params))


def test_parameters_that_require_a_gradient_stay_leaves_without_history():
    opt = ClipValue(AdamW(lr=0.1), 0.5)
    params = torch.ones(3, requires_grad=True)
    state = opt.init(params)
    for _ in range(2):
        params, state = opt.update(torch.ones(3), state, params)
        assert params.is_leaf
        assert params.requires_grad
        assert not any(leaf.requires_grad for leaf in leaves(state))


def test_update_in_place_refuses_before_it_writes():
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    learnt = ClipValue(AdamW(), torch.tensor(0.5, requires_grad=True))
    opt = ClipValue(AdamW(), 0.5)
    state = opt.init(params)
    before = clone((state, params))
    asked = {"a": torch.ones(2), "b": torch.ones(3, requires_grad=True)}
    for optimizer, grads, own_state, error, words in (
        (learnt, params, state, RuntimeError, "max_value requires a gradient"),
        (opt, asked, state, RuntimeError, r"grads\['b'\] requires a gradient"),
        (opt, {"a": params["a"], "b": torch.ones(2)}, state, ValueError, r"grads\['b'\]: shape"),
        (opt, params, state.inner, TypeError, "ClipValueState"),
    ):
        with pytest.raises(error, match=words):
            optimizer.update_(grads, own_state, params)
    assert_same_bits((state, params), before)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "1", None])
def test_bad_values_are_refused(value):
    with pytest.raises((TypeError, ValueError), match=r"max_value="):
        ClipValue(AdamW(), value)


@pytest.mark.parametrize("value", [0.4, 0.6, math.nan])
def test_a_large_gradient_is_copied_only_if_an_element_is_held(value):
    class Keeping:
        def init(self, params):
            return ()

        def update(self, grads, state, params):
            self.given = grads
            return params, state

        update_ = update

    grad = torch.full((1 << 23,), 0.25)
    grad[-1] = value
    inner = Keeping()
    ClipValue(inner, 0.5).update(grad, ClipValueState(()), torch.zeros(1 << 23))
    assert (inner.given is grad) == (value == 0.4)
    assert_same_bits(inner.given, grad.clamp(-0.5, 0.5))
