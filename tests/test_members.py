"""Members stacked, taken apart, copied and chosen: to the bit, in fresh memory, by the path."""

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import funcopt
from funcopt import (
    SGD,
    Accumulate,
    Adam,
    AdamW,
    Best,
    Cautious,
    Clip,
    ClipAdaptive,
    ClipValue,
    Ema,
    Frozen,
    Lookahead,
    LossScale,
    Partition,
    Plateau,
    ScheduleFree,
    SkipNonfinite,
    members,
    schedules,
)
from funcopt._core import pytree
from funcopt.testing import strategies
from funcopt.testing._compare import ROUNDING, compare
from funcopt.testing.laws._transforms import _MEMBERS

from .cases import leaves
from .every_optimizer import OPTIMIZERS


def bits(tree):
    """All that there is to a tree: its structure, and the bytes of its tensors."""
    found, structure = pytree.flatten(tree)
    return [bytes_of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in found], structure


def bytes_of(leaf):
    plain = torch.empty(leaf.shape, dtype=leaf.dtype).copy_(leaf.detach()).view(-1)
    return leaf.dtype, leaf.shape, plain.view(torch.uint8).tolist()


def memories(tree):
    return {leaf.untyped_storage().data_ptr() for leaf in leaves(tree) if leaf.numel()}


@st.composite
def alike(draw, least=1, most=4):
    """Lists of trees of one structure, with any tensors in them, and None in the same places."""
    first = draw(strategies.trees())
    count = draw(st.integers(least, most))
    return [first, *(draw(strategies.gradients(first)) for _ in range(count - 1))]


# ------------------------------------------------------------------------------------ laws


@given(alike())
def test_unstacked_members_are_those_that_were_stacked(trees):
    before = [bits(tree) for tree in trees]
    stacked = members.stack(trees)
    assert members.size(stacked) == len(trees)
    assert [bits(tree) for tree in members.unstack(stacked)] == before
    assert [bits(tree) for tree in trees] == before


@given(alike(), st.data())
def test_taking_one_member_gives_that_member(trees, data):
    stacked = members.stack(trees)
    index = data.draw(st.integers(-len(trees), len(trees) - 1))
    alone = bits(trees[index])
    for one in (index, torch.tensor(index)):
        assert bits(members.take(stacked, one)) == alone
    for several in ([index], torch.tensor([index]), torch.tensor([index], dtype=torch.int8)):
        assert bits(members.take(stacked, several)) == bits(members.stack([trees[index]]))


@given(alike(), st.data())
def test_taking_several_members_stacks_them_in_this_order(trees, data):
    indices = st.lists(st.integers(-len(trees), len(trees) - 1), min_size=1, max_size=5)
    chosen = data.draw(indices)
    taken = members.take(members.stack(trees), chosen)
    assert bits(taken) == bits(members.stack([trees[index] for index in chosen]))


@given(alike(), st.data())
def test_a_mask_takes_the_members_where_it_is_true(trees, data):
    mask = data.draw(st.lists(st.booleans(), min_size=len(trees), max_size=len(trees)))
    stacked = members.stack(trees)
    chosen = [index for index, true in enumerate(mask) if true]
    for given_mask in (mask, torch.tensor(mask)):
        assert bits(members.take(stacked, given_mask)) == bits(members.take(stacked, chosen))


@given(alike(least=2), st.data())
def test_each_member_is_selected_from_one_of_two_trees(trees, data):
    mask = data.draw(st.lists(st.booleans(), min_size=len(trees), max_size=len(trees)))
    new, old = members.stack(trees), members.stack(trees[::-1])
    expected = [trees[i] if true else trees[-1 - i] for i, true in enumerate(mask)]
    assert bits(members.select(torch.tensor(mask), new, old)) == bits(members.stack(expected))
    everywhere = torch.ones(len(trees), dtype=torch.bool)
    assert bits(members.select(everywhere, new, old)) == bits(new)
    assert bits(members.select(~everywhere, new, old)) == bits(old)


