"""ZeRO-1: parameters on every process, the state and the arithmetic shared out among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._core import pytree, transforms
from .._core.tensors import write
from .._core.types import Optimizer, Traits, Tree, traits_of
from .._dtensor.shards import wholes_in, work_on
from .._engine.checks import check_optimizer, check_state
from .._engine.hyperparameters import check_choice
from .._engine.prepare import flatten_params, keep_requiring
from .._engine.registration import register_optimizer
from ..wrappers.base import gather_gradients
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
from ._shards import Sharding, join
from ._step import Step

__all__ = ["Zero1", "Zero1State"]

ParamsT = TypeVar("ParamsT")

_GRADIENTS = ("local", "averaged")


class Zero1State(NamedTuple):
    """The state of `Zero1`.

    Attributes:
        inner: The state of the inner optimizer, as its `init` makes it for a dict of buckets:
            `{"bucket 0": ..., ...}`. Each bucket is a DTensor of one dimension, of which every
            process holds its share; without a mesh, a tensor.
    """

    inner: Any


@register_optimizer
@dataclass(frozen=True)
class Zero1:
    r"""Share the state and the arithmetic of an optimizer out among processes, as in ZeRO-1.

    Every one of $W$ processes has all parameters, and keeps $1/W$ of the state. In an update each
    gets the mean gradient of its share (a reduce-scatter), moves its share of the parameters, and
    all put theirs together (an all-gather): the new parameters are the same everywhere, and those
    that the inner optimizer would make of the mean gradients in one process. Nothing is
    differentiated through it: an update that autograd would record is refused.

    The leaves are laid side by side, in the order of their paths, in flat buckets of one dtype,
    complex ones as pairs of real numbers. What is sent are buckets, two collectives for each, and
    $2(W-1)/W$ of the parameters' bytes in all, half of it where gradients are averaged already.
    While one bucket is under way the next is being packed or the last one moved; the whole tree is
    at no time in memory twice, but for the new parameters of `update`. Those share the storages of
    their buckets, each its own part: clone one to keep it alone, or before it grows by `resize_`.

    The inner optimizer sees a dict of buckets in place of the tree. `AdamW`, `Frozen`, and
    `ClipValue`, `Ema` and `Lookahead` around one are given bucket after bucket; any other is given
    all at once, as DTensors, so that `Zero1(Clip(AdamW()))` clips by the norm over all processes.
    What tells leaves from each other must be outside: `Partition({"decay": Zero1(...), ...})`. A
    wrapper that looks at values, as `Clip` or `SkipNonfinite`, must be inside, unless gradients are
    averaged before: each process would see other ones, and one might go on where another waits.

    From Rajbhandari et al., *ZeRO: Memory Optimizations Toward Training Trillion Parameter Models*
    (SC 2020); `torch.distributed.optim.ZeroRedundancyOptimizer` shares out whole parameters, and
    leaves gradients to be averaged by `DistributedDataParallel`.

    Args:
        inner: The optimizer that moves the buckets.
        mesh: The processes: a `DeviceMesh` of one dimension. Of a larger one take the dimension
            along which data differ: `mesh["data"]`. None: this process alone, with no traffic.
        bucket_bytes: How many bytes of parameters fill a bucket: at least 1. A bucket takes whole
            leaves, and is closed once it holds so many.
        gradients: What gradients come in. `"local"`: each process has its own, of its own data,
            which are averaged here. `"averaged"`: all have the same, as from
            `DistributedDataParallel`; then they are not sent at all.

    Raises:
        TypeError: If `inner` is no optimizer, or an argument is of the wrong type.
        ValueError: If `inner` tells leaves from each other, or sends something itself, or an
            argument is out of range.

    Example:
        >>> import torch, funcopt
        >>> from funcopt.distributed import Zero1
        >>> opt = Zero1(funcopt.AdamW(lr=0.1), mesh=None)
        >>> params = {"w": torch.tensor([1.0, 2.0]), "b": torch.zeros(1)}
        >>> state = opt.init(params)
        >>> grads = {"w": torch.tensor([0.5, -0.5]), "b": torch.ones(1)}
        >>> params, state = opt.update(grads, state, params)
        >>> params
        {'w': tensor([0.8990, 2.0980]), 'b': tensor([-0.1000])}
        >>> state.inner.exp_avg
        {'bucket 0': tensor([ 0.1000,  0.0500, -0.0500])}
    """

    inner: Optimizer[Any]
    mesh: DeviceMesh | None
    bucket_bytes: int = 25 * 2**20
    gradients: str = "local"

    @property
    def traits(self) -> Traits:
        """Buckets lie in pieces on the processes, and gradients may be averaged here."""
        local = self.gradients == "local" and self.mesh is not None
        return Traits(shardable=True, linear=True, sends=True, takes_local_gradients=local)

    def __post_init__(self) -> None:
        """Check every argument."""
        check_optimizer("inner", self.inner)
        check_packable(self.inner)
        check_mesh(self.mesh)
        check_whole_number("bucket_bytes", self.bucket_bytes)
        check_choice("gradients", self.gradients, _GRADIENTS)

    def init(self, params: Tree) -> Zero1State:
        """Return the state before the first update, of which this process holds its share.

        Args:
            params: The parameters, the same on every process: a tree of plain tensors.

        Raises:
            RuntimeError: Under a transform of `torch.func`.
            TypeError: If a leaf is not a dense floating-point or complex tensor, or is sharded.
            ValueError: If two leaves share their memory, or one is not where the mesh is.

        Example:
            >>> import torch, funcopt
            >>> from funcopt.distributed import Zero1
            >>> Zero1(funcopt.AdamW(), mesh=None).init([torch.ones(2)]).inner.exp_avg
            {'bucket 0': tensor([0., 0.])}
        """
        check_untransformed(type(self).__name__, self, params)
        leaves, structure = self._leaves(params)
        sharding = Sharding.of(leaves, structure, self.bucket_bytes, self.mesh)
        with torch.no_grad():
            return Zero1State(sharding.distributed(self.inner.init(sharding.parts(leaves))))

    def update(self, grads: Tree, state: Zero1State, params: ParamsT) -> tuple[ParamsT, Zero1State]:
        """Return the new parameters and the new state, in fresh memory.

        All processes must call it alike. If one of them finds a fault, it alone raises, and the
        others wait for it: let whatever started them end them together, as torchrun does.

        Args:
            grads: The gradients: a tree with the keys of `params`, each like its parameter in
                shape, dtype and device. None is refused.
            state: The state that `init` or the last update returned.
            params: The parameters, the same on every process.

        Returns:
            The pair `(new_params, new_state)`.

        Raises:
            RuntimeError: Under a transform of `torch.func`, or where the update would be recorded:
                if the state, a hyperparameter or a gradient asks for a derivative.
            TypeError: As the inner optimizer, and if a leaf is sharded.
            ValueError: As the inner optimizer, if a gradient is None, or if the state was made for
                other buckets.

        Example:
            >>> import torch, funcopt
            >>> from funcopt.distributed import Zero1
            >>> opt = Zero1(funcopt.AdamW(lr=0.1), mesh=None)
            >>> w = torch.ones(2)
            >>> opt.update(torch.tensor([1.0, -1.0]), opt.init(w), w)[0]
            tensor([0.8990, 1.0990])
        """
        if transforms.compiling():
            return transforms.uncompiled(self.update, grads, state, params)
        step = self._gather(grads, state, params)
        news, inner = work_on(None, self._move, step)
        keep_requiring(news, step.leaves)
        return pytree.unflatten(step.structure, news), Zero1State(inner)

    def update_(
        self, grads: Tree, state: Zero1State, params: ParamsT
    ) -> tuple[ParamsT, Zero1State]:
        """Do the same as `update`, written into `params` and `state`, which are returned.

        Args:
            grads: The gradients, as for `update`, which are not written.
            state: The state, which is overwritten.
            params: The parameters, which are overwritten.

        Returns:
            The pair `(params, state)`: the trees that were given.

        Raises:
            RuntimeError: As `update`, or if a parameter or gradient has a history.
            TypeError: As `update`.
            ValueError: As `update`, and if a parameter is expanded, or shares memory with a
                gradient.

        Example:
            >>> import torch, funcopt
            >>> from funcopt.distributed import Zero1
            >>> opt = Zero1(funcopt.AdamW(lr=0.1), mesh=None)
            >>> w = torch.ones(2)
            >>> _ = opt.update_(torch.tensor([1.0, -1.0]), opt.init(w), w)
            >>> w
            tensor([0.8990, 1.0990])
        """
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
        sharding = Sharding.of(leaves, structure, self.bucket_bytes, self.mesh)
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
            resting=gradients.resting,
        )
