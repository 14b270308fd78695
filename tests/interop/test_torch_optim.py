"""To and from torch.optim: going on in either direction is as if nothing had been switched."""

import copy
import dataclasses
import io
import warnings
from collections import OrderedDict

import hypothesis
import optree
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from funcopt import AdamW, _tree
from funcopt.interop import from_torch, to_torch
from funcopt.testing import strategies

from ..cases import TORCH_FLAGS, Point, assert_same_bits, clone, leaves, tree_map

thoroughly = hypothesis.settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def named(params):
    """The leaves by the names of a module, in the order in which the tree was filled."""
    flat, structure = _tree.flatten(params)
    names = _tree.names(structure)
    return {names[index]: flat[index] for index in _tree.insertion_order(structure)}


def torch_optimizer(params, **options):
    """A torch.optim.AdamW of copies, built with names."""
    copies = {name: torch.nn.Parameter(leaf.clone()) for name, leaf in named(params).items()}
    return torch.optim.AdamW(copies.items(), **options)


def torch_params(theirs):
    (group,) = theirs.param_groups
    return dict(zip(group["param_names"], group["params"], strict=True))


def torch_step(theirs, grads):
    """Step with gradients laid out as backward() does: torch's fused kernel knows no strides."""
    own = torch_params(theirs)
    for name, grad in named(grads).items():
        like = torch.empty_like(own[name])
        own[name].grad = None if grad is None else like.detach().copy_(grad)
    theirs.step()


def assert_same_run(theirs, params, state):
    """Their parameters, moments and counts are ours."""
    flat, structure = _tree.flatten(params)
    counts = _tree.flatten(state.step)[0]
    for index, name in enumerate(_tree.names(structure)):
        param = torch_params(theirs)[name]
        own = theirs.state.get(param, {})
        assert_same_bits(param.detach(), flat[index].detach())
        count = counts[index] if len(counts) == len(flat) else counts[0]
        assert float(own.get("step", 0.0)) == float(count)
        for key in set(own) - {"step"}:
            assert_same_bits(own[key], _tree.flatten(getattr(state, key))[0][index])


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


@thoroughly
@given(runs(), st.booleans())
def test_a_run_that_is_taken_over_goes_on_as_if_it_had_not_been(run, from_dict):
    kernel, options, params, before, after = run
    theirs = torch_optimizer(params, **options, **TORCH_FLAGS[kernel])
    for grads in before:
        torch_step(theirs, grads)

    names = _tree.names(_tree.flatten(params)[1])
    structure = _tree.flatten(params)[1]
    ours = _tree.unflatten(structure, [torch_params(theirs)[n].detach().clone() for n in names])
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


# Which parameter is which.


def reversed_names(theirs):
    """The state dict as an optimizer would have saved it whose parameters came the other way."""
    saved = copy.deepcopy(theirs.state_dict())
    (group,) = saved["param_groups"]
    group["param_names"].reverse()
    group["params"].reverse()
    return saved


SQUARES = {"first": torch.zeros(2, 2), "second": torch.zeros(2, 2)}
UNLIKE = {"first": torch.full((2, 2), 1.0), "second": torch.full((2, 2), 2.0)}


def after_one_step(**options):
    theirs = torch_optimizer(SQUARES, **options)
    torch_step(theirs, UNLIKE)
    return theirs


def assert_matched(state):
    assert torch.all(state.exp_avg["first"] < state.exp_avg["second"])


def test_a_state_dict_is_matched_by_name_whatever_the_order():
    theirs = after_one_step()
    saved = reversed_names(theirs)
    assert_matched(from_torch(saved, SQUARES)[1])
    assert_matched(from_torch(saved, dict(reversed(SQUARES.items())))[1])
    loaded = torch_optimizer(SQUARES)
    loaded.load_state_dict(saved)  # which torch does not do
    assert torch.all(loaded.state[loaded.param_groups[0]["params"][0]]["exp_avg"] > 0.15)


def test_an_optimizers_own_tensors_are_matched_by_identity_before_any_name():
    theirs = after_one_step()
    own = torch_params(theirs)
    theirs.param_groups[0]["param_names"].reverse()
    assert_matched(from_torch(theirs, own)[1])
    unnamed = torch.optim.AdamW(reversed(own.values()))
    torch_step_of = dict(zip(own.values(), UNLIKE.values(), strict=True))
    for param, grad in torch_step_of.items():
        param.grad = grad
    unnamed.step()
    assert_matched(from_torch(unnamed, own)[1])
    nested = from_torch(unnamed, {"layer": [own["first"], Point(own["second"], ())]})[1]
    assert torch.all(nested.exp_avg["layer"][0] < nested.exp_avg["layer"][1].x)


