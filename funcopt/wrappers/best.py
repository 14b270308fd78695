"""Best: the parameters that had the best score so far, and whether to stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core import pytree
from .._core.inner import InnerStateT, InnerT_co, OptimizerLike
from .._core.tensors import choose, write
from .._core.types import (
    AT_LEAST_ZERO,
    ELEMENTWISE,
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
from .._engine.counts import device_for_count, first_count, fresh
from .._engine.extras import goes_by_value
from .._engine.hyperparameters import check_choice, normalize_fields, numbers_of
from .._engine.registration import register_optimizer, state_class
from .._engine.stacked import Finish, Stack
from .._engine.stacked_wrappers import plan_stacked, plans_members
from .._engine.update_if import choose_each, copies
from ._scores import MODES, PATIENCE, check_scores, is_better, read_all, worst
from ._shadow_params import ShadowParams, own_dtype
from ._shared import (
    check_scalar,
    gather_gradients,
    gather_params,
    own_tensors,
    write_fields_and_count,
)
from ._stacks import gather_stack, numbers_of_members, renewed, rewritten


@state_class
class BestState(NamedTuple, Generic[InnerStateT]):
    """The state of `Best`. Its own numbers are on the GPU if all parameters are on one.

    Attributes:
        best_value: The best score so far: a float64 tensor of shape (), at first the worst there
            is, which is infinity, or minus infinity for `mode="max"`.
        best_params: The parameters that had it: a tree like the parameters, in their dtypes. Before
            the first score it is those at `init`.
        best_step: After how many updates they were there: a float64 tensor of shape ().
        n_worse: How many scores in a row, up to the last, were not the best: likewise.
        stopped: Whether these are more than `patience`: a bool tensor of shape ().
        step: How many updates were made: a float64 tensor of shape ().
        inner: The state of the inner optimizer.
        value: The score, during an update that is given one; else `()`.
    """

    best_value: Tensor
    best_params: Tree
    best_step: Tensor
    n_worse: Tensor
    stopped: Tensor
    step: Tensor
    inner: InnerStateT
    value: Tree = ()


@register_optimizer
@dataclass(frozen=True)
class Best(Generic[InnerT_co]):
    r"""Keep the parameters that had the best score so far, and count how long ago that was.

    The score is given to the update as `value=`, such as a validation loss. It is the score of the
    parameters that are given to this update, before they are moved; these are kept if it is a new
    best. With the score $v$, the best one so far $b$, and the threshold $\tau$,

    $$ v < b - \tau \quad (\text{mode min}), \qquad v > b + \tau \quad (\text{mode max}), $$

    in float64. A NaN is never better. An update without a score is that of the inner optimizer, and
    leaves the best and the count of scores as they are. No derivative flows into what is kept.

    The best parameters are read as `state.best_params`. Where `Best` is within other wrappers,
    `[params] = funcopt.find(state, "best_params").values()` finds them.

    Nothing stops by itself: `stopped` says when to. It is True once more than `patience` scores in
    a row were no new best. Give `active=~state.stopped` to leave alone whatever has stopped: from
    then on its parameters and its state, `stopped` among them, stay as they are. Under vmap each
    member has its own best, and stops by itself.

    A score that can be read at no price, as on the CPU, decides whether parameters are copied.
    Under vmap, on a GPU, and where operators are recorded (compile, export), what is kept is chosen
    element by element, and nothing waits. For compile give the score as a tensor: a number would be
    a constant of the graph. Processes that share parameters must be given the same score.

    The order of wrappers matters. A score is seen by an update that is made: in
    `Accumulate(Best(Adam()), 8)` by every eighth, and in `SkipNonfinite(Best(Adam()))` by those
    that are not skipped. `Best` belongs outside.

    Args:
        inner: The optimizer that moves the parameters.
        mode: Whether a score is better if it is smaller, `"min"`, or larger, `"max"`.
        patience: How many scores in a row may be no new best before it is time to stop: a whole
            number of at least 0, a 0-dim tensor of a floating-point dtype, or a schedule, which is
            called with the count of updates made so far. Infinity, or None: it never is.
        threshold: By how much more a score must be better to be a new best: at least 0; likewise.

    Raises:
        TypeError: If `inner` is no optimizer, or a hyperparameter is of the wrong type.
        ValueError: If `mode` is another one, or a hyperparameter is out of range or NaN.

    Example:
        Three members of an ensemble with learning rates of their own, each of which stops by
        itself. The last one is too fast:

        >>> import torch, funcopt
        >>> from torch.func import vmap
        >>> lrs = torch.tensor([0.25, 0.5, 2.5], dtype=torch.float64)
        >>> opts = funcopt.Best(funcopt.SGD(lr=lrs), patience=1)
        >>> def step(opt, state, w):
        ...     loss, grad = w.square() / 2, w
        ...     return opt.update(grad, state, w, value=loss, active=~state.stopped)
        >>> params = torch.ones(3)
        >>> state = vmap(lambda opt, w: opt.init(w))(opts, params)
        >>> for _ in range(5):
        ...     params, state = vmap(step)(opts, state, params)
        >>> state.stopped, state.step  # no update was made once it had stopped
        (tensor([False, False,  True]), tensor([5., 5., 3.], dtype=torch.float64))
        >>> state.best_params, state.best_step
        (tensor([0.3164, 0.0625, 1.0000]), tensor([4., 4., 0.], dtype=torch.float64))
    """

    traits: ClassVar[Traits] = ELEMENTWISE

    hyperparams: ClassVar[tuple[Hyperparam, ...]] = (
        Hyperparam("patience", PATIENCE),
        Hyperparam("threshold", AT_LEAST_ZERO),
    )

    inner: InnerT_co
    mode: Literal["min", "max"] = "min"
    patience: Number | Schedule | None = None
    threshold: Number | Schedule = 0.0

    def __post_init__(self) -> None:
        """Check and normalize every hyperparameter."""
        check_is_optimizer("inner", self.inner)
        check_choice("mode", self.mode, MODES)
        if self.patience is None:
            object.__setattr__(self, "patience", math.inf)
        normalize_fields(self, self.hyperparams)

    def init(self: Best[OptimizerLike[StateT]], params: Tree) -> BestState[StateT]:
        """Return the state before the first update: these parameters, with the worst score."""
        own = gather_params(self, params)
        place = device_for_count(own.moving)
        kept = pytree.unflatten(own.structure, _detached_copies(own.leaves))
        return BestState(
            torch.full((), worst(self.mode), dtype=torch.float64, device=place),
            kept,
            first_count(place),
            first_count(place),
            torch.zeros((), dtype=torch.bool, device=place),
            first_count(place),
            self.inner.init(params),
        )

    def update(
        self: Best[OptimizerLike[StateT]],
        grads: Tree,
        state: BestState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, BestState[StateT]]:
        """Return the new parameters and the new state, which may hold those that were given."""
        kept, numbers, told = self._gather(grads, state, params)
        with torch.no_grad():
            better, values = self._judge(state, numbers) if told else (False, {})
            best_params = kept.paired.rebuild(_chosen(better, kept))
            own = _fresh(values, state) if told else _clones(state)
            step = state.step.detach() + 1
        new_params, inner = self.inner.update(grads, state.inner, params)
        return new_params, BestState(
            own["best_value"],
            best_params,
            own["best_step"],
            own["n_worse"],
            own["stopped"],
            step,
            inner,
            state.value,
        )

    def update_(
        self: Best[OptimizerLike[StateT]],
        grads: Tree,
        state: BestState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, BestState[StateT]]:
        """Do the same as `update` in place. Nothing is copied unless there is a new best."""
        kept, numbers, told = self._gather(grads, state, params)
        kept.check_wrapper_inplace(numbers, own_tensors(state, *_NUMBERS))
        with torch.no_grad():
            better, values = self._judge(state, numbers) if told else (False, {})
            # Taken before the parameters move, and written once nothing was refused.
            best = [] if better is False else _chosen(better, kept)
        self.inner.update_(grads, state.inner, params)
        with torch.no_grad():
            for old, new in zip(kept.leaves if best else (), best, strict=True):
                write(old, new)
            write_fields_and_count(state, **_fresh(values, state))
        return params, state

    def _plan_members(self, stack: Stack) -> Finish | None:
        """Return what updates stacked members, each with a best score of its own."""
        state: BestState = stack.state
        check_state(state, BestState)
        own: dict[str, Any] = {name: (getattr(state, name), torch.float64) for name in _READ[1:]}
        own["stopped"] = state.stopped, torch.bool
        told = isinstance(state.value, Tensor)
        if told:
            own["value"] = state.value, None
        numbers, gradients = numbers_of_members(self, stack, **own), gather_stack(self, stack)
        if numbers is None or gradients is None:
            return None
        kept = ShadowParams.gather(gradients, "state.best_params", state.best_params, own_dtype)
        finish = plan_stacked(self.inner, stack._replace(state=state.inner))
        if finish is None:
            return None
        better, values = self._judge(state, numbers) if told else (False, {})
        rows = _rows_of(better, stack)
        best = [param.index_select(0, rows) for param in gradients.params]  # before they move

        def update() -> tuple[Tree, BestState]:
            new_params, inner = finish()
            targets = rewritten(stack, kept.leaves)
            for target, new in zip(targets, best, strict=True):
                target.index_copy_(0, rows, new)
            news = _clones(state) | _fresh(values, state) | {"step": state.step + 1}
            pairs = [(getattr(state, name), new) for name, new in news.items()]
            renewed_numbers = dict(zip(news, renewed(stack, *pairs), strict=True))
            return new_params, BestState(
                best_params=kept.paired.rebuild(targets),
                inner=inner,
                value=state.value,
                **renewed_numbers,
            )

        return update

    def _gather(
        self, grads: Tree, state: BestState, params: Tree
    ) -> tuple[ShadowParams, dict[str, Number], bool]:
        check_state(state, BestState)
        told = check_scores(state, ("best_value", "best_step", "n_worse"))
        check_scalar("state.stopped", state.stopped, torch.bool)
        numbers = numbers_of(self, state.step)
        gradients = gather_gradients(self, grads, params)
        kept = ShadowParams.gather(gradients, "state.best_params", state.best_params, own_dtype)
        return kept, numbers, told

    def _judge(
        self, state: BestState, numbers: dict[str, Number]
    ) -> tuple[bool | Tensor, dict[str, Number]]:
        """Return whether the score is the best, and the new numbers of the state."""
        given = {name: getattr(state, name).detach() for name in _READ} | numbers
        place = state.best_value.device
        value, best, best_step, n_worse, step, patience, threshold = read_all(given, place).values()
        better = is_better(value, best, self.mode, threshold)
        since = choose(better, 0.0, n_worse + 1)
        return better, {
            "best_value": choose(better, value, best),
            "best_step": choose(better, step, best_step),
            "n_worse": since,
            "stopped": since > patience,
        }


goes_by_value(Best, BestState)
plans_members(Best, Best._plan_members)

_NUMBERS = ("best_value", "best_step", "n_worse", "stopped")
_READ = ("value", "best_value", "best_step", "n_worse", "step")


def _fresh(values: dict[str, Number], state: BestState) -> dict[str, Tensor]:
    """Return new numbers of a state as tensors."""
    return {name: fresh(value, getattr(state, name)) for name, value in values.items()}


def _rows_of(better: bool | Tensor, stack: Stack) -> Tensor:
    """Return which members of a stack have a new best: their indices."""
    if not isinstance(better, Tensor):
        better = torch.zeros(stack.members, dtype=torch.bool, device="cpu")
    active = better if stack.active is None else better & stack.active
    return active.nonzero().squeeze(1)


def _clones(state: BestState) -> dict[str, Tensor]:
    return {name: getattr(state, name).detach().clone() for name in _NUMBERS}


def _chosen(better: bool | Tensor, kept: ShadowParams) -> list[Tensor]:
    """Return copies of the parameters if they are better, else of those that were kept."""
    if isinstance(better, Tensor):
        news, olds = ([t.detach() for t in own] for own in (kept.gradients.params, kept.leaves))
        return choose_each(better, news, olds)
    return _detached_copies(kept.gradients.params if better else kept.leaves)


def _detached_copies(leaves: Sequence[Tensor]) -> list[Tensor]:
    return copies([leaf.detach() for leaf in leaves])
