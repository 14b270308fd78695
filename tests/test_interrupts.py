"""Ctrl-C, wherever it comes, leaves nothing changed but what is being written in place."""

import dataclasses
import sys
import threading

import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import utils
from torch.distributed.tensor import Shard, distribute_tensor
from torch.func import grad, vmap

import funcopt
from funcopt import AdamW, Clip, Ema, Partition, torchscript
from funcopt._core import tensors
from funcopt._dtensor.shards import current_parts
from funcopt._engine import memory, results
from funcopt.distributed import (
    Zero1,
    _fake_world,
    gather_state,
    plan,
    scatter_state,
    update_in_backward,
)
from funcopt.interop import from_state_dict, from_torch, to_state_dict

from .cases import assert_same_bits
from .distributed.harness import run_ranks
from .interrupts import PACKAGE, interrupts
from .torchscript.trainers import FORMS, trainer

MAIN = threading.current_thread() is threading.main_thread()
pytestmark = pytest.mark.skipif(not MAIN, reason="Python interrupts its main thread alone")


def around():
    """What a function of the package may change that is not its own."""
    return {
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "inference": torch.is_inference_mode_enabled(),
        "transforms": torch._C._are_functorch_transforms_active(),
        "modes": torch._C._len_torch_dispatch_stack(),
        "parts": current_parts(),
        "meta steps": funcopt._core.transforms.stand_in(torch.device("meta")).type,
        "groups": torch.distributed.is_initialized(),
        "excepthook": sys.excepthook,
        "trainers": utils.functional_optim_map.get(torch.optim.AdamW),
    }


def forget_addresses():
    """Let it not be known where results started, which may be where they start again."""
    for known in memory._recent:
        for made in known.layout.plans.values():
            if isinstance(made, results.Results):
                made._starts.clear()


def check_everywhere(make_call, within="", warm=3, afterwards=lambda: None):
    """Interrupt a call everywhere, and see that all is as before and a later call as ever."""

    def make():
        results.release_all()  # so that each call goes the same way, by fresh memory
        results._asked = 0
        forget_addresses()
        return make_call()

    count = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before, expected, places = around(), make()(), 0
        for place, interrupt in interrupts(make, warm, within):
            places += 1
            # What an operator in Python raises comes out of torch as a RuntimeError.
            with pytest.raises((KeyboardInterrupt, RuntimeError)) as raised:
                interrupt()
            assert "KeyboardInterrupt" in repr(raised.value), place
            assert around() == before, place  # while the frames are still there, and
            del raised
            assert around() == before, place
            afterwards()
            assert_same_bits(make()(), expected)
        assert places > 5
    finally:
        torch.set_num_threads(count)


def params_of(count=9, requires_grad=True):
    """So many that they are moved together, by one thread."""
    return {f"{i}": torch.ones(3).requires_grad_(requires_grad) for i in range(count)}


def a_step(opt, update, count=9, known=True):
    def make():
        params, grads = params_of(count), params_of(count, requires_grad=False)
        state = opt.init(params)
        if not known:
            memory.forget()
        return lambda: getattr(opt, update)(grads, state, params)

    return make


