"""Wrappers update stacked members by one step of a kernel, with the bits of a vmap."""

import re

import pytest
import torch

from funcopt import (
    SGD,
    Accumulate,
    AdamW,
    Best,
    Cautious,
    Clip,
    ClipValue,
    Ema,
    Frozen,
    Lion,
    Lookahead,
    LossScale,
    MasterWeights,
    Members,
    Partition,
    Plateau,
    RMSprop,
    SkipNonfinite,
)
from funcopt._engine.stacked import Stack
from funcopt.schedules import Cosine
from funcopt.wrappers._stacks import change_rows_, lerp_rows, make_rows, renewed, runs_of, shared

from ..cases import assert_same_bits, clone, leaves, random_like, tree_map
from .test_members import ACTIVE, COUNT, RATES, mapped, params_of

EVERY = torch.tensor([1.0, 2.0, 3.0, 2.0, 4.0])
CLIPS = {
    "Clip": Clip(AdamW(lr=RATES), 1.0),
    "Clip, a norm of each": Clip(AdamW(lr=0.1), RATES),
    "Clip, a tensor for all": Clip(Lion(lr=RATES), torch.tensor(0.5)),
    "Clip, the largest": Clip(SGD(lr=RATES, momentum=0.9), 0.5, norm_type=float("inf")),
    "Clip, another order": Clip(SGD(lr=0.1), RATES, norm_type=1.5),
    "Clip, the plain kernel": Clip(AdamW(lr=RATES, kernel="plain"), 1.0),
    "Clip, by chance": Clip(AdamW(lr=RATES, rounding="stochastic", seed=RATES * 1000), 1.0),
    "Clip that skips": Clip(AdamW(lr=RATES), 1.0, nonfinite="skip"),
}
AVERAGES = {
    "Ema": Ema(AdamW(lr=RATES), 0.9),
    "Ema, a decay of each": Ema(SGD(lr=0.1), RATES, debias=False),
}
SUMS = {
    "Accumulate": Accumulate(AdamW(lr=RATES), 2),
    "Accumulate, calls of each": Accumulate(SGD(lr=0.1, momentum=0.9), EVERY),
}
NESTED = {
    "Ema(Clip)": Ema(Clip(AdamW(lr=RATES), 1.0), 0.9),
    "Clip(Ema)": Clip(Ema(AdamW(lr=0.1)), RATES),
    "Clip(Accumulate)": Clip(Accumulate(AdamW(lr=RATES), 2), 0.5),
    "Accumulate(Clip)": Accumulate(Clip(AdamW(lr=RATES), 0.5), EVERY),
    "Clip(Clip)": Clip(Clip(SGD(lr=RATES), 0.5, norm_type=1.0), RATES, nonfinite="skip"),
}
OTHERS = {
    "SkipNonfinite": SkipNonfinite(AdamW(lr=RATES)),
    "SkipNonfinite, calls of each": SkipNonfinite(SGD(lr=0.1), EVERY - 1),
    "LossScale": LossScale(AdamW(lr=RATES), 2.0**10, growth_interval=2),
    "LossScale of each": LossScale(
        Clip(SGD(lr=RATES), 1.0), 2 * EVERY, growth_factor=EVERY + 1, growth_interval=EVERY
    ),
    "ClipValue": ClipValue(AdamW(lr=RATES), 0.3),
    "ClipValue of each": ClipValue(SGD(lr=RATES), RATES),
    "Lookahead": Lookahead(AdamW(lr=RATES), every=2),
    "Lookahead of each": Lookahead(AdamW(lr=0.1), every=EVERY, alpha=RATES),
    "MasterWeights": MasterWeights(AdamW(lr=RATES)),
    "MasterWeights(LossScale)": Clip(MasterWeights(LossScale(AdamW(lr=RATES), 4.0)), RATES),
    "Partition": Partition(
        {"w": AdamW(lr=RATES), "b": SGD(lr=0.1)}, lambda n, _: n.replace("s", "w")
    ),
    "Partition, by the shape of one": Clip(
        Partition(
            {"w": Clip(AdamW(lr=RATES), RATES), "b": Ema(SGD(lr=0.1, momentum=0.9))},
            lambda _, leaf: "w" if leaf.ndim > 1 else "b",
        ),
        1.0,
    ),
    "Partition, frozen": Partition(
        {"w": AdamW(lr=RATES), "b": Frozen()}, {"w": "w", "b": "b", "s": "w"}
    ),
}
SCORED = {
    "Best": Best(AdamW(lr=RATES), patience=1),
    "Best of each": Best(SGD(lr=0.1), "max", patience=EVERY - 1, threshold=RATES),
    "Plateau": Plateau(AdamW(lr=0.1), patience=0, factor=0.5),
    "Plateau of each": Plateau(
        AdamW(lr=RATES.float()), patience=EVERY - 1, factor=RATES, cooldown=1
    ),
    "Best(Plateau(Clip))": Best(Plateau(Clip(AdamW(lr=RATES), 1.0), patience=0, min_lr=0.02)),
    "Accumulate(Best)": Accumulate(Best(AdamW(lr=RATES)), 2),
}
SERVED = CLIPS | AVERAGES | SUMS | OTHERS | SCORED | NESTED

