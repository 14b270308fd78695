"""Groups of leaves, each with an optimizer of its own: what torch.optim calls param groups."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Unpack, overload

from torch import Tensor

from .._core import pytree
from .._core.inner import InnerStateT, OptimizerLike
from .._core.types import (
    Extras,
    ParamsT,
    Traits,
    Tree,
    at_rest,
    check_is_optimizer,
    leaves_at_rest,
    may_rest,
)
from .._dtensor.shards import whole_of
from .._engine.checks import check_dense, check_state
from .._engine.prepare import check_untied
from .._engine.registration import register_optimizer, state_class
from .._engine.scaled import hands_on
from .._engine.stacked import Finish, Stack
from .._engine.stacked_wrappers import plan_stacked, plans_members
from ._together import Update, update_together_
from .labels import Labels, check_labels, label_leaves, name_leaves, patterns_in


@state_class
class PartitionState(NamedTuple, Generic[InnerStateT]):
    """The state of `Partition`.

    Attributes:
        inner: The state of each optimizer, by its label. Its trees are flat dicts from the names of
            its leaves, so that a checkpoint has entries such as
            `state.inner['decay'].momentum_buffer['0.weight']`.
    """

    inner: dict[str, InnerStateT]


@register_optimizer
@dataclass(frozen=True)
class Partition(Generic[InnerStateT]):
    """An optimizer for each group of leaves: what `torch.optim` calls param groups.

    Each leaf has one label, and moves as the optimizer of that label moves it. An optimizer is
    given its own leaves alone, as a flat dict from name to leaf, where the name of a leaf is its
    keys joined by dots, as modules name parameters: `layers.0.weight`. What looks at all leaves
    at once, such as the norm of their gradients, then sees those of one group inside a `Partition`,
    and those of every group around it: `Clip(Partition(...))` clips by the norm of the whole.

    A mask of weight decay is a partition in two, for which `decay_label` knows the usual rule.
    Leaves that are not to move go to `Frozen()`.

    Labels that come out differently at an update than they did at `init` are an error, since the
    state does not match then. A function must depend on names, shapes and dtypes alone.

    Args:
        inner: The optimizers, by label. Each must come to have a leaf, so that a label that is
            misspelt is noticed; but those that a function names in its attribute `possible_labels`
            need not, as with `decay_label`, and it gives no others.
        labels: Which leaf has which label, said in one of three ways: a function
            `label(name, leaf) -> str`; a tree of labels with the keys of the parameters; or a dict
            from compiled regular expressions to labels, `{re.compile(r"bias$"): "no_decay", ...}`,
            of which each is searched for in every name. A leaf in whose name several are found is
            fine if they agree on its label.

    Raises:
        TypeError: If `inner` is not a dict from strings to optimizers, or a label is no string.
        ValueError: If `inner` is empty, or a label in `labels` is not in it, or one of it is not
            among the `possible_labels` of a function.

    Example:
        >>> import re, torch, funcopt
        >>> opt = funcopt.Partition(
        ...     {"body": funcopt.Frozen(), "head": funcopt.SGD(lr=0.1, momentum=0.9)},
        ...     labels={re.compile("^body"): "body", re.compile("^head"): "head"},
        ... )
        >>> params = {"body": [torch.ones(2)], "head": torch.ones(2)}
        >>> state = opt.init(params)
        >>> params, state = opt.update({"head": torch.ones(2)}, state, params)
        >>> params
        {'body': [tensor([1., 1.])], 'head': tensor([0.9000, 0.9000])}
        >>> state.inner["head"].momentum_buffer
        {'head': tensor([1., 1.])}
    """

    traits: ClassVar[Traits] = Traits(elementwise=True, linear=True, tells_leaves_apart=True)

    inner: Mapping[str, OptimizerLike[InnerStateT]]
    labels: Labels

    if TYPE_CHECKING:
        # Optimizers of several classes have states of several types, which have no type together.
        @overload
        def __init__(
            self, inner: Mapping[str, OptimizerLike[InnerStateT]], labels: Labels
        ) -> None: ...
        @overload
        def __init__(
            self: Partition[Any], inner: Mapping[str, OptimizerLike[Any]], labels: Labels
        ) -> None: ...
        def __init__(self, inner: Mapping[str, OptimizerLike[Any]], labels: Labels) -> None: ...

    def __post_init__(self) -> None:
        """Check the optimizers and, as far as they can be without parameters, the labels."""
        if not isinstance(self.inner, Mapping):
            raise TypeError(
                f"inner is of type {type(self.inner).__name__}: it must be a dict from labels to "
                f"optimizers, such as {{'decay': Adam(weight_decay=0.1)}}."
            )
        if not self.inner:
            raise ValueError("inner={}: there must be an optimizer for one label at least.")
        for label, opt in self.inner.items():
            if not isinstance(label, str):
                raise TypeError(f"inner has the label {label!r}: a label must be a string.")
            check_is_optimizer(f"inner[{label!r}]", opt)
        object.__setattr__(self, "inner", dict(self.inner))
        check_labels(self.labels, self.inner)
        object.__setattr__(self, "_patterns", patterns_in(self.labels))

    def init(self, params: Tree) -> PartitionState[InnerStateT]:
        """Return the state before the first update: that of each optimizer for its own leaves.

        Raises:
            TypeError: If an optimizer refuses a leaf, or a label is no string.
            ValueError: If a leaf has no label, an unknown one, or two; if a label or a pattern has
                no leaf; if two leaves have one name, or start at the same place in memory.
        """
        groups = self._groups(params)
        own = groups.of(groups.leaves)
        return PartitionState({label: opt.init(own[label]) for label, opt in self.inner.items()})

    def update(
        self,
        grads: Tree,
        state: PartitionState[InnerStateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, PartitionState[InnerStateT]]:
        """Return the new parameters and the new state, in fresh memory but for frozen leaves.

        Gradients of frozen leaves may be missing. Messages of the optimizers call leaves by their
        names: `grads['layers.0.weight']`.
        """
        return self._update_scaled(grads, None, state, params, in_place=False)

    def update_(
        self,
        grads: Tree,
        state: PartitionState[InnerStateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, PartitionState[InnerStateT]]:
        """Do the same as `update` in place. Every group is checked before any is written.

        An optimizer that is made by a rule can be checked by itself. Where there are several others
        (wrappers, say), all but the largest of these make their updates out of place first for that
        purpose, which takes memory of their size; a wrapper around the `Partition` costs none.
        """
        return self._update_scaled(grads, None, state, params, in_place=True)

    def _update_scaled(
        self,
        grads: Tree,
        grad_scale: Tensor | None,
        state: PartitionState,
        params: ParamsT,
        *,
        in_place: bool,
    ) -> tuple[ParamsT, PartitionState]:
        """Update by gradients times a number of shape (); None is 1."""
        groups = self._groups(params)
        updates = self._updates(groups, grads, state, grad_scale)
        if in_place:
            update_together_(updates)
            return params, state
        moved = {label: update.make(in_place=False) for label, update in updates.items()}
        new_params = groups.rebuild([own for own, _ in moved.values()])
        return new_params, PartitionState({label: own for label, (_, own) in moved.items()})

    def _plan_members(self, stack: Stack) -> Finish | None:
        """Return what updates stacked members: all groups are planned before any is moved."""
        leaves, structure = pytree.flatten(stack.params)
        # What has a label by its shape, say, is a leaf of one member.
        groups = self._group([leaf[0] for leaf in leaves], structure)._replace(leaves=leaves)
        plans = {}
        for label, own in self._updates(groups, stack.grads, stack.state).items():
            given = stack._replace(grads=own.grads, state=own.state, params=own.params)
            plan = plan_stacked(own.opt, given)
            if plan is None:
                return None
            plans[label] = plan

        def update() -> tuple[Tree, PartitionState]:
            moved = {label: plan() for label, plan in plans.items()}
            new_params = groups.rebuild([own for own, _ in moved.values()])
            return new_params, PartitionState({label: own for label, (_, own) in moved.items()})

        return update

    def _groups(self, params: Tree) -> _Groups:
        leaves, structure = pytree.flatten(params)
        check_untied(leaves, structure)
        return self._group(leaves, structure)

    def _group(self, leaves: Sequence[Any], structure: pytree.Structure) -> _Groups:
        """Find out which leaf belongs to which optimizer."""
        names = name_leaves(structure)
        wholes = [whole_of(leaf) for leaf in leaves]
        patterns = getattr(self, "_patterns", None)  # a transform rebuilds the fields alone
        labels = self.labels if patterns is None else patterns
        found = label_leaves(labels, list(self.inner), names, wholes, structure)
        members: dict[str, list[int]] = {label: [] for label in self.inner}
        for index, label in enumerate(found):
            members[label].append(index)
        return _Groups(leaves, structure, names, members)

    def _updates(
        self, groups: _Groups, grads: Tree, state: PartitionState, grad_scale: Tensor | None = None
    ) -> dict[str, Update]:
        """Return the update of each optimizer, by its label."""
        check_state(state, PartitionState)
        if state.inner.keys() != self.inner.keys():
            has, wanted = (", ".join(map(repr, own)) for own in (state.inner, self.inner))
            raise ValueError(
                f"state.inner has the labels {has}, this optimizer has {wanted}. Make the state "
                f"with init() of this optimizer."
            )
        resting = self._resting(groups)
        gradients = pytree.pair(grads, "grads", groups.structure, resting).leaves
        both = (*groups.leaves, *gradients)
        if [leaf for leaf in both if isinstance(leaf, Tensor) and leaf.is_nested]:
            check_dense(groups.leaves, partial(groups.path, "params"), resting)
            check_dense(gradients, partial(groups.path, "grads"), resting)
        own_grads, own_params = groups.of(gradients), groups.of(groups.leaves)
        return {
            label: Update(opt, own_grads[label], state.inner[label], own_params[label], grad_scale)
            for label, opt in self.inner.items()
        }

    def _at_rest(self, leaves: Sequence[Any], structure: pytree.Structure) -> Collection[int]:
        """Return which of these leaves are at rest."""
        # To label leaves is slow: it is done only if an optimizer may leave some at rest.
        return self._resting(self._group(leaves, structure)) if may_rest(self) else ()

    def _resting(self, groups: _Groups) -> Collection[int]:
        """Return which leaves the optimizers leave at rest."""
        resting: set[int] = set()
        for label, opt in self.inner.items():
            if may_rest(opt):
                indices = {groups.names[index]: index for index in groups.members[label]}
                # In the order in which this optimizer will find them.
                order, structure = pytree.flatten(indices)
                own = [groups.leaves[index] for index in order]
                resting.update(order[position] for position in at_rest(opt, own, structure))
        return resting


hands_on(Partition, Partition._update_scaled)
plans_members(Partition, Partition._plan_members)
leaves_at_rest(Partition, Partition._at_rest)


class _Groups(NamedTuple):
    """The leaves of a tree, and which of them belong to which label."""

    leaves: Sequence[Any]
    structure: pytree.Structure
    names: list[str]
    members: dict[str, list[int]]

    def of(self, values: Sequence[Any]) -> dict[str, dict[str, Any]]:
        """Return for each label a dict from the names of its leaves to the values of these."""
        return {
            label: {self.names[index]: values[index] for index in indices}
            for label, indices in self.members.items()
        }

    def path(self, root: str, index: int) -> str:
        """Return the path of a leaf in the dict of its label, for a message."""
        return f"{root}[{self.names[index]!r}]"

    def rebuild(self, parts: Sequence[Mapping[str, Any]]) -> Any:
        """Return the tree whose leaves are in these dicts, by name."""
        by_name = {name: leaf for part in parts for name, leaf in part.items()}
        return pytree.unflatten(self.structure, [by_name[name] for name in self.names])
