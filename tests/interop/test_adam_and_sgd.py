"""Runs of torch's optimizers go on as if nothing had been switched, in either direction."""

import dataclasses
import io

import pytest
import torch
from torch import nn

from funcopt import (
    SGD,
    Adagrad,
    Adam,
    AdamState,
    AdamW,
    Frozen,
    Lion,
    NAdam,
    Partition,
    PartitionState,
    RAdam,
    RMSprop,
    SGDState,
)
from funcopt.interop import from_torch, to_torch

from ..cases import KERNELS, TORCH_FLAGS, assert_same_bits, random_like
from ..optimizers.common import crossed

SHAPES = {"0.weight": (3, 4), "0.bias": (4,), "scale": (), "out": (2, 3, 5), "none": (0,)}
TORCHS = {SGD: torch.optim.SGD, Adam: torch.optim.Adam}
OPTIONS = [
    (SGD, own)
    for own in crossed(
        lr=(0.1,),
        momentum=(0.0, 0.9),
        dampening=(0.0, 0.3),
        nesterov=(False, True),
        weight_decay=(0.0, 0.1),
        maximize=(False, True),
    )
    if not own["nesterov"] or (own["momentum"] > 0 and own["dampening"] == 0)
] + [
    (Adam, own)
    for own in crossed(
        lr=(0.1,), weight_decay=(0.0, 0.1), amsgrad=(False, True), maximize=(False, True)
    )
]


def drawn(dtype, shapes=SHAPES):
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def parameters(params):
    return {name: nn.Parameter(leaf.detach().clone()) for name, leaf in params.items()}


def detached(own):
    return {name: param.detach().clone() for name, param in own.items()}


def through_a_file(d):
    file = io.BytesIO()
    torch.save(d, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def torch_steps(theirs, own, gradients):
    for grads in gradients:
        for name, param in own.items():
            param.grad = None if grads[name] is None else grads[name].clone()
        theirs.step()


def assert_same_state(theirs, own, state, kept):
    for name in kept:
        slots = {
            key: theirs.state[param][name] for key, param in own.items() if theirs.state.get(param)
        }
        assert_same_bits({key: getattr(state, name)[key] for key in slots}, slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
def test_a_run_goes_on_for_20_steps_after_either_switch(kind, options, kernel, dtype):
    params = drawn(dtype)
    gradients = [random_like(params) for _ in range(60)]
    own = parameters(params)
    theirs = TORCHS[kind](own.items(), **options, **TORCH_FLAGS[kernel])
    torch_steps(theirs, own, gradients[:20])

    ours = detached(own)
    opt, state = from_torch(through_a_file(theirs.state_dict()), ours)
    assert opt == kind(**options, kernel=kernel)
    for grads in gradients[20:40]:
        ours, state = opt.update(grads, state, ours)
    torch_steps(theirs, own, gradients[20:40])
    assert_same_bits(ours, detached(own))
    kept = [slot.name for slot in kind.rule.kept_slots(opt)]
    assert_same_state(theirs, own, state, kept)

    back = parameters(ours)
    again = TORCHS[kind](back.items())
    again.load_state_dict(through_a_file(to_torch(opt, state, ours)))
    torch_steps(again, back, gradients[40:])
    torch_steps(theirs, own, gradients[40:])
    assert_same_bits(detached(back), detached(own))
    assert_same_state(again, back, from_torch(theirs, own)[1], kept)


# Each with the kernels that have torch's bits.
OTHERS = [
    (RMSprop, torch.optim.RMSprop, {"momentum": 0.9, "centered": True, "maximize": True}, False),
    (RMSprop, torch.optim.RMSprop, {"weight_decay": 0.1, "alpha": 0.5}, True),
    (RAdam, torch.optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, False),
    (RAdam, torch.optim.RAdam, {"betas": (0.5, 0.9), "weight_decay": 0.1}, False),
    (Adagrad, torch.optim.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.5}, False),
    (Adagrad, torch.optim.Adagrad, {"weight_decay": 0.1, "maximize": True}, True),
    (NAdam, torch.optim.NAdam, {"weight_decay": 0.1, "momentum_decay": 0.1}, False),
    (NAdam, torch.optim.NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}, True),
]