@given(alike(least=2), st.data())
def test_members_that_are_put_are_there_and_the_others_keep_every_bit(trees, data):
    count = len(trees)
    chosen = data.draw(st.lists(st.integers(0, count - 1), unique=True))
    old, new = members.stack(trees), trees[::-1][: len(chosen)]
    expected = list(trees)
    for place, own in zip(chosen, new, strict=True):
        expected[place] = own
    stacked = members.stack(new) if new else members.take(old, [])
    signed = [place - count * data.draw(st.integers(0, 1)) for place in chosen]
    before = bits(old), bits(stacked)
    for indices in (signed, torch.tensor(signed, dtype=torch.int64)):
        made = members.put(old, indices, stacked)
        assert bits(made) == bits(members.stack(expected))
        assert bits(members.take(made, indices)) == bits(stacked)
    assert (bits(old), bits(stacked)) == before


@given(alike(least=2), st.data())
def test_one_member_is_put_without_the_dimension_and_several_by_a_mask(trees, data):
    index = data.draw(st.integers(0, len(trees) - 1))
    own = trees[index - 1]
    expected = bits(members.stack([*trees[:index], own, *trees[index + 1 :]]))
    old, mask = members.stack(trees), [place == index for place in range(len(trees))]
    for one in (index, index - len(trees), torch.tensor(index)):
        assert bits(members.put(old, one, own)) == expected
    for several in (mask, torch.tensor(mask)):
        assert bits(members.put(old, several, members.stack([own]))) == expected


@given(strategies.optimizers(), st.data())
def test_a_mapped_update_of_a_stack_is_the_stack_of_updates(opt, data):
    params = data.draw(strategies.params_for(opt, min_leaves=1))
    many = [params, *(data.draw(strategies.gradients(params)) for _ in range(_MEMBERS - 1))]
    grads = [data.draw(strategies.gradients(params)) for _ in range(_MEMBERS)]
    states = [opt.init(own) for own in many]
    alone = [opt.update(*own) for own in zip(grads, states, many, strict=True)]
    given_all = members.stack(list(zip(grads, states, many, strict=True)))
    together = vmap(opt.update)(*given_all)
    compare("", 1, "moved", together, members.stack(alone), ROUNDING, (given_all[2], given_all[1]))


# -------------------------------------------------------------------------------- optimizers


def test_numbers_that_differ_become_float64_and_the_others_stay_numbers():
    opts = members.stack([AdamW(lr=0.1, betas=(0.9, 0.99)), AdamW(lr=0.2, betas=(0.9, 0.999))])
    assert opts == AdamW(
        lr=torch.tensor([0.1, 0.2], dtype=torch.float64),
        betas=(0.9, torch.tensor([0.99, 0.999], dtype=torch.float64)),
    )
    assert opts.eps == 1e-8
    assert opts.amsgrad is False


