"""What vmap and reverse-mode autograd do to a step: one rule for the whole step.

Torch's transforms compose a function from rules for its operators, and the kernels' operators have
none (`_fused_adamw_` is silently wrong under grad). So the step as a whole becomes one operator, a
`torch.autograd.Function`, with a rule for each: `vmap` stacks the members and takes one step on the
stack, `backward` is the adjoint in plain operators, which can be differentiated again.

There is no `jvp` rule on purpose: jvp of jvp through one comes out as zero without an error.
Forward mode takes the plain kernel instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .._core import transforms
from .._core.recording import recording
from .._core.types import Number
from ..optimizers._adam.adjoint import Saved, adjoint, worth_keeping
from . import dispatch
from .layout import layout_of
from .rule import Leaves, Moved, Scalars, Variant

__all__ = ["ruled_step"]


def ruled_step(leaves: Leaves, scalars: Scalars, variant: Variant) -> Moved:
    """Return the leaves after one step with the same numbers, under whatever is watching."""
    count = len(leaves.params)
    operands = (*scalars[:6], *_chain(leaves))  # the factor is 1 here
    if not transforms.in_vmaps_alone():
        return Moved(*_columns(_apply(variant, count, *operands), count, 4))

    def stepped(members: transforms.Members) -> tuple[transforms.Members, tuple[Tensor, ...]]:
        beneath, dims = zip(*map(members.unwrap, operands), strict=True)
        return members, _step_stacked(members.size, dims, variant, count, beneath)

    members, flat = transforms.beneath_vmap(stepped)
    return Moved(*_columns(list(map(members.wrap, flat)), count, 4))


def _step_stacked(
    size: int,
    dims: tuple[int | None, ...],
    variant: Variant,
    count: int,
    operands: tuple[Any, ...],
) -> tuple[Tensor, ...]:
    """Take the step of all members of a vmap at once, stacked in front."""
    given = Leaves(*_columns(operands[6:], count, 5))
    # Decided before anything is moved, since what is moved has a history of its own.
    others = (*_chain(given[2:]), *operands[:6])
    with recording(given.params, given.grads, others, variant.differentiable):
        scalars = Scalars(*map(_number_to_front, operands[:6], dims[:6]))
        lead = _lead(scalars)
        if lead > 1:
            scalars = _aligned(scalars, lead)
        stacked = [
            _leaf_to_front(leaf, dim, size)
            for leaf, dim in zip(operands[6:], dims[6:], strict=True)
        ]
        transformed = transforms.transformed()
        if lead and not transformed:
            # Each member will be moved by itself, which wants it in one piece.
            stacked = [leaf.contiguous() for leaf in stacked]
        leaves = Leaves(*_columns(stacked, count, 5))
        if transformed or torch.is_grad_enabled():
            moved = ruled_step(leaves, scalars, variant)
        else:
            moved = dispatch.move(leaves, scalars, variant, layout_of(leaves))
    return _chain(moved)


class _Step(torch.autograd.Function):
    """A step of all leaves. Everything is passed flat, since only flat arguments are seen by rules.

    The order of the arguments: what is fixed, the count of leaves, the six numbers, then the
    columns of `Leaves`. The order of the results: the columns of `Moved`.
    """

    @staticmethod
    def forward(variant: Variant, count: int, *operands: Any) -> tuple[Tensor, ...]:
        scalars, leaves = Scalars(*operands[:6]), Leaves(*_columns(operands[6:], count, 5))
        return _chain(dispatch.move(leaves, scalars, variant, layout_of(leaves)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        variant, count, *operands = inputs
        numbers, leaves = operands[:6], Leaves(*_columns(operands[6:], count, 5))
        needs = Scalars(*ctx.needs_input_grad[2:8])
        saved = worth_keeping(leaves, Moved(*_columns(output, count, 4)), needs)
        ctx.variant = variant
        ctx.count = count
        ctx.lengths = [len(column) for column in saved]
        ctx.numbers = [None if isinstance(number, Tensor) else number for number in numbers]
        tensors = [number for number in numbers if isinstance(number, Tensor)]
        ctx.save_for_backward(*tensors, *_chain(saved))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        numbers: list[Number] = [next(tensors) if n is None else n for n in ctx.numbers]
        saved = Saved(*([next(tensors) for _ in range(length)] for length in ctx.lengths))
        needs = Scalars(*ctx.needs_input_grad[2:8])
        columns = _columns(cotangents, ctx.count, 4)
        by_scalar, by_leaf = adjoint(saved, Scalars(*numbers), ctx.variant, needs, columns)
        return (None, None, *by_scalar, *_chain(by_leaf))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], variant: Variant, count: int, *operands: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        flat = _step_stacked(info.batch_size, in_dims[2:], variant, count, operands)
        return flat, (0,) * len(flat)


# torch leaves `apply` untyped.
_apply: Callable[..., tuple[Tensor, ...]] = _Step.apply


def _number_to_front(number: Number, dim: int | None) -> Number:
    if not isinstance(number, Tensor):
        return number
    if dim is not None:
        return number if dim == 0 else number.movedim(dim, 0)
    # A number with dimensions of inner vmaps needs a place for this one; a 0-dim number has none.
    return number.unsqueeze(0) if number.ndim > 0 else number


def _lead(scalars: Scalars) -> int:
    """How many leading dimensions the numbers have, of those in which they may differ."""
    return max(number.ndim if isinstance(number, Tensor) else 0 for number in scalars)


def _aligned(scalars: Scalars, lead: int) -> Scalars:
    """Give numbers that differ over outer vmaps alone a place for the inner ones, too."""
    return Scalars(
        *(
            number.reshape(number.shape + (1,) * (lead - number.ndim))
            if isinstance(number, Tensor) and 0 < number.ndim < lead
            else number
            for number in scalars
        )
    )


def _leaf_to_front(leaf: Tensor, dim: int | None, size: int) -> Tensor:
    if dim == 0:
        return leaf
    return leaf.expand(size, *leaf.shape) if dim is None else leaf.movedim(dim, 0)


def _chain(columns: Iterable[Iterable[Any]]) -> tuple[Any, ...]:
    return tuple(leaf for column in columns for leaf in column)


def _columns(flat: Any, count: int, most: int) -> list[list[Any]]:
    """Cut a flat sequence into `most` columns; the last is empty where amsgrad is off."""
    return [list(flat[i * count : (i + 1) * count]) for i in range(most)]
