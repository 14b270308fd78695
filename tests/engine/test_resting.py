"""Leaves at rest: to wrappers they have no gradient, whatever was given, and may be of any kind."""

import math
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from funcopt import (
    Accumulate,
    AdamW,
    Best,
    Cautious,
    Clip,
    ClipAdaptive,
    ClipValue,
    Compensated,
    Ema,
    Frozen,
    Lookahead,
    LossScale,
    MasterWeights,
    Partition,
    ScheduleFree,
    SkipNonfinite,
    averaged,
    find,
    interop,
)
from funcopt.distributed import LocalUpdates, Zero1, update_in_backward
from funcopt.wrappers import _finite

from ..cases import assert_close, assert_same_bits, clone, faded, leaves, tree_map
from ..groups import Halved

MOVING = AdamW(lr=0.1)

WRAPPERS = {
    "Clip": lambda opt: Clip(opt, 0.5),
    "Clip to the largest": lambda opt: Clip(opt, 0.5, math.inf),
    "Clip that skips": lambda opt: Clip(opt, 0.5, nonfinite="skip"),
    "ClipValue": lambda opt: ClipValue(opt, 0.1),
    "ClipAdaptive": lambda opt: ClipAdaptive(opt, 0.1),
    "Accumulate": lambda opt: Accumulate(opt, 2),
    "Ema": lambda opt: Ema(opt, 0.5),
    "Lookahead": lambda opt: Lookahead(opt, 2),
    "Lookahead that restarts": lambda opt: Lookahead(opt, 2, reset_state=True),
    "Best": lambda opt: Best(opt, patience=2),
    "MasterWeights": MasterWeights,
    "Compensated": Compensated,
    "Transform": faded,
    "ScheduleFree": ScheduleFree,
    "Cautious": Cautious,
    "SkipNonfinite": SkipNonfinite,
    "LossScale": lambda opt: LossScale(opt, 2.0, growth_interval=2),
    "LocalUpdates": lambda opt: LocalUpdates(opt, 2, None),
    "LocalUpdates with momentum": lambda opt: LocalUpdates(opt, 2, None, 0.7, 0.9),
    "several": lambda opt: Ema(Accumulate(SkipNonfinite(Clip(Lookahead(opt, 2), 0.5)), 2), 0.5),
}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
both_ways = pytest.mark.parametrize("method", ["update", "update_"])

# What `grad` gives for what is frozen, and what it may be given as instead.
FROZEN = {"body": [torch.ones(2), torch.ones(3)], "n": torch.ones(1)}
GIVEN = {
    "large": {"body": [torch.full((2,), 300.0), torch.full((3,), 400.0)], "n": torch.ones(1)},
    "not finite": {"body": [torch.full((2,), math.nan), torch.full((3,), -math.inf)], "n": None},
    "None": {"body": [None, None], "n": None},
    "of another kind": {"body": [torch.ones(5), torch.ones(3).half()], "n": torch.ones(1).int()},
    "with a history": {
        "body": [torch.ones(2, requires_grad=True) * 2, torch.ones(3, requires_grad=True)],
        "n": None,
    },
    "missing": {},
}


def groups(inner=MOVING):
    return Partition({"on": inner, "off": Frozen()}, lambda n, _: "on" if n == "head" else "off")


def nested(inner=MOVING):
    """The same, where what is frozen is so within a group and beneath a wrapper."""
    within = Partition({"on": inner, "off": Frozen()}, lambda n, _: "on" if n == "head" else "off")
    return Partition(
        {"some": within, "off": Clip(Frozen(), 1.0)},
        lambda n, _: "off" if n == "body.1" else "some",
    )


def gradients(steps=5):
    return [torch.randn(4) for _ in range(steps)]


def alone(wrap, start, steps, method):
    """Train the moving leaf without any other."""
    params = {"head": start.clone()}
    opt = wrap(MOVING)
    state = opt.init(params)
    for own in steps:
        params, state = getattr(opt, method)({"head": own}, state, params)
    return params["head"], state


@both_ways
@pytest.mark.parametrize("build", [groups, nested])
@pytest.mark.parametrize("given", GIVEN)
@every_wrapper
def test_what_moves_moves_as_if_it_were_alone(wrap, given, build, method):
    start, steps = torch.randn(4), gradients()
    expected, alone_state = alone(wrap, start, steps, method)
    params = {
        "body": [torch.randn(2), torch.randn(3)],
        "n": torch.tensor([7]),
        "head": start.clone(),
    }
    frozen, before = leaves([params["body"], params["n"]]), clone([params["body"], params["n"]])
    versions = [leaf._version for leaf in frozen]
    opt = wrap(build())
    state = opt.init(params)
    for own in steps:
        params, state = getattr(opt, method)({**GIVEN[given], "head": own}, state, params)
    assert_same_bits(params["head"], expected)
    assert_same_bits([params["body"], params["n"]], before)
    if not isinstance(opt, LocalUpdates):  # whose processes meet in all that has a mean
        assert all(
            a is b for a, b in zip(leaves([params["body"], params["n"]]), frozen, strict=True)
        )
        assert [leaf._version for leaf in frozen] == versions
    for name in ("norm", "scale", "total", "consecutive", "last_finite"):
        for path, value in (find(alone_state, name) if holds(alone_state, name) else {}).items():
            assert_same_bits(find(state, name)[path], value)


