"""What is frozen stays the tensor it was."""

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from funcopt import AdamW, Frozen, Partition

from ..cases import assert_same_bits
from ..groups import Halved, two


@pytest.mark.parametrize("method", ["update", "update_"])
@pytest.mark.parametrize("given", ["missing", "None", "a gradient"])
def test_frozen_leaves_are_passed_through_whatever_their_gradients(given, method):
    params = {
        "first": torch.randn(3),
        "second": [nn.Parameter(torch.randn(2)), torch.tensor([1, 2])],
    }
    frozen, versions = list(params["second"]), [leaf._version for leaf in params["second"]]
    grads = {"first": torch.ones(3)}
    if given == "None":
        grads["second"] = [None, None]
    if given == "a gradient":
        grads["second"] = [torch.ones(2), None]
    opt = two(second=Frozen())
    state = opt.init(params)
    assert state.inner["second"] == ()
    moved, state = getattr(opt, method)(grads, state, params)
    assert all(new is old for new, old in zip(moved["second"], frozen, strict=True))
    assert [leaf._version for leaf in frozen] == versions
    assert state.inner["second"] == ()
    assert state.inner["first"].step == 1


@pytest.mark.parametrize("method", ["update", "update_"])
def test_a_gradient_that_is_missing_elsewhere_or_has_no_parameter_is_an_error(method):
    params = {"first": torch.ones(3), "second": torch.ones(2)}
    opt = two(second=Frozen())
    state = opt.init(params)
    for grads, message in (
        ({"second": torch.ones(2)}, r"no grads\['first'\] for params\['first'\]"),
        ({"first": torch.ones(3), "third": None}, r"grads\['third'\] without a parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(opt, method)(grads, state, params)


def test_frozen_alone_gives_back_what_it_was_given_under_any_transform():
    params = torch.randn(3, 2)
    opt = Frozen()
    moved, state = vmap(opt.update_)(params, opt.init(params), params)
    assert state == ()
    assert_same_bits(moved, params)
    slope = grad(lambda p: opt.update(None, (), p)[0].sum())(params)
    assert_same_bits(slope, torch.ones(3, 2))


@pytest.mark.parametrize("nested", [False, True])
def test_beside_several_groups_a_frozen_leaf_may_be_what_could_not_be_written(nested):
    frozen = torch.ones(1).expand(2)
    params = {"first": torch.randn(6), "second": torch.randn(3), "third": frozen}
    inner = {"second": Halved(AdamW()), "third": Frozen()}
    opt = Partition({"first": Halved(AdamW()), **inner}, lambda name, leaf: name)
    if nested:
        rest = Partition(inner, lambda name, leaf: name)
        labels = {"first": "first", "second": "rest", "third": "rest"}
        opt = Partition({"first": Halved(AdamW()), "rest": rest}, labels)
    grads = {"first": torch.randn(6), "second": torch.randn(3), "third": params["second"][:2]}
    if nested:
        grads["third"] = None
    expected, _ = opt.update(grads, opt.init(params), params)
    version = frozen._version
    opt.update_(grads, opt.init(params), params)
    assert_same_bits(params, expected)
    assert params["third"] is frozen
    assert frozen._version == version
