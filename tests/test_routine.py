"""The short way through a step: taken where nothing is to be decided, and with the same numbers."""

import pytest
import torch
from torch.func import grad, vmap

from funcopt import AdamW, _adamw
from funcopt._kernels import _layout
from funcopt._routine import Routine

from .cases import KERNELS, OPTIONS, assert_same_bits, random_like

SHAPES = {"weight": (40, 30), "bias": (40,), "scale": ()}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(_layout, "_recent", ())


@pytest.fixture
def taken(monkeypatch):
    """For each update that set out on the short way, whether it got there."""
    seen = []
    for name in ("move", "move_"):
        original = getattr(Routine, name)

        def noted(self, *arguments, original=original):
            result = original(self, *arguments)
            seen.append(result is not None and result is not False)
            return result

        monkeypatch.setattr(Routine, name, noted)
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
    assert taken == [True] * 3  # all but the first, in which the layout is learned
    monkeypatch.setattr(_adamw, "routine", lambda *_: None)
    long = train(opt, params_of(requires_grad), gradients, update)
    assert taken == [True] * 3
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
    assert taken == [True]
    assert list(again) == list(state.exp_avg) == list(backward)


def test_a_history_leads_back_to_the_long_way_which_records(taken):
    params, opt = params_of(), AdamW()
    train(opt, params, gradients_of(2))
    rate = torch.tensor(0.1, requires_grad=True)
    opt = AdamW(lr=rate)
    moved, _ = opt.update(gradients_of(1)[0], opt.init(params), params)
    assert taken == [True, False]
    moved["weight"].sum().backward()
    assert rate.grad is not None


def test_a_parameter_with_a_history_is_refused_as_on_the_long_way(taken):
    opt, grads = AdamW(), gradients_of(1)[0]
    train(opt, params_of(requires_grad=True), [grads] * 2, "update_")
    params = {name: 2 * param for name, param in params_of(requires_grad=True).items()}
    with pytest.raises(RuntimeError, match=r"params\['weight'\] has a history"):
        opt.update_(grads, opt.init(params), params)
    assert taken == [True, False]


@pytest.mark.parametrize("update", ["update", "update_"])
def test_tied_leaves_are_refused_as_on_the_long_way(update, taken):
    opt = AdamW()
    tree = {name: torch.randn(3, 2) for name in ("one", "other")}
    train(opt, tree, [random_like(tree)] * 2, update)
    tied = {"one": tree["one"], "other": tree["one"].view(3, 2)}
    with pytest.raises(ValueError, match=r"params\['other'\] shares its memory"):
        getattr(opt, update)(random_like(tree), opt.init(tree), tied)
    assert taken == [True, False]


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


BAD_STATES = {
    "of another optimizer": (AdamW(amsgrad=True), "amsgrad"),
    "of one count": (AdamW(step_per_leaf=True), "state.step does not have the structure"),
}


@pytest.mark.parametrize("bad", BAD_STATES)
def test_a_wrong_state_is_refused_as_on_the_long_way(bad):
    opt, message = BAD_STATES[bad]
    params, grads = params_of(), gradients_of(1)[0]
    _, state = train(AdamW(), params, [grads] * 2)
    with pytest.raises(ValueError, match=message):
        opt.update(grads, state, params)


def test_a_kernel_that_cannot_serve_is_refused_by_path():
    params, grads = params_of(), gradients_of(1)[0]
    _, state = train(AdamW(), params, [grads] * 2)
    with pytest.raises(ValueError, match=r"params\['weight'\] is on cpu, which kernel='triton'"):
        AdamW(kernel="triton").update(grads, state, params)