def test_optimizers_that_are_equal_stay_as_they_are():
    assert members.stack([AdamW(lr=0.1)] * 3) == AdamW(lr=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_beside_a_tensor_becomes_one_and_no_value_changes(dtype):
    tensor = torch.tensor(0.2, dtype=dtype)
    opts = members.stack([SGD(lr=0.1), SGD(lr=tensor)])
    assert opts.lr.dtype is torch.float64
    assert opts.lr.tolist() == [0.1, tensor.item()]


def test_tensors_stay_in_their_dtype():
    lr = members.stack([SGD(lr=torch.tensor(0.1)), SGD(lr=torch.tensor(0.2))]).lr
    assert lr.dtype is torch.float32


def test_a_number_beside_a_stacked_tensor_is_that_of_each_of_its_members():
    opts = members.stack([SGD(lr=torch.tensor([0.1, 0.2], dtype=torch.float64)), SGD(lr=0.3)])
    assert opts.lr.tolist() == [[0.1, 0.2], [0.3, 0.3]]


def test_numbers_stack_within_wrappers_and_schedules_and_partitions():
    def build(factor):
        decaying = AdamW(lr=schedules.Cosine(peak=0.1 * factor, steps=10, warmup_steps=2 * factor))
        groups = {"a": Clip(decaying, 1.0 * factor), "b": SGD(momentum=0.9)}
        return Ema(Partition(groups, {"w": "a", "v": "b"}), decay=0.5)

    opts = members.stack([build(1), build(2)])
    first = opts.inner.inner["a"]
    assert first.max_norm.tolist() == [1.0, 2.0]
    assert first.inner.lr.peak.tolist() == [0.1, 0.2]
    assert first.inner.lr.warmup_steps.tolist() == [2.0, 4.0]
    assert first.inner.lr.steps == 10
    assert opts.inner.inner["b"] == SGD(momentum=0.9)
    params = members.stack([{"w": torch.ones(3), "v": torch.ones(2)}] * 2)
    state = vmap(opts.init)(params)
    params, state = vmap(lambda opt, *given: opt.update(*given))(opts, params, state, params)
    for factor, own in zip((1, 2), members.unstack((params, state)), strict=True):
        alone = {"w": torch.ones(3), "v": torch.ones(2)}
        compare(
            "", 1, "", own, build(factor).update(alone, build(factor).init(alone), alone), ROUNDING
        )


# Each with what differs between two members, and the optimizers for them.
SWEPT = {
    "Accumulate": lambda x: Accumulate(SGD(), every=x),
    "Adam": lambda x: Adam(eps=x),
    "Clip": lambda x: Clip(SGD(), max_norm=x),
    "Cautious": lambda x: Cautious(SGD(), weight_decay=0.1 * x),
    "ScheduleFree": lambda x: ScheduleFree(SGD(lr=0.1 * x), beta=1 / x),
    "ClipAdaptive": lambda x: ClipAdaptive(SGD(), clipping=x, eps=x),
    "ClipValue": lambda x: ClipValue(SGD(), max_value=x),
    "Ema": lambda x: Ema(SGD(), decay=1 / (1 + x)),
    "Lookahead": lambda x: Lookahead(SGD(), every=x, alpha=1 / x),
    "Best": lambda x: Best(SGD(), patience=x, threshold=1 / x),
    "Plateau": lambda x: Plateau(SGD(), factor=0.1 * x, patience=x, threshold=1 / x, cooldown=x),
    "LossScale": lambda x: LossScale(SGD(), init_scale=x, growth_factor=1.0 + x, growth_interval=x),
    "SkipNonfinite": lambda x: SkipNonfinite(SGD(), max_consecutive=x),
}


@pytest.mark.parametrize("name", SWEPT)
def test_a_stack_of_optimizers_does_what_each_of_them_does(name):
    opts = [SWEPT[name](x) for x in (1, 2, 3)]
    params = [torch.full((4,), 1.0 + i) for i in range(3)]
    stacked, together = members.stack(opts), members.stack(params)
    state = vmap(lambda opt, own: opt.init(own))(stacked, together)
    states = [opt.init(own) for opt, own in zip(opts, params, strict=True)]
    step = vmap(lambda opt, *given: opt.update(*given))
    for _ in range(4):
        together, state = step(stacked, together, state, together)
        moved = [o.update(p, s, p) for o, p, s in zip(opts, params, states, strict=True)]
        params, states = map(list, zip(*moved, strict=True))
        compare(name, 1, "", (together, state), members.stack(moved), ROUNDING)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_stacks_with_itself_and_so_does_its_state(name):
    opt = OPTIMIZERS[name]
    assert members.stack([opt, opt]) == opt
    if "Zero1" in name or "LocalUpdates" in name:
        return
    state = opt.init({"w": torch.ones(3), "v": torch.ones(2)})
    stacked = members.stack([state, state]), torch.ones(2)  # the state of Frozen has no tensors
    assert [bits(own) for own, _ in members.unstack(stacked)] == [bits(state)] * 2


def test_a_stacked_optimizer_is_taken_selected_and_unstacked():
    opts = members.stack([Clip(AdamW(lr=lr), 1.0) for lr in (0.1, 0.2, 0.3)])
    assert members.size(opts) == 3
    assert members.take(opts, [2, 0]).inner.lr.tolist() == [0.3, 0.1]
    assert members.take(opts, 1).inner == AdamW(lr=torch.tensor(0.2, dtype=torch.float64))
    assert [opt.inner.lr.item() for opt in members.unstack(opts)] == [0.1, 0.2, 0.3]
    other = funcopt.replace(opts, "lr", lambda lr: 2 * lr)
    chosen = members.select(torch.tensor([True, False, True]), other, opts)
    assert chosen.inner.lr.tolist() == [0.2, 0.2, 0.6]


def test_an_optimizer_is_put_and_its_number_becomes_one_of_each_member():
    weights = torch.zeros(3)
    tree, own = (SGD(lr=0.1, momentum=0.9), weights), (SGD(lr=0.2, momentum=0.9), torch.tensor(1.0))
    opts, _ = members.put(tree, 1, own)
    assert opts.lr.tolist() == [0.1, 0.2, 0.1]
    assert opts.lr.dtype is torch.float64
    assert opts.momentum == 0.9
    # A number is put among tensors, and a tensor of shape () beside a number.
    assert members.put((opts, weights), 0, own)[0].lr.tolist() == [0.2, 0.2, 0.1]
    taken = members.take((opts, weights), 1)
    assert members.put(tree, -1, taken)[0].lr.tolist() == [0.1, 0.1, 0.2]
    assert members.put(tree, 1, (tree[0], own[1]))[0] == tree[0]
    pair = members.stack([own, (SGD(lr=0.3, momentum=0.9), torch.tensor(2.0))])
    assert members.put(tree, [2, 0], pair)[0].lr.tolist() == [0.3, 0.1, 0.2]


def test_members_that_get_a_number_of_their_own_are_selected_beside_the_number_of_all():
    one, other = SGD(lr=0.1), SGD(lr=torch.tensor([0.2, 0.3], dtype=torch.float64))
    mask = torch.tensor([True, False])
    assert members.select(mask, one, other).lr.tolist() == [0.1, 0.3]
    assert members.select(mask, one, SGD(lr=0.2)).lr.tolist() == [0.1, 0.2]
    assert members.select(mask, one, one) == one


def test_an_optimizer_without_tensors_is_its_own_member():
    opt = AdamW(lr=0.1)
    assert members.take(opt, 5) == opt
    state = vmap(opt.init)(torch.ones(3, 2))
    for own, _ in members.unstack((opt, state)):
        assert own == opt


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (AdamW(), AdamW(amsgrad=True), ["trees[0].amsgrad is False", "trees[1].amsgrad is True"]),
        (SGD(), SGD(kernel="plain"), ["trees[0].kernel is 'auto'", "trees[1].kernel is 'plain'"]),
        (Clip(SGD(), 1.0), Clip(Adam(), 1.0), ["trees[0].inner is SGD", "trees[1].inner is Adam"]),
        (SGD(lr=schedules.Constant(0.1)), SGD(lr=0.1), ["trees[0].lr is Constant", "is 0.1"]),
        (
            SGD(lr=schedules.Linear(1.0, 0.0, 5)),
            SGD(lr=schedules.Constant(0.1)),
            ["trees[0].lr is Linear", "trees[1].lr is Constant"],
        ),
        (SGD(lr=lambda _: 0.1), SGD(lr=lambda _: 0.2), ["trees[0].lr is <function"]),
        (
            Clip(SGD(lr=0.1), 1.0, norm_type=2.0),
            Clip(SGD(lr=0.2), 1.0, norm_type=1.0),
            ["trees[0].norm_type is 2.0", "trees[1].norm_type is 1.0", "give a number"],
        ),
        (AdamW(), AdamW(differentiable=True), ["differentiable is None", "differentiable is True"]),
        (
            Partition({"a": SGD()}, lambda name, leaf: "a"),
            Partition({"b": SGD()}, lambda name, leaf: "b"),
            ["it has no trees[1].inner['a']", "trees[1].inner['b'] is not in trees[0]"],
        ),
        (AdamW(betas=(0.9, 0.9)), AdamW(betas=(lambda _: 0.9, 0.9)), ["trees[1].betas[0] is <"]),
        (
            SGD(lr=torch.tensor(0.1)),
            SGD(lr=torch.tensor(0.1, dtype=torch.float64)),
            ["trees[0].lr is of torch.float32", "trees[1].lr is of torch.float64"],
        ),
    ],
)
def test_optimizers_that_differ_in_something_else_are_refused_by_its_path(one, other, words):
    with pytest.raises(ValueError, match="Make them alike, or stack only those that are") as caught:
        members.stack([one, other])
    for word in words:
        assert word in str(caught.value)


