"""Which optimizers move each leaf by itself, so that none has to wait for the others' gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from .._core.types import Optimizer, own_traits
from ..wrappers.partition import Partition

__all__ = ["one_for_each"]


def one_for_each(opt: Optimizer[Any], params: dict[str, Tensor]) -> dict[str, Optimizer[Any]]:
    """Return for each leaf, by its name, the optimizer that moves it as `opt` would with the rest.

    Args:
        opt: The optimizer. In place of a `Partition` comes that of the leaf's label.
        params: The leaves.

    Raises:
        ValueError: If an optimizer looks at several leaves at once, or nobody has said that it
            does not.
    """
    if type(opt) is Partition:
        groups = opt._groups(params)
        found = {}
        for label, indices in groups.members.items():
            own = {groups.names[index]: groups.leaves[index] for index in indices}
            found.update(one_for_each(opt.inner[label], own))
        return {name: found[name] for name in params}
    if not own_traits(opt).leafwise:
        raise ValueError(
            f"opt has a {type(opt).__name__}, which may look at the gradients of several leaves at "
            f"once, as for a norm over all of them: the first would have moved when the last is "
            f"known. If it moves each leaf by itself, say `traits = Traits(leafwise=True)` in its "
            f"class. ClipValue bounds each element by itself; or update after the backward pass."
        )
    wrapped: Any = opt
    if not hasattr(opt, "inner"):
        return dict.fromkeys(params, opt)
    return {
        name: opt if inner is wrapped.inner else dataclasses.replace(wrapped, inner=inner)
        for name, inner in one_for_each(wrapped.inner, params).items()
    }
