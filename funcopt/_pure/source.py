"""The class that `pure` is given: what it takes, what is known of it, an instance for a step."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, optim

from .._core import pytree, transforms
from .._core.types import Hyperparam, Range, Traits, Tree, kind_of
from .._engine.checks import starts
from .._engine.hyperparameters import check_count, check_zero_dim, number_at
from ..wrappers._shared import read

Kind: TypeAlias = type[optim.Optimizer]

# Of these, each element moves by its own gradient, value and state.
_ELEMENTWISE = frozenset(
    (
        optim.SGD,
        optim.ASGD,
        optim.Adadelta,
        optim.Adagrad,
        optim.Adam,
        optim.AdamW,
        optim.Adamax,
        optim.NAdam,
        optim.RAdam,
        optim.RMSprop,
        optim.Rprop,
    )
)
# Of these, each leaf moves by itself: by norms of it, or by its means over rows and columns.
_LEAFWISE = frozenset(
    getattr(optim, name) for name in ("Adafactor", "Muon") if hasattr(optim, name)
)
# Those whose `differentiable` path keeps the derivative with respect to a learning rate.
_FOLLOW_LR = frozenset((optim.SGD, optim.Adam, optim.AdamW))


def name_of(kind: type) -> str:
    """Return the name of a class as one imports it: `torch.optim.AdamW`."""
    if getattr(optim, kind.__name__, None) is kind:
        return f"torch.optim.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def is_of_torch(kind: Kind) -> bool:
    """Whether torch itself makes the steps of a class, by lists of tensors, in place."""
    methods = [getattr(kind, name, None) for name in ("step", "_init_group")]
    return all(getattr(own, "__module__", "").startswith("torch.optim.") for own in methods)


def is_elementwise(kind: Kind) -> bool:
    """Whether each element moves by its own gradient, value and state, as of most of torch's."""
    return kind in _ELEMENTWISE


def traits_of_kind(kind: Kind, hyperparameters: Mapping[str, Any]) -> Traits:
    """Return what holds of a class; nothing is promised of one that is not torch's."""
    on_host = not hyperparameters.get("capturable", False)
    return Traits(
        elementwise=kind in _ELEMENTWISE,
        leafwise=kind in _LEAFWISE,
        linear=kind in _ELEMENTWISE or kind in _LEAFWISE,
        tells_leaves_apart=True,  # each leaf has its own count
        decides_on_host=on_host,
    )


def check_kind(kind: object) -> None:
    """Refuse what is no class of optimizers, and those that cannot be functions of gradients.

    Raises:
        TypeError: If it is no class of that kind, or one that takes a closure or sparse gradients.
    """
    if not isinstance(kind, type) or not issubclass(kind, optim.Optimizer):
        raise TypeError(
            f"the first argument is {kind if isinstance(kind, type) else kind_of(kind)}: it must "
            f"be a class of torch.optim, or another subclass of torch.optim.Optimizer. Give the "
            f"class and its hyperparameters, such as pure(torch.optim.RAdam, lr=0.1)."
        )
    name = name_of(kind)
    if issubclass(kind, optim.LBFGS) or _needs_closure(kind):
        raise TypeError(
            f"{name} needs a closure: it computes the loss again at points of its own, so that one "
            f"update is no function of one gradient. Use the class itself, with "
            f"torch.func.functional_call in the closure."
        )
    if issubclass(kind, optim.SparseAdam):
        raise TypeError(
            f"{name} takes sparse gradients alone, and a tree of gradients here is dense. Take "
            f"funcopt.Adam, which also moves the rows that have a gradient of 0, or the class "
            f"itself."
        )


def _needs_closure(kind: Kind) -> bool:
    own = list(inspect.signature(kind.step).parameters.values())[1:]
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in named and p.default is inspect.Parameter.empty for p in own)


def defaults_of(kind: Kind) -> dict[str, Any]:
    """Return the hyperparameters of a class, each with its default (`inspect.Parameter.empty`)."""
    hashable: Any = kind
    return _defaults_of(hashable)