# ---------------------------------------------------------------------------- trees and memory


def test_none_stays_none_and_empty_slots_stay_empty():
    state = SGD().init([torch.ones(2)])
    trees = [{"w": torch.ones(2), "v": None, "state": state}] * 2
    stacked = members.stack(trees)
    assert stacked["v"] is None
    assert stacked["state"].momentum_buffer == ()
    assert members.take(stacked, [0])["v"] is None
    assert members.select(torch.tensor([True, False]), stacked, stacked)["v"] is None
    assert all(own["v"] is None for own in members.unstack(stacked))


@pytest.mark.parametrize("swap", [False, True])
def test_none_beside_a_tensor_is_refused_by_its_path(swap):
    trees = [{"w": None}, {"w": torch.ones(2)}]
    with pytest.raises(
        ValueError, match=r"trees\[0\]\['w'\] is .* and trees\[1\]\['w'\] is"
    ) as error:
        members.stack(trees[::-1] if swap else trees)
    assert "None" in str(error.value)
    assert "shape (2,)" in str(error.value)


def test_what_no_tensor_is_must_be_the_same_outside_of_optimizers():
    assert members.stack([{"name": "a", "w": torch.ones(1)}] * 2)["name"] == "a"
    with pytest.raises(ValueError, match=r"trees\[0\]\['n'\] is 1 and trees\[1\]\['n'\] is 2"):
        members.stack([{"n": 1}, {"n": 2}])
    with pytest.raises(ValueError, match=r"trees\[0\]\['n'\] is 1 and trees\[1\]\['n'\] is True"):
        members.stack([{"n": 1}, {"n": True}])


