"""Updates of DTensors that look as they did at an update before, at little more than plain ones.

To ask a hundred DTensors how they lie, and to check that gradients and state lie as the parameters
do, takes several times as long as to move them. So what was found is remembered beside a guard on
what the DTensors looked like, and beside their specs, which torch makes once for tensors that lie
alike. No tensor is kept alive by it, and nothing in memory is believed: what DTensors hold here is
taken from them each time, and looked at by the engine as plain tensors are.

This serves optimizers that are a rule and nothing besides, where the engine has a short way for the
step. Whatever is otherwise than it was (another placement, a None gradient, a transform, a history,
a local part that is still being sent) is left to `methods`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain, compress
from typing import Any, NamedTuple

import torch

from .._core import pytree, transforms
from .._core.types import Tree, own_traits
from .._dtensor import methods
from .._dtensor.shards import dtensor, held_by, specs_of, wholes_of_parts, work_on
from .memory import guard, layout_of
from .prepare import trees_of
from .rule import StepInputs, UpdateRule
from .update import update as update_parts
from .update import update_ as update_parts_

_requires_grad = operator.attrgetter("requires_grad")
_is_leaf = operator.attrgetter("is_leaf")

_MOST_KNOWN = 16


def update(method: Callable[..., Any], opt: Any, grads: Tree, state: Any, params: Tree) -> Any:
    """Return the new parameters and state of an update whose parameters have DTensors."""
    found = _find(opt, grads, state, params)
    results = None if found is None else _update(opt, found, state)
    if results is None:
        results = methods.update(method, opt, grads, state, params)
        _remember(opt, grads, state, params, is_new=found is None)
    return results


def update_(method: Callable[..., Any], opt: Any, grads: Tree, state: Any, params: Tree) -> Any:
    """Make it in place."""
    found = _find(opt, grads, state, params)
    if found is None or not _update_(opt, found, state):
        methods.update_(method, opt, grads, state, params)
        _remember(opt, grads, state, params, is_new=found is None)
    return params, state


class _Known(NamedTuple):
    """What was found of the DTensors of an update, parameters first."""

    specs: list[Any]
    unchanged: Callable[..., bool]  # in type, dtype, device, dispatch keys and `requires_grad`
    requiring: list[bool]  # which of the parameters require a gradient


_recent: tuple[_Known, ...] = ()


class _Found(NamedTuple):
    """An update that is like one before, as far as its DTensors tell."""

    known: _Known
    wholes: list[Any]  # of the parameters, of the gradients, and of each slot that is kept
    length: int  # of each of these
    structure: pytree.Structure

    def split(self, column: list[Any]) -> list[list[Any]]:
        """Return what there is for each leaf by the trees."""
        length = self.length
        return [column[start : start + length] for start in range(0, len(column), length)]

    def trees(self) -> list[pytree.FlatTree]:
        """Return for each tree the local parts, for the engine."""
        structure = _list_structure(self.length)
        parts = held_by(self.wholes)
        return [pytree.FlatTree(own, structure) for own in self.split(parts)]


_list_structure = cache(pytree.list_structure)


def _update(opt: Any, found: _Found, state: Any) -> tuple[Tree, Tree] | None:
    """Return the new parameters and state; None if the engine has to see the trees."""
    params, grads, *slots = found.trees()
    if any(map(_requires_grad, params.leaves)):  # which is for the DTensor to do, not for its part
        return None
    try:
        made = work_on(None, update_parts, opt, grads, _state(opt, state, slots), params)
    except pytree.NotKnownError:
        return None
    new_params, new_state = made
    specs, _, *slot_specs = found.split(found.known.specs)
    wholes = [
        wholes_of_parts(new_params, specs, found.known.requiring),
        *map(wholes_of_parts, _kept(opt, new_state), slot_specs),
    ]
    own, *others = [pytree.unflatten(found.structure, column) for column in wholes]
    return own, _state(opt, new_state, others)


def _update_(opt: Any, found: _Found, state: Any) -> bool:
    """Update in place; return whether that was done, or the engine has to see the trees."""
    length, wholes = found.length, found.wholes
    if True in found.known.requiring and not all(map(_is_leaf, wholes[:length])):
        return False
    params, grads, *slots = found.trees()
    try:
        work_on(None, update_parts_, opt, grads, _state(opt, state, slots), params)
    except pytree.NotKnownError:
        return False
    # A DTensor counts for itself what is written into it, by which autograd finds out.
    torch.autograd.graph.increment_version(wholes[:length] + wholes[2 * length :])
    return True


def _find(opt: Any, grads: Tree, state: Any, params: Tree) -> _Found | None:
    """Return the leaves of an update whose DTensors look and lie as they did; None if not so."""
    global _recent  # noqa: PLW0603  # replaced whole, so that threads need no lock
    recent = _recent
    if not recent or transforms.transformed() or transforms.may_be_dual():
        return None
    if torch.is_inference_mode_enabled():  # whose tensors count no writes
        return None
    columns = _columns(opt, grads, state, params)
    if columns is None:
        return None
    wholes = list(chain.from_iterable(columns.leaves))
    specs = specs_of(wholes)
    for known in recent if specs is not None else ():
        if known.specs == specs and known.unchanged(*wholes):
            if known is not recent[0]:  # so that the one in use is found first
                _recent = (known, *(other for other in recent if other is not known))
            return _Found(known, wholes, len(columns.leaves[0]), columns.structure)
    return None


def _remember(opt: Any, grads: Tree, state: Any, params: Tree, *, is_new: bool) -> None:
    """Remember how the DTensors of an update look and lie, which went well.

    The engine, too, is told of their parts. It may have seen others: those of parameters that
    require a gradient did so, and it forgets in its own time.
    """
    global _recent  # noqa: PLW0603  # replaced whole, so that threads need no lock
    columns = _columns(opt, grads, state, params)
    if columns is None:
        return
    own, *others = columns.leaves
    wholes: list[Any] = [*own, *chain.from_iterable(others)]
    specs = specs_of(wholes)
    if specs is None or not all(map(_is_ordinary, wholes)):
        return
    if any(map(_requires_grad, wholes[len(own) :])):
        return
    parts = [held_by(column) for column in columns.leaves]
    if not transforms.all_plain(chain.from_iterable(parts)):
        return
    layout_of(StepInputs.of(parts))
    # Their specs tell the shapes.
    any_size = [[None] * whole.ndim for whole in wholes]
    unchanged = guard(wholes, any_size) if is_new else None
    if unchanged is not None:
        known = _Known(specs, unchanged, list(map(_requires_grad, own)))
        _recent = (known, *_recent[: _MOST_KNOWN - 1])


def _is_ordinary(whole: Any) -> bool:
    """Whether a result that is laid out contiguously here lies by the spec of this DTensor."""
    kind: Any = dtensor()
    return type(whole) is kind and whole.is_contiguous() and not whole.is_inference()


class _Columns(NamedTuple):
    leaves: list[list[Any]]
    structure: pytree.Structure


def _columns(opt: Any, grads: Tree, state: Tree, params: Tree) -> _Columns | None:
    """Return the leaves of parameters, gradients and kept slots, if the engine may recall them."""
    traits = own_traits(opt)
    if not traits.by_rule or not traits.shardable:
        return None
    rule = opt.rule
    setup = rule.setup_of(opt)
    if not isinstance(state, rule.state) or setup.options.step_per_leaf:
        return None
    found = pytree.columns_of_dicts(trees_of(opt, rule, setup.kept, grads, state, params))
    return None if found is None else _Columns(*found)


def _kept(opt: Any, state: Any) -> list[Tree]:
    """Return the trees of the slots that an optimizer keeps."""
    return list(compress(state[1:], opt.rule.setup_of(opt).kept))


def _state(opt: Any, state: Any, trees: Sequence[Tree]) -> Any:
    """Return a state with other trees in the slots that an optimizer keeps."""
    rule: UpdateRule = opt.rule
    return rule.state_of(rule.setup_of(opt), [state[0], *trees], getattr(state, "key", ()))
