"""Members that are updated together move as each would alone."""

import pickle
import re

import pytest
import torch
from torch.func import grad, vmap

from funcopt import (
    SGD,
    Accumulate,
    Adagrad,
    Adam,
    AdamW,
    Best,
    Cautious,
    Clip,
    Compensated,
    Ema,
    Frozen,
    Lion,
    Members,
    NAdam,
    Partition,
    RAdam,
    RMSprop,
    ScheduleFree,
    SkipNonfinite,
    interop,
    members,
)
from funcopt._engine import stacked
from funcopt.schedules import Cosine

from ..cases import assert_same_bits, clone, faded, leaves, random_like, tree_map

COUNT = 5
ACTIVE = torch.tensor([True, False, True, True, False])
RATES = torch.tensor([0.1, 0.02, 0.3, 0.1, 0.05], dtype=torch.float64)

BY_RULE = {
    "AdamW": AdamW(lr=RATES, weight_decay=RATES.flip(0)),
    "AdamW, float32 numbers": AdamW(lr=RATES.float(), betas=(RATES, 0.9)),
    "AdamW, plain": AdamW(lr=RATES, kernel="plain"),
    "AdamW, foreach": AdamW(lr=RATES, kernel="foreach"),
    "AdamW, fused": AdamW(lr=RATES, kernel="fused"),
    "AdamW, a schedule": AdamW(lr=Cosine(0.1, 10, warmup_steps=2)),
    "AdamW, one number for all": AdamW(lr=0.1),
    "AdamW, a tensor for all": AdamW(lr=torch.tensor(0.1)),
    "Adam, amsgrad": Adam(lr=RATES, amsgrad=True, weight_decay=0.1),
    "SGD": SGD(lr=RATES),
    "SGD, momentum": SGD(lr=RATES, momentum=0.9, dampening=RATES),
    "Lion": Lion(lr=RATES),
    "RAdam": RAdam(lr=RATES),
    "NAdam": NAdam(lr=RATES),
    "Adagrad": Adagrad(lr=RATES),
    "RMSprop": RMSprop(lr=RATES),
    "AdamW, by chance": AdamW(lr=RATES, rounding="stochastic", seed=RATES * 1000),
}
MAPPED = {
    "a count of each leaf": AdamW(lr=RATES, step_per_leaf=True),
    "differentiable": SGD(lr=RATES, differentiable=True),
    "Clip": Clip(AdamW(lr=RATES), 1.0),
    "Clip, a norm of each": Clip(AdamW(lr=0.1), RATES),
    "Accumulate": Accumulate(SGD(lr=RATES), every=2),
    "Ema": Ema(SkipNonfinite(SGD(lr=RATES)), 0.9),
    "Compensated": Compensated(AdamW(lr=RATES)),
    "Cautious": Cautious(SGD(lr=RATES, momentum=0.9), weight_decay=RATES),
    "ScheduleFree": ScheduleFree(SGD(lr=RATES), RATES),
    "Transform": faded(SGD(lr=RATES)),
    "Partition": Partition({"w": AdamW(lr=RATES), "b": Frozen()}, {"w": "w", "b": "b", "s": "w"}),
}
ALL = BY_RULE | MAPPED


def params_of(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = {"w": (4, 3), "b": (17,), "s": ()}
    return {name: torch.randn(COUNT, *own).to(dtype) for name, own in shapes.items()}


def mapped(inner, *trees, **extras):
    """The update by a vmap over optimizers, trees and what is told."""
    names = list(extras)
    tensors, rebuild = members_of(inner)

    def update(own, given, told):
        return rebuild(own).update(*given, **dict(zip(names, told, strict=True)))

    dims = [0 if tensor.ndim else None for tensor in tensors]
    return vmap(update, (dims, 0, 0))(tensors, trees, list(extras.values()))


def members_of(inner):
    found, spec = torch.utils._pytree.tree_flatten(inner)
    return found, lambda own: torch.utils._pytree.tree_unflatten(own, spec)


# A kernel that is asked for by name serves no moments in another dtype, and no complex number has
# parts in 16 bits.
DTYPES = {
    "AdamW, fused": (torch.float32, torch.float64, torch.complex64),
    "AdamW, by chance": (torch.float32, torch.bfloat16, torch.float64),
}
EVERY_DTYPE = torch.float32, torch.bfloat16, torch.float64, torch.complex64


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, own) for name in ALL for own in DTYPES.get(name, EVERY_DTYPE)]
)
def test_each_moves_as_under_vmap_to_the_bit(name, dtype):
    inner, params = ALL[name], params_of(dtype)
    opt = Members(inner)
    state = opt.init(params)
    for _ in range(3):
        grads = random_like(params)
        assert_same_bits(opt.update(grads, state, params), mapped(inner, grads, state, params))
        moved = opt.update(grads, state, params, active=ACTIVE)
        assert_same_bits(moved, mapped(inner, grads, state, params, active=ACTIVE))
        written = clone(params), clone(state)
        assert opt.update_(grads, written[1], written[0], active=ACTIVE)[0] is written[0]
        assert_same_bits(written, moved)
        params, state = moved


