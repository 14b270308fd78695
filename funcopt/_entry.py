"""The way into every optimizer: past the compiler and autocast, and to the local parts of DTensors.

What the capture of a CUDA graph would get wrong is refused here, too. So the methods themselves
know nothing of any of these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _kernels, _modes, _transforms, _tree
from ._captured import check_replayed
from ._sharded import Parts, dtensor, has_sharded, work_on
from ._types import Tree

__all__ = ["wrap_methods"]


def wrap_methods(cls: Any) -> None:
    """Let an optimizer keep out of autocast, and its updates serve DTensors.

    The outermost optimizer replaces each by its local part, and makes of the results DTensors that
    lie as the old ones do. Optimizers within it are given plain tensors, with which nothing is done
    here. (`init` needs no such thing: to make zeros and copies is what a DTensor can do by itself.)
    Where it is being compiled, such an update stays out of the graph, as does one of many leaves.
    All three leave the thread's gradient mode as it was, whatever ends them.
    """
    served: dict[str, Callable[[Any], Any]] = {
        "init": lambda method: _modes.restoring(_modes.outside_autocast(method)),
        "update": lambda method: _serving(method, _update),
        "update_": lambda method: _serving(method, _update_),
    }
    for name, serve in served.items():
        if name in vars(cls):
            setattr(cls, name, serve(vars(cls)[name]))


def _serving(method: Callable[..., Any], on_local_parts: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def serve(self: Any, grads: Tree, state: Tree, params: Tree) -> Any:
        sharded = has_sharded(params)
        own = functools.partial(on_local_parts, method) if sharded else method
        if _modes.autocasting():
            own = functools.partial(_modes.without_autocast, own)
        if _transforms.compiling():
            if sharded or _too_many_to_compile(params):
                return _modes.uncompiled(serve, self, grads, state, params)
            return own(self, grads, state, params)
        if _transforms.capturing():
            check_replayed(self, state, params)
        enabled = torch.is_grad_enabled()
        try:
            return own(self, grads, state, params)
        except BaseException:  # an interrupt may have come before something else put it back
            _modes.set_grad_enabled(enabled)
            raise

    return serve


def _update(method: Callable[..., Any], opt: Any, grads: Tree, state: Tree, params: Tree) -> Any:
    work = _take_apart(grads, state, params, followed=_is_recorded(grads, state, params))
    new_params, new_state = work_on(work.parts, method, opt, *work.trees)
    return _wholes(work.parts, new_params, params, "params"), _wholes(
        work.parts, new_state, state, "state"
    )


def _update_(method: Callable[..., Any], opt: Any, grads: Tree, state: Tree, params: Tree) -> Any:
    work = _take_apart(grads, state, params, followed=True)
    pairs = work.parts.sharded()
    versions = [_version(part) for part, _ in pairs]
    work_on(work.parts, method, opt, *work.trees)
    # A DTensor counts for itself what is written into it, by which autograd finds out.
    written = [
        whole
        for (part, whole), version in zip(pairs, versions, strict=True)
        if _version(part) != version
    ]
    torch.autograd.graph.increment_version(written)
    return params, state


# Compiling takes a fraction of a second for each leaf, and more for each the more there are.
_MOST_TO_COMPILE = 400


def _too_many_to_compile(params: Tree) -> bool:
    """Whether an update that is being compiled had better stay out of the graph.

    Where it cannot, within a derivative or a vmap and in an export, it goes in at whatever length.
    """
    if _transforms.exporting() or _transforms.transformed():
        return False
    if isinstance(params, (dict, list, tuple)) and len(params) > _MOST_TO_COMPILE:
        return True  # without a look inside
    return len(_tree.flatten(params)[0]) > _MOST_TO_COMPILE


class _TakenApart(NamedTuple):
    parts: Parts
    trees: list[Tree]  # gradients, state and parameters, as far as they are here


def _take_apart(grads: Tree, state: Tree, params: Tree, *, followed: bool) -> _TakenApart:
    """Return the trees with local parts in place of DTensors.

    Args:
        grads: The gradients.
        state: The state.
        params: The parameters, which keep their `requires_grad`.
        followed: Whether gradients and state keep theirs.

    Raises:
        RuntimeError: Under a transform.
        ValueError: If a DTensor is a sum still to be made.
    """
    given = (leaf for tree in (grads, state, params) for leaf in _tree.flatten(tree)[0])
    if _transforms.watched(given):
        raise RuntimeError(
            "params has DTensors, of which no transform (vmap, grad, jvp, ...) knows which process "
            "has which part. Update them outside of it."
        )
    parts = Parts()
    trees = []
    for root, tree in (("grads", grads), ("state", state), ("params", params)):
        leaves, structure = _tree.flatten(tree)
        leaves = parts.represent(leaves, followed=followed or root == "params")
        for index, leaf in enumerate(leaves):
            place = parts.place(leaf) if isinstance(leaf, Tensor) else None
            if place is not None and any(own.is_partial() for own in place.placements):
                raise ValueError(
                    f"{_tree.path(structure, root, index)} has {place}: each process has a summand "
                    f"of it alone. Reduce it first, with .redistribute(placements=...) to those of "
                    f"its parameter."
                )
        trees.append(_tree.unflatten(structure, leaves))
    return _TakenApart(parts, trees)


def _is_recorded(grads: Tree, state: Tree, params: Tree) -> bool:
    """Whether autograd would record the update, by the rule of `AdamW`: `_wholes` refuses it."""
    own_grads, own_state, own_params = (
        [leaf for leaf in _tree.flatten(tree)[0] if isinstance(leaf, Tensor)]
        for tree in (grads, state, params)
    )
    with _kernels.recording(own_params, own_grads, own_state, None):
        return torch.is_grad_enabled()


def _version(part: Tensor) -> int:
    # How often it was written: private in name only, autograd's own messages speak of it.
    return 0 if part.is_inference() else part._version


def _wholes(parts: Parts, tree: Tree, olds: Tree, root: str) -> Tree:
    """Return a tree with DTensors in place of what came of the local parts of old ones."""
    leaves, structure = _tree.flatten(olds)
    paired = _tree.pair(tree, root, structure)
    kind: Any = dtensor()
    wholes = []
    with torch.no_grad():
        for index, (new, old) in enumerate(zip(paired.leaves, leaves, strict=True)):
            if not isinstance(old, kind) or isinstance(new, kind):
                wholes.append(new)
            elif parts.knows(new):  # left as it was
                wholes.append(parts.whole_of(new))
            elif new.grad_fn is None and not _transforms.any_dual((new,)):
                wholes.append(_whole(new, old, kind))
            else:
                raise RuntimeError(
                    f"{_tree.path(structure, root, index)} is a DTensor, and the update of one has "
                    f"no derivative, for which a gradient, a state tensor, a hyperparameter or "
                    f"differentiable=True asks. Detach what asks for it."
                )
    return paired.rebuild(wholes)


def _whole(part: Tensor, old: Any, kind: Any) -> Tensor:
    """Return the DTensor of which this is the local part, and that lies as an old one does."""
    same = part.stride() == old.to_local().stride()
    own = part.detach() if part.requires_grad else part
    if same and type(old) is kind and hasattr(old, "_spec"):
        # What FSDP2 does, too, without the check of arguments that takes ten times as long; and
        # without `__init__`, which does nothing, and takes twice as long as all else.
        create: Any = kind.__new__
        made: Tensor = create(kind, own, old._spec, requires_grad=part.requires_grad)
        return made
    stride = old.stride() if same else _stride(part, old.shape)
    mesh, placements = old.device_mesh, old.placements
    made = kind.from_local(own, mesh, placements, run_check=False, shape=old.shape, stride=stride)
    return made.requires_grad_() if part.requires_grad else made


def _stride(part: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """Return the strides of a dense tensor of this shape that is laid out as its part is."""
    strides, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda dim: (part.stride(dim), -dim)):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)
