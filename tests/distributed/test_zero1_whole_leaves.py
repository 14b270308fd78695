"""Zero1 around what looks at whole leaves: some of them in each process, at the numbers of one."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from funcopt import AdamW, ClipAdaptive, Ema, Muon, Partition, muon_label
from funcopt.distributed import Zero1, gather_state, plan, scatter_state
from funcopt.distributed._buckets import Bucket, keep_whole
from funcopt.interop import from_state_dict, to_state_dict

from ..cases import assert_same_bits, tree_map
from .harness import run_ranks

SHAPES = {"a": (6, 4), "t": (7, 3), "b": (40, 70), "c": (40, 70), "d": (3, 2, 2), "e": (1, 1)}
FEW = {"a": (6, 4), "half": (2, 3)}  # fewer than processes
STEPS = 5


def tree(seed, shapes):
    source = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=source) for name, shape in shapes.items()}
    if "t" in made:
        made["t"] = made["t"].t()
    if "half" in made:
        made["half"] = made["half"].bfloat16()
    return made


INNERS = {
    "Muon": Muon(lr=0.1),
    "Muon, moments": Muon(lr=0.1, moments=torch.bfloat16, nesterov=False),
    "Ema": Ema(Muon(lr=lambda step: 0.1 / (1 + step)), 0.9),
    "ClipAdaptive": ClipAdaptive(AdamW(lr=0.1), 0.1),
}


def mean(trees):
    return {name: torch.stack([own[name] for own in trees]).mean(0) for name in trees[0]}


def check(rank, size):
    mesh = init_device_mesh("cpu", (size,)) if size > 1 else None
    for inner in INNERS.values():
        for shapes in (SHAPES, FEW):
            for bucket_bytes in (1, 2**30):
                check_one(rank, size, mesh, inner, shapes, bucket_bytes)


def check_one(rank, size, mesh, inner, shapes, bucket_bytes):
    expected, state = tree(0, shapes), inner.init(tree(0, shapes))
    opt = Zero1(inner, mesh, bucket_bytes=bucket_bytes)
    averaged = Zero1(inner, mesh, bucket_bytes=bucket_bytes, gradients="averaged")
    pure, own = tree(0, shapes), opt.init(expected)
    in_place, own_in_place = tree(0, shapes), averaged.init(expected)
    for step in range(STEPS):
        every = [tree(100 + 10 * step + other, shapes) for other in range(size)]
        expected, state = inner.update(mean(every), state, expected)
        pure, own = opt.update(every[rank], own, pure)
        averaged.update_(mean(every), own_in_place, in_place)
    for params, held in ((pure, own), (in_place, own_in_place)):
        gathered = gather_state(opt, held, params)
        both = (params, to_state_dict(gathered)), (expected, to_state_dict(state))
        for found, wanted in zip(*both, strict=True):
            for name, leaf in found.items():
                bound = 2e-2 if "half" in name else 1e-6
                torch.testing.assert_close(leaf, wanted[name], rtol=bound, atol=bound)
        # Gathered and scattered, and written and read, it is the same to the bit.
        again = scatter_state(opt, gathered, params)
        saved = from_state_dict(opt.init(params), to_state_dict(held))
        for other in (again, saved):
            assert_same_bits(tree_map(local, other), tree_map(local, held))


def local(leaf):
    return leaf.to_local() if isinstance(leaf, DTensor) else leaf


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_numbers_are_those_of_one_process(size):
    run_ranks(size, check, size, timeout=200.0)


def test_no_leaf_lies_in_two_shares():
    leaves = [torch.empty(n) for n in (3, 9, 4, 4, 0, 1)]
    bucket = Bucket("bucket 0", list(range(6)), [0, 3, 12, 16, 20, 20, 21])
    made = keep_whole(bucket, leaves, 3)
    assert made.numel == 27  # the largest leaf three times
    assert sorted(made.indices) == list(range(6))
    for index, start in zip(made.indices, made.offsets, strict=False):
        assert start % 9 + leaves[index].numel() <= 9


def test_groups_of_matrices_and_of_others_have_a_zero1_each():
    params = {"wte": torch.ones(4, 3), "w": torch.eye(3, 4), "b": torch.zeros(3)}
    inners = {"muon": Muon(lr=0.1), "adamw": AdamW(lr=0.1)}
    shared = {label: Zero1(inner, None) for label, inner in inners.items()}
    opt, alone = Partition(shared, muon_label), Partition(inners, muon_label)
    moved, state = opt.update(params, opt.init(params), params)
    assert_same_bits(moved, alone.update(params, alone.init(params), params)[0])
    assert list(state.inner["muon"].inner.momentum_buffer) == ["bucket 0"]


def test_a_plan_tells_what_is_sent():
    """Of four matrices on two processes each has two; on three, one has two and so has room."""
    params = {f"w{index}": torch.empty(64, 64, device="meta") for index in range(4)}
    found = plan(Zero1(Muon(), None), params, (2, 3), backend="nccl")
    two, three = found.rows
    size = 64 * 64 * 4
    assert two.state == 2 * size + 8
    assert two.sent == {"reduce_scatter": 2 * size, "all_gather": 2 * size}
    assert three.sent == {"reduce_scatter": 4 * size, "all_gather": 4 * size}