@pytest.mark.parametrize(
    "other", [torch.ones(2, 3), torch.ones(2, dtype=torch.float64), torch.ones(2, device="meta")]
)
def test_tensors_that_are_not_alike_are_refused_by_their_path(other):
    one, two, mask = {"w": [torch.ones(2)]}, {"w": [other]}, torch.ones(2, dtype=torch.bool)
    for merge in (lambda: members.stack([one, two]), lambda: members.select(mask, one, two)):
        with pytest.raises(
            ValueError, match=r"\['w'\]\[0\] is of torch.float32 and shape"
        ) as error:
            merge()
        shown = f"['w'][0] is of {other.dtype} and shape {tuple(other.shape)} on {other.device}"
        assert shown in str(error.value)


def test_trees_of_other_structures_are_refused_by_their_paths():
    with pytest.raises(ValueError, match=r"it has no trees\[1\]\['v'\]") as error:
        members.stack(
            [{"w": torch.ones(1), "v": torch.ones(1)}, {"w": torch.ones(1), "u": torch.ones(1)}]
        )
    assert "trees[1]['u'] is not in trees[0]" in str(error.value)
    with pytest.raises(ValueError, match="the nodes are of other types"):
        members.stack([[torch.ones(1)], (torch.ones(1),)])
    states = [AdamW(amsgrad=flag).init({"w": torch.ones(1)}) for flag in (True, False)]
    with pytest.raises(ValueError, match=r"trees\[1\]\.max_exp_avg_sq\['w'\]"):
        members.stack(states)
    with pytest.raises(ValueError, match=r"old\['b'\]"):
        members.select(torch.tensor([True]), {"a": torch.ones(1)}, {"b": torch.ones(1)})


def test_nothing_and_no_list_cannot_be_stacked():
    with pytest.raises(ValueError, match="one member at least"):
        members.stack([])
    with pytest.raises(TypeError, match="trees is of type dict"):
        members.stack({"w": torch.ones(2)})
    with pytest.raises(TypeError, match=r"trees is of torch\.float32"):
        members.stack(torch.ones(2))


def test_results_share_no_memory_with_what_was_given():
    trees = [{"w": torch.ones(2)}, {"w": torch.zeros(2)}]
    stacked = members.stack(trees)
    mask = torch.tensor([True, True])
    results = [
        stacked,
        *members.unstack(stacked),
        members.take(stacked, 0),
        members.take(stacked, [0, 1]),
        members.take(stacked, mask),
        members.select(mask, stacked, stacked),
        members.put(stacked, 0, members.take(stacked, 1)),
        members.put(stacked, [], members.take(stacked, [])),
    ]
    found = [memories(tree) for tree in [*trees, *results]]
    assert len(set().union(*found)) == sum(map(len, found))


def test_an_update_in_place_of_one_member_leaves_the_stack_alone():
    params = {"w": torch.ones(2, 3)}
    first, second = members.unstack(params)
    opt = SGD(lr=0.5)
    opt.update_({"w": torch.ones(3)}, opt.init(first), first)
    assert first["w"].tolist() == [0.5] * 3
    assert torch.equal(params["w"], torch.ones(2, 3))
    assert torch.equal(second["w"], torch.ones(3))


def test_what_was_given_is_not_changed():
    given_tree = {"w": torch.tensor([[1.0, math.nan], [2.0, 3.0]]), "n": torch.arange(2)}
    before = bits(copy.deepcopy(given_tree))
    members.unstack(given_tree)
    members.take(given_tree, [1, 1])
    members.select(torch.tensor([True, False]), given_tree, given_tree)
    members.put(given_tree, 0, members.take(given_tree, 1))
    assert bits(given_tree) == before


# ------------------------------------------------------------------------------------- sizes


def test_a_tensor_with_another_number_of_members_is_named():
    tree = {"a": torch.ones(4, 2), "b": torch.ones(3, 2)}
    with pytest.raises(
        ValueError, match=r"tree\['b'\] has 3 members, of shape \(3, 2\), and tree\['a'\] has 4"
    ):
        members.size(tree)
    with pytest.raises(ValueError, match=r"tree\['b'\] has 3 members"):
        members.take(tree, 0)
    with pytest.raises(ValueError, match=r"old\['b'\] has 3 members"):
        members.select(torch.ones(4, dtype=torch.bool), {"a": tree["a"], "b": tree["a"]}, tree)


def test_a_tensor_without_members_is_named():
    state = AdamW().init({"w": torch.ones(3, 2)})  # not by vmap, so that there is one count
    for ask in (members.size, members.unstack, lambda tree: members.take(tree, 0)):
        with pytest.raises(ValueError, match=r"tree\.step has shape \(\): .* vmap\(opt\.init\)"):
            ask(state)
    with pytest.raises(ValueError, match=r"tree\.inner\.lr has shape"):
        members.size(Clip(SGD(lr=torch.tensor(0.1)), 1.0))


@pytest.mark.parametrize("tree", [{}, (), [None], AdamW(lr=0.1), Frozen()])
def test_a_tree_without_tensors_has_no_size(tree):
    for ask in (members.size, members.unstack):
        with pytest.raises(ValueError, match="tree has no tensors"):
            ask(tree)


# ----------------------------------------------------------------------------------- indices


@pytest.mark.parametrize("index", [3, -4, 100])
def test_an_index_out_of_range_is_refused_with_its_value(index):
    for indices in (index, [0, index], torch.tensor(index), torch.tensor([0, index])):
        with pytest.raises(IndexError, match=rf"indices has {index}, and there are 3 members"):
            members.take({"w": torch.ones(3)}, indices)


@pytest.mark.parametrize(
    ("indices", "error"),
    [
        (1.0, TypeError),
        ("1", TypeError),
        (None, TypeError),
        (True, TypeError),
        ([True, 1, 0], TypeError),
        ([0.5], TypeError),
        (slice(0, 2), TypeError),
        (torch.tensor([0.0]), TypeError),
        (torch.tensor([1, 0, 1], dtype=torch.uint8), TypeError),
        (torch.tensor([[0]]), ValueError),
        (torch.tensor(True), ValueError),
        (torch.tensor([True, False]), ValueError),
        ([True] * 4, ValueError),
    ],
)
def test_what_is_no_index_is_refused(indices, error):
    with pytest.raises(error, match="indices"):
        members.take({"w": torch.ones(3)}, indices)


def test_indices_may_come_from_numpy_and_from_a_range():
    import numpy as np

    tree = {"w": torch.arange(4)}
    assert members.take(tree, range(3, 0, -1))["w"].tolist() == [3, 2, 1]
    assert members.take(tree, np.array([2, -1]))["w"].tolist() == [2, 3]
    assert members.take(tree, np.int64(2))["w"].item() == 2
    assert members.take(tree, np.array([False, True, False, True]))["w"].tolist() == [1, 3]