@pytest.mark.parametrize(("kind", "torchs", "options", "foreach"), OTHERS, ids=str)
def test_a_run_of_the_others_goes_on_after_either_switch(kind, torchs, options, foreach):
    def assert_same(ours, theirs):
        if kind is NAdam:  # whose product of momenta torch rounds to float32
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        else:
            assert_same_bits(ours, theirs)

    params = drawn(torch.float32)
    gradients = [random_like(params) for _ in range(60)]
    own = parameters(params)
    theirs = torchs(own.items(), lr=0.1, **options, foreach=foreach)
    torch_steps(theirs, own, gradients[:20])
    ours = detached(own)
    opt, state = from_torch(through_a_file(theirs.state_dict()), ours)
    assert opt == kind(lr=0.1, **options, kernel="foreach" if foreach else "plain")
    for grads in gradients[20:40]:
        ours, state = opt.update(grads, state, ours)
    torch_steps(theirs, own, gradients[20:40])
    assert_same(ours, detached(own))
    kept = [slot.name for slot in kind.rule.kept_slots(opt)]
    if kind is not NAdam:
        assert_same_state(theirs, own, state, kept)
    back = parameters(ours)
    again = torchs(back.items())
    again.load_state_dict(through_a_file(to_torch(opt, state, ours)))
    assert again.param_groups[0].keys() == theirs.param_groups[0].keys()
    entries = [(again.state[back[name]], theirs.state[own[name]]) for name in own]
    assert all(entry.keys() == expected.keys() for entry, expected in entries)
    if kind is NAdam:
        for entry, expected in entries:
            torch.testing.assert_close(entry["mu_product"], expected["mu_product"])
    torch_steps(again, back, gradients[40:])
    torch_steps(theirs, own, gradients[40:])
    assert_same(detached(back), detached(own))


@pytest.mark.parametrize(("kind", "torchs"), dict.fromkeys(own[:2] for own in OTHERS), ids=str)
def test_a_run_of_the_others_is_handed_over_before_its_first_step(kind, torchs):
    params = drawn(torch.float32)
    opt = kind(lr=0.1)
    own = parameters(params)
    theirs = torchs(own.items())
    theirs.load_state_dict(to_torch(opt, opt.init(params), params))
    gradients = [random_like(params) for _ in range(10)]
    torch_steps(theirs, own, gradients)
    state = opt.init(params)
    for grads in gradients:
        params, state = opt.update(grads, state, params)
    torch.testing.assert_close(params, detached(own), rtol=1e-6, atol=1e-6)


def test_an_adagrad_that_is_fused_goes_on_by_the_fastest_kernel():
    params = drawn(torch.float32)
    own = parameters(params)
    theirs = torch.optim.Adagrad(own.items(), lr=0.1, fused=True)
    gradients = [random_like(params) for _ in range(20)]
    torch_steps(theirs, own, gradients[:10])
    ours = detached(own)
    opt, state = from_torch(theirs, own)
    assert opt == Adagrad(lr=0.1)
    for grads in gradients[10:]:
        ours, state = opt.update(grads, state, ours)
    torch_steps(theirs, own, gradients[10:])
    torch.testing.assert_close(ours, detached(own), rtol=1e-5, atol=1e-6)
    assert to_torch(opt, state, ours)["param_groups"][0]["fused"] is False


@pytest.mark.parametrize("kind", TORCHS)
def test_a_run_is_handed_over_before_its_first_step(kind):
    params = drawn(torch.float32)
    options = {"momentum": 0.9, "dampening": 0.5} if kind is SGD else {}
    opt = kind(lr=0.1, kernel="fused", **options)
    state = opt.init(params)
    saved = to_torch(opt, state, params)
    assert saved["state"] == {}
    own = parameters(params)
    theirs = TORCHS[kind](own.items())
    theirs.load_state_dict(saved)
    gradients = [random_like(params) for _ in range(20)]
    torch_steps(theirs, own, gradients)
    for grads in gradients:
        params, state = opt.update(grads, state, params)
    assert_same_bits(params, detached(own))


