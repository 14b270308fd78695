"""All groups move in place, or none does."""

import pytest
import torch
from torch import nn

import funcopt
from funcopt import AdamW, Clip, Frozen, PartitionState
from funcopt.distributed import LocalUpdates

from ..cases import assert_same_bits, clone, leaves, random_like, run
from ..groups import Halved, two

INNERS = {
    "AdamW and AdamW": lambda second: two(AdamW(lr=0.1), second),
    "AdamW and any": lambda second: two(AdamW(lr=0.1), Halved(second)),
    "any and AdamW": lambda second: two(Halved(AdamW(lr=0.1)), second),
    "any and any": lambda second: two(Halved(AdamW(lr=0.1)), Halved(second)),
}


def stale(state, **changed):
    """The state with something in that of the second group replaced."""
    inner = state.inner["second"]
    own = inner if isinstance(inner, funcopt.AdamWState) else inner[0]
    new = own._replace(**changed)
    second = new if own is inner else (new,)
    return PartitionState({**state.inner, "second": second})


def faults():
    """What may be wrong in the second group: a function of (opt, grads, state, params)."""
    nan = torch.tensor(float("nan"), dtype=torch.float64)
    tracked = torch.ones(2, requires_grad=True)

    def grads_are(leaf):
        return lambda g, s, p: ({**g, "second": leaf}, s, p)

    return {
        "a gradient of another dtype": grads_are(torch.ones(2).double()),
        "a gradient of another shape": grads_are(torch.ones(1)),
        "a gradient with a history": grads_are(tracked * 2),
        "no gradient key": lambda g, s, p: ({"first": g["first"]}, s, p),
        "a count that is NaN": lambda g, s, p: (g, stale(s, step=nan), p),
        "a count of integers in 16 bits": lambda g, s, p: (
            g,
            stale(s, step=torch.zeros((), dtype=torch.int16)),
            p,
        ),
        "a moment of another shape": lambda g, s, p: (
            g,
            stale(s, exp_avg={"second": torch.zeros(3)}),
            p,
        ),
        "moments that share their memory": lambda g, s, p: (
            g,
            stale(s, exp_avg=p, exp_avg_sq=p),
            p,
        ),
        "an expanded parameter": lambda g, s, p: (g, s, {**p, "second": torch.ones(1).expand(2)}),
        "a parameter with a history": lambda g, s, p: (g, s, {**p, "second": tracked * 1}),
        "a parameter that is another one": lambda g, s, p: (
            g,
            s,
            {**p, "second": p["first"][:2]},
        ),
        "a gradient that is a parameter of the first group": lambda g, s, p: (
            {**g, "second": p["first"][:2]},
            s,
            p,
        ),
        "a moment that is a parameter of the first group": lambda g, s, p: (
            g,
            stale(s, exp_avg={"second": p["first"][:2]}),
            p,
        ),
    }


@pytest.mark.parametrize("fault", faults())
@pytest.mark.parametrize("inner", INNERS)
def test_a_fault_in_the_second_group_leaves_the_first_unmoved(inner, fault):
    opt = INNERS[inner](AdamW(lr=0.1))
    params = {"first": torch.randn(3), "second": torch.randn(2)}
    state = opt.init(params)
    given = faults()[fault](random_like(params), state, params)
    before = [leaf.detach().clone() for leaf in leaves(given)]
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        opt.update_(*given)
    for leaf, old in zip(leaves(given), before, strict=True):
        torch.testing.assert_close(leaf.detach(), old, rtol=0, atol=0, equal_nan=True)


def test_a_fault_in_the_first_group_leaves_the_second_unmoved():
    for build in INNERS.values():
        opt = build(AdamW(lr=0.1))
        params = {"first": torch.randn(3), "second": torch.randn(2)}
        state = opt.init(params)
        before = clone((params, state))
        with pytest.raises(ValueError, match=r"\['first'\]: shape \(1,\)"):
            opt.update_({"first": torch.ones(1), "second": torch.ones(2)}, state, params)
        assert_same_bits((params, state), before)


