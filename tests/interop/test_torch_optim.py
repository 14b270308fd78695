"""To and from torch.optim: going on in either direction is as if nothing had been switched."""

import copy
import dataclasses
import io
import warnings

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from funcopt import AdamW
from funcopt._core import pytree
from funcopt.interop import from_torch, to_torch
from funcopt.testing import strategies

from ..cases import TORCH_FLAGS, assert_same_bits, clone, leaves, tree_map
from .runs import (
    FIRST,
    SQUARES,
    UNLIKE,
    after_one_step,
    assert_same_run,
    edit,
    torch_optimizer,
    torch_params,
    torch_step,
)

thoroughly = hypothesis.settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@st.composite
def runs(draw, *, none=True):
    """Options of torch, parameters, gradients before the switch, and gradients after it."""
    kernel = draw(st.sampled_from(sorted(TORCH_FLAGS)))
    dtypes = [torch.float32, torch.float64]
    if kernel != "fused":
        dtypes += [torch.complex64, torch.complex128]
    params = draw(strategies.params(dtype=st.sampled_from(dtypes)))
    options = draw(strategies.hyperparameters())
    del options["step_per_leaf"]

    def gradients(fewest):
        one = strategies.gradients(params, none=none)
        return draw(st.lists(one, min_size=fewest, max_size=3))

    return kernel, options, params, gradients(0), gradients(1)


@pytest.mark.filterwarnings("ignore:the source counts")  # all gradients drawn may be 0
@thoroughly
@given(runs(), st.booleans())
def test_a_run_that_is_taken_over_goes_on_as_if_it_had_not_been(run, from_dict):
    kernel, options, params, before, after = run
    theirs = torch_optimizer(params, **options, **TORCH_FLAGS[kernel])
    for grads in before:
        torch_step(theirs, grads)

    names = pytree.names(pytree.flatten(params)[1])
    structure = pytree.flatten(params)[1]
    ours = pytree.unflatten(structure, [torch_params(theirs)[n].detach().clone() for n in names])
    source = copy.deepcopy(theirs.state_dict()) if from_dict else theirs
    opt, state = from_torch(source, ours, step_per_leaf=True)
    assert opt == AdamW(**options, kernel=kernel, step_per_leaf=True)
    for grads in after:
        torch_step(theirs, grads)
        ours, state = opt.update(grads, state, ours)
        assert_same_run(theirs, ours, state)


@thoroughly
@given(runs(), st.booleans())
def test_a_run_that_is_handed_over_goes_on_as_if_it_had_not_been(run, loaded_as_default):
    kernel, options, params, before, after = run
    opt = AdamW(**options, kernel=kernel, step_per_leaf=True)
    state = opt.init(params)
    for grads in before:
        params, state = opt.update(grads, state, params)

    theirs = torch_optimizer(params, **({} if loaded_as_default else TORCH_FLAGS[kernel]))
    theirs.load_state_dict(to_torch(opt, state, params))
    assert_same_run(theirs, params, state)
    for grads in after:
        torch_step(theirs, grads)
        params, state = opt.update(grads, state, params)
        assert_same_run(theirs, params, state)


@pytest.mark.filterwarnings("ignore:the source counts")  # all gradients drawn may be 0
@thoroughly
@given(runs(none=False), st.booleans())
def test_one_count_for_the_tree_is_handed_over_and_taken_back(run, in_place):
    kernel, options, params, before, after = run
    opt = AdamW(**options, kernel=kernel)
    ours, state = clone(params), opt.init(params)
    for grads in before:
        ours, state = opt.update(grads, state, ours)
    theirs = torch_optimizer(ours)
    theirs.load_state_dict(to_torch(opt, state, ours))
    for grads in after:
        torch_step(theirs, grads)
        ours, state = (opt.update_ if in_place else opt.update)(grads, state, ours)
    again, state_again = from_torch(theirs, ours)
    assert again == opt
    assert_same_bits(state_again, state)


