"""The shapes of things: what an optimizer is, and what a tree and a schedule are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Number", "Optimizer", "ParamsT", "Schedule", "Tree", "is_dense", "shown_layout"]

Tree: TypeAlias = Any
"""Tensors in any nest of dicts, lists, tuples, NamedTuples or registered pytree nodes.

A bare tensor is a tree of one leaf. No type checker can spell this, so it is an alias of `Any`.
"""

Number: TypeAlias = float | Tensor
"""A Python number or a 0-dim tensor."""

Schedule: TypeAlias = Callable[[Tensor], Number]
"""A pure function from the count of updates made so far (a 0-dim tensor) to a hyperparameter."""

ParamsT = TypeVar("ParamsT")
StateT = TypeVar("StateT")


@runtime_checkable
class Optimizer(Protocol[StateT]):
    """What every optimizer here is: a value with three methods.

    There is no base class to inherit from: whatever has these methods is an optimizer, and a
    wrapper around one (gradient clipping, say) is a value with the same three methods.

    What may be done with its leaves, a class says in its attribute `traits`: see `Traits`.

    Example:
        >>> import funcopt
        >>> isinstance(funcopt.AdamW(), funcopt.Optimizer)
        True
    """

    def init(self, params: Tree) -> StateT:
        """Return the state before the first update. Never touches `params`."""
        ...

    def update(self, grads: Tree, state: StateT, params: ParamsT) -> tuple[ParamsT, StateT]:
        """Return the new parameters and the new state; the inputs are left as they are."""
        ...

    def update_(self, grads: Tree, state: StateT, params: ParamsT) -> tuple[ParamsT, StateT]:
        """Do the same, written into `params` and `state`, which are returned.

        If an interrupt (Ctrl-C) comes in the middle, they are half-written.
        """
        ...


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is strided and not nested: some nested tensors have that layout, too.

    What looks at every leaf of every step asks both questions itself, which takes half the time.
    """
    return tensor.layout is torch.strided and not tensor.is_nested


def shown_layout(tensor: Tensor) -> str:
    """Return the layout of a tensor that is not dense, as messages have it."""
    return "a nested layout" if tensor.is_nested else f"layout {tensor.layout}"
