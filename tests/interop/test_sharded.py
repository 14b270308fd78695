"""Sharded tensors through torch.distributed.checkpoint: saved on two processes, loaded on one.

The trap is a NamedTuple handed over as it is, from which rank 1 silently gets rank 0's shard.
"""

import os
import pathlib

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from funcopt import AdamWState
from funcopt.interop import from_state_dict, to_state_dict

from .formats import load_dcp

# Five rows over two processes: uneven shards.
FULL = torch.arange(10.0).view(5, 2)


def state(step, leaf):
    return AdamWState(torch.tensor(step, dtype=torch.float64), {"w": leaf}, {"w": leaf.clone()}, ())


def save_and_load(rank, directory):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = f"file://{directory}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(FULL, mesh, [Shard(0)])
    dcp.save(to_state_dict(state(3.0, sharded)), checkpoint_id=f"{directory}/checkpoint")

    template = state(0.0, torch.zeros_like(sharded))
    found = to_state_dict(state(0.0, torch.zeros_like(sharded)))
    dcp.load(found, checkpoint_id=f"{directory}/checkpoint")
    loaded = from_state_dict(template, found)
    assert loaded.step == 3
    assert loaded.exp_avg["w"].placements == (Shard(0),)
    assert torch.equal(loaded.exp_avg["w"].to_local(), sharded.to_local())
    assert torch.equal(loaded.exp_avg["w"].full_tensor(), FULL)
    pathlib.Path(directory, f"done {rank}").touch()
    dist.destroy_process_group()


def test_each_rank_gets_its_own_shard_back_and_one_process_gets_the_whole(tmp_path):
    mp.spawn(save_and_load, (str(tmp_path),), 2)
    assert all((tmp_path / f"done {rank}").exists() for rank in range(2))
    template = state(0.0, torch.zeros(5, 2))
    found = load_dcp(tmp_path / "checkpoint", to_state_dict(state(0.0, torch.zeros(5, 2))))
    assert torch.equal(from_state_dict(template, found).exp_avg["w"], FULL)
