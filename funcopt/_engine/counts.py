"""How many updates were made: one count for the whole tree, or one for each leaf."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.arithmetic import write
from .._core.types import Number, Tree
from .checks import check_count

__all__ = [
    "Counts",
    "first_count",
    "fresh",
    "gather_counts",
    "next_step",
    "place_for_count",
    "value_of",
]

T = TypeVar("T")


class Counts(NamedTuple):
    """The counts of a state."""

    paired: pytree.Paired
    per_leaf: bool

    @property
    def tensors(self) -> list[Tensor]:
        """The counts: one, or those of the leaves in the order of the parameters."""
        return self.paired.leaves

    def around(self, moving: list[int], after: list[Number]) -> tuple[list[Tensor], list[Number]]:
        """Return the counts that an update goes by, before it and after it.

        A leaf without a gradient has no part in it: where each leaf has a count of its own, that of
        such a leaf counts nothing yet, perhaps, and no number is asked for it.

        Args:
            moving: The leaves that have a gradient.
            after: All counts after the update.
        """
        if not self.per_leaf:
            return self.tensors, after
        return [self.tensors[index] for index in moving], [after[index] for index in moving]

    def of_leaves(self, values: list[T]) -> T | list[T]:
        """Return of one value for each of those counts one for all leaves, or one for each leaf."""
        if not self.per_leaf:
            return values[0]
        return values[0] if len(set(map(id, values))) == 1 else values

    def after(self, moving: list[int], watched: bool) -> list[Number]:
        """Return the counts after an update of these leaves; those of other leaves stand still.

        A count whose value is at hand is returned as a float: all that is done with it then takes
        a fraction of the time.

        Args:
            moving: The leaves that have a gradient.
            watched: Whether somebody follows the operators, so that values are not to be read.
        """
        counts: list[Number] = list(self.tensors) if watched else list(map(value_of, self.tensors))
        advancing = set(moving) if self.per_leaf else {0}
        return [count + 1 if index in advancing else count for index, count in enumerate(counts)]

    def rebuild(self, counts: list[Number]) -> Tree:
        """Return the tree of counts with these values, in fresh memory."""
        tensors = [fresh(new, old) for old, new in zip(self.tensors, counts, strict=True)]
        return self.paired.rebuild(tensors)

    def write(self, counts: list[Number]) -> None:
        """Write these values into the counts."""
        for old, new in zip(self.tensors, counts, strict=True):
            if isinstance(new, Tensor):
                write(old, new)
            else:
                old.fill_(new)


def place_for_count(leaves: Sequence[Tensor]) -> torch.device:
    """Return the device for a count: the GPU if all leaves are on one, else the CPU.

    There, a captured CUDA graph counts on at each replay.
    """
    devices = {leaf.device for leaf in leaves}
    on_gpu = len(devices) == 1 and next(iter(devices)).type == "cuda"
    return devices.pop() if on_gpu else torch.device("cpu")


def first_count(place: torch.device) -> Tensor:
    """Return a new count of 0. In float64 it counts on where float32 stops, at 2**24."""
    return torch.zeros((), dtype=torch.float64, device=place)


def next_step(step: Tree, moves: bool | Tensor = True) -> Tree:
    """Return the count of a wrapper after an update, if it has one: `()` stays `()`.

    Args:
        step: The count before it.
        moves: Whether the update was made.
    """
    if not isinstance(step, Tensor):
        return step
    made = moves.to(step.device) if isinstance(moves, Tensor) else int(moves)
    return step.detach() + made


def value_of(count: Tensor) -> Number:
    """Return the value of a count, if it can be read at no price; else the count itself."""
    readable = (
        type(count) is Tensor
        and count.dtype is torch.float64
        and transforms.on_host(count)
        and not count.requires_grad
    )
    return float(count.item()) if readable else count


def fresh(new: Number, old: Tensor) -> Tensor:
    """Return a new count of this value, like the old one."""
    if not isinstance(new, Tensor):
        return torch.scalar_tensor(new, dtype=old.dtype, device=old.device)
    return new.clone() if new is old else new


def gather_counts(step: Tree, structure: pytree.Structure | None) -> Counts:
    """Return the counts, checked.

    Args:
        step: A tensor of shape (), or a tree of them.
        structure: That of the parameters, if each leaf has a count of its own.

    Raises:
        TypeError: If a count is not a tensor of a dtype that can count.
        ValueError: If it is not of shape (), or the tree does not match the parameters.
    """
    if structure is None:
        paired = pytree.Paired(*pytree.flatten(step), None)
        if len(paired.leaves) != 1 or paired.leaves[0] is not step:
            raise ValueError(
                f"state.step is a {type(step).__name__}: with step_per_leaf=False it is one "
                f"tensor. Make the state with init() of this optimizer."
            )
    else:
        paired = pytree.pair(step, "state.step", structure)
    for index, count in enumerate(paired.leaves):
        check_count(count, partial(pytree.path, paired.structure, "state.step", index))
    return Counts(paired, structure is not None)
