"""A tree in a state that goes beside the parameters: pairing it with them, and moving it.

`Ema` keeps its average so, `Lookahead` its slow parameters, `MasterWeights` its copies.
`Accumulate` pairs its sums likewise, and `Compensated` what rounding lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._core import pytree, tensors, transforms
from .._core.tensors import write
from .._core.types import Number, Optimizer, Tree, kind_of
from .._dtensor.shards import check_placed
from .._engine.checks import check_apart, is_like, of_members
from .._engine.memory import known, layout_of
from .._engine.prepare import are_shards, may_recall
from .._engine.rule import StepInputs
from ._shared import (
    Gradients,
    check_wrapper_inplace,
    gather_params,
    records,
)

DtypeOf: TypeAlias = Callable[[torch.dtype], torch.dtype]
"""Gives the dtype of a leaf of the tree, from that of its parameter."""


def own_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a leaf that has the dtype of its parameter."""
    return dtype


def copy_params(opt: Optimizer[Any], params: Tree, dtype_of: DtypeOf) -> tuple[Tree, list[Tensor]]:
    """Return a tree of copies of the parameters, and those parameters that are not at rest.

    A copy has its derivative in its parameter, where an update would be recorded. The parameters
    are checked, as `gather_params` does for this optimizer.
    """
    own = gather_params(opt, params)
    none = pytree.Paired([None for _ in own.leaves], own.structure, None)
    no_gradients = Gradients(own.leaves, own.structure, none)
    with torch.set_grad_enabled(records(opt, no_gradients, ())):
        copies = [leaf.to(dtype_of(leaf.dtype), copy=True) for leaf in own.leaves]
    return pytree.unflatten(own.structure, copies), own.moving


def copied_params(opt: Optimizer[Any], params: Tree) -> Tree:
    """Return a tree of copies of the parameters, for the `init` of a wrapper that keeps one.

    Copies of parameters that merely require a gradient, as `nn.Parameter`s do, are detached; under
    `torch.func`, and where parameters have a history, a copy has its derivative in its parameter.

    Args:
        opt: The wrapper.
        params: The parameters.

    Returns:
        A tree like theirs.

    Raises:
        TypeError: If a leaf is not a dense floating-point or complex tensor, unless it is at rest.
        ValueError: If two leaves share their memory.

    Example:
        >>> import torch, funcopt
        >>> from funcopt import extend
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> extend.copied_params(funcopt.SGD(lr=0.1), w)
        tensor([1., 1.])
        >>> torch.func.grad(lambda w: extend.copied_params(funcopt.SGD(), w).sum())(torch.ones(2))
        tensor([1., 1.])
    """
    return copy_params(opt, params, own_dtype)[0]


def leaves_beside(gradients: Gradients, path: str, tree: Tree) -> list[Tensor]:
    """Return the leaves of a tree of a wrapper's state that goes beside the parameters.

    They are in the order of `gradients.params` and `gradients.leaves`, whatever the order of keys.

    Args:
        gradients: The gradients beside their parameters.
        path: What the tree is called in messages, such as `"state.start"`.
        tree: The tree, as `copied_params` makes one.

    Returns:
        The leaves.

    Raises:
        ValueError: If the tree is not like that of the parameters, or a leaf has not the shape,
            dtype and device of its parameter.

    Example:
        >>> import torch, funcopt
        >>> from funcopt import extend
        >>> params = {"a": torch.ones(1), "b": torch.ones(2)}
        >>> gradients = extend.gather_gradients(funcopt.SGD(lr=0.1), params, params)
        >>> own = {"b": torch.zeros(2), "a": torch.zeros(1)}
        >>> extend.leaves_beside(gradients, "state.start", own)
        [tensor([0.]), tensor([0., 0.])]
    """
    return ShadowParams.gather(gradients, path, tree, own_dtype).leaves


def _are_known(beside: StepInputs, dtype_of: DtypeOf) -> bool:
    """Whether the trees look as trees did that were checked; other dtypes were right for others."""
    layout = None if are_shards() else known(beside)
    if layout is None:
        return False
    found: bool | None = layout.plans.get(dtype_of)
    if found is None:
        pairs = zip(beside.slots[0], beside.params, strict=True)
        found = all(own.dtype is dtype_of(param.dtype) for own, param in pairs)
        layout.plans[dtype_of] = found
    return found


class ShadowParams(NamedTuple):
    """A tree in a state that goes beside the parameters, laid out flat and checked."""

    gradients: Gradients  # with the parameters
    root: str  # the path of the tree
    paired: pytree.Paired

    @classmethod
    def gather(
        cls,
        gradients: Gradients,
        root: str,
        tree: Tree,
        dtype_of: DtypeOf,
        what: str = "what follows a parameter",
        relation: str = "does not go with a parameter",
    ) -> ShadowParams:
        """Pair a tree with the parameters, and refuse a leaf that does not match its parameter.

        Messages say by `what` what a leaf is, and by `relation` what is wrong with it.
        """
        paired = pytree.pair(tree, root, gradients.structure)
        beside = StepInputs(gradients.params, [], (paired.leaves,))
        if not gradients.resting and may_recall() and _are_known(beside, dtype_of):
            return cls(gradients, root, paired)
        path = partial(pytree.path, gradients.structure, root)
        check_placed(paired.leaves, gradients.params, path, what)
        for index, (leaf, param) in enumerate(zip(paired.leaves, gradients.params, strict=True)):
            wanted = param.shape, dtype_of(param.dtype), param.device
            if not is_like(leaf, *wanted):
                raise ValueError(
                    f"{path(index)} {relation} of {param.dtype}, shape {tuple(param.shape)}, on "
                    f"{param.device}: it is {kind_of(leaf)}, and must be a dense tensor of "
                    f"{wanted[1]}, of this shape, and there. Make the state with init() from these "
                    f"parameters.{of_members()}"
                )
        if not gradients.resting and may_recall():
            layout_of(beside)  # by which they are known next time
        return cls(gradients, root, paired)

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors, in the order of the parameters."""
        return self.paired.leaves

    def lerp(self, params: Sequence[Tensor], weight: Number) -> list[Tensor]:
        """Return the tree moved by a share of the way to these parameters.

        Beside a leaf at rest there is a copy of it.
        """
        moving, resting = self.gradients.moving, self.gradients.resting
        moved = tensors.lerp(moving(self.leaves), moving(params), weight)
        if not resting:
            return moved
        copies = {i: params[i].to(self.leaves[i].dtype, copy=True) for i in resting}
        return self.gradients.with_resting(moved, copies)

    def lerp_(self, params: Sequence[Tensor], weight: Number) -> None:
        """Do the same in place."""
        moving = self.gradients.moving
        tensors.lerp_(moving(self.leaves), moving(params), weight)
        for index in self.gradients.resting:
            write(self.leaves[index], params[index])

    def check_wrapper_inplace(
        self, numbers: Mapping[str, object], own: Mapping[str, Tensor]
    ) -> None:
        """Refuse to write the tree and the wrapper's own tensors, as `check_wrapper_inplace` does.

        Nor may one of them be expanded, or start where a parameter does.
        """
        written, names = [*self.leaves, *own.values()], list(own)
        leaf_path = partial(pytree.path, self.gradients.structure)

        def path(index: int) -> str:
            if index < len(self.leaves):
                return leaf_path(self.root, index)
            index -= len(self.leaves)
            return names[index] if index < len(names) else leaf_path("params", index - len(names))

        check_wrapper_inplace(numbers, own, self.gradients, (self.root, self.leaves))
        if not transforms.tracing():
            check_apart([*written, *self.gradients.params], [], path, str)
