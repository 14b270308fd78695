"""Adaptive clipping: the gradient of each unit held to a fraction of that unit's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, Unpack

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.inner import InnerStateT, InnerT_co, OptimizerLike
from .._core.tensors import compute_dtype, differentiable_norm, fit, is_narrow, vector_norm
from .._core.types import (
    AT_LEAST_ZERO,
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
from .._dtensor.shards import whole_of
from .._engine.checks import check_state
from .._engine.counts import next_count
from .._engine.hyperparameters import normalize_fields, numbers_of
from .._engine.registration import register_optimizer, state_class
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

# The least norm that a gradient is divided by, as in optax.
_LEAST = 1e-6


@state_class
class ClipAdaptiveState(NamedTuple, Generic[InnerStateT]):
    """The state of `ClipAdaptive`.

    Attributes:
        inner: The state of the inner optimizer.
        step: How many updates were made, if a hyperparameter is a schedule: a float64 tensor of
            shape (), on the GPU if all parameters are on one, else on the CPU; else `()`.
    """

    inner: InnerStateT
    step: Tree = ()


@register_optimizer
@dataclass(frozen=True)
class ClipAdaptive(Generic[InnerT_co]):
    r"""Hold the gradient of each unit to a fraction of the norm of its parameters, then update.

    A unit $i$ is one index of a leaf's first dimension: what leads to one output of a linear layer
    or a convolution. A leaf of one dimension or none (a bias, a gain) is a unit as a whole. With
    the gradient $g_i$ of a unit, its parameters $\theta_i$, and $\lambda$ for `clipping`,

    $$ g_i' = g_i \cdot \min\Big(1, \frac{\lambda \max(\lVert\theta_i\rVert, \epsilon)}
       {\max(\lVert g_i \rVert, 10^{-6})}\Big). $$

    The equation is that of Brock et al., *High-Performance Large-Scale Image Recognition Without
    Normalization* (2021), and the numbers are those of `optax.adaptive_grad_clip`, whose weights
    are laid out with the outputs last. Of leaves of three dimensions (with torch, those of a
    one-dimensional convolution) optax sums over the first alone, where this takes all but that of
    the outputs; and it takes a leaf with but one dimension longer than 1 for one unit. Norms of
    16-bit leaves are taken in float32. The norm of a complex leaf is that of its absolute values.

    What is infinite or NaN makes its own unit NaN, as in optax. The paper leaves the last linear
    layer unclipped: `Partition` can do so.

    Nothing is ever read back from a GPU. On the CPU, leaves of which no unit is clipped are not
    copied; others are, also by `update_`, since the caller's are left as they are.

    Args:
        inner: The optimizer that is given the clipped gradients.
        clipping: The largest ratio of the two norms: at least 0; a number, a 0-dim tensor, or a
            schedule, which is called with the count of updates made so far and returns one of the
            others.
        eps: What counts as the norm of smaller parameters, so that zeros can move: at least 0;
            likewise.

    Raises:
        TypeError: If `inner` is no optimizer, or a hyperparameter is of the wrong type.
        ValueError: If one is out of range, NaN or infinite. When it updates: if a DTensor is
            sharded through its units, of which each process would know but a part.

    Example:
        >>> import torch, funcopt
        >>> opt = funcopt.ClipAdaptive(funcopt.SGD(lr=1.0), clipping=0.1)
        >>> weight = torch.tensor([[3.0, 4.0], [30.0, 40.0]])  # units of norms 5 and 50
        >>> grads = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> weight, state = opt.update(grads, opt.init(weight), weight)
        >>> weight
        tensor([[ 3.0000,  3.5000],
                [30.0000, 39.0000]])
    """

    traits: ClassVar[Traits] = Traits(leafwise=True, shardable=True)

    hyperparams: ClassVar[tuple[Hyperparam, ...]] = (
        Hyperparam("clipping", AT_LEAST_ZERO),
        Hyperparam("eps", AT_LEAST_ZERO),
    )

    inner: InnerT_co
    clipping: Number | Schedule = 0.01
    eps: Number | Schedule = 1e-3

    def __post_init__(self) -> None:
        """Check and normalize the hyperparameters."""
        check_is_optimizer("inner", self.inner)
        normalize_fields(self, self.hyperparams)

    def init(self: ClipAdaptive[OptimizerLike[StateT]], params: Tree) -> ClipAdaptiveState[StateT]:
        """Return the state before the first update: the inner state."""
        inner = self.inner.init(params)
        return ClipAdaptiveState(inner, first_count_if_scheduled(self, device_of_tensors(params)))

    def update(
        self: ClipAdaptive[OptimizerLike[StateT]],
        grads: Tree,
        state: ClipAdaptiveState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, ClipAdaptiveState[StateT]]:
        """Return the new parameters and the new state, in fresh memory."""
        gradients, numbers = self._gather(grads, state, params)
        with torch.set_grad_enabled(records(self, gradients, state, numbers)):
            clipped = _clip(gradients, **numbers)
        new_params, inner = self.inner.update(clipped, state.inner, params)
        return new_params, ClipAdaptiveState(inner, next_count(state.step))

    def update_(
        self: ClipAdaptive[OptimizerLike[StateT]],
        grads: Tree,
        state: ClipAdaptiveState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, ClipAdaptiveState[StateT]]:
        """Do the same in place, but for the clipped gradients, which are copies."""
        gradients, numbers = self._gather(grads, state, params)
        check_wrapper_inplace(numbers, own_tensors(state), gradients)
        with torch.no_grad():
            clipped = _clip(gradients, **numbers)
        self.inner.update_(clipped, state.inner, params)
        write_fields_and_count(state)
        return params, state

    def _gather(
        self, grads: Tree, state: ClipAdaptiveState, params: Tree
    ) -> tuple[Gradients, dict[str, Number]]:
        check_state(state, ClipAdaptiveState)
        numbers = numbers_of(self, state.step)
        gradients = gather_gradients(self, grads, params)
        _check_units_are_whole(gradients)
        return gradients, numbers


def _clip(gradients: Gradients, clipping: Number, eps: Number) -> Tree:
    grads = gradients.tensors
    pairs = zip(gradients.leaves, gradients.params, strict=True)
    params = [param for grad, param in pairs if grad is not None]
    # The norms of all leaves of a dtype and device are put together: a few operators do for them.
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, grad in enumerate(grads):
        kinds.setdefault((grad.device, compute_dtype(grad.dtype)), []).append(index)
    clipped = list(grads)
    for indices in kinds.values():
        own = [grads[i] for i in indices], [params[i] for i in indices]
        for index, scale in zip(indices, _scales(*own, clipping, eps), strict=True):
            if scale is not None:
                clipped[index] = _scaled(grads[index], scale)
    return gradients.replace(clipped).tree


def _scales(
    grads: list[Tensor], params: list[Tensor], clipping: Number, eps: Number
) -> list[Tensor | None]:
    """Return what the units of each leaf are multiplied by, None where all of it is known as 1."""
    norms = _norms(grads)
    sizes = [norm.numel() for norm in norms]
    norm = torch.cat([norm.reshape(-1) for norm in norms])
    own = torch.cat([norm.reshape(-1) for norm in _norms(params)])
    ratio, floor = (fit(n, norm) if isinstance(n, Tensor) else n for n in (clipping, eps))
    most = ratio * own.clamp(min=floor)
    scale = torch.where(norm < most, 1.0, most / norm.clamp(min=_LEAST))
    touched = _touched(scale, sizes)
    return [
        part.reshape(norm.shape) if touched is None or index in touched else None
        for index, (part, norm) in enumerate(zip(torch.split(scale, sizes), norms, strict=True))
    ]


def _check_units_are_whole(gradients: Gradients) -> None:
    """Refuse sharded leaves if a process has only a part of a unit."""
    for index, param in enumerate(gradients.params):
        if index in gradients.resting:
            continue
        whole: Any = whole_of(param)
        for placement in [] if whole is param else whole.placements:
            if not placement.is_replicate() and not (whole.ndim > 1 and placement.is_shard(0)):
                raise ValueError(
                    f"{pytree.path(gradients.structure, 'params', index)} is a DTensor with "
                    f"{whole.placements}, which cuts through its units: their norms would be those "
                    f"of parts. Shard leaves of two or more dimensions along the first, and leave "
                    f"the others to another optimizer, by a Partition."
                )


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the norms of the units of each tensor, so that they broadcast against it."""
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    norms = []
    for tensor in tensors:
        dims = tuple(range(1, tensor.ndim)) or None
        wide = tensor.to(compute_dtype(tensor.dtype))
        if recorded or transforms.transformed():
            norms.append(differentiable_norm(wide, 2.0, dims))
        else:
            norms.append(vector_norm(wide, 2.0, dims, keepdim=True))
    return norms


def _touched(scale: Tensor, sizes: list[int]) -> set[int] | None:
    """Return which leaves have a unit that is scaled, if that can be read without waiting."""
    plain = transforms.readable() and transforms.all_plain([scale]) and scale.is_cpu
    if not plain or transforms.transformed() or transforms.has_derivative(scale):
        return None
    ends = torch.tensor(sizes, dtype=torch.int64, device="cpu").cumsum(0)
    return set(torch.bucketize((scale != 1).nonzero().reshape(-1), ends, right=True).tolist())


def _scaled(grad: Tensor, scale: Tensor) -> Tensor:
    if not is_narrow(grad.dtype):
        return grad * scale
    return (grad.to(scale.dtype) * scale).to(grad.dtype)
