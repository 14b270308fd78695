"""Local updates: each process trains by itself, and now and then they average parameters."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._core import pytree, transforms
from .._core.inner import InnerStateT, InnerT_co, OptimizerLike
from .._core.tensors import compute_dtype, write
from .._core.types import (
    AT_LEAST_ZERO,
    BELOW_ONE,
    COUNT,
    Extras,
    Hyperparam,
    ParamsT,
    StateT,
    Traits,
    Tree,
    check_is_optimizer,
)
from .._engine.checks import check_state
from .._engine.hyperparameters import check_flag, normalize
from .._engine.prepare import keep_requiring
from .._engine.registration import register_optimizer, state_class
from ..wrappers._shared import check_scalar, gather_gradients, gather_params, read
from ._checks import check_mesh, check_unrecorded, check_untransformed
from ._sync import Outer, Sync


@state_class
class LocalUpdatesState(NamedTuple, Generic[InnerStateT]):
    """The state of `LocalUpdates`.

    Attributes:
        steps_since_sync: How many updates were made since the last sync: a float64 tensor of shape
            () on the CPU.
        anchor: The parameters of the last sync: a tree like the parameters, in float32 for 16-bit
            ones. `()` where the parameters go to their mean, which needs none.
        momentum_buffer: The outer momentum, a tree like `anchor`; `()` if there is none.
        inner: The state of the inner optimizer, each process's own.
    """

    steps_since_sync: Tensor
    anchor: Tree
    momentum_buffer: Tree
    inner: InnerStateT


@register_optimizer
@dataclass(frozen=True)
class LocalUpdates(Generic[InnerT_co]):
    r"""Train on each process by itself, and average the parameters in every `every`-th update.

    Each process gives the gradients of its own data, not averaged; between two syncs nothing is
    sent. By default a sync sets the parameters to their mean over the processes,
    $\theta \leftarrow \bar\theta$: post-local SGD (Lin et al., *Don't Use Large Mini-Batches, Use
    Local SGD*, ICLR 2020), with the numbers of `torch.distributed.optim.PostLocalSGDOptimizer`.
    With an outer learning rate or momentum, a sync is a step of SGD from the parameters of the last
    sync, $\phi$, with the way from the mean back to them as its gradient:

    $$ \Delta = \phi - \bar\theta, \qquad b \leftarrow \mu\,b + \Delta, \qquad
       \phi \leftarrow \phi - \eta\,(\Delta + \mu\,b), \qquad \theta \leftarrow \phi, $$

    where without `nesterov` the step is $\eta\,b$: DiLoCo (Douillard et al., *DiLoCo: Distributed
    Low-Communication Training of Language Models*, 2023), which takes `outer_lr=0.7`,
    `outer_momentum=0.9` and hundreds of steps between syncs. The inner states are not averaged, as
    there and in torch.

    After a sync all processes have the same parameters, to the bit. Start them from the same ones,
    too: with an anchor, a difference at the start stays.

    Parameters are sent in flat buckets of 32 MiB by dtype, 16-bit ones as float32, in which they
    are averaged, where torch sums 16 bits.

    To train with averaged gradients first, as post-local SGD does, go on from the state:
    `local.init(params)._replace(inner=state)`.

    All processes must make the same number of calls. So what skips an update by the gradients of
    one process belongs inside: `LocalUpdates(Clip(opt, 1.0, nonfinite="skip"), 100, mesh)`.
    Outside, the others would wait for one that skips a sync.

    Between syncs the processes differ. A checkpoint has one entry for each path, which any of them
    may write: save after a sync, when only inner states differ, or give each process a path of its
    own, `to_state_dict({f"rank{rank}": {"params": params, "state": state}})`.

    Args:
        inner: The optimizer that each process trains with.
        every: How many updates lie between two syncs: a whole number of at least 1.
        mesh: The processes, a `DeviceMesh` of one dimension, such as `mesh["dp"]` of one with more;
            None for one process alone.
        outer_lr: The outer learning rate, $\eta$: at least 0. At 1 and without momentum, parameters
            go to their mean.
        outer_momentum: The outer momentum, $\mu$: at least 0 and below 1.
        nesterov: Whether that is Nesterov's.

    Raises:
        TypeError: If `inner` is no optimizer, `mesh` no mesh, or a number of the wrong type.
        ValueError: If a number is out of range, or `mesh` has more than one dimension.

    Example:
        >>> import torch, funcopt
        >>> from funcopt.distributed import LocalUpdates
        >>> inner = funcopt.SGD(lr=0.1)
        >>> opt = LocalUpdates(inner, every=2, mesh=None, outer_lr=0.7, outer_momentum=0.9)
        >>> params = {"w": torch.ones(2)}
        >>> state = opt.init(params)
        >>> for _ in range(2):
        ...     params, state = opt.update({"w": torch.ones(2)}, state, params)
        ...     print(params, state.momentum_buffer)
        {'w': tensor([0.9000, 0.9000])} {'w': tensor([0., 0.])}
        {'w': tensor([0.7340, 0.7340])} {'w': tensor([0.2000, 0.2000])}
    """

    hyperparams: ClassVar[tuple[Hyperparam, ...]] = (
        Hyperparam("every", COUNT),
        Hyperparam("outer_lr", AT_LEAST_ZERO),
        Hyperparam("outer_momentum", BELOW_ONE),
    )

    inner: InnerT_co
    every: int
    mesh: DeviceMesh | None
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    nesterov: bool = True

    @property
    def traits(self) -> Traits:
        """Between two syncs each process trains by its own gradients."""
        local = self.mesh is not None
        return Traits(
            shardable=True,
            linear=True,
            sends=True,
            takes_local_gradients=local,
            decides_on_host=True,
        )

    def __post_init__(self) -> None:
        check_is_optimizer("inner", self.inner)
        for own in self.hyperparams:
            name, value = own.name, own.of(self)
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                raise TypeError(
                    f"{name}={value!r}: must be a number, the same on every process. It decides "
                    f"what is sent and what the state holds."
                )
            object.__setattr__(self, name, normalize(own, value))
        object.__setattr__(self, "every", int(self.every))
        check_flag("nesterov", self.nesterov)
        check_mesh(self.mesh)

    def init(self: LocalUpdates[OptimizerLike[StateT]], params: Tree) -> LocalUpdatesState[StateT]:
        """Return the state before the first update. Nothing is sent."""
        leaves, structure, _ = gather_params(self, params)
        anchor: Tree = ()
        buffer: Tree = ()
        anchored, moving = self._kept
        if anchored:
            copies = [leaf.detach().to(compute_dtype(leaf.dtype), copy=True) for leaf in leaves]
            anchor = pytree.unflatten(structure, copies)
        if moving:
            zeros = [torch.zeros_like(leaf, dtype=compute_dtype(leaf.dtype)) for leaf in leaves]
            buffer = pytree.unflatten(structure, zeros)
        count = torch.zeros((), dtype=torch.float64, device="cpu")
        return LocalUpdatesState(count, anchor, buffer, self.inner.init(params))

    def update(
        self: LocalUpdates[OptimizerLike[StateT]],
        grads: Tree,
        state: LocalUpdatesState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, LocalUpdatesState[StateT]]:
        """Return this process's new parameters, the same on all after a sync, and the new state.

        Raises:
            RuntimeError: Under a transform of `torch.func` or a tracer, in the capture of a CUDA
                graph, or if autograd would record it: no derivative goes through a sync.
        """
        if transforms.compiling():
            return transforms.uncompiled(self.update, grads, state, params)
        sync = self._gather(grads, state, params)
        due = self._is_due(state.steps_since_sync)
        new_params, inner = self.inner.update(grads, state.inner, params)
        sync = sync.copied()
        if due:
            leaves, structure = pytree.flatten(new_params)
            own = _fresh(leaves, sync.gradients.params)
            sync.run_(own, self.mesh, self._outer)
            new_params = pytree.unflatten(structure, own)
        count = _next(due, state.steps_since_sync)
        return new_params, LocalUpdatesState(count, *sync.trees, inner)

    def update_(
        self: LocalUpdates[OptimizerLike[StateT]],
        grads: Tree,
        state: LocalUpdatesState[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, LocalUpdatesState[StateT]]:
        """Do the same as `update` in place."""
        if transforms.compiling():
            return transforms.uncompiled(self.update_, grads, state, params)
        sync = self._gather(grads, state, params)
        sync.check_inplace(state.steps_since_sync)
        due = self._is_due(state.steps_since_sync)
        self.inner.update_(grads, state.inner, params)
        if due:
            sync.run_(sync.gradients.params, self.mesh, self._outer)
        write(state.steps_since_sync, _next(due, state.steps_since_sync))
        return params, state

    @property
    def _kept(self) -> tuple[bool, bool]:
        """Whether the state holds an anchor, and whether a momentum."""
        return self.outer_lr != 1.0 or self.outer_momentum != 0.0, self.outer_momentum != 0.0

    @property
    def _outer(self) -> Outer:
        return Outer(self.outer_lr, self.outer_momentum, self.nesterov)

    def _gather(self, grads: Tree, state: LocalUpdatesState, params: Tree) -> Sync:
        check_state(state, LocalUpdatesState)
        check_scalar("state.steps_since_sync", state.steps_since_sync)
        check_untransformed(type(self).__name__, self, grads, state, params)
        gradients = gather_gradients(self, grads, params)
        check_unrecorded(self, gradients, state)
        anchored, moving = self._kept
        return Sync.gather(gradients, state.anchor, state.momentum_buffer, anchored, moving)

    def _is_due(self, count: Tensor) -> bool:
        taken = read(count)
        if taken is None:
            raise RuntimeError(
                "state.steps_since_sync cannot be read, as it must to know whether a sync is due: "
                "it is traced, or not on the CPU. Take the update outside of the tracer, and leave "
                "this count on the CPU."
            )
        return taken + 1 >= self.every


def _next(due: bool, count: Tensor) -> Tensor:
    """Return the count after an update."""
    return torch.zeros_like(count) if due else count.detach() + 1


def _fresh(leaves: Sequence[Tensor], olds: Sequence[Tensor]) -> list[Tensor]:
    """Return the leaves, with copies of those that are just the old: frozen ones are."""
    given = set(map(id, olds))
    with torch.no_grad():
        own = [leaf.clone() if id(leaf) in given else leaf for leaf in leaves]
    keep_requiring(own, leaves)
    return own
