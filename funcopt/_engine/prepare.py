"""One update laid out flat: trees checked, paired with the parameters, and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from .._core import pytree, transforms
from .._core.checks import check_alike, check_distinct, check_leaves
from .._core.types import Tree
from .._dtensor.shards import agree
from . import Layout, Leaves, Moved, known, layout_of, written
from .counts import Counts, gather_counts

__all__ = [
    "Recalled",
    "Work",
    "check_untied",
    "flatten_params",
    "gather",
    "keep_requiring",
    "recall",
    "trees_of",
]

T = TypeVar("T")


def flatten_params(params: Tree) -> tuple[list[Tensor], pytree.Structure]:
    """Return the leaves of the parameters and their structure, checked.

    Raises:
        TypeError: If a leaf is not a dense floating-point or complex tensor.
        ValueError: If two leaves share their memory.
    """
    leaves, structure = pytree.flatten(params)
    check_leaves(leaves, partial(pytree.path, structure, "params"))
    check_untied(leaves, structure)
    return leaves, structure


def check_untied(leaves: list[Tensor], structure: pytree.Structure) -> None:
    """Refuse parameters that share their memory, as far as that can be told.

    Raises:
        ValueError: If two start at the same place.
    """
    if not transforms.tracing() and not transforms.transformed():
        check_distinct(
            leaves,
            lambda index: pytree.path(structure, "params", index),
            "the update of one would be lost or made twice",
        )


_ROOTS = ("params", "state.exp_avg", "state.exp_avg_sq", "state.max_exp_avg_sq")


class Work(NamedTuple):
    """One update, leaf by leaf, in the order of the parameters."""

    params: pytree.Paired
    counts: Counts
    moments: list[pytree.Paired]
    active: list[int]  # the leaves that have a gradient
    leaves: Leaves  # those leaves, for a kernel
    all_active: bool  # every leaf has a gradient
    layout: Layout | None  # what is known of them; None while operators are traced
    watched: bool  # by a tracer or another mode, or by what follows derivatives or members

    def historic(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the gradients and all moments, or nothing if none is known to have a history."""
        if self.all_active and self.layout is not None and not self.layout.others_require_grad:
            return (), ()
        return self.leaves.grads, [tensor for paired in self.moments for tensor in paired.leaves]

    def written(self) -> dict[str, list[Tensor]]:
        """Return the tensors that an update in place writes, by the name of their tree."""
        columns = dict(zip(_ROOTS, written(self.leaves), strict=True))
        columns["state.step"] = self.counts.tensors
        return columns

    def path(self, root: str, index: int) -> str:
        """Return the path of a leaf of `written`, or of a gradient, for a message."""
        if root == "state.step":
            return pytree.path(self.counts.paired.structure, root, index)
        return pytree.path(self.params.structure, root, self.active[index])

    def rebuild(self, moved: Moved) -> list[Tree]:
        """Return the trees of parameters and moments, with copies of the leaves left alone."""
        columns = list(moved)
        if not self.all_active:
            columns = [
                self._filled(paired.leaves, tensors)
                for paired, tensors in zip([self.params, *self.moments], moved, strict=False)
            ]
        self._keep_requiring(columns[0])
        moments = [
            paired.rebuild(tensors)
            for paired, tensors in zip(self.moments, columns[1:], strict=False)
        ]
        return [self.params.rebuild(columns[0]), *moments]

    def _filled(self, olds: list[Tensor], news: list[Tensor]) -> list[Tensor]:
        by_index = dict(zip(self.active, news, strict=True))
        return [by_index[i] if i in by_index else old.clone() for i, old in enumerate(olds)]

    def _keep_requiring(self, news: list[Tensor]) -> None:
        """Let new parameters require a gradient where the old did, but for a transform's sake.

        A compiled graph cannot return a tensor that was told so inside it.
        """
        if self.layout is None or (self.all_active and not self.layout.params_require_grad):
            return
        if transforms.transformed():
            return
        keep_requiring(news, self.params.leaves)


def keep_requiring(news: Sequence[Tensor], olds: Sequence[Tensor]) -> None:
    """Let new parameters require a gradient where the old did."""
    for new, old in zip(news, olds, strict=True):
        if old.requires_grad and not new.requires_grad:
            new.requires_grad_()


