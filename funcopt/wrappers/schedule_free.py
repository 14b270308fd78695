"""Schedule-free learning: an average in place of a learning rate that falls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core import pytree, tensors, transforms
from .._core.inner import InnerStateT, InnerT_co, OptimizerLike
from .._core.tensors import choose, compute_dtype, fit, write
from .._core.types import (
    AT_LEAST_ZERO,
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
from .._engine import memory
from .._engine.checks import check_state
from .._engine.counts import device_for_count, first_count, fresh, next_count
from .._engine.hyperparameters import normalize_fields, numbers_of
from .._engine.prepare import keep_requiring
from .._engine.registration import register_optimizer, state_class
from .._engine.rule import StepInputs, StepOutputs
from ._in_float32 import check_params_inplace, widened
from ._lr import own_rates, the_rate
from ._shadow_params import ShadowParams, copy_params
from ._shared import (
    check_scalar,
    first_count_if_scheduled,
    gather_gradients,
    known_value,
    own_tensors,
    records,
    write_fields_and_count,
)


@state_class
class ScheduleFreeState(NamedTuple, Generic[InnerStateT]):
    """The state of `ScheduleFree`. Its trees are in float32 for 16-bit parameters.

    Attributes:
        weight_sum: The sum of the weights so far, squares of learning rates: a float64 tensor of
            shape (), on the GPU if all parameters are on one, else on the CPU.
        average: The average, which is what to evaluate: see `averaged`. At first it is the
            parameters, and of a leaf at rest (as under `Frozen`) it always is that leaf.
        z: What the inner optimizer moves: likewise.
        inner: The state of the inner optimizer.
        step: How many updates were made, if a hyperparameter or the learning rate within is a
            schedule: likewise a tensor; else `()`.
    """

    weight_sum: Tensor
    average: Tree
    z: Tree
    inner: InnerStateT
    step: Tree = ()


_BETA = Hyperparam("beta", FRACTION)
_DECAY = Hyperparam("weight_decay", AT_LEAST_ZERO)
_LR = Hyperparam("lr", AT_LEAST_ZERO)


@register_optimizer
@dataclass(frozen=True)
class ScheduleFree(Generic[InnerT_co]):
    r"""Take gradients between what the inner optimizer moves and its average.

    The parameters, at which the loss and its gradient are taken, are $y$. The state has $z$, which
    the inner optimizer moves by its step $U$ at learning rate $\gamma_t$, and the average $x$, to
    be evaluated: `averaged(state, params)` reads it. From $x_0 = z_0 = y_0$ on,

    $$ z_t = U(z_{t-1},\, \nabla f(y_{t-1})) - \gamma_t\,\lambda\,y_{t-1}, \qquad
       c_t = \frac{\gamma_t^2}{\sum_{i \le t} \gamma_i^2}, $$

    $$ x_t = x_{t-1} + c_t\,(z_t - x_{t-1}), \qquad y_t = z_t + \beta\,(x_t - z_t), $$

    with `weight_decay` for $\lambda$. From Defazio et al., *The Road Less Scheduled* (NeurIPS
    2024). It takes the place of a learning rate that falls, so let that be constant, after a
    warmup; and of momentum, so let the inner optimizer have none: `SGD(lr)`, or
    `Adam(lr, betas=(0.0, 0.999))`.

    The learning rate $\gamma_t$ is that of the inner optimizer. A warmup has little weight by its
    square; while it is 0, the average stays what it is. The weight decay here is at $y$, as in the
    paper. One of the inner optimizer is at $z$.

    The numbers are those of `optax.contrib.schedule_free`, but for this. Optax has the user give it
    the learning rate again; of a schedule it takes for the weights the value of the next update,
    and the largest so far. It hands $y$ to the inner optimizer as the parameters; here it is $z$,
    what that optimizer moves, so that one that keeps copies or looks at sizes, as `MasterWeights`
    and `ClipAdaptive` do, finds what it left. And optax computes $x$ from $y$ and $z$, which takes
    no memory, but $\beta > 0$, and loses digits; here it is kept.

    A parameter without a gradient stays as it is, with its $x$ and $z$. The parameters are made
    anew from $x$ and $z$ in each update: if you change them in between, that is lost. Of 16-bit
    parameters, both are in float32, and the inner optimizer works in float32.

    The order of wrappers matters. `Accumulate(ScheduleFree(SGD()), 8)` averages when $z$ moves,
    every eighth call; the other way round the same $z$ would count eight times over. Where groups
    have learning rates of their own, each is to have a `ScheduleFree`, inside the `Partition`.

    Args:
        inner: The optimizer that moves $z$, with one learning rate. If it has none, all weights are
            the same.
        beta: How near $y$ is to the average: at least 0 (not at all) and at most 1 (it is the
            average); a number, a 0-dim tensor, or a schedule, which is called with the count of
            updates made so far and returns one of the others.
        weight_decay: How much $z$ decays by $y$, times the learning rate within: at least 0;
            likewise.

    Raises:
        TypeError: If `inner` is no optimizer, or a hyperparameter is of the wrong type.
        ValueError: If one is out of range, NaN or infinite; or if there are several learning rates
            within, or none, but a weight decay.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.ScheduleFree(funcopt.SGD(lr=0.5), beta=0.5)
        >>> params = torch.tensor([1.0])
        >>> state = opt.init(params)
        >>> for _ in range(2):
        ...     params, state = opt.update(params, state, params)  # of half the square
        ...     print(params.item(), state.z.item(), funcopt.averaged(state, params).item())
        0.5 0.5 0.5
        0.3125 0.25 0.375
    """

    traits: ClassVar[Traits] = ELEMENTWISE

    inner: InnerT_co
    beta: Number | Schedule = 0.9
    weight_decay: Number | Schedule = 0.0

    @property
    def lr(self) -> Number | Schedule:
        """The learning rate of the inner optimizer."""
        lr: Number | Schedule = the_rate("ScheduleFree", self.inner)
        return lr

    @property
    def hyperparams(self) -> tuple[Hyperparam, ...]:
        """The numbers that it goes by."""
        return (_BETA, _DECAY, _LR) if own_rates(self.inner) else (_BETA, _DECAY)

    @property
    def _decays(self) -> bool:
        return not isinstance(self.weight_decay, float) or self.weight_decay != 0.0

    def __post_init__(self) -> None:
        """Check and normalize every hyperparameter."""
        check_is_optimizer("inner", self.inner)
        normalize_fields(self, (_BETA, _DECAY))
        if self._decays or own_rates(self.inner):
            the_rate("ScheduleFree", self.inner)

    def init(self: ScheduleFree[OptimizerLike[StateT]], params: Tree) -> ScheduleFreeState[StateT]:
        """Return the state before the first update: copies, and the inner state made for them."""
        average, leaves = copy_params(self, params, compute_dtype)
        z, _ = copy_params(self, params, compute_dtype)
        total = first_count(device_for_count(leaves))
        step = first_count_if_scheduled(self, total.device)
        return ScheduleFreeState(total, average, z, self.inner.init(z), step)

    def update(
        self: ScheduleFree[OptimizerLike[StateT]],
        grads: Tree,
        state: ScheduleFreeState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, ScheduleFreeState[StateT]]:
        """Return the new parameters, which are $y$, and the new state, in fresh memory."""
        z, average, numbers = self._gather(grads, state, params)
        gradients = z.gradients
        recorded = records(self, gradients, state, numbers)
        wide = widened(gradients, recorded)
        moved, inner = self.inner.update(wide.tree, state.inner, _moved_tree(z))
        new_z, structure = pytree.flatten(moved)
        with torch.set_grad_enabled(recorded):
            total, share = _weigh(state.weight_sum, numbers.get("lr", 1.0))
            given = _given(z)
            olds = [gradients.params[index] for index in given]
            zs = self._decayed([new_z[index] for index in given], olds, numbers)
            xs = tensors.lerp([average.leaves[index] for index in given], zs, share)
            ys = tensors.lerp(zs, xs, _known(numbers["beta"]))
            ys = [
                own if own.dtype is old.dtype else own.to(old.dtype)
                for own, old in zip(ys, olds, strict=True)
            ]
            new_z = _placed(zs, given, new_z)
            new_average = _placed(xs, given, average.leaves)
            new_params = _placed(ys, given, gradients.params)
            for index in gradients.resting:
                new_params[index] = own = gradients.params[index]
                new_z[index], new_average[index] = own.clone(), own.clone()
        keep_requiring(new_params, gradients.params)
        return pytree.unflatten(structure, new_params), ScheduleFreeState(
            fresh(total, state.weight_sum),
            average.paired.rebuild(new_average),
            z.paired.rebuild(new_z),
            inner,
            next_count(state.step),
        )

    def update_(
        self: ScheduleFree[OptimizerLike[StateT]],
        grads: Tree,
        state: ScheduleFreeState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, ScheduleFreeState[StateT]]:
        """Do the same as `update` in place, but for copies of 16-bit gradients in float32."""
        z, average, numbers = self._gather(grads, state, params)
        gradients = z.gradients
        paths = _average_paths(average.paired.structure)
        others = dict(zip(paths, pytree.flatten(state.average)[0], strict=True))
        z.check_wrapper_inplace(numbers, {**own_tensors(state, "weight_sum"), **others})
        check_params_inplace(gradients, state.inner)
        with torch.no_grad():
            wide = widened(gradients, recorded=False)
            self.inner.update_(wide.tree, state.inner, _moved_tree(z))
            total, share = _weigh(state.weight_sum, numbers.get("lr", 1.0))
            given = _given(z)
            olds, zs, xs = (
                [leaves[index] for index in given]
                for leaves in (gradients.params, z.leaves, average.leaves)
            )
            if self._decays:
                for own, new in zip(zs, self._decayed(zs, olds, numbers), strict=True):
                    write(own, new)
            tensors.lerp_(xs, zs, share)
            _write_between(olds, zs, xs, _known(numbers["beta"]))
            for index in gradients.resting:
                write(z.leaves[index], gradients.params[index])
                write(average.leaves[index], gradients.params[index])
            write_fields_and_count(state, weight_sum=fresh(total, state.weight_sum))
        return params, state

    def _gather(
        self, grads: Tree, state: ScheduleFreeState, params: Tree
    ) -> tuple[ShadowParams, ShadowParams, dict[str, Number]]:
        check_state(state, ScheduleFreeState)
        check_scalar("state.weight_sum", state.weight_sum)
        gradients = gather_gradients(self, grads, params)
        z = ShadowParams.gather(gradients, "state.z", state.z, compute_dtype)
        average = ShadowParams.gather(gradients, "state.average", state.average, compute_dtype)
        return z, average, numbers_of(self, state.step)

    def _decayed(
        self, zs: list[Tensor], params: Sequence[Tensor], numbers: dict[str, Number]
    ) -> list[Tensor]:
        """Return what the inner optimizer has moved, less the decay by the parameters."""
        if not self._decays:
            return zs
        decay = numbers["lr"] * numbers["weight_decay"]
        return [z - fit(decay, z) * param.to(z.dtype) for z, param in zip(zs, params, strict=True)]


# The paths of the leaves of an average, by its structure: to walk through a tree takes longer than
# to move small leaves.
_paths: dict[pytree.Structure, list[str]] = {}
_MOST_STRUCTURES = 256


def _average_paths(structure: pytree.Structure) -> list[str]:
    if transforms.compiling():
        return pytree.paths(structure, "state.average")
    found = _paths.get(structure)
    if found is None:
        if len(_paths) >= _MOST_STRUCTURES:
            _paths.clear()
        found = _paths[structure] = pytree.paths(structure, "state.average")
    return found


def _write_between(olds: list[Tensor], zs: list[Tensor], xs: list[Tensor], beta: Number) -> None:
    """Write into parameters what lies between two trees: by few calls, if all dtypes are alike."""
    alike = all(old.dtype is z.dtype for old, z in zip(olds, zs, strict=True))
    if olds and alike and tensors.use_foreach([*olds, *zs, *xs]):
        memory.copy_into(StepOutputs(olds, ()), StepInputs(zs, [], ()))
        tensors.lerp_(olds, xs, beta)
        return
    for old, new in zip(olds, tensors.lerp(zs, xs, beta), strict=True):
        write(old, new)


def _given(z: ShadowParams) -> list[int]:
    """Return which leaves have a gradient."""
    return [index for index, grad in enumerate(z.gradients.leaves) if grad is not None]


def _placed(news: Sequence[Tensor], indices: Sequence[int], olds: Sequence[Tensor]) -> list[Tensor]:
    """Return new leaves at their indices, between copies of the old ones."""
    found = dict(zip(indices, news, strict=True))
    return [found[i] if i in found else old.clone() for i, old in enumerate(olds)]


def _moved_tree(z: ShadowParams) -> Tree:
    """Return what the inner optimizer moves, beside the leaves at rest."""
    gradients = z.gradients
    leaves = gradients.with_resting(gradients.moving(z.leaves), gradients.params)
    return pytree.unflatten(gradients.structure, leaves)


def _known(number: Number) -> Number:
    """Return a number, as a Python number if it can be read."""
    value = known_value(number)
    return number if value is None else value


def _weigh(total: Tensor, lr: Number) -> tuple[Number, Number]:
    """Return the sum of all weights with that of this update, and its share of them."""
    before, rate = known_value(total), known_value(lr)
    if before is not None and rate is not None:
        after = before + rate**2
        return after, rate**2 / after if after > 0 else 0.0
    weight = (lr.to(total) if isinstance(lr, Tensor) else torch.full_like(total, lr)) ** 2
    sums = total + weight
    none = sums == 0
    return sums, choose(none, torch.zeros_like(sums), weight / sums.masked_fill(none, 1.0))
