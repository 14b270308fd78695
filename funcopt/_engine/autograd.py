"""What vmap and reverse-mode autograd do to a step: one rule for the whole step.

Torch's transforms compose a function from rules for its operators, and the kernels' operators have
none (`_fused_adamw_` is silently wrong under grad). So the step as a whole becomes one operator, a
`torch.autograd.Function`, with a rule for each: `vmap` stacks the members and takes one step on the
stack, `backward` is the derivative in plain operators, which can be differentiated again.

A vmap maps over members, such as the models of an ensemble. Of a leaf, their dimension is moved to
the front. A number has one dimension for each vmap around it, outermost first, and size 1 in those
over which it does not differ: for a vmap of 3 within one of 5, a learning rate that differs over
the outer one alone has shape (5, 1). A number that differs over none has no dimension.

Two ways lead to the stack. Where nothing but vmaps is active, `step_under_transforms` goes beneath
them by hand, one by one from the innermost, and no `Function` is made. Where a derivative is
active, too, torch calls the `vmap` rule of the `Function` for the vmaps inside of it, whose
`backward` then sees the stack: it is what `grad(vmap(step))` asks for. In `vmap(grad(step))`,
`backward` sees one member, and torch maps its operators over all.

There is no `jvp` rule on purpose: jvp of jvp through one comes out as zero without an error.
Forward mode takes the equations instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .._core import transforms
from .._core.tensors import recording
from .._core.types import Number
from . import dispatch, memory
from .memory import Layout, layout_of
from .rule import Adjoint, StepInputs, StepOutputs, UpdateRule


@dataclass(frozen=True)
class _Step:
    """What is fixed about a step: one leaf to torch, which would look into a NamedTuple."""

    rule: UpdateRule
    options: Any
    leaves: int
    ids: tuple[int, ...] | None  # of the leaves, as in `StepInputs`

    @property
    def number_count(self) -> int:
        """How many numbers there are; `grad_scale` is 1 here, and none of them."""
        return 3 + len(self.rule.hyperparams)

    @property
    def derivative(self) -> Adjoint:
        """The derivative of the rule: by hand if there is one, else that of the equations."""
        return self.rule.derivative or _of_equations(self.rule)

    def split(self, operands: Sequence[Any]) -> tuple[Any, StepInputs]:
        """Return the numbers and the tensors among flat operands."""
        numbers = self.rule.numbers(*operands[: self.number_count])
        return numbers, self.inputs(operands[self.number_count :])

    def inputs(self, flat: Sequence[Tensor]) -> StepInputs:
        """Return the inputs of a step from their columns, one after another."""
        return StepInputs.of(self.columns(flat), None if self.ids is None else list(self.ids))

    def columns(self, flat: Sequence[Any]) -> list[list[Any]]:
        """Cut a flat sequence into columns."""
        return [list(flat[i : i + self.leaves]) for i in range(0, len(flat), self.leaves)]


def step_per_numbers(
    rule: UpdateRule, inputs: StepInputs, numbers: Any | list[Any], options: Any
) -> StepOutputs:
    """Return the leaves after one step, made for each set of numbers: the rule knows one set."""
    if not isinstance(numbers, list):
        return step_under_transforms(rule, inputs, numbers, options)
    groups: dict[int, list[int]] = {}
    for index, own in enumerate(numbers):
        groups.setdefault(id(own), []).append(index)
    columns = [list(column) for column in inputs.targets.columns]
    for indices in groups.values():
        own = numbers[indices[0]]
        part = step_under_transforms(rule, inputs.take(indices), own, options)
        for column, tensors in zip(columns, part.columns, strict=True):
            for index, tensor in zip(indices, tensors, strict=True):
                column[index] = tensor
    return StepOutputs.of(columns)


def step_under_transforms(
    rule: UpdateRule, inputs: StepInputs, numbers: Any, options: Any
) -> StepOutputs:
    """Return the leaves after one step with the same numbers, under whatever is watching."""
    if not inputs.params:  # flat, lists without leaves would be lost
        return inputs.targets
    ids = None if inputs.ids is None else tuple(inputs.ids)
    step = _Step(rule, options, len(inputs.params), ids)
    operands = (*numbers[: step.number_count], *chain(*inputs.columns))
    if not transforms.in_vmaps_alone():
        return StepOutputs.of(step.columns(_apply(step, *operands)))

    def stepped(members: transforms.Members) -> tuple[transforms.Members, tuple[Tensor, ...]]:
        beneath, dims = zip(*map(members.unwrap, operands), strict=True)
        return members, _step_stacked(step, members.size, dims, beneath)

    members, flat = transforms.beneath_vmap(stepped)
    return StepOutputs.of(step.columns(list(map(members.wrap, flat))))


def _step_stacked(
    step: _Step, size: int, dims: tuple[int | None, ...], operands: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """Take the step of all members of a vmap at once, stacked in front."""
    numbers, given = step.split(operands)
    # Decided before dimensions are moved, since what comes of that has a history of its own.
    others = (*chain(*given.slots), *numbers)
    with recording(given.params, given.grads, others, step.options.differentiable):
        moved = map(_with_dim_of_vmap, numbers, dims[: step.number_count])
        own = numbers._make((*moved, numbers.grad_scale))
        if step.options.rounding == "stochastic":
            # Of each member, elements are counted by themselves, so each has a key.
            own = own._replace(key=_key_of_each(numbers.key, dims[step.number_count - 2], size))
        numbers = _with_dims_of_inner_vmaps(own)
        stacked = [
            _leaf_to_front(leaf, dim, size)
            for leaf, dim in zip(
                operands[step.number_count :], dims[step.number_count :], strict=True
            )
        ]
        transformed = transforms.transformed()
        if _member_dims(numbers) and not transformed:
            # A kernel may take the step of each member by itself, which needs contiguous memory.
            stacked = [leaf.contiguous() for leaf in stacked]
        inputs = step.inputs(stacked)
        if transformed or torch.is_grad_enabled():
            outputs = step_under_transforms(step.rule, inputs, numbers, step.options)
        else:
            outputs = _step_eagerly(step, inputs, numbers, memory.results)
    return tuple(chain(*outputs.columns))


def _step_eagerly(
    step: _Step,
    inputs: StepInputs,
    numbers: Any,
    make_results: Callable[[StepInputs, Layout], StepOutputs],
) -> StepOutputs:
    layout = layout_of(inputs)
    plan = dispatch.plan(step.rule, inputs, numbers, step.options, layout, in_place=False)
    return dispatch.run(inputs, plan, step.options, layout, make_results)


class _StepFunction(torch.autograd.Function):
    """A step of all leaves. Everything is passed flat, since only flat arguments are seen by rules.

    The order of the arguments: what is fixed, the numbers, then the columns of `StepInputs`. The
    order of the results: the columns of `StepOutputs`.
    """

    @staticmethod
    def forward(step: _Step, *operands: Any) -> tuple[Tensor, ...]:
        numbers, inputs = step.split(operands)
        return tuple(chain(*_step_eagerly(step, inputs, numbers, memory.results_apart).columns))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        step, *operands = inputs
        numbers, leaves = step.split(operands)
        needs = step.rule.numbers(*ctx.needs_input_grad[1 : 1 + step.number_count])
        kept = step.derivative.keep(leaves, StepOutputs.of(step.columns(output)), needs)
        ctx.step = step
        ctx.lengths = [len(column) for column in kept]
        ctx.numbers = [None if isinstance(number, Tensor) else number for number in numbers]
        tensors = [number for number in numbers if isinstance(number, Tensor)]
        ctx.save_for_backward(*tensors, *chain(*kept))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        step, tensors = ctx.step, iter(ctx.saved_tensors)
        numbers = step.rule.numbers(*(next(tensors) if n is None else n for n in ctx.numbers))
        kept = [[next(tensors) for _ in range(length)] for length in ctx.lengths]
        needs = step.rule.numbers(*ctx.needs_input_grad[1 : 1 + step.number_count])
        by_number, by_leaf = step.derivative.pull_back(
            kept, numbers, step.options, needs, step.columns(cotangents)
        )
        return (None, *by_number, *chain(*by_leaf))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], step: _Step, *operands: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        flat = _step_stacked(step, info.batch_size, in_dims[1:], operands)
        return flat, (0,) * len(flat)


# torch leaves `apply` untyped.
_apply: Callable[..., tuple[Tensor, ...]] = _StepFunction.apply


def _of_equations(rule: UpdateRule) -> Adjoint:
    """Return the derivative of the equations, by torch's own, where none is written by hand."""
    return Adjoint(
        lambda inputs, _outputs, _needs: inputs.columns, partial(_pull_back_equations, rule)
    )


