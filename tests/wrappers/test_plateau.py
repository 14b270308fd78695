"""Learning rates that are lowered on a plateau: torch's scheduler, by a scale in the state."""

import math
import pickle
import random

import pytest
import torch
from torch.func import grad, vmap

from funcopt import (
    SGD,
    Accumulate,
    Adam,
    AdamW,
    Best,
    Clip,
    Ema,
    Frozen,
    Lion,
    Lookahead,
    Partition,
    Plateau,
    SkipNonfinite,
    find,
    interop,
    replace,
)
from funcopt.distributed import Zero1
from funcopt.schedules import Cosine, Decoupled, Linear
from funcopt.wrappers._lr import ScaledSchedule
from funcopt.wrappers.plateau import PlateauState

from ..cases import assert_close, assert_same_bits, attempt, clone, leaves, random_like, tree_map

both_ways = pytest.mark.parametrize("method", ["update", "update_"])


def float64(value, **options):
    return torch.tensor(value, dtype=torch.float64, **options)


def rate(opt, state, method="update", **extras):
    """Return the learning rate of an update of plain SGD, and the state after it."""
    zero = torch.zeros((), dtype=torch.float64)
    moved, state = getattr(opt, method)(-torch.ones_like(zero), state, zero, **extras)
    return moved.item(), state


def first(opt):
    return opt.init(torch.zeros((), dtype=torch.float64))


def torchs(lr, **options):
    """Return torch's scheduler, without its limit to how small a reduction may be."""
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    sgd.step()
    return torch.optim.lr_scheduler.ReduceLROnPlateau(sgd, eps=0.0, **options)


def scores(draw, count):
    """Return scores that fall, stay, jump, and are now and then not finite."""
    at, found = draw.choice([1.0, 100.0, -3.0]), []
    for _ in range(count):
        at += draw.choice([0.0, 0.0, -1e-5, -0.01, -0.3, 0.2, draw.gauss(0.0, 0.1)])
        unusual = draw.choice([math.nan, math.inf, -math.inf]) if draw.random() < 0.02 else at
        found.append(draw.choice([unusual, at, at]))
    return found


@both_ways
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_scores_are_judged_as_by_torch_to_the_bit(mode, threshold_mode, method):
    draw = random.Random(0)
    reductions = 0
    for _ in range(40):
        options = {
            "mode": mode,
            "threshold_mode": threshold_mode,
            "factor": draw.choice([0.0, 0.1, 0.3, 0.5, 0.9]),
            "patience": draw.choice([0, 1, 3, 10]),
            "threshold": draw.choice([0.0, 1e-4, 0.1, 1.0, 2.0]),
            "cooldown": draw.choice([0, 1, 4]),
        }
        opt, theirs = Plateau(SGD(lr=1.0), **options), torchs(1.0, **options)
        state = first(opt)
        for index, score in enumerate(scores(draw, 60)):
            given = float64(score) if index % 2 else score
            lr, state = rate(opt, state, method, value=given)
            theirs.step(score)
            assert state.best_value == theirs.best
            assert state.n_worse == theirs.num_bad_epochs
            assert state.cooldown_left == theirs.cooldown_counter
            # The rate that torch has for its next step is that of this update already.
            assert state.scale == lr == theirs.get_last_lr()[0]
        reductions += lr < 1
    assert reductions > 10


@both_ways
@pytest.mark.parametrize("min_lr", [0.0, 1e-3, 0.07, 1.0])
@pytest.mark.parametrize("lr", [0.07, 0.5, 3e-4])
def test_learning_rates_are_torchs_down_to_the_least(lr, min_lr, method):
    for factor in (0.5, 0.3):
        opt = Plateau(SGD(lr=lr), factor=factor, patience=0, min_lr=min_lr)
        theirs, state = torchs(lr, factor=factor, patience=0, min_lr=min_lr), first(opt)
        for _ in range(15):
            own, state = rate(opt, state, method, value=1.0)
            theirs.step(1.0)
            assert own == pytest.approx(theirs.get_last_lr()[0], rel=4e-15)
            assert factor != 0.5 or own == theirs.get_last_lr()[0]