def test_no_member_may_be_taken():
    tree = {"w": torch.ones(3, 2)}
    for none in ([], torch.tensor([], dtype=torch.int64), torch.zeros(3, dtype=torch.bool)):
        taken = members.take(tree, none)
        assert taken["w"].shape == (0, 2)
        assert members.size(taken) == 0
        assert members.unstack(taken) == []


@pytest.mark.parametrize("twice", [[1, 1], [1, -2], torch.tensor([0, 1, 1])])
def test_no_member_is_put_twice(twice):
    tree = {"w": torch.ones(3)}
    with pytest.raises(ValueError, match="indices has member 1 twice: must have each once"):
        members.put(tree, twice, members.take(tree, twice))


def test_what_is_put_must_match_what_it_replaces():
    tree = {"w": torch.ones(3, 2)}
    for indices, new in [
        (0, torch.ones(1, 2)),
        ([0], torch.ones(2)),
        ([0, 1], torch.ones(3, 2)),
        ([True, False, False], torch.ones(2, 2)),
        (0, torch.ones(2).double()),
    ]:
        message = r"new\['w'\] is .* and take\(tree, indices\)\['w'\] is .* Give members such as"
        with pytest.raises(ValueError, match=message):
            members.put(tree, indices, {"w": new})
    with pytest.raises(ValueError, match=r"it has no take\(tree, indices\)|does not have the str"):
        members.put(tree, 0, {"v": torch.ones(2)})
    with pytest.raises(ValueError, match="tree has no tensors"):
        members.put(SGD(lr=0.1), 0, SGD(lr=0.2))
    with pytest.raises(IndexError, match="indices has 3"):
        members.put(tree, 3, {"w": torch.ones(2)})


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        ([True, False], TypeError, "mask is of type list"),
        (torch.tensor([1, 0]), TypeError, "mask is of torch.int64"),
        (torch.tensor(True), ValueError, r"mask has shape \(\)"),
        (torch.ones(2, 1, dtype=torch.bool), ValueError, r"mask has shape \(2, 1\)"),
        (torch.tensor([True]), ValueError, "mask has 1 members and new has 2"),
    ],
)
def test_what_is_no_mask_is_refused(mask, error, words):
    tree = {"w": torch.ones(2)}
    with pytest.raises(error, match=words):
        members.select(mask, tree, tree)


# -------------------------------------------------------------------------------- transforms


def test_nan_in_what_is_not_taken_leaks_into_no_derivative():
    mask = torch.tensor([True, False])
    old = torch.tensor([[math.nan], [2.0]])

    def loss(new):
        return members.select(mask, {"w": new}, {"w": old})["w"].square().sum()

    assert grad(loss)(torch.tensor([[3.0], [math.nan]])).tolist() == [[6.0], [0.0]]


def test_derivatives_flow_through_all_of_them():
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def loss(stacked):
        taken = members.take({"w": stacked}, [0, 0, 2])
        parts = members.unstack(taken)
        return members.stack(parts)["w"].pow(3).sum()

    assert torch.allclose(grad(loss)(weight), torch.tensor([6.0, 0.0, 27.0]).double())
    assert torch.autograd.gradcheck(loss, weight.clone().requires_grad_())
    assert jvp(loss, (weight,), (torch.ones(3).double(),))[1].item() == 33.0
    parameter = torch.nn.Parameter(weight)
    assert members.take(parameter, 0).requires_grad


def test_derivatives_flow_into_what_is_put_and_what_stays_and_nan_into_neither():
    old, new = torch.tensor([1.0, math.nan, 3.0]).double(), torch.tensor([4.0, 5.0]).double()

    def loss(old, new):
        return members.put({"w": old}, [1, 0], {"w": new})["w"].pow(2).sum()

    assert loss(old, new).item() == 50.0
    assert grad(loss)(old, new).tolist() == [0.0, 0.0, 6.0]
    assert grad(loss, 1)(old, new).tolist() == [8.0, 10.0]
    tangents = torch.ones(3).double(), torch.ones(2).double()
    assert jvp(loss, (old, new), tangents)[1].item() == 24.0
    one = grad(lambda own: members.put(old, 1, own).square().sum())(torch.tensor(2.0).double())
    assert one.item() == 4.0


