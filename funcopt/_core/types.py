"""The shapes of things: what an optimizer is, and what a tree and a schedule are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

from torch import Tensor

__all__ = ["Number", "Optimizer", "Schedule", "Tree"]

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

    A class may say what decides how a leaf moves. `elementwise = True`: each element moves by its
    own gradient, value and state, as with Adam. `leafwise = True`: each leaf moves by itself, as
    with Muon. `leafwise = False`: leaves are looked at together, as for a norm over all gradients.
    A wrapper says it of what it does itself. `update_in_backward` relies on it, and takes what says
    nothing for `leafwise = False`; `funcopt.testing` holds an optimizer to what it says.

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
