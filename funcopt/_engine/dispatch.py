"""The one place where a kernel is chosen, and the equations in plain operators as one of them.

`plan` decides everything and refuses whatever is to be refused; `run` and `run_` then make the step
out of place or in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import transforms
from .._core.tensors import compute_dtype, double, fit, is_narrow, on_one_thread, scaled, write
from .._core.types import Number
from . import memory
from .counts import PerLeaf, each_leaf, grouped_by_numbers, is_stacked, kind_of_number, read_if_same
from .memory import Batch, Layout, layout_of
from .rule import Kernel, StepInputs, StepOutputs, UpdateRule, is_read

# Below this many elements in the average leaf of a member, a kernel call for each member costs
# more than the equations on all members at once.
_WORTH_A_CALL = 512


def _kernel(rule: UpdateRule, name: str) -> Kernel:
    return rule.kernel(name) if name != "plain" else _plain(rule)


def _plain(rule: UpdateRule) -> Kernel:
    """Return the equations as a kernel: operators serve whatever device or number torch does."""
    return Kernel(
        partial(plain_step_, rule),
        takes_members=True,
        serves_dtypes=lambda _param, _slots: True,
        rounds_stochastically=True,
    )


def unserved(rule: UpdateRule, name: str, device: torch.device) -> str | None:
    """Say why a kernel that was asked for by name cannot serve leaves on a device, if so."""
    if name == "auto":
        return None
    return _kernel(rule, name).unsupported_reason(transforms.stand_in(device), None)


class Part(NamedTuple):
    """Leaves that can be moved together, batch by batch, with the same numbers."""

    batches: list[Batch]
    kernel: Kernel
    stacked: bool  # leaves have a first dimension of members, with numbers of their own
    launcher: Any = None  # what makes the step of all leaves, if one call does that

    @property
    def is_one_call(self) -> bool:
        """Whether one call makes the step, which is told the count."""
        return self.launcher is not None and not self.counts_on_device

    def launch(self, inputs: StepInputs, outputs: StepOutputs, numbers: Any) -> None:
        """Make the step by that call: of these leaves, those that are its own."""
        [batch] = self.batches
        own = inputs.take(batch.indices)
        in_place = outputs.params is inputs.params
        results = own.targets if in_place else outputs.take(batch.indices)
        self.launcher.step(own, results, numbers)

    @property
    def counts_on_device(self) -> bool:
        """Whether that call advances the count, too, and reads a condition for both."""
        return self.launcher is not None and self.kernel.counts_on_device


Plan = list[tuple[Part, Any]]
"""Who moves what, with which numbers."""


def run(
    inputs: StepInputs,
    plan: Plan,
    options: Any,
    layout: Layout,
    make_results: Callable[[StepInputs, Layout], StepOutputs] = memory.results,
) -> StepOutputs:
    """Return the leaves after one step, in memory that nobody else holds."""
    if not layout.plain:
        copied = memory.clones(inputs)
        run_(copied, plan, options, layout)
        return copied.targets
    inputs = inputs if layout.ready else memory.borrow(inputs)
    outputs = make_results(inputs, layout)
    for part, numbers in plan:
        if part.is_one_call:
            part.launch(inputs, outputs, numbers)
            continue
        for batch in part.batches:
            own, results = inputs.take(batch.indices), outputs.take(batch.indices)
            if part.kernel.step_to is not None:
                part.kernel.step_to(own, results, numbers, options)
                continue
            memory.copy_into(results, own)
            copied = StepInputs(results.params, own.grads, results.slots, own.ids)
            _step_batch_(copied, batch, part, numbers, options)
    return outputs


def run_(inputs: StepInputs, plan: Plan, options: Any, layout: Layout) -> None:
    """Write the leaves after one step over those before it."""
    borrowed = inputs if layout.ready else memory.borrow(inputs)
    for part, numbers in plan:
        if part.is_one_call:
            part.launch(borrowed, borrowed.targets, numbers)
            continue
        for batch in part.batches:
            _step_batch_(borrowed.take(batch.indices), batch, part, numbers, options)
    memory.give_back(borrowed, inputs)


def counted(plan: Plan, count: Tensor) -> tuple[Plan, Tensor]:
    """Return the plan with the count after the step, which was one with the count before it."""
    new_count = count + 1
    return [(part, numbers._replace(step=new_count)) for part, numbers in plan], new_count


def _step_batch_(inputs: StepInputs, batch: Batch, part: Part, numbers: Any, options: Any) -> None:
    if batch.small:
        on_one_thread(_step_, inputs, part, numbers, options)
    else:
        _step_(inputs, part, numbers, options)


def _step_(inputs: StepInputs, part: Part, numbers: Any, options: Any) -> None:
    if part.stacked and not part.kernel.takes_members:
        for member, own in memory.members(inputs, numbers):
            if own.active != 0.0:
                part.kernel.step_(member, own, options)
    elif part.kernel.scales_gradients or _is_one(numbers.grad_scale):
        part.kernel.step_(inputs, numbers, options)
    elif options.rounding == "stochastic":  # for which an element must know its place in the leaf
        grads = scaled(inputs.grads, numbers.grad_scale)
        part.kernel.step_(inputs._replace(grads=grads), numbers, options)
    else:
        for piece in memory.scaled_pieces(inputs, numbers.grad_scale):
            part.kernel.step_(piece, numbers, options)


def _is_one(grad_scale: Number) -> bool:
    return isinstance(grad_scale, float) and grad_scale == 1.0


def plan(
    rule: UpdateRule,
    inputs: StepInputs,
    numbers: Any | list[Any],
    options: Any,
    layout: Layout,
    *,
    in_place: bool,
) -> Plan:
    """Decide who moves what, with which numbers.

    Raises:
        ValueError: If a number is out of range, or a kernel that was asked for by name cannot serve
            a leaf or a number.
    """
    if not isinstance(numbers, list):
        own: Any = numbers
        kinds: tuple[Any, ...] = ()
        if not is_read(numbers):
            own = numbers._make([n if type(n) is float else read_if_same(n) for n in numbers])
            if is_stacked(numbers.key):  # also if all agree: each member counts its own elements
                own = own._replace(key=numbers.key.detach())
            # Who serves does not depend on values, but for the one that gradients are scaled by.
            kinds = tuple([float if type(n) is float else kind_of_number(n) for n in own])
        key = rule, options, in_place, _is_one(own.grad_scale), kinds
        parts = layout.plans.get(key)
        if parts is None:
            parts = layout.plans[key] = _parts(rule, inputs, own, options, layout, in_place)
        if PerLeaf not in kinds:
            return [(part, own) for part in parts]
        if all(part.launcher is not None and part.kernel.takes_leaves for part in parts):
            return [(part, own) for part in parts]
        numbers = each_leaf(own, len(inputs.params))
    pairs: Plan = []
    for indices, own in grouped_by_numbers(numbers):
        taken = inputs.take(indices)
        for part in _parts(rule, taken, own, options, layout_of(taken), in_place):
            batches = [batch.among(indices) for batch in part.batches]
            pairs.append((part._replace(batches=batches), own))
    return pairs


def _parts(
    rule: UpdateRule,
    inputs: StepInputs,
    numbers: Any,
    options: Any,
    layout: Layout,
    in_place: bool,
) -> list[Part]:
    parts = []
    found = layout.batches_in_place if in_place else layout.batches
    for group, several in zip(layout.groups, found, strict=True):
        first = [column[group[0]] for column in inputs.targets.columns]
        kernel = _choose(rule, first, numbers, options, layout)
        # Some kernels serve large and small leaves alike, and some rules see whole leaves alone.
        at_once = kernel.step_to is not None or not rule.traits.elementwise
        batches = [Batch(group)] if at_once else several
        stacked = not is_read(numbers) and any(map(is_stacked, numbers))
        at_one_call = at_once and len(layout.groups) == 1 and layout.fast_path_ok
        served = kernel.takes_members if stacked else True
        launcher = None
        if at_one_call and served and kernel.launcher is not None:
            launcher = kernel.launcher(inputs, options)
        part = Part(batches, kernel, stacked, launcher)
        parts.append(_of_members(part, rule, inputs, numbers, options) if stacked else part)
    return parts


def _choose(
    rule: UpdateRule,
    leaf: list[Tensor],
    numbers: Any,
    options: Any,
    layout: Layout,
) -> Kernel:
    """Return who moves leaves like this one: a parameter and its slots."""
    tensors = [number for number in numbers if isinstance(number, Tensor)]
    if not layout.plain or (tensors and not transforms.all_plain(tensors)):
        return _plain(rule)  # a subclass knows operators only
    device = transforms.stand_in(leaf[0].device)
    dtype, *slots = dtypes = [tensor.dtype for tensor in leaf]
    by_chance = options.rounding == "stochastic" and any(map(is_narrow, dtypes))
    if by_chance and not layout.ready:
        return _plain(rule)  # kernels go by the place in memory, and bits by the place in the leaf
    if options.kernel != "auto":
        kernel = _kernel(rule, options.kernel)
        reason = kernel.unsupported_reason(device, numbers)
        if reason is None and not kernel.serves_dtypes(dtype, slots):
            reason = f"it does not serve parameters of {dtype} beside moments of {slots[0]}"
        if reason is None and by_chance and not kernel.rounds_stochastically:
            reason = "it rounds to the nearest number, and rounding='stochastic' was asked for"
        if reason is not None:
            raise ValueError(
                f"kernel={options.kernel!r} cannot serve leaves on {device}: {reason}. "
                f"kernel='auto' takes the fastest one that can."
            )
        return kernel
    for name in rule.kernels:
        kernel = rule.kernel(name)
        served = kernel.serves_dtypes(dtype, slots)
        served = served and (kernel.rounds_stochastically or not by_chance)
        if served and kernel.unsupported_reason(device, numbers) is None:
            return kernel
    return _plain(rule)


def _of_members(
    part: Part, rule: UpdateRule, inputs: StepInputs, numbers: Any, options: Any
) -> Part:
    """Make one batch of all, and if the members are small move them together."""
    indices = sorted(chain.from_iterable(batch.indices for batch in part.batches))
    part = part._replace(batches=[Batch(indices)])
    if options.kernel != "auto" or part.kernel.takes_members:
        return part
    # Along each dimension in which numbers differ, all have its size, or 1.
    shapes = [number.shape for number in numbers if is_stacked(number)]
    members = math.prod(map(max, zip(*shapes, strict=True)))
    elements = sum(inputs.params[index].numel() for index in indices)
    small = members > 1 and elements < _WORTH_A_CALL * members * len(indices)
    return part._replace(kernel=_plain(rule)) if small else part


def safe_sqrt(squares: Tensor) -> Tensor:
    """The square root, with derivative zero at zero.

    There `sqrt` has an infinite one, and infinity times a zero gradient is NaN; but at zero the
    second moment does not move the parameter to first order, so zero is also the true value. The
    first fill keeps the infinity out of the backward pass, the second sets the value.
    """
    if not transforms.followed((squares,)):
        return squares.sqrt()
    zero = squares == 0
    return squares.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def plain_step(
    rule: UpdateRule, inputs: StepInputs, numbers: Any | list[Any], options: Any
) -> StepOutputs:
    """Return the leaves after one step, with the same numbers or each with its own."""
    rows: list[list[Tensor]] = []
    for index, (row, own) in enumerate(_each(rule, inputs, numbers, options)):
        news = _new_leaf(rule, row, own, options)
        rows.append(_stored(news, inputs, index, _of_leaf(numbers, index), options))
    columns = list(map(list, zip(*rows, strict=True)))
    return StepOutputs.of(columns or [[] for _ in inputs.targets.columns])


def plain_step_(rule: UpdateRule, inputs: StepInputs, numbers: Any, options: Any) -> None:
    """Do the same in place, leaf by leaf, so that no more than one leaf is there twice."""
    equations_ = rule.equations_
    # A subclass may lack operators in place, or return copies of what it holds.
    plain = transforms.all_plain(chain(*inputs.columns))
    for index, (row, own) in enumerate(_each(rule, inputs, numbers, options)):
        if equations_ is not None and plain and isinstance(numbers.active, float):
            param, grad, *slots = row
            equations_(param, grad, tuple(slots), own, options)
            news = [param, *slots]
        else:
            news = _new_leaf(rule, row, own, options)
        olds = [column[index] for column in inputs.targets.columns]
        news = _stored(news, inputs, index, numbers, options)
        for old, new in zip(olds, news, strict=True):
            if new is not old:
                write(old, new)


def _new_leaf(rule: UpdateRule, row: list[Tensor], numbers: Any, options: Any) -> list[Tensor]:
    """Return the new parameter and slots of a leaf, as the equations make them."""
    param, grad, *slots = row
    news: Any = rule.equations(param, grad, tuple(slots), numbers, options)
    olds = [param, *slots]
    fits = isinstance(news, (list, tuple)) and len(news) == len(olds)
    if not fits or not all(map(_replaces, news, olds)):
        from .equations import refuse_result  # noqa: PLC0415  # which right equations do without

        refuse_result(rule, news, olds)
    return list(news)


def _replaces(new: object, old: Tensor) -> bool:
    return isinstance(new, Tensor) and new.shape == old.shape


def _of_leaf(numbers: Any | list[Any], index: int) -> Any:
    return numbers[index] if isinstance(numbers, list) else numbers


def _stored(
    news: Sequence[Tensor], inputs: StepInputs, index: int, numbers: Any, options: Any
) -> list[Tensor]:
    """Return what came of a leaf in the dtypes in which it is stored."""
    olds = [column[index] for column in inputs.targets.columns]
    if options.rounding != "stochastic":
        stored = [new.to(old.dtype) for new, old in zip(news, olds, strict=True)]
    else:
        stored = _stored_by_chance(news, olds, inputs.ids[index] if inputs.ids else index, numbers)
    if isinstance(numbers.active, float):
        return stored
    moves = fit(numbers.active, olds[0]) != 0
    return [torch.where(moves, new, old) for new, old in zip(stored, olds, strict=True)]


def _stored_by_chance(
    news: Sequence[Tensor], olds: Sequence[Tensor], leaf: int, numbers: Any
) -> list[Tensor]:
    from .rounding import random_bits, round_stochastically  # noqa: PLC0415  # for this alone

    stored = []
    for column, (new, old) in enumerate(zip(news, olds, strict=True)):
        dtype = old.dtype
        if new.dtype is dtype or not is_narrow(dtype):
            stored.append(new.to(dtype))
            continue
        own = numbers.key, numbers.step, leaf, column
        stored.append(round_stochastically(new, random_bits(*own, new.shape, new.device), dtype))
    return stored


def _each(
    rule: UpdateRule, inputs: StepInputs, numbers: Any | list[Any], options: Any
) -> Iterator[tuple[list[Tensor], Any]]:
    """Yield the tensors of each leaf in the dtype to compute in, and the coefficients to fit."""
    coefficients: dict[int, Any] = {}
    fitted: dict[object, Any] = {}
    count = len(inputs.params)
    for index, own in enumerate(numbers if isinstance(numbers, list) else [numbers] * count):
        row = [column[index] for column in inputs.columns]
        dtype = compute_dtype(row[0].dtype)
        row = [tensor if tensor.dtype is dtype else tensor.to(dtype) for tensor in row]
        # A tracer pays for every operator, so the numbers are made to fit once for leaves alike.
        alike = id(own), dtype, row[0].device, row[0].ndim
        if alike not in fitted:
            if id(own) not in coefficients:
                coefficients[id(own)] = rule.coefficients(own._make(map(double, own)), options)
            unfitted = coefficients[id(own)]
            fitted[alike] = unfitted._make([fit(number, row[0]) for number in unfitted])
        yield row, fitted[alike]
