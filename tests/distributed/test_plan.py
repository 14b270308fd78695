"""What plan says of runs that are not made, against runs that are, on two and four processes."""

import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile, record_function

from funcopt import (
    SGD,
    Accumulate,
    Adam,
    AdamW,
    Clip,
    ClipAdaptive,
    Ema,
    Frozen,
    Lion,
    Lookahead,
    LossScale,
    Members,
    Partition,
    SkipNonfinite,
    decay_label,
    memory,
)
from funcopt.distributed import LocalUpdates, PlanRow, Zero1, plan
from funcopt.extend import Traits, register_optimizer

from ..cases import assert_same_bits
from .harness import run_ranks

SIZES = (2, 4)
STEPS = 2

# Uneven over two and four, of one element, of none, of shape (), in three dtypes.
SHAPES = {"embed": (517, 33), "w": (64, 65), "b": (65,), "one": (1,), "scalar": (), "none": (0, 4)}


def make_params(device="cpu"):
    params = {name: torch.ones(shape, device=device) for name, shape in SHAPES.items()}
    params["half"] = torch.ones(4099, dtype=torch.bfloat16, device=device)
    params["double"] = torch.ones(33, dtype=torch.float64, device=device)
    return params


def make_opts(mesh=None):
    """Optimizers on a mesh, or to be planned for one."""
    groups = {"decay": Zero1(AdamW(), mesh), "no_decay": AdamW()}
    return {
        "AdamW": AdamW(),
        "Zero1": Zero1(AdamW(amsgrad=True), mesh),
        "Zero1, small buckets": Zero1(AdamW(), mesh, bucket_bytes=2**14),
        "Zero1, averaged": Zero1(AdamW(), mesh, gradients="averaged"),
        "Zero1 of Clip": Zero1(Clip(AdamW(), 1e-3), mesh, bucket_bytes=2**14),
        "Ema around": Ema(Zero1(AdamW(), mesh), 0.9),
        "Accumulate around": Accumulate(Zero1(AdamW(), mesh), STEPS),
        "LocalUpdates": LocalUpdates(AdamW(), STEPS, mesh, outer_momentum=0.9),
        "Partition": Partition(groups, decay_label),
    }


# On the CPU, clipped gradients are made piece by piece: memory that is not planned for.
IN_PIECES = ("Zero1 of Clip",)


class Traffic:
    """Counts what is asked of torch.distributed, and what one process sends for it."""

    def __init__(self, pause):
        self.pause = pause

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
                    time.sleep(self.pause)  # in which gloo's threads let go of all they hold
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
    ((begin, _),) = spans["steps"]
    total, peak = 0, sum(change for when, change in changes if when < begin)
    for when, change in changes:
        total += change
        within = {name for name in spans if any(a <= when <= b for a, b in spans[name])}
        if within == {"steps"}:
            peak = max(peak, total)
    return peak


class Measured(NamedTuple):
    state: int
    calls: dict
    sent: dict
    peak: int


def measure(opt, method, pause):
    """What a real process has, asks for and sends, and its peak as its allocator has it.

    No results are used again, so that each step asks for all that it needs.
    """
    memory.reuse("cpu", False)
    options = {"activities": [ProfilerActivity.CPU], "profile_memory": True, "acc_events": True}
    with Traffic(pause) as traffic, profile(**options) as profiler:
        params, grads = make_params(), make_params()
        state = opt.init(params)
        own = nbytes(state)
        with record_function("steps"):
            for _ in range(STEPS):
                params, state = getattr(opt, method)(grads, state, params)
    return Measured(own, dict(traffic.calls), dict(traffic.sent), allocated(profiler))


def on_ranks(rank, pause):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        name: [measure(opt, method, pause) for method in ("update", "update_")]
        for name, opt in make_opts(mesh).items()
    }


@pytest.fixture(scope="module")
def measured():
    """For each number of processes what each measured of each optimizer, by either method."""
    return {size: run_ranks(size, on_ranks, 0.002) for size in SIZES}


