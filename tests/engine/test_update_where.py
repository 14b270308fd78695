"""Updates that are made where a condition holds that is not to be read, as on a GPU."""

import dataclasses
import math

import pytest
import torch

from funcopt import Accumulate, AdamW, Clip, ClipValue, Ema, LossScale, SkipNonfinite
from funcopt._core import tensors, transforms
from funcopt._engine import dispatch, update_if, update_where
from funcopt._engine.rule import Kernel

from ..cases import assert_close, assert_same_bits, clone, leaves, tree_map

INF, NAN = math.inf, math.nan
INNER = AdamW(lr=0.1, kernel="plain")
WRAPPERS = {
    "LossScale": lambda inner: LossScale(inner, init_scale=4.0, growth_interval=2),
    "SkipNonfinite": SkipNonfinite,
    "SkipNonfinite, at most one": lambda inner: SkipNonfinite(inner, 1),
    "Clip": lambda inner: Clip(inner, 0.5, nonfinite="skip"),
    "LossScale, Clip": lambda inner: LossScale(Clip(inner, lambda n: 0.5 / (1 + n)), 4.0),
    "SkipNonfinite, Clip": lambda inner: SkipNonfinite(Clip(inner, 0.5, nonfinite="skip")),
    "Clip, Clip": lambda inner: Clip(Clip(inner, 0.5), 0.7, nonfinite="skip"),
}
SHAPES = {"a": (), "b": (3,), "c": (0,), "d": (5, 7)}


class Deciding:
    """The launcher of a kernel that reads the condition: the equations, and a choice."""

    steps = 0

    def __init__(self, inputs, options):
        self.options = options

    def step(self, inputs, outputs, numbers, new_count=None, applies=None, addresses=None):
        type(self).steps += 1
        before = numbers.step.clone()
        if new_count is not None:  # of which the numbers have the one before
            numbers = numbers._replace(step=before + 1)
        inputs = inputs._replace(grads=tensors.scaled(inputs.grads, numbers.grad_scale))
        news = dispatch.plain_step(AdamW.rule, inputs, numbers, self.options)
        for olds, own, outs in zip(
            inputs.targets.columns, news.columns, outputs.columns, strict=True
        ):
            for old, new, out in zip(olds, own, outs, strict=True):
                out.copy_(torch.where(applies, new, old))
        if new_count is not None:
            new_count.copy_(before + applies)


@pytest.fixture
def device(monkeypatch):
    """Let nothing be read, and a kernel decide, as on a device; count its steps."""
    kernel = Kernel(
        lambda *_: None,
        step_to=lambda *_: None,
        launcher=Deciding,
        counts_on_device=True,
        serves_dtypes=lambda *_: True,
    )
    monkeypatch.setattr(transforms, "on_host", lambda _: False)
    monkeypatch.setitem(AdamW.rule._loaded, "triton", kernel)
    monkeypatch.setattr(Deciding, "steps", 0)
    return Deciding


@pytest.fixture
def one_pass(monkeypatch, device):
    """Let whatever chooses afterwards fail."""
    monkeypatch.setattr(update_if, "choose_each", None)
    return device


def gradients(params, bad=None):
    grads = tree_map(torch.randn_like, params)
    if bad is not None:
        grads["b"][1] = bad
    return grads


def make_params(dtypes=(torch.float32,)):
    return {
        name: torch.randn(shape).to(dtypes[index % len(dtypes)])
        for index, (name, shape) in enumerate(SHAPES.items())
    }


CALLS = [None, INF, None, NAN, NAN, None, None]


def expected_run(opt, params, calls):
    """All trees after each call where everything is read, which is known to be right."""
    state, trees = opt.init(params), []
    for grads in calls:
        params, state = opt.update(grads, state, params)
        trees.append(clone((params, state)))
    return trees


def innermost(state):
    return innermost(state.inner) if hasattr(state, "inner") else state


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float64, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", WRAPPERS)
def test_results_are_those_of_a_condition_that_was_read(name, dtypes, request):
    params = make_params(dtypes)
    calls = [gradients(params, bad) for bad in CALLS]
    expected = expected_run(WRAPPERS[name](INNER), params, calls)
    steps_of = request.getfixturevalue("one_pass")
    opt = WRAPPERS[name](dataclasses.replace(INNER, kernel="triton"))
    state = opt.init(params)
    mine = clone((params, state))
    for grads, trees in zip(calls, expected, strict=True):
        before = clone((grads, state, params))
        new_params, new_state = opt.update(grads, state, params)
        assert_same_bits((grads, state, params), before)
        # Numbers that are read round in another place.
        tolerance = 1e-2 if torch.bfloat16 in dtypes else 1e-5
        for one, other in zip(leaves((new_params, new_state)), leaves(trees), strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=1e-7, equal_nan=True)
        if torch.equal(innermost(new_state).step, innermost(state).step):
            assert_same_bits((new_params, new_state.inner), (params, state.inner))
        opt.update_(grads, mine[1], mine[0])
        assert_same_bits(mine, (new_params, new_state))
        params, state = new_params, new_state
    assert steps_of.steps == 2 * len(calls) * len(dtypes)


