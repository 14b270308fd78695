"""What an update may be told besides the trees: whether it is active, and a value."""

import re

import pytest
import torch
from torch.func import grad, vmap

from funcopt import SGD, AdamW, Best, Clip, Ema, Lookahead, Partition, SkipNonfinite
from funcopt._core import transforms

from ..cases import assert_same_bits, clone, leaves, random_like, tree_map
from ..every_optimizer import OPTIMIZERS

MEMBERS = 4
ACTIVE = torch.tensor([True, False, True, False])
VMAPPED = {name: opt for name, opt in OPTIMIZERS.items() if not name.startswith(("Zero1", "Local"))}


def params_of(*shape):
    torch.manual_seed(0)
    return {"w": torch.randn(*shape, 3, 2), "b": torch.randn(*shape, 5)}


def rows(tree, mask):
    return tree_map(lambda leaf: leaf[mask], tree)


@pytest.mark.parametrize("opt", VMAPPED.values(), ids=VMAPPED)
def test_members_that_are_not_active_keep_every_bit_and_others_move_as_without_a_mask(opt):
    params = params_of(MEMBERS)
    state = vmap(opt.init)(params)
    for _ in range(3):
        grads = random_like(params)
        moved = vmap(opt.update)(grads, state, params)
        grads["w"][1].fill_(torch.nan)
        given = grads, state, params, ACTIVE
        chosen = vmap(lambda g, s, p, a: opt.update(g, s, p, active=a))(*given)
        assert_same_bits(rows(chosen, ~ACTIVE), rows((params, state), ~ACTIVE))
        assert_same_bits(rows(chosen, ACTIVE), rows(moved, ACTIVE))
        params, state = chosen


