"""What an optimizer says of itself, so that others know what they may do with its leaves.

Nobody recognizes an optimizer by its class or by the names of its fields. Whoever cuts, packs,
stacks or shards leaves, or wants to know what a wrapper does with gradients, asks here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["ELEMENTWISE", "Traits", "optimizers_in", "own_traits", "traits_of"]


@dataclass(frozen=True)
class Traits:
    """What holds of an optimizer. Whatever is not said does not hold.

    A class says it of itself, in its attribute `traits` (or in that of its rule). Where it depends on
    the arguments, it is a property. A wrapper speaks of what it does on its own; what holds of it together with the optimizers inside holds of each.

    Args:
        elementwise: Each element moves by its own gradient, value and state, as with Adam. So
            leaves may be cut, packed side by side, stacked and sharded.
        leafwise: Each leaf moves by itself, as with Muon. Elementwise optimizers are leafwise.
        shardable: Leaves may be the local parts of sharded ones: what is computed over a whole leaf,
            or over several, is reduced over the processes. Elementwise optimizers are shardable.
        packable: Leaves may lie in pieces, or side by side, in one tensor: it makes no difference,
            as for a norm over everything. Elementwise optimizers are packable.
        complex_as_pairs: Complex leaves may come as pairs of real ones, as in such a tensor.
            Elementwise optimizers see them so anyway.
        linear: What it hands to the inner optimizer depends linearly on the gradients, so that the
            mean over processes may be taken before or after. What clips or skips is not linear.
        rests: It leaves every leaf, and its own state, as they are.
        sees_overflow: It has to see gradients that are infinite or NaN, as a loss scale has: nobody
            around it may take such a step away.
        sends: It sends tensors to other processes.
        tells_leaves_apart: It treats leaves by their names, or counts for each of them, so that
            they must not lie side by side as one.
        decides_on_host: What an update does depends on what the host knows, beyond tensors, so that
            a CUDA graph would not replay it.

    Example:
        >>> import funcopt
        >>> funcopt.AdamW.rule.traits.elementwise
        True
    """

    elementwise: bool = False
    leafwise: bool = False
    shardable: bool = False
    packable: bool = False
    complex_as_pairs: bool = False
    linear: bool = False
    rests: bool = False
    sees_overflow: bool = False
    sends: bool = False
    tells_leaves_apart: bool = False
    decides_on_host: bool = False

    def __post_init__(self) -> None:
        """Add what follows from an element's moving by itself."""
        if self.elementwise:
            for name in ("leafwise", "shardable", "packable", "complex_as_pairs"):
                object.__setattr__(self, name, True)


ELEMENTWISE = Traits(elementwise=True, linear=True)

# These hold of a wrapper if they hold of it or of an optimizer within it; the others, of both.
_OF_ANY = frozenset(("sees_overflow", "sends", "tells_leaves_apart", "decides_on_host"))


def own_traits(opt: object) -> Traits:
    """Return what a class says of itself. A subclass, which may do otherwise, inherits nothing."""
    said = vars(type(opt))
    traits = said.get("traits") or getattr(said.get("rule"), "traits", None)
    if isinstance(traits, property):
        traits = getattr(opt, "traits", None)  # which Dynamo follows, and not `__get__`
    traits = traits if isinstance(traits, Traits) else Traits()
    if getattr(opt, "step_per_leaf", False):
        return dataclasses.replace(traits, tells_leaves_apart=True)
    return traits


def optimizers_in(opt: Any) -> Iterator[Any]:
    """Yield an optimizer and all that are within it."""
    yield opt
    inner = getattr(opt, "inner", None)
    for part in inner.values() if isinstance(inner, Mapping) else () if inner is None else (inner,):
        yield from optimizers_in(part)


def traits_of(opt: object) -> Traits:
    """Return what holds of an optimizer together with all that are within it."""
    said = [own_traits(part) for part in optimizers_in(opt)]
    return Traits(
        **{
            field.name: (any if field.name in _OF_ANY else all)(
                getattr(traits, field.name) for traits in said
            )
            for field in fields(Traits)
        }
    )