@pytest.mark.parametrize("method", ["update", "update_"])
def test_a_leaf_without_a_gradient_is_left_alone(method, one_pass):
    params = make_params()
    opt = SkipNonfinite(AdamW(lr=0.1, kernel="triton"))
    state = opt.init(params)
    grads = {**gradients(params), "b": None}
    before = clone(params["b"])
    new_params, new_state = getattr(opt, method)(grads, state, params)
    assert_same_bits(new_params["b"], before)
    assert (new_params["b"] is params["b"]) == (method == "update_")
    assert new_state.inner.step == 1
    assert one_pass.steps == 1


def test_parameters_that_require_a_gradient_grow_no_graph(one_pass):
    params = tree_map(lambda p: p.requires_grad_(), make_params())
    opt = SkipNonfinite(AdamW(lr=0.1, kernel="triton"))
    state = opt.init(params)
    for bad in (None, NAN):
        new_params, state = opt.update(gradients(params, bad), state, params)
        assert all(leaf.requires_grad and leaf.is_leaf for leaf in leaves(new_params))
        assert not any(leaf.requires_grad for leaf in leaves(state))
    opt.update_(gradients(params), state, params)
    assert one_pass.steps == 3


def test_writing_in_place_is_seen_by_autograd(one_pass):
    params = make_params()
    opt = SkipNonfinite(AdamW(kernel="triton"))
    state = opt.init(params)
    versions = [leaf._version for leaf in leaves((params, state.inner))]
    opt.update_(gradients(params), state, params)
    for leaf, version in zip(leaves((params, state.inner)), versions, strict=True):
        assert leaf._version > version


NOT_IN_ONE_PASS = {
    "a wrapper": Clip(AdamW(lr=0.1, kernel="plain"), 0.5),
    "another wrapper": ClipValue(AdamW(lr=0.1, kernel="plain"), 0.5),
    "an average": Ema(AdamW(lr=0.1, kernel="plain"), 0.5),
    "sums": Accumulate(AdamW(lr=0.1, kernel="plain"), 2),
    "a count for each leaf": AdamW(lr=0.1, kernel="plain", step_per_leaf=True),
    "another kernel": AdamW(lr=0.1, kernel="plain"),
    "recorded": AdamW(lr=0.1, kernel="plain", differentiable=True),
}


@pytest.mark.parametrize("name", NOT_IN_ONE_PASS)
def test_others_are_chosen_afterwards(name, request):
    params, inner = make_params(), NOT_IN_ONE_PASS[name]
    calls = [gradients(params, bad) for bad in (None, NAN, None)]
    opt = SkipNonfinite(inner)
    expected = expected_run(opt, params, calls)
    steps_of = request.getfixturevalue("device")
    state = opt.init(params)
    for grads, (right_params, right_state) in zip(calls, expected, strict=True):
        params, state = opt.update(grads, state, params)
        assert_close((params, state), (right_params, right_state), rtol=1e-5)
    assert steps_of.steps == 0


def test_a_derivative_is_not_lost(device):
    params = make_params()
    lr = torch.tensor(0.1, requires_grad=True, dtype=torch.float64)
    opt = SkipNonfinite(AdamW(lr=lr))
    new_params, _ = opt.update(gradients(params), opt.init(params), params)
    (slope,) = torch.autograd.grad(new_params["d"].sum(), lr)
    assert slope != 0
    assert device.steps == 0


@pytest.mark.parametrize("fault", ["tied", "history", "another key", "shared count"])
def test_what_cannot_be_written_is_refused_before_anything_is(fault, one_pass):
    params = make_params()
    opt = SkipNonfinite(AdamW(kernel="triton"))
    state, grads = opt.init(params), gradients(params)
    if fault == "tied":
        params["b"] = params["d"][0, :3]
    if fault == "history":
        state.inner.exp_avg["d"] = state.inner.exp_avg["d"].requires_grad_()
    if fault == "another key":
        grads["e"] = grads.pop("d")
    if fault == "shared count":
        params["a"] = state.inner.step
        grads["a"] = torch.ones((), dtype=torch.float64)
        state.inner.exp_avg["a"] = state.inner.exp_avg_sq["a"] = grads["a"]
    before = clone((params, state))
    with pytest.raises((RuntimeError, ValueError)):
        opt.update_(grads, state, params)
    assert_same_bits((params, state), before)
    assert one_pass.steps == 0


def test_under_a_transform_nothing_is_tried(device):
    applies, params = torch.tensor(True), make_params()
    opt = AdamW()
    state = opt.init(params)

    def tried(params):
        found = update_where.update_where(
            applies, opt, gradients(params), None, state, params, in_place=False
        )
        assert found is None
        return params["a"]

    torch.func.grad(tried)(params)


@pytest.mark.parametrize("wrapper", ["LossScale", "SkipNonfinite"])
def test_a_step_like_the_one_before_is_recalled(wrapper, device, monkeypatch):
    opt, params = WRAPPERS[wrapper](AdamW(lr=0.1, kernel="triton")), make_params()
    state = opt.init(params)
    params, state = opt.update(gradients(params), state, params)
    monkeypatch.setattr(update_where, "_update_carefully", None)
    for bad in (None, NAN, None):
        grads = gradients(params, bad)
        expected = opt.update(grads, state, params)
        opt.update_(grads, state, params)
        assert_same_bits((params, state), expected)
    assert innermost(state).step.item() == 3
