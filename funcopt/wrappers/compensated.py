"""Compensated 16-bit parameters: what rounding lost is kept beside them, in 16 bits of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core import pytree
from .._core.inner import InnerStateT, InnerT_co, OptimizerLike
from .._core.tensors import compute_dtype, is_narrow, write
from .._core.types import (
    ELEMENTWISE,
    Extras,
    ParamsT,
    StateT,
    Traits,
    Tree,
    check_is_optimizer,
)
from .._dtensor.shards import stand_for
from .._engine.checks import check_state
from .._engine.compensated import as_one, remember, update_compensated
from .._engine.prepare import keep_requiring, may_recall
from .._engine.registration import register_optimizer, state_class
from ._in_float32 import check_params_inplace, widened
from ._shadow_params import ShadowParams, own_dtype
from ._shared import gather_gradients, gather_params, records


@state_class
class CompensatedState(NamedTuple, Generic[InnerStateT]):
    """The state of `Compensated`, in which `compensation` has the shape of the parameters.

    Attributes:
        inner: The state of the inner optimizer, made for the sums: in float32 where parameters are
            in 16 bits.
        compensation: What is to be added to the parameters: a tree like them, in their dtypes. It
            stays 0 beside leaves that are not in 16 bits, or at rest (as under `Frozen`).
    """

    inner: InnerStateT
    compensation: Tree


@register_optimizer
@dataclass(frozen=True)
class Compensated(Generic[InnerT_co]):
    r"""Move 16-bit parameters in float32, and keep what rounding loses in 16 bits beside them.

    Parameter $\theta$ and compensation $c$ together are a number of about twice the digits. With
    the gradients $g$ and the state $s$ of the inner optimizer,

    $$ (w_t, s_t) = \mathrm{inner}(\mathrm{float32}(g_t),\ s_{t-1},\ \theta_{t-1} + c_{t-1}), \qquad
       \theta_t = \mathrm{round}(w_t), \qquad c_t = \mathrm{round}(w_t - \theta_t), $$

    where the sum and $w_t$ are in float32, and $c_0 = 0$. So a step below half a unit in the last
    place of the parameter adds up, for 2 bytes an element in place of the 4 of `MasterWeights`, and
    with about 16 binary digits in bfloat16 in place of 24. In float16 it may be fewer: what is lost
    of a parameter below 0.1 is so small that float16 has fewer digits for it, and none at last.

    This is the summation of Kahan, *Further remarks on reducing truncation errors* (Communications
    of the ACM, 1965), as the optimizers of the library optimi go by it with `kahan_sum`. Those add
    in 16 bits, and their state is in 16 bits; here the inner optimizer moves the sum in float32,
    and its state is in float32.

    A parameter always is the rounded sum of itself and its compensation. Where the compensation,
    being rounded itself, would come to just half a unit of the parameter, and the sum round to a
    neighbour, it is the next smaller number. So a step that moves nothing (no gradient, a step that
    was skipped) changes no bit of either. Where a parameter is infinite or NaN, the compensation is
    0: a parameter that overflowed its dtype stays infinite, where a master weight could come back.

    What counts is the sum. If you change a parameter between two updates, its compensation, at most
    half a unit in the last place of the old one, is still added: begin anew with `init` where that
    is not as small beside the new one. The derivative of the sum is that of the parameter, through
    which rounding passes it on as a cast does; the compensation has none.

    A leaf that is not in 16 bits moves as with the inner optimizer alone, to the bit. Its
    compensation is memory that nobody reads: let a `Partition` be outside where that is too much,
    as of `Partition({"half": Compensated(Adam()), "full": Adam()}, ...)`. The order of wrappers
    matters as with `MasterWeights`: what is inside is given gradients in float32.

    Args:
        inner: The optimizer that moves the sums.

    Raises:
        TypeError: If `inner` is no optimizer.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.Compensated(funcopt.SGD(lr=2.0**-10))
        >>> params = torch.ones(1, dtype=torch.bfloat16)
        >>> state = opt.init(params)
        >>> for _ in range(3):
        ...     params, state = opt.update(torch.ones_like(params), state, params)
        ...     print(params.item(), state.compensation.item())
        1.0 -0.0009765625
        1.0 -0.001953125
        0.99609375 0.0009765625
    """

    traits: ClassVar[Traits] = dataclasses.replace(ELEMENTWISE, small_steps_add_up=True)

    inner: InnerT_co

    def __post_init__(self) -> None:
        """Check that there is an optimizer."""
        check_is_optimizer("inner", self.inner)

    def init(self: Compensated[OptimizerLike[StateT]], params: Tree) -> CompensatedState[StateT]:
        """Return the state before the first update: zeros, and the inner state for float32."""
        leaves, structure, resting = gather_params(self, params)
        zeros = [torch.zeros_like(leaf) for leaf in leaves]
        wide = [
            leaf if index in resting else leaf.to(compute_dtype(leaf.dtype))
            for index, leaf in enumerate(leaves)
        ]
        inner = self.inner.init(pytree.unflatten(structure, wide))
        return CompensatedState(inner, pytree.unflatten(structure, zeros))

    def update(
        self: Compensated[OptimizerLike[StateT]],
        grads: Tree,
        state: CompensatedState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, CompensatedState[StateT]]:
        """Return the new parameters and the new state, in fresh memory."""
        made = self._at_once(grads, state, params, in_place=False)
        if made is not None:
            return made
        lost = self._gather(grads, state, params)
        gradients = lost.gradients
        recorded = records(self, gradients, state)
        wide = widened(gradients, recorded)
        with torch.set_grad_enabled(recorded):
            sums = _sums(lost)
        moved, inner = self.inner.update(
            wide.tree, state.inner, pytree.unflatten(gradients.structure, sums)
        )
        leaves, structure = pytree.flatten(moved)
        new_lost = list(lost.leaves)
        with torch.set_grad_enabled(recorded):
            narrow = _narrow(lost)
            for index in narrow:
                leaves[index], new_lost[index] = _split(leaves[index], gradients.params[index])
            for index in set(range(len(leaves))).difference(narrow):
                new_lost[index] = lost.leaves[index].clone()
        keep_requiring(leaves, gradients.params)
        self._remember(grads, state, params)
        return pytree.unflatten(structure, leaves), CompensatedState(
            inner, lost.paired.rebuild(new_lost)
        )

    def update_(
        self: Compensated[OptimizerLike[StateT]],
        grads: Tree,
        state: CompensatedState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, CompensatedState[StateT]]:
        """Do the same in place, but for sums and gradients in float32, which are copies."""
        if self._at_once(grads, state, params, in_place=True) is not None:
            return params, state
        lost = self._gather(grads, state, params)
        gradients = lost.gradients
        lost.check_wrapper_inplace({}, {})
        check_params_inplace(gradients, state.inner)
        with torch.no_grad():
            wide, sums = widened(gradients, recorded=False), _sums(lost)
            self.inner.update_(wide.tree, state.inner, pytree.unflatten(gradients.structure, sums))
            for index in _narrow(lost):
                param = gradients.params[index]
                for old, new in zip(
                    (param, lost.leaves[index]), _split(sums[index], param), strict=True
                ):
                    write(old, new)
        self._remember(grads, state, params)
        return params, state

    def _at_once(
        self, grads: Tree, state: CompensatedState, params: ParamsT, *, in_place: bool
    ) -> tuple[ParamsT, CompensatedState] | None:
        """Return what one pass over memory makes, where a kernel knows of the compensation."""
        opt = self._as_one() if may_recall() and type(state) is CompensatedState else None
        if opt is None:
            return None
        made = update_compensated(
            opt, grads, state.inner, state.compensation, params, in_place=in_place
        )
        return None if made is None else (made[0], CompensatedState(*made[1:]))

    def _remember(self, grads: Tree, state: CompensatedState, params: Tree) -> None:
        if may_recall() and self._as_one() is not None:
            remember(grads, state.inner, state.compensation, params)

    def _as_one(self) -> Any:
        """Return this and the inner optimizer as one, if they can be; it is found once."""
        if "_setup" not in vars(self):
            object.__setattr__(self, "_setup", as_one(self.inner))
        return vars(self)["_setup"]

    def _gather(self, grads: Tree, state: CompensatedState, params: Tree) -> ShadowParams:
        check_state(state, CompensatedState)
        gradients = gather_gradients(self, grads, params)
        return ShadowParams.gather(
            gradients, "state.compensation", state.compensation, own_dtype, "a compensation"
        )


def _narrow(lost: ShadowParams) -> list[int]:
    """Return the leaves that are compensated, by their indices: in 16 bits, and not at rest."""
    params, resting = lost.gradients.params, lost.gradients.resting
    return [i for i, param in enumerate(params) if i not in resting and is_narrow(param.dtype)]


def _sums(lost: ShadowParams) -> list[Tensor]:
    """Return what the inner optimizer moves: sums in float32, and the other leaves themselves."""
    leaves = list(lost.gradients.params)
    for index in _narrow(lost):
        param = leaves[index]
        leaves[index] = param.to(torch.float32) + lost.leaves[index].to(torch.float32)
        stand_for(leaves[index], param)
    return leaves


def _split(wide: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the parameter, in the dtype of another, and what rounding lost of a float32 value."""
    param = wide.to(like.dtype)
    return param, _lost(wide.detach(), param.detach())


def _lost(wide: Tensor, param: Tensor) -> Tensor:
    """Return what rounding lost, rounded so that the parameter is the rounded sum of both."""
    kind, own = torch.finfo(param.dtype), param.to(torch.float32)
    lost = (wide - own).to(param.dtype)
    rounded_up = (own + lost.to(torch.float32)).to(param.dtype) != param
    # Half a unit of the parameter is a power of two, and this the next smaller number.
    size = lost.to(torch.float32)
    step = (size.abs() * (kind.eps / 2)).clamp(min=kind.smallest_normal * kind.eps)
    lost = torch.where(rounded_up, (size - step * size.sign()).to(param.dtype), lost)
    return torch.where(param.isfinite(), lost, 0.0)  # in the layout of the parameter
