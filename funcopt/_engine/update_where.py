"""An update that is made where a condition on the device holds, in the same pass over memory.

What holds on a device is not read, so that nothing waits for it. To make an update, keep what was
before it, and choose between the two takes three passes and twice the memory. A kernel that reads
the condition itself writes the new values or the old.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .._core import transforms
from .._core.types import Tree, own_traits
from .checks import are_apart, check_inplace
from .counts import is_plain_count, next_key
from .hyperparameters import with_grad_scale
from .memory import note_written, results
from .prepare import Prepared, have_history, prepare
from .rule import UpdateRule
from .update import _find_routine, _numbers


def update_where(
    applies: Tensor,
    opt: Any,
    grads: Tree,
    grad_scale: Tensor | None,
    state: Any,
    params: Tree,
    *,
    in_place: bool,
) -> tuple[Tree, Any] | None:
    """Update where a condition holds, else keep every bit; None if that takes more than one pass.

    Then nothing was done. An optimizer that is no rule's, one whose kernel cannot decide on the
    device, and whatever is followed for derivatives, members or a trace, is for the caller.

    Args:
        applies: The condition: a bool tensor of shape ().
        opt: The optimizer.
        grads: The gradients, which are multiplied by `grad_scale`, if that is given.
        grad_scale: A tensor of shape ().
        state: The state.
        params: The parameters.
        in_place: Whether to write parameters and state over the old, or in fresh memory.

    Raises:
        Exception: Whatever the update itself would raise.
    """
    given = [applies] if grad_scale is None else [applies, grad_scale]
    if (
        transforms.transformed()
        or transforms.observed()
        or not own_traits(opt).by_rule
        or not transforms.all_plain(given)
        or any(map(transforms.has_derivative, given))
    ):
        return None
    rule: UpdateRule = opt.rule
    setup = rule.setup_of(opt)
    if setup.options.step_per_leaf or setup.options.differentiable or setup.trees:
        return None
    routine = _find_routine(opt, rule, setup, grads, state, params, in_place=in_place)
    if routine is not None and setup.numbers is not None:
        (own,) = with_grad_scale(routine.numbers(rule, opt), grad_scale)
        if routine.decides(applies, rule, own, setup.options, in_place=in_place):
            if in_place:
                routine.step_(rule, own, setup.options, applies)
                return params, state
            new_params, *kept = routine.step(rule, own, setup.options, applies)
            return new_params, rule.state_of(setup, kept, next_key(state))
    return _update_carefully(applies, opt, grads, grad_scale, state, params, in_place=in_place)


def _update_carefully(
    applies: Tensor,
    opt: Any,
    grads: Tree,
    grad_scale: Tensor | None,
    state: Any,
    params: Tree,
    *,
    in_place: bool,
) -> tuple[Tree, Any] | None:
    rule: UpdateRule = opt.rule
    setup = rule.setup_of(opt)
    prepared = prepare(opt, rule, grads, state, params)
    count = prepared.counts.tensors[0]
    if prepared.watched or prepared.layout is None or not prepared.layout.fast_path_ok:
        return None
    with torch.no_grad():
        counts = prepared.counts.after(prepared.active, prepared.watched)
        numbers = _numbers(opt, rule, prepared, counts)
        (own,) = with_grad_scale(numbers, grad_scale)
        parts = None if have_history(own) else _parts(rule, setup.options, prepared, own, applies)
        if parts is None or count.device != applies.device:
            return None
        if in_place and not _is_plainly_fine(prepared):
            check_inplace(rule, prepared, counts, [own])
        inputs = prepared.inputs
        outputs = inputs.targets if in_place else results(inputs, prepared.layout)
        for indices, launcher in parts:
            launcher.step(inputs.take(indices), outputs.take(indices), own, applies=applies)
        made = applies.to(count.dtype)
        if in_place:
            note_written(list(chain(*outputs.columns)))
            count.add_(made)
            return params, state
        new_params, *slots = prepared.rebuild(outputs)
        return new_params, rule.state_of(setup, [count + made, *slots], next_key(state))


def _is_plainly_fine(prepared: Prepared) -> bool:
    """Whether nothing can stand against writing in place, as nearly always.

    The layout vouches for the leaves, save for where they start and for parameters' histories.
    """
    inputs, count = prepared.inputs, prepared.counts.tensors[0]
    return (
        is_plain_count(count)
        and all(param.is_leaf for param in inputs.params)
        and are_apart([*chain(*inputs.columns), count])
    )


def _parts(
    rule: UpdateRule, options: Any, prepared: Prepared, numbers: Any, applies: Tensor
) -> Sequence[tuple[list[int], Any]] | None:
    """Return which leaves go together, with what makes their step; None if there is none for all.

    Those of one dtype go together. It is remembered with what is known of the leaves.
    """
    layout = prepared.layout
    kernel = _kernel(rule, options, applies.device, numbers)
    if kernel is None or layout is None or any(d != applies.device for d in layout.devices):
        return None
    if not all(kernel.serves_dtypes(param, slots) for param, *slots in layout.dtypes):
        return None
    key = "where", kernel, options
    parts = layout.plans.get(key)
    if parts is None:
        parts = layout.plans[key] = [
            (indices, kernel.launcher(prepared.inputs.take(indices), options))
            for indices in layout.groups
        ]
    found: Sequence[tuple[list[int], Any]] = parts
    return found


def _kernel(rule: UpdateRule, options: Any, device: torch.device, numbers: Any) -> Any:
    """Return the kernel that decides on the device, if one does that may be taken."""
    for name in rule.kernels if options.kernel == "auto" else [options.kernel]:
        kernel = rule.kernel(name) if name in rule.kernels else None
        if kernel is None or not kernel.counts_on_device:
            continue
        if kernel.unsupported_reason(device, numbers) is None:
            return kernel
    return None
