"""Which parameter has which part of a source, and sources that are refused."""

import copy
from collections import OrderedDict

import pytest
import torch

from funcopt.interop import from_torch, to_torch

from ..cases import Point, assert_same_bits, not_dense
from .runs import FIRST, SQUARES, UNLIKE, after_one_step, edit, torch_optimizer, torch_params


def reversed_names(theirs):
    """The state dict as an optimizer would have saved it whose parameters came the other way."""
    saved = copy.deepcopy(theirs.state_dict())
    (group,) = saved["param_groups"]
    group["param_names"].reverse()
    group["params"].reverse()
    return saved


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


def of(optimizer, **options):
    def made():
        return optimizer([torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)], **options)

    return made


def unnamed(saved, group):
    del group["param_names"]


class Around(torch.optim.Optimizer):
    """Shows the param groups of an AdamW, and not its state."""

    def __init__(self) -> None:
        self.inner = of(torch.optim.AdamW)()
        super().__init__(self.inner.param_groups, self.inner.defaults)


REFUSED = {
    "around an AdamW": (Around, "is a Around, which may keep its state elsewhere"),
    "a state that is a list": (edit(lambda s, g: s.update(state=[1])), "a dict under 'state'"),
    "betas that are no pair": (edit(lambda s, g: g.update(betas=[0.9])), "must be a pair"),
    "no entry": (edit(lambda s, g: g["params"].append(2)), "3 parameters and 2 names"),
    "unlisted": (edit(lambda s, g: s["state"].update({5: {}})), "state for 5, which its param"),
    "old": (
        edit(lambda s, g: g.pop("decoupled_weight_decay")),
        "decoupled, the source does not say",
    ),
    "Adamax": (of(torch.optim.Adamax), "no 'decoupled_weight_decay' in its param group"),
    "Adadelta": (of(torch.optim.Adadelta), "not that of a torch.optim.AdamW, Adam, SGD, NAdam"),
    "Rprop": (of(torch.optim.Rprop), "not that of a torch.optim.AdamW, Adam, SGD, NAdam"),
    "no groups": (edit(lambda s, g: s["param_groups"].clear()), "the source has no param groups"),
    "listed twice": (edit(lambda s, g: g.update(params=[0, 1, 1])), "lists 1 twice"),
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
    "nested": (
        edit(
            lambda s, g: s["state"][0].update(
                exp_avg=not_dense("nested and strided", torch.ones(2, 2))
            )
        ),
        r"exp_avg for params\['first'\]: a nested layout, the parameter is dense",
    ),
    "nested step": (
        edit(
            lambda s, g: s["state"][0].update(step=not_dense("nested and strided", torch.ones(())))
        ),
        r"step for params\['first'\] is nested_tensor",
    ),
    "no tensor": (edit(lambda s, g: s["state"][0].update(exp_avg=1.0)), "of type float, not"),
    "no params": (
        edit(lambda s, g: [g.pop("params"), g.pop("param_names")]),
        "the source has no 'params' in its param group",
    ),
    "params that are no list": (
        edit(lambda s, g: g.update(params=2)),
        "'params' in the param group is of type int: it must be a list",
    ),
    "an entry that is no dict": (
        edit(lambda s, g: s["state"].update({1: torch.ones(2, 2)})),
        r"the state for params\['second'\] is of type Tensor: it must be a dict of exp_avg",
    ),
    "an entry that is None": (
        edit(lambda s, g: s["state"].update({0: None})),
        r"the state for params\['first'\] is of type NoneType: it must be a dict",
    ),
    "a moment without values": (
        edit(lambda s, g: s["state"][0].update(exp_avg=torch.ones(2, 2, device="meta"))),
        r"exp_avg for params\['first'\] is on the meta device",
    ),
    "a step without a value": (
        edit(lambda s, g: s["state"][0].update(step=torch.ones((), device="meta"))),
        r"step for params\['first'\] is on the meta device",
    ),
    "a number without a value": (
        edit(lambda s, g: g.update(lr=torch.ones((), device="meta"))),
        "lr is on the meta device, where it has no value",
    ),
    "a beta without a value": (
        edit(lambda s, g: g.update(betas=(0.9, torch.ones((), device="meta")))),
        r"betas\[1\] is on the meta device",
    ),
    "a sparse number": (
        edit(lambda s, g: g.update(eps=torch.ones(1).to_sparse())),
        "eps is a tensor of layout torch.sparse_coo: make it dense",
    ),
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
    "integers": ({"first": torch.ones(2).long(), "second": FIRST}, None, "has dtype torch.int64"),
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
