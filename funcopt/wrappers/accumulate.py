"""Accumulation: the mean of several calls' gradients, and one inner update for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core import pytree, tensors, transforms
from .._core.inner import InnerStateT, InnerT_co, OptimizerLike
from .._core.tensors import compute_dtype, write
from .._core.types import (
    COUNT,
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
    kind_of,
)
from .._engine.checks import check_state, is_like
from .._engine.counts import next_count
from .._engine.hyperparameters import normalize_fields, numbers_of
from .._engine.registration import register_optimizer, state_class
from .._engine.stacked import Finish, Stack
from .._engine.stacked_wrappers import plan_stacked, plans_members
from .._engine.update_if import update_if, update_if_
from ._shadow_params import ShadowParams
from ._shared import (
    Gradients,
    check_scalar,
    check_wrapper_inplace,
    device_of_counts,
    first_count_if_scheduled,
    gather_gradients,
    gather_params,
    is_due,
    own_tensors,
    read,
    records,
    write_fields_and_count,
    zero_if,
)
from ._stacks import (
    change_rows_,
    gather_stack,
    make_rows,
    numbers_of_members,
    renewed,
    rewritten,
    shared,
)


@state_class
class AccumulateState(NamedTuple, Generic[InnerStateT]):
    """The state of `Accumulate`, in which `acc_grads` has the shape of the parameters.

    Attributes:
        mini_step: How many gradients are in the sum: a float64 tensor of shape (), on the CPU, or
            where `every` is if that is a tensor.
        acc_grads: The sum of the gradients since the last inner update, in float32 for 16-bit
            parameters, else in the parameter's dtype. That of a leaf at rest (as under `Frozen`)
            stays 0.
        given: Which leaves had a gradient since then: a bool tensor beside `mini_step`, with one
            element for each leaf, in the order in which the parameters are flattened.
        inner: The state of the inner optimizer.
        step: How many inner updates were made, if `every` is a schedule: likewise a tensor of shape
            () on the CPU; else `()`.
    """

    mini_step: Tensor
    acc_grads: Tree
    given: Tensor
    inner: InnerStateT
    step: Tree = ()


@register_optimizer
@dataclass(frozen=True)
class Accumulate(Generic[InnerT_co]):
    r"""Sum the gradients of `every` calls, and update with their mean in the last of them.

    $$ \theta_{t + n} = \mathrm{inner}\Big(\frac{1}{n} \sum_{i=1}^{n} g_{t + i},\ \theta_t\Big) $$

    In between, parameters and inner state stay what they are. Where losses are means over batches
    of one size, the result is that of one batch `every` times as large, as with
    `optax.MultiSteps`, which keeps a running mean where this keeps a sum, and in the parameter's
    dtype where this sums 16-bit gradients in float32.

    A call that only adds costs one addition with `update_`. `update` copies the parameters and the
    inner state besides, since whatever it returns is in fresh memory. The count that tells one from
    the other is on the CPU, where it is read without waiting for a GPU. Under vmap, and where
    operators are recorded (compile, export), it cannot be read: there each call makes an inner
    update, and what holds is chosen element by element.

    A CUDA graph would replay one of the two. To capture one, move the counts to the GPU, with
    `state._replace(mini_step=state.mini_step.cuda(), given=state.given.cuda())`: there it is chosen
    in this way, too.

    The order of wrappers matters. `Accumulate(Clip(Adam()), 8)` clips the mean of eight gradients,
    `Clip(Accumulate(Adam(), 8))` each of the eight.

    Args:
        inner: The optimizer that is given the mean.
        every: How many calls make one inner update: a whole number of at least 1. A 0-dim tensor,
            of a floating-point dtype, may differ between the members of a vmap. A schedule is
            called with the count of inner updates made so far, as that of `optax.MultiSteps`.

    Raises:
        TypeError: If `inner` is no optimizer, or `every` is of the wrong type.
        ValueError: If `every` is no whole number, or below 1.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.Accumulate(funcopt.SGD(lr=0.1), every=2)
        >>> params = {"w": torch.ones(2)}
        >>> state = opt.init(params)
        >>> params, state = opt.update({"w": torch.tensor([3.0, 0.0])}, state, params)
        >>> params
        {'w': tensor([1., 1.])}
        >>> params, state = opt.update({"w": torch.tensor([1.0, 4.0])}, state, params)
        >>> params  # moved by the mean, which is 2 for both elements
        {'w': tensor([0.8000, 0.8000])}
    """

    traits: ClassVar[Traits] = ELEMENTWISE

    hyperparams: ClassVar[tuple[Hyperparam, ...]] = (Hyperparam("every", COUNT),)

    inner: InnerT_co
    every: Number | Schedule

    def __post_init__(self) -> None:
        """Check and normalize the number of calls."""
        check_is_optimizer("inner", self.inner)
        normalize_fields(self, self.hyperparams)

    def init(self: Accumulate[OptimizerLike[StateT]], params: Tree) -> AccumulateState[StateT]:
        """Return the state before the first update: an empty sum, and the inner state."""
        leaves, structure, _ = gather_params(self, params)
        zeros = [torch.zeros_like(leaf, dtype=compute_dtype(leaf.dtype)) for leaf in leaves]
        place = device_of_counts(self.every)
        return AccumulateState(
            torch.zeros((), dtype=torch.float64, device=place),
            pytree.unflatten(structure, zeros),
            torch.zeros(len(leaves), dtype=torch.bool, device=place),
            self.inner.init(params),
            first_count_if_scheduled(self, torch.device("cpu")),
        )

    def update(
        self: Accumulate[OptimizerLike[StateT]],
        grads: Tree,
        state: AccumulateState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, AccumulateState[StateT]]:
        """Return the new parameters and the new state, in fresh memory.

        A gradient of None adds nothing. A leaf that had none in all calls has none for the inner
        optimizer. (Where the count cannot be read, the call that completes the sum speaks for all:
        leave out the same leaves in each.)
        """
        call, numbers = _gather(self, grads, state, params)
        complete = is_due(state.mini_step, **numbers)
        recorded = records(self, call.gradients, state, numbers)
        with torch.set_grad_enabled(recorded):
            sums, given = call.sums(), call.given()
            mean = call.mean(sums, given, complete)
        new_params, inner = update_if(complete, self.inner, mean, state.inner, params, recorded)
        with torch.set_grad_enabled(recorded):
            rest = [zero_if(complete, tensor) for tensor in sums]
        mini_step = zero_if(complete, state.mini_step.detach() + 1)
        acc_grads, given = call.acc_grads.rebuild(rest), zero_if(complete, given)
        step = next_count(state.step, complete)
        return new_params, AccumulateState(mini_step, acc_grads, given, inner, step)

    def update_(
        self: Accumulate[OptimizerLike[StateT]],
        grads: Tree,
        state: AccumulateState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, AccumulateState[StateT]]:
        """Do the same in place. A call that completes the sum allocates the mean, others none."""
        call, numbers = _gather(self, grads, state, params)
        own, sums_before = own_tensors(state, "given", "mini_step"), call.acc_grads.leaves
        check_wrapper_inplace(numbers, own, call.gradients, ("state.acc_grads", sums_before))
        complete = is_due(state.mini_step, **numbers)
        with torch.no_grad():
            if complete is False:
                call.add_()
                write(state.given, call.given())
            else:
                sums, given = call.sums(), call.given()
                mean = call.mean(sums, given, complete)
                update_if_(complete, self.inner, mean, state.inner, params)
                for old, new in zip([*sums_before, state.given], [*sums, given], strict=True):
                    if complete is True:
                        old.zero_()
                    else:
                        write(old, zero_if(complete, new))
            write_fields_and_count(
                state, complete, mini_step=zero_if(complete, state.mini_step + 1)
            )
        return params, state

    def _plan_members(self, stack: Stack) -> Finish | None:
        """Return what updates stacked members, each with a count of calls of its own."""
        state: AccumulateState = stack.state
        check_state(state, AccumulateState)
        stack = stack.multiplied()
        numbers = numbers_of_members(self, stack, mini_step=(state.mini_step, None))
        gradients = gather_stack(self, stack)
        if numbers is None or gradients is None or not _is_given(state.given, gradients):
            return None
        sums = _gather_sums(gradients, state.acc_grads)
        due: Any = is_due(state.mini_step, **numbers)
        completing = stack.where(due)
        mean = _means_of_members(completing.active, sums.leaves, gradients, state.mini_step + 1)
        finish = plan_stacked(
            self.inner, completing._replace(state=state.inner, grads=gradients.replace(mean).tree)
        )
        if finish is None:
            return None

        def update() -> tuple[Tree, AccumulateState]:
            new_params, inner = finish()
            totals = rewritten(stack, sums.leaves)
            change_rows_(stack.where(~due).active, Tensor.add_, totals, gradients.tensors)
            change_rows_(completing.active, Tensor.zero_, totals)
            mini_step, given = renewed(
                stack,
                (state.mini_step, zero_if(due, state.mini_step + 1)),
                (state.given, zero_if(due[:, None], torch.ones_like(state.given))),
            )
            acc_grads = sums.paired.rebuild(totals)
            return new_params, AccumulateState(mini_step, acc_grads, given, inner)

        return update


plans_members(Accumulate, Accumulate._plan_members)


class _Call(NamedTuple):
    """One call of an update laid out flat, in the order of the parameters."""

    gradients: Gradients
    acc_grads: pytree.Paired
    given_before: Tensor
    mini_step: Tensor

    def sums(self) -> list[Tensor]:
        """Return the sums with the gradients added, in fresh memory."""
        totals = self.acc_grads.leaves
        added = iter(tensors.add(*self._added()))
        return [
            total.clone() if grad is None else next(added)
            for total, grad in zip(totals, self.gradients.leaves, strict=True)
        ]

    def add_(self) -> None:
        """Add the gradients to the sums."""
        tensors.add_(*self._added())

    def _added(self) -> tuple[list[Tensor], list[Tensor]]:
        pairs = zip(self.acc_grads.leaves, self.gradients.leaves, strict=True)
        return [total for total, grad in pairs if grad is not None], self.gradients.tensors

    def given(self) -> Tensor:
        """Return which leaves had a gradient, in this call or before."""
        now, before = [grad is not None for grad in self.gradients.leaves], self.given_before
        if all(now):
            return torch.ones_like(before)
        if transforms.on_host(before):
            return before | torch.tensor(now, dtype=torch.bool, device=before.device)
        # What is on a device is put together there: sending something would wait for it.
        columns = zip(now, torch.ones_like(before), before, strict=True)
        return torch.stack([one if given else old for given, one, old in columns])

    def mean(self, sums: list[Tensor], given: Tensor, complete: bool | Tensor) -> Tree:
        """Return the mean of the gradients, in the dtypes of the parameters.

        The sums, with this call's gradients, may be overwritten. If this is known not to be the
        last call of a sum, there is no mean.
        """
        if complete is False:
            return None
        if complete is True and len(self.gradients.tensors) < len(sums):
            there = given.tolist()
        else:
            there = [grad is not None for grad in self.gradients.leaves]
        # A derivative may need the sums, and so does a sum that goes on.
        in_place = complete is True and not transforms.followed()
        # As many as there are, also where `every` was another number when the sum was begun.
        before = read(self.mini_step)
        count = self.mini_step.detach() + 1 if before is None else before + 1
        return self.gradients.paired.rebuild(
            [
                _mean_of(total, count, in_place=in_place).to(param.dtype) if own else None
                for total, param, own in zip(sums, self.gradients.params, there, strict=True)
            ]
        )


def _gather(
    opt: Accumulate, grads: Tree, state: AccumulateState, params: Tree
) -> tuple[_Call, dict[str, Number]]:
    check_state(state, AccumulateState)
    check_scalar("state.mini_step", state.mini_step)
    numbers = numbers_of(opt, state.step)
    gradients = gather_gradients(opt, grads, params)
    sums = _gather_sums(gradients, state.acc_grads)
    given, count = state.given, len(gradients.params)
    if not is_like(given, torch.Size([count]), torch.bool):
        raise ValueError(
            f"state.given is {kind_of(given)}: it must be a bool tensor of shape ({count},), one "
            f"element for each leaf. Make the state with init() from these parameters."
        )
    return _Call(gradients, sums.paired, given, state.mini_step), numbers


def _gather_sums(gradients: Gradients, acc_grads: Tree) -> ShadowParams:
    return ShadowParams.gather(
        gradients,
        "state.acc_grads",
        acc_grads,
        compute_dtype,
        "a sum of gradients",
        "is not the sum of gradients of a parameter",
    )


def _is_given(given: Any, gradients: Gradients) -> bool:
    """Whether it says of each of stacked members which leaves had a gradient."""
    members, count = len(gradients.params[0]), len(gradients.params)
    return is_like(given, torch.Size([members, count]), torch.bool)


def _means_of_members(
    due: Tensor | None, sums: list[Tensor], gradients: Gradients, count: Tensor
) -> list[Tensor]:
    """Return the mean gradients of those stacked members whose sums are complete."""
    if due is not None and not bool(due.any()):
        return gradients.tensors  # which nobody is given
    return make_rows(due, _mean_with, sums, gradients.tensors, numbers=[shared(due, count)])


def _mean_with(total: Tensor, grad: Tensor, count: Number) -> Tensor:
    """Return the mean of a sum and a last gradient, in the dtype of that."""
    return _mean_of(total + grad, count, in_place=True).to(grad.dtype)


def _mean_of(total: Tensor, count: Number, *, in_place: bool) -> Tensor:
    if isinstance(count, Tensor):
        count = tensors.fit(count, total)
    return total.div_(count) if in_place else total / count
