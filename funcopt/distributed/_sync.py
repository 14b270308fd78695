"""A sync of processes that trained apart: their mean, and the step of an outer SGD from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .._core import pytree
from .._core.tensors import compute_dtype
from .._core.types import Tree
from .._engine.update_if import copies
from ..wrappers._shadow_params import ShadowParams
from ..wrappers._shared import Gradients, check_wrapper_inplace
from ._average import means
from ._buckets import by_path


class Outer(NamedTuple):
    """The outer optimizer: SGD."""

    lr: float
    momentum: float
    nesterov: bool


class Sync(NamedTuple):
    """Parameters, with the anchor and the outer momentum of a state, checked."""

    gradients: Gradients  # with the parameters
    anchored: ShadowParams | None
    moving: ShadowParams | None

    @classmethod
    def gather(
        cls, gradients: Gradients, anchor: Tree, buffer: Tree, anchored: bool, moving: bool
    ) -> Sync:
        """Pair the anchor and the momentum of a state, trees or `()`, with the parameters.

        `anchored` and `moving` say whether there are to be such trees.
        """
        for index, leaf in enumerate(gradients.params):
            if isinstance(leaf, DTensor):
                raise TypeError(
                    f"{pytree.path(gradients.structure, 'params', index)} is a DTensor: processes "
                    f"that average their parameters have whole ones. Give it as a plain tensor."
                )
        return cls(
            gradients,
            _shadow(gradients, "state.anchor", anchor, anchored),
            _shadow(gradients, "state.momentum_buffer", buffer, moving),
        )

    @property
    def trees(self) -> tuple[Tree, Tree]:
        """The anchor and the momentum, as they are in a state."""
        return _tree_of(self.anchored), _tree_of(self.moving)

    def copied(self) -> Sync:
        """Return the same with anchor and momentum in fresh memory."""
        return self._replace(anchored=_copied(self.anchored), moving=_copied(self.moving))

    def check_inplace(self, count: Tensor) -> None:
        """Refuse to write in place where that would lose a derivative or memory."""
        others = {"state.steps_since_sync": count}
        if self.anchored is None:
            check_wrapper_inplace({}, others, self.gradients)
            return
        if self.moving is not None:
            paths = pytree.paths(self.gradients.structure, self.moving.root)
            others.update(zip(paths, self.moving.leaves, strict=True))
        self.anchored.check_wrapper_inplace({}, others)

    def run_(self, params: Sequence[Tensor], mesh: DeviceMesh | None, outer: Outer) -> None:
        """Average parameters, make the outer step, and write the parameters, anchor and momentum.

        Leaves at rest that have no mean, such as integers, are left as they are. The operators are
        those of `torch.optim.SGD`, so that the bits are its bits.
        """
        unmeant = {
            i for i in self.gradients.resting if not params[i].dtype.to_real().is_floating_point
        }
        order = [i for i in by_path(self.gradients.structure) if i not in unmeant]
        with torch.no_grad():
            for position, mean in means([params[index] for index in order], mesh):
                index = order[position]
                params[index].copy_(self._stepped_(index, mean, outer))

    def _stepped_(self, index: int, mean: Tensor, outer: Outer) -> Tensor:
        """Return a leaf after the outer step, given its mean."""
        if self.anchored is None:
            return mean
        anchor = self.anchored.leaves[index]
        step = anchor - mean
        if self.moving is not None:
            velocity = self.moving.leaves[index].mul_(outer.momentum).add_(step)
            step = step.add(velocity, alpha=outer.momentum) if outer.nesterov else velocity
        return anchor.add_(step, alpha=-outer.lr)


def _shadow(gradients: Gradients, name: str, tree: Tree, wanted: bool) -> ShadowParams | None:
    """Pair a tree of the state with the parameters, if there is to be one."""
    given = not (isinstance(tree, tuple) and tree == ())
    if given != wanted and len(gradients.params) > 0:
        raise ValueError(
            f"{name} {'holds a tree' if given else 'is empty'}, which does not go with this "
            f"optimizer's outer_lr and outer_momentum. Make the state with init() of this "
            f"optimizer."
        )
    return ShadowParams.gather(gradients, name, tree, compute_dtype) if wanted else None


def _tree_of(shadow: ShadowParams | None) -> Tree:
    return () if shadow is None else shadow.paired.rebuild(shadow.leaves)


def _copied(shadow: ShadowParams | None) -> ShadowParams | None:
    if shadow is None:
        return None
    return shadow._replace(paired=shadow.paired._replace(leaves=copies(shadow.leaves)))
