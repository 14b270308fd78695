"""The optimizer that moves nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Unpack

from .._core.types import Extras, ParamsT, Traits, Tree
from .._engine.registration import register_optimizer


@register_optimizer
@dataclass(frozen=True)
class Frozen:
    """An optimizer that leaves its parameters as they are, for those of a `Partition` that rest.

    It holds no state, takes leaves of any kind (integers too), and does not look at gradients,
    which may be None, or in a `Partition` missing. So do all wrappers around it: to them, what is
    frozen has no gradient, whatever was given, as a parameter of torch's that does not require
    one. It does not count in the norm of `Clip`, nor trip `SkipNonfinite` or `LossScale`. The
    average of an `Ema` and the slow parameters of a `Lookahead` have a copy of it as it is.
    (Wrappers of one's own are not seen through.)

    What `update` returns are the very tensors that it was given, not copies of them, unlike
    everything else that an `update` here returns, also beneath wrappers: what is frozen is often
    most of a model, such as the weights beneath an adapter, and a copy at each step would cost more
    than the step. Nothing in funcopt writes to them, but for `LocalUpdates`, whose processes meet
    in every leaf that has a mean. Clone one before you do.

    Example:
        >>> import torch, funcopt
        >>> params, opt = torch.ones(2), funcopt.Frozen()
        >>> new_params, state = opt.update(None, opt.init(params), params)
        >>> new_params is params, state
        (True, ())
    """

    traits: ClassVar[Traits] = Traits(elementwise=True, linear=True, rests=True)

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
        **extras: Unpack[Extras],
    ) -> tuple[ParamsT, tuple[()]]:
        """Return the parameters and the state as they are: the tree that was given.

        Args:
            grads: Anything.
            state: `()`.
            params: Any tree.
        """
        return params, state

    def update_(
        self, grads: Tree, state: tuple[()], params: ParamsT, **extras: Unpack[Extras]
    ) -> tuple[ParamsT, tuple[()]]:
        """Do the same. Nothing is written, so that this is right under any transform as well."""
        return self.update(grads, state, params)
