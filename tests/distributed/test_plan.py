"""What plan says of runs that are not made, against runs that are: on one, two and four processes."""

import builtins
import itertools
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function

from funcopt import (
    Accumulate,
    AdamW,
    Clip,
    ClipAdaptive,
    Ema,
    Frozen,
    Lookahead,
    LossScale,
    Partition,
    SkipNonfinite,
    decay_label,
)
from funcopt.distributed import LocalUpdates, PlanRow, Zero1, plan

from ..cases import assert_same_bits
from .harness import run_ranks

SIZES = (1, 2, 4)
STEPS = 2

# Uneven over two and four, of one element, of none, of shape (), in three dtypes.
SHAPES = {"embed": (517, 33), "w": (64, 65), "b": (65,), "one": (1,), "scalar": (), "none": (0, 4)}


def make_params(device="cpu"):
    params = {name: torch.ones(shape, device=device) for name, shape in SHAPES.items()}
    params["half"] = torch.ones(4099, dtype=torch.bfloat16, device=device)
    params["double"] = torch.ones(33, dtype=torch.float64, device=device)
    return params


def make_opts(mesh=None):
    """Each with whether its peak on a CPU is that of the plan: not if values decide what is done."""
    return {
        "AdamW": (AdamW(), True),
        "amsgrad": (AdamW(amsgrad=True, step_per_leaf=True), True),
        "Clip": (Clip(AdamW(), 1e-3), False),
        "Zero1": (Zero1(AdamW(), mesh), True),
        "Zero1, small buckets": (Zero1(AdamW(), mesh, bucket_bytes=2**14), True),
        "Zero1, averaged": (Zero1(AdamW(), mesh, gradients="averaged"), True),
        "Zero1 of Clip": (Zero1(Clip(AdamW(), 1e-3), mesh, bucket_bytes=2**14), False),
        "Ema around": (Ema(Zero1(AdamW(), mesh), 0.9), True),
        "Accumulate around": (Accumulate(Zero1(AdamW(), mesh), 2), True),
        "Accumulate within": (Zero1(Accumulate(Clip(AdamW(), 1e-3), 2), mesh), False),
        "LocalUpdates": (LocalUpdates(AdamW(), 2, mesh, outer_momentum=0.9), True),
        "Partition": (
            Partition({"decay": Zero1(AdamW(), mesh), "no_decay": AdamW()}, decay_label),
            True,
        ),
    }


class Traffic:
    """Counts what is asked of torch.distributed, and what one process sends for it."""

    def __enter__(self):
        self.calls, self.sent, self.patch = Counter(), Counter(), pytest.MonkeyPatch()
        size = dist.get_world_size()
        others = size - 1

        def counting(name, kind, count):
            function = getattr(dist, name, None)

            def call(*args, **kwargs):
                self.calls[kind] += 1
                self.sent[kind] += count(*args)
                with record_function("collective"):
                    result = function(*args, **kwargs)
                    if kwargs.get("async_op"):
                        result.wait()
                    time.sleep(0.001)  # in which gloo's threads let go of all they hold
                return result

            if function is not None:
                self.patch.setattr(dist, name, call)

        for name in ("all_gather_single", "all_gather_into_tensor"):
            counting(name, "all_gather", lambda whole, own: others * own.nbytes)
        counting("all_gather", "all_gather", lambda rows, own: others * own.nbytes)
        counting(
            "all_to_all_single", "all_to_all", lambda to, given: others * (given.nbytes // size)
        )
        counting("all_reduce", "all_reduce", lambda own: -(-2 * others * own.nbytes // size))
        for name in ("reduce_scatter_single", "reduce_scatter_tensor", "broadcast", "all_to_all"):
            counting(name, name, lambda *args: 0)
        return self

    def __exit__(self, *_):
        self.patch.undo()


def parts(tree):
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if torch.is_tensor(leaf)]
    return [leaf.to_local() if isinstance(leaf, DTensor) else leaf for leaf in leaves]


def nbytes(tree):
    return sum(leaf.numel() * leaf.element_size() for leaf in parts(tree))


def allocated(profiler):
    """The most bytes that torch's allocator had given away in the steps, but for gloo's own."""
    events = profiler.profiler.kineto_results.events()
    spans = {
        name: [(e.start_ns(), e.end_ns()) for e in events if e.name() == name]
        for name in ("steps", "collective")
    }
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total = peak = 0
    for when, change in changes:
        total += change
        within = {name for name in spans if any(a <= when <= b for a, b in spans[name])}
        if within == {"steps"}:
            peak = max(peak, total)
    return peak


def measure(opt, method):
    """State, collectives, bytes sent and peak of a real process, as its allocator has it."""
    options = {"activities": [ProfilerActivity.CPU], "profile_memory": True, "acc_events": True}
    with Traffic() as traffic, profile(**options) as profiler:
        params, grads = make_params(), make_params()
        state = opt.init(params)
        own = nbytes(state)
        with record_function("steps"):
            for _ in range(STEPS):
                params, state = getattr(opt, method)(grads, state, params)
    return own, dict(traffic.calls), dict(traffic.sent), allocated(profiler)


def on_ranks(rank):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        name: [measure(opt, method) for method in ("update", "update_")]
        for name, (opt, _) in make_opts(mesh).items()
    }


@pytest.fixture(scope="module")
def measured():
    return {size: run_ranks(size, on_ranks) for size in SIZES}


@pytest.fixture(scope="module")
def planned():
    params = make_params("meta")
    return {
        name: plan(opt, params, SIZES, backend="gloo", steps=STEPS)
        for name, (opt, _) in make_opts().items()
    }
