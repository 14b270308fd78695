"""One update of an optimizer that is made by a rule: the way from trees to kernels and back.

Data goes one way:

1. `prepare` lays the trees out flat. Leaves that look as they did before are recalled; others are
   checked one by one, paired by key, and remembered.
2. `numbers_at` finds what the hyperparameters are at this update, and checks them.
3. `_route_step` asks who is watching. A tracer, or forward mode, gets the equations in plain
   operators, `dispatch.plain_step`; vmap and reverse mode get `autograd`, one function for the
   whole step; where nobody watches, `dispatch` has the fastest kernel make it that is right for
   these tensors.
4. `Prepared.rebuild` puts the results into trees like those that were given.

In place, `check_inplace` stands before the third stage, so that nothing is half-written, and the
fourth is not needed. Most steps of a training loop are like the one before on other numbers: for
these `_find_routine` is all of the first stage.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.tensors import recording
from .._core.types import Number, Tree
from . import dispatch, memory
from .checks import all_differ, check_inplace
from .counts import (
    fresh,
    is_plain_count,
    is_plain_key,
    key_of,
    next_key,
    value_of,
)
from .hyperparameters import check_counts, detached, numbers_at, with_grad_scale
from .memory import Layout, layout_of, write_all
from .prepare import (
    Prepared,
    check_untied,
    have_history,
    is_followed,
    is_kept,
    keep_requiring,
    multiplied,
    outside_unless_plain,
    prepare,
    recall,
    trees_of,
)
from .rule import Setup, StepInputs, StepOutputs, UpdateRule


def update(opt: Any, grads: Tree, state: Any, params: Tree) -> tuple[Any, Any]:
    """Return the new parameters and the new state, in fresh memory."""
    return update_scaled(opt, grads, None, state, params, in_place=False)


def update_(opt: Any, grads: Tree, state: Any, params: Tree) -> tuple[Any, Any]:
    """Write the new parameters and the new state over the old, which are returned."""
    return update_scaled(opt, grads, None, state, params, in_place=True)


def update_scaled(
    opt: Any, grads: Tree, grad_scale: Tensor | None, state: Any, params: Tree, *, in_place: bool
) -> tuple[Any, Any]:
    """Update by gradients times a number of shape (); None is 1."""
    if grad_scale is not None:
        grads, grad_scale = outside_unless_plain(grads, grad_scale)
    rule: UpdateRule = opt.rule
    setup = rule.setup_of(opt)
    routine = _find_routine(opt, rule, setup, grads, state, params, in_place=in_place)
    if routine is not None:
        numbers = routine.numbers(rule, opt)
        if setup.numbers is not None or not have_history(numbers[0]):
            (own,) = numbers if grad_scale is None else with_grad_scale(numbers, grad_scale)
            if in_place:
                routine.step_(rule, own, setup.options)
                return params, state
            new_params, *kept = routine.step(rule, own, setup.options)
            return new_params, rule.state_of(setup, kept, next_key(state))
    prepared = _prepare(opt, rule, setup, grads, state, params)
    if not in_place:  # in place, `check_inplace` refuses it as what would be written twice
        check_untied(prepared.params.leaves, prepared.params.structure)
    counts = prepared.counts.after(prepared.active, prepared.watched)
    # A schedule is asked once: with the numbers of a routine that was left, go on.
    if routine is None or setup.trees:
        numbers = _numbers(opt, rule, prepared, counts)
    elif routine.new_count is None:  # they are those of the count before
        numbers = [own._replace(step=detached(counts[0])) for own in numbers]
    if grad_scale is not None and is_followed(prepared, setup.options, numbers):
        scaled_grads = multiplied(grads, grad_scale)
        return update_scaled(opt, scaled_grads, None, state, params, in_place=in_place)
    numbers = with_grad_scale(numbers, grad_scale)
    if in_place:
        _write(rule, setup, prepared, counts, numbers)
        return params, state
    return _build(rule, setup, prepared, counts, numbers, next_key(state))


def _build(
    rule: UpdateRule,
    setup: Setup,
    prepared: Prepared,
    counts: list[Number],
    numbers: list[Any],
    key: Tree,
) -> tuple[Any, Any]:
    """Return the trees after a step."""
    gradients, slots = prepared.historic()
    others = (*slots, *chain.from_iterable(numbers))
    with recording(prepared.params.leaves, gradients, others, setup.options.differentiable):
        own_numbers = prepared.counts.of_leaves(numbers)
        outputs = _route_step(rule, prepared.inputs, own_numbers, setup.options, prepared.layout)
        new_params, *new_slots = prepared.rebuild(outputs)
    kept = [prepared.counts.rebuild(counts), *new_slots]
    return new_params, rule.state_of(setup, kept, key)


def _write(
    rule: UpdateRule, setup: Setup, prepared: Prepared, counts: list[Number], numbers: list[Any]
) -> None:
    """Write them over those before it."""
    check_inplace(rule, prepared, counts, numbers)
    # Entering no_grad takes longer than a step of a small leaf.
    may_record = prepared.layout is None or prepared.layout.params_require_grad
    with torch.no_grad() if may_record else nullcontext():
        own_numbers = prepared.counts.of_leaves(numbers)
        _route_step_(rule, prepared.inputs, own_numbers, setup.options, prepared.layout)
        prepared.counts.write(counts)


def check_update_(opt: Any, grads: Tree, state: Any, params: Tree) -> bool:
    """Whether an update in place is sure to go through; raises what it would raise."""
    rule: UpdateRule = opt.rule
    setup = rule.setup_of(opt)
    prepared = _prepare(opt, rule, setup, grads, state, params)
    counts = prepared.counts.after(prepared.active, prepared.watched)
    numbers = _numbers(opt, rule, prepared, counts)
    check_inplace(rule, prepared, counts, numbers)
    # A kernel that was asked for by name may yet refuse numbers that it cannot read.
    tensors = [n for n in chain.from_iterable(numbers) if not isinstance(n, float)]
    can_be_read = all(map(transforms.on_host, tensors)) and transforms.all_plain(tensors)
    return transforms.observed() or setup.options.kernel == "auto" or can_be_read


def _prepare(
    opt: Any, rule: UpdateRule, setup: Setup, grads: Tree, state: Any, params: Tree
) -> Prepared:
    prepared, kernel = prepare(opt, rule, grads, state, params), setup.options.kernel
    for index, leaf in enumerate(prepared.inputs.params if kernel != "auto" else []):
        reason = dispatch.unserved(rule, kernel, leaf.device)
        if reason is not None:
            raise ValueError(
                f"{prepared.path('params', index)} is on {leaf.device}, which kernel="
                f"{kernel!r} cannot serve: {reason}. kernel='auto' takes one that can."
            )
    return prepared


def _numbers(opt: Any, rule: UpdateRule, prepared: Prepared, counts: list[Number]) -> list[Any]:
    """Return the numbers for each count of those leaves that have a gradient."""
    olds, news = prepared.counts.around(prepared.active, counts)
    check_counts(news)
    numbers = numbers_at(rule, opt, olds, news, prepared.key)
    setup = rule.setup_of(opt)
    if not setup.trees:
        return numbers
    from . import per_leaf  # noqa: PLC0415  # which few optimizers need

    counted = list(zip(olds, numbers, strict=True))
    return per_leaf.spread(rule, opt, setup, prepared.params, prepared.active, counted)


def _route_step(
    rule: UpdateRule,
    inputs: StepInputs,
    numbers: Any | list[Any],
    options: Any,
    layout: Layout | None,
) -> StepOutputs:
    """Return the leaves after one step: by whom depends on who is watching.

    The inputs are checked: alike within a leaf, dense in layout (any strides), of floating-point or
    complex dtype. Where each leaf has its own numbers, leaves that share theirs share the object.
    """
    real = layout.real if layout else not any(map(Tensor.is_complex, inputs.params))
    if not real and rule.traits.elementwise:
        from .pairs import step_as_real  # noqa: PLC0415  # which is for complex leaves alone

        return step_as_real(
            lambda part, own: _route_step(rule, part, own, options, None), inputs, numbers
        )
    rows = numbers if isinstance(numbers, list) else [numbers]
    if transforms.needs_plain_operators(*inputs.columns, *rows):
        return dispatch.plain_step(rule, inputs, numbers, options)
    if transforms.transformed() or torch.is_grad_enabled():
        if not rule.traits.elementwise:  # members cannot be stacked, nor complex leaves be split
            return dispatch.plain_step(rule, inputs, numbers, options)
        from . import autograd  # noqa: PLC0415  # which is for derivatives and members alone

        return autograd.step_per_numbers(rule, inputs, numbers, options)
    layout = layout or layout_of(inputs)
    plan = dispatch.plan(rule, inputs, numbers, options, layout, in_place=False)
    return dispatch.run(inputs, plan, options, layout)


def _route_step_(
    rule: UpdateRule,
    inputs: StepInputs,
    numbers: Any | list[Any],
    options: Any,
    layout: Layout | None,
) -> None:
    """Move the leaves in place, with the same numbers, while no gradient is recorded."""
    if layout is None or transforms.observed() or memory.any_lazy(inputs, layout):
        write_all(inputs, _route_step(rule, inputs, numbers, options, layout))
        return
    if not layout.real and rule.traits.elementwise:
        from .pairs import as_real  # noqa: PLC0415  # which is for complex leaves alone

        inputs = as_real(inputs)
        layout = layout_of(inputs)
    plan = dispatch.plan(rule, inputs, numbers, options, layout, in_place=True)
    dispatch.run_(inputs, plan, options, layout)


class _Routine(NamedTuple):
    """A step that is like one before, but for its numbers, which must have no history."""

    inputs: StepInputs
    structure: pytree.Structure  # of every tree
    layout: Layout
    flat: list[Tensor]  # the columns of the inputs, one after another
    addresses: list[int]  # where these start
    step_count: Tensor  # how many updates were made
    new_count: float | None  # and after this one; None if that is on a device, and not read
    key: Number  # of random bits

    def numbers(self, rule: UpdateRule, opt: Any) -> list[Any]:
        """Return the numbers of the step; by a count on a device they are those before it."""
        new: Number = self.step_count if self.new_count is None else self.new_count
        if new is not self.step_count:
            check_counts([new])
        numbers = numbers_at(rule, opt, [self.step_count], [new], self.key)
        setup = rule.setup_of(opt)
        if not setup.trees:
            return numbers
        from . import per_leaf  # noqa: PLC0415  # nor these, mostly

        return [per_leaf.read(rule, opt, setup, self.structure, numbers[0])]

    def decides(
        self, applies: Tensor, rule: UpdateRule, numbers: Any, options: Any, *, in_place: bool
    ) -> bool:
        """Whether one call makes the step, or leaves it, by a condition that it reads itself."""
        if self.new_count is not None or applies.device != self.step_count.device:
            return False
        inputs, layout = self.inputs, self.layout
        (part, _), *_ = dispatch.plan(rule, inputs, numbers, options, layout, in_place=in_place)
        return part.counts_on_device

    def step(
        self, rule: UpdateRule, numbers: Any, options: Any, applies: Tensor | None = None
    ) -> list[Tree]:
        """Return the new tree of parameters, the new count, and the new trees of slots."""
        given = rule, numbers, options, applies
        if self.layout.params_require_grad:
            outputs, count = transforms.without_gradients(self._outputs, *given)
            keep_requiring(outputs.params, self.inputs.params)
        else:
            outputs, count = self._outputs(*given)
        structure = self.structure
        new_params, *slots = [pytree.unflatten(structure, own) for own in outputs.columns]
        return [new_params, count, *slots]

    def _outputs(
        self, rule: UpdateRule, numbers: Any, options: Any, applies: Tensor | None
    ) -> tuple[StepOutputs, Tensor]:
        inputs, layout, count = self.inputs, self.layout, self.step_count
        plan = dispatch.plan(rule, inputs, numbers, options, layout, in_place=False)
        (part, own), *_ = plan
        if self.new_count is not None:
            if part.launcher is None:
                outputs = dispatch.run(inputs, plan, options, layout)
            else:
                outputs = memory.results(inputs, layout)
                part.launcher.step(inputs, outputs, own, addresses=self.addresses)
            return outputs, fresh(self.new_count, count)
        if not part.counts_on_device:
            plan, new_count = dispatch.counted(plan, count)
            return dispatch.run(inputs, plan, options, layout), new_count
        outputs, new_count = memory.results(inputs, layout), torch.empty_like(count)
        part.launcher.step(inputs, outputs, own, new_count, applies, self.addresses)
        return outputs, new_count

    def step_(
        self, rule: UpdateRule, numbers: Any, options: Any, applies: Tensor | None = None
    ) -> None:
        """Move the leaves and the count in place."""
        if self.layout.params_require_grad:
            transforms.without_gradients(self._write, rule, numbers, options, applies)
        else:
            self._write(rule, numbers, options, applies)

    def _write(self, rule: UpdateRule, numbers: Any, options: Any, applies: Tensor | None) -> None:
        inputs, layout, count = self.inputs, self.layout, self.step_count
        plan = dispatch.plan(rule, inputs, numbers, options, layout, in_place=True)
        (part, own), *_ = plan
        moved = [*self.flat[: len(inputs.params)], *self.flat[2 * len(inputs.params) :]]
        if self.new_count is not None:
            if part.launcher is None:
                dispatch.run_(inputs, plan, options, layout)
            else:
                part.launcher.step(inputs, inputs.targets, own, addresses=self.addresses)
                memory.note_written(moved)
            count.fill_(self.new_count)
        elif not part.counts_on_device:
            plan, new_count = dispatch.counted(plan, count)
            dispatch.run_(inputs, plan, options, layout)
            count.copy_(new_count)
        else:
            part.launcher.step(inputs, inputs.targets, own, count, applies, self.addresses)
            memory.note_written([*moved, count])


def _find_routine(
    opt: Any,
    rule: UpdateRule,
    setup: Setup,
    grads: Tree,
    state: Any,
    params: Tree,
    *,
    in_place: bool,
) -> _Routine | None:
    """Return the step, if all but the numbers in it is as it was in one before."""
    options = setup.options
    if not isinstance(state, rule.state) or options.step_per_leaf or options.differentiable:
        return None
    trees, count = trees_of(opt, rule, setup.kept, grads, state, params), state.step
    if (
        transforms.transformed()
        or transforms.observed()
        or not is_plain_count(count)
        or (options.rounding == "stochastic" and not is_plain_key(state))
    ):
        return None
    recalled = recall(trees)
    if recalled is None or not recalled.flat or not recalled.layout.fast_path_ok:
        return None
    inputs, structure, layout, flat = recalled
    if not is_kept(setup, layout):
        return None
    addresses = list(map(Tensor.data_ptr, flat))
    if in_place:
        has_history = layout.params_require_grad and not all(p.is_leaf for p in inputs.params)
        addresses = [] if has_history else _remembered_apart(addresses, count.data_ptr(), layout)
        apart = bool(addresses)
    else:
        apart = all_differ(addresses[: len(inputs.params)])
    if (
        not apart
        or (transforms.may_be_dual() and transforms.any_dual(*inputs.columns, (count,)))
        or (
            options.kernel != "auto"
            and any(dispatch.unserved(rule, options.kernel, place) for place in layout.devices)
        )
    ):
        return None
    value = value_of(count)
    new_count = None if isinstance(value, Tensor) else value + 1
    key = key_of(state)
    return _Routine(inputs, structure, layout, flat, addresses, count, new_count, key)


def _remembered_apart(addresses: list[int], count: int, layout: Layout) -> list[int]:
    """Return addresses if no two are the same, else none; those of the last step as they were."""
    last: tuple[list[int], int] | None = layout.plans.get("apart")
    if last is not None and last[1] == count and last[0] == addresses:
        return last[0]  # the same list, by which a launcher knows that nothing has moved
    if not all_differ([*addresses, count]):
        return []
    layout.plans["apart"] = addresses, count
    return addresses
