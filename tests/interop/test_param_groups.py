"""Param groups of torch.optim and a Partition: each goes on as the other would have."""

import copy
import io
import pickle

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import nn

from funcopt import AdamW, Clip, Frozen, Partition, PartitionState
from funcopt._core import pytree
from funcopt.interop import from_state_dict, from_torch, to_state_dict, to_torch
from funcopt.testing import strategies

from ..cases import KERNELS, TORCH_FLAGS, assert_same_bits, clone, random_like
from .formats import FORMATS
from .runs import named

thoroughly = hypothesis.settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)

# Three groups, in no order of the model: what is of one dimension, one layer, and the rest.
GROUPS = {
    "flat": {"lr": 0.03, "weight_decay": 0.0, "betas": (0.5, 0.75)},
    "head": {"lr": 0.1, "amsgrad": True, "maximize": True},
    "body": {"lr": 0.01, "weight_decay": 0.3, "eps": 1e-6},
}


def label(name, leaf=None):
    return "flat" if name.endswith("bias") else "head" if name.startswith("2") else "body"


def network(dtype=torch.float32):
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)).to(dtype)


def grouped(params, labels, with_names=True):
    """The parameters of each group as torch takes them, by label, in the order of the model."""
    found = {}
    for name, param in named(params).items():
        found.setdefault(labels[name], []).append((name, param) if with_names else param)
    return found


def torch_groups(params, with_names=True, own_names=True, groups=GROUPS, **options):
    """A torch.optim.AdamW of these very tensors in groups, and its parameters by name."""
    found = grouped(params, {name: label(name) for name in params}, with_names)
    return torch.optim.AdamW(
        [
            {"params": found[own], **chosen, **({"name": own} if own_names else {})}
            for own, chosen in groups.items()
        ],
        **options,
    )


def steps(theirs, params, gradients):
    for grads in gradients:
        for name, param in params.items():
            grad = grads[name]
            param.grad = None if grad is None else torch.empty_like(param).detach().copy_(grad)
        theirs.step()


def detached(params):
    return {name: param.detach().clone() for name, param in params.items()}


def assert_same_run(theirs, own, params, state, labels):
    """Their parameters, moments and counts are ours, group by group."""
    for name, param in own.items():
        entry = theirs.state.get(param, {})
        inner = state.inner[labels[name]]
        assert_same_bits(param.detach(), params[name].detach())
        step = inner.step[name] if isinstance(inner.step, dict) else inner.step
        assert float(entry.get("step", 0.0)) == float(step)
        for key in set(entry) - {"step"}:
            assert_same_bits(entry[key], getattr(inner, key)[name])


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def keyed_by_names(theirs, model):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(model, theirs)