@pytest.fixture(scope="module")
def planned():
    params = make_params("meta")
    plans = {
        name: plan(opt, params, SIZES, backend="gloo", steps=STEPS)
        for name, opt in make_opts().items()
    }
    return {size: {n: p.rows[i] for n, p in plans.items()} for i, size in enumerate(SIZES)}


@pytest.mark.parametrize("size", SIZES)
def test_bytes_of_state_are_those_of_a_real_run(measured, planned, size):
    for name, row in planned[size].items():
        states = [found.state for ways in measured[size] for found in ways[name]]
        assert (row.state, row.least_state) == (max(states), min(states)), name


@pytest.mark.parametrize("size", SIZES)
def test_collectives_and_bytes_sent_are_those_of_a_real_run(measured, planned, size):
    for name, row in planned[size].items():
        for found in (found for ways in measured[size] for found in ways[name]):
            assert (found.calls, found.sent) == (row.collectives, row.sent), name


@pytest.mark.parametrize("size", SIZES)
def test_peak_memory_is_that_of_torchs_allocator_in_a_real_run(measured, planned, size):
    off = peaks_off(measured[size], planned[size])
    if off:  # a thread of gloo's may have held something for longer than it was waited for
        off = peaks_off(run_ranks(size, on_ranks, 0.05), planned[size])
    assert off == {}


def peaks_off(measured, rows):
    """By how many bytes the peaks of a real run are off, for each optimizer for which they are."""
    off = {}
    for name, row in rows.items():
        for way, own in enumerate((row.peak, row.peak_in_place)):
            difference = max(ways[name][way].peak for ways in measured) - own
            allowed = nbytes(make_params()) if name in IN_PIECES else 0
            if abs(difference) > allowed:
                off[name, way] = difference
    return off


BIG = {f"layer {i}": torch.empty(1000 + i, 77, device="meta") for i in range(30)}
BIG_BYTES = nbytes(BIG)


def test_zero1_on_many_processes_keeps_to_its_floors():
    found = plan(Zero1(AdamW(), None, bucket_bytes=2**20), BIG, (1, 8, 64, 1024))
    assert found.params == BIG_BYTES
    buckets = found.rows[1].collectives["all_gather"]
    assert buckets <= BIG_BYTES // 2**20 + 1
    assert found.rows[0].collectives == {}
    for row in found.rows:
        share = 2 * BIG_BYTES / row.ranks
        assert share <= row.state <= share + 8 * buckets + 8
        assert row.least_state <= row.state
    for row in found.rows[1:]:
        assert row.collectives == {"reduce_scatter": buckets, "all_gather": buckets}
        floor = 2 * (row.ranks - 1) / row.ranks * BIG_BYTES
        assert floor <= sum(row.sent.values()) <= 1.05 * floor


