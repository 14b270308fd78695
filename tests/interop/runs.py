"""Runs of torch.optim.AdamW to hold ours against."""

import copy

import torch

from funcopt._core import pytree

from ..cases import assert_same_bits


def named(params):
    """The leaves by the names of a module, in the order in which the tree was filled."""
    flat, structure = pytree.flatten(params)
    names = pytree.names(structure)
    return {names[index]: flat[index] for index in pytree.insertion_order(structure)}


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
    flat, structure = pytree.flatten(params)
    counts = pytree.flatten(state.step)[0]
    for index, name in enumerate(pytree.names(structure)):
        param = torch_params(theirs)[name]
        own = theirs.state.get(param, {})
        assert_same_bits(param.detach(), flat[index].detach())
        count = counts[index] if len(counts) == len(flat) else counts[0]
        assert float(own.get("step", 0.0)) == float(count)
        for key in set(own) - {"step"}:
            assert_same_bits(own[key], pytree.flatten(getattr(state, key))[0][index])


SQUARES = {"first": torch.zeros(2, 2), "second": torch.zeros(2, 2)}
FIRST = SQUARES["first"]
UNLIKE = {"first": torch.full((2, 2), 1.0), "second": torch.full((2, 2), 2.0)}


def after_one_step(**options):
    theirs = torch_optimizer(SQUARES, **options)
    torch_step(theirs, UNLIKE)
    return theirs


def edit(function):
    """A state dict after one step, changed by a function of it and its param group, once called."""

    def edited():
        saved = copy.deepcopy(after_one_step().state_dict())
        function(saved, saved["param_groups"][0])
        return saved

    return edited
