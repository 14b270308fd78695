"""Planning a run on many processes without them: its memory and its traffic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from .._core import pytree, transforms
from .._core.inner import OptimizerLike
from .._core.types import Optimizer, Tree, check_is_optimizer, optimizers_in, own_traits
from .._dtensor.members import dtensor_of, span_of
from .._dtensor.shards import Place
from .._engine import memory
from .._engine.hyperparameters import check_choice, check_flag
from .._engine.prepare import flatten_params
from ._checks import check_whole_number
from ._cost_counter import CostCounterMode
from ._fake_world import in_fake_world
from ._planned import Plan, PlanRow

_Cost: TypeAlias = tuple[int, CostCounterMode]
"""The bytes of one process's state, and what its steps cost."""


@transforms.restoring
def plan(
    opt: OptimizerLike[Any],
    params: Tree,
    mesh: int | Sequence[int],
    *,
    backend: str = "nccl",
    steps: int = 1,
    sharded: bool = False,
) -> Plan:
    r"""Return what a run on many processes takes of each, found by making its steps on none.

    This process plays the first and the last one, in a world of torch's fake process group, with
    tensors on the meta device, which have shapes and no memory. So 70 billion parameters are
    planned for 1,024 processes in seconds. What is counted is what the optimizer does there, not
    what a formula says of it.

    The members of a stack that `Members` updates are shared out over the processes, as DTensors
    with `Shard(0)`, and so is every leaf if `sharded` says so. All else is on each of them, but for
    what the optimizer itself shares out.

    *State* is the bytes of the state's tensors that one process holds. *Sent* is what one of $W$
    processes sends by the usual ring or pairwise algorithms: of a whole buffer $(W-1)/W$ in a
    reduce-scatter, an all-gather or an all-to-all, and twice that in an all-reduce. Where an
    all-to-all sends unequal shares, as `Muon` does of DTensors, they are added up, and of the two
    processes the one counts that sends more. *Peak* is the
    largest sum, at any time in a step, of the bytes of all storages that are alive, each once:
    parameters and gradients, which the caller holds, the old state, the new parameters and state of
    `update`, and all buffers. It is that of a step that is like one before; the first may take
    more.

    Not counted: activations; what an allocator rounds up; what a backend or an operator takes
    within itself (gloo one more bucket in an all-gather); and traffic that is not the optimizer's,
    such as the all-reduce of gradients around it.

    The kernels are those that serve the CPU, native or fused. The native one clips and scales
    gradients on its way, as on a GPU, where the fused one takes up to a megabyte for pieces of
    them. Values cannot be read, as on a GPU: `SkipNonfinite` makes both ways and chooses.

    Args:
        opt: The optimizer. A mesh of so many processes takes the place of its `mesh`, and of that
            of any optimizer within, which are best left None.
        params: The parameters: a tree of plain tensors, of which only shapes, dtypes and strides
            are looked at. Make them on the meta device to spare memory.
        mesh: How many processes, at least 1, or several such numbers. A `DeviceMesh` would need
            as many to exist.
        backend: Which one is planned for: `"nccl"`, or `"gloo"`, with which `Zero1` takes an
            all-to-all in place of a reduce-scatter.
        steps: How many updates to make, at least 1, for those that are not all alike, as with
            `Accumulate(every=8)`. What is sent is that in all of them.
        sharded: Whether parameters, gradients and state are DTensors with `Shard(0)`, as FSDP2's
            `fully_shard` lays them. What it sends itself is not counted.

    Raises:
        RuntimeError: If `torch.distributed` is initialized in this process.
        TypeError: If an argument is of the wrong type, or a parameter is a DTensor.
        ValueError: If a number is out of range, or the optimizer is refused on a mesh.

    Example:
        >>> import torch, funcopt
        >>> from funcopt.distributed import Zero1, plan
        >>> params = {"w": torch.empty(1000, 1000, device="meta")}
        >>> print(plan(Zero1(funcopt.Adam(), mesh=None), params, (8, 64)))
        parameters 3.8 MiB, gradients as much; nccl, a step
        ranks      state    (least)      peak  in place  reduce_scatter sent  all_gather sent
            8  976.6 KiB  976.6 KiB  18.6 MiB  17.2 MiB         1 x, 3.3 MiB     1 x, 3.3 MiB
           64  122.1 KiB  122.1 KiB  15.7 MiB  15.5 MiB         1 x, 3.8 MiB     1 x, 3.8 MiB
        >>> stack = {"w": torch.empty(1024, 64, 64, device="meta")}  # 1,024 members
        >>> print(plan(funcopt.Members(funcopt.Adam()), stack, (8, 64)))
        parameters 16.0 MiB, gradients as much; nccl, a step
        ranks      state    (least)      peak  in place
            8    4.0 MiB    4.0 MiB  14.0 MiB   8.0 MiB
           64  512.1 KiB  512.1 KiB   1.8 MiB   1.0 MiB
        >>> matrices = {"w": torch.empty(512, 512, device="meta")}
        >>> print(plan(funcopt.Muon(), matrices, 8, sharded=True))
        parameters 1.0 MiB, gradients as much; nccl, a step
        ranks      state    (least)     peak  in place  all_to_all sent
            8  128.0 KiB  128.0 KiB  4.2 MiB   3.9 MiB   2 x, 448.0 KiB
    """
    check_is_optimizer("opt", opt)
    sizes = tuple(mesh) if isinstance(mesh, Sequence) and not isinstance(mesh, str) else (mesh,)
    for size in sizes:
        check_whole_number("mesh", size, ", or several such")
    check_whole_number("steps", steps)
    check_choice("backend", backend, ("nccl", "gloo"))
    if not sizes:
        raise ValueError("mesh=(): give at least one number of processes.")
    leaves, structure = flatten_params(params)
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, DTensor):
            raise TypeError(
                f"{pytree.path(structure, 'params', index)} is a DTensor: plan() shares out what "
                f"is whole. Give plain tensors, such as torch.empty(shape, device='meta')."
            )
    check_flag("sharded", sharded)
    rows = tuple(_row(opt, params, size, backend, steps, sharded) for size in sizes)
    return Plan(opt, sum(leaf.nbytes for leaf in leaves), backend, steps, rows)


