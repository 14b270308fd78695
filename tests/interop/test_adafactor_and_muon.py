"""Runs of torch's Adafactor and Muon go on as if nothing had been switched, in either direction."""

import dataclasses
import re

import pytest
import torch

from funcopt import Adafactor, AdamW, Muon, Partition, muon_label
from funcopt.interop import from_torch, to_torch

from ..cases import assert_same_bits, random_like
from .test_adam_and_sgd import (
    SHAPES,
    assert_same_state,
    detached,
    drawn,
    parameters,
    through_a_file,
    torch_steps,
)

MATRICES = {"0.weight": (3, 4), "tall": (9, 2), "one": (1, 1)}
RUNS = [
    (Adafactor, {"weight_decay": 0.1, "beta2_decay": -0.5, "d": 2.0}),
    (Adafactor, {"eps": (1e-12, 1e-2), "maximize": True}),
    (Muon, {"momentum": 0.9, "weight_decay": 0.3}),
    (Muon, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3, "eps": 1e-6}),
]


LEAVES = {name: shape for name, shape in SHAPES.items() if 0 not in shape}  # torch's divides by it


def drawn_for(kind):
    return drawn(torch.float32, MATRICES if kind is Muon else LEAVES)


def assert_alike(kind, ours, theirs):
    if kind is Muon:
        assert_same_bits(ours, theirs)
    else:  # which rounds otherwise
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "options"), RUNS, ids=str)
def test_a_run_goes_on_after_either_switch(kind, options):
    torchs = getattr(torch.optim, kind.__name__)
    params = drawn_for(kind)
    gradients = [random_like(params) for _ in range(30)]
    own = parameters(params)
    theirs = torchs(own.items(), lr=0.1, **options)
    torch_steps(theirs, own, gradients[:10])
    ours = detached(own)
    opt, state = from_torch(through_a_file(theirs.state_dict()), ours)
    assert opt == kind(lr=0.1, **options, kernel="auto" if kind is Muon else "plain")
    assert state.step == (1 if kind is Muon else 10)  # torch's Muon counts nothing
    for grads in gradients[10:20]:
        ours, state = opt.update(grads, state, ours)
    torch_steps(theirs, own, gradients[10:20])
    assert_alike(kind, ours, detached(own))
    if kind is Muon:
        assert_same_state(theirs, own, state, ["momentum_buffer"])

    back = parameters(ours)
    again = torchs(back.items())
    again.load_state_dict(through_a_file(to_torch(opt, state, ours)))
    assert again.param_groups[0].keys() == theirs.param_groups[0].keys()
    for name in own:
        entry, expected = again.state[back[name]], theirs.state[own[name]]
        assert entry.keys() == expected.keys()
        assert all(entry[key].shape == expected[key].shape for key in entry)
    torch_steps(again, back, gradients[20:])
    torch_steps(theirs, own, gradients[20:])
    assert_alike(kind, detached(back), detached(own))


@pytest.mark.parametrize("kind", [Adafactor, Muon])
def test_a_run_is_handed_over_before_its_first_step(kind):
    params = drawn_for(kind)
    opt, own = kind(lr=0.1), parameters(params)
    theirs = getattr(torch.optim, kind.__name__)(own.items())
    theirs.load_state_dict(to_torch(opt, opt.init(params), params))
    gradients = [random_like(params) for _ in range(5)]
    torch_steps(theirs, own, gradients)
    state = opt.init(params)
    for grads in gradients:
        params, state = opt.update(grads, state, params)
    assert_alike(kind, params, detached(own))


def test_counts_of_each_leaf_go_over_where_gradients_were_missing():
    params = drawn_for(Adafactor)
    own = parameters(params)
    theirs = torch.optim.Adafactor(own.items(), lr=0.1, eps=(1e-10, 1e-3))
    for step in range(4):
        grads = random_like(params)
        torch_steps(theirs, own, [{**grads, "0.weight": None} if step < 2 else grads])
    opt, state = from_torch(theirs, own)
    assert opt.step_per_leaf
    assert (state.step["0.weight"], state.step["0.bias"]) == (2, 4)
    assert state.row_var["0.bias"].shape == state.variance["0.weight"].shape == (0,)
    assert from_torch(to_torch(opt, state, params), params)[0] == opt


