"""What plan says of leaves that lie as FSDP2 lays them, against runs that are made."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from funcopt import AdamW, Clip, Muon, Partition, muon_label
from funcopt.distributed import plan

from .harness import run_ranks

SHAPES = {"a": (64, 192), "b": (30, 7), "c": (192, 64), "d": (5, 9), "bias": (33,)}
STEPS = 2
OPTS = {
    "AdamW": AdamW(),
    "Muon": Partition({"muon": Muon(), "adamw": AdamW()}, muon_label),
    "Muon in float32": Partition({"muon": Muon(ns_dtype=None), "adamw": AdamW()}, muon_label),
}


def measure(rank):
    """The bytes of state that a process has, and those that it sends to others by all-to-all."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: measure_one(opt, mesh, rank) for name, opt in OPTS.items()}


def measure_one(opt, mesh, rank):
    sent, exchange = [], dist.all_to_all_single

    def counted(to, given, taken, splits, group):
        sent.append(sum(splits) - splits[rank])
        return exchange(to, given, taken, splits, group)

    torch.manual_seed(0)
    grads = params = {
        name: distribute_tensor(torch.randn(shape), mesh, [Shard(0)])
        for name, shape in SHAPES.items()
    }
    state = opt.init(params)
    nbytes = sum(local(leaf).nbytes for leaf in torch.utils._pytree.tree_leaves(state))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counted)
        for _ in range(STEPS):
            params, state = opt.update(grads, state, params)
    return nbytes, len(sent), sum(sent)


def local(leaf):
    return leaf.to_local() if isinstance(leaf, DTensor) else leaf


@pytest.mark.parametrize("size", [2, 4])
def test_state_and_bytes_sent_are_those_of_a_real_run(size):
    measured = run_ranks(size, measure)
    params = {name: torch.empty(shape, device="meta") for name, shape in SHAPES.items()}
    for name, opt in OPTS.items():
        row = plan(opt, params, size, backend="gloo", steps=STEPS, sharded=True).rows[0]
        first, last = measured[0][name], measured[-1][name]
        assert (row.state, row.least_state) == (first[0], last[0])
        assert row.collectives.get("all_to_all", 0) == first[1] == (0 if name == "AdamW" else 4)
        assert row.sent.get("all_to_all", 0) == max(first[2], last[2])


def test_a_norm_over_sharded_leaves_sends_a_number():
    params = {name: torch.empty(shape, device="meta") for name, shape in SHAPES.items()}
    row = plan(Clip(AdamW(), 1.0), params, 4, sharded=True).rows[0]
    assert (row.collectives, row.sent) == ({"all_gather": 1}, {"all_gather": 12})


def test_a_flag_that_is_none_is_refused():
    with pytest.raises(TypeError, match="sharded=1: must be True or False"):
        plan(AdamW(), torch.empty(3, device="meta"), 2, sharded=1)
