"""What a hyperparameter may be, tried as a new user would."""

import dataclasses
import fractions
import functools
import math
import re

import numpy as np
import pytest
import torch
from torch.func import grad, jvp, vmap

from funcopt import SGD, AdamW, Clip
from funcopt.schedules import Cosine

from ..cases import tree_map

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
        ({"lr": torch.nn.Linear(2, 1)}, r"not Linear\. Parameters are given to init\(\)"),
        ({"lr": torch.nn.Linear(2, 1).parameters()}, r"not generator\. Parameters are given"),
        ({"lr": {"w": torch.nn.Parameter(torch.ones(()))}}, r"not dict\. Parameters are given"),
        ({"lr": []}, r"not list\. Parameters are given"),
        ({"lr": {}}, r"not dict\. Parameters are given"),
        ({"lr": {"w": 0.1, "b": "x"}}, r"lr\['b'\]='x': must be a number"),
        ({"betas": (0.9, [0.9, None])}, r"betas\[1\]\[1\]=None: must be a number"),
        ({"lr": [{"params": [], "lr": 0.1}]}, r"Give each group of leaves options of its own"),
        ({"lr": Cosine}, "lr is the class Cosine: give an instance of it"),
        ({"lr": lambda: 0.1}, "called with the count of updates.*and this has too many positional"),
        ({"lr": lambda step, last: 0.1}, "this has missing a required argument: 'last'"),
        ({"eps": Cosine}, "eps is the class Cosine: give an instance of it"),
        ({"eps": lambda: 1e-8}, "eps=.*called with the count of updates.*has too many positional"),
        ({"betas": (0.9, lambda: 0.9)}, r"betas\[1\]=.*called with the count of updates"),
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
    names = "auto, native, triton, fused, foreach, plain"
    with pytest.raises(ValueError, match=f"must be one of {names}"):
        AdamW(kernel=kernel)


@pytest.mark.parametrize("value", [1, fractions.Fraction(1, 4), np.float32(0.25), np.float64(0.5)])
def test_any_real_number_is_kept_as_a_float(value):
    kept = AdamW(lr=value).lr
    assert type(kept) is float
    assert kept == float(value)


def test_learned_numbers_that_are_parameters_are_refused_with_what_to_give_instead():
    learned = {name: torch.nn.Parameter(torch.tensor(0.5)) for name in ("w", "b")}
    advice = r"weight_decay={key: number.view_as\(number\) for key, number in learned.items\(\)}"
    with pytest.raises(TypeError, match=advice):
        SGD(weight_decay=learned)
    with pytest.raises(TypeError, match=r"Parameters are given to init\(\).* learned.*: lr={key"):
        SGD(lr=learned)
    params = {name: torch.ones(2) for name in learned}
    opt = SGD(lr={key: number.view_as(number) for key, number in learned.items()})
    moved, _ = opt.update({"w": torch.ones(2), "b": 2 * torch.ones(2)}, opt.init(params), params)
    (moved["w"].sum() + moved["b"].sum()).backward()
    assert [learned[name].grad.item() for name in ("w", "b")] == [-2.0, -4.0]


def test_weights_in_place_of_a_number_are_not_taken_for_learned_ones():
    weights = {"w": torch.nn.Parameter(torch.ones(2))}
    with pytest.raises(TypeError, match=r"Parameters are given to init\(\)[^{]*$"):
        SGD(lr=weights)


def test_a_stacked_hyperparameter_outside_vmap_is_refused_with_the_remedy():
    opt = AdamW(lr=torch.tensor([0.1, 0.2]))
    params = torch.ones(2)
    with pytest.raises(ValueError, match=r"lr has shape \(2,\): one update takes one number.*vmap"):
        opt.update(params, opt.init(params), params)


# The numbers of AdamW by name, and how to give it one.
GIVING = {
    "lr": lambda given: AdamW(lr=given),
    "betas[0]": lambda given: AdamW(betas=(given, 0.999)),
    "betas[1]": lambda given: AdamW(betas=(0.9, given)),
    "eps": lambda given: AdamW(eps=given),
    "weight_decay": lambda given: AdamW(weight_decay=given),
}


def refused(update, message):
    """Say that an update of ones is refused, and that nothing has moved."""
    params, grads = torch.ones(2), torch.ones(2)
    state = AdamW().init(params)
    with pytest.raises(ValueError, match=message):
        update(grads, state, params)
    assert torch.equal(params, torch.ones(2))
    assert state.step == 0


@pytest.mark.parametrize("bad", [math.nan, -0.5, torch.tensor(math.inf)])
@pytest.mark.parametrize("method", ["update", "update_"])
@pytest.mark.parametrize("name", GIVING)
def test_what_a_schedule_returns_is_checked_before_anything_moves(name, method, bad):
    opt = GIVING[name](lambda step: bad)
    refused(getattr(opt, method), rf"{re.escape(name)}=.* from its schedule.*: {re.escape(name)} m")


@pytest.mark.parametrize("bad", [math.nan, -0.5, math.inf])
@pytest.mark.parametrize("name", GIVING)
def test_a_tensor_that_was_filled_since_is_checked_at_each_update(name, bad):
    number = torch.tensor(0.5)
    opt = GIVING[name](number)
    number.fill_(bad)
    message = rf"^{re.escape(name)}={bad}: {re.escape(name)} must be"
    refused(opt.update, message)
    refused(opt.update_, message)
    refused(
        lambda g, s, p: vmap(opt.update, in_dims=(0, None, None))(g.expand(3, 2), s, p), message
    )
    refused(lambda g, s, p: grad(lambda g: opt.update(g, s, p)[0].sum())(g), message)
    refused(lambda g, s, p: jvp(lambda g: opt.update(g, s, p)[0], (g,), (g,)), message)


@pytest.mark.parametrize("name", GIVING)
def test_one_bad_member_is_found_at_its_update(name):
    numbers = torch.tensor([[0.5], [0.5], [0.25]])
    opt = GIVING[name](numbers)
    numbers[2].fill_(-0.5)
    message = rf"^{re.escape(name)}=-0.5: {re.escape(name)} must be"
    params = torch.ones(2)

    def step(opt):
        return opt.update(params, AdamW().init(params), params)[0]

    for mapped in (vmap(vmap(step)), lambda opt: vmap(grad(lambda o: step(o).sum()))(first(opt))):
        with pytest.raises(ValueError, match=message):
            mapped(opt)


def first(opt):
    """The members of an inner vmap that has but one."""
    return tree_map(lambda number: number[:, 0], opt)


def test_a_schedule_that_returns_no_number_is_refused():
    opt = AdamW(lr=lambda step: "fast")
    params = torch.ones(2)
    with pytest.raises(
        TypeError, match="lr='fast' from its schedule: must be a number or a 0-dim tensor"
    ):
        opt.update(params, opt.init(params), params)


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


def test_the_function_of_a_mask_is_not_taken_for_a_schedule():
    def decay_of(params):
        return 0.1

    with pytest.raises(TypeError, match=r"weight_decay=function\(params\)"):
        AdamW(weight_decay=decay_of)
    with pytest.raises(TypeError, match=r"weight_decay\['b'\]=False: .*0\.1, say, for True"):
        AdamW(weight_decay={"w": 0.1, "b": False})


def test_a_schedule_of_any_kind_that_takes_the_count_is_kept():
    for schedule in (math.exp, max, functools.partial(max, 0.0), lambda step, *rest: 0.1):
        assert AdamW(lr=schedule).lr is schedule