@pytest.mark.parametrize("active", [False, torch.tensor(False)], ids=["bool", "tensor"])
@pytest.mark.parametrize("opt", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_what_is_not_active_keeps_every_bit_and_shares_no_memory(opt, active):
    params = params_of()
    params, state = opt.update(random_like(params), opt.init(params), params)
    grads = tree_map(lambda leaf: torch.full_like(leaf, torch.nan), params)
    before = clone((params, state))
    kept = opt.update(grads, state, params, active=active)
    assert_same_bits(kept, before)
    if opt != OPTIMIZERS["Frozen"]:
        # What has no elements has no memory.
        starts = {leaf.data_ptr() for leaf in leaves((params, state)) if leaf.numel()}
        assert starts.isdisjoint(leaf.data_ptr() for leaf in leaves(kept) if leaf.numel())
    written = opt.update_(grads, state, params, active=active)
    assert written[0] is params
    assert_same_bits((params, state), before)


@pytest.mark.parametrize("opt", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_what_is_active_moves_as_it_does_unless_told(opt):
    params = params_of()
    state, grads = opt.init(params), random_like(params)
    expected = opt.update(grads, state, params)
    assert_same_bits(opt.update(grads, state, params, active=torch.tensor(True)), expected)
    assert_same_bits(opt.update(grads, state, params, active=None, value=None), expected)
    opt.update_(grads, state, params, active=True)
    assert_same_bits((params, state), expected)


@pytest.mark.parametrize("opt", [AdamW(lr=0.1), Clip(Ema(SGD(lr=0.1)), 1.0)], ids=["AdamW", "Clip"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_the_derivative_of_an_update_that_is_not_active_is_that_of_doing_nothing(opt, bad):
    params, grads = params_of(), random_like(params_of(2))
    state = opt.init(params)
    grads["w"][1].fill_(bad)

    def total(params, grads, active):
        moved, _ = opt.update(grads, state, params, active=active)
        return moved["w"].sum()

    slopes = vmap(grad(total), (None, 0, 0))(params, grads, torch.tensor([True, False]))
    assert (slopes["w"][1] == 1).all()
    assert not (slopes["b"][1]).any()
    assert slopes["w"][0].isfinite().all()


@pytest.mark.parametrize(
    "opt",
    [SGD(lr=0.1), Clip(AdamW(lr=0.1), max_norm=1.0), Lookahead(SGD(lr=0.1), every=2)],
    ids=repr,
)
def test_a_value_that_nobody_goes_by_changes_nothing(opt):
    params = params_of()
    state, grads = opt.init(params), random_like(params)
    expected = opt.update(grads, state, params)
    assert_same_bits(opt.update(grads, state, params, value=0.5), expected)
    opt.update_(grads, state, params, value=torch.tensor(float("nan")))
    assert_same_bits((params, state), expected)


@pytest.mark.parametrize("method", ["update", "update_"])
def test_what_starts_anew_within_an_update_goes_by_its_value(method):
    opt = Lookahead(Best(SGD(lr=0.1)), every=2, reset_state=True)
    params = params_of()
    state = opt.init(params)
    for value, expected in ((2.0, 2.0), (1.0, torch.inf), (3.0, 3.0)):
        given = random_like(params), state, params
        params, state = getattr(opt, method)(*given, value=value)
        assert state.inner.best_value == expected
        assert state.inner.value == ()


def test_groups_that_go_by_a_value_are_written_in_place():
    opt = Partition({"w": Best(SGD(lr=0.1)), "b": Best(SGD(lr=0.1))}, {"w": "w", "b": "b"})
    params = params_of()
    _, state = opt.update_(random_like(params), opt.init(params), params, value=torch.tensor(2.0))
    for own in state.inner.values():
        assert own.best_value == 2
        assert own.value == ()


@pytest.mark.parametrize("given", ["active", "gradients"])
def test_a_value_is_not_written_to_where_an_update_in_place_is_chosen_on_a_device(
    given, monkeypatch
):
    """What chooses there writes over the whole state, of which the value is a part by then."""
    monkeypatch.setattr(transforms, "on_host", lambda tensor: False)
    opt, params = SkipNonfinite(Best(SGD(lr=0.1))), params_of()
    root = torch.ones((), requires_grad=True)
    value = root.exp()  # whose derivative needs its value
    active = {"active": torch.tensor(True)} if given == "active" else {}
    _, state = opt.update_(random_like(params), opt.init(params), params, value=value, **active)
    assert state.inner.value == ()
    assert value._version == 0
    value.backward()


def test_a_condition_that_is_compiled_is_not_read():
    opt, params = AdamW(lr=0.1), params_of()
    state, grads = opt.init(params), random_like(params)

    def step(active):
        return opt.update(grads, state, params, active=active)

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert_same_bits(compiled(torch.tensor(False)), (params, state))
    assert_same_bits(compiled(torch.tensor(True))[0], opt.update(grads, state, params)[0])


@pytest.mark.parametrize(
    ("extras", "error", "message"),
    [
        ({"activ": True}, TypeError, "update() was given activ: besides grads, state and params"),
        ({"active": 1}, TypeError, "active is of type int: must be a bool, or a bool tensor."),
        ({"active": torch.ones(())}, TypeError, "active is of torch.float32 and shape ()"),
        ({"active": torch.tensor([True])}, ValueError, "active has shape (1,): must have shape ()"),
        ({"value": "low"}, TypeError, "value is of type str: must be a number"),
        ({"value": torch.ones(2)}, ValueError, "value has shape (2,): must have shape ()"),
        ({"value": torch.tensor(1)}, TypeError, "value is of torch.int64 and shape ()"),
    ],
)
def test_what_is_wrong_is_refused_with_its_name_and_nothing_is_written(extras, error, message):
    opt, params = SGD(lr=0.1), params_of()
    before = clone(params)
    with pytest.raises(error, match=re.escape(message)):
        opt.update(random_like(params), opt.init(params), params, **extras)
    with pytest.raises(error):
        opt.update_(random_like(params), opt.init(params), params, **extras)
    assert_same_bits(params, before)