# How what torch has is handed to from_torch: the source, and whether the parameters are its own,
# or copies in an order: that of the model, of the groups, or the model's reversed.
WAYS = {
    "the optimizer": (True, lambda theirs, model: theirs, "own"),
    "the optimizer, without names": (False, lambda theirs, model: theirs, "own"),
    "a file": (True, lambda theirs, model: through_a_file(theirs.state_dict()), "model"),
    "a file, without names": (
        False,
        lambda theirs, model: through_a_file(theirs.state_dict()),
        "groups",
    ),
    "a file, in another order": (
        True,
        lambda theirs, model: through_a_file(theirs.state_dict()),
        "reversed",
    ),
    "keyed by names": (False, keyed_by_names, "model"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("way", WAYS)
def test_groups_are_taken_over_after_ten_steps_and_ten_more_are_torchs_to_the_bit(
    way, kernel, dtype
):
    with_names, source_of, which = WAYS[way]
    model = network(dtype)
    own = dict(model.named_parameters())
    labels = {name: label(name) for name in own}
    theirs = torch_groups(own, with_names, **TORCH_FLAGS[kernel])
    gradients = [random_like(detached(own)) for _ in range(20)]
    steps(theirs, own, gradients[:10])
    params = own if which == "own" else detached(own)
    if which == "groups":
        params = {
            name: params[name] for group in GROUPS for name in params if labels[name] == group
        }
    if which == "reversed":
        params = dict(reversed(params.items()))
    opt, state = from_torch(source_of(theirs, model), params)
    assert opt.inner == {name: AdamW(**GROUPS[name], kernel=kernel) for name in GROUPS}
    assert list(opt.inner) == list(GROUPS)
    assert opt.labels == labels
    params = detached(params)
    in_place, state_in_place = clone(params), clone(state)
    for grads in gradients[10:]:
        params, state = opt.update(grads, state, params)
        opt.update_(grads, state_in_place, in_place)
    steps(theirs, own, gradients[10:])
    assert_same_run(theirs, own, params, state, labels)
    assert_same_bits((in_place, state_in_place), (params, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("with_names", [False, True])
def test_groups_are_handed_over_after_ten_steps_and_ten_more_are_ours_to_the_bit(
    with_names, kernel, dtype
):
    own = dict(network(dtype).named_parameters())
    labels = {name: label(name) for name in own}
    opt = Partition({name: AdamW(**GROUPS[name], kernel=kernel) for name in GROUPS}, label)
    gradients = [random_like(detached(own)) for _ in range(20)]
    params, state = detached(own), opt.init(own)
    for grads in gradients[:10]:
        params, state = opt.update(grads, state, params)
    d = through_a_file(to_torch(opt, state, params))

    own = {name: nn.Parameter(leaf.clone()) for name, leaf in params.items()}
    theirs = torch_groups(own, with_names, own_names=False)
    theirs.load_state_dict(d)
    assert [group["name"] for group in theirs.param_groups] == list(GROUPS)
    steps(theirs, own, gradients[10:])
    for grads in gradients[10:]:
        params, state = opt.update(grads, state, params)
    assert_same_run(theirs, own, params, state, labels)
    again, state_again = from_torch(theirs, own)
    assert again == Partition(opt.inner, labels)
    assert_same_bits(state_again, state)


# Round trips of drawn runs.


@st.composite
def partitions(draw):
    """A Partition on a tree of any kind, maybe frozen in part, and gradients for it."""
    kernel = draw(st.sampled_from(KERNELS))
    dtype = st.sampled_from([torch.float32, torch.float64])
    params = draw(strategies.params(dtype=dtype))
    names = list(named(params))
    inner = {
        name: AdamW(**{**draw(strategies.hyperparameters()), "step_per_leaf": True}, kernel=kernel)
        for name in draw(st.permutations("abc"))[: draw(st.integers(1, 3))]
    }
    found = {name: draw(st.sampled_from([*inner, "frozen"])) for name in names}
    present = set(found.values())
    inner = {name: own for name, own in inner.items() if name in present}
    if "frozen" in present:
        inner["frozen"] = Frozen()
    one = strategies.gradients(params, none=True)
    before = draw(st.lists(one, max_size=2))
    after = draw(st.lists(one, min_size=1, max_size=2))
    opt = Partition(inner, lambda name, leaf: found[name])
    return opt, found, params, before, after


@pytest.mark.filterwarnings("ignore:the source counts")  # all gradients drawn may be 0
@thoroughly
@given(partitions(), st.booleans())
def test_a_run_that_goes_to_torch_and_back_goes_on_as_if_it_had_not(run, moves_in_torch):
    opt, found, params, before, after = run
    hypothesis.assume(set(found.values()) != {"frozen"})
    state = opt.init(params)
    for grads in before:
        params, state = opt.update(grads, state, params)

    d = to_torch(opt, state, params)
    own = {name: nn.Parameter(leaf.clone()) for name, leaf in named(params).items()}
    theirs = torch.optim.AdamW(
        {"params": [(name, own[name]) for name in group["param_names"]]}
        for group in d["param_groups"]
    )
    theirs.load_state_dict(d)
    if moves_in_torch:
        moving = {name: param for name, param in own.items() if found[name] != "frozen"}
        for grads in after:
            steps(theirs, moving, [named(grads)])
            params, state = opt.update(grads, state, params)
    structure = pytree.flatten(params)[1]
    names = pytree.names(structure)
    ours = pytree.unflatten(structure, [own[name] for name in names])
    for source in (theirs, theirs.state_dict()):
        again, state_again = from_torch(source, ours, step_per_leaf=True, frozen="frozen")
        assert again.inner == opt.inner
        assert pytree.flatten(again.labels) == ([found[name] for name in names], structure)
        assert_same_bits(state_again, state)
        assert_same_bits(again.init(params), opt.init(params))
    assert_same_bits(detached(own), named(params))


# Labels.


def two_groups(first=None, second=None, **options):
    """Two layers of one parameter each, a step on, with other keys in their groups."""
    own = {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2))}
    groups = [
        {"params": [(name, param)], **(extra or {})}
        for (name, param), extra in zip(own.items(), (first, second), strict=True)
    ]
    theirs = torch.optim.AdamW(groups, **options)
    steps(theirs, own, [{"a": torch.ones(2), "b": 2 * torch.ones(2)}])
    return theirs, own


LABELS = {
    "numbers": ({}, {}, None, ["0", "1"]),
    "names": ({"name": "x"}, {"name": "y"}, None, ["x", "y"]),
    "one name": ({}, {"name": "y"}, None, ["0", "y"]),
    "names that are no strings": ({"name": None}, {"name": 7}, None, ["0", "1"]),
    "as given": ({"name": "x"}, {}, ["p", "q"], ["p", "q"]),
    "as given, in a tuple": ({}, {}, ("p", "q"), ["p", "q"]),
}


@pytest.mark.parametrize("name", LABELS)
def test_a_group_is_labelled_as_is_given_or_by_its_own_name_or_its_number(name):
    first, second, group_names, labels = LABELS[name]
    theirs, own = two_groups(first, second)
    for source in (theirs, theirs.state_dict()):
        opt, state = from_torch(source, own, group_names=group_names)
        assert list(opt.inner) == list(state.inner) == labels
        assert opt.labels == dict(zip("ab", labels, strict=True))
        assert state.inner[labels[1]].exp_avg["b"][0] == torch.tensor(0.2)


def test_a_number_is_not_handed_over_as_a_name_and_comes_back_all_the_same():
    theirs, own = two_groups({}, {"name": "y"})
    opt, state = from_torch(theirs, own)
    first, second = to_torch(opt, state, own)["param_groups"]
    assert "name" not in first
    assert second["name"] == "y"
    assert first.keys() == set(theirs.state_dict()["param_groups"][0])


def test_a_number_that_is_another_groups_is_a_name():
    params = {"a": torch.ones(1), "b": torch.ones(1)}
    inner = {"1": AdamW(lr=0.1, kernel="fused"), "0": AdamW(lr=0.2, kernel="plain")}
    opt = Partition(inner, {"a": "0", "b": "1"})
    d = to_torch(opt, opt.init(params), params)
    again, _ = from_torch(d, params)
    assert again == opt
    assert list(again.inner) == ["1", "0"]


@pytest.mark.parametrize("name", [None, "all", 3])
def test_one_group_is_an_adamw_unless_labels_are_asked_for(name):
    own = {"a": nn.Parameter(torch.ones(2))}
    theirs = torch.optim.AdamW([{"params": own.items(), "name": name}])
    opt, state = from_torch(theirs, own)
    assert opt == AdamW(kernel="plain")
    expected = "all" if name == "all" else "0"
    assert from_torch(theirs, own, frozen="rest")[0] == Partition({expected: opt}, {"a": expected})
    opt, state = from_torch(theirs, own, group_names=["one"])
    assert opt == Partition({"one": AdamW(kernel="plain")}, {"a": "one"})
    assert isinstance(state, PartitionState)


def test_a_partition_that_was_taken_over_is_plain_data():
    theirs, own = two_groups()
    opt, _ = from_torch(theirs, own)
    assert pickle.loads(pickle.dumps(opt)) == opt


# Each group by itself.


def test_each_group_counts_by_itself():
    model = network()
    own = dict(model.named_parameters())
    theirs = torch_groups(own)
    grads = random_like(detached(own))
    uneven = {**grads, "0.weight": None, "2.weight": None}  # one of body's two, and head's only one
    steps(theirs, own, [grads, uneven])
    opt, state = from_torch(theirs, own)
    assert [each.step_per_leaf for each in opt.inner.values()] == [False, False, True]
    assert state.inner["flat"].step == 2
    assert state.inner["head"].step == 1
    assert state.inner["body"].step == {"0.weight": 1, "1.weight": 2}
    opt, _ = from_torch(theirs, own, step_per_leaf=True)
    assert all(each.step_per_leaf for each in opt.inner.values())
    with pytest.raises(
        ValueError, match="param group 'body': step_per_leaf=False: the source made"
    ):
        from_torch(theirs, own, step_per_leaf=False)


def test_each_group_has_its_own_kernel_both_ways():
    own = {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2))}
    theirs = torch.optim.AdamW(
        [{"params": [own["a"]], "fused": True}, {"params": [own["b"]], "foreach": True}]
    )
    opt, state = from_torch(theirs, own)
    assert [each.kernel for each in opt.inner.values()] == ["fused", "foreach"]
    groups = to_torch(opt, state, own)["param_groups"]
    assert [(group["fused"], group["foreach"]) for group in groups] == [
        (True, False),
        (False, True),
    ]


