"""Whether a derivative goes back through steps, and whether all that it needs was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.pytree import Structure
from .checkpoint import copied, recorded_from
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
    """Make one step, and refuse it if a derivative would be lost, or if it writes.

    Under plain autograd it is made as it will be for the derivative, so that a compiled step is
    compiled for both at once. An update that is not recorded returns leaves, of which it is not
    known whence they come. Then, and under a transform, it is made without any derivative.

    Raises:
        ValueError: If there is such a result, or the carry was changed in place.
    """
    one = _One(closure, structure, leaves, index)
    if not transforms.transformed() and one.lost_of(recorded_from, copied) is None:
        return
    lost = one.lost_of(Tensor.detach, lambda tensor: tensor)
    if lost is not None:
        raise ValueError(
            f"{lost} depends on a tensor that requires a derivative and is neither in the carry "
            f"nor found in what the step closes over: its derivative would be lost (in step "
            f"{index}). Put it into the carry, and return it unchanged, or give it to the step by "
            f"functools.partial."
        )


class _One(NamedTuple):
    """One step, to be made on tensors that stand for those that it is given."""

    closure: Closure
    structure: Structure
    leaves: Sequence[Any]
    number: int

    def lost_of(
        self, make: Callable[[Tensor], Tensor], give: Callable[[Tensor], Tensor]
    ) -> str | None:
        """Return the path of a result that depends on what does not stand for a tensor found.

        `make` returns what stands for a tensor, and `give` what the step is given of that.
        """
        lifted = list(map(make, self.closure.tensors))
        own = [make(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        given = [give(leaf) if isinstance(leaf, Tensor) else leaf for leaf in own]
        carry, out = self._made(self.closure.rebuild(list(map(give, lifted))), given)
        known = {id(leaf) for leaf in (*lifted, *_tensors(own)) if leaf.requires_grad}
        for name, tree in (("carry", carry), ("out", out)):
            results, shape = pytree.flatten(tree)
            for position, leaf in enumerate(results):
                if isinstance(leaf, Tensor) and _depends_beside(leaf, known):
                    return pytree.path(shape, name, position)
        return None

    def _made(self, step: Callable[..., Any], given: list[Any]) -> tuple[Any, Any]:
        """Make the step.

        Raises:
            ValueError: If it writes into its carry.
        """
        before = list(map(_version, given))
        generators = generators_of(_tensors(given), self.closure.generators)
        carry = pytree.unflatten(self.structure, given)
        pair = undone(generators, taken, step, carry, self.number)
        for position, version in enumerate(before):
            if _version(given[position]) != version:
                raise ValueError(
                    f"{pytree.path(self.structure, 'carry', position)} was written in step "
                    f"{self.number}. A step is made again for the derivative, from what it was "
                    f"given: it must leave that as it is. Return new tensors, as opt.update() "
                    f"does, not opt.update_()."
                )
        return pair


def _depends_beside(result: Tensor, known: set[int]) -> bool:
    """Whether a result has a derivative, and not only by leaves of autograd that are known."""
    if not requires_grad(result) or not known:
        return requires_grad(result)
    if result.grad_fn is None:
        return id(result) not in known
    pending, seen = [result.grad_fn], {result.grad_fn}
    while pending:
        node = pending.pop()
        leaf = getattr(node, "variable", None)  # where the history ends
        if leaf is not None and id(leaf) not in known:
            return True
        following = {own for own, _ in node.next_functions if own is not None} - seen
        seen |= following
        pending += following
    return False


def _tensors(leaves: Iterable[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _version(leaf: Any) -> int:
    """Count how often a tensor was written, or what transforms have wrapped in it."""
    count, tensor = 0, leaf if isinstance(leaf, Tensor) else None
    while tensor is not None:
        count += 0 if tensor.is_inference() else tensor._version
        tensor = transforms.beneath(tensor)
    return count
