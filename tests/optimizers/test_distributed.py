"""Optimizers on two processes: sharded leaves and sharded state give the numbers of one."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from funcopt import SGD, Adagrad, Adam, Clip, Lion, NAdam, RAdam, RMSprop
from funcopt.distributed import Zero1

from ..distributed.harness import run_ranks

OPTIMIZERS = {
    "SGD": SGD(lr=0.1, weight_decay=0.1),
    "SGD, momentum": SGD(lr=0.1, momentum=0.9, dampening=0.25, weight_decay=0.1),
    "SGD, nesterov": SGD(lr=0.1, momentum=0.9, nesterov=True, kernel="foreach"),
    "SGD, counts": SGD(lr=0.1, momentum=0.9, dampening=0.5, step_per_leaf=True),
    "Adam": Adam(lr=0.1, weight_decay=0.1, amsgrad=True),
    "Lion": Lion(lr=0.1, weight_decay=0.1),
    "RAdam": RAdam(lr=0.1, weight_decay=0.1),
    "NAdam": NAdam(lr=0.1, weight_decay=0.1),
    "Adagrad": Adagrad(lr=0.1, weight_decay=0.1),
    "RMSprop": RMSprop(lr=0.1, weight_decay=0.1),
}
SHAPES = {"w": (5, 7), "b": (3,), "one": (1,), "t": (6, 4)}


def tree(seed):
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return made | {"half": torch.randn(40, generator=generator).bfloat16()}


def run(opt, update, place=lambda leaf: leaf, steps=5):
    params = {name: place(leaf) for name, leaf in tree(0).items()}
    state = opt.init(params)
    for step in range(1, steps + 1):
        grads = {name: place(leaf) for name, leaf in tree(step).items()}
        params, state = getattr(opt, update)(grads, state, params)
    return {
        name: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf
        for name, leaf in params.items()
    }


def sharded(_rank, opt, update):
    mesh = init_device_mesh("cpu", (2,))
    return run(opt, update, lambda leaf: distribute_tensor(leaf, mesh, [Shard(0)]))


def sharded_state(_rank, opt, update):
    return run(Zero1(opt, mesh=init_device_mesh("cpu", (2,))), update)


# Zero1 serves one count for all leaves.
WITH_ONE_COUNT = [name for name, opt in OPTIMIZERS.items() if not opt.step_per_leaf]


def assert_numbers_of_one_process(ranks, opt, update):
    """To a few ulp: kernels round the last elements of a leaf otherwise, and shards have others."""
    expected = run(opt, update)
    for found in run_ranks(2, ranks, opt, update):
        assert found.keys() == expected.keys()
        for name, leaf in found.items():
            torch.testing.assert_close(leaf, expected[name])


@pytest.mark.by_day(2)
@pytest.mark.parametrize("update", ["update", "update_"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharded_leaves_have_the_numbers_of_one_process(name, update):
    assert_numbers_of_one_process(sharded, OPTIMIZERS[name], update)


@pytest.mark.parametrize("update", ["update", "update_"])
@pytest.mark.parametrize("name", WITH_ONE_COUNT)
def test_a_sharded_state_has_the_numbers_of_one_process(name, update):
    assert_numbers_of_one_process(sharded_state, OPTIMIZERS[name], update)


def test_the_norm_of_all_shards_clips_an_sgd():
    assert_numbers_of_one_process(sharded, Clip(SGD(lr=0.1, momentum=0.9), 0.5), "update")
