"""Rows of active members: they are computed as among all, and no other row is written."""

import pytest
import torch

from funcopt import (
    Adagrad,
    AdamW,
    Cautious,
    Clip,
    ClipAdaptive,
    Compensated,
    Ema,
    Members,
    Muon,
    RMSprop,
    ScheduleFree,
)
from funcopt._core.types import traits_of
from funcopt.schedules import Exponential
from funcopt.wrappers._rows import Rows

from ..cases import assert_same_bits, clone, faded, leaves, random_like, tree_map

COUNT = 71  # seven at the end
RATES = torch.full((COUNT,), 0.1, dtype=torch.float64)
RATES[10] = 0.05

# None of which has an update of stacked members.
MAPPED = {
    "Cautious": Cautious(AdamW(lr=RATES), rescale=False, weight_decay=0.1),
    "Cautious, the plain kernel or foreach": Cautious(Adagrad(lr=0.1), rescale=False),
    "Cautious, numbers of each": Cautious(RMSprop(lr=RATES), mask=False),
    "ScheduleFree": ScheduleFree(AdamW(lr=0.1), 0.1),
    "Compensated": Compensated(AdamW(lr=RATES)),
    "ClipAdaptive": ClipAdaptive(Ema(AdamW(lr=0.1)), 0.01),
    "Clip of a mapped one": Clip(Cautious(AdamW(lr=0.1), mask=False), 0.5),
    "Transform": faded(Ema(AdamW(lr=RATES))),
    # Of these all members are computed: products of matrices, and means over a leaf.
    "Muon": Muon(lr=0.1),
    "Cautious, rescaled": Cautious(AdamW(lr=0.1)),
    "counts of leaves": AdamW(lr=0.1, step_per_leaf=True),
    "powers of the count": ScheduleFree(AdamW(lr=Exponential(0.1, 0.97), kernel="plain"), 0.1),
}
MASKS = {
    "nobody": [],
    "one": [3],
    "one at the end": [65],
    "the first and the last": [0, 70],
    "those that share their numbers": [0, 1, 2, 3, 66],
    "all but one": [index for index in range(COUNT) if index != 3],
}


def mask_of(rows):
    mask = torch.zeros(COUNT, dtype=torch.bool)
    mask[rows] = True
    return mask


def params_of(opt):
    torch.manual_seed(0)
    shapes = {"w": (4, 3), "v": (9, 70)}
    if opt.inner is not MAPPED["Muon"]:
        shapes |= {"b": (17,), "s": ()}
    return {name: torch.randn(COUNT, *own) for name, own in shapes.items()}


@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("inner", MAPPED.values(), ids=MAPPED)
def test_in_place_the_active_members_have_the_bits_of_a_step_out_of_place(inner, rows):
    opt, active = Members(inner), mask_of(rows)
    params = params_of(opt)
    state = opt.init(params)
    for _ in range(3):
        grads = random_like(params)
        expected = opt.update(grads, state, params, active=active)
        opt.update_(grads, state, params, active=active)
        assert_same_bits((params, state), expected)
        params, state = opt.update(random_like(params), state, params)


@pytest.mark.parametrize("inner", MAPPED.values(), ids=MAPPED)
def test_only_active_members_are_mapped_over_and_nothing_is_written_of_the_others(
    inner, monkeypatch
):
    opt, active = Members(inner), mask_of([1, 2, 4])
    params = params_of(opt)
    state = opt.init(params)
    params, state = opt.update(random_like(params), state, params)
    grads, before = random_like(params), clone((params, state))
    for leaf in leaves(grads):
        leaf[~active] = torch.nan
    sizes, vmap = set(), torch.func.vmap

    def seen(function, dims):
        def call(*tensors):
            sizes.update(len(t) for t, dim in zip(tensors, dims, strict=True) if dim == 0)
            return vmap(function, dims)(*tensors)

        return call

    monkeypatch.setattr(torch.func, "vmap", seen)
    opt.update_(grads, state, params, active=active)
    # With some that are computed and not written.
    assert sizes == {32 + COUNT % 32 if traits_of(inner).shardable else COUNT}
    rest = tree_map(lambda leaf: leaf[~active], (params, state))
    assert_same_bits(rest, tree_map(lambda leaf: leaf[~active], before))
    assert all(leaf.isfinite().all() for leaf in leaves(params))


def test_nothing_is_mapped_over_where_nobody_is_active(monkeypatch):
    opt = Members(MAPPED["Cautious"])
    params = params_of(opt)
    state = opt.init(params)
    before = clone((params, state))
    monkeypatch.setattr(torch.func, "vmap", None)
    opt.update_(random_like(params), state, params, active=mask_of([]))
    assert_same_bits((params, state), before)


def test_parameters_of_a_module_still_require_a_gradient_and_are_moved():
    opt = Members(MAPPED["Cautious"])
    params = params_of(opt)
    state, grads, active = opt.init(params), random_like(params), mask_of([1, 3])
    expected = opt.update(grads, state, params, active=active)
    for leaf in params.values():
        leaf.requires_grad_()
    opt.update_(grads, state, params, active=active)
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in params.values())
    assert_same_bits(tree_map(torch.Tensor.detach, (params, state)), expected)


def test_a_tree_with_too_few_members_is_refused_before_rows_are_taken():
    opt = Members(MAPPED["Cautious"])
    params = params_of(opt)
    state = opt.init(params)
    grads = {**random_like(params), "b": torch.ones(COUNT - 1, 17)}
    before = clone((params, state))
    with pytest.raises(ValueError, match=r"\['b'\] has shape"):
        opt.update_(grads, state, params, active=mask_of([0]))
    assert_same_bits((params, state), before)


def test_rows_are_followed_by_those_at_the_end_and_by_one_that_differs_where_they_agree():
    other = torch.ones(70)
    other[40] = 2.0
    rows = Rows.of(torch.tensor([0, 2, 65]), 70, [torch.ones(70), other, other * 2])
    assert rows.taken.tolist() == [0, 2, 40, *[0] * 29, 64, 65, 66, 67, 68, 69]
    assert rows.first.tolist() == [0, 2]
    assert (rows.last.tolist(), rows.places.tolist()) == ([65], [33])


def test_rows_are_at_least_two_and_fewer_than_all():
    assert len(Rows.of(torch.tensor([64]), 65, []).taken) == 33
    assert len(Rows.of(torch.tensor([64]), 66, []).taken) == 2
    assert Rows.of(torch.tensor([3]), 31, []) is None
    assert Rows.of(torch.arange(33), 64, []) is None


def test_rows_are_copies_and_only_those_of_active_members_are_written():
    tensor = torch.arange(132.0).reshape(66, 2).requires_grad_()
    rows = Rows.of(torch.tensor([3, 65]), 66, [])
    [taken] = rows.take([tensor])
    assert taken.requires_grad
    assert taken.is_leaf
    before = tensor.tolist()
    with torch.no_grad():
        taken.zero_()
    assert tensor.tolist() == before
    rows.put([tensor], [taken])
    assert tensor[[3, 65]].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    rest = [row for index, row in enumerate(before) if index not in (3, 65)]
    assert tensor[[index for index in range(66) if index not in (3, 65)]].tolist() == rest