@pytest.fixture(params=["in order of insertion", "sorted"])
def _flattened(request, monkeypatch):
    """Both ways of flattening a dict: optree sorts its keys unless torch has told it not to."""
    monkeypatch.setattr(_tree, "_structures", {})
    with optree.dict_insertion_ordered(request.param != "sorted", namespace="torch"):
        yield


@pytest.mark.usefixtures("_flattened")
@pytest.mark.parametrize("kind", [dict, OrderedDict, lambda params: list(params.values())])
def test_without_names_a_flat_tree_is_matched_in_the_order_in_which_it_was_filled(kind):
    params = {name: torch.zeros(2) for name in ("c", "a", "b")}
    theirs = torch.optim.AdamW([torch.nn.Parameter(leaf.clone()) for leaf in params.values()])
    for number, param in enumerate(theirs.param_groups[0]["params"], 1):
        param.grad = torch.full((2,), 10.0 * number)
    theirs.step()

    opt, state = from_torch(theirs.state_dict(), kind(params))
    moments = state.exp_avg if isinstance(state.exp_avg, list) else list(state.exp_avg.values())
    assert [round(moment[0].item()) for moment in moments] == [1, 2, 3]
    saved = to_torch(opt, state, kind(params))
    assert_same_bits(saved["state"], theirs.state_dict()["state"])
    if kind is dict:
        assert saved["param_groups"][0]["param_names"] == ["c", "a", "b"]


def test_nested_trees_are_named_by_their_keys_joined_by_dots():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    theirs = torch.optim.AdamW(model.named_parameters())
    model(torch.ones(2)).sum().backward()
    theirs.step()
    params = [{"weight": layer.weight.clone(), "bias": layer.bias.clone()} for layer in model]
    opt, state = from_torch(theirs.state_dict(), params)
    assert torch.equal(state.exp_avg[1]["bias"], theirs.state[model[1].bias]["exp_avg"])
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert to_torch(opt, state, params)["param_groups"][0]["param_names"] == names


def test_a_state_dict_that_is_keyed_by_names_is_matched_by_them():
    saved = after_one_step().state_dict()
    (group,) = saved["param_groups"]
    names = group.pop("param_names")
    group["params"] = names
    saved["state"] = {names[key]: entry for key, entry in saved["state"].items()}
    assert_matched(from_torch(saved, dict(reversed(SQUARES.items())))[1])


# What is refused. Each row: a change to a state dict of `after_one_step`, other parameters if any,
# and the message.


def edit(function):
    def edited():
        saved = copy.deepcopy(after_one_step().state_dict())
        function(saved, saved["param_groups"][0])
        return saved

    return edited


def of(optimizer, **options):
    def made():
        return optimizer([torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)], **options)

    return made


def unnamed(saved, group):
    del group["param_names"]


def two_groups(saved, group, **options):
    saved["param_groups"].append({**group, **options})
    group["params"], saved["param_groups"][1]["params"] = [0], [1]


