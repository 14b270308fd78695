"""Plateau: lower learning rates where a score no longer gets better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core import transforms
from .._core.inner import InnerStateT, InnerT_co, OptimizerLike
from .._core.tensors import choose
from .._core.types import (
    AT_LEAST_ZERO,
    BELOW_ONE,
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
from .._engine.counts import device_for_count, fresh, next_count, read_if_same
from .._engine.extras import goes_by_value
from .._engine.hyperparameters import check_choice, normalize_fields, numbers_of
from .._engine.registration import register_optimizer, state_class
from .._engine.stacked import Finish, Stack
from .._engine.stacked_wrappers import plan_stacked, plans_members
from ._lr import learning_rates, with_scaled_lr
from ._scores import MODES, PATIENCE, check_scores, is_better, read_all, worst
from ._shared import (
    check_wrapper_inplace,
    first_count_if_scheduled,
    gather_gradients,
    gather_params,
    known_value,
    own_tensors,
    records,
    write_fields_and_count,
)
from ._stacks import numbers_of_members, renewed


@state_class
class PlateauState(NamedTuple, Generic[InnerStateT]):
    """The state of `Plateau`. Its own tensors are on the GPU if all parameters are on one.

    Attributes:
        scale: What learning rates are multiplied by: a float64 tensor of shape (), 1 at first.
        best_value: The best score so far: likewise, at first the worst there is, which is infinity,
            or minus infinity for `mode="max"`.
        n_worse: How many scores in a row were not the best, those of a cooldown not among them.
        cooldown_left: How many scores are still to come in the cooldown.
        inner: The state of the inner optimizer.
        step: How many updates were made, if a hyperparameter is a schedule: likewise a tensor; else
            `()`.
        value: The score, during an update that is given one; else `()`.
    """

    scale: Tensor
    best_value: Tensor
    n_worse: Tensor
    cooldown_left: Tensor
    inner: InnerStateT
    step: Tree = ()
    value: Tree = ()


class _Scaled(NamedTuple):
    """An optimizer with learning rates that were scaled."""

    tensors: list[Tensor]  # the learning rates that are tensors, which may be filled anew
    numbers: tuple[Any, ...]  # the scale, the bound, and the values of those
    opt: Any


@register_optimizer
@dataclass(frozen=True)
class Plateau(Generic[InnerT_co]):
    r"""Multiply learning rates by a factor once a score has not got better for a while.

    The score is given to the update as `value=`, such as a validation loss, and an update without
    one leaves everything here as it is. If more than `patience` scores in a row are no new best, or
    are NaN, then with the factor $f$

    $$ s \leftarrow f\,s, \qquad \text{lr}_s = \max(s \cdot \text{lr}, \text{min\_lr}), $$

    where $s$ is `state.scale`, and whatever is called `lr` inside is $\text{lr}_s$, at any depth: a
    number, a tensor, what a schedule gives, and also the learning rate that a
    `schedules.Decoupled` divides by. One that is below `min_lr` by itself stays what it is.

    The scores are judged as by `torch.optim.lr_scheduler.ReduceLROnPlateau`, to the bit, in
    float64. It differs in this. A score is that of the parameters that are given to the update, so
    the learning rate that it leads to holds from this update on; torch's `step(score)`, called
    after an optimizer's step, is for the next one. Torch multiplies the learning rate each time,
    here it is the scale, so that the two may differ by a rounding of each (by none, where `lr` is a
    power of 2). And there is no `eps`: torch leaves out a reduction by at most that, of 1e-8 if it
    is not given, so that a learning rate below stays what it is.

    No derivative flows through the score. One through the learning rate, `factor` and `min_lr`
    does. Where the score and the scale can be read at no price, as on the CPU, learning rates that
    are numbers stay numbers; under vmap each member has its own scale. For compile give the score
    as a tensor: a number would be a constant of the graph. Processes that share parameters must be
    given the same score.

    A score is seen by an update that is made: in `Accumulate(Plateau(Adam()), 8)` by every eighth,
    and in `SkipNonfinite(Plateau(Adam()))` by those that are not skipped. Let it be outside.

    Args:
        inner: The optimizer, with an `lr` somewhere inside.
        mode: Whether a score is better if it is smaller, `"min"`, or larger, `"max"`.
        factor: What the scale is multiplied by: at least 0 and below 1; a number, a 0-dim tensor of
            a floating-point dtype, or a schedule, which is called with the count of updates made so
            far. So may be all numbers that follow.
        patience: How many scores in a row may be no new best before the scale falls: a whole number
            of at least 0, or infinity.
        threshold: By how much more a score must be better to be a new best: at least 0.
        threshold_mode: Whether the threshold is a share of the best score, `"rel"`, or a difference
            from it, `"abs"`. A share is for scores above 0: below, a slightly worse score would be
            better, so that nothing falls while scores rise slowly, as in torch and optax.
        cooldown: For how many scores after a reduction those that are no new best do not count: a
            whole number of at least 0, or infinity.
        min_lr: Where learning rates stop falling: at least 0.

    Raises:
        TypeError: If `inner` is no optimizer, or a hyperparameter is of the wrong type.
        ValueError: If there is no `lr` inside; if a mode is another one; or if a hyperparameter is
            out of range or NaN.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.Plateau(funcopt.SGD(lr=1.0), factor=0.5, patience=1)
        >>> params = {"w": torch.ones(1)}
        >>> state = opt.init(params)
        >>> for loss in (3.0, 2.0, 2.0, 2.0):
        ...     params, state = opt.update({"w": torch.ones(1)}, state, params, value=loss)
        ...     print(params["w"].item(), state.scale.item())
        0.0 1.0
        -1.0 1.0
        -2.0 1.0
        -2.5 0.5
    """

    traits: ClassVar[Traits] = ELEMENTWISE

    hyperparams: ClassVar[tuple[Hyperparam, ...]] = (
        Hyperparam("factor", BELOW_ONE),
        Hyperparam("patience", PATIENCE),
        Hyperparam("threshold", AT_LEAST_ZERO),
        Hyperparam("cooldown", PATIENCE),
        Hyperparam("min_lr", AT_LEAST_ZERO),
    )

    inner: InnerT_co
    mode: Literal["min", "max"] = "min"
    factor: Number | Schedule = 0.1
    patience: Number | Schedule = 10
    threshold: Number | Schedule = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: Number | Schedule = 0
    min_lr: Number | Schedule = 0.0

    def __post_init__(self) -> None:
        """Check and normalize every hyperparameter."""
        check_is_optimizer("inner", self.inner)
        check_choice("mode", self.mode, MODES)
        check_choice("threshold_mode", self.threshold_mode, ("rel", "abs"))
        normalize_fields(self, self.hyperparams)
        if next(learning_rates(self.inner), None) is None:
            raise ValueError(
                f"inner={self.inner!r} has nothing called lr, which Plateau lowers. Give an "
                f"optimizer with a learning rate, such as SGD(lr=0.1), in any wrappers."
            )

    def init(self: Plateau[OptimizerLike[StateT]], params: Tree) -> PlateauState[StateT]:
        """Return the state before the first update: a scale of 1 and the worst score."""
        place = device_for_count(gather_params(self, params).moving)
        one = torch.ones((), dtype=torch.float64, device=place)
        none = torch.zeros_like(one)
        return PlateauState(
            one,
            torch.full_like(one, worst(self.mode)),
            none,
            none.clone(),
            self.inner.init(params),
            first_count_if_scheduled(self, place),
        )

    def update(
        self: Plateau[OptimizerLike[StateT]],
        grads: Tree,
        state: PlateauState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, PlateauState[StateT]]:
        """Return the new parameters and the new state, in fresh memory."""
        numbers, told = self._look(state)
        values: dict[str, Number] = {}
        if told:
            given = self._read(state, numbers)
            recorded = any(isinstance(number, Tensor) for number in given.values()) and records(
                self, gather_gradients(self, grads, params), state, numbers
            )
            with torch.set_grad_enabled(recorded):
                values = self._judge(given)
        scaled = self._scaled(values.get("scale", state.scale), numbers["min_lr"])
        new_params, inner = scaled.update(grads, state.inner, params)
        own = {name: fresh(values.get(name, old), old) for name, old in _numbers_in(state)}
        step = next_count(state.step)
        return new_params, PlateauState(**own, inner=inner, step=step, value=state.value)

    def update_(
        self: Plateau[OptimizerLike[StateT]],
        grads: Tree,
        state: PlateauState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, PlateauState[StateT]]:
        """Do the same as `update` in place. Without a score, nothing is written here."""
        numbers, told = self._look(state)
        if told or isinstance(state.step, Tensor):
            gradients = gather_gradients(self, grads, params)
            check_wrapper_inplace(numbers, own_tensors(state, *_NUMBERS), gradients)
        with torch.no_grad():
            values = self._judge(self._read(state, numbers)) if told else {}
        scaled = self._scaled(values.get("scale", state.scale), numbers["min_lr"])
        scaled.update_(grads, state.inner, params)
        with torch.no_grad():
            news = {name: fresh(value, getattr(state, name)) for name, value in values.items()}
            write_fields_and_count(state, **news)
        return params, state

    def _plan_members(self, stack: Stack) -> Finish | None:
        """Return what updates stacked members, each with a scale of its own."""
        state: PlateauState = stack.state
        check_state(state, PlateauState)
        own: dict[str, Any] = {name: (old, torch.float64) for name, old in _numbers_in(state)}
        told = isinstance(state.value, Tensor)
        if told:
            own["value"] = state.value, None
        numbers = numbers_of_members(self, stack, **own)
        if numbers is None:
            return None
        values = self._judge(self._read(state, numbers)) if told else {}
        scale = read_if_same(values.get("scale", state.scale))
        if isinstance(scale, Tensor) and not all(map(_is_number, learning_rates(self.inner))):
            return None
        scaled = self._scaled(scale, numbers["min_lr"])
        finish = plan_stacked(scaled, stack._replace(state=state.inner))
        if finish is None:
            return None

        def update() -> tuple[Tree, PlateauState]:
            new_params, inner = finish()
            pairs = [(old, fresh(values.get(name, old), old)) for name, old in _numbers_in(state)]
            news = dict(zip(_NUMBERS, renewed(stack, *pairs), strict=True))
            return new_params, PlateauState(**news, inner=inner, value=state.value)

        return update

    def _look(self, state: PlateauState) -> tuple[dict[str, Number], bool]:
        """Return the numbers of this update, and whether it was told a score."""
        check_state(state, PlateauState)
        told = check_scores(state, _NUMBERS)
        return numbers_of(self, state.step), told

    def _read(self, state: PlateauState, numbers: dict[str, Number]) -> dict[str, Number]:
        """Return what a score is judged by, as Python numbers if all can be read."""
        given = {name: getattr(state, name).detach() for name in (*_NUMBERS[1:], "value")}
        return read_all({"scale": state.scale, **given, **numbers}, state.scale.device)

    def _judge(self, own: dict[str, Number]) -> dict[str, Number]:
        """Return the new numbers of the state, as torch's scheduler reckons them."""
        value, best, patience = own["value"], own["best_value"], own["patience"]
        relative = self.threshold_mode == "rel"
        better = is_better(value, best, self.mode, own["threshold"], relative=relative)
        cools = own["cooldown_left"] > 0
        cooldown = choose(cools, own["cooldown_left"] - 1, own["cooldown_left"])
        n_worse = choose(better, 0.0, own["n_worse"] + 1)
        n_worse = choose(cools, 0.0, n_worse)
        falls = n_worse > patience
        return {
            "scale": choose(falls, own["scale"] * own["factor"], own["scale"]),
            "best_value": choose(better, value, best),
            "n_worse": choose(falls, 0.0, n_worse),
            "cooldown_left": choose(falls, own["cooldown"], cooldown),
        }

    def _scaled(self, scale: Number, min_lr: Number) -> Any:
        """Return the inner optimizer with its learning rates scaled.

        Where they can be read, it is remembered for as long as they stay the same.
        """
        last = vars(self).get("_setup") if transforms.readable() else None
        tensors = last.tensors if last else _tensors_in(self.inner)
        factor, least, *rates = map(_known, (scale, min_lr, *tensors))
        if factor is None or least is None or None in rates:
            return with_scaled_lr(self.inner, scale, min_lr)
        if last is None or last.numbers != (factor, least, rates):
            scaled = with_scaled_lr(self.inner, factor, least)
            last = _Scaled(tensors, (factor, least, rates), scaled)
            object.__setattr__(self, "_setup", last)
        return last.opt


goes_by_value(Plateau, PlateauState)
plans_members(Plateau, Plateau._plan_members)

_NUMBERS = ("scale", "best_value", "n_worse", "cooldown_left")


def _numbers_in(state: PlateauState) -> list[tuple[str, Tensor]]:
    return [(name, getattr(state, name)) for name in _NUMBERS]


def _is_number(rate: Any) -> bool:
    return isinstance(rate, (int, float, Tensor))


def _known(number: Number) -> float | None:
    return known_value(number) if isinstance(number, Tensor) else float(number)


def _tensors_in(opt: Any) -> list[Tensor]:
    return [lr for lr in learning_rates(opt) if isinstance(lr, Tensor)]
