"""What a hyperparameter may be, tried as a new user would."""

import dataclasses
import fractions
import functools
import math

import numpy as np
import pytest
import torch

from funcopt import AdamW, Clip
from funcopt.schedules import Cosine

NUMBERS = ["lr", "eps", "weight_decay"]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-3])
@pytest.mark.parametrize("wrap", [float, torch.tensor], ids=["number", "tensor"])
def test_a_number_out_of_range_is_refused_with_value_and_rule(name, value, wrap):
    with pytest.raises(ValueError, match=rf"{name}=.*{value}.*must be finite and at least 0"):
        AdamW(**{name: wrap(value)})


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("value", [1.0, -0.1, math.nan, 2.0])
def test_a_beta_out_of_range_is_refused_with_its_index(index, value):
    betas = [0.9, 0.999]
    betas[index] = value
    with pytest.raises(ValueError, match=rf"betas\[{index}\]={value}: .*below 1"):
        AdamW(betas=betas)


def test_one_bad_member_of_a_stack_is_found():
    with pytest.raises(ValueError, match=r"lr=nan in a tensor of shape \(3,\)"):
        AdamW(lr=torch.tensor([0.1, math.nan, 0.2]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "0.1"}, "lr='0.1': must be a number, a 0-dim tensor or a schedule, not str"),
        ({"lr": True}, "lr=True: must be a number"),
        ({"lr": 1j}, "lr=1j: must be a number"),
        ({"lr": None}, "lr=None: must be a number"),
        ({"lr": [torch.ones(200, 200)]}, r"^.{,120} not list\. Parameters are given to init\(\)"),
        ({"lr": torch.nn.Linear(2, 1)}, r"not Linear\. Parameters are given to init\(\)"),
        ({"lr": torch.nn.Linear(2, 1).parameters()}, r"not generator\. Parameters are given"),
        ({"lr": {"w": torch.ones(3)}}, r"not dict\. Parameters are given"),
        ({"lr": {"w": torch.nn.Parameter(torch.ones(()))}}, r"not dict\. Parameters are given"),
        ({"lr": []}, r"not list\. Parameters are given"),
        ({"lr": {"w": 0.1, "b": 1}}, r"not dict\. Give each group .* lr of its own.* labels\)\.$"),
        (
            {"lr": {"w": torch.tensor(0.1)}},
            r"not dict\. Give each group of leaves lr .* Partition\(",
        ),
        ({"lr": {"w": Cosine(peak=0.1, steps=3)}}, r"not dict\. Give each group"),
        ({"weight_decay": {"w": 0.1}}, r"Give each group of leaves weight_decay of its own"),
        ({"eps": {"w": 1e-8}}, r"not dict\. Give each group of leaves eps of its own"),
        ({"eps": {"w": torch.ones(3)}}, r"not dict\.$"),
        ({"lr": [0.1, 0.2]}, r"Partition\(.* members of a vmap, give one tensor: torch.tensor"),
        ({"lr": [{"params": [], "lr": 0.1}]}, r"Give each group of leaves options of its own"),
        ({"lr": Cosine}, "lr is the class Cosine: give an instance of it"),
        ({"lr": lambda: 0.1}, "called with the count of updates.*and this has too many positional"),
        ({"lr": lambda step, last: 0.1}, "this has missing a required argument: 'last'"),
        ({"eps": lambda step: 1e-8}, "must be a number or a 0-dim tensor, not function"),
        ({"lr": torch.tensor(1)}, "lr is a tensor of torch.int64: give it a floating-point dtype"),
        ({"betas": 0.9}, r"betas=0.9: must be a pair, such as \(0.9, 0.999\)"),
        ({"betas": (0.9,)}, "must be a pair"),
        ({"betas": (0.9, "x")}, r"betas\[1\]='x': must be a number"),
        ({"amsgrad": 1}, "amsgrad=1: must be True or False"),
        ({"maximize": None}, "maximize=None: must be True or False"),
        ({"differentiable": "yes"}, "differentiable='yes': must be True or False"),
    ],
)
def test_a_wrong_type_is_refused_with_what_is_wanted(options, message):
    with pytest.raises(TypeError, match=message):
        AdamW(**options)


@pytest.mark.parametrize("kernel", ["fast", "", None, ["fused"]])
def test_an_unknown_kernel_is_refused_with_the_names_there_are(kernel):
    with pytest.raises(ValueError, match="must be one of auto, triton, fused, foreach, plain"):
        AdamW(kernel=kernel)


@pytest.mark.parametrize("value", [1, fractions.Fraction(1, 4), np.float32(0.25), np.float64(0.5)])
def test_any_real_number_is_kept_as_a_float(value):
    kept = AdamW(lr=value).lr
    assert type(kept) is float
    assert kept == float(value)


def test_a_stacked_hyperparameter_outside_vmap_is_refused_with_the_remedy():
    opt = AdamW(lr=torch.tensor([0.1, 0.2]))
    params = torch.ones(2)
    with pytest.raises(ValueError, match=r"lr has shape \(2,\): one update takes one number.*vmap"):
        opt.update(params, opt.init(params), params)


@pytest.mark.parametrize("bad", [math.nan, -1.0, torch.tensor(math.inf)])
@pytest.mark.parametrize("method", ["update", "update_"])
def test_what_a_schedule_returns_is_checked_before_anything_moves(bad, method):
    opt = AdamW(weight_decay=lambda step: bad)
    params = torch.ones(2)
    state = opt.init(params)
    with pytest.raises(ValueError, match=r"weight_decay=.*must be finite and at least 0"):
        getattr(opt, method)(params.clone(), state, params)
    assert torch.equal(params, torch.ones(2))
    assert state.step == 0


def test_a_schedule_that_returns_no_number_is_refused():
    opt = AdamW(lr=lambda step: "fast")
    params = torch.ones(2)
    with pytest.raises(
        TypeError, match="lr='fast' from its schedule: must be a number or a 0-dim tensor"
    ):
        opt.update(params, opt.init(params), params)


def test_a_tensor_that_went_bad_since_is_found_when_it_is_read():
    lr = torch.tensor(0.1)
    opt = AdamW(lr=lr)
    params = torch.ones(2)
    state = opt.init(params)
    lr.fill_(math.nan)
    with pytest.raises(ValueError, match="lr=nan"):
        opt.update_(params.clone(), state, params)
    assert torch.equal(params, torch.ones(2))


def test_replacing_one_hyperparameter_checks_it():
    with pytest.raises(ValueError, match=r"lr=-1\.0"):
        dataclasses.replace(AdamW(), lr=-1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: AdamW(p, lr=0.1), r"AdamW\(\) got multiple values for argument 'lr'\. It takes"),
        (
            lambda p: AdamW(learning_rate=0.1),
            "'learning_rate'.*It takes lr, betas, eps, wei",
        ),
        (lambda p: Clip(AdamW()), r"Clip\(\) missing 1 required positional argument: 'max_norm'"),
    ],
)
def test_arguments_of_another_library_are_an_error_that_says_what_there_is(build, message):
    with pytest.raises(TypeError, match=message) as refused:
        build(torch.nn.Linear(2, 1).parameters())
    assert "opt.init(params)" in str(refused.value)


def test_a_schedule_of_any_kind_that_takes_the_count_is_kept():
    for schedule in (math.exp, max, functools.partial(max, 0.0), lambda step, *rest: 0.1):
        assert AdamW(lr=schedule).lr is schedule
