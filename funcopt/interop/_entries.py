"""The entries of a checkpoint: their keys, and counts of updates of one kind for those of another.

An optimizer counts the updates of all leaves at once or, with `step_per_leaf`, those of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .._core import pytree
from .._core.types import Tree
from .._engine.rule import is_state


def key_of(path: str, leaf: Tensor) -> str:
    """Return the key of the entry for a leaf: a complex one is stored as pairs of real numbers."""
    return f"torch.view_as_real({path})" if leaf.is_complex() else path


def recount(
    template: Tree, d: Mapping[str, Any], *, strict: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return a dict with its counts as the template has them, and what is wrong with them.

    One count for all leaves becomes that of each leaf whose moments are in the dict. Counts of
    each leaf become one if they are equal. Moments without a count are a fault: an update would
    correct their bias as if they were new. If `strict`, counts of the other kind are a fault as
    well, and moments without a count are none here: their count is an entry that is missing.
    """
    entries, faults = dict(d), []
    for keys in _keys_of(template):
        there = [key for key in keys.each if key in d]
        with_moments = [key for key, moment in keys.each.items() if moment is None or moment in d]
        if keys.per_leaf and keys.one in d and not there:
            entries.update(dict.fromkeys(with_moments, entries.pop(keys.one)))
            faults += [_ONE_FOR_EACH.format(keys.one)] * strict
        elif not keys.per_leaf and there and keys.one not in d:
            counts = {key: entries.pop(key) for key in there}
            entries[keys.one] = counts[there[0]]
            faults += list(_differing(counts)) or [_EACH_FOR_ONE.format(keys.one)] * strict
        elif not strict:
            needed = [key for key in with_moments if keys.each[key] is not None]
            needed = needed if keys.per_leaf else [keys.one][: len(needed)]
            faults += [_NO_COUNT.format(key) for key in needed if key not in d]
    return entries, faults


_ONE_FOR_EACH = (
    "{}: one count for all leaves, the template has one for each (step_per_leaf=True): "
    "strict=False gives it to each"
)
_EACH_FOR_ONE = (
    "{}: one count for each leaf, the template has one for all (step_per_leaf=False): "
    "strict=False takes it from leaves that agree, as these do"
)
_NO_COUNT = "{}: missing, and the moments whose updates it counts are there"


class _Keys(NamedTuple):
    """The keys under which the counts of one optimizer may stand in a dict."""

    per_leaf: bool  # whether the template has one count for each leaf
    one: str  # of one count for all leaves
    each: dict[str, str | None]  # of the count of each leaf, and of its first moment if any is kept


def _keys_of(template: Tree) -> Iterator[_Keys]:
    nodes, outside = pytree.flatten_above(template, is_state)
    for path, node in zip(pytree.paths(outside, "state"), nodes, strict=True):
        if not is_state(node):
            continue
        per_leaf = not isinstance(node.step, Tensor)
        kept = [name for name in node._fields[1:] if pytree.flatten(getattr(node, name))[0]]
        each: dict[str, str | None] = {}
        if kept or per_leaf:  # else there is no telling how many leaves there are
            first, structure = pytree.flatten(getattr(node, kept[0]) if kept else node.step)
            for own, moment in zip(pytree.paths(structure, ""), first, strict=True):
                name = key_of(f"{path}.{kept[0]}{own}", moment) if kept else None
                each[f"{path}.step{own}"] = name
        yield _Keys(per_leaf, f"{path}.step", each)


def _differing(counts: Mapping[str, Any]) -> Iterator[str]:
    """Say that counts differ, if they do, and name two."""
    values = {  # of what is no count, None, so that all alike agree: it is refused by itself
        key: count.tolist() if isinstance(count, Tensor) and not count.is_meta else None
        for key, count in counts.items()
    }
    first = next(iter(values))
    for key, value in values.items():
        if value != values[first]:
            yield (
                f"{first} is {values[first]}, {key} is {value}, and the template has one count for "
                f"all leaves: make it with step_per_leaf=True"
            )
            return