def holds(state, name):
    try:
        return bool(find(state, name))
    except KeyError:
        return False


def test_the_norm_is_torchs_of_those_that_require_a_gradient():
    params = {"body": nn.Parameter(torch.ones(2)), "head": nn.Parameter(torch.ones(2))}
    params["body"].requires_grad_(False)
    params["head"].grad = torch.tensor([0.3, 0.4])
    norm = nn.utils.clip_grad_norm_(params.values(), 0.25)
    opt = Clip(groups(AdamW(betas=(0.0, 0.0))), 0.25)
    own = tree_map(torch.Tensor.detach, params)
    grads = grad(lambda p: 300 * p["body"][0] + 400 * p["body"][1] + p["head"] @ WEIGHTS)(own)
    assert grads["body"].norm() == 500
    _, state = opt.update(grads, opt.init(own), own)
    assert_same_bits(state.norm, norm.detach())
    assert_same_bits(find(state, "exp_avg").popitem()[1]["head"], params["head"].grad)


WEIGHTS = torch.tensor([0.3, 0.4])


@every_wrapper
def test_a_tree_of_which_all_is_frozen_rests(wrap):
    params = [torch.ones(2), torch.tensor(3), torch.tensor([True])]
    opt = wrap(Frozen())
    state = opt.init(params)
    for method in ("update", "update_"):
        moved, state = getattr(opt, method)([torch.ones(9), None, None], state, params)
        assert_same_bits(moved, params)


