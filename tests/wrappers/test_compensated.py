"""Compensated parameters. What is true of `MasterWeights`, too, is in `test_master_weights.py`."""

import math

import pytest
import torch

from funcopt import SGD, Adam, AdamW, Compensated, Lion, MasterWeights

from ..cases import assert_same_bits, clone, random_like, run, tree_map

NARROW = [torch.float16, torch.bfloat16]
narrow = pytest.mark.parametrize("dtype", NARROW, ids=str)
both_ways = pytest.mark.parametrize("method", ["update", "update_"])


def ulps_apart(one, other):
    """How many numbers of their dtype lie from one to the other, of positive numbers."""
    return (one.view(torch.int16).int() - other.view(torch.int16).int()).abs().max()


def steps(opt, method, params, gradients):
    state = opt.init(params)
    for grads in gradients:
        params, state = getattr(opt, method)(grads, state, params)
    return params, state


@both_ways
@narrow
@pytest.mark.parametrize("slope", [0.1, -0.1])
def test_steps_far_below_half_an_ulp_add_up_to_within_one(slope, dtype, method):
    opt, start = SGD(lr=1e-3), torch.linspace(1, 2, 50).to(dtype)
    gradients = [torch.full_like(start, slope)] * 1000
    if dtype is torch.bfloat16:
        assert torch.equal(steps(opt, method, start.clone(), gradients)[0][1:], start[1:])
    expected, _ = run(opt, start.float(), [grad.float() for grad in gradients])
    moved, _ = steps(Compensated(opt), method, start.clone(), gradients)
    assert ulps_apart(moved, expected.to(dtype)) <= 1


@pytest.mark.parametrize("inner", [SGD(lr=1e-3, momentum=0.9), Adam(1e-4), AdamW(1e-4), Lion(1e-5)])
def test_many_steps_stay_within_an_ulp_of_master_weights(inner):
    params = torch.linspace(1.0, 3.0, 999).bfloat16()
    gradients = [0.1 * random_like(params) for _ in range(300)]
    expected, _ = run(MasterWeights(inner), params, gradients)
    moved, _ = run(Compensated(inner), params, gradients)
    assert ulps_apart(moved, expected) <= 1
    assert (moved == expected).float().mean() > 0.9


@narrow
@pytest.mark.parametrize("inner", [SGD(lr=1e-3), AdamW(lr=1e-3)], ids=["SGD", "AdamW"])
def test_each_step_is_the_inner_one_from_the_sum_split_into_two(inner, dtype):
    opt, params = Compensated(inner), torch.randn(2000).to(dtype)
    state = opt.init(params)
    for _ in range(5):
        grads = random_like(params)
        sums = params.float() + state.compensation.float()
        wide, inner_state = inner.update(grads.float(), state.inner, sums)
        params, state = opt.update(grads, state, params)
        assert_same_bits(state.inner, inner_state)
        assert_same_bits(params, wide.to(dtype))
        lost = (wide - params.float()).to(dtype)
        just_half = (params.float() + lost.float()).to(dtype) != params
        assert torch.equal(state.compensation[~just_half], lost[~just_half])
        assert just_half.float().mean() < 0.02
        assert state.compensation.dtype is dtype


@narrow
def test_a_parameter_is_the_rounded_sum_of_itself_and_its_compensation(dtype):
    """Also where rounding the compensation comes to half a unit, between two neighbours."""
    kind = torch.finfo(dtype)
    opt, below = Compensated(SGD(lr=1.0)), 1 - 2.0**-12
    large = torch.tensor(
        [1 + kind.eps, 3 + 2 * kind.eps, 1.0, 64 * kind.smallest_normal], dtype=dtype
    )
    params = torch.cat([large, -large])
    # A state whose sum is a little less than half way to the neighbour, by an inner step of that.
    halves = params.float() * 0
    exponent = torch.floor(params.float().abs().log2())
    halves = torch.exp2(exponent) * kind.eps / 2
    for sign in (1, -1):

        class Push:
            def init(self, params):
                return ()

            def update(self, grads, state, params, sign=sign):
                return params + sign * halves * below, state

            def update_(self, grads, state, params):
                raise NotImplementedError

        push = Compensated(Push())
        moved, state = push.update(params, push.init(params), params)
        sums = moved.float() + state.compensation.float()
        assert_same_bits(sums.to(dtype), moved)
        assert (state.compensation != 0).any()
        zero, still = torch.zeros_like(params), opt.init(params)
        still = still._replace(compensation=state.compensation)
        again, after = opt.update(zero, still, moved)
        assert_same_bits((again, after.compensation), (moved, state.compensation))


@narrow
def test_a_step_of_nothing_changes_no_bit(dtype):
    opt, params = Compensated(SGD(lr=0.1)), torch.randn(20000).to(dtype)
    params, state = run(opt, params, [random_like(params) for _ in range(3)])
    again, after = opt.update(torch.zeros_like(params), state, params)
    assert_same_bits((again, after.compensation), (params, state.compensation))


@both_ways
@pytest.mark.parametrize("slope", [-math.inf, math.inf, math.nan, -60000.0])
def test_what_is_not_finite_stays_so_without_a_compensation(slope, method):
    params = torch.tensor([60000.0, 1.0], dtype=torch.float16)
    grads = torch.tensor([slope, 0.1], dtype=torch.float16)
    opt = Compensated(SGD(lr=1.0))
    expected = SGD(lr=1.0).update(grads.float(), SGD(lr=1.0).init(params), params.float())[0]
    moved, state = getattr(opt, method)(grads, opt.init(params), params.clone())
    assert_same_bits(moved, expected.half())
    assert not moved[0].isfinite()
    assert state.compensation[0] == 0
    assert state.compensation[1] != 0
    again, state = getattr(opt, method)(torch.zeros_like(grads), state, moved.clone())
    assert_same_bits(again, moved)
    assert state.compensation.isfinite().all()


@both_ways
def test_wider_leaves_have_a_compensation_that_stays_0(method):
    params = {"w": torch.randn(3), "z": torch.randn(2, dtype=torch.complex64), "h": torch.ones(2)}
    params["h"] = params["h"].bfloat16()
    gradients = [random_like(params) for _ in range(3)]
    _, state = steps(Compensated(AdamW(lr=1e-3)), method, clone(params), gradients)
    assert not state.compensation["w"].any()
    assert not state.compensation["z"].any()
    assert state.compensation["h"].any()
    assert tree_map(lambda t: t.dtype, state.compensation) == tree_map(lambda t: t.dtype, params)
