"""What is inside a wrapper, for type checkers: the inner optimizer, and its state.

A wrapper is generic in its inner optimizer, and its state in the inner state, so that a checker
knows the types of `Clip(SGD()).inner` and `Clip(SGD()).init(params).inner`. At run time neither
says anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from .types import StateT

if TYPE_CHECKING:
    from typing_extensions import TypeVar
else:
    from typing import TypeVar


class OptimizerLike(Protocol[StateT]):
    """What is accepted where an optimizer is to be wrapped.

    Every `Optimizer` takes parameters of any type, and returns what it is given. This may also be
    typed for one type of them, such as `dict[str, Tensor]`.

    Example:
        >>> import torch, funcopt
        >>> class Descent:
        ...     '''Gradient descent of flat dicts.'''
        ...
        ...     def init(self, params: dict[str, torch.Tensor]) -> tuple[()]:
        ...         return ()
        ...
        ...     def update(
        ...         self,
        ...         grads: dict[str, torch.Tensor],
        ...         state: tuple[()],
        ...         params: dict[str, torch.Tensor],
        ...     ) -> tuple[dict[str, torch.Tensor], tuple[()]]:
        ...         return {name: params[name] - 0.1 * grads[name] for name in params}, state
        ...
        ...     update_ = update
        >>> inner: funcopt.OptimizerLike[tuple[()]] = Descent()
        >>> opt = funcopt.Clip(inner, max_norm=1.0)
        >>> params = {"w": torch.zeros(2)}
        >>> opt.update({"w": torch.ones(2)}, opt.init(params), params)[0]
        {'w': tensor([-0.0707, -0.0707])}
    """

    def init(self, params: Any, /) -> StateT:
        """Return the state before the first update, as that of an `Optimizer`."""

    def update(self, grads: Any, state: StateT, params: Any, /) -> tuple[Any, StateT]:
        """Return the new parameters and the new state, as that of an `Optimizer`."""
        ...

    def update_(self, grads: Any, state: StateT, params: Any, /) -> tuple[Any, StateT]:
        """Do the same as `update` in place, as that of an `Optimizer`."""
        ...


if TYPE_CHECKING:
    # With defaults, so that whoever writes `Clip` or `ClipState` alone has said enough.
    InnerT_co = TypeVar("InnerT_co", bound=OptimizerLike[Any], covariant=True, default=Any)
    InnerStateT = TypeVar("InnerStateT", default=Any)
else:
    InnerT_co = TypeVar("InnerT_co", covariant=True)  # a default takes Python 3.13
    InnerStateT = TypeVar("InnerStateT")
