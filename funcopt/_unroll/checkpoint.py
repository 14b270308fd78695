"""A function of tensors of which autograd keeps the inputs alone.

When a derivative goes back through it, the function is called once more, and differentiated there
and then. What goes back is a function of tensors, too, and is wrapped in the same way. So the
second derivative needs no more memory than the first, and there is one of every order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import vjp, vmap

from .._core import transforms

Function: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""A pure function from tensors to a tuple of tensors."""


class _Checkpoint(torch.autograd.Function):
    """The arguments are the function, then its inputs; the results are those of the function."""

    @staticmethod
    def forward(function: Function, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not transforms.transformed():
            # Nothing is recorded here. A compiled function would be compiled once more for each
            # set of inputs that require a gradient, and so it is given none.
            inputs = tuple(tensor.detach() for tensor in inputs)
        return _each_by_itself(inputs, function(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = list(map(_of_now, ctx.saved_tensors))
        wanted = [index for index in range(len(inputs)) if ctx.needs_input_grad[1 + index]]
        given = [index for index, own in enumerate(cotangents) if own is not None]
        if not given:
            return (None,) * (1 + len(inputs))
        known = [_of_now(own) for own in cotangents if own is not None]
        found: tuple[Tensor | None, ...] | None = None
        if not torch.is_grad_enabled() and not transforms.transformed():
            found = _pull_back_once(ctx.function, inputs, wanted, given, known)
        if found is None:
            pull_back = partial(_pull_back, ctx.function, len(inputs), wanted, given)
            found = checkpoint(pull_back, *inputs, *known)
        by_index = dict(zip(wanted, found, strict=True))
        return (None, *map(by_index.get, range(len(inputs))))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], function: Function, *inputs: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        mapped: Any = vmap(function, in_dims=tuple(in_dims[1:]), randomness=info.randomness)
        results = checkpoint(mapped, *inputs)
        return results, (0,) * len(results)


# torch leaves `apply` untyped.
checkpoint: Callable[..., tuple[Tensor, ...]] = _Checkpoint.apply


def _pull_back(
    function: Function, count: int, wanted: list[int], given: list[int], *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Return the cotangents of the wanted inputs from the inputs and those of the given results."""
    inputs, cotangents = tensors[:count], tensors[count:]

    def restricted(*own: Tensor) -> tuple[Tensor, ...]:
        full = list(inputs)
        for index, tensor in zip(wanted, own, strict=True):
            full[index] = tensor
        results = function(*full)
        return tuple(results[index] for index in given)

    differentiate: Any = vjp  # which is typed as if it always returned auxiliary output
    _, back = differentiate(restricted, *(inputs[index] for index in wanted))
    # Freed as it goes back: it is not needed twice.
    found: tuple[Tensor, ...] = back(cotangents, retain_graph=False)
    return found


def _pull_back_once(
    function: Function,
    inputs: Sequence[Tensor],
    wanted: list[int],
    given: list[int],
    cotangents: list[Tensor],
) -> tuple[Tensor | None, ...] | None:
    """Return the same by plain autograd, which takes half the time and cannot go back again.

    None where a result has no history at all, as of an update that plain autograd was told not to
    record: then only a transform can tell.
    """
    with torch.enable_grad():
        leaves = list(map(recorded_from, inputs))
        results = function(*map(copied, leaves))
    chosen = [results[index] for index in given]
    if any(result.grad_fn is None for result in chosen):
        return None
    own = [leaves[index] for index in wanted]
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        chosen, own, cotangents, allow_unused=True
    )
    return found


def recorded_from(tensor: Tensor) -> Tensor:
    """Return a leaf with the values of an input, which requires a gradient if it can.

    All inputs do that can, whether or not their derivative is wanted. So a compiled function is
    compiled once for all segments, although in the first one fewer tensors have a derivative.
    """
    floats = tensor.is_floating_point() or tensor.is_complex()
    return tensor.detach().requires_grad_(floats)


def copied(leaf: Tensor) -> Tensor:
    """Return what a function is given for a leaf: an update at leaves would not be recorded."""
    return leaf.clone() if leaf.requires_grad else leaf


def _of_now(tensor: Tensor) -> Tensor:
    """Return a tensor out of what is left of a transform that is over, by which it may be wrapped.

    That is so where what `vjp` has returned is called. Operators take no notice, and all else does.
    """
    return tensor if transforms.beneath(tensor) is None else tensor.view_as(tensor)


def _each_by_itself(inputs: Iterable[Tensor], results: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Return the results, with a view of each that is an input or another result.

    Else autograd takes it for one that was changed in place, or refuses to save it.
    """
    seen = set(map(id, inputs))
    own = []
    for result in results:
        tensor = result.view_as(result) if id(result) in seen else result
        seen.add(id(tensor))
        own.append(tensor)
    return tuple(own)