@both_ways
def test_the_lowered_rate_holds_from_the_update_that_is_given_the_score(method):
    opt = Plateau(SGD(lr=1.0), factor=0.5, patience=0)
    state, seen = first(opt), []
    for extras in ({"value": 1.0}, {}, {"value": 1.0}, {}, {"value": None}):
        lr, state = rate(opt, state, method, **extras)
        seen.append(lr)
    assert seen == [1.0, 1.0, 0.5, 0.5, 0.5]


KINDS = {
    "a number": lambda: 0.2,
    "a tensor": lambda: float64(0.2),
    "a float32 tensor": lambda: torch.tensor(0.2),
    "a schedule": lambda: Linear(0.1, 0.3, 4),
    "a schedule of tensors": lambda: Linear(float64(0.1), 0.3, 4),
    "a function": lambda: lambda count: 0.1 / (1 + count),
    "a function that gives a number": lambda: lambda count: 0.1,
}


@both_ways
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_learning_rate_is_it_is_scaled(kind, method):
    lr = KINDS[kind]()
    opt, state = Plateau(SGD(lr=lr), factor=0.5, patience=0), first(Plateau(SGD(lr=lr)))
    plain, plain_state, scale = SGD(lr=lr), first(SGD(lr=lr)), 1.0
    for score in (1.0, 1.0, None, 2.0, 0.5, None):
        scale *= 0.5 if score in (1.0, 2.0) and state.best_value == 1.0 else 1.0
        whole, plain_state = rate(plain, plain_state)
        own, state = rate(opt, state, method, value=score)
        assert own == whole * scale
        assert state.scale == scale
    assert scale == 0.25


@both_ways
def test_a_tensor_that_is_filled_anew_is_the_learning_rate_from_then_on(method):
    lr = float64(1.0)
    opt = Plateau(Partition({"a": SGD(lr=lr), "b": SGD(lr=0.5)}, ["a", "b"]))
    params = [torch.zeros(()), torch.zeros(())]
    state = opt.init(params)
    for value in (1.0, 1.0, 0.25):
        lr.fill_(value)
        grads = [-torch.ones(()), -torch.ones(())]
        moved, state = getattr(opt, method)(grads, state, clone(params))
        assert moved == [value, 0.5]


def test_every_learning_rate_at_any_depth_is_scaled_and_nothing_else():
    schedule = Cosine(0.1, 10)
    groups = {
        "a": Clip(AdamW(lr=0.2, weight_decay=0.3), 1.0),
        "b": Ema(Adam(lr=float64(0.4), eps=1e-3)),
        "c": Lion(lr=schedule, weight_decay=Decoupled(1e-3, schedule)),
        "d": Frozen(),
    }
    inner = Clip(Partition(groups, {"a": "a", "b": "b", "c": "c", "d": "d"}), 2.0)
    opt = Plateau(inner, factor=0.5, patience=0)
    params = {name: torch.randn(2) for name in groups}
    gradients = [random_like(params) for _ in range(3)]
    halved = {
        "a": replace(groups["a"], "lr", 0.1),
        "b": replace(groups["b"], "lr", float64(0.2)),
        "c": Lion(lr=Cosine(0.05, 10), weight_decay=Decoupled(1e-3, Cosine(0.05, 10))),
        "d": Frozen(),
    }
    expected = Clip(Partition(halved, inner.inner.labels), 2.0)
    params, state = opt.update(gradients[0], opt.init(params), params, value=1.0)
    other, other_state = params, state.inner
    for grads in gradients[1:]:
        params, state = opt.update(grads, state, params, value=1.0 if state.scale == 1 else None)
        other, other_state = expected.update(grads, other_state, other)
        assert_close((params, state.inner), (other, other_state))
    assert state.scale == 0.5
    assert opt.inner is inner
    assert find(opt, "lr")["inner.inner.inner['a'].inner.lr"] == 0.2


def test_one_within_another_scales_what_is_scaled():
    opt = Plateau(Plateau(SGD(lr=1.0), factor=0.5, patience=0), factor=0.1, patience=1)
    state, seen = first(opt), []
    for _ in range(3):
        lr, state = rate(opt, state, value=1.0)
        seen.append(lr)
    assert seen == [1.0, 0.5, 0.1 * 0.25]


