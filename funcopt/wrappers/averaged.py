"""Reading the average that an `Ema` or `ScheduleFree` keeps, at whatever place in a state."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .._core import pytree
from .._core.types import ParamsT, Tree
from .ema import EmaState
from .labels import name_leaves
from .partition import PartitionState
from .schedule_free import ScheduleFreeState

_AVERAGES = EmaState, ScheduleFreeState


def averaged(state: Any, params: ParamsT) -> ParamsT:
    """Return the averaged parameters that a state holds, as a tree like the parameters.

    It can be given to `torch.func.functional_call` in place of the parameters. Before the first
    update it is the parameters at `init`.

    Args:
        state: An `EmaState` or `ScheduleFreeState`, or the state of a wrapper with one anywhere
            inside. Of an `Ema` of another one, the outer one is read. Of a `Partition` whose groups
            have one each, the averages of all groups are put together; of one group, give its state
            and its leaves.
        params: The parameters. Their values do not matter, but those of leaves that rest (those of
            `Frozen`) are their average.

    Returns:
        The average in the dtypes of the parameters. Where it is kept in such a dtype, these are the
        tensors of the state, not copies: they go on to change if `update_` writes into the state.

    Raises:
        ValueError: If the state holds no such state, or several beside each other; if a group of a
            `Partition` has none, and does not rest; or if the average does not match the
            parameters, as that in the buckets of a `Zero1`: give what `gather_state` makes of it.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.Clip(funcopt.Ema(funcopt.SGD(lr=0.1), decay=0.5), max_norm=1.0)
        >>> model = torch.nn.Linear(2, 1, dtype=torch.bfloat16)
        >>> params = dict(model.named_parameters())
        >>> state = opt.init(params)
        >>> x = torch.ones(2, dtype=torch.bfloat16)
        >>> torch.func.functional_call(model, funcopt.averaged(state, params), x).dtype
        torch.bfloat16
    """
    found = _with_average(state)
    if not found:
        raise ValueError(
            f"state is of type {type(state).__name__}, and holds no average: wrap the optimizer, "
            f"as in Ema(Adam(), decay=0.999), and give the state that its init() or update() "
            f"returned. The order is averaged(state, params)."
        )
    if len(found) > 1:
        raise ValueError(
            f"state, a {type(state).__name__}, holds the states of {len(found)} Emas beside each "
            f"other: give that of one, with its own leaves."
        )
    leaves, structure = pytree.flatten(params)
    node = found[0]
    one = not isinstance(node, PartitionState)
    average = node.average if one else _joined(node, leaves, structure)
    averages = pytree.pair(average, "state.average", structure).leaves
    result: ParamsT = pytree.unflatten(
        structure, [own.to(leaf.dtype) for own, leaf in zip(averages, leaves, strict=True)]
    )
    return result


def _with_average(state: Any) -> list[Any]:
    """Return the states with an average, or of a `Partition` with one in it, that are in no other.

    They are those of `Ema` and `ScheduleFree`.
    """
    return [
        node
        for node in _outermost(state, *_AVERAGES, PartitionState)
        if isinstance(node, _AVERAGES) or _outermost(node, *_AVERAGES)
    ]


def _outermost(state: Any, *kinds: type) -> list[Any]:
    """Return the states of these kinds in a state that are in no other one."""
    nodes, _ = pytree.flatten_above(state, lambda node: isinstance(node, kinds))
    return [node for node in nodes if isinstance(node, kinds)]


class _Groups(NamedTuple):
    """The averages of the groups of a `Partition`."""

    averages: dict[str, Tensor]  # by the names of leaves
    resting: list[str]  # labels of groups without a state, whose leaves stay what they are
    others: list[str]  # labels of groups that have none, or several


def _joined(state: PartitionState, leaves: list[Tensor], structure: pytree.Structure) -> Tree:
    """Return the averages of all groups as a tree like the parameters; by name if they differ."""
    groups = _groups(state)
    names = name_leaves(structure)
    averages = groups.averages
    if groups.others and not averages.keys() >= set(names):
        raise ValueError(
            f"the group {groups.others[0]!r} has not one average, as others have: wrap each group "
            f"that moves in one Ema, or all of it, as in Ema(Partition(...)). For the average of a "
            f"group alone, give its state and its own leaves."
        )
    if groups.resting:
        averages = {**dict(zip(names, leaves, strict=True)), **averages}
    if averages.keys() != set(names):
        return averages
    return pytree.unflatten(structure, [averages[name] for name in names])


def _groups(state: PartitionState) -> _Groups:
    groups = _Groups({}, [], [])
    for label, own in state.inner.items():
        found = _with_average(own)
        if len(found) == 1 and isinstance(found[0], _AVERAGES):
            groups.averages.update(found[0].average)
        elif len(found) == 1 and isinstance(found[0], PartitionState):
            inside = _groups(found[0])
            groups.averages.update(inside.averages)
            groups.resting.extend(inside.resting)
            groups.others.extend(inside.others)
        elif len(pytree.flatten(own)[0]) == 0:
            groups.resting.append(label)
        else:
            groups.others.append(label)
    return groups