def taken_over(gradients, **options):
    theirs = torch_optimizer({"a": torch.ones(2), "b": torch.ones(3)}, **options)
    for grads in gradients:
        torch_step(theirs, grads)
    return theirs, *from_torch(theirs, torch_params(theirs))


A, B = torch.full((2,), 0.5), torch.full((3,), -0.5)


def test_there_is_a_count_for_each_leaf_just_if_counts_differ():
    even = {"a": A, "b": B}
    _, opt, state = taken_over([even, even])
    assert not opt.step_per_leaf
    assert state.step == 2
    _, opt, state = taken_over([even, {"a": A, "b": None}])
    assert opt.step_per_leaf
    assert state.step == {"a": 2, "b": 1}
    _, opt, state = taken_over([{"a": None, "b": B}])
    assert opt.step_per_leaf
    assert state.step == {"a": 0, "b": 1}
    assert not state.exp_avg["a"].any()
    _, opt, state = taken_over([])
    assert not opt.step_per_leaf
    assert state.step == 0


def test_a_single_count_of_uneven_counts_is_refused():
    theirs, _, _ = taken_over([{"a": A, "b": None}])
    with pytest.raises(ValueError, match="made 0 updates of one parameter and 1 of another"):
        from_torch(theirs, torch_params(theirs), step_per_leaf=False)


def test_what_was_never_updated_has_no_entry():
    opt = AdamW(step_per_leaf=True)
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    state = opt.init(params)
    assert to_torch(opt, state, params)["state"] == {}
    _, state = opt.update({"a": None, "b": B}, state, params)
    assert set(to_torch(opt, state, params)["state"]) == {1}


def test_moments_with_a_count_of_zero_are_not_lost():
    opt, params = AdamW(), {"a": torch.ones(2)}
    state = opt.init(params)._replace(exp_avg={"a": torch.ones(2)})
    assert torch.equal(to_torch(opt, state, params)["state"][0]["exp_avg"], torch.ones(2))


# Memory, devices, counts and hyperparameters.


def storages(tree):
    return {leaf.untyped_storage().data_ptr() for leaf in leaves(tree) if leaf.numel()}


@pytest.mark.parametrize("amsgrad", [False, True])
def test_nothing_shares_memory_with_where_it_came_from(amsgrad):
    theirs = after_one_step(amsgrad=amsgrad, lr=torch.tensor(0.1))
    opt, state = from_torch(theirs, torch_params(theirs))
    live = [list(theirs.state.values()), theirs.param_groups[0]["lr"]]
    assert not storages((state, [opt.lr])) & storages(live)

    before, params = clone(state), clone(torch_params(theirs))
    given = to_torch(opt, state, params)
    assert not storages(given["state"]) & storages((state, params))
    assert len(storages(given["state"])) == len(leaves(given["state"]))
    loaded = torch_optimizer(params)
    loaded.load_state_dict(given)
    torch_step(loaded, UNLIKE)
    assert_same_bits(state, before)


def test_the_source_is_left_as_it_was():
    theirs = after_one_step()
    before = copy.deepcopy(theirs.state_dict())
    opt, state = from_torch(theirs, torch_params(theirs))
    opt.update_(UNLIKE, state, clone(SQUARES))
    after = theirs.state_dict()
    assert_same_bits(after["state"], before["state"])
    assert after["param_groups"] == before["param_groups"]
    assert len(torch_optimizer(SQUARES).state) == 0


def test_moments_lie_in_memory_as_their_parameters_do():
    tall = torch.randn(3, 4).T
    theirs = torch_optimizer({"w": tall})
    torch_step(theirs, {"w": torch.ones(4, 3)})
    saved = theirs.state_dict()
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].contiguous()
    _, state = from_torch(saved, {"w": tall})
    assert state.exp_avg["w"].stride() == tall.stride()