FIRST = SQUARES["first"]
REFUSED = {
    "no entry": (edit(lambda s, g: g["params"].append(2)), "3 parameters and 2 names"),
    "unlisted": (edit(lambda s, g: s["state"].update({5: {}})), "state for 5, which its param"),
    "Adam": (of(torch.optim.Adam), "the source says False, as torch.optim.Adam does"),
    "old": (
        edit(lambda s, g: g.pop("decoupled_weight_decay")),
        "decoupled, the source does not say",
    ),
    "RAdam": (of(torch.optim.RAdam, decoupled_weight_decay=True), "no 'amsgrad', 'fused'"),
    "NAdam": (of(torch.optim.NAdam, decoupled_weight_decay=True), "no 'amsgrad', 'fused'"),
    "SGD": (of(torch.optim.SGD), "not that of a torch.optim.AdamW"),
    "equal groups": (edit(two_groups), "2 param groups, which agree in every option"),
    "groups": (
        edit(lambda s, g: two_groups(s, g, lr=7.0)),
        "2 param groups, which differ in lr: only .* not served yet",
    ),
    "no step": (edit(lambda s, g: s["state"][0].pop("step")), r"params\['first'\] lacks step"),
    "no moment": (
        edit(lambda s, g: s["state"][1].pop("exp_avg_sq")),
        r"params\['second'\] lacks exp_avg_sq",
    ),
    "no maximum": (edit(lambda s, g: g.update(amsgrad=True)), "lacks max_exp_avg_sq"),
    "more": (edit(lambda s, g: s["state"][0].update(mu=1)), "has mu beyond it"),
    "shape": (
        edit(lambda s, g: s["state"][0].update(exp_avg=torch.ones(4))),
        r"exp_avg for params\['first'\]: shape \(4,\), the parameter has \(2, 2\)",
    ),
    "dtype": (
        edit(lambda s, g: s["state"][0].update(exp_avg=torch.ones(2, 2).double())),
        r"exp_avg for params\['first'\]: dtype torch.float64, the parameter has torch.float32",
    ),
    "sparse": (
        edit(lambda s, g: s["state"][0].update(exp_avg=torch.ones(2, 2).to_sparse())),
        "layout torch.sparse_coo",
    ),
    "no tensor": (edit(lambda s, g: s["state"][0].update(exp_avg=1.0)), "of type float, not"),
    "half step": (edit(lambda s, g: s["state"][0].update(step=0.5)), "step for .* is 0.5"),
    "step below 0": (edit(lambda s, g: s["state"][0].update(step=-1)), "is -1: a count"),
    "no number": (
        edit(lambda s, g: s["state"][0].update(step=torch.tensor(float("nan")))),
        r"is tensor\(nan\): a count",
    ),
    "two of a name": (edit(lambda s, g: g.update(param_names=["first"] * 2)), "two parameters one"),
    "range": (edit(lambda s, g: g.update(lr=float("inf"))), "lr=inf: lr must be finite"),
    "other dict": (
        lambda: {"first": torch.ones(2)},
        "of type dict: it must be a torch.optim.AdamW",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_source_that_cannot_be_taken_over_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        from_torch(make(), SQUARES)


REFUSED_PARAMS = {
    "renamed": (
        {"first": FIRST, "third": FIRST.clone()},
        None,
        "params has 'third', which the source lacks, and the source has 'second', which params",
    ),
    "missing": ({"first": FIRST}, None, "the source has 'second', which params lacks"),
    "too few": ({"first": FIRST}, unnamed, "the source has 2 parameters, params has 1"),
    "nested": ({"layer": SQUARES}, unnamed, "params is a nested tree, whose order is not certain"),
    "alike": ({"a.b": FIRST, "a": {"b": FIRST.clone()}}, None, "are both named 'a.b'"),
    "tied": ({"first": FIRST, "second": FIRST}, None, "shares its memory"),
    "integers": ({"first": torch.ones(2).long()}, None, "has dtype torch.int64"),
}


@pytest.mark.parametrize("name", REFUSED_PARAMS)
def test_parameters_that_do_not_match_are_refused(name):
    params, change, message = REFUSED_PARAMS[name]
    with pytest.raises((ValueError, TypeError), match=message):
        from_torch(edit(change or (lambda s, g: None))(), params)


def test_an_optimizers_own_tensors_must_all_be_there_and_no_other():
    theirs = after_one_step()
    own = torch_params(theirs)
    with pytest.raises(ValueError, match="the source has 'second', which params lacks"):
        from_torch(theirs, {"first": own["first"]})
    with pytest.raises(
        ValueError, match=r"params has \"params\['third'\]\", which the source lacks"
    ):
        from_torch(theirs, {**own, "third": torch.ones(1)})


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
    "far": (AdamW(kernel="fused"), SQUARES, huge, "a count is 2"),
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
    "no state": (AdamW(), SQUARES, lambda opt: SQUARES, "got a AdamW and a dict"),
}


@pytest.mark.parametrize("name", NOT_HANDED)
def test_what_torch_cannot_go_on_from_is_refused(name):
    opt, params, state_of, message = NOT_HANDED[name]
    state = (state_of or type(opt).init.__get__(opt))(params if state_of is None else opt)
    with pytest.raises((ValueError, TypeError), match=message):
        to_torch(opt, state, params)


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