@pytest.mark.parametrize("kernel", ["plain", "foreach"])
def test_a_leaf_of_an_sgd_without_a_gradient_so_far_has_its_first_one_later(kernel):
    params = drawn(torch.float64)
    gradients = [random_like(params) for _ in range(40)]
    for grads in gradients[:20]:
        grads["scale"] = None
    own = parameters(params)
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}
    theirs = torch.optim.SGD(own.items(), **options, **TORCH_FLAGS[kernel])
    torch_steps(theirs, own, gradients[:20])
    ours = detached(own)
    opt, state = from_torch(theirs.state_dict(), ours)
    assert opt.step_per_leaf
    assert state.step == {**dict.fromkeys(SHAPES, 1), "scale": 0}
    assert set(to_torch(opt, state, ours)["state"]) == {0, 1, 3, 4}
    for grads in gradients[20:]:
        ours, state = opt.update(grads, state, ours)
    torch_steps(theirs, own, gradients[20:])
    assert_same_bits(ours, detached(own))


def test_an_sgd_has_one_update_if_it_has_buffers_and_none_if_not():
    params = {"a": torch.ones(2)}
    for momentum, count in ((0.0, 0), (0.9, 1)):
        own = parameters(params)
        theirs = torch.optim.SGD(own.items(), momentum=momentum)
        torch_steps(theirs, own, [params] * 3)
        opt, state = from_torch(theirs, own)
        assert isinstance(state, SGDState)
        assert state.step == count
        assert not opt.step_per_leaf


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_buffers_that_are_none_are_those_of_no_update(momentum):
    params = {"a": torch.ones(2)}
    saved = torch.optim.SGD(parameters(params).items(), momentum=momentum).state_dict()
    saved["state"] = {0: {"momentum_buffer": None}}
    assert from_torch(saved, params)[1].step == 0


def test_groups_of_sgd_are_those_of_a_partition_and_back():
    params = drawn(torch.float32)
    own = parameters(params)
    weights = [(name, own[name]) for name in ("0.weight", "out")]
    others = [(name, own[name]) for name in own if name not in dict(weights)]
    groups = [
        {"params": weights, "name": "decay", "weight_decay": 0.1},
        {"params": others, "name": "rest", "momentum": 0.5, "dampening": 0.5},
    ]
    theirs = torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=True)
    gradients = [random_like(params) for _ in range(40)]
    torch_steps(theirs, own, gradients[:10])
    ours = detached(own)
    opt, state = from_torch(theirs, own)
    assert opt.inner == {
        "decay": SGD(0.1, 0.9, 0, 0.1, kernel="foreach"),
        "rest": SGD(0.1, 0.5, 0.5, kernel="foreach"),
    }
    for grads in gradients[10:30]:
        ours, state = opt.update(grads, state, ours)
    torch_steps(theirs, own, gradients[10:30])
    assert_same_bits(ours, detached(own))
    saved = to_torch(opt, state, ours)
    back = parameters(ours)
    again = torch.optim.SGD(
        {"params": [(name, back[name]) for name in group["param_names"]]}
        for group in saved["param_groups"]
    )
    again.load_state_dict(saved)
    torch_steps(again, back, gradients[30:])
    torch_steps(theirs, own, gradients[30:])
    assert_same_bits(detached(back), detached(own))


def test_groups_of_adam_may_be_those_of_adamw():
    params = {"a": torch.randn(3), "b": torch.randn(4)}
    opt = Partition(
        {"x": AdamW(0.1, kernel="plain"), "y": Adam(0.1, weight_decay=0.1, kernel="plain")},
        {"a": "x", "b": "y"},
    )
    state = opt.init(params)
    gradients = [random_like(params) for _ in range(20)]
    saved = to_torch(opt, state, params)
    own = parameters(params)
    theirs = torch.optim.Adam({"params": [(name, param)]} for name, param in own.items())
    theirs.load_state_dict(saved)
    torch_steps(theirs, own, gradients)
    for grads in gradients:
        params, state = opt.update(grads, state, params)
    assert_same_bits(params, detached(own))
    again, state_again = from_torch(theirs, own)
    assert again == opt
    assert isinstance(state_again.inner["y"], AdamState)