@pytest.mark.parametrize("kernel", ["fused", "foreach", "plain"])
def test_a_state_laid_out_otherwise_is_handed_over_in_the_strides_of_the_parameters(kernel):
    """Torch's fused kernel knows no strides, and would go on with the wrong moments, silently."""
    opt, params = AdamW(kernel=kernel), {"w": torch.randn(4, 3).T}
    state = opt.init(params)
    params, state = opt.update({"w": torch.randn(3, 4)}, state, params)
    state = tree_map(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), state)
    theirs = torch_optimizer(params)
    theirs.load_state_dict(to_torch(opt, state, params))
    grads = {"w": torch.randn(3, 4)}
    torch_step(theirs, grads)
    params, state = opt.update(grads, state, params)
    assert_same_run(theirs, params, state)


def test_moments_go_to_the_device_of_their_parameter(device):
    saved = after_one_step().state_dict()
    params = tree_map(lambda t: t.to(device), SQUARES)
    opt, state = from_torch(saved, params)
    assert {leaf.device.type for leaf in leaves(state)} == {device}
    assert opt.kernel == ("foreach" if device == "cuda" else "plain")


def test_an_old_state_dict_with_counts_that_are_numbers_is_read():
    saved = edit(lambda s, g: [entry.update(step=3) for entry in s["state"].values()])()
    assert from_torch(saved, SQUARES)[1].step == 3


@pytest.mark.parametrize("kernel", ["plain", "foreach"])
@pytest.mark.parametrize("count", [2**24 - 1, 2**24, 2**25 + 1])
def test_counts_are_handed_over_exactly_and_go_on_where_float32_stops(kernel, count):
    opt, params = AdamW(kernel=kernel, betas=(0.9, 1 - 1e-8)), {"w": torch.ones(2)}
    state = opt.init(params)._replace(step=torch.tensor(float(count), dtype=torch.float64))
    theirs = torch_optimizer(params)
    theirs.load_state_dict(to_torch(opt, state, params))
    params, state = opt.update({"w": torch.ones(2)}, state, params)
    torch_step(theirs, {"w": torch.ones(2)})
    assert state.step == count + 1
    assert_same_run(theirs, params, state)


HYPERPARAMETERS = [
    {"lr": torch.tensor(0.1, dtype=torch.float64)},
    {"lr": torch.tensor([0.1], dtype=torch.float64)},
    {"betas": (torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64))},
]


