"""The state of `Zero1` made whole and shared out again: between layouts, and for one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .._core import pytree, transforms
from .._core.types import Tree, is_dense, shown_layout
from .._engine.checks import check_state
from .._engine.prepare import flatten_params
from ._buckets import cut, is_bucketed
from ._checks import check_kept
from ._shards import Sharding
from ._zero1 import Zero1, Zero1State


@transforms.restoring
@transforms.outside_autocast
def gather_state(opt: Zero1, state: Zero1State, params: Tree) -> Tree:
    """Return the state of the inner optimizer as if there were no `Zero1`, whole on every process.

    All processes must call it alike. It takes a collective for each bucket of each tree in the
    state, and the memory of the whole state. To save a state, this is not needed:
    `torch.distributed.checkpoint` takes what `to_state_dict` makes of it, and loads it on any
    number of processes.

    Returns:
        A state like `opt.inner.init(params)`, whose leaves are plain tensors. Those of one bucket
        share a storage, each its own part, as after `Zero1.update`.

    Raises:
        TypeError: If the state is not that of a `Zero1`.
        ValueError: If it was made for other buckets, or has something for each leaf beside them.

    Example:
        >>> import torch, funcopt
        >>> from funcopt.distributed import Zero1, gather_state
        >>> opt = Zero1(funcopt.SGD(momentum=0.9), mesh=None)
        >>> params = {"w": torch.ones(2, 2), "b": torch.ones(1)}
        >>> gather_state(opt, opt.init(params), params).momentum_buffer
        {'w': tensor([[0., 0.],
                [0., 0.]]), 'b': tensor([0.])}
    """
    check_state(state, Zero1State)
    leaves, structure = flatten_params(params)
    sharding = opt.sharding(leaves, structure)
    with torch.no_grad():
        sharding.local(state.inner, "state.inner")  # for its checks
        nodes, above = pytree.flatten_above(state.inner, is_bucketed)
        wholes: list[Tree] = []
        for path, node in zip(pytree.paths(above, "state.inner"), nodes, strict=True):
            if is_bucketed(node):
                wholes.append(pytree.unflatten(structure, _leaves_of(node, sharding, leaves)))
            else:
                wholes.append(_beside(node, path))
        return pytree.unflatten(above, wholes)


def _leaves_of(node: dict[str, Tensor], sharding: Sharding, likes: list[Tensor]) -> list[Tensor]:
    leaves: list[Any] = [None] * len(likes)
    for name, bucket in sharding.buckets.items():
        buffer = node[name]
        flat = buffer.full_tensor() if isinstance(buffer, DTensor) else buffer.clone()
        for index, leaf in zip(bucket.indices, cut(bucket, flat, likes), strict=True):
            leaves[index] = leaf
    return leaves


@transforms.restoring
@transforms.outside_autocast
def scatter_state(opt: Zero1, state: Tree, params: Tree) -> Zero1State:
    """Return the state of a `Zero1` from that of its inner optimizer: undo `gather_state`.

    Nothing is sent: each process takes its share of a state like `opt.inner.init(params)`, which
    must be the same on every process. With `gather_state` before it, a state goes from one mesh,
    bucket size or way of sharding to another.

    Raises:
        ValueError: If the state is not like that, or a leaf of it not as the inner optimizer keeps
            it for its parameter: of another shape, dtype or device.

    Example:
        >>> import torch, funcopt
        >>> from funcopt.distributed import Zero1, scatter_state
        >>> inner, params = funcopt.SGD(momentum=0.9), {"w": torch.ones(2)}
        >>> _, state = inner.update({"w": torch.ones(2)}, inner.init(params), params)
        >>> scatter_state(Zero1(inner, mesh=None), state, params).inner.momentum_buffer
        {'bucket 0': tensor([1., 1.])}
    """
    template = opt.init(params)
    leaves, structure = flatten_params(params)
    sharding = opt.sharding(leaves, structure)
    nodes, above = pytree.flatten_above(template.inner, is_bucketed)
    try:
        subtrees: list[Any] = above.flatten_up_to(state)
    except ValueError as error:
        raise ValueError(
            f"state is not like that of the inner optimizer: {error}. Give what its init() or "
            f"update() returned for these parameters."
        ) from error
    paths = pytree.paths(above, "state")
    shared: list[Tree] = []
    with torch.no_grad():
        for path, node, tree in zip(paths, nodes, subtrees, strict=True):
            if not is_bucketed(node):
                shared.append(_beside(tree, path))
                continue
            own = pytree.pair(tree, path, structure).leaves
            check_kept(
                own,
                leaves,
                _dtypes(node, sharding, leaves),
                partial(pytree.path, structure, path),
                "Give the state of the inner optimizer for these parameters.",
            )
            shared.append(sharding.parts(own))
    return Zero1State(sharding.distributed(pytree.unflatten(above, shared)))


def _beside(tensor: Tensor, path: str) -> Tensor:
    """Return a copy of what is in a state beside the buckets, such as a count."""
    if not is_dense(tensor):
        raise TypeError(f"{path} has {shown_layout(tensor)}: make it dense.")
    if tensor.ndim > 0:
        raise ValueError(
            f"{path} has shape {tuple(tensor.shape)}, an element for each bucket or leaf, which "
            f"are not the same number. Let what counts leaves, as Accumulate does, be around Zero1."
        )
    return tensor.clone()


def _dtypes(node: dict[str, Tensor], sharding: Sharding, leaves: list[Tensor]) -> list[torch.dtype]:
    """Return the dtype in which a tree of the state keeps what belongs to each parameter."""
    dtypes = [leaf.dtype for leaf in leaves]
    for name, bucket in sharding.buckets.items():
        for index in bucket.indices:
            kept = node[name].dtype
            dtypes[index] = kept.to_complex() if leaves[index].is_complex() else kept
    return dtypes
