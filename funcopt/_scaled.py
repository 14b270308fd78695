"""An update by gradients times a number: inside the step where it can be, else by a pass before it.

A pass over the gradients that writes them anew takes longer than a step in place, most of it for
fresh memory. `AdamW` multiplies on its way through them, where nobody watches. Whoever hands an
update on to other optimizers can hand on the number, too, by joining with `hands_on`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import _kernels, _lists, _transforms, _tree
from ._adamw import AdamW, AdamWState
from ._inplace import check_inplace
from ._kernels import Layout, Scalars
from ._routine import have_history
from ._types import Number, Optimizer, Tree
from ._work import Work, check_untied

__all__ = ["hands_on", "update_scaled", "update_scaled_"]

Trees: TypeAlias = tuple[Tree, Tree]
_Scaled: TypeAlias = Callable[[Any, Tree, Tensor, Tree, Tree], Trees]

# By the very type: a subclass may have an update of its own.
_handing_on: dict[type, tuple[_Scaled, _Scaled]] = {}


def hands_on(kind: type, update: _Scaled, update_: _Scaled) -> None:
    """Let optimizers of a type take gradients and a number to multiply them by, unmultiplied."""
    _handing_on[kind] = update, update_


def update_scaled(
    opt: Optimizer[Any], grads: Tree, factor: Tensor | None, state: Tree, params: Tree
) -> Trees:
    """Return what an update makes of parameters and state, by gradients times a number.

    Args:
        opt: The optimizer.
        grads: The gradients, which were checked.
        factor: The number, of shape (); None for 1. The products are rounded to the dtypes of the
            gradients.
        state: The state of the optimizer.
        params: The parameters.
    """
    if factor is None:
        return opt.update(grads, state, params)
    if type(opt) in _handing_on:
        return _handing_on[type(opt)][0](opt, grads, factor, state, params)
    if type(opt) is AdamW and not factor.requires_grad and _transforms.all_plain([factor]):
        moved = _move_routinely(opt, grads, factor, state, params) or _move(
            opt, grads, factor, state, params
        )
        if moved is not None:
            return moved
    return opt.update(_product(grads, factor), state, params)


def update_scaled_(
    opt: Optimizer[Any], grads: Tree, factor: Tensor | None, state: Tree, params: Tree
) -> Trees:
    """Do the same in place. What is to be checked of the tensors, the optimizer checks."""
    if factor is None:
        return opt.update_(grads, state, params)
    if type(opt) in _handing_on:
        return _handing_on[type(opt)][1](opt, grads, factor, state, params)
    if type(opt) is AdamW and not factor.requires_grad and _transforms.all_plain([factor]):
        done = _move_routinely_(opt, grads, factor, state, params) or _move_(
            opt, grads, factor, state, params
        )
        if done:
            return params, state
    return opt.update_(_product(grads, factor), state, params)


def _move_routinely(
    opt: AdamW, grads: Tree, factor: Tensor, state: Tree, params: Tree
) -> Trees | None:
    """Take the step that is like one before, if this is one."""
    routine = opt._find_routine(grads, state, params)
    if routine is None:
        return None
    numbers = _with_factor(opt._numbers([routine.step], [routine.new_step]), factor)
    if numbers is None:
        return None
    new_params, *new_state = routine.move(numbers[0], opt._variant())
    return new_params, AdamWState(*new_state)


def _move_routinely_(opt: AdamW, grads: Tree, factor: Tensor, state: Tree, params: Tree) -> bool:
    routine = opt._find_routine(grads, state, params, writing=True)
    if routine is None:
        return False
    numbers = _with_factor(opt._numbers([routine.step], [routine.new_step]), factor)
    if numbers is None:
        return False
    routine.move_(numbers[0], opt._variant())
    return True


class _Step(NamedTuple):
    """A step that nobody watches or records."""

    work: Work
    layout: Layout
    counts: list[Number]
    numbers: list[Scalars]


def _find_step(opt: AdamW, grads: Tree, factor: Tensor, state: Tree, params: Tree) -> _Step | None:
    if _transforms.watched() or _transforms.tracing() or opt.differentiable:
        return None
    work = opt._gather(grads, state, params)
    if work.layout is None or not work.layout.calm:
        return None
    counts = work.counts.after(work.active, work.watched)
    numbers = _with_factor(opt._numbers(work.counts.tensors, counts), factor)
    return None if numbers is None else _Step(work, work.layout, counts, numbers)


def _move(opt: AdamW, grads: Tree, factor: Tensor, state: Tree, params: Tree) -> Trees | None:
    """Take any other step that nobody watches or records."""
    step = _find_step(opt, grads, factor, state, params)
    if step is None:
        return None
    work, layout, counts, numbers = step
    check_untied(work.params.leaves, work.params.structure)
    with torch.no_grad():
        own = work.counts.of(work.active, numbers)
        moved = work.rebuild(_kernels.move(work.leaves, own, opt._variant(), layout))
    new_params, *moments = moved
    if not opt.amsgrad:
        moments.append(())
    return new_params, AdamWState(work.counts.rebuild(counts), *moments)


def _move_(opt: AdamW, grads: Tree, factor: Tensor, state: Tree, params: Tree) -> bool:
    step = _find_step(opt, grads, factor, state, params)
    if step is None:
        return False
    work, layout, counts, numbers = step
    check_inplace(work, numbers)
    with torch.no_grad():
        own = work.counts.of(work.active, numbers)
        _kernels.move_(work.leaves, own, opt._variant(), layout)
        work.counts.write(counts)
    return True


def _with_factor(numbers: list[Scalars], factor: Tensor) -> list[Scalars] | None:
    """Return the numbers with a factor, unless a derivative may be asked for by way of them."""
    if any(map(have_history, numbers)):
        return None
    value = float(factor.item()) if factor.is_cpu else factor
    shared = {id(own): own._replace(grad_factor=value) for own in numbers}
    return [shared[id(own)] for own in numbers]


def _product(grads: Tree, factor: Tensor) -> Tree:
    leaves, structure = _tree.flatten(grads)
    products = iter(_lists.scaled([leaf for leaf in leaves if leaf is not None], factor))
    return _tree.unflatten(structure, [None if leaf is None else next(products) for leaf in leaves])