GROUPS = Partition({"a": AdamW(), "b": Clip(AdamW(), 1.0)}, {"0": "a", "1": "b"})
STEPS = {
    "AdamW": a_step(AdamW(), "update"),
    "AdamW in place": a_step(AdamW(), "update_"),
    "AdamW on new leaves": a_step(AdamW(step_per_leaf=True), "update", 2, known=False),
    "Clip in place": a_step(Clip(AdamW(), 1.0, nonfinite="skip"), "update_", 2),
    "Partition in place": a_step(GROUPS, "update_", 2),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_changes_nothing_around_it(name):
    check_everywhere(STEPS[name])


@pytest.mark.parametrize("name", ["AdamW", "AdamW in place"])
def test_a_step_within_autocast_leaves_it_on(name):
    with torch.autocast("cpu"):
        check_everywhere(STEPS[name])
        assert torch.is_autocast_enabled("cpu")


def mapped():
    opt = AdamW()
    params = torch.ones(2, 3)
    state = vmap(opt.init)(params)
    return lambda: vmap(opt.update)(params, state, params)


def differentiated():
    opt, params = AdamW(), torch.ones(3)
    state = opt.init(params)
    return lambda: grad(lambda g: opt.update(g, state, params)[0].sum())(params)


def test_a_step_beneath_a_vmap_leaves_it_where_it_was():
    check_everywhere(mapped)


def test_a_step_beneath_a_derivative_leaves_it_where_it_was():
    check_everywhere(differentiated, within=PACKAGE)  # torch's own part cannot be interrupted


def sharded(rank):
    mesh = init_device_mesh("cpu", (1,))

    def make():
        opt, params = AdamW(), {"w": distribute_tensor(torch.ones(3), mesh, [Shard(0)])}
        grads, state = {"w": params["w"].clone()}, opt.init(params)
        return lambda: opt.update(grads, state, params)[1].step

    check_everywhere(make)


def test_a_step_of_sharded_tensors_forgets_their_parts():
    run_ranks(1, sharded)


def starting():
    opt, params = Ema(Zero1(AdamW(), None)), params_of(2)
    return lambda: opt.init(params)


def taking_over():
    weight = torch.nn.Parameter(torch.ones(2))
    theirs = torch.optim.AdamW([weight])
    weight.sum().backward()
    theirs.step()
    return lambda: from_torch(theirs, [weight])[1]


def loading():
    state = AdamW().init(params_of(2))
    saved = to_state_dict(state)
    return lambda: from_state_dict(state, saved)


def regathering():
    opt, params = Zero1(AdamW(), None), params_of(2)
    state = opt.init(params)
    return lambda: scatter_state(opt, gather_state(opt, state, params), params)


def counting_threads():
    tensors._setter.cache_clear()
    return lambda: [torch.tensor(tensors._setter() is not None)]


def registering():
    node = dataclasses.make_dataclass("Node", ["weight"])
    torch_pytree.register_dataclass(node)
    params = node(torch.ones(2))
    return lambda: AdamW().init(params).exp_avg.weight


OTHERS = (starting, taking_over, loading, regathering, counting_threads, registering)


@pytest.mark.parametrize("make", OTHERS)
def test_other_functions_change_nothing_around_them(make):
    check_everywhere(make)


@pytest.mark.parametrize("where", [_fake_world, sys.modules[plan.__module__]])
def test_planning_leaves_its_world(where):
    def make():
        return lambda: [torch.tensor(plan(AdamW(), params_of(2), 2).rows[0].state)]

    check_everywhere(make, within=where.__file__)


def test_a_module_moves_in_its_backward_pass_only_for_who_has_the_handle():
    modules = []

    def make():
        module = torch.nn.Linear(2, 1)
        modules.append(module)
        return lambda: [update_in_backward(module, AdamW(lr=0.1))][:0]

    def leaves_its_gradient():
        module = modules[-1]
        before = module.weight.clone()
        module(torch.ones(2)).sum().backward()
        assert module.weight.grad is not None
        assert torch.equal(module.weight, before)

    check_everywhere(make, afterwards=leaves_its_gradient)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_the_torchscript_class_keeps_no_other_thread_waiting(form):
    params = [torch.ones(3) for _ in range(2)]
    made, grads = trainer(form, params), [torch.ones(3)] * 2

    def make():
        return lambda: made.step(grads) or []

    def others_step():
        other = threading.Thread(target=made.step, args=(grads,), daemon=True)
        other.start()
        other.join(timeout=30)
        assert not other.is_alive()

    check_everywhere(make, afterwards=others_step)


def test_a_new_state_leaves_inference_mode_on():
    made = trainer("unscripted", [], _allow_empty_param_list=True)

    def make():
        return lambda: made.step_param(torch.ones(3), torch.ones(3)) or []

    with torch.inference_mode():
        check_everywhere(make)


def test_a_class_that_was_registered_is_put_back():
    def make():
        def register():
            with torchscript.register():
                assert utils.functional_optim_map[torch.optim.AdamW] is not found
            torchscript.register()
            torchscript.unregister()
            return []

        return register

    found = utils.functional_optim_map[torch.optim.AdamW]
    check_everywhere(make)
