"""What wrappers know of leaves that they saw before, and that nothing else passes for known."""

import pytest
import torch
from torch.func import vmap

from funcopt import AdamW, Clip, Ema, Frozen, Lookahead, Partition
from funcopt._engine import memory
from funcopt.wrappers import _shadow_params, _shared

from ..cases import tree_map

CLIP, EMA = Clip(AdamW(), 1.0), Ema(AdamW(), 0.9)


@pytest.fixture(autouse=True)
def _nothing_known():
    memory.forget()


def params_of(dtype=torch.float32):
    return {"a": torch.ones(2, dtype=dtype), "b": torch.ones(3, 4, dtype=dtype)}


def steps(opt, params, state, count=2):
    for _ in range(count):
        params, state = opt.update(tree_map(torch.ones_like, params), state, params)
    return params, state


@pytest.mark.parametrize("opt", [CLIP, EMA], ids=["Clip", "Ema"])
def test_leaves_that_were_checked_are_not_checked_again(opt, monkeypatch):
    params, state = steps(opt, params_of(), opt.init(params_of()), 1)
    for module, name in (
        (_shared, "check_leaves"),
        (_shared, "check_alike"),
        (_shadow_params, "is_like"),
    ):
        monkeypatch.setattr(module, name, None)
    steps(opt, params, state)


@pytest.mark.parametrize("opt", [CLIP, EMA], ids=["Clip", "Ema"])
@pytest.mark.parametrize("fault", ["dtype", "shape", "missing", "another key", "layout"])
def test_a_gradient_that_does_not_match_is_refused_also_after_others_did(opt, fault):
    params, state = steps(opt, params_of(), opt.init(params_of()))
    grads = tree_map(torch.ones_like, params)
    if fault == "dtype":
        grads["b"] = grads["b"].double()
    if fault == "shape":
        grads["b"] = grads["b"].T.contiguous()
    if fault == "missing":
        del grads["b"]
    if fault == "another key":
        grads["c"] = grads.pop("b")
    if fault == "layout":
        grads["b"] = grads["b"].to_sparse()
    with pytest.raises((TypeError, ValueError), match=r"'b'|'c'"):
        opt.update(grads, state, params)


def test_a_tree_beside_the_parameters_is_known_by_its_own_dtype():
    """The average of 16-bit parameters is in float32, their slow copy in 16 bits."""
    lookahead = Lookahead(AdamW(), 2, 0.5)
    params, averaged = steps(EMA, params_of(torch.bfloat16), EMA.init(params_of(torch.bfloat16)))
    _, state = steps(lookahead, params, lookahead.init(params))
    grads = tree_map(torch.ones_like, params)
    with pytest.raises(ValueError, match=r"state\.slow_params"):
        lookahead.update(grads, state._replace(slow_params=averaged.average), params)
    with pytest.raises(ValueError, match=r"state\.average"):
        EMA.update(grads, averaged._replace(average=state.slow_params), params)


def test_a_gradient_does_not_pass_for_an_average():
    params, state = steps(EMA, params_of(torch.bfloat16), EMA.init(params_of(torch.bfloat16)))
    grads = tree_map(torch.ones_like, params)
    with pytest.raises(ValueError, match=r"state\.average"):
        EMA.update(grads, state._replace(average=grads), params)


def test_leaves_at_rest_are_told_apart_from_others_that_look_alike():
    inner = Partition({"a": AdamW(), "b": Frozen()}, lambda name, _: name)
    frozen = Clip(inner, 1.0)
    params, _ = steps(CLIP, params_of(), CLIP.init(params_of()))
    grads = tree_map(torch.ones_like, params)
    new_params, state = frozen.update(grads, frozen.init(params), params)
    assert state.norm**2 == pytest.approx(2.0)
    assert new_params["b"] is params["b"]


def test_members_are_looked_at_each_time():
    params, _ = steps(CLIP, params_of(), CLIP.init(params_of()))
    stacked = {name: torch.stack([leaf, leaf]) for name, leaf in params.items()}
    states = vmap(CLIP.init)(stacked)
    _, moved = vmap(CLIP.update)(tree_map(torch.ones_like, stacked), states, stacked)
    assert moved.norm.shape == (2,)
