"""Cautious: updates where they agree with the gradient, weight decay where it agrees with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Unpack

import torch

from .._core import pytree
from .._core.inner import InnerStateT, InnerT_co, OptimizerLike
from .._core.tensors import write
from .._core.types import (
    AT_LEAST_ZERO,
    Extras,
    Hyperparam,
    Number,
    Optimizer,
    ParamsT,
    Schedule,
    StateT,
    Traits,
    Tree,
    check_is_optimizer,
    optimizers_in,
)
from .._engine.checks import check_state
from .._engine.counts import next_count
from .._engine.hyperparameters import check_flag, normalize_fields, numbers_of
from .._engine.memory import note_written
from .._engine.prepare import keep_requiring
from .._engine.registration import register_optimizer, state_class
from .._engine.update_if import copies
from ._hold_back import HoldBack
from ._lr import the_rate
from ._shared import (
    Gradients,
    check_wrapper_inplace,
    device_of_tensors,
    first_count_if_scheduled,
    gather_gradients,
    own_tensors,
    records,
    write_fields_and_count,
)

_DECAY, _LR = Hyperparam("weight_decay", AT_LEAST_ZERO), Hyperparam("lr", AT_LEAST_ZERO)


@state_class
class CautiousState(NamedTuple, Generic[InnerStateT]):
    """The state of `Cautious`.

    Attributes:
        inner: The state of the inner optimizer.
        step: How many updates were made, if a hyperparameter is a schedule: a float64 tensor of
            shape (), on the GPU if all parameters are on one, else on the CPU; else `()`.
    """

    inner: InnerStateT
    step: Tree = ()


@register_optimizer
@dataclass(frozen=True)
class Cautious(Generic[InnerT_co]):
    r"""Hold back elements of an update that go against the gradient, and decay those that shrink.

    With the parameters $\theta$, what the inner optimizer makes of them $\theta'$, the update
    $u = \theta' - \theta$, the gradient $g$, and $d$ elements in a leaf,

    $$ m = [\,u\,g < 0\,], \qquad
       \theta_{\text{new}} = \theta + \frac{m}{\max(\sum m / d,\; 10^{-3})}\,u
       \;-\; \gamma\,\lambda\,[\,u\,\theta \le 0\,]\,\theta, $$

    with the learning rate of the inner optimizer for $\gamma$ and `weight_decay` for $\lambda$.

    **The mask** is from Liang et al., *Cautious Optimizers: Improving Training with One Line of
    Code* (2024): an update by momentum may go up where the loss of this step goes down, and such
    elements wait. The others are scaled up, by leaf, so that the update is as large in the mean.
    Dividing by the mean of the mask is what the authors' code does. A variant divides by
    $(1 + \sum m) / d$, which makes an update smaller even where all elements agree. The inner
    state is as it would be without: momentum is gathered from every gradient.

    **The decay** is from Chen et al., *Cautious Weight Decay* (2025): elements decay only where the
    update, before it was masked, does not lead away from zero. Let the inner optimizer have no
    weight decay of its own then: its update would be made of both.

    The update is what the parameters have moved by, whatever moved them. Only its sign is looked
    at, which is exact. Where the mask is scaled by 1, an element is the inner optimizer's to the
    bit, and where it is held back it is the old one to the bit; others are rounded once more, as by
    `torch.lerp`. Where an update is smaller than half a unit in the last place, it is none, and is
    held back: for 16-bit parameters let `MasterWeights` be outside. Around an optimizer with
    `maximize`, what agrees with the gradient goes up it.

    Where a gradient is zero, nothing moves. A NaN stays one. Real and imaginary part of a complex
    element are two elements. No derivative flows through the mask. An `Accumulate` inside moves
    nothing in most calls, each of which would decay: let it be outside.

    Args:
        inner: The optimizer that proposes the update.
        mask: Whether elements of the update are held back.
        rescale: Whether the others are scaled up, by the mean of the mask over each leaf. Without,
            each element moves by itself, so that leaves may be cut and sharded.
        weight_decay: How much elements decay, times the `lr` within: at least 0; a number, a 0-dim
            tensor, or a schedule, which is called with the count of updates made so far and returns
            one of the others. A schedule for that `lr` is called with the same count.

    Raises:
        TypeError: If `inner` is no optimizer, or a hyperparameter is of the wrong type.
        ValueError: If one is out of range, NaN or infinite; if there is a weight decay, and not one
            `lr` within; or if some optimizers within maximize, and others do not.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.Cautious(funcopt.SGD(lr=0.1, momentum=0.9))
        >>> params = {"w": torch.ones(2)}
        >>> state = opt.init(params)
        >>> for grads in (torch.tensor([1.0, 1.0]), torch.tensor([1.0, -0.5])):
        ...     params, state = opt.update({"w": grads}, state, params)
        ...     print(params)  # the second element waits, the first goes twice as far
        {'w': tensor([0.9000, 0.9000])}
        {'w': tensor([0.5200, 0.9000])}
    """

    inner: InnerT_co
    mask: bool = True
    rescale: bool = True
    weight_decay: Number | Schedule = 0.0

    @property
    def traits(self) -> Traits:
        """The mean of a mask is one over a whole leaf."""
        by_leaf = self.mask and self.rescale
        return Traits(leafwise=True) if by_leaf else Traits(elementwise=True)

    @property
    def lr(self) -> Number | Schedule:
        """The learning rate of the inner optimizer."""
        lr: Number | Schedule = the_rate("Cautious with a weight_decay", self.inner)
        return lr

    @property
    def hyperparams(self) -> tuple[Hyperparam, ...]:
        """The numbers that it goes by."""
        return (_DECAY, _LR) if self._decays else (_DECAY,)

    @property
    def _decays(self) -> bool:
        return not isinstance(self.weight_decay, float) or self.weight_decay != 0.0

    def __post_init__(self) -> None:
        """Check and normalize every hyperparameter."""
        check_is_optimizer("inner", self.inner)
        check_flag("mask", self.mask)
        check_flag("rescale", self.rescale)
        normalize_fields(self, (_DECAY,))
        if self._decays:
            the_rate("Cautious with a weight_decay", self.inner)
        if self.mask and len(_directions(self.inner)) > 1:
            raise ValueError(
                f"inner={self.inner!r} maximizes in one part and minimizes in another, so that "
                f"what agrees with the gradient is not the same in both. Let Cautious be inside, "
                f"around each."
            )

    def init(self: Cautious[OptimizerLike[StateT]], params: Tree) -> CautiousState[StateT]:
        """Return the state before the first update: the inner state."""
        inner = self.inner.init(params)
        return CautiousState(inner, first_count_if_scheduled(self, device_of_tensors(params)))

    def update(
        self: Cautious[OptimizerLike[StateT]],
        grads: Tree,
        state: CautiousState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, CautiousState[StateT]]:
        """Return the new parameters and the new state, in fresh memory."""
        gradients, numbers = self._gather(grads, state, params)
        recorded = records(self, gradients, state, numbers)
        given = [index for index, grad in enumerate(gradients.leaves) if grad is not None]
        olds = [gradients.params[index] for index in given]
        how = self._how(numbers)
        served = None if recorded else how.served(olds, gradients.tensors)
        moved, inner = self.inner.update(grads, state.inner, params)
        leaves, structure = pytree.flatten(moved)
        news = [leaves[index] for index in given]
        if served is not None and served.may_write(news, inner):
            served.write_between(olds, news)
        else:
            with torch.set_grad_enabled(recorded):
                for index, old, grad in zip(given, olds, gradients.tensors, strict=True):
                    leaves[index] = how.of(old, leaves[index], grad)
        keep_requiring(leaves, gradients.params)
        new_params: ParamsT = pytree.unflatten(structure, leaves)
        return new_params, CautiousState(inner, next_count(state.step))

    def update_(
        self: Cautious[OptimizerLike[StateT]],
        grads: Tree,
        state: CautiousState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, CautiousState[StateT]]:
        """Do the same in place, but for a copy of the old parameters."""
        gradients, numbers = self._gather(grads, state, params)
        check_wrapper_inplace(numbers, own_tensors(state), gradients)
        given = [index for index, grad in enumerate(gradients.leaves) if grad is not None]
        moved = [gradients.params[index] for index in given]
        how = self._how(numbers)
        served = how.served(moved, gradients.tensors)
        with torch.no_grad():
            olds = copies(moved) if served is None else served.copies()
            self.inner.update_(grads, state.inner, params)
            if served is not None:
                served.write_between(olds, moved)
                note_written(moved)
            else:
                for old, param, grad in zip(olds, moved, gradients.tensors, strict=True):
                    write(param, how.of(old, param, grad))
            write_fields_and_count(state)
        return params, state

    def _gather(
        self, grads: Tree, state: CautiousState, params: Tree
    ) -> tuple[Gradients, dict[str, Number]]:
        check_state(state, CautiousState)
        numbers = numbers_of(self, state.step)
        return gather_gradients(self, grads, params), numbers

    def _how(self, numbers: dict[str, Number]) -> HoldBack:
        (way,) = (_directions(self.inner) or {-1.0}) if self.mask else {0.0}
        decay = numbers["lr"] * numbers["weight_decay"] if self._decays else None
        return HoldBack(way, self.rescale, decay)


def _directions(inner: Optimizer[Any]) -> set[float]:
    """Return the signs that an update times the gradient has, where it goes by the gradient."""
    parts = [part for part in optimizers_in(inner) if hasattr(part, "maximize")]
    return {1.0 if part.maximize else -1.0 for part in parts}
