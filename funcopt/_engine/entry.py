"""The way into every optimizer: past the compiler and autocast, and to the local parts of DTensors.

What the capture of a CUDA graph would get wrong is refused here, too. So the methods themselves
know nothing of any of these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .._core import modes, pytree, transforms
from .._core.types import Tree
from .._dtensor.shards import has_sharded

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
        "init": lambda method: modes.restoring(modes.outside_autocast(method)),
        "update": _serving,
        "update_": _serving,
    }
    for name, serve in served.items():
        if name in vars(cls):
            setattr(cls, name, serve(vars(cls)[name]))


def _serving(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def serve(self: Any, grads: Tree, state: Tree, params: Tree) -> Any:
        sharded = has_sharded(params)
        own = functools.partial(_on_local_parts, method) if sharded else method
        if modes.autocasting():
            own = functools.partial(modes.without_autocast, own)
        if transforms.compiling():
            if sharded or _too_many_to_compile(params):
                return modes.uncompiled(serve, self, grads, state, params)
            return own(self, grads, state, params)
        if transforms.capturing():
            _check_replayed(self, state, params)
        enabled = torch.is_grad_enabled()
        try:
            return own(self, grads, state, params)
        except BaseException:  # an interrupt may have come before something else put it back
            modes.set_grad_enabled(enabled)
            raise

    return serve


def _on_local_parts(method: Callable[..., Any], *args: Any) -> Any:
    from .._dtensor import methods  # noqa: PLC0415  # which nobody needs who has no DTensors

    return getattr(methods, method.__name__)(method, *args)


def _check_replayed(opt: Any, state: Tree, params: Tree) -> None:
    from .captured import check_replayed  # noqa: PLC0415  # nor this, who captures nothing

    check_replayed(opt, state, params)


# Compiling takes a fraction of a second for each leaf, and more for each the more there are.
_MOST_TO_COMPILE = 400


def _too_many_to_compile(params: Tree) -> bool:
    """Whether an update that is being compiled had better stay out of the graph.

    Where it cannot, within a derivative or a vmap and in an export, it goes in at whatever length.
    """
    if transforms.exporting() or transforms.transformed():
        return False
    if isinstance(params, (dict, list, tuple)) and len(params) > _MOST_TO_COMPILE:
        return True  # without a look inside
    return len(pytree.flatten(params)[0]) > _MOST_TO_COMPILE
