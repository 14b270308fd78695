"""A second tree of parameters in a state, that follows the first: its start, and how it moves.

`Ema` follows at every step, `Lookahead` at every so many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.tensors import compute_dtype, view_as_complex_like, view_as_real, write
from .._core.types import Number, Optimizer, Tree
from .._dtensor.shards import check_placed
from .._engine.checks import check_apart, check_writable, is_like, kind_of, of_members
from .base import Gradients, check_inplace, gather_params, records

__all__ = ["Follower", "begin"]

# Private in name only: torch's own averages of weights are made of it.
_AT_ONCE = hasattr(torch, "_foreach_lerp") and hasattr(torch, "_foreach_lerp_")


def begin(
    opt: Optimizer[Any], params: Tree, kept_in: Callable[[torch.dtype], torch.dtype]
) -> tuple[Tree, list[Tensor]]:
    """Return a tree of copies of the parameters, and those leaves that are not at rest.

    What depends on the parameters has its derivative in them, where an update would be recorded.

    Args:
        opt: The optimizer whose state it is for.
        params: The parameters.
        kept_in: Gives the dtype of a copy, from that of the parameter.

    Raises:
        TypeError: If a leaf is not a dense floating-point or complex tensor, unless it is at rest.
        ValueError: If two leaves share their memory.
    """
    own = gather_params(opt, params)
    none = pytree.Paired([None for _ in own.leaves], own.structure, None)
    no_gradients = Gradients(own.leaves, own.structure, none)
    with torch.set_grad_enabled(records(opt, no_gradients, ())):
        copies = [leaf.to(kept_in(leaf.dtype), copy=True) for leaf in own.leaves]
    return pytree.unflatten(own.structure, copies), own.moving


class Follower(NamedTuple):
    """The second tree beside the parameters, laid out flat and checked."""

    gradients: Gradients  # with the parameters
    root: str
    paired: pytree.Paired

    @classmethod
    def gather(
        cls,
        gradients: Gradients,
        root: str,
        tree: Tree,
        kept_in: Callable[[torch.dtype], torch.dtype],
    ) -> Follower:
        """Pair the tree with the parameters.

        Raises:
            ValueError: If it does not match them.
        """
        paired = pytree.pair(tree, root, gradients.structure)
        path = partial(pytree.path, gradients.structure, root)
        check_placed(paired.leaves, gradients.params, path, "what follows a parameter")
        for index, (leaf, param) in enumerate(zip(paired.leaves, gradients.params, strict=True)):
            wanted = param.shape, kept_in(param.dtype), param.device
            if not is_like(leaf, *wanted):
                raise ValueError(
                    f"{path(index)} does not go with a parameter of {param.dtype}, shape "
                    f"{tuple(param.shape)}, on {param.device}: it is {kind_of(leaf)}, and must be "
                    f"a dense tensor of {wanted[1]}, of this shape, and there. Make the state with "
                    f"init() from these parameters.{of_members()}"
                )
        return cls(gradients, root, paired)

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors, in the order of the parameters."""
        return self.paired.leaves

    def toward(self, goals: Sequence[Tensor], share: Number) -> list[Tensor]:
        """Return the tree moved by a share of its way to where the parameters are now.

        A leaf at rest has no way to go: what follows it is a copy of it as it is.
        """
        moving, resting = self.gradients.moving, self.gradients.resting
        moved = _lerp(moving(self.leaves), moving(goals), share)
        if not resting:
            return moved
        there = {i: goals[i].to(self.leaves[i].dtype, copy=True) for i in resting}
        others = iter(moved)
        return [there[i] if i in there else next(others) for i in range(len(goals))]

    def toward_(self, goals: Sequence[Tensor], share: Number) -> None:
        """Move the tree there in place."""
        moving = self.gradients.moving
        _lerp_(moving(self.leaves), moving(goals), share)
        for index in self.gradients.resting:
            write(self.leaves[index], goals[index])

    def check_inplace(self, numbers: Mapping[str, object], counts: Mapping[str, Tensor]) -> None:
        """Refuse to write the tree and these counts where that would lose a derivative or memory.

        Args:
            numbers: The hyperparameters of the wrapper, by name.
            counts: What it writes besides, by name.

        Raises:
            RuntimeError: Under a transform, or if anything here has a history.
            ValueError: If one of its tensors is expanded, or starts where another one, a gradient
                or a parameter does.
        """
        own, names = [*self.leaves, *counts.values()], list(counts)
        paths = partial(pytree.path, self.gradients.structure)

        def path(index: int) -> str:
            if index < len(self.leaves):
                return paths(self.root, index)
            index -= len(self.leaves)
            return names[index] if index < len(names) else paths("params", index - len(names))

        check_inplace(numbers, counts, self.gradients, (self.root, self.leaves))
        if not transforms.tracing():
            check_writable(own, path)
            check_apart([*own, *self.gradients.params], [], path, str)


def _lerp(starts: list[Tensor], ends: list[Tensor], weight: Number) -> list[Tensor]:
    """Return start + weight * (end - start) of each pair, in the dtypes of the starts.

    The numbers are those of `torch.lerp`: at a weight of 1, the very end.
    """
    if isinstance(weight, float) and _at_once(starts, ends):
        return list(torch._foreach_lerp(starts, _alike(ends, starts), weight))
    return [_between(*pair, weight) for pair in zip(starts, ends, strict=True)]


def _lerp_(starts: list[Tensor], ends: list[Tensor], weight: Number) -> None:
    """Move the starts there, in place."""
    if not isinstance(weight, float) or not _at_once(starts, ends):
        for start, end in zip(starts, ends, strict=True):
            write(start, _between(start, end, weight))
    elif all(start.dtype is end.dtype for start, end in zip(starts, ends, strict=True)):
        torch._foreach_lerp_(starts, ends, weight)
    else:
        # One by one, so that no more than one of them is there twice.
        for start, end in zip(starts, ends, strict=True):
            start.lerp_(end.to(start.dtype), weight)


def _alike(ends: Sequence[Tensor], starts: Sequence[Tensor]) -> list[Tensor]:
    return [end.to(start.dtype) for start, end in zip(starts, ends, strict=True)]


def _between(start: Tensor, end: Tensor, weight: Number) -> Tensor:
    """Return the one: by way of float32 in 16 bits, and of pairs of real ones if complex."""
    wide = compute_dtype(start.dtype)
    origin, goal = view_as_real(start.to(wide)), view_as_real(end.to(wide))
    own = weight.to(origin) if isinstance(weight, Tensor) else weight
    return view_as_complex_like(torch.lerp(origin, goal, own), start).to(start.dtype)


def _at_once(starts: Sequence[Tensor], ends: Sequence[Tensor]) -> bool:
    """Whether one call for all will do, since nobody follows each operator."""
    tensors = [*starts, *ends]
    return (
        _AT_ONCE
        and len(starts) > 0
        and not transforms.observed()
        and not transforms.watched(tensors)
        and transforms.all_plain(tensors)
        and not any(map(Tensor.is_complex, tensors))
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )
