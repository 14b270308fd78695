"""Who builds a graph under plain autograd, and that nobody else does."""

import gc

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from funcopt import AdamW, AdamWState, memory

from ..cases import leaves


def tracked(*shape):
    return torch.ones(shape, requires_grad=True)


def one_update(opt, *, grads=None, params=None, **state):
    params = torch.ones(3) if params is None else params
    full = opt.init(params)._replace(**state)
    return opt.update(torch.ones(3) if grads is None else grads, full, params)


RECORDED = {
    "a gradient that requires a gradient": lambda: one_update(AdamW(), grads=tracked(3)),
    "a moment that requires a gradient": lambda: one_update(AdamW(), exp_avg=tracked(3)),
    "a learning rate that requires a gradient": lambda: one_update(AdamW(lr=tracked())),
    "a schedule of a tensor that requires a gradient": lambda: one_update(
        AdamW(lr=lambda step: torch.tensor(0.1, requires_grad=True) / (1 + step))
    ),
    "a beta that requires a gradient": lambda: one_update(
        AdamW(betas=(0.9, torch.tensor(0.9, requires_grad=True)))
    ),
    "differentiable=True, and the parameters": lambda: one_update(
        AdamW(differentiable=True), params=tracked(3)
    ),
}


@pytest.mark.parametrize("name", RECORDED)
def test_an_update_is_recorded_for(name):
    params, state = RECORDED[name]()
    assert params.grad_fn is not None
    params.sum().backward()
    assert not state.step.requires_grad


NOT_RECORDED = {
    "parameters alone": lambda: one_update(AdamW(), params=tracked(3)),
    "parameters with a history": lambda: one_update(AdamW(), params=tracked(3) * 2),
    "differentiable=False": lambda: one_update(
        AdamW(lr=tracked(), differentiable=False), grads=tracked(3), params=tracked(3)
    ),
    "no_grad": lambda: torch.no_grad()(one_update)(AdamW(lr=tracked()), params=tracked(3)),
}


@pytest.mark.parametrize("name", NOT_RECORDED)
def test_an_update_is_not_recorded_for(name):
    params, state = NOT_RECORDED[name]()
    assert params.is_leaf
    assert params.requires_grad
    assert not any(leaf.requires_grad for leaf in leaves(state))


def test_new_parameters_require_a_gradient_just_where_the_old_did():
    params = {"trained": tracked(2), "frozen": torch.ones(2), "skipped": tracked(2)}
    opt = AdamW()
    grads = {"trained": torch.ones(2), "frozen": torch.ones(2), "skipped": None}
    moved, _ = opt.update(grads, opt.init(params), params)
    assert {name: p.requires_grad for name, p in moved.items()} == {
        "trained": True,
        "frozen": False,
        "skipped": True,
    }
    assert all(p.is_leaf for p in moved.values())


def test_a_learned_loss_is_recorded_though_the_parameters_are_leaves():
    weight, scale = tracked(3), torch.tensor(2.0, requires_grad=True)
    (slope,) = torch.autograd.grad((scale * weight**3).sum(), weight, create_graph=True)
    moved, _ = AdamW().update(slope, AdamW().init(weight), weight)
    assert torch.autograd.grad(moved.sum(), scale)[0].isfinite()


def test_meta_gradients_reach_leaf_parameters_where_asked_to():
    weight = tracked(3)
    opt = AdamW(lr=0.1, differentiable=True)
    (slope,) = torch.autograd.grad(weight.pow(4).sum(), weight, create_graph=True)
    moved, _ = opt.update(slope, opt.init(weight), weight)
    moved.sum().backward()
    assert weight.grad is not None
    assert not torch.equal(weight.grad, torch.ones(3))


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def flat(step, carry, times):
    """Run a step many times; return the counts of live tensors early on and at the end."""
    memory.release()
    for _ in range(100):  # until what the first step had kept is given back
        carry = step(*carry)
    early = live_tensors()
    for _ in range(times):
        carry = step(*carry)
    return early, live_tensors(), carry