def test_a_complex_leaf_makes_its_own_group_plain_and_no_other():
    params = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.complex64)}
    opt = Partition({"x": AdamW(), "y": AdamW()}, {"a": "x", "b": "y"})
    groups = to_torch(opt, opt.init(params), params)["param_groups"]
    assert [group["fused"] for group in groups] == [True, False]


@pytest.mark.usefixtures("_flattened")
def test_parameters_are_numbered_as_torch_numbers_them_in_the_order_in_which_they_were_filled():
    params = {name: torch.ones(2) for name in ("c", "z", "b", "a")}
    opt = Partition(
        {"second": AdamW(), "first": AdamW()}, lambda name, _: "first" if name in "zb" else "second"
    )
    grads = {name: torch.full((2,), float(number)) for number, name in enumerate(params, 1)}
    _, state = opt.update(grads, opt.init(params), params)
    d = to_torch(opt, state, params)
    own = {name: nn.Parameter(leaf) for name, leaf in params.items()}
    theirs = torch.optim.AdamW(
        [{"params": [(n, own[n]) for n in "ca"]}, {"params": [(n, own[n]) for n in "zb"]}]
    )
    steps(theirs, own, [grads])
    listed = theirs.state_dict()
    for key in ("params", "param_names"):
        assert [group[key] for group in d["param_groups"]] == [
            group[key] for group in listed["param_groups"]
        ]
    assert d["state"].keys() == listed["state"].keys()
    again, state_again = from_torch(d, params)
    assert dict(again.labels) == {"c": "second", "a": "second", "z": "first", "b": "first"}
    assert_same_bits(state_again, state)


