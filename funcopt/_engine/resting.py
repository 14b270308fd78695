"""Which leaves an optimizer leaves at rest, whatever their gradients: asked here and nowhere else.

`Frozen` leaves all of its leaves at rest, a `Partition` those of its frozen groups, and a wrapper
those that its inner optimizer does. A wrapper takes such a leaf for one without a gradient, and
asks nothing of it: it may be of any dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

from .._core import pytree
from .._core.traits import own_traits
from .._core.types import Optimizer

__all__ = ["as_inner", "at_rest", "leaves_at_rest", "may_rest"]

Rule: TypeAlias = Callable[[Any, Sequence[Any], pytree.Structure], Collection[int]]

# By the very type: what another wrapper hands on to the optimizer within it is not known.
_rules: dict[type, Rule] = {}


def leaves_at_rest(kind: type, rule: Rule) -> None:
    """Let a rule say of optimizers of a type which leaves they leave at rest.

    Args:
        kind: The type.
        rule: Gives the indices of those leaves, of an optimizer, the leaves and their structure.
    """
    _rules[kind] = rule


def as_inner(opt: Any, leaves: Sequence[Any], structure: pytree.Structure) -> Collection[int]:
    """Leave those at rest that the inner optimizer leaves at rest."""
    return at_rest(opt.inner, leaves, structure)


def at_rest(
    opt: Optimizer[Any], leaves: Sequence[Any], structure: pytree.Structure
) -> Collection[int]:
    """Return which of its leaves an optimizer leaves at rest, by their indices."""
    if own_traits(opt).rests:
        return range(len(leaves))
    rule = _rules.get(type(opt))
    return () if rule is None else rule(opt, leaves, structure)


def may_rest(opt: Optimizer[Any]) -> bool:
    """Whether an optimizer may leave a leaf at rest, found without any."""
    if own_traits(opt).rests:
        return True
    if type(opt) not in _rules:
        return False
    inner: Any = getattr(opt, "inner", None)
    if inner is None:
        return True
    return any(map(may_rest, inner.values())) if isinstance(inner, Mapping) else may_rest(inner)
