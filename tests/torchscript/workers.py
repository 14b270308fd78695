"""One process of several, in each of which a consumer of the class runs beside `torch.optim.AdamW`.

`python -m tests.torchscript.workers ddp 0 /a/directory` is process 0 of the two that `ddp` takes.
They meet over a file in the directory, and talk on the loopback interface.
"""

import contextlib
import gc
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import autograd as dist_autograd
from torch.distributed import rpc
from torch.distributed.algorithms.ddp_comm_hooks.ddp_zero_hook import hook_with_zero_step
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.optim import DistributedOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from funcopt import torchscript
from funcopt.torchscript import FunctionalAdamW

WORLD = 2
STEPS = 20
OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, "amsgrad": True}
ADAMW = torch.optim.AdamW


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3)
    )


def one_weight() -> nn.Module:
    """Make a model of one parameter, so that one of two processes owns none."""
    torch.manual_seed(0)
    return nn.Linear(6, 3, bias=False)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    """Each process, and each step, has data of its own."""
    own = torch.Generator().manual_seed(WORLD * seed + dist.get_rank())
    return (model(torch.randn(5, 6, generator=own)) - torch.randn(5, 3, generator=own)).pow(2).sum()


def backward(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    loss_of(model, seed).backward()


def assert_equal(model: nn.Module, reference: nn.Module) -> None:
    for name, param in model.named_parameters():
        difference = (param - reference.get_parameter(name)).abs().max().item()
        assert difference == 0.0, f"{name}: {difference} off"


def parallel(build: Any) -> DistributedDataParallel:
    return DistributedDataParallel(build(), bucket_cap_mb=0.004)


@contextlib.contextmanager
def meeting(backend: str, rank: int, directory: pathlib.Path) -> Iterator[None]:
    """Let the processes meet, and part in good order."""
    dist.init_process_group(
        backend, init_method=f"file://{directory}/store", rank=rank, world_size=WORLD
    )
    yield
    # Models first. If one were the last to hold the group, torch 2.13 would wait in its destructor
    # for a thread of the group, and that thread for Python's lock, which the destructor holds.
    gc.collect()
    dist.destroy_process_group()


def ddp(rank: int, directory: pathlib.Path) -> None:
    """The optimizer in DDP's own hook, which calls it from a thread of C++ with gradients on."""
    with meeting("gloo", rank, directory):
        _train_in_the_hook()


def _train_in_the_hook() -> None:
    fused, reference = parallel(perceptron), parallel(perceptron)
    options = dict(OPTIONS)
    with torchscript.register():
        fused._register_fused_optim(ADAMW, options.pop("lr"), **options)
    opt = ADAMW(reference.parameters(), **OPTIONS, foreach=False)
    start = [param.detach().clone() for param in fused.parameters()]
    for step in range(STEPS):
        backward(fused, step)
        backward(reference, step)
        opt.step()
        assert_equal(fused, reference)
    assert not any(map(torch.equal, fused.parameters(), start))


def zero(rank: int, directory: pathlib.Path) -> None:
    """Each process owns some parameters, moves them, and sends them to the others.

    torch's hook refuses the backend "gloo", as it may hang with the interleaved hook (its issue
    62300). The plain hook makes its collectives in the same order in every process, so it does not;
    the same backend by its other name, "cpu:gloo" (see `init_process_group`), is let pass.
    """
    with meeting("cpu:gloo", rank, directory):
        owned = [_train_sharded(perceptron, True), _train_sharded(one_weight, False)]
        everything: list[Any] = [None] * WORLD
        dist.all_gather_object(everything, owned)
    assert all(owns[0] > 0 for owns in everything)
    assert sorted(owns[1] for owns in everything) == [0, 1]


def _train_sharded(build: Any, shard_buckets: bool) -> int:
    sharded, reference = parallel(build), parallel(build)
    with torchscript.register():
        opt = ZeroRedundancyOptimizer(sharded.parameters(), ADAMW, overlap_with_ddp=True, **OPTIONS)
        hook = hook_with_zero_step(allreduce_hook, sharded, opt, shard_buckets=shard_buckets)
        sharded.register_comm_hook(None, hook)
        ours = ADAMW(reference.parameters(), **OPTIONS, foreach=False)
        # In the first two steps DDP settles its buckets, and nothing is moved.
        for step in range(2 + STEPS):
            backward(sharded, step)
            backward(reference, step)
            if step >= 2:
                ours.step()
            assert_equal(sharded, reference)
    assert type(opt.optim) is FunctionalAdamW
    assert not torch.equal(next(sharded.parameters()), next(build().parameters()))
    return len(opt.optim.param_group["params"])


class Owned:
    """A parameter that lives in one process, and is used from another."""

    def __init__(self, seed: int) -> None:
        self.w = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        self.w.requires_grad_()

    def weight(self) -> Tensor:
        return self.w

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w)


def by_rpc(rank: int, directory: pathlib.Path) -> None:
    """A trainer in process 0, parameters in both: the class is scripted, and called by RPC."""
    # Only where the optimizer is built need the class be registered.
    rpc.init_rpc(
        f"worker{rank}",
        rank=rank,
        world_size=WORLD,
        rpc_backend_options=rpc.TensorPipeRpcBackendOptions(
            init_method=f"file://{directory}/store", rpc_timeout=60
        ),
    )
    if rank == 0:
        with torchscript.register():
            _train_remotely()
            _refuse_remotely()
    rpc.shutdown()


def _train_remotely() -> None:
    remote = [rpc.remote(f"worker{i % WORLD}", Owned, args=(i,)) for i in range(3)]
    weights = [module.remote().weight() for module in remote]
    opt = DistributedOptimizer(ADAMW, weights, **OPTIONS)
    assert opt.is_functional_optim
    local = [Owned(i) for i in range(3)]
    reference = ADAMW([module.w for module in local], **OPTIONS, foreach=False)
    for step in range(STEPS):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        used = 3 if step % 3 else 2  # the last parameter sometimes has no gradient
        with dist_autograd.context() as context:
            y = x
            for module in remote[:used]:
                y = module.rpc_sync().forward(y)
            dist_autograd.backward(context, [y.pow(2).sum()])
            opt.step(context)
        y = x
        for own in local[:used]:
            y = own.forward(y)
        reference.zero_grad()
        y.pow(2).sum().backward()
        reference.step()
        for weight, own in zip(weights, local, strict=True):
            assert (weight.to_here() - own.w).abs().max() == 0.0
    assert not torch.equal(local[0].w, Owned(0).w)


def _refuse_remotely() -> None:
    weight = rpc.remote("worker1", Owned, args=(0,)).remote().weight()
    with pytest.raises(ValueError, match="lr=nan: lr must be finite and at least 0"):
        DistributedOptimizer(ADAMW, [weight], lr=float("nan"))


CONSUMERS = {"ddp": ddp, "zero": zero, "rpc": by_rpc}

if __name__ == "__main__":
    loopback = "lo" if sys.platform == "linux" else "lo0"
    os.environ.update(GLOO_SOCKET_IFNAME=loopback, TP_SOCKET_IFNAME=loopback)
    torch.set_num_threads(1)
    CONSUMERS[sys.argv[1]](int(sys.argv[2]), pathlib.Path(sys.argv[3]))