def test_the_loop_that_everyone_writes_keeps_flat_memory_over_1000_updates():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    inputs = torch.randn(5, 3)
    opt = AdamW()

    def loss(params):
        return functional_call(model, params, inputs).square().sum()

    def step(params, state):
        return opt.update(grad(loss)(params), state, params)

    params = dict(model.named_parameters())
    early, late, (params, _) = flat(step, (params, opt.init(params)), 1000)
    assert late == early
    assert all(p.is_leaf and p.requires_grad for p in params.values())


def test_plain_backward_over_1000_updates_keeps_flat_memory():
    model = nn.Linear(3, 1)
    inputs = torch.randn(5, 3)
    opt = AdamW()

    def step(params, state):
        loss = functional_call(model, params, inputs).square().sum()
        slopes = torch.autograd.grad(loss, list(params.values()))
        return opt.update(dict(zip(params, slopes, strict=True)), state, params)

    params = dict(model.named_parameters())
    early, late, _ = flat(step, (params, opt.init(params)), 1000)
    assert late == early


@pytest.mark.parametrize("dim", [0, 1])
def test_the_ensemble_loop_keeps_flat_memory_though_its_stack_requires_a_gradient(dim):
    models = [nn.Linear(3, 2) for _ in range(4)]
    params, _ = stack_module_state(models)
    params = {name: p.detach().movedim(0, dim).requires_grad_() for name, p in params.items()}
    inputs = torch.randn(5, 3)
    opt = AdamW()

    def member(params, state):
        slopes = grad(lambda p: functional_call(models[0], p, inputs).square().sum())(params)
        return opt.update(slopes, state, params)

    dims = AdamWState(0, dim, dim, None)
    state = vmap(opt.init, dim, AdamWState(0, dim, dim, ()))(params)
    step = vmap(member, (dim, dims), (dim, AdamWState(0, dim, dim, ())))
    early, late, (params, _) = flat(step, (params, state), 50)
    assert late == early
    assert all(p.grad_fn is None for p in params.values())


@pytest.mark.parametrize("grads", [[None, None], [None, "ones"]])
def test_a_leaf_without_a_gradient_keeps_its_recorded_history(grads):
    lr = torch.tensor(0.1, requires_grad=True)
    opt = AdamW(lr=lr)
    params = [torch.ones(1), torch.ones(1)]
    params, state = opt.update([torch.ones(1)] * 2, opt.init(params), params)
    given = [None if g is None else torch.ones(1) for g in grads]
    moved, after = opt.update(given, state, params)
    assert moved[0].grad_fn is not None
    slope = torch.autograd.grad(moved[0], lr, retain_graph=True)[0]
    assert torch.equal(slope, torch.autograd.grad(params[0], lr)[0])
    assert not after.step.requires_grad


def test_under_vmap_plain_autograds_rule_holds_beneath():
    opt = AdamW(lr=0.1)
    params, grads = tracked(4, 3), torch.ones(4, 3)
    state = vmap(opt.init)(params)
    moved, _ = vmap(opt.update)(grads, state, params)
    assert not moved.requires_grad
    recorded, _ = vmap(AdamW(lr=0.1, differentiable=True).update)(grads, state, params)
    assert torch.autograd.grad(recorded.sum(), params)[0].isfinite().all()
    by_gradient, _ = vmap(opt.update)(grads.requires_grad_(), state, params)
    assert by_gradient.requires_grad


def test_members_with_numbers_of_their_own_keep_flat_memory_too():
    opt = AdamW(lr=torch.rand(4))
    params = nn.Parameter(torch.randn(3, 4))
    state = vmap(AdamW().init, 1, AdamWState(0, 1, 1, ()))(params)

    def step(params, state):
        slopes = vmap(grad(lambda p: p.square().sum()), 1, 1)(params)
        moved, state = vmap(
            lambda o, g, s, p: o.update(g, s, p),
            (0, 1, AdamWState(0, 1, 1, None), 1),
            (1, AdamWState(0, 1, 1, ())),
        )(opt, slopes, state, params)
        return moved.requires_grad_(), state

    early, late, _ = flat(step, (params, state), 50)
    assert late == early