@pytest.mark.parametrize("opt", BY_RULE.values(), ids=BY_RULE)
def test_what_is_made_by_a_rule_needs_no_vmap(opt, monkeypatch):
    params = params_of()
    own, grads = Members(opt), random_like(params)
    state = own.init(params)
    if not isinstance(opt.lr, Cosine):
        monkeypatch.setattr(torch.func, "vmap", None)
    own.update(grads, state, params)
    own.update_(grads, state, params, active=ACTIVE)


@pytest.mark.parametrize("opt", ALL.values(), ids=ALL)
def test_each_moves_as_it_does_alone(opt):
    params, own = params_of(torch.float64), Members(opt)
    state, grads = own.init(params), random_like(params)
    tensors, rebuild = members_of(opt)
    alone = [
        rebuild([tensor[i] if tensor.ndim else tensor for tensor in tensors]).update(*given)
        for i, given in enumerate(members.unstack((grads, state, params)))
    ]
    together = members.unstack(own.update(grads, state, params))
    for one, other in zip(together, alone, strict=True):
        for a, b in zip(leaves(one), leaves(other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("opt", ALL.values(), ids=ALL)
def test_who_has_stopped_is_unchanged_over_a_hundred_steps_whatever_the_gradients_are(opt):
    params, own = params_of(), Members(opt)
    state = own.init(params)
    params, state = own.update(random_like(params), state, params)
    before = clone((params, state))
    for _ in range(100):
        grads = random_like(params)
        grads["w"][~ACTIVE] = torch.nan
        own.update_(grads, state, params, active=ACTIVE)
    rows = tree_map(lambda leaf: leaf[~ACTIVE], (params, state))
    assert_same_bits(rows, tree_map(lambda leaf: leaf[~ACTIVE], before))
    assert all(leaf.isfinite().all() for leaf in leaves(params))


@pytest.mark.parametrize("active", [False, torch.zeros(COUNT, dtype=torch.bool)])
@pytest.mark.parametrize("opt", [Members(BY_RULE["AdamW"]), Members(MAPPED["Clip"])])
def test_where_nobody_is_active_all_stays_and_is_copied(opt, active):
    params = params_of()
    state = opt.init(params)
    kept = opt.update(random_like(params), state, params, active=active)
    assert_same_bits(kept, (params, state))
    starts = {leaf.data_ptr() for leaf in leaves((params, state))}
    assert starts.isdisjoint(leaf.data_ptr() for leaf in leaves(kept))
    opt.update_(random_like(params), state, params, active=active)
    assert_same_bits(kept, (params, state))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_step_by_a_kernel_in_which_nobody_is_active_is_not_mapped_over(monkeypatch, in_place):
    def mapped(*args, **trees):
        raise AssertionError("members were mapped over")

    params, opt = params_of(), Members(BY_RULE["AdamW"])
    state = opt.init(params)
    monkeypatch.setattr("funcopt.wrappers.members._mapped", mapped)
    update = opt.update_ if in_place else opt.update
    update(random_like(params), state, params, active=torch.zeros(COUNT, dtype=torch.bool))


def test_leaves_that_do_not_lie_one_after_another_go_by_vmap_to_the_same_bits():
    params = {"w": torch.randn(3, 4, COUNT).movedim(2, 0)}
    opt = Members(AdamW(lr=RATES))
    state, grads = opt.init(params), random_like(params)
    expected = opt.update(tree_map(torch.Tensor.contiguous, grads), state, params)
    assert_same_bits(opt.update(grads, state, params), expected)
    opt.update_(grads, state, params)
    assert_same_bits((params, state), expected)


def test_parameters_of_a_module_still_require_a_gradient():
    grads = random_like(params_of())
    params = tree_map(lambda leaf: leaf.requires_grad_(), params_of())
    for inner in (AdamW(lr=RATES), Clip(AdamW(lr=RATES), 1.0)):
        opt = Members(inner)
        new_params, state = opt.update(
            tree_map(torch.Tensor.detach, grads), opt.init(params), params
        )
        assert all(leaf.requires_grad and leaf.is_leaf for leaf in leaves(new_params))
        assert not any(leaf.requires_grad for leaf in leaves(state))


def test_a_step_can_be_differentiated_by_the_numbers_of_the_members():
    params = params_of(torch.float64)
    grads = random_like(params)
    state = Members(SGD()).init(params)

    def moved(lr):
        return Members(SGD(lr=lr)).update(grads, state, params)[0]["w"].sum()

    expected = -grads["w"].sum((1, 2))
    torch.testing.assert_close(grad(moved)(RATES), expected)
    rates = RATES.clone().requires_grad_()
    moved(rates).backward()
    torch.testing.assert_close(rates.grad, expected)


def test_a_number_that_was_written_is_checked_again():
    rates = RATES.clone()
    opt, params = Members(SGD(lr=rates)), params_of()
    state, grads = opt.init(params), random_like(params)
    opt.update(grads, state, params)
    rates[1] = -1.0
    with pytest.raises(ValueError, match=re.escape("lr=-1.0")):
        opt.update(grads, state, params)
    rates[1] = 0.5
    params = opt.update(
        tree_map(torch.ones_like, grads), state, tree_map(torch.zeros_like, params)
    )[0]
    assert params["b"][1, 0] == -0.5


def test_a_pickle_knows_nothing_of_what_was_checked():
    opt, params = Members(SGD(lr=RATES)), params_of()
    opt.update(random_like(params), opt.init(params), params)
    again = pickle.loads(pickle.dumps(opt))
    assert again == opt
    assert "_checked" in vars(opt.inner)
    assert "_checked" not in vars(again.inner)


def test_many_members_of_many_paces_are_counted_one_by_one():
    count = 1000
    params = {"w": torch.randn(count, 3)}
    opt = Members(AdamW(lr=torch.rand(count) * 0.1))
    state, grads = opt.init(params), random_like(params)
    for _ in range(3):
        active = torch.rand(count) < 0.5
        expected = mapped(opt.inner, grads, state, params, active=active)
        params, state = opt.update(grads, state, params, active=active)
        assert_same_bits((params, state), expected)
    assert state.step.unique().numel() == 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": {"w": torch.ones(3, 2)}}, ValueError, "state.step has 5 members"),
        ({"params": {"w": torch.ones(())}}, ValueError, "params['w'] has shape ()"),
        ({"active": torch.ones(3, dtype=torch.bool)}, ValueError, "active has shape (3,)"),
        ({"active": torch.ones(5)}, TypeError, "active is of torch.float32"),
        ({"opt": Members(AdamW(lr=torch.ones(3)))}, ValueError, "lr has shape (3,) for 5 members"),
    ],
)
def test_what_is_not_one_for_each_member_is_refused(change, error, message):
    params = change.get("params", {"w": torch.ones(COUNT, 2)})
    opt = change.get("opt", Members(AdamW(lr=RATES)))
    state = Members(AdamW(lr=RATES)).init({"w": torch.ones(COUNT, 2)})
    extras = {"active": change["active"]} if "active" in change else {}
    slots = {"exp_avg": tree_map(torch.zeros_like, params)}
    state = state._replace(**slots, exp_avg_sq=tree_map(torch.zeros_like, params))
    before = clone(params)
    with pytest.raises(error, match=re.escape(message)):
        opt.update_(tree_map(torch.ones_like, params), state, params, **extras)
    assert_same_bits(params, before)


