"""What a step must return: a carry that looks like the one before, and an output likewise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .._core import pytree, transforms
from .._core.pytree import Structure


def taken(step: Callable[..., Any], carry: Any, index: int) -> tuple[Any, Any]:
    """Make one step.

    Raises:
        TypeError: If it does not return a carry and an output.
        RuntimeError: If a transform is to go through a compiled step, which torch refuses.
    """
    pair = step(carry, index) if transforms.compiling() else _called(step, carry, index)
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(
            f"step({index}) returned {_kind(pair)}: must return a tuple of the new carry and an "
            f"output, which may be None: return carry, None."
        )
    return pair


def _called(step: Callable[..., Any], carry: Any, index: int) -> Any:
    try:
        return step(carry, index)
    except Exception as error:
        # By its name: the module of the compiler takes a second to import.
        is_refused = type(error).__module__ == "torch._dynamo.exc"
        if not (is_refused and transforms.transformed() and "functorch" in str(error)):
            raise
        raise RuntimeError(
            f"step({index}) is compiled, and torch.func.grad or another transform is around it, or "
            f"a second derivative goes back through it. torch cannot follow a compiled function "
            f"there. Compile the whole, torch.compile(torch.func.grad(...)), or leave the step "
            f"uncompiled, or take a first derivative by torch.autograd.grad."
        ) from error


def checked_carry(carry: Any, structure: Structure, leaves: Sequence[Any], index: int) -> list[Any]:
    """Return the leaves of a new carry, which must look like those of the one before."""
    news, own = pytree.flatten(carry)
    if not pytree.same(own, structure):
        raise ValueError(
            f"carry changed its structure in step {index}: {_changed(structure, own)}. Return a "
            f"carry of the structure that was given."
        )
    for position, (old, new) in enumerate(zip(leaves, news, strict=True)):
        if _look(old) != _look(new):
            raise ValueError(
                f"{pytree.path(structure, 'carry', position)} changed in step {index} from "
                f"{_kind(old)} to {_kind(new)}. A step must return what it was given, in shape, "
                f"dtype and device: begin with a carry of that kind, or convert it in the step."
            )
    return news


def checked_out(
    out: Any, structure: Structure | None, before: list[Tensor | None] | None, index: int
) -> tuple[list[Tensor | None], Structure]:
    """Return the leaves of an output, which must look like those of the step before."""
    leaves, own = pytree.flatten(out)
    for position, leaf in enumerate(leaves):
        if leaf is not None and not isinstance(leaf, Tensor):
            raise TypeError(
                f"{pytree.path(own, 'out', position)} is {_kind(leaf)} in step {index}. Outputs "
                f"are stacked, so each leaf must be a tensor or None. Make a tensor of it."
            )
    if structure is None or before is None:
        return leaves, own
    if not pytree.same(own, structure):
        raise ValueError(
            f"out changed its structure in step {index}: {_changed(structure, own)}. Outputs are "
            f"stacked, so each must look like that of the first step."
        )
    for position, (old, new) in enumerate(zip(before, leaves, strict=True)):
        if _look(old) != _look(new):
            raise ValueError(
                f"{pytree.path(own, 'out', position)} changed in step {index} from {_kind(old)} to "
                f"{_kind(new)}. Outputs are stacked, so each must look like that of the first step."
            )
    return leaves, own


def _changed(before: Structure, after: Structure) -> str:
    """Say which leaves of a structure came and went."""
    old, new = pytree.paths(before, ""), pytree.paths(after, "")
    came = [path or "a single leaf" for path in new if path not in old]
    went = [path or "a single leaf" for path in old if path not in new]
    parts = [f"{pytree.some(own)} {verb}" for own, verb in ((came, "came"), (went, "went")) if own]
    return " and ".join(parts) or f"{before} became {after}"


def _look(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else None


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    return f"{value!r:.60} ({type(value).__name__})"