def _pull_back_equations(
    rule: UpdateRule,
    kept: Sequence[list[Tensor]],
    numbers: Any,
    options: Any,
    needs: Any,
    cotangents: list[list[Tensor | None]],
) -> tuple[list[Tensor | None], list[list[Tensor | None]]]:
    """Return the cotangents of numbers and leaves: those of all results go back together."""
    wanted = [name for name in needs._fields if getattr(needs, name) is True]
    columns = [list(map(_of_now, column)) for column in kept]
    numbers = numbers._make(map(_of_now, numbers))

    def step(own: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
        inputs = StepInputs.of(list(_cut(leaves, len(columns))))
        chosen = numbers._replace(**dict(zip(wanted, own, strict=True)))
        return list(chain(*dispatch.plain_step(rule, inputs, chosen, options).columns))

    leaves = list(chain(*columns))
    vjp: Any = torch.func.vjp  # which is typed as if it always returned auxiliary output
    results, pull_back = vjp(step, [getattr(numbers, name) for name in wanted], leaves)
    given = [
        torch.zeros_like(result) if cotangent is None else cotangent
        for result, cotangent in zip(results, chain(*cotangents), strict=True)
    ]
    by_number, by_leaf = pull_back(given)
    found = dict(zip(wanted, by_number, strict=True))
    return [found.get(name) for name in numbers._fields[:-1]], list(_cut(by_leaf, len(columns)))


def _of_now(kept: Any) -> Any:
    """Return a tensor that was kept, out of what is left of a transform that is over.

    It may be wrapped for a level that has ended, as where what `torch.func.vjp` returned is called.
    An operator takes no notice; a transform within which it is used would not know the level.
    """
    return kept.view_as(kept) if isinstance(kept, Tensor) and transforms.transformed() else kept


def _with_dim_of_vmap(number: Number, dim: int | None) -> Number:
    """Put the dimension of this vmap in front; those of vmaps inside of it are there already."""
    if not isinstance(number, Tensor):
        return number
    if dim is not None:
        return number if dim == 0 else number.movedim(dim, 0)
    # A number with dimensions of inner vmaps needs a place for this one; a 0-dim number has none.
    return number.unsqueeze(0) if number.ndim > 0 else number


def _key_of_each(key: Number, dim: int | None, size: int) -> Tensor:
    """Return the key of each member of a vmap, which may be the same for all."""
    if not isinstance(key, Tensor):
        return torch.full((size,), key, dtype=torch.float64, device="cpu")
    return key.expand(size, *key.shape) if dim is None else key.movedim(dim, 0)


def _member_dims(numbers: Any) -> int:
    """How many dimensions of members a number has at the most."""
    return max(number.ndim if isinstance(number, Tensor) else 0 for number in numbers)


def _with_dims_of_inner_vmaps(numbers: Any) -> Any:
    """Give numbers that differ over outer vmaps alone a place for the inner ones, too."""
    lead = _member_dims(numbers)
    if lead < 2:
        return numbers
    return numbers._make(
        number.reshape(number.shape + (1,) * (lead - number.ndim))
        if isinstance(number, Tensor) and 0 < number.ndim < lead
        else number
        for number in numbers
    )


def _leaf_to_front(leaf: Tensor, dim: int | None, size: int) -> Tensor:
    if dim == 0:
        return leaf
    return leaf.expand(size, *leaf.shape) if dim is None else leaf.movedim(dim, 0)


def _cut(flat: Sequence[Any], count: int) -> Iterator[list[Any]]:
    """Cut a flat sequence into so many columns of one length."""
    length = len(flat) // count
    return (list(flat[i * length : (i + 1) * length]) for i in range(count))
