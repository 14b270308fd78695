"""Muon on DTensors: the numbers of one process, however leaves are cut, and what is sent."""

import re

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from funcopt import AdamW, Ema, Members, Muon, Partition, muon_label
from funcopt._dtensor.wholes import owners

from ..cases import assert_same_bits, clone, tree_map
from ..distributed.harness import run_ranks

SHAPES = [(6, 4), (3, 8), (5, 7), (40, 70), (40, 70), (1, 3), (7, 2, 2)]
LYING = {
    "rows": [Shard(0)],
    "columns": [Shard(1)],
    "last": [Shard(-1)],
    "whole": [Replicate()],
}
OPTIONS = {
    "as it is": {},
    "plain": {"kernel": "plain", "nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
    "numbers": {"lr": torch.tensor(0.1), "weight_decay": lambda step: 0.1 / (1 + step)},
    "trees": {"lr": {f"w{i}": 0.1 / (1 + i) for i in range(len(SHAPES))}, "step_per_leaf": True},
    "float16": {"ns_dtype": torch.float16},
    "16 bits": {"moments": torch.bfloat16, "ns_dtype": None, "matrices": "stack"},
}


def leaves(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return {f"w{i}": torch.randn(shape, dtype=dtype) for i, shape in enumerate(SHAPES)}


def whole(tree):
    return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, tree)


def steps(mesh, placements, opt, dtype=torch.float32, without=()):
    """Hold some updates, in place and out of it, to those of whole leaves."""

    def lay(tree):
        return {
            name: None if leaf is None else distribute_tensor(leaf.clone(), mesh, placements)
            for name, leaf in tree.items()
        }

    params, own = leaves(0, dtype), lay(leaves(0, dtype))
    state, own_state = opt.init(params), opt.init(own)
    in_place, state_in_place = lay(params), opt.init(own)
    for seed in range(1, 4):
        grads = {n: None if n in without else g for n, g in leaves(seed, dtype).items()}
        params, state = opt.update(grads, state, params)
        own, own_state = opt.update(lay(grads), own_state, own)
        opt.update_(lay(grads), state_in_place, in_place)
    for name, leaf in in_place.items():
        assert own[name].placements == leaf.placements
    assert_same_bits(whole(own), params)
    assert_same_bits(whole(in_place), params)
    assert_same_bits(whole(own_state), state)
    assert_same_bits(whole(state_in_place), state)


def all_alike(rank, size):
    mesh = init_device_mesh("cpu", (size,))
    for placements in LYING.values():
        for name, options in OPTIONS.items():
            dtype = torch.bfloat16 if name == "16 bits" else torch.float32
            steps(mesh, placements, Muon(**options), dtype)
        steps(mesh, placements, Muon(lr=0.1), without=("w0", "w3"))
        steps(mesh, placements, Ema(Muon(lr=0.1), 0.9))
        groups = {"muon": Muon(lr=0.1), "adamw": AdamW(lr=0.1)}
        label = lambda name, leaf: "adamw" if name == "w1" else muon_label(name, leaf)  # noqa: E731
        steps(mesh, placements, Partition(groups, label))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_numbers_are_those_of_one_process(size):
    run_ranks(size, all_alike, size, timeout=200.0)


def all_on_a_grid(rank):
    mesh = init_device_mesh("cpu", (2, 2))
    for placements in ([Replicate(), Shard(0)], [Shard(1), Replicate()], [Shard(0), Shard(1)]):
        steps(mesh, placements, Muon(lr=0.1))
    steps(mesh, [Shard(0), Shard(0)], Muon(lr=0.1))


def test_on_a_mesh_of_two_dimensions_too():
    run_ranks(4, all_on_a_grid)


def count(rank, size):
    """A process sends its parts of the directions, in bfloat16, and gets its parts of the results.

    Nothing is sent of what each process has whole.
    """
    mesh = init_device_mesh("cpu", (size,))
    seen = []
    original = torch.distributed.all_to_all_single

    def counting(received, sent, taken, given, group):
        seen.append(sum(given) - given[rank])
        return original(received, sent, taken, given, group)

    torch.distributed.all_to_all_single = counting
    full = {f"w{i}": torch.randn(8, 8) for i in range(size)}
    opt, found = Muon(), {}
    for name in ("rows", "whole"):
        params = {n: distribute_tensor(leaf, mesh, LYING[name]) for n, leaf in full.items()}
        moved, _ = opt.update(params, opt.init(params), params)
        found[name] = sum(seen)
        seen.clear()
        with CommDebugMode() as mode:  # which sees every operator
            watched, _ = opt.update(params, opt.init(params), params)
        assert_same_bits(whole(watched), whole(moved))
        assert (mode.get_total_counts() > 0) == (name == "rows")
        seen.clear()
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_what_is_sent_is_the_parts_twice_and_nothing_of_whole_leaves(size):
    for found in run_ranks(size, count, size):
        part = 8 * 8 * 2 // size  # the bytes of a part in bfloat16, of one matrix for each process
        assert found == {"rows": 2 * (size - 1) * part, "whole": 0}


def test_matrices_are_shared_out_by_what_they_cost():
    assert owners([1, 5, 1, 1, 1, 1], 2) == [1, 0, 1, 1, 1, 1]
    assert owners([2, 2, 2, 2], 4) == [0, 1, 2, 3]
    assert owners([], 3) == []


def stacked(rank):
    """Members that are whole on a process move there, and nothing is sent."""
    mesh = init_device_mesh("cpu", (2,))
    full = {"w": torch.randn(4, 3, 5)}
    opt = Members(Muon(lr=0.1, ns_dtype=torch.float32))  # a norm of each member rounds otherwise
    own = {"w": distribute_tensor(full["w"], mesh, [Shard(0)])}
    moved, _ = opt.update(own, opt.init(own), own)
    expected, _ = opt.update(full, opt.init(full), full)
    torch.testing.assert_close(moved["w"].full_tensor(), expected["w"])


def test_sharded_members_are_whole_where_they_are():
    run_ranks(2, stacked)


def refuse(rank):
    mesh = init_device_mesh("cpu", (2,))
    params = {"w": distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])}
    grads = clone(params)
    for opt in (Muon(lr=torch.tensor(0.1, requires_grad=True)), Muon(differentiable=True)):
        before = whole(clone(params))
        with pytest.raises(RuntimeError, match=r"DTensor.*derivative"):
            opt.update(grads, opt.init(params), params)
        assert_same_bits(whole(params), before)
    vector = {"b": distribute_tensor(torch.ones(4), mesh, [Shard(0)])}
    with pytest.raises(ValueError, match=re.escape("params['b'] has shape (4,)")):
        Muon().init(vector)


def test_a_derivative_is_refused():
    run_ranks(2, refuse)