def test_adamw_sends_nothing_and_its_peak_is_its_trees():
    (row,) = plan(AdamW(kernel="fused"), BIG, 8).rows
    count = 8  # bytes, and half of it for the kernel
    state = 2 * BIG_BYTES + count
    peak = 7 * BIG_BYTES + 2 * count
    assert row == PlanRow(8, state, state, {}, {}, peak, 4 * BIG_BYTES + count + count // 2)


def test_sgd_can_be_planned_though_its_fused_kernel_has_no_meta_kernel():
    count = 8  # bytes
    (row,) = plan(SGD(momentum=0.9), BIG, 8).rows
    peak = 5 * BIG_BYTES + 2 * count  # gradients; old and new parameters and momentum
    assert row == PlanRow(
        8, BIG_BYTES + count, BIG_BYTES + count, {}, {}, peak, 3 * BIG_BYTES + count
    )


OTHERS = {
    "SGD": SGD(),
    "SGD, fused": Zero1(SGD(momentum=0.9, nesterov=True, kernel="fused"), None),
    "Adam": Zero1(Adam(), None),
    "Lion": Clip(Lion(), 1.0),
    "Clip or skip": Clip(AdamW(), 1.0, nonfinite="skip"),
    "ClipAdaptive": ClipAdaptive(AdamW()),
    "Frozen": Frozen(),
    "Lookahead": Lookahead(AdamW(), every=2),
    "LossScale": LossScale(Zero1(AdamW(), None, gradients="averaged")),
    "SkipNonfinite": SkipNonfinite(AdamW()),
    "SkipNonfinite within": Zero1(SkipNonfinite(AdamW()), None),
    "LossScale within": Zero1(LossScale(Clip(AdamW(kernel="foreach"), 1.0)), None),
    "per leaf": AdamW(amsgrad=True, step_per_leaf=True),
}


@pytest.mark.parametrize("opt", OTHERS.values(), ids=OTHERS)
def test_every_wrapper_can_be_planned(opt):
    params = {"w": torch.empty(5, 3), "b": torch.empty(3, dtype=torch.bfloat16)}
    found = plan(opt, params, (1, 8), steps=2)
    state = nbytes(opt.init(params))
    sharded = "Zero1" in repr(opt)
    for row in found.rows:
        assert row.peak_in_place >= 2 * nbytes(params) + row.state
        assert row.state < state if sharded and row.ranks > 1 else row.state == state
        assert bool(row.collectives) == (sharded and row.ranks > 1)


@register_optimizer
@dataclass(frozen=True)
class Triangular:
    """A wrapper of one's own that has something else by the name of a mesh, and sends nothing."""

    traits: ClassVar[Traits] = Traits(elementwise=True, linear=True)
    inner: Any
    mesh: tuple[int, ...]

    def init(self, params):
        return self.inner.init(params)

    def update(self, grads, state, params):
        assert self.mesh == (3, 4, 5)
        return self.inner.update(grads, state, params)

    def update_(self, grads, state, params):
        assert self.mesh == (3, 4, 5)
        return self.inner.update_(grads, state, params)


def test_only_what_sends_something_is_put_on_the_planned_mesh():
    params = {"w": torch.empty(5, 3)}
    inner = Zero1(AdamW(), None)
    assert plan(Triangular(inner, (3, 4, 5)), params, 4).rows == plan(inner, params, 4).rows


def test_real_and_meta_parameters_and_any_tree_give_the_same_plan():
    opt = Zero1(Clip(AdamW(), 1.0), None)
    meta = plan(opt, make_params("meta"), 4)
    real = make_params()
    assert plan(opt, real, 4).rows == meta.rows
    assert_same_bits(real, make_params())
    assert plan(opt, list(real.values()), 4).rows[0].state == meta.rows[0].state


def test_the_process_is_left_as_it_was():
    hook, opt, w = sys.excepthook, AdamW(), {"w": torch.ones(3)}
    state = opt.init(w)
    expected = opt.update(w, state, w)
    plan(Zero1(opt, None), w, (2, 1024))
    assert not dist.is_initialized()
    assert sys.excepthook is hook
    assert_same_bits(opt.update(w, state, w), expected)
    on_meta = {"w": torch.ones(3, device="meta")}
    with pytest.raises(ValueError, match="cannot serve"):
        AdamW(kernel="fused").update(on_meta, opt.init(on_meta), on_meta)


def test_an_error_leaves_the_process_as_it_was():
    hook = sys.excepthook
    with pytest.raises(ValueError, match="its schedule"):
        plan(Zero1(AdamW(lr=lambda step: -1.0), None), BIG, 8)
    assert not dist.is_initialized()
    assert sys.excepthook is hook
    assert plan(AdamW(), BIG, 8).rows


def test_where_a_world_exists_it_is_refused_and_the_world_left_alone():
    hook = sys.excepthook
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        with pytest.raises(RuntimeError, match="before init_process_group"):
            plan(AdamW(), BIG, 8)
        sharded = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(TypeError, match=r"params\['w'\] is a DTensor"):
            plan(AdamW(), {"w": sharded}, 8)
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == 1
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((AdamW, BIG, 8), TypeError, "opt=.*must be an optimizer"),
        ((AdamW(), BIG, 0), ValueError, "mesh=0: must be at least 1"),
        ((AdamW(), BIG, ()), ValueError, "at least one number"),
        ((AdamW(), BIG, (8, 2.0)), TypeError, "mesh=2.0: must be a whole number, or several such"),
        ((AdamW(), BIG, "8"), TypeError, "mesh='8': must be a whole number"),
        ((AdamW(), {"w": torch.ones(2).int()}, 8), TypeError, r"params\['w'\]"),
    ],
)
def test_what_cannot_be_planned_is_an_error_that_says_why(arguments, kind, message):
    with pytest.raises(kind, match=message):
        plan(*arguments)
    assert not dist.is_initialized()


