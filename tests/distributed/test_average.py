"""`average_gradients`, and clipping by the norm of averaged gradients around `Zero1`."""

import pytest
import torch
import torch.distributed as dist
from torch import vmap
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

import funcopt
from funcopt import AdamW, Clip, Partition, SkipNonfinite, decay_label
from funcopt.distributed import Zero1, average_gradients, gather_state
from funcopt.distributed import _average as module
from funcopt.distributed._fake_world import in_fake_world
from funcopt.interop import to_state_dict

from ..cases import NOT_DENSE, not_dense
from .harness import run_ranks
from .test_zero1 import STEPS, assert_same_everywhere, compare, grads_of, make_params, mean

MAX_NORM = 6.0
INNER = {
    "decay": AdamW(lr=1e-2, eps=1e-3, weight_decay=0.1),
    "no_decay": AdamW(lr=1e-2, eps=1e-3, weight_decay=0.0),
}
BROKEN = (4, 11)  # the steps at which one gradient of the last process is NaN


def make_grads(rank):
    """Gradients in every dtype, the complex one after an odd number of others."""
    g = torch.Generator().manual_seed(rank)
    return {
        "missing": None,
        "odd": torch.randn(3, generator=g),
        "scalar": torch.randn((), generator=g),
        "complex": torch.randn(2, 3, generator=g, dtype=torch.complex64),
        "empty": torch.randn(0, 4, generator=g),
        "nested": [torch.randn(6, 5, generator=g).t(), (torch.randn(7, generator=g).bfloat16(),)],
        "half": torch.full((3,), 60000.0, dtype=torch.float16),  # of which two add up to infinity
        "double": torch.randn(5, generator=g, dtype=torch.float64),
        "complex128": torch.randn(1, generator=g, dtype=torch.complex128),
    }


def leaves_of(tree):
    return torch.utils._pytree.tree_leaves(tree)


def check_means(mesh):
    rank, size = mesh.get_local_rank(), mesh.size()
    every = [leaves_of(make_grads(r)) for r in range(size)]
    grads = make_grads(rank)
    found = average_gradients(grads, mesh)
    assert torch.utils._pytree.tree_structure(found) == torch.utils._pytree.tree_structure(grads)
    for own, given, before, *theirs in zip(
        *map(leaves_of, (found, grads, make_grads(rank))), *every, strict=True
    ):
        if given is None:
            assert own is None
            continue
        assert torch.equal(given, before)  # nothing is written
        assert own.dtype == given.dtype
        wide = torch.complex128 if own.is_complex() else torch.float64
        expected = torch.stack([leaf.to(wide) for leaf in theirs]).mean(0).to(own.dtype)
        bits = torch.finfo(own.dtype).eps
        torch.testing.assert_close(own, expected, rtol=2 * bits, atol=2 * bits)
    assert_same_everywhere({str(i): x for i, x in enumerate(leaves_of(found)) if x is not None})