# These go by a vmap: a number that is a function, an inner optimizer that has no such update, a
# derivative to follow, and kernels that a mask of members would change.
MAPPED = {
    "a schedule": Clip(AdamW(lr=RATES), Cosine(1.0, 10)),
    "a schedule inside": Clip(AdamW(lr=Cosine(0.1, 10)), 1.0),
    "Cautious": Ema(Cautious(AdamW(lr=RATES))),
    "another kernel": Clip(RMSprop(lr=0.1), 0.5),
    "a schedule that is scaled": Plateau(AdamW(lr=Cosine(0.1, 10)), patience=0),
    "another start": Lookahead(AdamW(lr=RATES), every=2, reset_state=True),
    "leaves at rest": Ema(OTHERS["Partition, frozen"]),
    "a group that is mapped over": Partition(
        {"w": Clip(AdamW(lr=RATES), 0.5), "b": Cautious(SGD(lr=0.1))},
        {"w": "w", "b": "b", "s": "w"},
    ),
    "a count of each leaf": Clip(AdamW(lr=RATES, step_per_leaf=True), 1.0),
}
MASKS = [None, ACTIVE, ~ACTIVE, torch.arange(COUNT) == 2, torch.zeros(COUNT, dtype=torch.bool)]
DTYPES = torch.float32, torch.bfloat16, torch.float64


class NoVmap:
    """In place of vmap, where none is wanted."""

    def __call__(self, *_):
        raise AssertionError("members were mapped over")


def spoiled(grads, step):
    """Gradients of which some members have an infinite element, or NaN."""
    if step % 2:
        grads["w"][step % COUNT, 0, 0] = torch.nan
        grads["b"][3] = torch.inf
    return grads


def told(mask, step):
    """What an update is told: a mask, and every second time a score of each member, or of all."""
    extras = {} if mask is None else {"active": mask}
    if step % 2 == 0:
        extras["value"] = torch.rand(COUNT) if step % 4 else 0.3
    return extras


def of_each(extras):
    """The same for a vmap that maps over all of it."""
    value = extras.get("value")
    if isinstance(value, float):
        extras = extras | {"value": torch.full((COUNT,), value, dtype=torch.float64)}
    return extras


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SERVED | MAPPED)
def test_each_moves_as_under_vmap_to_the_bit_in_place_and_out_of_place(name, dtype):
    inner, params = (SERVED | MAPPED)[name], params_of(dtype)
    opt = Members(inner)
    state = opt.init(params)
    for step in range(4):
        for mask in MASKS:
            grads, extras = spoiled(random_like(params), step), told(mask, step)
            expected = mapped(inner, grads, state, params, **of_each(extras))
            moved = opt.update(grads, state, params, **extras)
            assert_same_bits(moved, expected)
            written = clone(params), clone(state)
            assert opt.update_(grads, written[1], written[0], **extras) == written
            assert_same_bits(written, expected)
            params, state = moved


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("opt", SERVED.values(), ids=SERVED)
def test_nothing_is_mapped_over(opt, in_place, monkeypatch):
    own, params = Members(opt), params_of()
    state = own.init(params)
    monkeypatch.setattr(torch.func, "vmap", NoVmap())
    for step in range(3):
        for mask in MASKS:
            update = own.update_ if in_place else own.update
            params, state = update(random_like(params), state, params, **told(mask, step))