def test_a_list_in_groups_has_names_so_that_it_comes_back():
    params = [torch.full((2,), float(i)) for i in range(3)]
    opt = Partition({"x": AdamW(lr=0.1), "y": AdamW(lr=0.2)}, ["x", "y", "x"])
    _, state = opt.update(params, opt.init(params), params)
    d = to_torch(opt, state, params)
    assert [group["param_names"] for group in d["param_groups"]] == [["0", "2"], ["1"]]
    again, state_again = from_torch(d, params)
    assert again.labels == ["x", "y", "x"]
    assert_same_bits(state_again, state)


def test_a_count_beyond_float32_and_halves_go_there_and_back():
    params = {"a": torch.ones((), dtype=torch.bfloat16), "b": torch.zeros(0, 3)}
    opt = Partition({"x": AdamW(kernel="plain"), "y": AdamW(kernel="fused")}, {"a": "x", "b": "y"})
    _, state = opt.update(params, opt.init(params), params)
    state.inner["x"] = state.inner["x"]._replace(step=torch.tensor(2.0**25 + 1).double())
    again, state_again = from_torch(through_a_file(to_torch(opt, state, params)), params)
    assert again == opt
    assert_same_bits(state_again, state)
    state.inner["y"] = state.inner["y"]._replace(step=torch.tensor(2.0**25).double())
    with pytest.raises(ValueError, match=r"inner\['y'\]: a count is 33554432, at least 2\*\*24"):
        to_torch(opt, state, params)


# Frozen leaves.


@pytest.mark.parametrize("how", ["own", "named"])
def test_what_torch_does_not_train_is_frozen_if_asked(how):
    model = network()
    for param in model[1].parameters():
        param.requires_grad_(False)
    own = dict(model.named_parameters())
    trained = {name: param for name, param in own.items() if param.requires_grad}
    theirs = torch_groups(trained)
    gradients = [random_like(detached(own)) for _ in range(4)]
    steps(theirs, trained, gradients[:2])
    with pytest.raises(ValueError, match=r"params has .*1\.weight.*lacks.*frozen='frozen'"):
        from_torch(theirs, own)
    source, given_params = (theirs, own) if how == "own" else (theirs.state_dict(), detached(own))
    opt, state = from_torch(source, given_params, frozen="rest")
    assert opt.inner["rest"] == Frozen()
    assert state.inner["rest"] == ()
    assert [name for name in own if opt.labels[name] == "rest"] == ["1.weight", "1.bias"]
    params = detached(own)
    for grads in gradients[2:]:
        params, state = opt.update(grads, state, params)
    steps(theirs, trained, gradients[2:])
    assert_same_run(theirs, trained, params, state, opt.labels)
    d = to_torch(opt, state, params)
    assert [group["name"] for group in d["param_groups"]] == list(GROUPS)
    again, state_again = from_torch(d, params, frozen="rest")
    assert again == opt
    assert_same_bits(state_again, state)


