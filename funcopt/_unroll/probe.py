"""Whether a derivative goes back through steps, and whether all that it needs was found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.pytree import Structure
from .closures import Closure
from .looks import taken
from .randomness import generators_of, undone


def in_reverse_mode() -> bool:
    """Whether a transform is under way that differentiates."""
    return transforms.transformed() and not transforms.in_vmaps_alone()


def is_followed_back(tensors: Sequence[Tensor]) -> bool:
    """Whether reverse mode may go back through what is computed of these tensors.

    It is asked where no operators are needed to be seen: a transform that is no vmap goes back.
    """
    if in_reverse_mode():
        return True
    return torch.is_grad_enabled() and any(map(requires_grad, tensors))


def requires_grad(tensor: Tensor) -> bool:
    """Whether a tensor requires a gradient, of any transform or beneath them."""
    while not tensor.requires_grad:
        inner = transforms.beneath(tensor)
        if inner is None:
            return False
        tensor = inner
    return True


def check_step(closure: Closure, structure: Structure, leaves: Sequence[Any], index: int) -> None:
    """Make one step without a derivative, and refuse it if it has one nevertheless, or writes.

    All tensors that were found are detached for it. So if a result still requires a gradient, the
    step uses a tensor that was not found, and whose derivative would be lost.

    Raises:
        ValueError: If a result requires a gradient, or the carry was changed in place.
    """
    given = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    step = closure.rebuild([tensor.detach() for tensor in closure.tensors])
    before = list(map(_version, given))
    generators = generators_of(_tensors(given), closure.generators)
    carry, out = undone(generators, taken, step, pytree.unflatten(structure, given), index)
    for position, version in enumerate(before):
        if _version(given[position]) != version:
            raise ValueError(
                f"{pytree.path(structure, 'carry', position)} was written in step {index}. A step "
                f"is made again for the derivative, from what it was given: it must leave that as "
                f"it is. Return new tensors, as opt.update() does, not opt.update_()."
            )
    flat = [(name, *pytree.flatten(tree)) for name, tree in (("carry", carry), ("out", out))]
    for name, own, shape in flat:
        for position, leaf in enumerate(own):
            if isinstance(leaf, Tensor) and requires_grad(leaf):
                raise ValueError(
                    f"{pytree.path(shape, name, position)} depends on a tensor that requires a "
                    f"derivative and is neither in the carry nor found in what the step closes "
                    f"over: its derivative would be lost (in step {index}). Put it into the carry, "
                    f"and return it unchanged, or give it to the step by functools.partial."
                )


def _tensors(leaves: Iterable[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _version(leaf: Any) -> int:
    """Count how often a tensor was written, or what transforms have wrapped in it."""
    count, tensor = 0, leaf if isinstance(leaf, Tensor) else None
    while tensor is not None:
        count += 0 if tensor.is_inference() else tensor._version
        tensor = transforms.beneath(tensor)
    return count