HYPERPARAMETERS = {
    "a learning rate with a history": torch.tensor(0.1, requires_grad=True),
    "a schedule that gives NaN": lambda step: float("nan"),
    "a schedule with a history": lambda step: torch.tensor(0.1, requires_grad=True) * 1,
    "stacked learning rates": torch.tensor([0.1, 0.2]),
}


@pytest.mark.parametrize("fault", HYPERPARAMETERS)
@pytest.mark.parametrize("inner", INNERS)
def test_a_wrong_number_in_the_second_group_leaves_the_first_unmoved(inner, fault):
    opt = INNERS[inner](AdamW(lr=HYPERPARAMETERS[fault]))
    params = {"first": torch.randn(3), "second": torch.randn(2)}
    state = opt.init(params)
    before = clone((params, state))
    with pytest.raises((ValueError, RuntimeError)):
        opt.update_(random_like(params), state, params)
    assert_same_bits((params, state), before)


@pytest.mark.parametrize("inner", INNERS)
def test_a_learning_rate_that_became_nan_leaves_the_first_group_unmoved(inner):
    lr = torch.tensor(0.1)
    opt = INNERS[inner](AdamW(lr=lr))
    params = {"first": torch.randn(3), "second": torch.randn(2)}
    state = opt.init(params)
    before = clone((params, state))
    lr.fill_(float("nan"))
    with pytest.raises(ValueError, match="lr=nan"):
        opt.update_(random_like(params), state, params)
    assert_same_bits((params, state), before)


@pytest.mark.parametrize("method", ["init", "update", "update_"])
def test_weights_tied_across_groups_are_refused(method):
    shared = torch.ones(3)
    params = {"first": shared, "second": shared}
    opt = two(second=Frozen())
    state = opt.init(clone(params))
    arguments = (params,) if method == "init" else (clone(params), state, params)
    with pytest.raises(ValueError, match=r"params\['second'\] shares its memory with params\['fi"):
        getattr(opt, method)(*arguments)


@pytest.mark.parametrize("inner", INNERS)
def test_update_in_place_writes_into_the_memory_it_was_given(inner):
    opt = INNERS[inner](AdamW(lr=0.1, amsgrad=True))
    params = {"first": nn.Parameter(torch.randn(3)), "second": nn.Parameter(torch.randn(2))}
    gradients = [random_like(params) for _ in range(3)]
    plain = {name: param.detach().clone() for name, param in params.items()}
    expected = run(opt, plain, gradients)
    state = opt.init(params)
    pointers = [leaf.data_ptr() for leaf in leaves((params, state))]
    for grads in gradients:
        moved = opt.update_(grads, state, params)
        assert moved[0] is params
        assert moved[1] is state
    assert_same_bits((params, state), expected)
    assert [leaf.data_ptr() for leaf in leaves((params, state))] == pointers
    assert all(param.is_leaf and param.requires_grad for param in params.values())


AROUND = {
    "nothing": lambda opt: opt,
    "Clip": lambda opt: Clip(opt, 1.0),
    "LocalUpdates": lambda opt: LocalUpdates(opt, every=2, mesh=None),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("moving", ["first", "second", "none"])
def test_leaves_that_have_not_moved_yet_do_not_hold_up_the_others(moving, inner, around):
    """Each leaf counts for itself, so that the count of one without a gradient stays 0."""
    opt = AROUND[around](funcopt.replace(INNERS[inner](AdamW(lr=0.1)), "step_per_leaf", True))
    params = {"first": torch.randn(3), "second": torch.randn(2)}
    gradients = [
        {name: leaf if name == moving else None for name, leaf in random_like(params).items()}
        for _ in range(3)
    ]
    expected = run(opt, clone(params), gradients)
    state = opt.init(params)
    for grads in gradients:
        opt.update_(grads, state, params)
    assert_same_bits((params, state), expected)
    steps = funcopt.find(state, funcopt.AdamWState)
    counts = {name: step.item() for own in steps.values() for name, step in own.step.items()}
    assert counts == {name: 3 if name == moving else 0 for name in params}
