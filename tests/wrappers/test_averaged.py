"""The average that a state holds, where there are several, or it lies in buckets."""

import pytest
import torch

from funcopt import AdamW, Clip, Ema, Frozen, Lookahead, Partition, averaged
from funcopt.distributed import Zero1, gather_state

from ..cases import assert_same_bits, random_like

PARAMS = {"body": {"w": torch.ones(2, 3), "b": torch.zeros(3)}, "head": [torch.ones(4)]}
EMA = Ema(AdamW(lr=0.1), 0.5)


def trained(opt, params=PARAMS):
    torch.manual_seed(0)
    state = opt.init(params)
    for _ in range(3):
        params, state = opt.update(random_like(params), state, params)
    return params, state


def label(name, leaf):
    return name.partition(".")[0]


def test_averages_of_groups_are_put_together_as_those_of_an_ema_around_them():
    inside = Clip(Partition({"body": EMA, "head": Lookahead(EMA, 5)}, label), 1e6)
    around = Ema(Partition({"body": AdamW(lr=0.1), "head": AdamW(lr=0.1)}, label), 0.5)
    params, state = trained(inside)
    expected_params, expected = trained(around)
    assert_same_bits(params, expected_params)
    assert_same_bits(averaged(state, params), averaged(expected, expected_params))


def test_groups_within_groups_are_put_together():
    names = {"body.w": "weights", "body.b": "biases"}
    body = Partition({"weights": EMA, "biases": Frozen()}, lambda name, leaf: names[name])
    params, state = trained(Partition({"body": body, "head": EMA}, label))
    found = averaged(state, params)
    assert_same_bits(found["body"]["w"], state.inner["body"].inner["weights"].average["body.w"])
    assert_same_bits(found["head"][0], state.inner["head"].average["head.0"])
    assert found["body"]["b"] is params["body"]["b"]


def test_leaves_that_rest_are_their_own_average():
    params, state = trained(Partition({"body": Frozen(), "head": EMA}, label))
    found = averaged(state, params)
    assert found["body"]["w"] is params["body"]["w"]
    assert_same_bits(found["head"], [state.inner["head"].average["head.0"]])
    assert not torch.equal(found["head"][0], params["head"][0])


def test_one_group_has_an_average_of_its_own_leaves():
    params, state = trained(Partition({"body": AdamW(), "head": EMA}, label))
    own = {"head.0": params["head"][0]}
    for holding in (state.inner["head"], state):
        assert_same_bits(averaged(holding, own), state.inner["head"].average)


def test_groups_without_an_average_do_not_hide_one_beside_them():
    groups = Partition({"body": AdamW(), "head": AdamW()}, label)
    params, state = trained(EMA)
    both = {"groups": groups.init(params), "ema": state}
    assert_same_bits(averaged(both, params), state.average)


def test_a_group_that_moves_without_an_average_is_refused_by_its_label():
    params, state = trained(Partition({"body": AdamW(), "head": EMA}, label))
    with pytest.raises(ValueError, match=r"group 'body' has not one average.*Ema\(Partition\("):
        averaged(state, params)


def test_groups_none_of_which_has_an_average_hold_none():
    body = Partition({"w": AdamW(), "b": AdamW()}, lambda name, leaf: name[-1])
    params, state = trained(Partition({"body": body, "head": Frozen()}, label))
    with pytest.raises(ValueError, match="holds no average: wrap the optimizer"):
        averaged(state, params)


@pytest.mark.parametrize("around", [lambda opt: opt, lambda opt: Clip(opt, 1e6)], ids=["", "Clip"])
def test_an_average_in_buckets_is_refused_with_the_way_to_have_it(around):
    opt = Zero1(EMA, mesh=None)
    params, state = trained(around(opt))
    with pytest.raises(
        ValueError, match=r"state.average\['bucket 0'\].*Of a Zero1, .*gather_state"
    ):
        averaged(state, params)
    whole = gather_state(opt, state if around(opt) is opt else state.inner, params)
    assert_same_bits(averaged(whole, params), trained(EMA)[1].average)


def test_leaves_of_other_parameters_are_refused():
    _, state = trained(Partition({"body": EMA, "head": EMA}, label))
    with pytest.raises(ValueError, match=r"state.average does not have the structure of params"):
        averaged(state, {"head": [torch.ones(4)]})