@pytest.mark.parametrize("opt", SERVED.values(), ids=SERVED)
def test_what_is_not_active_is_neither_read_for_others_nor_written(opt):
    own, params = Members(opt), params_of()
    state = own.init(params)
    params, state = own.update(random_like(params), state, params)
    before = clone((params, state))
    for step in range(4):
        grads = random_like(params)
        for leaf in leaves(grads):
            leaf[~ACTIVE] = torch.nan
        own.update_(grads, state, params, **told(ACTIVE, step))
    rest = tree_map(lambda leaf: leaf[~ACTIVE], (params, state))
    assert_same_bits(rest, tree_map(lambda leaf: leaf[~ACTIVE], before))
    assert all(leaf.isfinite().all() for leaf in leaves(params))


@pytest.mark.parametrize("mask", MASKS[:-1], ids=str)
@pytest.mark.parametrize("opt", SERVED.values(), ids=SERVED)
def test_what_is_returned_is_in_memory_of_its_own(opt, mask):
    if opt is OTHERS["Partition, frozen"]:
        return  # which returns the frozen leaves themselves
    own, params = Members(opt), params_of()
    state = own.init(params)
    for step in range(2):
        grads = random_like(params)
        news = own.update(grads, state, params, **told(mask, step))
        starts = [leaf.data_ptr() for leaf in leaves(news)]
        assert len(set(starts)) == len(starts)
        assert set(starts).isdisjoint(leaf.data_ptr() for leaf in leaves((grads, state, params)))
        params, state = news


@pytest.mark.parametrize(
    "inner", [Clip(SGD(lr=RATES), 1.0), Ema(SGD(lr=RATES)), SUMS["Accumulate"]]
)
def test_trees_of_any_nest_are_served(inner, monkeypatch):
    flat, opt = params_of(), Members(inner)
    nested = {"layers": [{"w": flat["w"]}, (flat["b"], flat["s"])]}
    state, grads = opt.init(nested), random_like(nested)
    expected = opt.update(grads, state, nested, active=ACTIVE)
    monkeypatch.setattr(torch.func, "vmap", NoVmap())
    opt.update_(grads, state, nested, active=ACTIVE)
    assert_same_bits((nested, state), expected)


@pytest.mark.parametrize(
    ("inner", "change", "error", "message"),
    [
        (Clip(AdamW(lr=RATES), torch.ones(3)), None, ValueError, "max_norm has shape (3,) for 5"),
        (Clip(AdamW(lr=torch.ones(3)), 1.0), None, ValueError, "lr has shape (3,) for 5 members"),
        (Ema(AdamW(lr=RATES)), "grads", ValueError, "grads['w'] has shape (3, 2)"),
        (Ema(AdamW(lr=RATES)), "params", ValueError, "params['w'] has 3 members"),
    ],
)
def test_what_is_not_one_for_each_member_is_refused_and_nothing_is_written(
    inner, change, error, message
):
    params = {"w": torch.ones(COUNT, 2)}
    state = Members(Ema(AdamW()) if isinstance(inner, Ema) else Clip(AdamW(), 1.0)).init(params)
    given = {"grads": tree_map(torch.ones_like, params), "params": params}
    if change:
        given[change] = {"w": torch.ones(3, 2)}
    before = clone((given["params"], state))
    with pytest.raises(error, match=re.escape(message)):
        Members(inner).update_(given["grads"], state, given["params"])
    assert_same_bits((given["params"], state), before)