def test_nested_trees_and_frozen_leaves_are_matched_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    theirs = torch.optim.SGD(model[0].named_parameters("0"), lr=0.1, momentum=0.9)
    model(torch.ones(2)).sum().backward()
    theirs.step()
    params = [{"weight": own.weight.detach(), "bias": own.bias.detach()} for own in model]
    opt, state = from_torch(theirs.state_dict(), params, frozen="frozen")
    assert opt.inner["frozen"] == Frozen()
    buffer = state.inner["0"].momentum_buffer["0.weight"]
    assert torch.equal(buffer, theirs.state[model[0].weight]["momentum_buffer"])


KEYS = {
    Adam: torch.optim.Adam([torch.ones(1)]).state_dict()["param_groups"][0].keys(),
    SGD: torch.optim.SGD([torch.ones(1)]).state_dict()["param_groups"][0].keys(),
}


@pytest.mark.parametrize("kind", KEYS)
def test_what_is_handed_over_has_the_keys_that_torch_writes(kind):
    params = [torch.ones(1)]
    (group,) = to_torch(kind(), kind().init(params), params)["param_groups"]
    assert group.keys() == KEYS[kind]


# What is refused.


def saved(change, **options):
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    own = parameters(params)
    theirs = torch.optim.SGD(own.items(), **{"momentum": 0.9, **options})
    torch_steps(theirs, own, [params])
    d = theirs.state_dict()
    change(d)
    return d, params


REFUSED = {
    r"params\['a'\] has step beyond it: with momentum=0.9 it is momentum_buffer": (
        lambda d: d["state"][0].update(step=1)
    ),
    r"momentum_buffer for params\['b'\]: shape \(3,\), the parameter has \(2,\)": (
        lambda d: d["state"][1].update(momentum_buffer=torch.ones(3))
    ),
    "the source has no 'nesterov' in its param group": (
        lambda d: d["param_groups"][0].pop("nesterov")
    ),
    "momentum=-1.0: momentum must be": lambda d: d["param_groups"][0].update(momentum=-1.0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_source_that_cannot_be_taken_over_is_refused(message):
    d, params = saved(REFUSED[message])
    with pytest.raises(ValueError, match=message):
        from_torch(d, params)


def test_an_sgd_beside_an_adam_is_no_optimizer_of_torch():
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    opt = Partition({"x": Adam(), "y": SGD()}, {"a": "x", "b": "y"})
    with pytest.raises(ValueError, match=r"inner\['x'\] is of Adam and inner\['y'\] of SGD"):
        to_torch(opt, opt.init(params), params)
    part = PartitionState(opt.init(params).inner).inner["y"]
    assert to_torch(SGD(), part, {"b": params["b"]})["state"] == {}


def test_a_momentum_of_0_with_a_buffer_is_not_handed_over():
    params, opt = {"a": torch.ones(2)}, SGD(momentum=torch.tensor(0.0), dampening=0.5)
    with pytest.raises(ValueError, match="momentum is 0, at which torch keeps no momentum_buffer"):
        to_torch(opt, opt.init(params), params)


def test_a_lion_has_no_counterpart():
    params = {"a": torch.ones(2)}
    ahead = Adam(nesterov=True)
    with pytest.raises(ValueError, match=r"Adam\(nesterov=True\): torch.optim's has no such"):
        to_torch(ahead, ahead.init(params), params)
    with pytest.raises(TypeError, match="got Lion and LionState"):
        to_torch(Lion(), Lion().init(params), params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_leaves_of_an_sgd_are_not_handed_to_torchs_fused_kernel(dtype):
    """It gives wrong numbers for them on the CPU, in torch 2.13."""
    params = {"a": torch.ones(32, dtype=dtype)}
    opt = SGD(momentum=0.9)
    (group,) = to_torch(opt, opt.init(params), params)["param_groups"]
    assert (group["foreach"], group["fused"]) == (False, False)
    named = dataclasses.replace(opt, kernel="fused")
    with pytest.raises(ValueError, match="a leaf is of 16 bits on the CPU, which torch's fused"):
        to_torch(named, named.init(params), params)
    adam = Adam()
    assert to_torch(adam, adam.init(params), params)["param_groups"][0]["fused"]