def _row(
    opt: Optimizer[Any], params: Tree, size: int, backend: str, steps: int, sharded: bool
) -> PlanRow:
    """Play the first and the last of so many processes."""

    def play(rank: int, method: str) -> _Cost:
        def alone(mesh: DeviceMesh) -> _Cost:
            return _play(_over(opt, mesh), method, params, mesh, steps, sharded)

        return in_fake_world(size, rank, backend, partial(_counted, alone))

    (state, first), (last_state, last) = play(0, "update"), play(size - 1, "update")
    return PlanRow(
        size,
        max(state, last_state),
        min(state, last_state),
        dict(first.calls),
        {kind: max(sent, last.sent[kind]) for kind, sent in first.sent.items()},
        max(first.peak, last.peak),
        max(play(rank, "update_")[1].peak for rank in (0, size - 1)),
    )


def _play(
    opt: Optimizer[Any], method: str, given: Tree, mesh: DeviceMesh, steps: int, sharded: bool
) -> _Cost:
    """Make the steps of one process."""
    size, rank = mesh.size(), mesh.get_local_rank()
    parts = list(optimizers_in(opt))
    by_member = any(own_traits(part).memberwise for part in parts)
    sends = any(own_traits(part).sends for part in parts)
    by_rows = sharded or (by_member and not sends)
    lay = partial(_shared_out, mesh=mesh) if by_rows else _on_meta

    def start() -> tuple[Tree, Tree, Tree]:
        params, grads = (pytree.tree_map(lay, given) for _ in range(2))
        return grads, opt.init(params), params

    grads, state, params = start()

    def train(count: int) -> None:
        nonlocal params, state  # so that those before are let go
        for _ in range(count):
            params, state = getattr(opt, method)(grads, state, params)

    # The first by itself, in which there is more to find out than in others.
    transforms.seen_by(CostCounterMode(size, rank, []), train, 1)
    grads, state, params = start()
    nbytes = sum(own.nbytes for own in _locals(state))
    counter = CostCounterMode(size, rank, _locals((params, grads, state)))
    transforms.seen_by(counter, train, steps)
    return nbytes, counter


def _counted(function: Callable[[DeviceMesh], _Cost], mesh: DeviceMesh) -> _Cost:
    """Make steps while they are counted. What is remembered of them serves no other step."""
    memory.forget()
    try:
        cost = transforms.looked_on(function, mesh)
        memory.forget()
    except BaseException:
        memory.forget()
        raise
    return cost


def _on_meta(leaf: Tensor) -> Tensor:
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")


def _shared_out(leaf: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return a leaf whose members lie on all processes."""
    if leaf.ndim == 0:
        return _on_meta(leaf)  # which has none, as the optimizer says
    start, stop = span_of(len(leaf), mesh.size(), mesh.get_local_rank())
    part = _on_meta(leaf)[start:stop].clone()
    whole: Tensor = dtensor_of(part, Place(mesh, (Shard(0),), leaf.shape), DTensor)
    return whole


def _locals(tree: Tree) -> list[Tensor]:
    """Return what of a tree's tensors is here."""
    tensors = [leaf for leaf in pytree.flatten(tree)[0] if isinstance(leaf, Tensor)]
    return [leaf.to_local() if isinstance(leaf, DTensor) else leaf for leaf in tensors]


def _over(opt: Optimizer[Any], mesh: DeviceMesh) -> Any:
    """Return an optimizer with this mesh in all that send something, itself and those within it."""
    fields: dict[str, Any] = {"mesh": mesh} if own_traits(opt).sends else {}
    inner = getattr(opt, "inner", None)
    if isinstance(inner, Mapping):
        fields["inner"] = {label: _over(part, mesh) for label, part in inner.items()}
    elif inner is not None:
        fields["inner"] = _over(inner, mesh)
    owner: Any = opt
    return dataclasses.replace(owner, **fields) if fields else opt