@cache
def _defaults_of(kind: Any) -> dict[str, Any]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    _, *own = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in own if p.kind in named}


def takes(kind: Kind, name: str) -> bool:
    """Whether a class has a hyperparameter of this name."""
    return name in defaults_of(kind)


def is_scheduled(kind: Kind, name: str, value: object) -> bool:
    """Whether a hyperparameter is a schedule: it can be called, where the class wants a number."""
    default = defaults_of(kind).get(name)
    is_number = isinstance(default, numbers.Real) and not isinstance(default, bool)
    wanted = name == "lr" or is_number
    return wanted and callable(value) and not isinstance(value, Tensor)


def check_hyperparameters(kind: Kind, hyperparameters: Mapping[str, Any]) -> None:
    """Let the class itself refuse what it does not take, as it does when it is built.

    Raises:
        TypeError: If it has no hyperparameter of a name.
        ValueError: If it does not take a value.
    """
    known = defaults_of(kind)
    by_keywords = any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(kind).parameters.values()
    )
    unknown = [name for name in hyperparameters if name not in known and not by_keywords]
    if unknown:
        raise TypeError(
            f"{name_of(kind)} has no {pytree.some(unknown)}. It takes "
            f"{', '.join(known) or 'no hyperparameters'}."
        )
    for own in _read(kind, hyperparameters):
        try:
            kind([torch.zeros((2, 2), device="cpu")], **own)
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"{name_of(kind)} refuses its hyperparameters: {error}") from error


