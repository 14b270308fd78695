"""Local updates: every process trains by itself, and now and then they meet at their mean."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._core import pytree, transforms
from .._core.tensors import compute_dtype, write
from .._core.types import Optimizer, Traits, Tree
from .._engine.checks import check_optimizer, check_state
from .._engine.hyperparameters import check_flag, normalize
from .._engine.prepare import keep_requiring
from .._engine.registration import register_optimizer
from .._engine.rule import AT_LEAST_ZERO, BELOW_ONE, COUNT, Hyperparam
from ..wrappers.base import check_scalar, gather_gradients, gather_params, read
from ._checks import check_mesh, check_unrecorded, check_untransformed
from ._sync import Outer, Sync

__all__ = ["LocalUpdates", "LocalUpdatesState"]

ParamsT = TypeVar("ParamsT")


class LocalUpdatesState(NamedTuple):
    """The state of `LocalUpdates`.

    Attributes:
        steps_since_sync: How many updates were made since the processes met: a float64 tensor of
            shape () on the CPU.
        anchor: The parameters of the last meeting: a tree like the parameters, in float32 for
            16-bit ones. `()` where the parameters go to their mean, which needs none.
        momentum_buffer: The outer momentum, a tree like `anchor`; `()` if there is none.
        inner: The state of the inner optimizer, each process's own.
    """

    steps_since_sync: Tensor
    anchor: Tree
    momentum_buffer: Tree
    inner: Any


@register_optimizer
@dataclass(frozen=True)
class LocalUpdates:
    r"""Train on each process by itself, and average the parameters in every `every`-th update.

    The gradients are each process's own, and are not to be averaged: between two meetings nothing
    is sent at all. With the mean $\bar\theta$ of the parameters over the processes and the
    defaults, a meeting is $\theta \leftarrow \bar\theta$: post-local SGD (Lin et al., *Don't Use
    Large Mini-Batches, Use Local SGD*, ICLR 2020), with the numbers of
    `torch.distributed.optim.PostLocalSGDOptimizer`. With an outer learning rate or momentum, the
    way from the mean back to $\phi$, where the last meeting was, serves as the gradient of a step
    of SGD from there:

    $$ \Delta = \phi - \bar\theta, \qquad b \leftarrow \mu\,b + \Delta, \qquad
       \phi \leftarrow \phi - \eta\,(\Delta + \mu\,b), \qquad \theta \leftarrow \phi, $$

    where without `nesterov` the step is $\eta\,b$: DiLoCo (Douillard et al., *DiLoCo: Distributed
    Low-Communication Training of Language Models*, 2023), which takes `outer_lr=0.7` and
    `outer_momentum=0.9`, with an `AdamW` inside and hundreds of steps between meetings. The inner
    states stay apart, as there and in torch.

    At a meeting, all processes come to have the same parameters, to the bit. Start them from the
    same ones, too: where there is an anchor, what sets anchors apart stays.

    Parameters go to the network in flat buckets of 32 MiB by dtype, 16-bit ones as float32, in
    which they are averaged. That sums float32 where torch sums 16 bits.

    To train with averaged gradients first, as post-local SGD does, go on from the state:
    `local.init(params)._replace(inner=state)`.

    All processes must make the same number of calls. So what skips an update by what a process
    alone has seen belongs inside: `LocalUpdates(Clip(AdamW(), 1.0, nonfinite="skip"), 100, mesh)`.
    The other way round, the others would wait for one that skips a sync.

    Between meetings the processes differ. A checkpoint has one entry for each path, for which any
    of them may speak: save after a meeting, when only inner states differ, or give each process a
    path of its own, `to_state_dict({f"rank{rank}": {"params": params, "state": state}})`.

    Args:
        inner: The optimizer that each process trains with.
        every: How many updates lie between two meetings: a whole number of at least 1.
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
        >>> inner = funcopt.AdamW(lr=0.1, weight_decay=0.0)
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

    inner: Optimizer[Any]
    every: int
    mesh: DeviceMesh | None
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    nesterov: bool = True

    @property
    def traits(self) -> Traits:
        """Between two meetings each process goes its own way, by its own gradients."""
        local = self.mesh is not None
        return Traits(
            shardable=True,
            linear=True,
            sends=True,
            takes_local_gradients=local,
            decides_on_host=True,
        )

    def __post_init__(self) -> None:
        """Check and normalize every hyperparameter."""
        check_optimizer("inner", self.inner)
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

    def init(self, params: Tree) -> LocalUpdatesState:
        """Return the state before the first update. Nothing is sent.

        Args:
            params: The parameters, as for the inner optimizer.

        Raises:
            TypeError: If a leaf is not a dense floating-point or complex tensor.
            ValueError: If two leaves share their memory.

        Example:
            >>> import torch, funcopt
            >>> from funcopt.distributed import LocalUpdates
            >>> state = LocalUpdates(funcopt.AdamW(), every=5, mesh=None).init(torch.ones(2))
            >>> state.steps_since_sync, state.anchor, state.momentum_buffer
            (tensor(0., dtype=torch.float64), (), ())
        """
        leaves, structure, _ = gather_params(self, params)
        anchor: Tree = ()
        buffer: Tree = ()
        anchored, moving = self._kept
        if anchored:
            anchor = pytree.unflatten(structure, [_origin(leaf) for leaf in leaves])
        if moving:
            zeros = [torch.zeros_like(leaf, dtype=compute_dtype(leaf.dtype)) for leaf in leaves]
            buffer = pytree.unflatten(structure, zeros)
        count = torch.zeros((), dtype=torch.float64, device="cpu")
        return LocalUpdatesState(count, anchor, buffer, self.inner.init(params))

    def update(
        self, grads: Tree, state: LocalUpdatesState, params: ParamsT
    ) -> tuple[ParamsT, LocalUpdatesState]:
        """Return the new parameters and the new state, in fresh memory.

        Args:
            grads: The gradients of this process, as for the inner optimizer.
            state: The state that `init` or the last update returned.
            params: The parameters of this process.

        Returns:
            The pair `(new_params, new_state)`. When processes met, parameters are the same on each.

        Raises:
            RuntimeError: Under a transform of `torch.func` or a tracer, in the capture of a CUDA
                graph, or where the update would be recorded by autograd: no derivative goes through
                a sync.
            TypeError: As the inner optimizer.
            ValueError: As the inner optimizer.

        Example:
            >>> import torch, funcopt
            >>> from funcopt.distributed import LocalUpdates
            >>> inner = funcopt.AdamW(lr=0.1, weight_decay=0.0)
            >>> opt = LocalUpdates(inner, every=1, mesh=None, outer_lr=0.5)
            >>> opt.update(torch.ones(1), opt.init(torch.ones(1)), torch.ones(1))[0]
            tensor([0.9500])
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
        self, grads: Tree, state: LocalUpdatesState, params: ParamsT
    ) -> tuple[ParamsT, LocalUpdatesState]:
        """Do the same as `update`, written into `params` and `state`, which are returned.

        Args:
            grads: The gradients, as for `update`.
            state: The state, which is overwritten.
            params: The parameters, which are overwritten.

        Returns:
            The pair `(params, state)`: the trees that were given.

        Raises:
            RuntimeError: As `update`, or if anything has a history.
            TypeError: As `update`.
            ValueError: As `update`, and as the inner optimizer's `update_`.

        Example:
            >>> import torch, funcopt
            >>> from funcopt.distributed import LocalUpdates
            >>> opt = LocalUpdates(funcopt.AdamW(lr=0.1, weight_decay=0.0), every=5, mesh=None)
            >>> w = torch.ones(1)
            >>> state = opt.init(w)
            >>> _ = opt.update_(torch.ones(1), state, w)
            >>> w, state.steps_since_sync
            (tensor([0.9000]), tensor(1., dtype=torch.float64))
        """
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
                "state.steps_since_sync cannot be read, as it must to know whether processes meet: "
                "it is traced, or not on the CPU. Take the update outside of the tracer, and leave "
                "this count on the CPU."
            )
        return taken + 1 >= self.every


def _origin(leaf: Tensor) -> Tensor:
    return leaf.detach().to(compute_dtype(leaf.dtype), copy=True)


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
