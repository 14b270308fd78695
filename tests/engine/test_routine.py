"""The short way through a step: taken where nothing is to be decided, and with the same numbers."""

import pytest
import torch
from torch.func import grad, vmap

from funcopt import AdamW
from funcopt._engine import memory
from funcopt._engine import update as engine

from ..cases import KERNELS, OPTIONS, assert_same_bits, random_like

STEPS = {"update": "step", "update_": "step_"}
SHAPES = {"weight": (40, 30), "bias": (40,), "scale": ()}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(memory, "_recent", ())


@pytest.fixture
def taken(monkeypatch):
    """An entry for each update that went the short way."""
    seen = []
    for name in STEPS.values():
        original = getattr(engine._Routine, name)

        def noted(self, *arguments, original=original):
            seen.append(original.__name__)
            return original(self, *arguments)

        monkeypatch.setattr(engine._Routine, name, noted)
    return seen


def params_of(requires_grad=False):
    torch.manual_seed(1)
    return {
        name: torch.randn(shape).requires_grad_(requires_grad) for name, shape in SHAPES.items()
    }


def gradients_of(count=4):
    return [random_like({name: torch.empty(shape) for name, shape in SHAPES.items()})] * count


def train(opt, params, gradients, update="update"):
    state = opt.init(params)
    for grads in gradients:
        params, state = getattr(opt, update)(grads, state, params)
    return params, state


# A tensor and a schedule may change from step to step, and go the short way all the same.
HYPERPARAMETERS = {
    "numbers": {},
    "tensors": {"lr": torch.tensor(0.1, dtype=torch.float64), "eps": torch.tensor(1e-8)},
    "schedules": {"lr": lambda step: 0.1 / (1 + step), "weight_decay": lambda step: 0.01},
}


@pytest.mark.parametrize("options", OPTIONS[::5])
@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
@pytest.mark.parametrize("update", ["update", "update_"])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("kind", HYPERPARAMETERS)
def test_it_gives_the_bits_of_the_long_way(
    options, kernel, update, requires_grad, kind, taken, monkeypatch
):
    opt = AdamW(**{**options, **HYPERPARAMETERS[kind]}, kernel=kernel)
    gradients = gradients_of()
    short = train(opt, params_of(requires_grad), gradients, update)
    assert taken == [STEPS[update]] * 3  # all but the first, in which the layout is learned
    monkeypatch.setattr(engine, "_find_routine", lambda *_, **__: None)
    long = train(opt, params_of(requires_grad), gradients, update)
    assert len(taken) == 3
    assert_same_bits(short, long)
    for one, other in zip(short[0].values(), long[0].values(), strict=True):
        assert one.requires_grad == other.requires_grad
        assert one.is_leaf


def test_the_new_trees_keep_the_order_of_the_old(taken):
    params = params_of()
    backward = dict(reversed(params.items()))
    for _ in range(2):
        moved, state = train(AdamW(), backward, gradients_of(1))
    grads = {name: torch.ones_like(p) for name, p in moved.items()}
    again, state = AdamW().update(grads, state, moved)
    assert len(taken) == 1
    assert list(again) == list(state.exp_avg) == list(backward)


def test_a_history_leads_back_to_the_long_way_which_records(taken):
    params, opt = params_of(), AdamW()
    train(opt, params, gradients_of(2))
    rate = torch.tensor(0.1, requires_grad=True)
    opt = AdamW(lr=rate)
    moved, _ = opt.update(gradients_of(1)[0], opt.init(params), params)
    assert len(taken) == 1
    moved["weight"].sum().backward()
    assert rate.grad is not None


def test_a_parameter_with_a_history_is_refused_as_on_the_long_way(taken):
    opt, grads = AdamW(), gradients_of(1)[0]
    train(opt, params_of(requires_grad=True), [grads] * 2, "update_")
    params = {name: 2 * param for name, param in params_of(requires_grad=True).items()}
    with pytest.raises(RuntimeError, match=r"params\['weight'\] has a history"):
        opt.update_(grads, opt.init(params), params)
    assert len(taken) == 1


@pytest.mark.parametrize("update", ["update", "update_"])
def test_tied_leaves_are_refused_as_on_the_long_way(update, taken):
    opt = AdamW()
    tree = {name: torch.randn(3, 2) for name in ("one", "other")}
    train(opt, tree, [random_like(tree)] * 2, update)
    tied = {"one": tree["one"], "other": tree["one"].view(3, 2)}
    with pytest.raises(ValueError, match=r"params\['other'\] shares its memory"):
        getattr(opt, update)(random_like(tree), opt.init(tree), tied)
    assert len(taken) == 1


