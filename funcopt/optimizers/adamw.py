"""AdamW as a value: hyperparameters, state, and the way from trees to kernels and back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import _engine
from .._core import pytree
from .._core.checks import check_state
from .._core.hyperparameters import check_choice, check_flag, normalize, normalize_fields
from .._core.numbers import numbers_at, with_factor
from .._core.types import Number, Schedule, Tree
from .._engine import KERNELS, Scalars, Variant
from .._engine.counts import first_count, place_for_count
from .._engine.inplace import check_inplace
from .._engine.prepare import Work, check_untied, flatten_params, gather, trees_of
from .._engine.registration import register_optimizer
from .._engine.routine import Routine, find_routine, have_history
from .._engine.scaled import hands_on, multiplied, outside_unless_plain

__all__ = ["AdamW", "AdamWState"]

ParamsT = TypeVar("ParamsT")


class AdamWState(NamedTuple):
    """The state of `AdamW`: tensors only, in trees of the shape of the parameters.

    Attributes:
        step: How many updates were made: a float64 tensor of shape (), on the GPU if all
            parameters are on one, else on the CPU; with `step_per_leaf` a tree of them. In float64
            it counts on where float32 stops, at 2**24.
        exp_avg: The running mean of the gradients.
        exp_avg_sq: The running mean of their squares.
        max_exp_avg_sq: The largest `exp_avg_sq` so far; `()` unless amsgrad.
    """

    step: Tree
    exp_avg: Tree
    exp_avg_sq: Tree
    max_exp_avg_sq: Tree


@register_optimizer
@dataclass(frozen=True)
class AdamW:
    r"""Adam with decoupled weight decay.

    With gradient $g_t$, learning rate $\eta$ and weight decay $\lambda$,

    $$ m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
       v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, $$

    $$ \theta_t = \theta_{t-1} - \eta\lambda\,\theta_{t-1}
       - \eta\,\frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}. $$

    An `AdamW` is a frozen value and a pytree whose leaves are those hyperparameters that are
    tensors: map over it with vmap to sweep them, differentiate with respect to it to learn them.
    Two are equal if all they hold is, tensors by dtype, shape, device and values.
    Make such tensors in float64, to get the bits of the Python number, and on the CPU, also beside
    parameters on a GPU, where their value can be read without waiting. A learning rate on a GPU, as
    a schedule gives one there, is never read; the fused kernel takes it rounded to float32.

    The equations are those of Loshchilov and Hutter, *Decoupled Weight Decay Regularization*
    (ICLR 2019), with weight decay times the learning rate as in `torch.optim.AdamW`; amsgrad is
    from Reddi et al., *On the Convergence of Adam and Beyond* (ICLR 2018), with the maximum taken
    before the bias correction, again as in torch. On the CPU, in float32 and float64, the same
    kernel gives torch's bits. 16-bit leaves are computed in float32 by every kernel, so that zero
    gradients in float16 leave all but weight decay at rest, where torch's foreach gives NaN. A
    complex leaf is a pair of real ones.

    Args:
        lr: Learning rate: at least 0; a number, a 0-dim tensor, or a schedule, which is called with
            the count of updates made so far (0 at the first) and returns one of the others.
        betas: Decay rates of the two running means: each at least 0 and below 1, and each likewise
            a number, tensor or schedule. The bias corrections take the present value for all steps.
        eps: Added to the denominator: at least 0; likewise. At 0, a zero gradient at the first step
            gives 0 / 0.
        weight_decay: At least 0, multiplied by the learning rate; likewise.
        amsgrad: Divide by the largest second moment so far.
        maximize: Ascend instead of descending.
        step_per_leaf: Count the updates of each leaf, so that a leaf whose gradient is sometimes
            None has its own bias corrections, as in torch.optim; a schedule then sees each leaf's
            own count. Off: one count for the tree, advanced by every update.
        kernel: `"auto"` takes the fastest that is right for the tensors; `"fused"`, `"foreach"`,
            `"triton"` (CUDA alone) and `"plain"` name one. Tracers and forward mode always see
            plain operators.
        differentiable: Whether plain autograd records an update. None: if a state tensor or a
            hyperparameter requires a gradient, or if a gradient depends on anything that does,
            other than these parameters. Under a transform of `torch.func` always.

    Raises:
        TypeError: If a hyperparameter is of the wrong type.
        ValueError: If one is out of range, NaN or infinite.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.AdamW(lr=0.1)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = opt.init(params)
        >>> params, state = opt.update({"w": torch.tensor([0.5, -0.5])}, state, params)
        >>> params
        {'w': tensor([0.8990, 2.0980])}
    """

    elementwise = True

    lr: Number | Schedule = 1e-3
    betas: tuple[Number | Schedule, Number | Schedule] = (0.9, 0.999)
    eps: Number | Schedule = 1e-8
    weight_decay: Number | Schedule = 1e-2
    amsgrad: bool = False
    maximize: bool = False
    step_per_leaf: bool = False
    kernel: str = "auto"
    differentiable: bool | None = None

    def __post_init__(self) -> None:
        """Check and normalize every hyperparameter."""
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
            raise TypeError(f"betas={self.betas!r}: must be a pair, such as (0.9, 0.999).")
        betas = (normalize(f"betas[{i}]", b, schedule=True) for i, b in enumerate(self.betas))
        object.__setattr__(self, "betas", tuple(betas))
        normalize_fields(self, "lr", "eps", "weight_decay")
        for name in ("amsgrad", "maximize", "step_per_leaf"):
            check_flag(name, getattr(self, name))
        if self.differentiable is not None:
            check_flag("differentiable", self.differentiable)
        check_choice("kernel", self.kernel, KERNELS)

    def init(self, params: Tree) -> AdamWState:
        """Return the state before the first update: zeros.

        Args:
            params: A tree of dense floating-point or complex tensors, in any strides.

        Raises:
            TypeError: If a leaf is no such tensor.
            ValueError: If two leaves start at the same place in memory, as tied weights do.

        Example:
            >>> import torch, funcopt
            >>> funcopt.AdamW().init([torch.ones(2)])  # doctest: +NORMALIZE_WHITESPACE
            AdamWState(step=tensor(0., dtype=torch.float64), exp_avg=[tensor([0., 0.])],
                       exp_avg_sq=[tensor([0., 0.])], max_exp_avg_sq=())
        """
        leaves, structure = flatten_params(params)

        def zeros() -> Tree:
            return pytree.unflatten(structure, [torch.zeros_like(leaf) for leaf in leaves])

        place = place_for_count(leaves)
        step: Tree = first_count(place)
        if self.step_per_leaf:
            step = pytree.unflatten(structure, [first_count(place) for _ in leaves])
        return AdamWState(step, zeros(), zeros(), zeros() if self.amsgrad else ())

    def update(self, grads: Tree, state: AdamWState, params: ParamsT) -> tuple[ParamsT, AdamWState]:
        """Return the new parameters and the new state, in fresh memory.

        On the CPU, many small leaves (of up to 4096 elements) come in storages of up to 2**18
        elements that several share, each its own part: clone one to keep or save it alone, and
        before it is to grow by `resize_`, or it would grow over the next one. (Torch asks only
        whether a storage is large enough. With one for each leaf, an update of thousands of small
        leaves takes about twice as long, which is the time that it takes to make them.)

        Args:
            grads: The gradients: a tree with the keys of `params`, each like its parameter in
                shape, dtype and device, or None, which leaves parameter and moments as they are.
            state: The state that `init` or the last update returned.
            params: The parameters.

        Returns:
            The pair `(new_params, new_state)`. Under plain autograd, unless the update is recorded,
            the new parameters are leaves with the `requires_grad` of the old.

        Raises:
            TypeError: If a leaf is not a dense tensor of a floating-point or complex dtype.
            ValueError: If the trees, shapes, dtypes or devices do not match, if two parameters
                start at the same place in memory, or if a hyperparameter is out of range or no
                single number.

        Example:
            >>> import torch, funcopt
            >>> opt = funcopt.AdamW(lr=1e-2)
            >>> params = [torch.ones(2), torch.ones(2)]
            >>> state = opt.init(params)
            >>> params, state = opt.update([torch.ones(2), None], state, params)
            >>> params
            [tensor([0.9899, 0.9899]), tensor([1., 1.])]
        """
        return self._move(grads, None, state, params)

    def update_(
        self, grads: Tree, state: AdamWState, params: ParamsT
    ) -> tuple[ParamsT, AdamWState]:
        """Do the same as `update`, written into `params` and `state`, which are returned.

        Everything is checked before anything is written. No memory of the parameters' size is
        allocated, and parameters that require a gradient stay leaves. An interrupt (Ctrl-C) that
        comes in the middle leaves parameters and state half-written: go on from a checkpoint.

        Args:
            grads: The gradients, as for `update`.
            state: The state, which is overwritten.
            params: The parameters, which are overwritten.

        Returns:
            The pair `(params, state)`: the trees that were given.

        Raises:
            RuntimeError: Under a transform of `torch.func`, or if a gradient, a state tensor, a
                hyperparameter or a parameter's own history asks for a derivative of the update.
            TypeError: As `update`.
            ValueError: As `update`, and if a tensor to be written is expanded, or starts in memory
                where another one or a gradient does.

        Example:
            >>> import torch, funcopt
            >>> opt = funcopt.AdamW(lr=0.1)
            >>> w = torch.nn.Parameter(torch.ones(2))
            >>> state = opt.init(w)
            >>> _ = opt.update_(torch.ones(2), state, w)
            >>> w
            Parameter containing:
            tensor([0.8990, 0.8990], requires_grad=True)
        """
        return self._move_(grads, None, state, params)

    def _move(
        self, grads: Tree, factor: Tensor | None, state: AdamWState, params: Tree
    ) -> tuple[Any, AdamWState]:
        """Update by gradients times a number of shape (); None is 1."""
        if factor is not None:
            grads, factor = outside_unless_plain(grads, factor)
        routine = self._find_routine(grads, state, params)
        numbers = [] if routine is None else self._numbers([routine.step], [routine.new_step])
        if routine is not None and not have_history(numbers[0]):
            (own,) = with_factor(numbers, factor)
            new_params, *new_state = routine.move(own, self._variant())
            return new_params, AdamWState(*new_state)
        work = self._gather(grads, state, params)
        check_untied(work.params.leaves, work.params.structure)
        counts = work.counts.after(work.active, work.watched)
        numbers = numbers or self._numbers(*work.counts.around(work.active, counts))
        if factor is not None and self._is_followed(work, numbers):
            return self._move(multiplied(grads, factor), None, state, params)
        numbers = with_factor(numbers, factor)
        gradients, moments = work.historic()
        others = (*moments, *chain.from_iterable(numbers))
        with _engine.recording(work.params.leaves, gradients, others, self.differentiable):
            columns = _engine.run(
                work.leaves, work.counts.of_leaves(numbers), self._variant(), work.layout
            )
            new_params, *new_moments = work.rebuild(columns)
        no_maximum = () if self.amsgrad else ((),)
        return new_params, AdamWState(work.counts.rebuild(counts), *new_moments, *no_maximum)

    def _move_(
        self, grads: Tree, factor: Tensor | None, state: AdamWState, params: Tree
    ) -> tuple[Any, AdamWState]:
        """Do the same in place."""
        if factor is not None:
            grads, factor = outside_unless_plain(grads, factor)
        routine = self._find_routine(grads, state, params, writing=True)
        numbers = [] if routine is None else self._numbers([routine.step], [routine.new_step])
        if routine is not None and not have_history(numbers[0]):
            (own,) = with_factor(numbers, factor)
            routine.move_(own, self._variant())
            return params, state
        work = self._gather(grads, state, params)
        counts = work.counts.after(work.active, work.watched)
        numbers = numbers or self._numbers(*work.counts.around(work.active, counts))
        if factor is not None and self._is_followed(work, numbers):
            return self._move_(multiplied(grads, factor), None, state, params)
        numbers = with_factor(numbers, factor)
        check_inplace(work, counts, numbers)
        # Entering no_grad takes longer than moving a small leaf.
        may_record = work.layout is None or work.layout.params_require_grad
        with torch.no_grad() if may_record else nullcontext():
            _engine.run_(work.leaves, work.counts.of_leaves(numbers), self._variant(), work.layout)
            work.counts.write(counts)
        return params, state

    def _is_followed(self, work: Work, numbers: list[Scalars]) -> bool:
        """Whether more than the results may be asked of a step, so that kernels take no factor."""
        return (
            work.watched
            or self.differentiable is True
            or work.layout is None
            or not work.layout.calm
            or any(map(have_history, numbers))
        )

    def _gather(self, grads: Tree, state: AdamWState, params: Tree) -> Work:
        check_state(state, AdamWState)
        work = gather(grads, state, params, amsgrad=self.amsgrad, step_per_leaf=self.step_per_leaf)
        for index, leaf in enumerate(work.leaves.params if self.kernel != "auto" else []):
            reason = _engine.unserved(self.kernel, leaf.device)
            if reason is not None:
                raise ValueError(
                    f"{work.path('params', index)} is on {leaf.device}, which kernel="
                    f"{self.kernel!r} cannot serve: {reason}. kernel='auto' takes one that can."
                )
        return work

    def _find_routine(
        self, grads: Tree, state: AdamWState, params: Tree, *, writing: bool = False
    ) -> Routine | None:
        """The step, if all but the numbers in it is as it was in one before."""
        if not isinstance(state, AdamWState) or self.step_per_leaf or self.differentiable:
            return None
        trees = trees_of(grads, state, params, amsgrad=self.amsgrad)
        return find_routine(trees, state.step, self.kernel, writing=writing)

    def _numbers(self, olds: Sequence[Tensor], news: Sequence[Number]) -> list[Scalars]:
        """The numbers of this update for each count that it goes by, before it and after."""
        return numbers_at((self.lr, *self.betas, self.eps, self.weight_decay), olds, news)

    def _variant(self) -> Variant:
        return Variant(self.amsgrad, self.maximize, self.kernel, self.differentiable)


hands_on(AdamW, AdamW._move, AdamW._move_)
