"""Master weights: 16-bit parameters that are moved in float32, in copies that the state holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core import pytree
from .._core.inner import InnerStateT, InnerT_co, OptimizerLike
from .._core.tensors import compute_dtype, write
from .._core.types import (
    ELEMENTWISE,
    Extras,
    ParamsT,
    StateT,
    Traits,
    Tree,
    check_is_optimizer,
)
from .._engine.checks import check_state
from .._engine.prepare import keep_requiring
from .._engine.registration import register_optimizer, state_class
from .._engine.stacked import Finish, Stack
from .._engine.stacked_wrappers import plan_stacked, plans_members
from ._in_float32 import check_params_inplace, widened
from ._shadow_params import ShadowParams, copy_params
from ._shared import gather_gradients, records
from ._stacks import change_rows_, gather_stack


@state_class
class MasterWeightsState(NamedTuple, Generic[InnerStateT]):
    """The state of `MasterWeights`, in which `master` has the shape of the parameters.

    Attributes:
        inner: The state of the inner optimizer, made for the master weights: in float32 where
            parameters are in 16 bits.
        master: The master weights: in float32 for 16-bit parameters, else in the parameter's dtype.
            That of a leaf at rest (as under `Frozen`) is a copy of that leaf.
    """

    inner: InnerStateT
    master: Tree


@register_optimizer
@dataclass(frozen=True)
class MasterWeights(Generic[InnerT_co]):
    r"""Move 16-bit parameters in float32: in copies, of which they are the rounded values.

    With the master weights $m$, the gradients $g$ at the parameters $\theta$, and the state $s$ of
    the inner optimizer,

    $$ (m_t, s_t) = \mathrm{inner}\big(\mathrm{float32}(g_t),\ s_{t-1},\ m_{t-1}\big), \qquad
       \theta_t = \mathrm{round}(m_t). $$

    A step below half a unit in the last place of the parameter, which in 16 bits would be rounded
    away for good, adds up in the master weight. What is moved, and the inner state, have the bits
    that the inner optimizer gives float32 parameters with the same gradients. This takes 4 bytes
    for each element of a 16-bit parameter, besides an inner state in float32; `Compensated` takes
    2, for about 16 binary digits instead of 24.

    From Micikevicius et al., *Mixed Precision Training* (ICLR 2018), section 3.1. There the 16-bit
    weights are a copy, made for each step; here they are the parameters, so that gradients, which
    have their dtype, are not cast by the loss.

    The master weights win. Of the parameters that are given to an update, only structure, shapes
    and dtypes count: if you changed their values since the last update, this is lost. Change the
    master weights instead, as by `state._replace(master=...)`, or begin anew with `init`. Likewise
    new parameters have their derivative in the master weights, not in the old ones.

    A leaf that is not in 16 bits moves as with the inner optimizer alone, to the bit, and has a
    copy, too. So has a leaf at rest within. Let a `Partition` be outside where that is too much
    memory: `Partition({"head": MasterWeights(Adam()), "base": Frozen()}, ...)` copies no base.

    The order of wrappers matters. What is inside has float32 to work in. The mean of eight
    gradients stays in float32 in `MasterWeights(Accumulate(Adam(), 8))`, and is rounded to 16 bits
    in `Accumulate(MasterWeights(Adam()), 8)`; likewise the quotient in
    `MasterWeights(LossScale(Adam()))` and in `LossScale(MasterWeights(Adam()))`.
    `Ema(MasterWeights(Adam()))` averages the rounded parameters, `MasterWeights(Ema(Adam()))` the
    master weights.

    Args:
        inner: The optimizer that moves the master weights.

    Raises:
        TypeError: If `inner` is no optimizer.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.MasterWeights(funcopt.SGD(lr=1e-3))
        >>> params = {"w": torch.ones(2, dtype=torch.bfloat16)}
        >>> state = opt.init(params)
        >>> grads = {"w": torch.ones(2, dtype=torch.bfloat16)}
        >>> for _ in range(2):
        ...     params, state = opt.update(grads, state, params)
        ...     print(params, state.master)
        {'w': tensor([1., 1.], dtype=torch.bfloat16)} {'w': tensor([0.9990, 0.9990])}
        {'w': tensor([0.9961, 0.9961], dtype=torch.bfloat16)} {'w': tensor([0.9980, 0.9980])}
    """

    traits: ClassVar[Traits] = dataclasses.replace(ELEMENTWISE, small_steps_add_up=True)

    inner: InnerT_co

    def __post_init__(self) -> None:
        """Check that there is an optimizer."""
        check_is_optimizer("inner", self.inner)

    def init(
        self: MasterWeights[OptimizerLike[StateT]], params: Tree
    ) -> MasterWeightsState[StateT]:
        """Return the state before the first update: copies, and the inner state made for them."""
        master, _ = copy_params(self, params, compute_dtype)
        return MasterWeightsState(self.inner.init(master), master)

    def update(
        self: MasterWeights[OptimizerLike[StateT]],
        grads: Tree,
        state: MasterWeightsState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, MasterWeightsState[StateT]]:
        """Return the new parameters and the new state. Gradients are at the parameters given."""
        master = self._gather(grads, state, params)
        gradients = master.gradients
        recorded = records(self, gradients, state)
        wide = widened(gradients, recorded)
        moved, inner = self.inner.update(wide.tree, state.inner, _moved_tree(master))
        leaves, structure = pytree.flatten(moved)
        with torch.set_grad_enabled(recorded):
            pairs = list(enumerate(zip(leaves, gradients.params, strict=True)))
            resting = gradients.resting
            new_params = [
                own if i in resting else own.to(param.dtype, copy=True) for i, (own, param) in pairs
            ]
            new_master = [
                own.to(compute_dtype(own.dtype), copy=True) if i in resting else own
                for i, (own, _) in pairs
            ]
        keep_requiring(new_params, gradients.params)
        return pytree.unflatten(structure, new_params), MasterWeightsState(
            inner, master.paired.rebuild(new_master)
        )

    def update_(
        self: MasterWeights[OptimizerLike[StateT]],
        grads: Tree,
        state: MasterWeightsState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, MasterWeightsState[StateT]]:
        """Do the same in place, but for the gradients in float32, which are copies."""
        master = self._gather(grads, state, params)
        gradients = master.gradients
        master.check_wrapper_inplace({}, {})
        check_params_inplace(gradients, state.inner)
        with torch.no_grad():
            wide = widened(gradients, recorded=False)
            self.inner.update_(wide.tree, state.inner, _moved_tree(master))
            for i, (own, param) in enumerate(zip(master.leaves, gradients.params, strict=True)):
                old, new = (own, param) if i in gradients.resting else (param, own)
                write(old, new)
        return params, state

    def _plan_members(self, stack: Stack) -> Finish | None:
        """Return what updates stacked members."""
        state: MasterWeightsState = stack.state
        check_state(state, MasterWeightsState)
        stack = stack.multiplied()
        if gather_stack(self, stack) is None:
            return None
        master = self._gather(stack.grads, state, stack.params)
        gradients, wide = master.gradients, widened(master.gradients, recorded=False)
        inner_stack = stack._replace(grads=wide.tree, state=state.inner, params=_moved_tree(master))
        finish = plan_stacked(self.inner, inner_stack)
        if finish is None:
            return None

        def update() -> tuple[Tree, MasterWeightsState]:
            moved, inner = finish()
            leaves, structure = pytree.flatten(moved)
            if stack.in_place:
                change_rows_(stack.active, Tensor.copy_, gradients.params, leaves)
                return stack.params, state
            pairs = zip(leaves, gradients.params, strict=True)
            new_params = [own.to(param.dtype, copy=True) for own, param in pairs]
            new_master = master.paired.rebuild(leaves)
            return pytree.unflatten(structure, new_params), MasterWeightsState(inner, new_master)

        return update

    def _gather(self, grads: Tree, state: MasterWeightsState, params: Tree) -> ShadowParams:
        check_state(state, MasterWeightsState)
        gradients = gather_gradients(self, grads, params)
        return ShadowParams.gather(
            gradients, "state.master", state.master, compute_dtype, "a master weight"
        )


plans_members(MasterWeights, MasterWeights._plan_members)


def _moved_tree(master: ShadowParams) -> Tree:
    """Return what the inner optimizer moves: the master weights, beside the leaves at rest."""
    gradients = master.gradients
    moving = gradients.moving(master.leaves)
    leaves = gradients.with_resting(moving, gradients.params)
    return pytree.unflatten(gradients.structure, leaves)