def test_members_are_put_beneath_vmap():
    trees = {"w": torch.arange(12.0).reshape(2, 3, 2)}
    new = {"w": -torch.arange(8.0).reshape(2, 2, 2)}
    indices = torch.tensor([[2, 0], [1, 2]])
    made = vmap(members.put)(trees, indices, new)
    last = vmap(members.put)(trees, indices[:, 0], {"w": new["w"][:, 0]})
    for index in range(2):
        tree, own = members.take(trees, index), members.take(new, index)
        assert bits(members.take(made, index)) == bits(members.put(tree, indices[index], own))
        alone = members.put(tree, indices[index, 0], members.take(own, 0))
        assert bits(members.take(last, index)) == bits(alone)


def test_members_are_taken_and_selected_beneath_vmap():
    trees = {"w": torch.arange(12.0).reshape(2, 3, 2), "n": torch.arange(6).reshape(2, 3)}
    masks = torch.tensor([[True, False, True], [False, False, True]])
    opposite = {name: -leaf for name, leaf in trees.items()}
    selected = vmap(members.select)(masks, trees, opposite)
    for index in range(2):
        one, other = members.take(trees, index), members.take(opposite, index)
        expected = members.select(masks[index], one, other)
        assert bits(members.take(selected, index)) == bits(expected)
    for indices in (torch.tensor([2, -1]), torch.tensor([[2, 0], [-2, 1]])):
        taken = vmap(members.take)(trees, indices)
        for index in range(2):
            expected = members.take(members.take(trees, index), indices[index])
            assert bits(members.take(taken, index)) == bits(expected)
    with pytest.raises(IndexError, match="indices has 3"):
        vmap(members.take)(trees, torch.tensor([0, 3]))
    shared = vmap(members.take, (None, 0))(members.take(trees, 0), torch.tensor([2, 0]))
    assert shared["w"].tolist() == [[4.0, 5.0], [0.0, 1.0]]


def test_optimizers_are_stacked_beneath_vmap():
    lrs = torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64)

    def stacked(row):
        return members.stack([SGD(lr=row[0]), SGD(lr=row[1])])

    assert torch.equal(vmap(stacked)(lrs).lr, lrs)


def test_a_hypergradient_flows_through_a_stack_of_optimizers():
    def after(lr):
        opts = members.stack([SGD(lr=lr), SGD(lr=0.5)])
        params = torch.ones(2, 1, dtype=torch.float64)
        state = vmap(opts.init)(params)
        return vmap(lambda o, *own: o.update(*own))(opts, params, state, params)[0].sum()

    assert grad(after)(torch.tensor(0.1, dtype=torch.float64)).item() == -1.0


def test_stacking_keeps_dtypes_under_autocast():
    trees = [{"w": torch.ones(2, dtype=dtype)} for dtype in (torch.float16, torch.float16)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert members.stack(trees)["w"].dtype is torch.float16


def test_the_best_members_replace_the_worst_with_all_that_they_have():
    opts = members.stack([AdamW(lr=lr) for lr in (0.1, 0.2, 0.3)])
    params = {"w": torch.tensor([[1.0, 1.0], [5.0, 5.0], [0.1, 0.1]])}
    state = vmap(opts.init)(params)
    step = vmap(lambda opt, *given: opt.update(*given))
    params, state = step(opts, params, state, params)
    ranks = params["w"].square().sum(1).argsort()
    everything = members.take((opts, state, params), ranks[[0, 1, 0]])
    first, _, copied = members.unstack(everything)
    assert bits(first) == bits(copied)
    step(everything[0], everything[2], everything[1], everything[2])


@dataclasses.dataclass
class Node:
    value: torch.Tensor


torch.utils._pytree.register_dataclass(Node)


def test_nodes_that_only_torch_knows_are_nodes():
    stacked = members.stack([Node(torch.ones(2)), Node(torch.zeros(2))])
    assert stacked.value.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert members.take(stacked, 1).value.tolist() == [0.0, 0.0]
