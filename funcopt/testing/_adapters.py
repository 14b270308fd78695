"""What may be given to be tested besides an optimizer with `init` and `update`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, optim

from .._core import pytree
from .._core.types import Tree, kind_of
from .._pure.optimizer import Pure, pure
from .._pure.source import Kind, check_kind, defaults_of, takes, traits_of_kind


def subject_of(given: Any) -> Any:
    """Return the optimizer to test: what was given, or a class or factory of torch's behind `pure`.

    Raises:
        TypeError: If it is neither; the message says what to give instead.
    """
    if isinstance(given, type):
        return _of_class(given)
    if isinstance(given, optim.Optimizer):
        name = type(given).__name__
        raise TypeError(
            f"{name}(...) is made for parameters of its own: give the class, {name}, or how to "
            f"make one, such as lambda params: {name}(params, lr=0.1)."
        )
    if _is_pair(given):
        raise TypeError(
            f"{kind_of(given)} is a pair of init and update, as of optax and TorchOpt, which "
            f"returns what is to be added to the parameters: give testing.from_optax(...) of it."
        )
    missing = [name for name in ("init", "update") if not callable(getattr(given, name, None))]
    if len(missing) == 2 and callable(given):
        return _of_factory(given)
    for method in missing:
        raise TypeError(
            f"{given!r} has no {method}(): an optimizer has init() and update(). A "
            f"torch.optim.Optimizer is given as its class, or as lambda params: SGD(params, "
            f"lr=0.1)."
        )
    return given


def _is_pair(given: object) -> bool:
    """Whether it is a tuple of `init` and `update`, as those libraries have it."""
    names = getattr(given, "_fields", ())
    bare = isinstance(given, tuple) and len(given) == 2 and all(map(callable, given))
    return bare or tuple(names)[:2] == ("init", "update")


@dataclasses.dataclass(frozen=True)
class _FromOptax:
    """A pair of optax's or TorchOpt's shape, whose updates are added to the parameters."""

    transform: Any
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def init(self, params: Tree) -> Any:
        return self._call(0, params)

    def update(self, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        result = self._call(1, grads, state, params=params, **self.options)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"update returned {kind_of(result)}: it must return (updates, state).")
        updates, state = result
        structure = pytree.flatten(params)[1]
        added = [
            own if update is None else _added(own, update)
            for own, update in zip(
                pytree.flatten(params)[0],
                pytree.pair(updates, "updates", structure).leaves,
                strict=True,
            )
        ]
        return pytree.unflatten(structure, added), state

    def _call(self, index: int, *given: Any, **named: Any) -> Any:
        own = getattr(self.transform, ("init", "update")[index], None)
        function = self.transform[index] if own is None else own
        return function(*given, **named)


def _added(param: Tensor, update: object) -> Tensor:
    if not isinstance(update, Tensor):
        raise TypeError(
            f"an update is {kind_of(update)}: it must be a tensor. What computes on arrays of "
            f"another library needs an optimizer of your own around it, that turns tensors into "
            f"those and back."
        )
    if update.shape != param.shape:
        raise ValueError(
            f"an update has shape {tuple(update.shape)}, its parameter {tuple(param.shape)}: they "
            f"must be the same."
        )
    return (param + update).to(param.dtype)


def from_optax(transform: Any, **options: Any) -> Any:
    """Return an optimizer to test of a pair as of optax or TorchOpt.

    Such a pair has `init(params)`, and `update(grads, state, params=params)`, which returns
    `(updates, state)`. The new parameters are `params + updates`, in the dtype of `params`.

    Nothing tells from outside whether what `update` returns is to be added or is the new parameters
    themselves, so that `check_optimizer` does not guess: it takes an object with `init` and
    `update` for the latter, and refuses a tuple of the two, which names this function.

    Args:
        transform: A tuple `(init, update)`, or an object with these two methods, that computes on
            tensors of torch.
        options: Given to each call of `update` by name. TorchOpt's write into gradients and state
            unless told `inplace=False`, by which they break `never_mutates`.

    Returns:
        An optimizer with `init` and `update`, for `check_optimizer`.

    Raises:
        TypeError: If `transform` is no such pair.

    Example:
        >>> import funcopt
        >>> from funcopt.testing import check_optimizer, from_optax
        >>> pair = funcopt.compat.as_optax(funcopt.SGD(lr=0.5))
        >>> check_optimizer(from_optax(pair), laws=["deterministic"], max_examples=5).ok
        True
    """
    by_method = all(callable(getattr(transform, name, None)) for name in ("init", "update"))
    by_place = isinstance(transform, tuple) and _is_pair(transform)
    if isinstance(transform, type) or not (by_method or by_place):
        raise TypeError(
            f"transform is {kind_of(transform)}: it must have init() and update(), as what "
            f"torchopt.adamw(1e-3) returns, or be a tuple of these two functions."
        )
    kind = dataclasses.make_dataclass(
        _name_of(transform), (), bases=(_FromOptax,), frozen=True, repr=False
    )
    return kind(transform, options)


def _name_of(transform: object) -> str:
    own = type(transform).__name__
    return own if own.isidentifier() and own != "tuple" else "FromOptax"


@dataclasses.dataclass(frozen=True)
class _FromTorch:
    """A class of `torch.optim`, run by `pure`.

    Subclasses have those of `lr` and `maximize` that the class takes as fields, by which laws know
    them.
    """

    # Each leaf has its own count, and none is known by its name.
    step_per_leaf: ClassVar[bool] = True

    kind: Kind
    hyperparameters: Mapping[str, Any]

    @cached_property
    def _pure(self) -> Pure:
        own = {name: getattr(self, name) for name in _FIELDS if hasattr(self, name)}
        return pure(self.kind, **{**self.hyperparameters, **own})

    def init(self, params: Tree) -> Any:
        return self._pure.init(params)

    def update(self, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        return self._pure.update(grads, state, params)

    def update_(self, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        return self._pure.update_(grads, state, params)


# Hyperparameters that laws speak of, under the names that classes have for them.
_FIELDS = ("lr", "maximize")


def _of_class(kind: type) -> Any:
    if not issubclass(kind, optim.Optimizer):
        raise TypeError(f"{kind!r} is a class: give an instance, such as {kind.__name__}().")
    check_kind(kind)
    return _from_torch(kind, {})


def _from_torch(kind: Kind, hyperparameters: Mapping[str, Any]) -> Any:
    known = {**defaults_of(kind), **hyperparameters}
    own = {
        name: known[name]
        for name in _FIELDS
        if known.get(name, inspect.Parameter.empty) is not inspect.Parameter.empty
    }
    given = {name: value for name, value in hyperparameters.items() if name not in own}
    said: dict[str, Any] = {
        "traits": traits_of_kind(kind, hyperparameters),
        "inapplicable": _inapplicable(kind),
    }
    fields = [(name, Any) for name in own]
    subject = dataclasses.make_dataclass(
        kind.__name__, fields, bases=(_FromTorch,), frozen=True, namespace=said
    )
    return _checked(subject(kind, given, **own))


def _inapplicable(kind: Kind) -> dict[str, str]:
    laws = {"compiles_once": "a torch.optim.Optimizer makes its step outside of the graph"}
    if takes(kind, "differentiable"):
        return laws
    reason = f"it is not differentiable: {kind.__name__} has no differentiable="
    return {**laws, "gradient_is_finite": reason, "gradient_matches_differences": reason}


def _checked(subject: Any) -> Any:
    """Let the class refuse its hyperparameters now, instead of at every law."""
    name = subject.kind.__name__
    try:
        made: Pure = subject._pure
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{error} Give how to make one, such as lambda params: {name}(params, lr=0.1)."
        ) from error
    return subject if made else None


def _of_factory(factory: Callable[..., Any]) -> Any:
    """Find out what a factory makes, and have that made by `pure`."""
    try:
        made = factory([torch.nn.Parameter(torch.zeros((2, 2), device="cpu"))])
    except Exception as error:
        raise TypeError(
            f"{factory!r} has no init() and update(), so that it was called with a list of "
            f"parameters to make a torch.optim.Optimizer, and raised {type(error).__name__}: "
            f"{error}"
        ) from error
    if not isinstance(made, optim.Optimizer):
        raise TypeError(
            f"{factory!r} made {kind_of(made)} of a list of parameters: it must make a "
            f"torch.optim.Optimizer, such as lambda params: torch.optim.SGD(params, lr=0.1)."
        )
    if len(made.param_groups) != 1:
        raise TypeError(
            f"{factory!r} made {len(made.param_groups)} parameter groups: it must make one. Test "
            f"the hyperparameters of each group by themselves."
        )
    kind = type(made)
    check_kind(kind)
    group = made.param_groups[0]
    # What is a default is not given, as one that is given may exclude another.
    found = {
        name: group[name]
        for name, default in defaults_of(kind).items()
        if name in group and (name in _FIELDS or not _same(group[name], default))
    }
    return _from_torch(kind if _is_made_by(kind, found, made) else _class_of(factory, kind), found)


def _same(one: object, other: object) -> bool:
    return type(one) is type(other) and bool(one == other)


def _is_made_by(kind: Kind, hyperparameters: Mapping[str, Any], made: optim.Optimizer) -> bool:
    """Whether a class makes such an instance of these hyperparameters: all are in its group."""
    try:
        again = kind(made.param_groups[0]["params"], **hyperparameters)
    except Exception:  # whatever it refuses them by, the factory can make one
        return False
    return _told(again) == _told(made)


def _told(made: optim.Optimizer) -> dict[str, Any]:
    """Return what an instance was told, as far as it shows: options of its group and its own."""
    own = {**vars(made), **made.param_groups[0]}
    return {
        name: value
        for name, value in own.items()
        if isinstance(value, int | float | str | tuple | None) and not name.startswith("_")
    }


def _class_of(factory: Callable[..., Any], kind: Kind) -> Kind:
    """Return a class that is made by the factory, and whose group may be told otherwise."""
    names = [name for name in _FIELDS if name in defaults_of(kind)]

    def __init__(self: optim.Optimizer, params: Any, **given: Any) -> None:  # noqa: N807
        made = factory(list(params))
        vars(self).update(vars(made))
        for group in self.param_groups:
            group.update({name: given[name] for name in names if name in given})

    made: Kind = type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})
    return made