@pytest.mark.parametrize(
    ("inner", "path"),
    [
        (Clip(AdamW(), torch.ones(3)), "inner.max_norm"),
        (AdamW(lr=torch.ones(3)), "inner.lr"),
        (Cautious(AdamW(lr=torch.ones(3))), "inner.inner.lr"),
    ],
)
def test_numbers_of_other_members_are_refused_by_their_path(inner, path):
    params, right = {"w": torch.ones(2, 3)}, Members(Cautious(AdamW()))
    message = re.escape(f"{path} has shape (3,) for 2 members: must have shape (2,)")
    with pytest.raises(ValueError, match=message):
        Members(inner).init(params)
    if isinstance(inner, Cautious):  # which goes by vmap
        with pytest.raises(ValueError, match=message):
            Members(inner).update(params, right.init(params), params)


@pytest.mark.parametrize("inner", [AdamW(), Clip(AdamW(), 1.0), Cautious(AdamW())])
def test_a_mask_of_shape_nothing_is_for_all_members(inner):
    params = {"w": torch.randn(4, 3)}
    opt, grads = Members(inner), random_like(params)
    state = opt.init(params)
    moved = opt.update(grads, state, params)
    for active, expected in ((True, moved), (False, (params, state))):
        mask = torch.tensor(active)
        assert_same_bits(opt.update(grads, state, params, active=mask), expected)
        assert_same_bits(vmap(inner.update, (0, 0, 0))(grads, state, params), moved)
        by_vmap = vmap(lambda g, s, p, mask=mask: inner.update(g, s, p, active=mask))
        assert_same_bits(by_vmap(grads, state, params), expected)


