"""The shapes of things: what an optimizer is, and what a tree and a schedule are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Number", "Optimizer", "Schedule", "Tree", "is_dense", "shown_layout"]

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
    wrapper around one (gradient clipping, say) is a value with the same three methods. What holds
    of the methods of all of them is said here; a class says what is special about its own.

    What may be done with its leaves, a class says in its attribute `traits`: see `Traits`.

    Example:
        >>> import funcopt
        >>> isinstance(funcopt.SGD(), funcopt.Optimizer)
        True
    """

    def init(self, params: Tree) -> StateT:
        """Return the state before the first update. Never touches `params`.

        Args:
            params: The parameters: any tree of dense floating-point or complex tensors, of which no
                two share memory. Those that `Frozen` leaves at rest may be anything.

        Raises:
            TypeError: If a leaf is anything else.
            ValueError: If two leaves share their memory.
        """
        ...

    def update(self, grads: Tree, state: StateT, params: ParamsT) -> tuple[ParamsT, StateT]:
        """Return the new parameters and the new state, in fresh memory. The inputs are not changed.

        On the CPU, small leaves of what is returned may share a storage, of up to 2**18 elements:
        clone one before you save it alone, or call `resize_` on it.

        Args:
            grads: The gradients: a tree with the keys of `params`, each like its parameter in
                shape, dtype and device, or None, which leaves that parameter alone.
            state: The state that `init` or the last update returned.
            params: The parameters.

        Returns:
            The pair `(new_params, new_state)`. Leaves of `Frozen` are the very tensors that were
            given.

        Raises:
            TypeError: If a leaf is no such tensor, or the state is that of another optimizer.
            ValueError: If the trees, or a leaf and its parameter, do not match; or if a
                hyperparameter is not one number, or is out of range, now that it is looked at again
                or its schedule is called.
        """
        ...

    def update_(self, grads: Tree, state: StateT, params: ParamsT) -> tuple[ParamsT, StateT]:
        """Do the same as `update`, written into `params` and `state`, which are returned.

        Everything is checked before anything is written. But if an interrupt (Ctrl-C) comes in the
        middle, they are half-written.

        Args:
            grads: The gradients, as for `update`, which are not written.
            state: The state, which is overwritten.
            params: The parameters, which are overwritten.

        Returns:
            The pair `(params, state)`: the trees that were given.

        Raises:
            RuntimeError: Under a transform of `torch.func`, or if a derivative would be lost: what
                goes into the update has a history, or requires a gradient and is no parameter.
            TypeError: As `update`.
            ValueError: As `update`; or if a tensor to be written is expanded, or starts in memory
                where another one, or a gradient, does.
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