def gather(grads: Tree, state: Any, params: Tree, *, amsgrad: bool, step_per_leaf: bool) -> Work:
    """Lay out an update flat, checked.

    Args:
        grads: The gradients, with None for a leaf that has none.
        state: The trees `step`, `exp_avg`, `exp_avg_sq` and `max_exp_avg_sq`.
        params: The parameters.
        amsgrad: Whether `max_exp_avg_sq` is a tree like the parameters, or else `()`.
        step_per_leaf: Whether `step` is a tree like the parameters, or else one tensor.

    Raises:
        TypeError: If a leaf is not a dense floating-point or complex tensor.
        ValueError: If a tree does not match the parameters.
    """
    trees = trees_of(grads, state, params, amsgrad=amsgrad)
    tracing = transforms.tracing()
    work = None if tracing else _gather_known(trees, state.step, step_per_leaf)
    if work is not None:
        return work
    leaves, structure = pytree.flatten(params)
    if len(leaves) == 1:  # as a module is, which is refused here, before its gradients are blamed
        check_leaves(leaves, partial(pytree.path, structure, "params"))
    own = pytree.Paired(leaves, structure, None)
    gradients, *moments = (
        pytree.pair(tree, root, structure)
        for tree, root in zip(trees[1:], ("grads", *_ROOTS[1:]), strict=False)
    )
    counts = gather_counts(state.step, structure if step_per_leaf else None)
    active = [index for index, grad in enumerate(gradients.leaves) if grad is not None]
    moving = _leaves([_take(paired.leaves, active) for paired in (own, gradients, *moments)])
    all_active = len(active) == len(leaves)
    layout = known(moving) if all_active and not tracing and _agree(moving) else None
    if layout is None:
        _check(own, gradients, moments, active)
        layout = None if tracing else layout_of(moving)
    watched = _is_watched(moving, counts)
    return Work(own, counts, moments, active, moving, all_active, layout, watched)


def trees_of(grads: Tree, state: Any, params: Tree, *, amsgrad: bool) -> list[Tree]:
    """Return all trees of an update that are like the parameters, those first.

    Raises:
        ValueError: If the state has a maximum and the optimizer does not, or the other way round.
    """
    _check_maximum(state, params, amsgrad)
    trees = [params, grads, state.exp_avg, state.exp_avg_sq]
    return [*trees, state.max_exp_avg_sq] if amsgrad else trees


class Recalled(NamedTuple):
    """Trees whose leaves look as leaves looked that were checked before."""

    leaves: Leaves
    structure: pytree.Structure  # of every one of them
    layout: Layout


def recall(trees: list[Tree]) -> Recalled | None:
    """Lay out trees flat without checking anything, if all that is to be checked is known."""
    found = pytree.columns_of_dicts(trees)
    if found is None:
        return None
    columns, structure = found
    leaves = _leaves(columns)
    layout = known(leaves) if _agree(leaves) else None
    return None if layout is None else Recalled(leaves, structure, layout)


def _gather_known(trees: list[Tree], step: Tree, step_per_leaf: bool) -> Work | None:
    recalled = recall(trees)
    if recalled is None:
        return None
    leaves, structure, layout = recalled
    params, _, *moments = [pytree.Paired(c, structure, None) for c in leaves[: len(trees)]]
    counts = gather_counts(step, structure if step_per_leaf else None)
    active = list(range(len(leaves.params)))
    watched = _is_watched(leaves, counts)
    return Work(params, counts, moments, active, leaves, True, layout, watched)


def _is_watched(leaves: Leaves, counts: Counts) -> bool:
    return transforms.observed() or transforms.watched(*leaves, counts.tensors)


def _leaves(columns: list[Any]) -> Leaves:
    return Leaves(*columns, *([[]] if len(columns) < len(Leaves._fields) else []))


def _agree(leaves: Leaves) -> bool:
    return agree(leaves.params, leaves[1:])


def _take(values: list[T], indices: list[int]) -> list[T]:
    """Return the values at these indices, which are in order."""
    return values if len(indices) == len(values) else [values[index] for index in indices]


def _check(
    params: pytree.Paired, grads: pytree.Paired, moments: list[pytree.Paired], active: list[int]
) -> None:
    """Check leaf by leaf, to name the one that is wrong."""
    structure = params.structure
    check_leaves(params.leaves, partial(pytree.path, structure, "params"))
    check_alike(
        _take(grads.leaves, active),
        _take(params.leaves, active),
        lambda position: pytree.path(structure, "grads", active[position]),
        "a gradient",
    )
    for root, paired in zip(_ROOTS[1:], moments, strict=False):
        path = partial(pytree.path, structure, root)
        check_alike(paired.leaves, params.leaves, path, "a moment")


def _check_maximum(state: Any, params: Tree, amsgrad: bool) -> None:
    kept = not (isinstance(state.max_exp_avg_sq, tuple) and state.max_exp_avg_sq == ())
    if kept != amsgrad and (kept or not isinstance(params, tuple) or params):  # () is that of ()
        raise ValueError(
            f"state.max_exp_avg_sq {'holds a tree' if kept else 'is empty'}, but this optimizer "
            f"has amsgrad={amsgrad}. Make the state with init() of this optimizer."
        )
