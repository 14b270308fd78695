"""Clipping by norm: gradients scaled down together before the inner update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core import tensors, transforms
from .._core.inner import InnerStateT, InnerT_co, OptimizerLike
from .._core.tensors import choose
from .._core.types import (
    AT_LEAST_ZERO,
    Extras,
    Hyperparam,
    Number,
    ParamsT,
    Range,
    Schedule,
    StateT,
    Traits,
    Tree,
    check_is_optimizer,
)
from .._dtensor.reductions import over_shards
from .._engine.checks import check_state
from .._engine.counts import next_count
from .._engine.hyperparameters import check_choice, normalize, normalize_fields, numbers_of
from .._engine.registration import register_optimizer, state_class
from .._engine.stacked import Finish, Stack
from .._engine.stacked_wrappers import plan_stacked, plans_members
from .._engine.update_if import hands_on_condition, update_by_kernel, update_if, update_if_
from ._finite import device_for_state, zeros_unless
from ._shared import (
    Gradients,
    check_overflow_is_seen,
    check_scalar,
    check_wrapper_inplace,
    first_count_if_scheduled,
    gather_gradients,
    gather_params,
    known_value,
    own_tensors,
    read,
    records,
    write_fields_and_count,
)
from ._stacks import are_few, gather_stack, numbers_of_members, renewed

_NONFINITE = ("propagate", "skip")
# What torch adds to a norm before it divides by it.
_EPS = 1e-6


@state_class
class ClipState(NamedTuple, Generic[InnerStateT]):
    """The state of `Clip`.

    Attributes:
        norm: The norm of the last gradients, before clipping: a tensor of shape (), 0 at first. No
            derivative flows through it.
        inner: The state of the inner optimizer.
        step: How many updates were made, if `max_norm` is a schedule: a float64 tensor of shape ()
            beside the norm; else `()`.
    """

    norm: Tensor
    inner: InnerStateT
    step: Tree = ()


_NORM_TYPE = Hyperparam(
    "norm_type", Range("must be above 0 (infinity takes the largest)", lambda value: value > 0.0)
)


@register_optimizer
@dataclass(frozen=True)
class Clip(Generic[InnerT_co]):
    r"""Scale all gradients down together, so that their norm is at most `max_norm`, then update.

    With the gradients $g_i$ of all leaves, and $c$ for `max_norm`,

    $$ n = \Big(\sum_i \lVert g_i \rVert_p^p\Big)^{1/p}, \qquad
       g_i' = g_i \cdot \min\Big(1, \frac{c}{n + 10^{-6}}\Big). $$

    The numbers are those of `torch.nn.utils.clip_grad_norm_`. Optax's `clip_by_global_norm` adds
    nothing to the norm, so that its clipped gradients are larger by a relative $10^{-6} / n$. Norms
    of 16-bit leaves are taken in float32, where torch rounds them to 16 bits. The norm of a complex
    leaf is that of its absolute values.

    The order of wrappers matters. `Accumulate(Clip(Adam()), 8)` clips the mean of eight gradients,
    `Clip(Accumulate(Adam(), 8))` each of the eight, so that none outweighs the others.

    Nothing is ever read back from a GPU, and the caller's gradients are left as they are. An
    optimizer that is made by a rule multiplies them on its way through them, also within a
    `Partition`, if the tree is a flat dict and no transform or recording asks for more. Any other
    is given scaled copies.

    Args:
        inner: The optimizer that is given the clipped gradients.
        max_norm: The largest norm: at least 0; a number, a 0-dim tensor, or a schedule, which is
            called with the count of updates made so far (skipped ones not among them) and returns
            one of the others. One that is never reached makes this a way to watch the norm.
        norm_type: The order $p$ of the norm: a number above 0. Infinity takes the largest element.
        nonfinite: What to do where the norm is infinite or NaN, as it is if a gradient is, or if
            its norm overflows. `"propagate"` goes on, as torch does by default: the parameters
            become NaN. `"skip"` moves neither the parameters nor the inner state. Either way
            `state.norm` says so.

    Raises:
        TypeError: If `inner` is no optimizer, or a hyperparameter is of the wrong type.
        ValueError: If one is out of range, NaN or infinite, or `inner` has a `LossScale`, from
            which skipping would hide that its scale is too large.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.Clip(funcopt.SGD(lr=0.1), max_norm=1.0)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = opt.init(params)
        >>> params, state = opt.update({"w": torch.tensor([3.0, -4.0])}, state, params)
        >>> params, state.norm
        ({'w': tensor([0.9400, 2.0800])}, tensor(5.))
    """

    hyperparams: ClassVar[tuple[Hyperparam, ...]] = (Hyperparam("max_norm", AT_LEAST_ZERO),)

    inner: InnerT_co
    max_norm: Number | Schedule
    norm_type: float = 2.0
    nonfinite: Literal["propagate", "skip"] = "propagate"

    @property
    def traits(self) -> Traits:
        """The norm of pairs is that of complex numbers if it is Euclidean."""
        return Traits(shardable=True, packable=True, complex_as_pairs=self.norm_type == 2.0)

    def __post_init__(self) -> None:
        """Check and normalize every hyperparameter."""
        check_is_optimizer("inner", self.inner)
        normalize_fields(self, self.hyperparams)
        if isinstance(self.norm_type, Tensor):
            raise TypeError("norm_type is a tensor: the order of a norm is fixed, give a number.")
        object.__setattr__(self, "norm_type", normalize(_NORM_TYPE, self.norm_type))
        check_choice("nonfinite", self.nonfinite, _NONFINITE)
        if self.nonfinite != "propagate":
            check_overflow_is_seen(f"Clip(nonfinite={self.nonfinite!r})", self.inner)

    def init(self: Clip[OptimizerLike[StateT]], params: Tree) -> ClipState[StateT]:
        """Return the state before the first update: a norm of 0 and the inner state."""
        norm = _zero_norm(gather_params(self, params).moving)
        return ClipState(norm, self.inner.init(params), first_count_if_scheduled(self, norm.device))

    def update(
        self: Clip[OptimizerLike[StateT]],
        grads: Tree,
        state: ClipState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, ClipState[StateT]]:
        """Return the new parameters and state. A gradient of None adds nothing to the norm."""
        gradients, numbers = self._gather(grads, state, params)
        norm = _norm(gradients, self.norm_type, state.norm)
        found, should_update = norm.detach(), self._should_update(norm)
        recorded = should_update is not True and records(self, gradients, state, numbers)
        if recorded or transforms.transformed():
            gradients = gradients.replace(zeros_unless(should_update, gradients.tensors))
            if isinstance(should_update, Tensor):
                norm = _norm(gradients, self.norm_type, state.norm)
        scale = _scale(norm, **numbers)
        new_params, inner = update_if(
            should_update, self.inner, gradients.tree, state.inner, params, recorded, scale
        )
        return new_params, ClipState(found, inner, next_count(state.step, should_update))

    def update_(
        self: Clip[OptimizerLike[StateT]],
        grads: Tree,
        state: ClipState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, ClipState[StateT]]:
        """Do the same as `update` in place."""
        gradients, numbers = self._gather(grads, state, params)
        check_wrapper_inplace(numbers, own_tensors(state, "norm"), gradients)
        norm = _norm(gradients, self.norm_type, state.norm)
        should_update = self._should_update(norm)
        scale = _scale(norm, **numbers)
        update_if_(should_update, self.inner, gradients.tree, state.inner, params, scale)
        write_fields_and_count(state, should_update, norm=norm)
        return params, state

    def _gather(
        self, grads: Tree, state: ClipState, params: Tree
    ) -> tuple[Gradients, dict[str, Number]]:
        check_state(state, ClipState)
        check_scalar("state.norm", state.norm)
        numbers = numbers_of(self, state.step)
        return gather_gradients(self, grads, params), numbers

    def _update_by_kernel(
        self, condition: Tensor, grads: Tree, state: ClipState, params: Tree, *, in_place: bool
    ) -> tuple[Tree, ClipState] | None:
        """Update if a condition on a device holds, and the norm allows it, as the kernel finds."""
        gradients, numbers = self._gather(grads, state, params)
        if in_place:
            check_wrapper_inplace(numbers, own_tensors(state, "norm"), gradients)
        with torch.no_grad():
            norm = _norm(gradients, self.norm_type, state.norm)
            allowed = self._should_update(norm)
            if allowed is False:
                return None
            made = condition if allowed is True else condition & allowed
            moved = update_by_kernel(
                made,
                self.inner,
                gradients.tree,
                _scale(norm, **numbers),
                state.inner,
                params,
                in_place=in_place,
            )
            if moved is None:
                return None
            norm = choose(condition, norm, state.norm)
            if not in_place:
                return moved[0], ClipState(norm, moved[1], next_count(state.step, made))
            write_fields_and_count(state, made, norm=norm)
        return params, state

    def _plan_members(self, stack: Stack) -> Finish | None:
        """Return what updates stacked members, of which each is clipped by a norm of its own."""
        state: ClipState = stack.state
        check_state(state, ClipState)
        stack = stack.multiplied()
        numbers = numbers_of_members(self, stack, norm=(state.norm, None))
        gradients = gather_stack(self, stack)
        if numbers is None or gradients is None:
            return None
        norm = _norms_of_members(gradients.tensors, self.norm_type, state.norm, stack.active)
        moving = stack if self.nonfinite == "propagate" else stack.where(norm.isfinite())
        scale = _scale(norm, **numbers)
        finish = plan_stacked(self.inner, moving._replace(state=state.inner, grad_scale=scale))
        if finish is None:
            return None

        def update() -> tuple[Tree, ClipState]:
            new_params, inner = finish()
            [found] = renewed(stack, (state.norm, norm))
            return new_params, ClipState(found, inner)

        return update

    def _should_update(self, norm: Tensor) -> bool | Tensor:
        if self.nonfinite == "propagate":
            return True
        value = read(norm)
        return norm.detach().isfinite() if value is None else math.isfinite(value)


hands_on_condition(Clip, Clip._update_by_kernel)
plans_members(Clip, Clip._plan_members)


def _scale(norm: Tensor, max_norm: Number) -> Tensor | None:
    """Return what gradients of a norm are multiplied by, None if that is known to be 1."""
    max_norm = max_norm.to(norm) if isinstance(max_norm, Tensor) else max_norm
    scale = (max_norm * (norm + _EPS).reciprocal()).clamp(max=1.0)
    return None if known_value(scale) == 1.0 else scale


def _zero_norm(params: list[Tensor]) -> Tensor:
    """Return a norm of 0 in a dtype that holds that of every leaf, where none is waited for."""
    double = any(param.dtype in (torch.float64, torch.complex128) for param in params)
    dtype = torch.float64 if double else torch.float32
    return torch.zeros((), dtype=dtype, device=device_for_state(params))


def _norm(gradients: Gradients, order: float, like: Tensor) -> Tensor:
    """Return the norm of all gradients, of sharded ones as wholes."""
    leaves = gradients.leaves
    return over_shards(
        gradients.params,
        lambda indices: _norm_here([leaves[index] for index in indices], order, like),
        lambda norms: tensors.vector_norm(norms, order),
    )


def _norm_here(grads: list[Tensor | None], order: float, like: Tensor) -> Tensor:
    """Return the norm of tensors, as that of their norms."""
    return _joined(
        tensors.norms([g for g in grads if g is not None and g.numel() > 0], order), order, like
    )


def _joined(norms: Sequence[Tensor], order: float, like: Tensor) -> Tensor:
    """Return the norm of norms: one number, or one of each member if these are of members."""
    if not norms:
        return torch.zeros_like(like)
    there = like.device, like.dtype
    alike = [n if (n.device, n.dtype) == there else n.to(*there) for n in norms]
    return tensors.vector_norm(torch.stack(alike, -1), order, -1)


def _norms_of_members(
    grads: Sequence[Tensor], order: float, like: Tensor, active: Tensor | None
) -> Tensor:
    """Return the norm of each member of stacked gradients; those of no active one may be any."""
    rows = None if active is None else active.nonzero().squeeze(1)
    if rows is None or not are_few(rows, len(like)):
        norms = [_norms_of_rows(grad, order) for grad in grads if grad.numel() > 0]
        return _joined(norms, order, like)
    if len(rows) == 1:  # over a single row, torch adds up in another order
        rows = torch.cat((rows, (rows + 1) % len(like)))
    taken = [grad.index_select(0, rows) for grad in grads]
    found = _norms_of_members(taken, order, like[rows], None)
    return like.index_copy(0, rows, found)


def _norms_of_rows(grad: Tensor, order: float) -> Tensor:
    wide = grad.to(tensors.compute_dtype(grad.dtype)).reshape(len(grad), -1)
    return tensors.vector_norm(wide, order, 1)
