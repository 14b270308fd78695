"""Accumulation: the mean of several calls' gradients, and one inner update for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._core import pytree, tensors, transforms
from .._core.tensors import compute_dtype, write
from .._core.types import ELEMENTWISE, Number, Optimizer, Schedule, Traits, Tree
from .._dtensor.shards import check_placed
from .._engine.checks import check_optimizer, check_state, is_like, kind_of, of_members
from .._engine.hyperparameters import has_schedule, normalize_fields, numbers_of
from .._engine.prepare import first_count, next_step
from .._engine.registration import register_optimizer
from .._engine.rule import COUNT, Hyperparam
from .base import (
    Gradients,
    check_inplace,
    check_scalar,
    gather_gradients,
    gather_params,
    place_of_counts,
    read,
    records,
    with_step,
    write_step,
)
from .update_if import update_if, update_if_

__all__ = ["Accumulate", "AccumulateState"]

ParamsT = TypeVar("ParamsT")


class AccumulateState(NamedTuple):
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
    inner: Any
    step: Tree = ()


@register_optimizer
@dataclass(frozen=True)
class Accumulate:
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

    The order of wrappers matters. `Accumulate(Clip(AdamW()), 8)` clips the mean of eight gradients,
    `Clip(Accumulate(AdamW(), 8))` each of the eight.

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
        >>> opt = funcopt.Accumulate(funcopt.AdamW(lr=0.1), every=2)
        >>> params = {"w": torch.ones(2)}
        >>> state = opt.init(params)
        >>> params, state = opt.update({"w": torch.tensor([3.0, 0.0])}, state, params)
        >>> params
        {'w': tensor([1., 1.])}
        >>> params, state = opt.update({"w": torch.tensor([1.0, 4.0])}, state, params)
        >>> params, state.inner.exp_avg
        ({'w': tensor([0.8990, 0.8990])}, {'w': tensor([0.2000, 0.2000])})
    """

    traits: ClassVar[Traits] = ELEMENTWISE

    hyperparams: ClassVar[tuple[Hyperparam, ...]] = (Hyperparam("every", COUNT),)

    inner: Optimizer[Any]
    every: Number | Schedule

    def __post_init__(self) -> None:
        """Check and normalize the number of calls."""
        check_optimizer("inner", self.inner)
        normalize_fields(self, self.hyperparams)

    def init(self, params: Tree) -> AccumulateState:
        """Return the state before the first update: an empty sum, and the inner state.

        Args:
            params: The parameters, as for the inner optimizer.

        Raises:
            TypeError: If a leaf is not a dense floating-point or complex tensor.
            ValueError: If two leaves share their memory.

        Example:
            >>> import torch, funcopt
            >>> opt = funcopt.Accumulate(funcopt.AdamW(), every=2)
            >>> opt.init([torch.ones(2, dtype=torch.bfloat16)]).acc_grads
            [tensor([0., 0.])]
        """
        leaves, structure, _ = gather_params(self, params)
        zeros = [torch.zeros_like(leaf, dtype=compute_dtype(leaf.dtype)) for leaf in leaves]
        place = place_of_counts(self.every)
        return AccumulateState(
            torch.zeros((), dtype=torch.float64, device=place),
            pytree.unflatten(structure, zeros),
            torch.zeros(len(leaves), dtype=torch.bool, device=place),
            self.inner.init(params),
            first_count(torch.device("cpu")) if has_schedule(self) else (),
        )

    def update(
        self, grads: Tree, state: AccumulateState, params: ParamsT
    ) -> tuple[ParamsT, AccumulateState]:
        """Return the new parameters and the new state, in fresh memory.

        Args:
            grads: The gradients: a tree with the keys of `params`, each like its parameter in
                shape, dtype and device, or None, which adds nothing. A leaf that had none in all
                calls has none for the inner optimizer. (Where the count cannot be read, the call
                that completes the sum speaks for all: leave out the same leaves in each.)
            state: The state that `init` or the last update returned.
            params: The parameters.

        Returns:
            The pair `(new_params, new_state)`.

        Raises:
            TypeError: As the inner optimizer.
            ValueError: As the inner optimizer, or if `every` is no single number, or out of range
                since it was given.

        Example:
            >>> import torch, funcopt
            >>> opt = funcopt.Accumulate(funcopt.AdamW(lr=0.1), every=2)
            >>> params = [torch.ones(1), torch.ones(1)]
            >>> state = opt.init(params)
            >>> for grads in ([torch.ones(1), None], [None, None]):
            ...     params, state = opt.update(grads, state, params)
            >>> params
            [tensor([0.8990]), tensor([1.])]
        """
        work, numbers = _gather(self, grads, state, params)
        complete = _completes(state.mini_step, **numbers)
        recorded = records(self, work.gradients, state, numbers)
        with torch.set_grad_enabled(recorded):
            sums, given = work.sums(), work.given()
            mean = self._mean(work, sums, given, complete)
        new_params, inner = update_if(complete, self.inner, mean, state.inner, params, recorded)
        with torch.set_grad_enabled(recorded):
            rest = [_zero_if(complete, tensor) for tensor in sums]
        mini_step = _zero_if(complete, state.mini_step.detach() + 1)
        acc_grads, given = work.acc_grads.rebuild(rest), _zero_if(complete, given)
        step = next_step(state.step, complete)
        return new_params, AccumulateState(mini_step, acc_grads, given, inner, step)

    def update_(
        self, grads: Tree, state: AccumulateState, params: ParamsT
    ) -> tuple[ParamsT, AccumulateState]:
        """Do the same as `update`, written into `params` and `state`, which are returned.

        A call that only adds allocates nothing; one that completes the sum allocates the mean.

        Args:
            grads: The gradients, as for `update`.
            state: The state, which is overwritten.
            params: The parameters, which are overwritten.

        Returns:
            The pair `(params, state)`: the trees that were given.

        Raises:
            RuntimeError: Under a transform of `torch.func`, or if anything has a history.
            TypeError: As `update`.
            ValueError: As `update`, and as the inner optimizer's `update_`.

        Example:
            >>> import torch, funcopt
            >>> opt = funcopt.Accumulate(funcopt.AdamW(lr=0.1), every=2)
            >>> w = torch.ones(1)
            >>> state = opt.init(w)
            >>> for _ in range(2):
            ...     _ = opt.update_(torch.ones(1), state, w)
            >>> w
            tensor([0.8990])
        """
        work, numbers = _gather(self, grads, state, params)
        own = with_step({"state.given": state.given, "state.mini_step": state.mini_step}, state)
        sums_before = work.acc_grads.leaves
        check_inplace(numbers, own, work.gradients, ("state.acc_grads", sums_before))
        complete = _completes(state.mini_step, **numbers)
        with torch.no_grad():
            if complete is False:
                work.add_()
                write(state.given, work.given())
            else:
                sums, given = work.sums(), work.given()
                mean = self._mean(work, sums, given, complete)
                update_if_(complete, self.inner, mean, state.inner, params)
                for old, new in zip([*sums_before, state.given], [*sums, given], strict=True):
                    if complete is True:
                        old.zero_()
                    else:
                        write(old, _zero_if(complete, new))
            write(state.mini_step, _zero_if(complete, state.mini_step + 1))
            write_step(state, complete)
        return params, state

    def _mean(
        self, work: _Work, sums: list[Tensor], given: Tensor, complete: bool | Tensor
    ) -> Tree:
        """Return the mean of the gradients, in the dtypes of the parameters."""
        if complete is False:
            return None
        if complete is True and len(work.gradients.tensors) < len(sums):
            there = given.tolist()
        else:
            there = [grad is not None for grad in work.gradients.leaves]
        # Who follows the operators may still need the sums; they are needed, too, unless complete.
        in_place = complete is True and not transforms.followed()
        # As many as there are, also where `every` was another number when the sum was begun.
        count = work.number()
        return work.gradients.paired.rebuild(
            [
                _mean_of(total, count, in_place=in_place).to(param.dtype) if own else None
                for total, param, own in zip(sums, work.gradients.params, there, strict=True)
            ]
        )


