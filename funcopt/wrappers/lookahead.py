"""Lookahead: slow parameters that follow the fast ones, and call them back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._core import pytree
from .._core.tensors import write
from .._core.types import ELEMENTWISE, Number, Optimizer, Schedule, Traits, Tree
from .._engine.checks import check_optimizer, check_state
from .._engine.hyperparameters import check_flag, has_schedule, normalize_fields, numbers_of
from .._engine.prepare import first_count, next_step
from .._engine.registration import register_optimizer
from .._engine.rule import COUNT, FRACTION, Hyperparam
from .base import (
    check_scalar,
    gather_gradients,
    place_of_counts,
    read,
    records,
    settled,
    with_step,
    write_step,
)
from .shadow_params import Follower, begin
from .update_if import choose, copies, keep_leaves_requiring

__all__ = ["Lookahead", "LookaheadState"]

ParamsT = TypeVar("ParamsT")


class LookaheadState(NamedTuple):
    """The state of `Lookahead`.

    Attributes:
        steps_since_sync: How many updates were made since slow and fast parameters were the same: a
            float64 tensor of shape (), on the CPU, or where `every` is if that is a tensor.
        slow_params: The slow parameters: a tree like the parameters, in their dtypes. At a meeting,
            those of leaves at rest (as under `Frozen`) become these.
        inner: The state of the inner optimizer.
        step: How many updates were made, if a hyperparameter is a schedule: likewise a tensor of
            shape () on the CPU; else `()`.
    """

    steps_since_sync: Tensor
    slow_params: Tree
    inner: Any
    step: Tree = ()


@register_optimizer
@dataclass(frozen=True)
class Lookahead:
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

    The order of wrappers matters. `Accumulate(Lookahead(AdamW()), 8)` counts inner updates, of
    eight calls each; `Lookahead(Accumulate(AdamW(), 8))` counts the calls themselves.
    `Ema(Lookahead(AdamW()))` averages the fast parameters, after they were called back.

    Args:
        inner: The optimizer that moves the fast parameters.
        every: How many updates lie between two meetings, $k$: a whole number of at least 1. A 0-dim
            tensor, of a floating-point dtype, may differ between the members of a vmap. A schedule
            is called with the count of updates made so far.
        alpha: How far the slow parameters go: at least 0 (never) and at most 1 (all the way, as if
            there were no `Lookahead`); a number, a 0-dim tensor or a schedule.
        reset_state: Whether the inner optimizer starts anew at each meeting, from the state that
            its `init` gives, counts and all: a schedule in it begins again, too.

    Raises:
        TypeError: If `inner` is no optimizer, or a hyperparameter is of the wrong type.
        ValueError: If one is out of range, NaN or infinite.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.Lookahead(funcopt.AdamW(lr=0.1, weight_decay=0.0), every=2)
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

    inner: Optimizer[Any]
    every: Number | Schedule = 5
    alpha: Number | Schedule = 0.5
    reset_state: bool = False

    def __post_init__(self) -> None:
        """Check and normalize every hyperparameter."""
        check_optimizer("inner", self.inner)
        normalize_fields(self, self.hyperparams)
        check_flag("reset_state", self.reset_state)

    def init(self, params: Tree) -> LookaheadState:
        """Return the state before the first update, when slow and fast parameters are the same.

        Args:
            params: The parameters, as for the inner optimizer.

        Raises:
            TypeError: If a leaf is not a dense floating-point or complex tensor.
            ValueError: If two leaves share their memory.

        Example:
            >>> import torch, funcopt
            >>> funcopt.Lookahead(funcopt.AdamW()).init([torch.ones(2)]).slow_params
            [tensor([1., 1.])]
        """
        slow_params, _ = begin(self, params, _own)
        count = torch.zeros((), dtype=torch.float64, device=place_of_counts(self.every))
        step = first_count(torch.device("cpu")) if has_schedule(self) else ()
        return LookaheadState(count, slow_params, self.inner.init(params), step)

    def update(
        self, grads: Tree, state: LookaheadState, params: ParamsT
    ) -> tuple[ParamsT, LookaheadState]:
        """Return the new parameters and the new state, in fresh memory.

        Args:
            grads: The gradients at the fast parameters, as for the inner optimizer.
            state: The state that `init` or the last update returned.
            params: The fast parameters.

        Returns:
            The pair `(new_params, new_state)`.

        Raises:
            TypeError: As the inner optimizer.
            ValueError: As the inner optimizer, or if a hyperparameter is no single number, or out
                of range since it was given.

        Example:
            >>> import torch, funcopt
            >>> opt = funcopt.Lookahead(funcopt.AdamW(lr=0.1, weight_decay=0.0), 1, alpha=0.8)
            >>> opt.update(torch.ones(1), opt.init(torch.ones(1)), torch.ones(1))[0]
            tensor([0.9200])
        """
        slow, numbers = self._gather(grads, state, params)
        recorded = records(self, slow.gradients, state, numbers)
        meets = _meets(state.steps_since_sync, numbers["every"])
        new_params, inner = self.inner.update(grads, state.inner, params)
        with torch.set_grad_enabled(recorded):
            if meets is False:
                new_slow = copies(slow.leaves)
            else:
                fast, structure = pytree.flatten(new_params)
                met = slow.toward(fast, _known(numbers["alpha"]))
                new_slow = choose(meets, met, slow.leaves)
                new_fast = slow.gradients.but_resting(copies(slow.gradients.moving(met)), fast)
                new_params = pytree.unflatten(structure, choose(meets, new_fast, fast))
                keep_leaves_requiring(new_params, params)
                inner = self._restarted(meets, inner, new_params)
        count = _next(meets, state.steps_since_sync.detach())
        new_slow_params = slow.paired.rebuild(new_slow)
        return new_params, LookaheadState(count, new_slow_params, inner, next_step(state.step))

    def update_(
        self, grads: Tree, state: LookaheadState, params: ParamsT
    ) -> tuple[ParamsT, LookaheadState]:
        """Do the same as `update`, written into `params` and `state`, which are returned.

        Args:
            grads: The gradients, as for `update`.
            state: The state, which is overwritten.
            params: The fast parameters, which are overwritten.

        Returns:
            The pair `(params, state)`: the trees that were given.

        Raises:
            RuntimeError: Under a transform of `torch.func`, or if anything has a history.
            TypeError: As `update`.
            ValueError: As `update`, and as the inner optimizer's `update_`.

        Example:
            >>> import torch, funcopt
            >>> opt = funcopt.Lookahead(funcopt.AdamW(lr=0.1, weight_decay=0.0), 1, alpha=0.8)
            >>> w = torch.ones(1)
            >>> _ = opt.update_(torch.ones(1), opt.init(w), w)
            >>> w
            tensor([0.9200])
        """
        slow, numbers = self._gather(grads, state, params)
        counts = {"state.steps_since_sync": state.steps_since_sync}
        slow.check_inplace(numbers, with_step(counts, state))
        meets = _meets(state.steps_since_sync, numbers["every"])
        self.inner.update_(grads, state.inner, params)
        with torch.no_grad():
            if meets is not False:
                self._meet_(meets, _known(numbers["alpha"]), slow, state.inner, params)
            write(state.steps_since_sync, _next(meets, state.steps_since_sync))
            write_step(state)
        return params, state

    def _gather(
        self, grads: Tree, state: LookaheadState, params: Tree
    ) -> tuple[Follower, dict[str, Number]]:
        check_state(state, LookaheadState)
        check_scalar("state.steps_since_sync", state.steps_since_sync)
        numbers = numbers_of(self, state.step)
        gradients = gather_gradients(self, grads, params)
        slow = Follower.gather(gradients, "state.slow_params", state.slow_params, _own)
        return slow, numbers

    def _restarted(self, meets: bool | Tensor, inner: Tree, params: Tree) -> Tree:
        """Return the inner state, as it is at first if slow and fast met and it is to restart."""
        if not self.reset_state:
            return inner
        olds, structure = pytree.flatten(inner)
        first = pytree.pair(self.inner.init(params), "state.inner", structure).leaves
        return pytree.unflatten(structure, choose(meets, first, olds))

    def _meet_(
        self, meets: bool | Tensor, alpha: Number, slow: Follower, inner: Tree, params: Tree
    ) -> None:
        """Let slow and fast meet in place."""
        fast, moving = slow.gradients.params, slow.gradients.moving
        if meets is True:
            slow.toward_(fast, alpha)
            _write_all(moving(fast), moving(slow.leaves))
        else:
            met = slow.toward(fast, alpha)
            _write_all(slow.leaves, choose(meets, met, slow.leaves))
            _write_all(moving(fast), choose(meets, moving(met), moving(fast)))
        if self.reset_state:
            restarted = self._restarted(meets, inner, params)
            _write_all(pytree.flatten(inner)[0], pytree.flatten(restarted)[0])


def _meets(count: Tensor, every: Number) -> bool | Tensor:
    """Whether slow and fast meet in this update; a tensor where that is not read."""
    taken = read(count)
    known = read(every) if isinstance(every, Tensor) else every
    if taken is None or known is None:
        return count.detach() + 1 >= every
    return taken + 1 >= known


def _known(number: Number) -> Number:
    """Return a number, as a Python number if it can be read."""
    value = settled(number)
    return number if value is None else value


def _own(dtype: torch.dtype) -> torch.dtype:
    """The dtype of slow parameters: that of the fast ones, whose values they give them."""
    return dtype


def _write_all(olds: Sequence[Tensor], news: Sequence[Tensor]) -> None:
    for old, new in zip(olds, news, strict=True):
        write(old, new)


def _next(meets: bool | Tensor, count: Tensor) -> Tensor:
    """Return the count after an update."""
    if isinstance(meets, bool):
        return torch.zeros_like(count) if meets else count + 1
    return (count + 1).masked_fill(meets.to(count.device), 0)