def check_many_buckets(mesh):
    grads = make_grads(mesh.get_local_rank())
    expected = average_gradients(grads, mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FULL", 20)
        found = average_gradients(grads, mesh)
    for own, other in zip(*map(leaves_of, (found, expected)), strict=True):
        if own is not None:  # the order of a sum over many goes by a tensor's place in its bucket
            bits = torch.finfo(own.dtype).eps
            torch.testing.assert_close(own, other, rtol=2 * bits, atol=2 * bits)


def check_another_order(mesh):
    """Leaves are averaged by their paths, not in the order in which each dict was filled."""
    rank, size = mesh.get_local_rank(), mesh.size()
    grads = {"a": torch.full((2,), 1.0 + rank), "b": torch.full((2,), 10.0)}
    if rank == 1:
        grads = dict(reversed(grads.items()))
    found = average_gradients(grads, mesh)
    assert list(found) == list(grads)
    assert torch.equal(found["a"], torch.full((2,), (1 + size) / 2))
    assert torch.equal(found["b"], torch.full((2,), 10.0))


def check_gradients_with_a_history(mesh):
    grads = {"w": torch.ones(2, requires_grad=True) * 2}
    assert not average_gradients(grads, mesh)["w"].requires_grad
    sharded = {"w": distribute_tensor(torch.ones(4), mesh)}
    with pytest.raises(TypeError, match=r"grads\['w'\] is a DTensor.*\.full_tensor\(\)"):
        average_gradients(sharded, mesh)
    with pytest.raises(RuntimeError, match=r"average_gradients sends.*Take it outside"):
        vmap(lambda g: average_gradients(g, mesh))(torch.ones(3, 2))
    compiled = torch.compile(lambda g: average_gradients(g, mesh)["w"] + 1, backend="eager")
    given = torch.full((2,), float(mesh.get_local_rank()))
    assert torch.equal(compiled({"w": given}), torch.full((2,), (mesh.size() + 1) / 2))


def grouped(mesh):
    """The groups of a run, each with a `Zero1`."""
    return {
        label: Zero1(inner, mesh, bucket_bytes=64, gradients="averaged")
        for label, inner in INNER.items()
    }


def members(label, params):
    return {name: leaf for name, leaf in params.items() if decay_label(name, leaf) == label}


def broken(step, rank, size, breaks):
    grads = grads_of(step, rank)
    if breaks and step in BROKEN and rank == size - 1:
        grads["scalar"] = torch.tensor(torch.nan)
    return grads


def check_numbers(mesh, breaks, in_place):
    """Clipped by the norm of all averaged gradients, against one process on their mean."""
    rank, size = mesh.get_local_rank(), mesh.size()
    around = SkipNonfinite if breaks else lambda opt: opt
    zeros = grouped(mesh)
    opt = around(Clip(Partition(zeros, decay_label), MAX_NORM))
    alone = around(Clip(Partition(INNER, decay_label), MAX_NORM))
    params, expected = make_params(), make_params()
    state, reference = opt.init(params), alone.init(expected)
    norms, moved = [], 0
    for step in range(STEPS):
        own = average_gradients(broken(step, rank, size, breaks), mesh)
        before = expected["z"]
        params, state = (opt.update_ if in_place else opt.update)(own, state, params)
        every = [broken(step, r, size, breaks) for r in range(size)]
        expected, reference = alone.update(mean(every), reference, expected)
        moved += not torch.equal(before, expected["z"])
        norms.append((reference.inner if breaks else reference).norm.item())
    case = size, breaks, in_place
    assert moved == STEPS - (len(BROKEN) if breaks else 0), case
    assert any(norm < MAX_NORM for norm in norms), norms  # so that some steps were clipped
    assert any(norm > MAX_NORM for norm in norms), norms  # and some were not
    compare(params, expected, case)
    assert_same_everywhere(params)
    if breaks:
        for name in ("consecutive", "total", "last_finite"):
            assert torch.equal(getattr(state, name), getattr(reference, name)), (case, name)
        assert state.total == len(BROKEN)
        state, reference = state.inner, reference.inner
    torch.testing.assert_close(state.norm, reference.norm, rtol=1e-6, atol=0.0)
    assert_same_everywhere({"norm": state.norm})
    for label, zero in zeros.items():
        whole = gather_state(zero, state.inner.inner[label], members(label, params))
        compare(to_state_dict(whole), to_state_dict(reference.inner.inner[label]), (case, label))


def on_ranks(rank):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    check_means(mesh)
    check_many_buckets(mesh)
    check_another_order(mesh)
    check_gradients_with_a_history(mesh)
    for breaks in (False, True):
        for in_place in (False, True):
            check_numbers(mesh, breaks, in_place)


@pytest.mark.by_day(1)
@pytest.mark.parametrize("size", [2, 4])
def test_means_and_what_clips_and_skips_by_them_are_those_of_one_process(size):
    run_ranks(size, on_ranks, timeout=120)


def test_alone_gradients_are_their_own_mean():
    grads = make_grads(0)
    found = average_gradients(grads, None)
    for own, given in zip(*map(leaves_of, (found, grads)), strict=True):
        assert (own is given) if given is None else torch.equal(own, given)
    assert average_gradients({}, None) == {}
    assert average_gradients([None, None], None) == [None, None]


@pytest.mark.parametrize("kind", NOT_DENSE)
def test_gradients_that_are_not_dense_are_refused_by_their_path(kind):
    with pytest.raises(TypeError, match=r"grads\['w'\] .*(nested|sparse_coo)"):
        average_gradients({"w": not_dense(kind, torch.ones(2))}, None)


def test_gradients_without_a_mean_are_refused_by_their_path():
    with pytest.raises(
        TypeError, match=r"grads\[1\] is of type float: every leaf must be a tensor"
    ):
        average_gradients([torch.ones(2), 1.0], None)
    with pytest.raises(TypeError, match=r"grads\['w'\] has dtype torch.int64"):
        average_gradients({"w": torch.ones(2, dtype=torch.int64)}, None)


def test_the_mesh_must_be_a_line():
    def average(_):
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "other"))
        average_gradients({"w": torch.ones(2)}, square)

    with pytest.raises(ValueError, match=r"has 2 dimensions.*mesh\['data'\]"):
        in_fake_world(4, 0, "gloo", average)
    with pytest.raises(TypeError, match="mesh=2: must be a DeviceMesh"):
        average_gradients({"w": torch.ones(2)}, 2)


def test_a_clip_around_groups_of_a_process_alone_is_that_around_their_optimizers():
    zeros = Clip(Partition(grouped(None), decay_label), MAX_NORM)
    plain = Clip(Partition(INNER, decay_label), MAX_NORM)
    params, state = make_params(), zeros.init(make_params())
    expected, reference = make_params(), plain.init(make_params())
    for step in range(3):
        grads = average_gradients(grads_of(step, 0), None)
        params, state = zeros.update(grads, state, params)
        expected, reference = plain.update(grads, reference, expected)
    compare(params, expected, "alone")
    assert funcopt.find(state, "norm")
