"""The update of 16-bit parameters with what rounding lost of them, in one pass over memory.

`Compensated` adds up parameter and compensation, has the inner optimizer move the sum, and splits
it again, which is seven passes. The native kernel does all of it on its way, to the same bits: to
it, the compensation is one more slot. Nothing else needs to know, so this serves steps that look as
one did before, by a rule that differs from the optimizer's in that slot and in its one kernel.
"""

from __future__ import annotations

from collections import namedtuple
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from .._core import pytree, transforms
from .._core.tensors import is_narrow
from .._core.types import Tree, own_traits
from .counts import next_key
from .memory import layout_of
from .prepare import have_history
from .rule import Slot, StepInputs, UpdateRule
from .update import _find_routine


@cache
def _with_compensation(rule: UpdateRule) -> UpdateRule:
    """Return a rule with the compensation as its last slot."""
    names = ["step", *(slot.name for slot in rule.slots), "compensation", "key"]
    return UpdateRule(
        state=namedtuple("_State", names, defaults=[()]),
        slots=(*rule.slots, Slot("compensation", is_moment=False)),
        hyperparams=rule.hyperparams,
        equations=rule.equations,  # which are never asked: only the kernel is
        options=rule.options,
        kernels={"native": rule.kernels["native"]},
        traits=rule.traits,
    )


def as_one(inner: Any) -> Any:
    """Return an optimizer that moves parameters with their compensation; None if nothing does."""
    rule = getattr(inner, "rule", None)
    if rule is None or not own_traits(inner).by_rule or "native" not in rule.kernels:
        return None
    options = rule.setup_of(inner).options
    if options.kernel not in ("auto", "native") or options.rounding != "nearest":
        return None
    # The inner optimizer's own parameters are the sums, in float32.
    moments = options.moments if isinstance(options.moments, torch.dtype) else torch.float32
    own = {**vars(inner), "moments": moments, "rounding": "compensated", "kernel": "native"}
    own.pop("_setup", None)
    return SimpleNamespace(**own, rule=_with_compensation(rule))


def update_compensated(
    opt: Any, grads: Tree, state: Any, compensation: Tree, params: Tree, *, in_place: bool
) -> tuple[Tree, Any, Tree] | None:
    """Return the new parameters, inner state and compensation; None if it takes more than a pass.

    Args:
        opt: What `as_one` returned.
        grads: The gradients, in 16 bits as the parameters are.
        state: The state of the inner optimizer.
        compensation: What is to be added to the parameters.
        params: The parameters.
        in_place: Whether all is written over the old, in which case it is returned.
    """
    rule: UpdateRule = opt.rule
    if not isinstance(state, tuple) or getattr(state, "key", None) != ():
        return None
    setup = rule.setup_of(opt)
    own = rule.state(*state[:-1], compensation)
    routine = _find_routine(opt, rule, setup, grads, own, params, in_place=in_place)
    if routine is None or not all(is_narrow(own) for own, *_ in routine.layout.dtypes):
        return None
    (numbers,) = routine.numbers(rule, opt)
    kernel = rule.kernel("native")
    if have_history(numbers) or any(
        kernel.unsupported_reason(device, numbers) for device in routine.layout.devices
    ):
        return None
    if in_place:
        routine.step_(rule, numbers, setup.options)
        return params, state, compensation
    new_params, *kept = routine.step(rule, numbers, setup.options)
    made = rule.state_of(setup, kept, next_key(state))
    return new_params, type(state)(*made[:-2]), made.compensation


def remember(grads: Tree, state: Any, compensation: Tree, params: Tree) -> None:
    """Remember how the leaves of an update look that went well, for the next one."""
    if not isinstance(state, tuple):
        return
    slots = [tree for tree in state[1:-1] if not (isinstance(tree, tuple) and tree == ())]
    found = pytree.columns_of_dicts([params, grads, *slots, compensation])
    if found is None:
        return
    columns, _ = found
    if transforms.all_plain([leaf for column in columns for leaf in column]):
        layout_of(StepInputs.of(columns))