def test_a_frozen_leaf_may_be_of_integers_but_no_parameter_of_the_source_may_be_missing():
    theirs, own = two_groups()
    opt, _ = from_torch(theirs, {**own, "count": torch.tensor(3)}, frozen="rest")
    assert opt.labels["count"] == "rest"
    with pytest.raises(ValueError, match="the source has 'b', which params lacks"):
        from_torch(theirs.state_dict(), {"a": own["a"], "count": torch.tensor(3)}, frozen="rest")


@pytest.mark.parametrize("name", ["c", "d"])
def test_two_leaves_with_one_memory_are_refused_in_whatever_groups(name):
    params = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2), "d": torch.ones(2)}
    opt = Partition(
        {"x": AdamW(), "y": AdamW(), "f": Frozen()}, dict(zip("abcd", "xxyf", strict=True))
    )
    d = to_torch(opt, opt.init(params), params)
    params[name] = params["a"]
    with pytest.raises(ValueError, match="shares its memory"):
        from_torch(d, params, frozen="f")


# Checkpoints.


@pytest.mark.parametrize("kind", FORMATS)
def test_a_partition_that_was_taken_over_resumes_from_every_format_under_stable_keys(
    kind, tmp_path
):
    save, load = FORMATS[kind]
    own = dict(network().named_parameters())
    theirs = torch_groups(own)
    gradients = [random_like(detached(own)) for _ in range(3)]
    steps(theirs, own, gradients[:2])
    opt, state = from_torch(theirs, own)
    save(to_state_dict(state), tmp_path / "checkpoint")
    template = Partition(opt.inner, label).init(own)  # that of the code which made the groups
    found = load(tmp_path / "checkpoint", to_state_dict(template))
    assert sorted(key for key in found if "exp_avg[" in key) == sorted(
        f"state.inner['{label(name)}'].exp_avg['{name}']" for name in own
    )
    resumed = from_state_dict(template, found)
    assert_same_bits(resumed, state)
    params = detached(own)
    assert_same_bits(
        opt.update(gradients[2], resumed, params), opt.update(gradients[2], state, params)
    )


# What is refused.


def saved(change=None, **options):
    theirs, _ = two_groups({"name": "x"}, {"name": "y"}, **options)
    d = copy.deepcopy(theirs.state_dict())
    if change is not None:
        change(d, *d["param_groups"])
    return d


def emptied(d, x, y):
    d["param_groups"].append({**x, "params": [], "param_names": [], "name": "z"})


def unnamed(d, x, y):
    del x["param_names"], y["param_names"]