@pytest.mark.parametrize("options", HYPERPARAMETERS, ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_tensor_hyperparameters_stay_tensors_and_are_handed_over_as_numbers(options, fused):
    theirs = after_one_step(**options, fused=fused)
    opt, state = from_torch(theirs, torch_params(theirs))
    (name,) = options
    assert all(leaf.shape == () for leaf in leaves(opt))
    assert len(leaves(opt)) == len(leaves(options))
    params = clone(torch_params(theirs))
    (group,) = to_torch(opt, state, params)["param_groups"]
    assert group[name] == (0.1 if name == "lr" else (0.8, 0.9))
    torch_step(theirs, UNLIKE)
    params, state = opt.update(UNLIKE, state, params)
    assert_same_run(theirs, params, state)


DIFFERENTIABLE = {False: None, True: True}


@pytest.mark.parametrize("differentiable", DIFFERENTIABLE)
def test_torchs_differentiable_is_kept(differentiable):
    theirs = torch_optimizer(SQUARES, differentiable=differentiable)
    opt, state = from_torch(theirs, torch_params(theirs))
    assert opt.differentiable is DIFFERENTIABLE[differentiable]
    (group,) = to_torch(opt, state, SQUARES)["param_groups"]
    assert group["differentiable"] is differentiable


FLAGS = [
    ({}, "plain"),
    ({"foreach": False}, "plain"),
    ({"fused": False}, "plain"),
    ({"foreach": False, "fused": False}, "plain"),
    ({"foreach": True}, "foreach"),
    ({"fused": True}, "fused"),
]


@pytest.mark.parametrize(("flags", "kernel"), FLAGS, ids=str)
def test_the_kernel_is_the_one_that_torch_takes_on_the_cpu(flags, kernel):
    theirs = torch_optimizer(SQUARES, **flags)
    assert from_torch(theirs, torch_params(theirs))[0].kernel == kernel


HANDED = {"auto": "fused", "triton": "fused", "fused": "fused", "foreach": "foreach"}


@pytest.mark.parametrize("kernel", ["auto", "triton", "fused", "foreach", "plain"])
def test_every_kernel_has_its_flags(kernel):
    opt = AdamW(kernel=kernel)
    saved = to_torch(opt, opt.init(SQUARES), SQUARES)
    assert from_torch(saved, SQUARES)[0].kernel == HANDED.get(kernel, "plain")


COMPLEX = {"w": torch.ones(2, dtype=torch.complex64)}


def test_auto_is_handed_over_as_plain_where_torchs_fused_kernel_does_not_serve():
    opt = AdamW()
    (group,) = to_torch(opt, opt.init(COMPLEX), COMPLEX)["param_groups"]
    assert (group["foreach"], group["fused"]) == (False, False)


def huge(opt):
    return opt.init(SQUARES)._replace(step=torch.tensor(2.0**24, dtype=torch.float64))


NOT_HANDED = {
    "a schedule": (AdamW(lr=lambda step: 0.1), SQUARES, None, "lr is a schedule"),
    "stacked": (AdamW(lr=torch.ones(3)), SQUARES, None, r"lr has shape \(3,\)"),
    "complex": (AdamW(kernel="fused"), COMPLEX, None, "a leaf is complex, which torch's fused"),
    "recorded": (AdamW(kernel="fused", differentiable=True), SQUARES, None, "differentiable is"),
    "recorded list": (
        AdamW(kernel="foreach", differentiable=True),
        SQUARES,
        None,
        "differentiable is True, which torch's foreach",
    ),
    "far": (AdamW(kernel="fused"), SQUARES, huge, "a count is 16777216"),
    "named alike": (AdamW(), {"a.b": FIRST, "a": {"b": FIRST + 1}}, None, "both named 'a.b'"),
    "another's state": (
        AdamW(),
        SQUARES,
        lambda opt: opt.init({"first": FIRST}),
        "state.exp_avg does not have the structure of params",
    ),
    "no amsgrad": (
        AdamW(amsgrad=True),
        SQUARES,
        lambda opt: AdamW().init(SQUARES),
        "max_exp_avg_sq is empty",
    ),
    "no state": (AdamW(), SQUARES, lambda opt: SQUARES, "got AdamW and dict"),
}


@pytest.mark.parametrize("name", NOT_HANDED)
def test_what_torch_cannot_go_on_from_is_refused(name):
    opt, params, state_of, message = NOT_HANDED[name]
    state = (state_of or type(opt).init.__get__(opt))(params if state_of is None else opt)
    with pytest.raises((ValueError, TypeError), match=message):
        to_torch(opt, state, params)


def test_moments_on_the_meta_device_are_refused_and_not_lost():
    theirs = torch_optimizer(SQUARES)
    nowhere = {name: leaf.to("meta") for name, leaf in SQUARES.items()}
    with pytest.raises(ValueError, match=r"params\['first'\] is on the meta device"):
        from_torch(theirs.state_dict(), nowhere)


def test_a_list_has_no_names_to_hand_over():
    params = list(SQUARES.values())
    opt = AdamW()
    (group,) = to_torch(opt, opt.init(params), params)["param_groups"]
    assert "param_names" not in group


def test_a_state_dict_goes_through_a_file_that_is_loaded_with_weights_only():
    theirs = after_one_step(amsgrad=True)
    opt, state = from_torch(theirs, torch_params(theirs))
    file = io.BytesIO()
    torch.save(to_torch(opt, state, SQUARES), file)
    file.seek(0)
    again, state_again = from_torch(torch.load(file, weights_only=True), SQUARES)
    assert again == dataclasses.replace(opt)
    assert_same_bits(state_again, state)


def test_a_scheduler_leaves_the_learning_rate_of_the_moment():
    theirs = after_one_step(lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that step() came before the scheduler was built
        torch.optim.lr_scheduler.ExponentialLR(theirs, 0.5).step()
    assert from_torch(theirs, torch_params(theirs))[0].lr == 0.05
