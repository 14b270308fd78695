"""The optimizer that moves nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from ._node import register_optimizer
from ._types import Tree

__all__ = ["Frozen"]

ParamsT = TypeVar("ParamsT")


@register_optimizer
@dataclass(frozen=True)
class Frozen:
    """An optimizer that leaves its parameters as they are, for those of a `Partition` that rest.

    It holds no state, takes leaves of any kind (integers too), and does not look at gradients,
    which may be None, or in a `Partition` missing.

    What `update` returns are the very tensors that it was given, not copies of them, unlike
    everything else that an `update` here returns: what is frozen is often most of a model, such as
    the weights beneath an adapter, and a copy at each step would cost more than the step. Nothing
    in funcopt writes to them. Clone one before you do.

    Example:
        >>> import torch, funcopt
        >>> params, opt = torch.ones(2), funcopt.Frozen()
        >>> new_params, state = opt.update(None, opt.init(params), params)
        >>> new_params is params, state
        (True, ())
    """

    elementwise = True

    def init(self, params: Tree) -> tuple[()]:  # noqa: ARG002
        """Return the state, which is empty.

        Args:
            params: Any tree.
        """
        return ()

    def update(
        self,
        grads: Tree,  # noqa: ARG002
        state: tuple[()],
        params: ParamsT,
    ) -> tuple[ParamsT, tuple[()]]:
        """Return the parameters and the state as they are: the tree that was given.

        Args:
            grads: Anything.
            state: `()`.
            params: Any tree.
        """
        return params, state

    def update_(self, grads: Tree, state: tuple[()], params: ParamsT) -> tuple[ParamsT, tuple[()]]:
        """Do the same. Nothing is written, so that this is right under any transform as well."""
        return self.update(grads, state, params)