@both_ways
@every_wrapper
def test_a_leaf_that_moves_is_still_checked(wrap, method):
    params = {"body": torch.tensor([1, 2]), "head": torch.ones(2)}
    opt = wrap(groups())
    state = opt.init(params)
    update = getattr(opt, method)
    for grads, message in (
        ({"body": None}, r"no grads\['head'\] for params\['head'\]"),
        ({"head": torch.ones(3)}, r"grads\['head'\]: shape \(3,\), the parameter has \(2,\)"),
        ({"head": torch.ones(2), "other": None}, r"grads\['other'\] without a parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            update(grads, state, params)
    wrong = {"body": torch.ones(2), "head": torch.tensor([1, 2])}
    for attempt in (lambda: opt.init(wrong), lambda: update(wrong, state, wrong)):
        with pytest.raises(TypeError, match=r"params\['head'\] has dtype torch.int64"):
            attempt()
    assert torch.equal(params["head"], torch.ones(2))


# What the trees of wrappers hold for them.


@both_ways
@pytest.mark.parametrize("debias", [False, True])
def test_the_average_of_a_leaf_at_rest_is_that_leaf(debias, method):
    """As torch's AveragedModel keeps its buffers, which are not averaged, those of the model."""
    params = {
        "body": torch.randn(2).bfloat16(),
        "mean": torch.randn(3),
        "seen": torch.tensor(0),
        "head": torch.ones(2),
    }
    opt = Ema(groups(), 0.5, debias)
    state = opt.init(params)
    dtypes = {"body": torch.float32, "mean": torch.float32, "seen": torch.int64}
    for count in range(3):
        params = {**params, "mean": torch.randn(3), "seen": torch.tensor(count)}
        params, state = getattr(opt, method)({"head": torch.ones(2)}, state, params)
        assert {name: state.average[name].dtype for name in dtypes} == dtypes
        assert_same_bits(state.average["body"], params["body"].float())
        for name in ("mean", "seen"):
            assert_same_bits(state.average[name], params[name])
            assert state.average[name].data_ptr() != params[name].data_ptr()
        found = averaged(state, params)
        assert_same_bits({name: found[name] for name in dtypes}, {n: params[n] for n in dtypes})


@both_ways
def test_a_slow_leaf_at_rest_becomes_that_leaf_at_each_meeting(method):
    params = {"mean": torch.ones(3), "seen": torch.tensor(0), "head": torch.ones(2)}
    opt = Lookahead(groups(), 2)
    state = opt.init(params)
    for count in range(1, 5):
        fresh = {"mean": torch.full((3,), float(count)), "seen": torch.tensor(count)}
        params, state = getattr(opt, method)({"head": torch.ones(2)}, state, {**params, **fresh})
        met = count - count % 2
        assert state.slow_params["seen"] == met
        assert_same_bits(state.slow_params["mean"], torch.full((3,), float(max(met, 1))))


@both_ways
def test_nothing_is_summed_for_a_leaf_at_rest(method):
    params = {"body": torch.ones(2).half(), "n": torch.tensor([5]), "head": torch.ones(2)}
    opt = Accumulate(groups(), 3)
    state = opt.init(params)
    for _ in range(2):
        grads = {"body": torch.ones(2).half(), "n": torch.tensor([5]), "head": torch.ones(2)}
        params, state = getattr(opt, method)(grads, state, params)
    assert_same_bits(state.acc_grads["body"], torch.zeros(2))
    assert_same_bits(state.acc_grads["n"], torch.tensor([0]))
    assert_same_bits(state.acc_grads["head"], torch.full((2,), 2.0))
    assert state.given.tolist() == [False, False, True]


@every_wrapper
def test_a_checkpoint_has_the_paths_it_had_and_goes_on_to_the_bit(wrap):
    params = {
        "body": [torch.randn(2), torch.randn(3)],
        "head": torch.randn(4),
        "n": torch.tensor(1),
    }
    opt, steps = wrap(groups()), gradients(4)
    state = opt.init(params)
    for own in steps[:3]:
        params, state = opt.update({"head": own}, state, params)
    saved = clone(interop.to_state_dict(state))
    everything_moves = wrap(Partition({"on": MOVING}, lambda n, _: "on"))
    floats = {name: leaf for name, leaf in params.items() if name != "n"}
    of_floats = interop.to_state_dict(everything_moves.init(floats))
    wrappers_own = {key for key in of_floats if "inner['on']" not in key}
    assert wrappers_own <= saved.keys()
    resumed = interop.from_state_dict(opt.init(params), saved)
    assert_same_bits(
        opt.update({"head": steps[3]}, resumed, params),
        opt.update({"head": steps[3]}, state, params),
    )


# Transforms, compilers, and what decides by data.

TRANSFORMED = {name: wrap for name, wrap in WRAPPERS.items() if "LocalUpdates" not in name}


@pytest.mark.parametrize("wrap", TRANSFORMED.values(), ids=TRANSFORMED.keys())
def test_members_of_a_vmap_and_their_frozen_leaves(wrap):
    params = {"body": torch.randn(3, 2), "n": torch.arange(3), "head": torch.randn(3, 4)}
    opt = wrap(groups())
    state, moved = vmap(opt.init)(params), params
    alone_params, alone_state = clone(params), [opt.init(member(params, i)) for i in range(3)]
    for _ in range(3):
        grads = {
            "body": torch.full((3, 2), math.nan),
            "n": torch.ones(3),
            "head": torch.randn(3, 4),
        }
        moved, state = vmap(opt.update)(grads, state, moved)
        for i in range(3):
            own, alone_state[i] = opt.update(
                member(grads, i), alone_state[i], member(alone_params, i)
            )
            alone_params["head"][i] = own["head"]
            assert_close(member(state, i), alone_state[i], rtol=1e-5, atol=1e-6)
    assert_close(moved, alone_params, rtol=1e-5, atol=1e-6)
    assert_same_bits((moved["body"], moved["n"]), (params["body"], params["n"]))


def member(tree, i):
    return tree_map(lambda leaf: leaf[i], tree)


@pytest.mark.by_day(1)
@pytest.mark.parametrize("wrap", TRANSFORMED.values(), ids=TRANSFORMED.keys())
def test_one_compiled_graph_serves_a_run_beside_frozen_leaves(wrap):
    torch.compiler.reset()
    opt = wrap(groups())
    params = {"body": torch.randn(2), "n": torch.tensor([1]), "head": torch.randn(4)}
    state = opt.init(params)
    own, own_state = clone(params), opt.init(params)
    step = torch.compile(opt.update, fullgraph=True, backend="aot_eager")
    in_place = torch.compile(opt.update_, fullgraph=True, backend="aot_eager")
    try:
        for head in gradients(4):
            grads = {"body": torch.full((2,), math.inf), "n": None, "head": head}
            expected = opt.update(grads, state, params)
            assert_close(step(grads, state, params), expected, rtol=1e-5, atol=1e-6)
            in_place(grads, own_state, own)
            assert_close((own, own_state), expected, rtol=1e-5, atol=1e-6)
            params, state = expected
            torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.parametrize("wrap", TRANSFORMED.values(), ids=TRANSFORMED.keys())
def test_no_derivative_comes_from_a_gradient_of_a_frozen_leaf(wrap):
    params = {"body": torch.randn(2), "head": torch.randn(3)}
    opt = wrap(groups())
    state = opt.init(params)

    def loss(grads):
        moved, _ = opt.update(grads, state, params)
        return sum(leaf.square().sum() for leaf in leaves(moved))

    slopes = grad(loss)({"body": torch.ones(2), "head": torch.ones(3)})
    assert_same_bits(slopes["body"], torch.zeros(2))


@both_ways
@pytest.mark.parametrize(
    "wrap", [SkipNonfinite, lambda opt: LossScale(opt, 1.0)], ids=["SkipNonfinite", "LossScale"]
)
def test_where_data_decide_a_frozen_leaf_is_not_chosen_but_kept(wrap, method, monkeypatch):
    """As on a GPU, where both are made. It may be what could not be written."""
    monkeypatch.setattr(_finite, "read", lambda number: None)
    frozen = torch.ones(1).expand(3)
    params = {"body": frozen, "n": torch.tensor([1]), "head": torch.ones(2)}
    opt = wrap(groups())
    state = opt.init(params)
    for good in (True, False, True):
        grads = {
            "body": torch.full((3,), math.nan),
            "head": torch.ones(2) if good else torch.ones(2) / 0,
        }
        params, state = getattr(opt, method)(grads, state, params)
        assert params["body"] is frozen
    assert frozen._version == 0
    assert find(state, "step") == {"inner.inner['on'].step": 2}


@both_ways
def test_a_skipped_step_keeps_the_very_leaf(method):
    for opt in (
        SkipNonfinite(groups()),
        LossScale(groups()),
        Clip(groups(), 1.0, nonfinite="skip"),
    ):
        params = {"body": torch.ones(2), "head": torch.ones(2)}
        body, head = params["body"], params["head"]
        moved, _ = getattr(opt, method)({"head": head / 0}, opt.init(params), params)
        assert moved["body"] is body
        assert torch.equal(moved["head"], torch.ones(2))


# Those beside it.


def test_a_group_within_may_be_trained_in_the_backward_pass():
    model = nn.Sequential(OrderedDict(body=nn.Linear(2, 2), head=nn.Linear(2, 1)))
    before = clone(dict(model.body.state_dict()))
    inner = {"on": MOVING, "off": Frozen()}
    labels = lambda name, _: "on" if name.startswith("head") else "off"  # noqa: E731
    opt = Ema(ClipValue(Accumulate(Partition(inner, labels), 1), 0.1), 0.5)
    with update_in_backward(model, opt) as handle:
        model(torch.ones(3, 2)).sum().backward()
    assert_same_bits(dict(model.body.state_dict()), before)
    assert all(param.grad is None for param in model.parameters())
    assert_same_bits(handle.state["body.weight"].average["body.weight"], before["weight"])


@both_ways
def test_zero1_of_frozen_leaves_asks_for_no_gradient(method):
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    olds = dict(params)
    opt = Partition(
        {"on": Zero1(MOVING, None), "off": Zero1(Frozen(), None)},
        lambda name, _: "on" if name == "a" else "off",
    )
    state = opt.init(params)
    moved, _ = getattr(opt, method)({"a": torch.ones(2)}, state, params)
    assert moved["b"] is olds["b"]
    assert moved["b"]._version == 0
    assert (moved["a"] < 1).all()


def test_a_wrapper_of_ones_own_is_given_what_it_was_given_before():
    """It need not hand on the tree that it is given, so nothing is asked through it."""
    opt = Clip(Halved(groups()), 1.0)
    params = {"body": torch.ones(2), "head": torch.ones(2)}
    grads = {"body": torch.tensor([300.0, 400.0]), "head": torch.zeros(2)}
    _, state = opt.update(grads, opt.init(params), params)
    assert state.norm == 500


def test_an_ema_of_a_module_with_buffers_can_be_called():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    params = {name: leaf.detach().clone() for name, leaf in model.state_dict().items()}
    trained = {name for name, _ in model.named_parameters()}
    opt = Ema(
        Partition({"on": MOVING, "off": Frozen()}, lambda n, _: "on" if n in trained else "off"),
        0.5,
    )
    state = opt.init(params)
    x = torch.randn(4, 2)
    for _ in range(2):
        buffers = {n: leaf.clone() for n, leaf in params.items() if n not in trained}
        own = {n: params[n].requires_grad_() for n in trained}
        loss = functional_call(model, {**own, **buffers}, x).square().sum()
        grads = dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))
        params, state = opt.update(grads, state, {**own, **buffers})
    found = averaged(state, params)
    assert found["1.num_batches_tracked"] == 2
    assert_same_bits(found["1.running_mean"], params["1.running_mean"])
    assert functional_call(model.eval(), found, x).isfinite().all()