# What each of these asks is answered on the long way alone.
DOUBTS = {
    "a count per leaf": (AdamW(step_per_leaf=True), lambda state: state),
    "a recorded update": (AdamW(differentiable=True), lambda state: state),
    "a count in int64": (AdamW(), lambda state: state._replace(step=state.step.long())),
    "a count that requires a gradient": (
        AdamW(),
        lambda state: state._replace(step=state.step.clone().requires_grad_()),
    ),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_in_doubt_the_long_way_is_taken(doubt, taken):
    opt, change = DOUBTS[doubt]
    params, grads = params_of(), gradients_of(1)[0]
    train(AdamW(), params, [grads])
    opt.update(grads, change(opt.init(params)), params)
    assert taken == []


def test_a_transform_takes_the_long_way(taken):
    opt, params, grads = AdamW(), params_of(), gradients_of(1)[0]
    train(opt, params, [grads] * 2)
    taken.clear()
    state = opt.init(params)
    grad(lambda p: opt.update(grads, state, p)[0]["weight"].sum())(params)
    vmap(lambda g: opt.update(g, state, params)[0])({n: g[None] for n, g in grads.items()})
    assert taken == []


class Halving:
    """A schedule that notices how often it is called, as no schedule should."""

    def __init__(self, requires_grad):
        self.calls = 0
        self.requires_grad = requires_grad

    def __call__(self, step):
        self.calls += 1
        return torch.tensor(0.5**self.calls, requires_grad=self.requires_grad)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_schedule_is_called_once_an_update_whichever_way_is_taken(requires_grad, taken):
    params = {**params_of(), "empty": torch.ones(0), "also empty": torch.ones(0, 3)}
    rate = Halving(requires_grad)
    train(AdamW(lr=rate), params, [random_like(params)] * 4)
    assert rate.calls == 4
    assert len(taken) == (0 if requires_grad else 3)


@pytest.mark.parametrize("update", ["update", "update_"])
def test_empty_leaves_go_the_short_way_too(update, taken):
    params = {**params_of(), "empty": torch.ones(0), "also empty": torch.ones(0, 3)}
    train(AdamW(), params, [random_like(params)] * 4, update)
    assert len(taken) == 3


@pytest.mark.parametrize("option", [{}, {"step_per_leaf": True}, {"differentiable": True}])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("update", ["update", "update_"])
@pytest.mark.parametrize("empty", [{}, (), []])
def test_a_tree_without_leaves_stays_one(option, amsgrad, update, empty):
    opt = AdamW(amsgrad=amsgrad, **option)
    params, state = train(opt, empty, [empty] * 4, update)
    assert params == empty
    assert state.exp_avg == empty
    assert state.max_exp_avg_sq == (empty if amsgrad else ())


class Stored(torch.Tensor):
    """A tensor that shows operators a copy of what it holds, and takes in what is copied to it."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            args[0].held = getattr(args[1], "held", args[1]).clone()
            return args[0]
        shown = [arg.held.clone() if isinstance(arg, Stored) else arg for arg in args]
        result = function(*shown, **(kwargs or {}))
        return cls(result) if function is torch.ops.aten.clone.default else result


@pytest.mark.parametrize("update", ["update", "update_"])
def test_moments_in_a_tensor_of_another_kind_move_as_others_do(update):
    opt, params, grads = AdamW(kernel="plain"), params_of(), gradients_of(1)[0]
    expected, _ = train(opt, params_of(), [grads] * 3)
    state = opt.init(params)
    moments = {name: Stored(moment) for name, moment in state.exp_avg.items()}
    state = state._replace(exp_avg=moments)
    for _ in range(3):
        params, state = getattr(opt, update)(grads, state, params)
    assert_same_bits(params, expected)


BAD_STATES = {
    "of a maximum and none": (AdamW(), "max_exp_avg_sq holds a tree"),
    "of another optimizer": (AdamW(amsgrad=True), "amsgrad"),
    "of one count": (AdamW(step_per_leaf=True), "state.step does not have the structure"),
}


@pytest.mark.parametrize("bad", BAD_STATES)
def test_a_wrong_state_is_refused_as_on_the_long_way(bad):
    opt, message = BAD_STATES[bad]
    params, grads = params_of(), gradients_of(1)[0]
    _, state = train(AdamW(), params, [grads] * 2)
    if opt == AdamW():
        state = state._replace(max_exp_avg_sq=(torch.ones(2),))
    with pytest.raises(ValueError, match=message):
        opt.update(grads, state, params)


def test_a_kernel_that_cannot_serve_is_refused_by_path():
    params, grads = params_of(), gradients_of(1)[0]
    _, state = train(AdamW(), params, [grads] * 2)
    with pytest.raises(ValueError, match=r"params\['weight'\] is on cpu, which kernel='triton'"):
        AdamW(kernel="triton").update(grads, state, params)


@pytest.mark.parametrize("kernel", ["auto", "plain", "foreach", "fused"])
@pytest.mark.parametrize("update", ["update", "update_"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_count_that_is_not_read_goes_the_short_way(
    kernel, update, requires_grad, taken, monkeypatch
):
    opt, gradients = AdamW(kernel=kernel), gradients_of()
    read = train(opt, params_of(requires_grad), gradients, update)
    monkeypatch.setattr(engine, "value_of", lambda count: count)  # as on a device
    taken.clear()
    unread = train(opt, params_of(requires_grad), gradients, update)
    assert taken == [STEPS[update]] * 4
    assert unread[1].step == 4
    torch.testing.assert_close(unread, read)


@pytest.mark.parametrize("is_read", [True, False])
def test_a_schedule_is_asked_once_where_the_short_way_is_left(is_read, taken, monkeypatch):
    asked, learned = [], torch.tensor(0.1, requires_grad=True)

    def schedule(count):
        asked.append(count.item())
        return learned * 1.0

    opt, params = AdamW(lr=schedule), params_of()
    grads = gradients_of(1)[0]
    state = opt.init(params)
    if not is_read:  # as on a device
        monkeypatch.setattr(engine, "value_of", lambda count: count)
    for _ in range(2):
        moved, new_state = opt.update(grads, state, params)
    assert asked == [0.0, 0.0]
    assert taken == []  # the derivative by the learning rate is kept
    assert moved["bias"].requires_grad
    assert new_state.step == 1
    expected, _ = AdamW(lr=0.1).update(grads, state, params)
    torch.testing.assert_close(dict(moved), dict(expected))