REFUSED = {
    "two of a name": (saved(lambda d, x, y: y.update(name="x")), {}, "2 param groups .* name 'x'"),
    "a number's name": (
        saved(lambda d, x, y: (x.update(name="1"), y.pop("name"))),
        {},
        r"name '1'.*group_names=\['0', '1'\]",
    ),
    "names alike": (saved(), {"group_names": ["p", "p"]}, "2 param groups have the name 'p'"),
    "too few names": (saved(), {"group_names": ["p"]}, "the source has 2 param groups, so there"),
    "a name alone": (saved(), {"group_names": "xy"}, "must be a list of strings"),
    "a number": (saved(), {"group_names": 2}, "must be a list of strings"),
    "frozen for a flag": (saved(), {"frozen": True}, "frozen=True: must be a label"),
    "no strings": (saved(), {"group_names": [1, 2]}, "must be a list of strings"),
    "frozen alike": (saved(), {"frozen": "y"}, "frozen='y': a param group has that label"),
    "empty": (saved(emptied), {}, "param group 'z': it has no parameters"),
    "old": (
        saved(lambda d, x, y: y.pop("decoupled_weight_decay")),
        {},
        "param group 'y': whether its weight decay is decoupled, the source does not say",
    ),
    "no amsgrad": (saved(lambda d, x, y: y.pop("amsgrad")), {}, "group 'y': the source has no 'am"),
    "range": (saved(lambda d, x, y: y.update(lr=-1.0)), {}, "param group 'y': lr=-1.0"),
    "type": (saved(lambda d, x, y: y.update(lr="1")), {}, "param group 'y': lr='1'"),
    "called as given": (
        saved(lambda d, x, y: y.update(lr=-1.0)),
        {"group_names": ["p", "q"]},
        "param group 'q': lr=-1.0",
    ),
    "half a state": (
        saved(lambda d, x, y: d["state"][1].pop("exp_avg")),
        {},
        r"param group 'y': the state for params\['b'\] lacks exp_avg",
    ),
    "another's state": (
        saved(lambda d, x, y: d["state"][1].update(exp_avg=torch.ones(3))),
        {},
        r"param group 'y': exp_avg for params\['b'\]: shape \(3,\)",
    ),
    "state of nobody": (
        saved(lambda d, x, y: d["state"].update({5: {}})),
        {},
        "state for 5, which its param groups do not list",
    ),
    "in two groups": (saved(lambda d, x, y: y.update(params=[0])), {}, "state for 1, which"),
    "in two groups, without state": (
        saved(lambda d, x, y: (d["state"].clear(), y.update(params=[0]))),
        {},
        "the source lists 0 twice",
    ),
    "names for some": (
        saved(lambda d, x, y: x.pop("param_names")),
        {},
        "param group 'y' has 'param_names' and param group 'x' has not",
    ),
    "too many names": (
        saved(lambda d, x, y: y.update(param_names=["b", "c"])),
        {},
        "param group 'y': the source has 1 parameters and 2 names",
    ),
    "frozen by order": (saved(unnamed), {"frozen": "rest", "params": "abc"}, "matched by order"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_groups_that_cannot_be_taken_over_are_refused_by_their_label(name):
    source, options, message = REFUSED[name]
    options = dict(options)
    params = {key: torch.ones(2) for key in options.pop("params", "ab")}
    with pytest.raises((ValueError, TypeError), match=message):
        from_torch(source, params, **options)


A = {"a": torch.ones(2), "b": torch.ones(2)}


def pair(first, second=None):
    return Partition({"x": first, "y": second or AdamW()}, {"a": "x", "b": "y"})


NOT_HANDED = {
    "a schedule": (pair(AdamW(lr=lambda step: 0.1)), None, r"inner\['x'\]: lr is a schedule"),
    "a wrapper within": (
        pair(Clip(AdamW(), max_norm=1.0)),
        None,
        r"inner\['x'\]: got Clip and ClipState.*hand over opt.inner and state.inner",
    ),
    "a wrapper around": (
        Clip(pair(AdamW()), max_norm=1.0),
        None,
        "got Clip and ClipState.*hand over opt.inner and state.inner",
    ),
    "a partition within": (
        pair(Partition({"z": AdamW()}, lambda name, leaf: "z")),
        None,
        r"inner\['x'\]: got Partition and PartitionState.*nor a Partition of them",
    ),
    "all frozen": (pair(Frozen(), Frozen()), None, "every optimizer is Frozen"),
    "another's state": (pair(AdamW()), AdamW(), "got Partition and AdamWState"),
    "a partition's state": (AdamW(), pair(AdamW()), "got AdamW and PartitionState"),
    "other labels": (
        pair(AdamW()),
        Partition({"z": AdamW()}, lambda name, leaf: "z"),
        "state.inner has the labels 'z'",
    ),
    "no amsgrad": (
        pair(AdamW(amsgrad=True)),
        pair(AdamW()),
        r"inner\['x'\]: .*max_exp_avg_sq is empty",
    ),
}


@pytest.mark.parametrize("name", NOT_HANDED)
def test_groups_that_torch_cannot_go_on_from_are_refused(name):
    opt, other, message = NOT_HANDED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        to_torch(opt, (other or opt).init(A), A)


def test_what_is_in_a_wrapper_around_a_partition_can_be_handed_over():
    opt = Clip(pair(AdamW(lr=0.1)), max_norm=1.0)
    state = opt.init(A)
    assert len(to_torch(opt.inner, state.inner, A)["param_groups"]) == 2
