"""ZeRO-1: parameters on every process, the state and the arithmetic shared out among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._core import pytree, transforms
from .._core.inner import InnerStateT, InnerT_co, OptimizerLike
from .._core.tensors import write
from .._core.types import (
    Extras,
    ParamsT,
    StateT,
    Traits,
    Tree,
    check_is_optimizer,
    traits_of,
)
from .._dtensor.shards import wholes_in, work_on
from .._engine.checks import check_state
from .._engine.hyperparameters import check_choice
from .._engine.prepare import flatten_params, keep_requiring
from .._engine.registration import register_optimizer, state_class
from ..wrappers._shared import gather_gradients
from ._checks import (
    check_gradients,
    check_mesh,
    check_packable,
    check_targets,
    check_unrecorded,
    check_untransformed,
    check_whole,
    check_whole_number,
)
from ._leaves import OwnLeaves
from ._shards import Sharding, join
from ._step import Step


@state_class
class Zero1State(NamedTuple, Generic[InnerStateT]):
    """The state of `Zero1`.

    Attributes:
        inner: The state of the inner optimizer, as its `init` makes it for a dict of buckets:
            `{"bucket 0": ..., ...}`. Each bucket is a DTensor of one dimension, of which every
            process holds its share; without a mesh, a tensor.
    """

    inner: InnerStateT


@register_optimizer
@dataclass(frozen=True)
class Zero1(Generic[InnerT_co]):
    r"""Share the state and the arithmetic of an optimizer out among processes, as in ZeRO-1.

    Each of $W$ processes has all parameters, and keeps $1/W$ of the state. In an update it gets the
    mean gradient of its share (a reduce-scatter) and moves its share of the parameters; then all
    put their shares together (an all-gather). The new parameters are the same on every process,
    and equal to what the inner optimizer makes of the mean gradients in one process. An update
    that autograd would record is refused: no derivative goes through it.

    The leaves lie side by side, in the order of their paths, in flat buckets of one dtype, complex
    ones as pairs of real numbers. Each bucket takes two collectives; together they send
    $2(W-1)/W$ of the parameters' bytes, half of it where gradients are averaged already. While one
    bucket is sent, the next is packed or the last one moved. The new parameters of `update` share
    the storages of their buckets: clone one to keep it alone, or before `resize_`.

    An inner optimizer that looks at whole leaves, such as `Muon`, is given some of them in each
    process, as a dict: then leaves are shared out, as many elements to each process as to the
    others, or nearly so. Zeros that fill up the shares are sent along, the state is made for so
    many processes (`gather_state` and `scatter_state` move it to another number), and what looks
    at all leaves at once, such as `Clip`, must be outside.

    Any other inner optimizer sees a dict of buckets in place of the tree. One that is
    `elementwise`, with all that are within it, gets bucket after bucket; any other gets all buckets
    at once, as DTensors, so that `Zero1(Clip(opt, 1.0))` clips by the norm over all processes. What
    tells leaves apart must be outside: `Partition({"decay": Zero1(...), ...})`. What clips or skips
    must be inside: outside, each process would decide by its own gradients. To clip or skip by
    several groups, or around what sees whole leaves, average first: see `average_gradients`.

    All processes must call `update` alike. If one of them finds a fault, it alone raises, and the
    others wait for it: let whatever started them end them together, as torchrun does.

    From Rajbhandari et al., *ZeRO: Memory Optimizations Toward Training Trillion Parameter Models*
    (SC 2020). `torch.distributed.optim.ZeroRedundancyOptimizer` shares out whole parameters, and
    leaves the averaging of gradients to `DistributedDataParallel`.

    Args:
        inner: The optimizer that moves the buckets.
        mesh: The processes: a `DeviceMesh` of one dimension. Of a larger one take the dimension
            along which data differ: `mesh["data"]`. None: this process alone, with no traffic.
        bucket_bytes: How many bytes of parameters fill a bucket: at least 1. A bucket takes whole
            leaves, and is closed once it holds so many.
        gradients: `"local"`: each process gives the gradients of its own data, which are averaged
            here. `"averaged"`: all give the same, as from `DistributedDataParallel` or
            `average_gradients`; then gradients are not sent.

    Raises:
        TypeError: If `inner` is no optimizer, or an argument is of the wrong type.
        ValueError: If `inner` tells leaves apart, or sends something itself, or an argument is out
            of range.

    Example:
        >>> import torch, funcopt
        >>> from funcopt.distributed import Zero1
        >>> opt = Zero1(funcopt.SGD(lr=0.1, momentum=0.9), mesh=None)
        >>> params = {"w": torch.tensor([1.0, 2.0]), "b": torch.zeros(1)}
        >>> state = opt.init(params)
        >>> grads = {"w": torch.tensor([0.5, -0.5]), "b": torch.ones(1)}
        >>> params, state = opt.update(grads, state, params)
        >>> params
        {'w': tensor([0.9500, 2.0500]), 'b': tensor([-0.1000])}
        >>> state.inner.momentum_buffer
        {'bucket 0': tensor([ 1.0000,  0.5000, -0.5000])}
    """

    inner: InnerT_co
    mesh: DeviceMesh | None
    bucket_bytes: int = 25 * 2**20
    gradients: Literal["local", "averaged"] = "local"

    @property
    def traits(self) -> Traits:
        """Buckets lie in pieces on the processes, and gradients may be averaged here."""
        local = self.gradients == "local" and self.mesh is not None
        return Traits(shardable=True, linear=True, sends=True, takes_local_gradients=local)

    def __post_init__(self) -> None:
        check_is_optimizer("inner", self.inner)
        check_packable(self.inner)
        check_mesh(self.mesh)
        check_whole_number("bucket_bytes", self.bucket_bytes)
        check_choice("gradients", self.gradients, ("local", "averaged"))

    def init(self: Zero1[OptimizerLike[StateT]], params: Tree) -> Zero1State[StateT]:
        """Return the state before the first update, of which this process holds its share.

        Raises:
            RuntimeError: Under a transform of `torch.func`.
            TypeError: If a parameter is sharded.
            ValueError: If one is not where the mesh is.
        """
        check_untransformed(type(self).__name__, self, params)
        leaves, structure = self._leaves(params)
        sharding = self.sharding(leaves, structure)
        with torch.no_grad():
            shares = sharding.parts(leaves)
            if self.by_leaf:
                own = OwnLeaves(sharding, leaves, structure)
                inner = own.shares_of_state(self.inner.init(own.of(shares)))
            else:
                inner = self.inner.init(shares)
            return Zero1State(sharding.distributed(inner))

    def update(
        self: Zero1[OptimizerLike[StateT]],
        grads: Tree,
        state: Zero1State[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, Zero1State[StateT]]:
        """Return the new parameters, the same on every process, and the new state.

        Raises:
            RuntimeError: Under a transform of `torch.func`, or if the state, a hyperparameter or a
                gradient asks for a derivative.
            TypeError: If a parameter or a gradient is sharded.
            ValueError: If a gradient is None, or the state was made for other buckets.
        """
        if transforms.compiling():
            return transforms.uncompiled(self.update, grads, state, params)
        step = self._gather(grads, state, params)
        news, inner = work_on(None, self._move, step)
        keep_requiring(news, step.leaves)
        return pytree.unflatten(step.structure, news), Zero1State(inner)

    def update_(
        self: Zero1[OptimizerLike[StateT]],
        grads: Tree,
        state: Zero1State[StateT],
        params: ParamsT,
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, Zero1State[StateT]]:
        """Do the same as `update` in place."""
        if transforms.compiling():
            return transforms.uncompiled(self.update_, grads, state, params)
        step = self._gather(grads, state, params)
        check_targets(step.leaves, step.grads, step.structure)
        work_on(None, self._move_, step)
        return params, state

    @torch.no_grad()
    def _move(self, step: Step) -> tuple[list[Tensor], Tree]:
        """Return the new parameters, and the new inner state."""
        news, states = list(step.leaves), list[Tree]()
        for bucket, flat in step.move(self.inner.update, states):
            for index, leaf in step.moved(bucket, flat):
                news[index] = leaf
        return news, step.sharding.distributed(join(states))

    @torch.no_grad()
    def _move_(self, step: Step) -> None:
        """Write them into the old ones."""
        for bucket, flat in step.move(self.inner.update_, [], writing=True):
            for index, leaf in step.moved(bucket, flat):
                write(step.leaves[index], leaf)

    @property
    def by_leaf(self) -> bool:
        """Whether the inner optimizer has to see whole leaves."""
        return not traits_of(self.inner).packable

    def sharding(self, leaves: list[Tensor], structure: pytree.Structure) -> Sharding:
        """Return how these leaves are shared out."""
        own = leaves, structure, self.bucket_bytes, self.mesh
        return Sharding.of(*own, by_leaf=self.by_leaf)

    def _leaves(self, params: Tree) -> tuple[list[Tensor], pytree.Structure]:
        leaves, structure = flatten_params(params)
        check_whole(leaves, structure, self.mesh, self.inner)
        return leaves, structure

    def _gather(self, grads: Tree, state: Zero1State, params: Tree) -> Step:
        check_state(state, Zero1State)
        check_untransformed(type(self).__name__, self, grads, state, params)
        leaves, structure = self._leaves(params)
        gradients = gather_gradients(self, grads, params)
        if gradients.resting:  # all of them are: zeros fill the buckets, and nobody looks at them
            zeros = pytree.Paired(list(map(torch.zeros_like, leaves)), structure, None)
            gradients = gradients._replace(paired=zeros)
        check_gradients(gradients.leaves, structure)
        check_unrecorded(self, gradients, state)
        sharding = self.sharding(leaves, structure)
        # An optimizer around this one may have taken them apart, for DTensors that lie elsewhere.
        inner = wholes_in(state.inner)
        with torch.no_grad():
            local = sharding.local(inner, "state.inner")
        return Step(
            sharding,
            leaves,
            structure,
            gradients.tensors,
            inner,
            local,
            averaged=self.gradients == "averaged",
            by_bucket=traits_of(self.inner).elementwise,
            by_leaf=self.by_leaf,
            resting=gradients.resting,
        )
