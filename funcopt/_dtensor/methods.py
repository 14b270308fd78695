"""Updates of DTensors: their local parts go in, and DTensors are made of what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.tensors import recording
from .._core.types import Tree, optimizers_in, own_traits
from .shards import Parts, dtensor, wholes_of_parts, work_on


def check_shardable(opt: Any) -> None:
    """Refuse an optimizer that has to see whole leaves, of which each process has a part."""
    for part in optimizers_in(opt, of_stacks=True):
        if not own_traits(part).shardable:
            raise TypeError(
                f"params has DTensors, and {type(part).__name__} does not say that it works on "
                f"parts of leaves: by its traits it has to see whole ones. If each element moves "
                f"by itself, say `traits = Traits(elementwise=True)` in its class; if it reduces "
                f"over processes what it computes of whole leaves, `shardable=True`. Else give it "
                f"whole tensors, as of .full_tensor(). (With rounding='stochastic' it has to: the "
                f"random bits go by the place of an element in the whole leaf. Compensated serves "
                f"DTensors.)"
            )


def update(method: Callable[..., Any], opt: Any, grads: Tree, state: Tree, params: Tree) -> Any:
    followed = _is_recorded(grads, state, params)
    parts, trees = _take_apart(opt, grads, state, params, followed=followed)
    new_params, new_state = work_on(parts, method, opt, *trees)
    return _wholes(parts, new_params, params, "params"), _wholes(parts, new_state, state, "state")


def update_(method: Callable[..., Any], opt: Any, grads: Tree, state: Tree, params: Tree) -> Any:
    parts, trees = _take_apart(opt, grads, state, params, followed=True)
    pairs = parts.sharded()
    versions = [_version(part) for part, _ in pairs]
    work_on(parts, method, opt, *trees)
    # A DTensor counts for itself what is written into it, by which autograd finds out.
    written = [
        whole
        for (part, whole), version in zip(pairs, versions, strict=True)
        if _version(part) != version
    ]
    torch.autograd.graph.increment_version(written)
    return params, state


def _take_apart(
    opt: Any, grads: Tree, state: Tree, params: Tree, *, followed: bool
) -> tuple[Parts, list[Tree]]:
    """Return gradients, state and parameters with local parts in place of DTensors.

    Parameters keep their `requires_grad`; gradients and state do if they are followed.

    Raises:
        RuntimeError: Under a transform.
        ValueError: If a DTensor is a sum still to be made.
    """
    check_shardable(opt)
    given = (leaf for tree in (grads, state, params) for leaf in pytree.flatten(tree)[0])
    if transforms.watched(given):
        raise RuntimeError(
            "params has DTensors, of which no transform (vmap, grad, jvp, ...) knows which process "
            "has which part. Update them outside of it."
        )
    parts = Parts()
    trees = []
    for root, tree in (("grads", grads), ("state", state), ("params", params)):
        leaves, structure = pytree.flatten(tree)
        leaves = parts.represent(leaves, followed=followed or root == "params")
        for index, leaf in enumerate(leaves):
            place = parts.place(leaf) if isinstance(leaf, Tensor) else None
            if place is not None and any(own.is_partial() for own in place.placements):
                raise ValueError(
                    f"{pytree.path(structure, root, index)} has {place}: each process has a "
                    f"summand of it alone. Reduce it first, with .redistribute(placements=...) to "
                    f"those of its parameter."
                )
        trees.append(pytree.unflatten(structure, leaves))
    return parts, trees


def _is_recorded(grads: Tree, state: Tree, params: Tree) -> bool:
    """Whether autograd would record the update, by `recording`: `_wholes` refuses it."""
    own_grads, own_state, own_params = (
        [leaf for leaf in pytree.flatten(tree)[0] if isinstance(leaf, Tensor)]
        for tree in (grads, state, params)
    )
    with recording(own_params, own_grads, own_state, None):
        return torch.is_grad_enabled()


def _version(part: Tensor) -> int:
    # How often it was written: private in name only, autograd's own messages speak of it.
    return 0 if part.is_inference() else part._version


def _wholes(parts: Parts, tree: Tree, olds: Tree, root: str) -> Tree:
    """Return a tree with DTensors in place of what came of the local parts of old ones."""
    leaves, structure = pytree.flatten(olds)
    paired = pytree.pair(tree, root, structure)
    kind: Any = dtensor()
    wholes = []
    with torch.no_grad():
        for index, (new, old) in enumerate(zip(paired.leaves, leaves, strict=True)):
            if not isinstance(old, kind) or isinstance(new, kind):
                wholes.append(new)
            elif parts.knows(new):  # left as it was
                wholes.append(parts.whole_of(new))
            elif new.grad_fn is None and not transforms.any_dual((new,)):
                wholes.append(_whole(new, old, kind))
            else:
                raise RuntimeError(
                    f"{pytree.path(structure, root, index)} is a DTensor, and the update of one "
                    f"has no derivative, for which a gradient, a state tensor, a hyperparameter or "
                    f"differentiable=True asks. Detach what asks for it."
                )
    return paired.rebuild(wholes)


def _whole(part: Tensor, old: Any, kind: Any) -> Tensor:
    """Return the DTensor of which this is the local part, and that lies as an old one does."""
    same = part.stride() == old.to_local().stride()
    own = part.detach() if part.requires_grad else part
    if same and type(old) is kind and hasattr(old, "_spec"):
        made: Tensor
        (made,) = wholes_of_parts([own], [old._spec], [part.requires_grad])
        return made
    stride = old.stride() if same else stride_of_whole(part, old.shape)
    mesh, placements = old.device_mesh, old.placements
    made = kind.from_local(own, mesh, placements, run_check=False, shape=old.shape, stride=stride)
    return made.requires_grad_() if part.requires_grad else made


def stride_of_whole(part: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """Return the strides of a dense tensor of this shape that is laid out as its part is."""
    strides, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda dim: (part.stride(dim), -dim)):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)
