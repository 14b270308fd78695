"""One update laid out flat: trees checked, paired with the parameters, and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from . import _transforms, _tree
from ._checks import check_alike, check_count, check_distinct, check_leaves
from ._kernels import Leaves, Moved
from ._types import Tree

__all__ = ["Work", "flatten_params", "gather"]

T = TypeVar("T")


def flatten_params(params: Tree) -> tuple[list[Tensor], _tree.Structure]:
    """Return the leaves of the parameters and their structure, checked.

    Raises:
        TypeError: If a leaf is not a dense floating-point or complex tensor.
        ValueError: If two leaves share their memory.
    """
    leaves, structure = _tree.flatten(params)
    path = partial(_path, structure, "params")
    check_leaves(leaves, path)
    if not _transforms.tracing() and not _transforms.transformed():
        check_distinct(leaves, path, "the update of one would be lost or made twice")
    return leaves, structure


_ROOTS = ("params", "state.exp_avg", "state.exp_avg_sq", "state.max_exp_avg_sq")


class Work(NamedTuple):
    """One update, leaf by leaf, in the order of the parameters."""

    params: _tree.Paired
    grads: list[Tensor | None]
    steps: _tree.Paired  # one count for all, or one for each leaf
    exp_avg: _tree.Paired
    exp_avg_sq: _tree.Paired
    max_exp_avg_sq: _tree.Paired | None
    active: list[int]  # the leaves that have a gradient
    step_per_leaf: bool

    def leaves(self) -> Leaves:
        """Return the leaves that have a gradient, for a kernel."""
        grads: list[Any] = take(self.grads, self.active)
        columns = (take(paired.leaves, self.active) for paired in self._moving())
        params, exp_avgs, exp_avg_sqs, *maxima = columns
        return Leaves(params, grads, exp_avgs, exp_avg_sqs, maxima[0] if maxima else [])

    def per_leaf(self, values: Sequence[Any]) -> list[Any]:
        """Return for each leaf that has a gradient its value, out of one for each count."""
        if not self.step_per_leaf:
            return list(values) * len(self.active)
        return [values[index] for index in self.active]

    def advanced(self) -> list[Tensor]:
        """Return the counts after this update; that of a leaf left alone stands still."""
        if not self.step_per_leaf:
            return [count + 1 for count in self.steps.leaves]
        moving = set(self.active)
        return [
            count + 1 if index in moving else count.clone()
            for index, count in enumerate(self.steps.leaves)
        ]

    def written(self) -> dict[str, list[Tensor]]:
        """Return the tensors that an update in place writes, by the name of their tree."""
        moving = zip(_ROOTS, self._moving(), strict=False)
        columns = {root: take(paired.leaves, self.active) for root, paired in moving}
        return {**columns, "state.step": self.steps.leaves}

    def path(self, root: str, index: int) -> str:
        """Return the path of a leaf of `written`, or of a gradient, for a message."""
        if root == "state.step":
            return _path(self.steps.structure, root, index)
        return _path(self.params.structure, root, self.active[index])

    def moments(self) -> Iterator[Tensor]:
        """Yield the moments of all leaves."""
        for paired in self._moving()[1:]:
            yield from paired.leaves

    def rebuild(self, moved: Moved) -> list[Tree]:
        """Return the trees of parameters and moments, with copies of the leaves left alone."""
        trees = []
        for paired, tensors in zip(self._moving(), moved, strict=False):
            leaves = tensors
            if len(tensors) < len(paired.leaves):
                by_index = dict(zip(self.active, tensors, strict=True))
                leaves = [
                    by_index[i] if i in by_index else leaf.clone()
                    for i, leaf in enumerate(paired.leaves)
                ]
            if paired is self.params:
                _keep_requiring(leaves, paired.leaves)
            trees.append(paired.rebuild(leaves))
        return trees

    def _moving(self) -> list[_tree.Paired]:
        paired = [self.params, self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq]
        return [each for each in paired if each is not None]


def take(values: list[T], indices: list[int]) -> list[T]:
    """Return the values at these indices, which are in order."""
    return values if len(indices) == len(values) else [values[index] for index in indices]


def _keep_requiring(news: list[Tensor], olds: list[Tensor]) -> None:
    """Let new parameters require a gradient where the old did, unless a transform sees to that.

    A compiled graph cannot return a tensor that was told so inside it.
    """
    if _transforms.tracing() or _transforms.transformed():
        return
    for new, old in zip(news, olds, strict=True):
        if old.requires_grad and not new.requires_grad:
            new.requires_grad_()


def gather(grads: Tree, state: Any, params: Tree, *, amsgrad: bool, step_per_leaf: bool) -> Work:
    """Lay out an update flat.

    Args:
        grads: The gradients, with None for a leaf that has none.
        state: The trees `step`, `exp_avg`, `exp_avg_sq` and `max_exp_avg_sq`.
        params: The parameters.
        amsgrad: Whether `max_exp_avg_sq` is a tree like the parameters, or else `()`.
        step_per_leaf: Whether `step` is a tree like the parameters, or else one tensor.

    Raises:
        TypeError: If a leaf is not a dense floating-point or complex tensor.
        ValueError: If a tree does not match the parameters, or two parameters share memory.
    """
    leaves, structure = flatten_params(params)

    def like_params(tree: Tree, root: str, what: str) -> _tree.Paired:
        paired = _tree.pair(tree, root, structure)
        there = [i for i, leaf in enumerate(paired.leaves) if leaf is not None or root != "grads"]
        check_alike(
            take(paired.leaves, there),
            take(leaves, there),
            lambda position: _path(structure, root, there[position]),
            what,
        )
        return paired

    gradients = like_params(grads, "grads", "a gradient")
    return Work(
        params=_tree.Paired(leaves, structure, None),
        grads=gradients.leaves,
        steps=_counts(state.step, structure if step_per_leaf else None),
        exp_avg=like_params(state.exp_avg, "state.exp_avg", "a moment"),
        exp_avg_sq=like_params(state.exp_avg_sq, "state.exp_avg_sq", "a moment"),
        max_exp_avg_sq=(
            like_params(state.max_exp_avg_sq, "state.max_exp_avg_sq", "a moment")
            if _has_maximum(state, amsgrad)
            else None
        ),
        active=[index for index, grad in enumerate(gradients.leaves) if grad is not None],
        step_per_leaf=step_per_leaf,
    )


def _counts(step: Tree, structure: _tree.Structure | None) -> _tree.Paired:
    if structure is None:
        paired = _tree.Paired(*_tree.flatten(step), None)
        if len(paired.leaves) != 1 or paired.leaves[0] is not step:
            raise ValueError(
                f"state.step is {_kind(step)}: with step_per_leaf=False it is one tensor. "
                f"Make the state with init() of this optimizer."
            )
    else:
        paired = _tree.pair(step, "state.step", structure)
    for index, count in enumerate(paired.leaves):
        check_count(count, partial(_path, paired.structure, "state.step", index))
    return paired


def _has_maximum(state: Any, amsgrad: bool) -> bool:
    kept = not (isinstance(state.max_exp_avg_sq, tuple) and state.max_exp_avg_sq == ())
    if kept != amsgrad:
        raise ValueError(
            f"state.max_exp_avg_sq {'holds a tree' if kept else 'is empty'}, but this optimizer "
            f"has amsgrad={amsgrad}. Make the state with init() of this optimizer."
        )
    return kept


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"


def _path(structure: _tree.Structure, root: str, index: int) -> str:
    return _tree.paths(structure, root)[index]