def test_groups_of_either_are_a_partition():
    params = drawn(torch.float32, MATRICES)
    own = parameters(params)
    groups = [
        {"params": [("tall", own["tall"])], "lr": 0.2},
        {"params": [(name, own[name]) for name in ("0.weight", "one")], "momentum": 0.5},
    ]
    theirs = torch.optim.Muon(groups)
    gradients = [random_like(params) for _ in range(4)]
    torch_steps(theirs, own, gradients[:2])
    ours = detached(own)
    opt, state = from_torch(theirs, own)
    assert opt.inner == {"0": Muon(lr=0.2), "1": Muon(momentum=0.5)}
    again = torch.optim.Muon(
        [{"params": [(name, own[name]) for name in group["param_names"]]} for group in
         to_torch(opt, state, ours)["param_groups"]]
    )  # fmt: skip
    again.load_state_dict(to_torch(opt, state, ours))
    for grads in gradients[2:]:
        ours, state = opt.update(grads, state, ours)
    torch_steps(again, own, gradients[2:])
    assert_same_bits(ours, detached(own))


MATRIX = {"w": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("opt", "params", "message"),
    [
        (Muon(ns_dtype=None), MATRIX, "Muon(ns_dtype=None): torch.optim's has no such option. Hand "
         "over dataclasses.replace(opt, ns_dtype=torch.bfloat16)"),
        (Muon(gram=True), MATRIX, "Muon(gram=True): torch.optim's has no such option"),
        (Muon(matrices="stack"), MATRIX, "Muon(matrices='stack')"),
        (Muon(differentiable=True), MATRIX, "torch.optim.Muon records no step"),
        (Adafactor(differentiable=True), MATRIX, "torch.optim.Adafactor records no step"),
        (Adafactor(moments=None, rounding="stochastic"), MATRIX, "rounding='stochastic'"),
        (Muon(), {"w": torch.ones(2, 3, 4)}, "the leaf 'w' has shape (2, 3, 4), and "
         "torch.optim.Muon moves matrices alone"),
        (Muon(lr={"w": 0.1}), MATRIX, "lr has a number for each leaf"),
    ],
)  # fmt: skip
def test_what_torch_lacks_is_refused(opt, params, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        to_torch(opt, opt.init(params), params)


def test_muon_beside_adamw_is_handed_over_one_by_one():
    params = {"wte": torch.ones(3, 2), "w": torch.ones(2, 3)}
    opt = Partition({"muon": Muon(), "adamw": AdamW()}, muon_label)
    state = opt.init(params)
    with pytest.raises(ValueError, match=r"Hand them over one by one.*state.inner\['adamw'\]"):
        to_torch(opt, state, params)
    (group,) = to_torch(opt.inner["muon"], state.inner["muon"], {"w": params["w"]})["param_groups"]
    assert group["param_names"] == ["w"]


def source_of(kind, change):
    own = parameters({"w": torch.ones(2, 3)})
    theirs = kind(own.items())
    torch_steps(theirs, own, [{"w": torch.ones(2, 3)}])
    saved = theirs.state_dict()
    change(saved["state"][0])
    return saved


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (torch.optim.Adafactor, lambda e: e.pop("col_var"), "the state for params['w'] lacks "
         "col_var: it is col_var, row_var, step."),
        (torch.optim.Adafactor, lambda e: e.update(row_var=torch.ones(2)), "row_var for "
         "params['w']: shape (2,), it must be (2, 1)"),
        (torch.optim.Muon, lambda e: e.update(momentum_buffer=torch.ones(3, 2)), "momentum_buffer "
         "for params['w']: shape (3, 2), the parameter has (2, 3)"),
        (torch.optim.Muon, lambda e: e.update(step=1), "has step beyond it"),
    ],
)  # fmt: skip
def test_a_state_that_is_not_whole_is_refused(kind, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_torch(source_of(kind, change), {"w": torch.ones(2, 3)})


def test_moments_in_16_bits_stay_so():
    params = {"w": torch.randn(4, 3).bfloat16()}
    own = parameters(params)
    for kind in (torch.optim.Adafactor, torch.optim.Muon):
        theirs = kind(own.items())
        torch_steps(theirs, own, [random_like(params)])
        opt, state = from_torch(theirs, own)
        assert opt.moments is None
        again = to_torch(dataclasses.replace(opt), state, params)["state"][0]
        for name, moment in again.items():
            assert torch.equal(moment, theirs.state[own["w"]][name])
