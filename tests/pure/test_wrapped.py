"""Classes of torch.optim within wrappers that look into them."""

import re

import pytest
import torch
from torch.func import vmap

from funcopt import SGD, AdamW, Clip, Partition, Plateau, pure
from funcopt.distributed import Zero1
from funcopt.schedules import Linear

from ..cases import assert_close, assert_same_bits

# Powers of two, so that torch and funcopt round alike.
RATES = {
    "a number": ({"lr": 0.5, "momentum": 0.5}, SGD(lr=0.5, momentum=0.5)),
    "the default": ({}, SGD(lr=1e-3)),
    "a tensor": ({"lr": torch.tensor(0.5)}, SGD(lr=torch.tensor(0.5))),
    "a schedule": ({"lr": Linear(0.5, 0.25, 4)}, SGD(lr=Linear(0.5, 0.25, 4))),
}
SCORES = (1.0, 2.0, 2.0, 0.5, 3.0)


@pytest.mark.parametrize("method", ["update", "update_"])
@pytest.mark.parametrize("name", RATES)
def test_a_plateau_lowers_the_learning_rate_of_a_class(name, method):
    hyperparameters, own = RATES[name]
    inner = pure(torch.optim.SGD, **hyperparameters)
    found = []
    for opt in (inner, own):
        wrapped = Plateau(Clip(opt, 100.0), factor=0.5, patience=0)
        params = {"w": torch.ones(3)}
        state = wrapped.init(params)
        for score in SCORES:
            grads = {"w": torch.tensor([1.0, -2.0, 3.0])}
            params, state = getattr(wrapped, method)(grads, state, params, value=score)
        assert state.scale == 0.125
        found.append(params)
    assert_close(*found, rtol=1e-6)
    assert inner == pure(torch.optim.SGD, **hyperparameters)


def test_a_plateau_in_a_vmap_lowers_that_of_each_member():
    opt = Plateau(pure(torch.optim.SGD, lr=0.5), factor=0.5, patience=0)
    params = torch.ones(2, 3)
    state = vmap(opt.init)(params)
    for scores in ([1.0, 1.0], [2.0, 0.5]):
        update = vmap(lambda g, s, p, v: opt.update(g, s, p, value=v))
        params, state = update(torch.ones(2, 3), state, params, torch.tensor(scores))
    assert state.scale.tolist() == [0.5, 1.0]
    assert params[:, 0].tolist() == [1 - 0.5 - 0.25, 0.0]


def test_a_plateau_lowers_the_classes_of_groups_and_leaves_one_without_a_rate_alone():
    groups = {"a": pure(torch.optim.SGD, lr=0.5), "b": pure(NoRate), "c": AdamW(lr=0.5)}
    opt = Plateau(Partition(groups, {"a": "a", "b": "b", "c": "c"}), factor=0.5, patience=0)
    params = {name: torch.ones(2) for name in "abc"}
    state = opt.init(params)
    for score in (1.0, 2.0):
        params, state = opt.update(params, state, params, value=score)
    assert_same_bits(params["a"], torch.full((2,), 0.5 - 0.25 * 0.5))
    assert_same_bits(params["b"], torch.zeros(2))
    with pytest.raises(ValueError, match="has nothing called lr"):
        Plateau(pure(NoRate))


class NoRate(torch.optim.Optimizer):
    """Subtracts the gradient."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Muon])
def test_zero1_says_why_it_refuses_a_class_and_what_serves(kind):
    message = (
        "has a class of torch.optim, which counts the updates of each leaf, where the inner "
        "optimizer sees buckets of many. Take funcopt's own optimizer, such as funcopt.SGD"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        Zero1(Clip(pure(kind), 1.0), None)