def _read(kind: Kind, hyperparameters: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield them without schedules, and with single numbers for tensors: the least, the largest."""
    plain = {n: v for n, v in hyperparameters.items() if not is_scheduled(kind, n, v)}
    leaves, structure = pytree.flatten(plain)
    for pick in (min, max):
        own = [_one_of(leaf, pick) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        yield pytree.unflatten(structure, own)


def _one_of(tensor: Tensor, pick: Callable[[list[float]], float]) -> Tensor:
    values = transforms.values_at_hand(tensor)
    value = pick(values) if values else 0.5
    return torch.full((), value, dtype=tensor.dtype, device=tensor.device)


_FINITE = Range("must be finite", math.isfinite)


def numbers_after(kind: Kind, hyperparameters: Mapping[str, Any], count: Tree) -> dict[str, Any]:
    """Return the hyperparameters after so many updates: what schedules give, and all else.

    Raises:
        TypeError: If a schedule returns no number.
        ValueError: If it returns one that is not finite, or a tensor is no single number.
    """
    values = {}
    for name, value in hyperparameters.items():
        if is_scheduled(kind, name, value):
            if not isinstance(count, Tensor):
                raise ValueError(
                    f"{name} is a schedule, and the state has no count to call it with: state.step "
                    f"is {count!r}. Make the state with init() of this optimizer, or let it count "
                    f"from here: state._replace(step=torch.zeros((), dtype=torch.float64))."
                )
            check_count(count, lambda: "state.step")
            number = number_at(Hyperparam(name, _FINITE), value, count)
            known = read(number) if isinstance(number, Tensor) else number
            values[name] = number if known is None else known
            continue
        for leaf in pytree.flatten(value)[0]:
            if isinstance(leaf, Tensor):
                check_zero_dim(name, leaf)
        values[name] = value
    return values


def in_plain_operators(kind: Kind, values: Mapping[str, Any], *, forward: bool) -> dict[str, Any]:
    """Return hyperparameters by which the class spells its step out in operators that are followed.

    Raises:
        ValueError: If they name a path that is not followed, or the class has none that is.
    """
    found = dict(values)
    for name in ("foreach", "fused", "capturable"):
        if found.get(name):
            raise ValueError(
                f"{name}=True of {name_of(kind)} is not followed by a derivative or a transform. "
                f"Leave it out."
            )
        if takes(kind, name) and name != "capturable":
            found[name] = False
    if not takes(kind, "differentiable") or found.get("differentiable") is False:
        why = "says differentiable=False" if "differentiable" in found else "has no differentiable="
        raise ValueError(
            f"{name_of(kind)} {why}: its step is not recorded, and a derivative through it would "
            f"be lost. Detach what goes into the update, or take an optimizer that can be "
            f"differentiated."
        )
    found["differentiable"] = True
    _check_followed(kind, values, forward=forward)
    return found


def _check_followed(kind: Kind, values: Mapping[str, Any], *, forward: bool) -> None:
    """Refuse a number of which the class would lose the derivative.

    Raises:
        ValueError: Of a tensor that may have one, unless the class keeps it.
    """
    for name, value in values.items():
        tensors = [leaf for leaf in pytree.flatten(value)[0] if isinstance(leaf, Tensor)]
        kept = name == "lr" and kind in _FOLLOW_LR
        if kept and kind is optim.SGD:  # which asks the tensor
            kept = not forward and all(map(transforms.has_derivative, tensors))
        if not kept and (forward or any(map(may_have_derivative, tensors))) and tensors:
            raise ValueError(
                f"{name} is a tensor that may have a derivative, which {name_of(kind)} would lose: "
                f"it reads that number. Detach it, or give a number."
            )


def may_have_derivative(tensor: Tensor) -> bool:
    """Whether a derivative may be lost with a tensor, also where it does not say so.

    Within a vmap that is within a derivative it does not.
    """
    return transforms.has_derivative(tensor) or (
        transforms.transformed() and starts([tensor]) is None
    )


def build(kind: Kind, params: Sequence[Tensor], values: Mapping[str, Any]) -> optim.Optimizer:
    """Return an instance for these parameters.

    It looks at the numbers that it is built with. Those that cannot be looked at here, as under
    vmap, are put into it afterwards.
    """
    leaves, structure = pytree.flatten(dict(values))
    hidden = [isinstance(leaf, Tensor) and not _can_be_read(leaf) for leaf in leaves]
    if True not in hidden:
        return kind(params, **values)
    stand_ins = [0.5 if own else leaf for leaf, own in zip(leaves, hidden, strict=True)]
    opt = kind(params, **pytree.unflatten(structure, stand_ins))
    for name, value in values.items():
        if any(isinstance(leaf, Tensor) for leaf in pytree.flatten(value)[0]):
            for group in opt.param_groups:
                group[name] = value
    return opt


def _can_be_read(number: Tensor) -> bool:
    return transforms.readable() or transforms.values_at_hand(number) is None


def explained(kind: Kind, error: Exception) -> str:
    where = _function_in_the_way(kind, error.__traceback__)
    reason = sentence(error)
    if isinstance(error, KeyError):
        return (
            f"{name_of(kind)} looks for {error} in the state of a parameter ({where}), which has "
            f"none. Make the state with init() of this optimizer."
        )
    if transforms.transformed() or transforms.observed():
        return (
            f"{name_of(kind)} cannot be followed here: {where}, stands in the way: {reason} Make "
            f"the update outside of the transform, or take an optimizer of funcopt."
        )
    return f"{name_of(kind)} failed in {where}: {reason}"


def sentence(error: Exception) -> str:
    """Return the first line of what an error says, with a full stop, which torch leaves out."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return reason if reason.endswith((".", "!", "?")) else f"{reason}."


def _function_in_the_way(kind: Kind, trace: TracebackType | None) -> str:
    """Return the function of a class, or of torch.optim, in which an error arose."""
    found = f"{name_of(kind)}.step"
    while trace is not None:
        code, module = trace.tb_frame.f_code, trace.tb_frame.f_globals.get("__name__", "")
        helper = module == "torch.optim.optimizer"
        if (module == kind.__module__ or module.startswith("torch.optim.")) and not helper:
            found = f"{module}.{code.co_name}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return found