def test_other_options_are_checked():
    with pytest.raises(ValueError, match="backend='mpi': must be one of nccl, gloo"):
        plan(AdamW(), BIG, 8, backend="mpi")
    with pytest.raises(ValueError, match="steps=0"):
        plan(AdamW(), BIG, 8, steps=0)


def test_the_table_has_a_line_for_each_number_of_processes():
    found = plan(Zero1(AdamW(), None), BIG, (8, 1024), backend="gloo", steps=3)
    title, head, *lines = str(found).split("\n")
    assert "gloo, 3 steps" in title
    assert "all_to_all sent" in head
    assert [line.split()[0] for line in lines] == ["8", "1,024"]
    assert len({len(line) for line in (head, *lines)}) == 1


# 1,024 members, of which seven processes have 147 each and one 142 (the last of eight, 1029 - 5).
MEMBERS = {"w": (1024, 6, 5), "b": (1024, 5)}
ENSEMBLES = {
    "Adam": lambda: Members(Adam(lr=torch.linspace(0.1, 0.2, 1024))),
    "Clip": lambda: Members(Clip(Adam(), 1.0)),
    "Ema": lambda: Ema(Members(Adam()), 0.9),
}


def members_state_bytes(name, members):
    """Two moments of each parameter and a count of each member, and what a wrapper adds."""
    added = {
        "Adam": 0,
        "Clip": 4 * members,  # the norm of each
        "Ema": 35 * 4 * members + 2 * 8,  # the average, with a count and a weight for all
    }
    return (2 * 35 * 4 + 8) * members + added[name]


@pytest.mark.parametrize("name", list(ENSEMBLES))
def test_members_are_shared_out_and_nothing_is_sent(name):
    stack = {key: torch.empty(shape, device="meta") for key, shape in MEMBERS.items()}
    found = plan(ENSEMBLES[name](), stack, (1, 7, 8))
    assert [row.sent for row in found.rows] == [{}] * 3
    shares = [(1024, 1024), (147, 142), (128, 128)]
    for row, (most, least) in zip(found.rows, shares, strict=True):
        assert row.state == members_state_bytes(name, most)
        assert row.least_state == members_state_bytes(name, least)
    assert found.rows[2].peak_in_place < found.rows[0].peak_in_place / 7


def state_of_members(rank, name):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    lay = {
        key: distribute_tensor(torch.ones(shape), mesh, [Shard(0)])
        for key, shape in MEMBERS.items()
    }
    leaves = torch.utils._pytree.tree_leaves(ENSEMBLES[name]().init(lay))
    return sum((leaf.to_local() if isinstance(leaf, DTensor) else leaf).nbytes for leaf in leaves)


def test_members_that_run_have_the_state_that_was_planned():
    assert run_ranks(2, state_of_members, "Clip") == [members_state_bytes("Clip", 512)] * 2


def test_a_stack_whose_copies_are_averaged_is_on_every_process():
    stack = {key: torch.empty(shape, device="meta") for key, shape in MEMBERS.items()}
    (row,) = plan(LocalUpdates(Members(SGD(momentum=0.9)), every=2, mesh=None), stack, 2).rows
    assert row.state > 1024 * 35 * 4


def test_the_picture_is_drawn_or_the_extra_named(tmp_path, monkeypatch):
    found = plan(Zero1(AdamW(), None), BIG, (8, 64))
    found.draw(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    plan(AdamW(), BIG, 1).draw(tmp_path / "one.svg")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"funcopt\[plot\]"):
        found.draw(tmp_path / "not.png")