def test_the_inner_optimizer_is_made_once_for_each_scale():
    opt = Plateau(AdamW(lr=Linear(0.1, 0.2, 5)), factor=0.5, patience=0)
    params = torch.ones(2)
    state, made = opt.init(params), []
    for score in (1.0, None, 0.5, 0.6, None, None):
        params, state = opt.update(torch.ones(2), state, params, value=score)
        made.append(vars(opt)["_setup"].opt)
    assert [one is made[0] for one in made] == [True] * 3 + [False] * 3
    assert made[3] is made[4] is made[5]
    assert pickle.loads(pickle.dumps(opt)) == opt
    assert "_setup" not in vars(pickle.loads(pickle.dumps(opt)))


def test_a_scaled_schedule_is_equal_to_another_of_the_same():
    one, other = (ScaledSchedule(Cosine(0.1, 10), 0.5, 0.0) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != ScaledSchedule(Cosine(0.1, 10), 0.25, 0.0)


@both_ways
def test_without_a_score_it_is_the_inner_optimizer_to_the_bit(method):
    params = {"half": torch.randn(3).bfloat16(), "z": torch.randn(2, dtype=torch.complex64)}
    params |= {"number": torch.randn(()), "empty": torch.randn(0, 2), "none": torch.randn(2)}
    for inner in (AdamW(lr=0.1), SGD(lr=float64(0.1)), Adam(lr=Linear(0.1, 0.2, 5))):
        opt, own, other = Plateau(inner), clone(params), clone(params)
        state, other_state = opt.init(own), inner.init(other)
        for _ in range(3):
            grads = random_like(params) | {"none": None}
            own, state = getattr(opt, method)(grads, state, own)
            other, other_state = getattr(inner, method)(grads, other_state, other)
            assert_same_bits((own, state.inner), (other, other_state))
        assert (state.scale, state.n_worse, state.value) == (1, 0, ())


def test_what_is_returned_is_in_fresh_memory():
    opt, params = Plateau(SGD(lr=0.1), patience=0), torch.ones(2)
    state = opt.init(params)
    for score in (None, 1.0, 1.0):
        before = {leaf.data_ptr() for leaf in leaves((params, state))}
        params, state = opt.update(torch.ones(2), state, params, value=score)
        assert before.isdisjoint(leaf.data_ptr() for leaf in leaves((params, state)))


@pytest.mark.parametrize(
    "lr", [0.1, float64(0.1), Linear(0.1, 0.2, 5)], ids=["number", "0-dim", "fn"]
)
def test_members_have_scores_and_scales_of_their_own(lr):
    opt = Plateau(AdamW(lr=lr), factor=0.5, patience=0, cooldown=1, min_lr=0.03)
    params = {"w": torch.randn(3, 4), "b": torch.randn(3, 2).bfloat16()}
    rows = torch.tensor([[3.0, 3.0, 3.0, 3.0], [3.0, 2.0, 1.0, 0.5], [1.0, math.nan, 2.0, 3.0]])
    active = torch.tensor([True, True, False])
    gradients = [random_like(params) for _ in range(4)]

    def step(g, s, p, v, a):
        return opt.update(g, s, p, value=v, active=a | (s.scale == 1))

    moved, state = params, vmap(opt.init)(params)
    for grads, score in zip(gradients, rows.T, strict=True):
        moved, state = vmap(step)(grads, state, moved, score, active)
    for i in range(3):
        alone = tree_map(lambda p, i=i: p[i], params)
        own = opt.init(alone)
        for grads, score in zip(gradients, rows[i], strict=True):
            each = tree_map(lambda g, i=i: g[i], grads)
            alone, own = step(each, own, alone, score, active[i])
        one = tree_map(lambda leaf, i=i: leaf[i], (moved, state))
        assert_close(one, (alone, own))
        assert_same_bits(one[1]._replace(inner=()), own._replace(inner=()))
    assert state.scale.tolist() == [0.25, 1.0, 0.5]
    assert state.inner.step.tolist() == [4, 4, 2]


def test_members_have_numbers_of_their_own():
    factor, patience = float64([0.5, 0.1]), torch.tensor([0.0, 1.0])
    opts = Plateau(SGD(lr=float64([1.0, 2.0])), factor=factor, patience=patience)
    params = torch.zeros(2)
    state = vmap(lambda opt, p: opt.init(p))(opts, params)
    for _ in range(3):
        moved, state = vmap(lambda o, s, p: o.update(-p - 1, s, p, value=1.0))(opts, state, params)
    assert state.scale.tolist() == [0.25, 0.1]
    assert_close(moved, torch.tensor([0.25, 0.2]))


def test_its_numbers_may_be_schedules():
    opt = Plateau(SGD(lr=1.0), factor=lambda count: 0.5 / (1 + count), patience=Linear(0.0, 2.0, 1))
    state, seen = first(opt), []
    for _ in range(5):
        lr, state = rate(opt, state, value=1.0)
        seen.append(lr)
    assert seen == [1.0, 1.0, 1.0, 0.125, 0.125]
    assert state.step == 5


def test_no_derivative_flows_through_the_score_but_one_through_rates_and_factors():
    def after(lr, factor, w, differentiable=True):
        opt = Plateau(SGD(lr=lr, differentiable=differentiable), factor=factor, patience=0)
        state = opt.init(w)
        for _ in range(3):
            w, state = opt.update(w.square(), state, w, value=1 + w.square().sum() * 0)
        return w.sum(), state

    def by_hand(lr, factor, w):
        for scale in (1.0, factor, factor * factor):
            w = w - lr * scale * w.square()
        return w.sum()

    given = float64(0.1), float64(0.5), torch.randn(3, dtype=torch.float64)
    slopes = grad(lambda *given: after(*given)[0], (0, 1, 2))(*given)
    assert_close(slopes, grad(by_hand, (0, 1, 2))(*given), rtol=1e-12)
    asked = [t.clone().requires_grad_() for t in given]
    assert_close(torch.autograd.grad(after(*asked)[0], asked), slopes)
    _, state = after(0.1, 0.5, asked[2], None)
    assert not any(leaf.requires_grad for leaf in leaves(state._replace(inner=())))


def test_what_is_recorded_without_it_is_recorded_with_it():
    grads, params = torch.randn(3), torch.randn(3)
    for differentiable in (True, None, False):
        for enabled in (True, False):
            lr = float64(0.1, requires_grad=True)
            inner = SGD(lr=lr, differentiable=differentiable)
            opt = Plateau(inner, patience=0)
            with torch.set_grad_enabled(enabled):
                expected, _ = inner.update(grads, inner.init(params), params)
                moved, state = opt.update(grads, opt.init(params), params, value=1.0)
            assert moved.requires_grad == expected.requires_grad
            assert not state.scale.requires_grad
            if moved.requires_grad:
                slopes = [torch.autograd.grad(own.sum(), lr) for own in (moved, expected)]
                assert_close(*slopes)


@pytest.mark.by_day(1)
@both_ways
@pytest.mark.parametrize("lr", [0, 1, 2])
def test_one_compiled_graph_takes_every_score(lr, method):
    torch.compiler.reset()
    opt = Plateau(
        Partition({"a": AdamW(lr=[0.1, float64(0.1), Linear(0.1, 0.2, 5)][lr])}, lambda n, x: "a"),
        factor=0.5,
        patience=0,
        min_lr=0.03,
    )

    def step(grads, state, params, value):
        return getattr(opt, method)(grads, state, params, value=value)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    params = {"w": torch.randn(3).bfloat16(), "b": torch.randn(2, dtype=torch.float64)}
    own, state = clone(params), opt.init(params)
    try:
        for score in (3.0, math.nan, 2.0, 4.0, 4.0):
            grads, value = random_like(params), torch.tensor(score)
            expected = opt.update(grads, clone(state), clone(own), value=value)
            own, state = compiled(grads, state, own, value)
            assert_close((own, state), expected)
            torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")
    assert state.scale == 0.125


AROUND = {
    "Clip": lambda opt: Clip(opt, 1.0),
    "Best": Best,
    "Ema": lambda opt: Ema(opt, 0.9),
    "Lookahead": lambda opt: Lookahead(opt, 2),
    "SkipNonfinite": SkipNonfinite,
    "Partition": lambda opt: Partition({"a": opt}, {"w": "a", "b": "a"}),
    "Zero1": lambda opt: Zero1(opt, mesh=None),
    "several": lambda opt: Ema(SkipNonfinite(Clip(Accumulate(opt, 1), 1.0)), 0.9),
}


@both_ways
@pytest.mark.parametrize("within", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("name", AROUND)
def test_it_is_told_at_every_depth_and_scales_there(name, within, method):
    wrap, inner = AROUND[name], AdamW(lr=0.2)
    opt = wrap(Plateau(inner, factor=0.5, patience=0)) if within else None
    opt = opt or Plateau(wrap(inner), factor=0.5, patience=0)
    params = {"w": torch.randn(3, 2), "b": torch.randn(5)}
    state, own = opt.init(params), clone(params)
    other, other_state = params, wrap(inner).init(params)
    for score, lr in ((3.0, 0.2), (None, 0.2), (3.0, 0.1), (4.0, 0.05), (None, 0.05)):
        grads = random_like(params)
        own, state = getattr(opt, method)(grads, state, own, value=score)
        other, other_state = wrap(AdamW(lr=lr)).update(grads, other_state, other)
        assert_close(own, other)
    (found,) = find(state, PlateauState).values()
    assert (found.scale, found.best_value, found.value) == (0.25, 3.0, ())


def test_a_checkpoint_goes_on_to_the_bit():
    opt = Clip(Plateau(AdamW(lr=0.1), factor=0.5, patience=0), 0.5)
    params = {"w": torch.randn(3), "b": torch.randn(2)}
    state = opt.init(params)
    for score in (3.0, 4.0, None):
        params, state = opt.update(random_like(params), state, params, value=score)
    saved = clone(interop.to_state_dict({"params": params, "state": state}))
    loaded = interop.from_state_dict({"params": params, "state": opt.init(params)}, saved)
    grads = random_like(params)
    assert_same_bits(
        opt.update(grads, loaded["state"], loaded["params"], value=3.5),
        opt.update(grads, state, params, value=3.5),
    )


def test_what_is_wrong_is_refused_by_path_and_nothing_is_written():
    opt, params = Plateau(AdamW(), patience=0), {"a": torch.ones(2)}
    state, grads = opt.init(params), random_like(params)
    half = state._replace(scale=torch.ones(()))
    assert "state.scale is of torch.float32" in attempt(opt, grads, half, params)
    assert "PlateauState" in attempt(opt, grads, state.inner, params)
    before = clone((params, state))
    for wrong in ({"a": torch.ones(3)}, {"b": torch.ones(2)}):
        with pytest.raises(ValueError, match="grads"):
            opt.update_(wrong, state, params, value=1.0)
    history = state._replace(scale=state.scale.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"state\.scale requires a gradient"):
        opt.update_(grads, history, params, value=1.0)
    learnt = Plateau(AdamW(lr=float64(0.1, requires_grad=True)))
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(RuntimeError, match="lr has a history"):
            learnt.update_(grads, state, params, value=1.0)
    assert_same_bits((params, state), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": Frozen()}, "has nothing called lr, which Plateau lowers. Give an optimizer"),
        ({"mode": "least"}, "mode='least': must be one of min, max"),
        ({"threshold_mode": "share"}, "threshold_mode='share': must be one of rel, abs"),
        ({"factor": 1.0}, "factor=1.0: factor must be at least 0 and below 1"),
        ({"patience": 0.5}, "patience=0.5: patience must be a whole number"),
        ({"cooldown": -1}, "cooldown=-1.0: cooldown must be a whole number"),
        ({"threshold": -0.1}, "threshold=-0.1: threshold must be finite and at least 0"),
        ({"min_lr": math.nan}, "min_lr=nan"),
        ({"inner": AdamW}, "inner"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Plateau(**{"inner": SGD(), **options})