@pytest.mark.parametrize("active", [False, torch.tensor(False)])
def test_nobody_looks_at_scores_where_nobody_is_active(active):
    params = {"w": torch.randn(4, 3)}
    opt = Members(Best(AdamW()))
    state = opt.init(params)
    made = opt.update(params, state, params, active=active, value=torch.rand(4))
    assert_same_bits(made, (params, state))


@pytest.mark.parametrize("shape", [(3,), (4, 1), (1, 4)])
@pytest.mark.parametrize("inner", [AdamW(), Best(AdamW()), Cautious(AdamW())])
def test_masks_and_scores_of_another_shape_are_refused_by_their_names(inner, shape):
    params = {"w": torch.randn(4, 3)}
    opt = Members(inner)
    state = opt.init(params)
    told = {"active": torch.ones(shape, dtype=torch.bool), "value": torch.ones(shape)}
    for name, given in told.items():
        if name == "value" and not isinstance(inner, Best):
            continue  # which goes by none
        message = re.escape(f"{name} has shape {shape} for 4 members: must have shape (4,), one")
        with pytest.raises(ValueError, match=message):
            opt.update(params, state, params, **{name: given})


def test_without_tensors_nobody_knows_how_many_members_there_are():
    with pytest.raises(ValueError, match="params has no tensors"):
        Members(SGD()).init({})
    with pytest.raises(TypeError, match="inner=3: must be an optimizer"):
        Members(3)


def test_the_step_of_a_stack_is_one_call(monkeypatch):
    calls = []
    run = stacked.dispatch.run
    monkeypatch.setattr(stacked.dispatch, "run", lambda *given: calls.append(1) or run(*given))
    params, opt = params_of(), Members(AdamW(lr=RATES))
    opt.update(random_like(params), opt.init(params), params)
    assert calls == [1]


@pytest.mark.parametrize("opt", ALL.values(), ids=ALL)
def test_a_run_that_is_resumed_from_a_file_goes_on_with_the_same_bits(opt, tmp_path):
    own, params = Members(Best(opt, patience=3)), params_of()
    state = own.init(params)

    def steps(params, state, first):
        for step in range(first, first + 3):
            torch.manual_seed(step)
            value, grads = torch.rand(COUNT), random_like(params)
            active = ~state.stopped & ACTIVE
            params, state = own.update(grads, state, params, active=active, value=value)
        return params, state

    params, state = steps(params, state, 0)
    torch.save(interop.to_state_dict((params, state)), tmp_path / "run.pt")
    expected = steps(params, state, 3)
    saved = torch.load(tmp_path / "run.pt")
    fresh = params_of()
    resumed = interop.from_state_dict((fresh, own.init(fresh)), saved)
    assert_same_bits(steps(*resumed, 3), expected)