class _Work(NamedTuple):
    """One call laid out flat, in the order of the parameters."""

    gradients: Gradients
    acc_grads: pytree.Paired
    given_before: Tensor
    mini_step: Tensor

    def number(self) -> Number:
        """Return how many gradients are in the sum with this call's."""
        before = read(self.mini_step)
        return self.mini_step.detach() + 1 if before is None else before + 1

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
        if len(self.gradients.tensors) == len(self.gradients.leaves):
            return torch.ones_like(self.given_before)
        now = [grad is not None for grad in self.gradients.leaves]
        before = self.given_before
        if transforms.on_host(before):
            return before | torch.tensor(now, dtype=torch.bool, device=before.device)
        # What is on a device is put together there: sending something would wait for it.
        columns = zip(now, torch.ones_like(before), before, strict=True)
        return torch.stack([one if given else old for given, one, old in columns])

    def path(self, index: int) -> str:
        """Return the path of a sum."""
        return pytree.path(self.gradients.structure, "state.acc_grads", index)


def _gather(
    opt: Accumulate, grads: Tree, state: AccumulateState, params: Tree
) -> tuple[_Work, dict[str, Number]]:
    check_state(state, AccumulateState)
    check_scalar("state.mini_step", state.mini_step)
    numbers = numbers_of(opt, state.step)
    gradients = gather_gradients(opt, grads, params)
    acc_grads = pytree.pair(state.acc_grads, "state.acc_grads", gradients.structure)
    work = _Work(gradients, acc_grads, state.given, state.mini_step)
    check_placed(acc_grads.leaves, gradients.params, work.path, "a sum of gradients")
    for index, (total, param) in enumerate(zip(acc_grads.leaves, gradients.params, strict=True)):
        wanted = param.shape, compute_dtype(param.dtype), param.device
        if not is_like(total, *wanted):
            raise ValueError(
                f"{work.path(index)} is not the sum of gradients of a parameter of {param.dtype}, "
                f"shape {tuple(param.shape)}, on {param.device}: it is {kind_of(total)}, and must "
                f"be a dense tensor of {wanted[1]}, of this shape, and there. Make the state with "
                f"init() from these parameters.{of_members()}"
            )
    given, count = state.given, len(acc_grads.leaves)
    if not is_like(given, torch.Size([count]), torch.bool):
        raise ValueError(
            f"state.given is {kind_of(given)}: it must be a bool tensor of shape ({count},), one "
            f"element for each leaf. Make the state with init() from these parameters."
        )
    return work, numbers


def _completes(mini_step: Tensor, every: Number) -> bool | Tensor:
    """Whether this call's gradient is the last of a sum; a tensor where that is not read."""
    count = read(mini_step)
    known = read(every) if isinstance(every, Tensor) else every
    if count is None or known is None:
        return mini_step.detach() + 1 >= every
    return count + 1 >= known


def _mean_of(total: Tensor, count: Number, *, in_place: bool) -> Tensor:
    if isinstance(count, Tensor):
        count = tensors.fit(count, total)
    return total.div_(count) if in_place else total / count


def _zero_if(condition: bool | Tensor, tensor: Tensor) -> Tensor:
    """Return zeros where a condition holds, else the tensor itself."""
    if isinstance(condition, Tensor):
        return tensor.masked_fill(condition.to(tensor.device), 0)
    return torch.zeros_like(tensor) if condition else tensor
