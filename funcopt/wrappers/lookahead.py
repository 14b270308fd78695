"""Lookahead: slow parameters that go part of the way to the fast ones, which restart there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core import pytree
from .._core.inner import InnerStateT, InnerT_co, OptimizerLike
from .._core.tensors import write
from .._core.types import (
    COUNT,
    ELEMENTWISE,
    FRACTION,
    Extras,
    Hyperparam,
    Number,
    ParamsT,
    Schedule,
    StateT,
    Traits,
    Tree,
    check_is_optimizer,
)
from .._engine.checks import check_state
from .._engine.counts import next_count
from .._engine.extras import keep_value
from .._engine.hyperparameters import check_flag, normalize_fields, numbers_of
from .._engine.prepare import keep_requiring
from .._engine.registration import register_optimizer, state_class
from .._engine.stacked import Finish, Stack
from .._engine.stacked_wrappers import plan_stacked, plans_members
from .._engine.update_if import choose_each, copies
from ._shadow_params import ShadowParams, copy_params, own_dtype
from ._shared import (
    check_scalar,
    device_of_counts,
    first_count_if_scheduled,
    gather_gradients,
    is_due,
    known_value,
    own_tensors,
    records,
    write_fields_and_count,
    zero_if,
)
from ._stacks import (
    change_rows_,
    gather_stack,
    lerp_,
    numbers_of_members,
    renewed,
    rewritten,
    shared,
)


@state_class
class LookaheadState(NamedTuple, Generic[InnerStateT]):
    """The state of `Lookahead`.

    Attributes:
        steps_since_sync: How many updates were made since slow and fast parameters were the same: a
            float64 tensor of shape (), on the CPU, or where `every` is if that is a tensor.
        slow_params: The slow parameters: a tree like the parameters, in their dtypes. Those of
            leaves at rest (as under `Frozen`) are copied from these when slow and fast are synced.
        inner: The state of the inner optimizer.
        step: How many updates were made, if a hyperparameter is a schedule: likewise a tensor of
            shape () on the CPU; else `()`.
    """

    steps_since_sync: Tensor
    slow_params: Tree
    inner: InnerStateT
    step: Tree = ()


@register_optimizer
@dataclass(frozen=True)
class Lookahead(Generic[InnerT_co]):
    r"""Go `every` steps with the inner optimizer, and come back part of the way.

    The parameters are the fast ones $\theta$, which the inner optimizer moves. In every $k$-th
    update the slow ones $\phi$ go towards them, and they go on from there:

    $$ \phi \leftarrow \phi + \alpha\,(\theta - \phi), \qquad \theta \leftarrow \phi. $$

    From Zhang et al., *Lookahead Optimizer: k steps forward, 1 step back* (NeurIPS 2019), with the
    numbers of `optax.lookahead`, which has the user carry a pair of trees, where here the slow
    parameters are in the state. Evaluate those, or the parameters just after they were the same.

    An update in between costs what the inner one does with `update_`. `update` copies the slow
    parameters besides, since whatever it returns is in fresh memory. The count that tells one from
    the other is on the CPU, where it is read without waiting for a GPU. Under vmap, and where
    operators are recorded (compile, export), it cannot be read: there what holds is chosen element
    by element in each update.

    A CUDA graph would replay one of the two. To capture one, move the count to the GPU, with
    `state._replace(steps_since_sync=state.steps_since_sync.cuda())`: there it is chosen in this
    way, too.

    The order of wrappers matters. `Accumulate(Lookahead(Adam()), 8)` counts inner updates, of
    eight calls each; `Lookahead(Accumulate(Adam(), 8))` counts the calls themselves.
    `Ema(Lookahead(Adam()))` averages the fast parameters, after they were called back.

    Args:
        inner: The optimizer that moves the fast parameters.
        every: How many updates make one sync, $k$: a whole number of at least 1. A 0-dim
            tensor, of a floating-point dtype, may differ between the members of a vmap. A schedule
            is called with the count of updates made so far.
        alpha: How far the slow parameters go: at least 0 (never) and at most 1 (all the way, as if
            there were no `Lookahead`); a number, a 0-dim tensor or a schedule.
        reset_state: Whether the inner optimizer starts anew at each sync, from the state that
            its `init` gives, counts and all: a schedule in it begins again, too.

    Raises:
        TypeError: If `inner` is no optimizer, or a hyperparameter is of the wrong type.
        ValueError: If one is out of range, NaN or infinite.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.Lookahead(funcopt.SGD(lr=0.1), every=2)
        >>> params = {"w": torch.ones(2)}
        >>> state = opt.init(params)
        >>> for _ in range(2):
        ...     params, state = opt.update({"w": torch.ones(2)}, state, params)
        ...     print(params, state.slow_params)
        {'w': tensor([0.9000, 0.9000])} {'w': tensor([1., 1.])}
        {'w': tensor([0.9000, 0.9000])} {'w': tensor([0.9000, 0.9000])}
    """

    traits: ClassVar[Traits] = ELEMENTWISE

    hyperparams: ClassVar[tuple[Hyperparam, ...]] = (
        Hyperparam("every", COUNT),
        Hyperparam("alpha", FRACTION),
    )

    inner: InnerT_co
    every: Number | Schedule = 5
    alpha: Number | Schedule = 0.5
    reset_state: bool = False

    def __post_init__(self) -> None:
        """Check and normalize every hyperparameter."""
        check_is_optimizer("inner", self.inner)
        normalize_fields(self, self.hyperparams)
        check_flag("reset_state", self.reset_state)

    def init(self: Lookahead[OptimizerLike[StateT]], params: Tree) -> LookaheadState[StateT]:
        """Return the state before the first update, when slow and fast parameters are the same."""
        slow_params, _ = copy_params(self, params, own_dtype)
        count = torch.zeros((), dtype=torch.float64, device=device_of_counts(self.every))
        step = first_count_if_scheduled(self, torch.device("cpu"))
        return LookaheadState(count, slow_params, self.inner.init(params), step)

    def update(
        self: Lookahead[OptimizerLike[StateT]],
        grads: Tree,
        state: LookaheadState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, LookaheadState[StateT]]:
        """Return the new fast parameters and the new state. Gradients are at the fast ones."""
        slow, numbers = self._gather(grads, state, params)
        recorded = records(self, slow.gradients, state, numbers)
        syncs = is_due(state.steps_since_sync, numbers["every"])
        new_params, inner = self.inner.update(grads, state.inner, params)
        with torch.set_grad_enabled(recorded):
            if syncs is False:
                new_slow = copies(slow.leaves)
            else:
                fast, structure = pytree.flatten(new_params)
                synced = slow.lerp(fast, _known(numbers["alpha"]))
                new_slow = choose_each(syncs, synced, slow.leaves)
                new_fast = slow.gradients.with_resting(copies(slow.gradients.moving(synced)), fast)
                new_fast = choose_each(syncs, new_fast, fast)
                new_params = pytree.unflatten(structure, new_fast)
                keep_requiring(new_fast, slow.gradients.params)
                inner = self._restarted(syncs, inner, new_params)
        count = zero_if(syncs, state.steps_since_sync.detach() + 1)
        new_slow_params = slow.paired.rebuild(new_slow)
        return new_params, LookaheadState(count, new_slow_params, inner, next_count(state.step))

    def update_(
        self: Lookahead[OptimizerLike[StateT]],
        grads: Tree,
        state: LookaheadState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, LookaheadState[StateT]]:
        """Do the same as `update` in place."""
        slow, numbers = self._gather(grads, state, params)
        slow.check_wrapper_inplace(numbers, own_tensors(state, "steps_since_sync"))
        syncs = is_due(state.steps_since_sync, numbers["every"])
        self.inner.update_(grads, state.inner, params)
        with torch.no_grad():
            if syncs is not False:
                self._sync_(syncs, _known(numbers["alpha"]), slow, state.inner, params)
            count = zero_if(syncs, state.steps_since_sync + 1)
            write_fields_and_count(state, steps_since_sync=count)
        return params, state

    def _plan_members(self, stack: Stack) -> Finish | None:
        """Return what updates stacked members, of which some may be synced before others."""
        state: LookaheadState = stack.state
        check_state(state, LookaheadState)
        since = state.steps_since_sync
        numbers = numbers_of_members(self, stack, steps_since_sync=(since, None))
        gradients = gather_stack(self, stack)
        if numbers is None or gradients is None or self.reset_state:
            return None
        slow = ShadowParams.gather(gradients, "state.slow_params", state.slow_params, own_dtype)
        finish = plan_stacked(self.inner, stack._replace(state=state.inner))
        if finish is None:
            return None
        syncs: Any = is_due(since, numbers["every"])
        active = stack.where(syncs).active
        alpha = shared(active, numbers["alpha"])

        def update() -> tuple[Tree, LookaheadState]:
            new_params, inner = finish()
            fast, new_slow = pytree.flatten(new_params)[0], rewritten(stack, slow.leaves)
            change_rows_(active, lerp_, new_slow, fast, numbers=[alpha])
            change_rows_(active, Tensor.copy_, fast, new_slow)
            [count] = renewed(stack, (since, zero_if(syncs, since + 1)))
            return new_params, LookaheadState(count, slow.paired.rebuild(new_slow), inner)

        return update

    def _gather(
        self, grads: Tree, state: LookaheadState, params: Tree
    ) -> tuple[ShadowParams, dict[str, Number]]:
        check_state(state, LookaheadState)
        check_scalar("state.steps_since_sync", state.steps_since_sync)
        numbers = numbers_of(self, state.step)
        gradients = gather_gradients(self, grads, params)
        slow = ShadowParams.gather(gradients, "state.slow_params", state.slow_params, own_dtype)
        return slow, numbers

    def _restarted(self, syncs: bool | Tensor, inner: Tree, params: Tree) -> Tree:
        """Return the inner state: as it is at first, if this update syncs and it is to restart."""
        if not self.reset_state:
            return inner
        olds, structure = pytree.flatten(inner)
        first = keep_value(self.inner.init(params), inner)
        first = pytree.pair(first, "state.inner", structure).leaves
        return pytree.unflatten(structure, choose_each(syncs, first, olds))

    def _sync_(
        self, syncs: bool | Tensor, alpha: Number, slow: ShadowParams, inner: Tree, params: Tree
    ) -> None:
        """Move the slow parameters, and write them over the fast ones."""
        fast, moving = slow.gradients.params, slow.gradients.moving
        if syncs is True:
            slow.lerp_(fast, alpha)
            _write_all(moving(fast), moving(slow.leaves))
        else:
            synced = slow.lerp(fast, alpha)
            _write_all(slow.leaves, choose_each(syncs, synced, slow.leaves))
            _write_all(moving(fast), choose_each(syncs, moving(synced), moving(fast)))
        if self.reset_state:
            restarted = self._restarted(syncs, inner, params)
            _write_all(pytree.flatten(inner)[0], pytree.flatten(restarted)[0])


plans_members(Lookahead, Lookahead._plan_members)


def _known(number: Number) -> Number:
    """Return a number, as a Python number if it can be read."""
    value = known_value(number)
    return number if value is None else value


def _write_all(olds: Sequence[Tensor], news: Sequence[Tensor]) -> None:
    for old, new in zip(olds, news, strict=True):
        write(old, new)
