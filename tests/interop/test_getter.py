"""What torch's getters make of an optimizer: laid out flat, or of one that has made no step."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from funcopt import AdamW, Partition
from funcopt.interop import from_torch, to_state_dict

from ..cases import assert_same_bits

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def network():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def trained(model, groups=None, **options):
    theirs = torch.optim.AdamW(groups or model.parameters(), **options)
    model(torch.ones(2)).sum().backward()
    theirs.step()
    theirs.zero_grad()
    return theirs


def groups_of(model, **others):
    """Weights, and biases with options of their own."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if name.endswith("weight")]},
        {"params": [p for name, p in named if name.endswith("bias")], **others},
    ]


# Laid out flat.


def test_a_flat_dict_is_what_the_nested_one_is():
    model = network()
    theirs = trained(model, lr=0.1, betas=(0.5, 0.75), amsgrad=True)
    params = dict(model.named_parameters())
    opt, state = from_torch(get_optimizer_state_dict(model, theirs, options=FLAT), params)
    expected_opt, expected = from_torch(theirs, params)
    assert opt == expected_opt == AdamW(0.1, (0.5, 0.75), amsgrad=True, kernel="plain")
    assert_same_bits(state, expected)


def test_parameters_of_a_flat_dict_that_have_the_same_options_are_a_group():
    model = network()
    options = {"lr": torch.tensor(0.1), "weight_decay": 0.5}
    theirs = trained(model, groups_of(model, weight_decay=0.0, name="biases"), **options)
    params = dict(model.named_parameters())
    opt, state = from_torch(get_optimizer_state_dict(model, theirs, options=FLAT), params)
    assert isinstance(opt, Partition)
    assert opt.labels == {name: "biases" if name.endswith("bias") else "0" for name in params}
    assert {label: own.weight_decay for label, own in opt.inner.items()} == {
        "0": 0.5,
        "biases": 0.0,
    }
    assert_same_bits(state, from_torch(theirs, params)[1])


def test_groups_of_a_flat_dict_that_do_not_differ_are_one():
    model = network()
    theirs = trained(model, groups_of(model))
    params = dict(model.named_parameters())
    opt, state = from_torch(get_optimizer_state_dict(model, theirs, options=FLAT), params)
    assert isinstance(opt, AdamW)
    assert state.step == 1


LEFT_OUT = object()


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "another parameter": ({"state.9.step": 1.0}, "state for '9', which its param groups? do"),
        "half a state": ({"state.0.bias.exp_avg": LEFT_OUT}, r"params\['0.bias'\] lacks exp_avg"),
        "no option": ({"param_groups.0.bias.lr": LEFT_OUT}, "no 'lr' in its param group"),
    }.values(),
    ids=["another parameter", "half a state", "no option"],
)
def test_a_flat_dict_that_is_not_whole_is_refused_as_a_nested_one_is(change, message):
    model = network()
    d = get_optimizer_state_dict(model, trained(model), options=FLAT)
    d = {key: own for key, own in {**d, **change}.items() if own is not LEFT_OUT}
    with pytest.raises(ValueError, match=message):
        from_torch(d, dict(model.named_parameters()))


def test_our_own_flat_dict_is_not_taken_for_one_but_its_reader_is_named():
    d = to_state_dict(AdamW().init({"w": torch.ones(2)}))
    with pytest.raises(TypeError, match=r"to_state_dict\(\) made is read by from_state_dict\(\)"):
        from_torch(d, {"w": torch.ones(2)})


# Made up.


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("differing", [{}, {"weight_decay": 0.0}], ids=["alike", "two groups"])
def test_a_state_that_torch_made_up_is_warned_of(flat, differing):
    model = network()
    theirs = torch.optim.AdamW(groups_of(model, **differing))
    d = get_optimizer_state_dict(model, theirs, options=FLAT if flat else None)
    for source in (d, theirs):  # which has it from then on
        with pytest.warns(UserWarning, match=r"counts 1 update, .*opt.init\(params\)") as caught:
            from_torch(source, dict(model.named_parameters()))
        assert caught[0].filename == __file__


def test_a_state_with_a_moment_or_without_a_count_is_not_warned_of():
    model = network()
    params = dict(model.named_parameters())
    fresh = torch.optim.AdamW(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_torch(fresh, params)
        for own in model.parameters():
            own.grad = torch.zeros_like(own)
        model[1].bias.grad += 1e-30  # whose square is 0 in float32
        fresh.step()
        from_torch(fresh, params)
        empty = torch.optim.AdamW([nn.Parameter(torch.ones(0))])
        empty.param_groups[0]["params"][0].grad = torch.ones(0)
        empty.step()
        from_torch(empty, {"w": torch.ones(0)})