def test_what_the_innermost_refuses_leaves_what_is_around_it_as_it_was():
    lr = RATES.clone()
    params = params_of()
    opt = Members(Ema(Clip(Accumulate(SGD(lr=lr), 1), 0.5)))
    state = opt.init(params)
    before = clone((params, state))
    lr[2] = -1.0
    with pytest.raises(ValueError, match=re.escape("lr=-1.0")):
        opt.update_(random_like(params), state, params)
    assert_same_bits((params, state), before)


def test_memory_that_two_tensors_share_goes_by_vmap():
    params = params_of()
    opt = Members(Ema(SGD(lr=RATES)))
    state = opt.init(params)
    state = state._replace(average={**state.average, "w": params["w"]})
    grads = random_like(params)
    expected = opt.update(grads, clone(state), clone(params))[0]
    opt.update_(grads, state._replace(average=clone(state.average)), params)
    assert_same_bits(params, expected)


def test_parameters_that_require_a_gradient_and_derivatives_go_by_vmap():
    params, grads = params_of(torch.float64), random_like(params_of(torch.float64))
    for leaf in params.values():
        leaf.requires_grad_()
    norms = RATES.clone().requires_grad_()
    for inner in (Clip(SGD(lr=RATES), norms), Ema(SGD(lr=RATES))):
        opt = Members(inner)
        new_params, _ = opt.update(grads, opt.init(params), params)
        assert all(leaf.requires_grad for leaf in leaves(new_params))
    opt = Members(Clip(SGD(lr=RATES), norms))
    held = tree_map(torch.Tensor.detach, params)
    new_params, _ = opt.update(grads, opt.init(held), held)
    sum(leaf.sum() for leaf in leaves(new_params)).backward()
    assert norms.grad.isfinite().all()
    assert norms.grad.abs().sum() > 0


def test_runs_are_of_rows_side_by_side():
    assert runs_of(torch.tensor([0, 1, 4, 6, 7, 8])) == [[0, 2], [4, 1], [6, 3]]
    assert runs_of(torch.tensor([5])) == [[5, 1]]
    assert runs_of(torch.tensor([], dtype=torch.int64)) == []


@pytest.mark.parametrize(("members", "size"), [(4, 1), (4, 10_000), (100, 0), (300, 100), (5, 9)])
def test_rows_are_changed_alike_by_calls_of_their_own_and_together(members, size):
    torch.manual_seed(0)
    active, share = torch.rand(members) < 0.7, torch.rand(members)
    target, other = torch.randn(members, size), torch.randn(members, size)

    def change_(own, end, weight):
        own.lerp_(end, weight[:, None])

    expected = torch.where(active[:, None], target.lerp(other, share[:, None]), target)
    [made] = make_rows(
        active, lambda a, b, c: a.lerp(b, c[:, None]), [target], [other], numbers=[share]
    )
    assert made.shape == target.shape
    assert torch.equal(made[active], expected[active])
    change_rows_(active, change_, [target], [other], numbers=[share])
    assert torch.equal(target, expected)


def test_a_number_that_active_members_share_is_read():
    number = torch.tensor([0.5, 1.0, 0.5])
    assert shared(torch.tensor([True, False, True]), number) == 0.5
    assert shared(torch.tensor([True, True, False]), number) is number
    assert shared(None, torch.tensor([2.0, 2.0])) == 2.0
    assert shared(torch.tensor([True, False]), torch.tensor(3.0)) == 3.0
    assert shared(torch.tensor([True, False]), 4.0) == 4.0


def test_numbers_are_renewed_where_members_are_active_and_in_place_where_they_are():
    stack = Stack((), (), (), torch.tensor([True, False]), in_place=True)
    old = torch.tensor([1.0, 2.0])
    [new] = renewed(stack, (old, torch.tensor([5.0, 6.0])))
    assert new is old
    assert old.tolist() == [5.0, 2.0]
    fresh, share = stack._replace(in_place=False), torch.tensor([1.0, 1.0])
    [row] = lerp_rows(fresh, [old], [torch.zeros(2)], share)
    assert row.tolist() == [0.0, 2.0]
    assert old.tolist() == [5.0, 2.0]
