"""Hyperparameters: what they may be, and what they are at an update.

Each class declares its own, with their ranges. They are given as numbers, tensors or schedules, and
checked when an optimizer is built; and again at each update, as far as a value can be read without
waiting, since a tensor may have been filled with another one.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.types import (
    TREES,
    Hyperparam,
    Number,
    Range,
    Schedule,
    Tree,
    is_dense,
    kind_of,
    shown_layout,
)
from .rule import UpdateRule


def check_number(own: Hyperparam, value: float, source: str = "") -> float:
    """Return `value` if it is in the range of this hyperparameter; a NaN is in no range."""
    if not own.range.holds(value):
        raise ValueError(f"{own.path}={value}{source}: {own.path} {own.range.words}.")
    return value


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse what is none of these names.

    Raises:
        ValueError: With the names there are.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(choices)}.")


def check_flag(name: str, value: object) -> None:
    """Refuse anything but True and False, so that a misplaced argument is noticed."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be True or False.")


def normalize(
    own: Hyperparam, value: Any, *, schedule: bool = False, source: str = "", owner: str = ""
) -> Any:
    """Return a hyperparameter as it is kept: a float, a tensor or a schedule.

    A tensor that is to be mapped over by vmap may still have the mapped dimension here. Two things
    are for the message: `source`, where the value came from, and `owner`, the class that was given
    it where parameters might have been meant.

    Raises:
        TypeError: If `value` is of another type.
        ValueError: If it is out of range. The elements of a tensor are checked too, unless they
            are traced, or on a device whose queue reading them would stall.
    """
    name = own.path
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return check_number(own, _as_float(value), source)
    if isinstance(value, Tensor):
        _check_tensor(own, value, source)
        return value
    if schedule and callable(value) and not isinstance(value, torch.nn.Module):
        _check_schedule(name, value)
        return value
    kinds = "a number, a 0-dim tensor or a schedule" if schedule else "a number or a 0-dim tensor"
    from .hints import hint_for  # noqa: PLC0415  # which nobody needs who makes no mistake

    raise TypeError(
        f"{name}={short(value)}{source}: must be {kinds}, not {type(value).__name__}."
        f"{hint_for(name, value, owner)}"
    )


def normalize_fields(
    opt: object, hyperparams: Iterable[Hyperparam], *, trees: bool = False
) -> None:
    """Let these hyperparameters of a frozen dataclass be as `normalize` keeps them, schedules too.

    Whole numbers, which have no fraction by their range, are shown as such. Trees of numbers, one
    for each leaf of the parameters, are for the optimizers that have a rule.
    """
    dataclass: Any = opt
    first = dataclasses.fields(dataclass)[0].name
    for own in hyperparams:
        owner = type(opt).__name__ if own.path == first else ""
        given = own.of(opt)
        if trees and isinstance(given, TREES):
            own.put(opt, _normalize_tree(own, given, owner))
            continue
        kept = normalize(own, given, schedule=True, owner=owner)
        whole = own.range.whole and isinstance(kept, float) and kept < math.inf
        own.put(opt, int(kept) if whole else kept)


def _normalize_tree(own: Hyperparam, tree: Tree, owner: str) -> Tree:
    """Return a tree of numbers, of which each is as `normalize` keeps it."""
    leaves, structure = pytree.flatten_above(tree, callable)
    groups = any(isinstance(part, dict) and "params" in part for part in tree)
    if not leaves or groups or any(isinstance(leaf, torch.nn.Parameter) for leaf in leaves):
        normalize(own, tree, schedule=True, owner=owner)  # which says where parameters go
    kept = []
    for index, leaf in enumerate(leaves):
        path = pytree.path(structure, own.path, index)
        try:
            kept.append(normalize(own._replace(field=path), leaf, schedule=True))
        except ValueError as error:
            if owner and isinstance(leaf, Tensor) and leaf.ndim > 0:  # a weight, perhaps
                from .hints import to_init  # noqa: PLC0415  # likewise

                raise ValueError(f"{error}{to_init(owner)}") from None
            raise
    return pytree.unflatten(structure, kept)


def _check_schedule(name: str, value: Callable[..., Any]) -> None:
    """Refuse what cannot be called with the count of updates, as where an instance was meant."""
    if isinstance(value, type):
        raise TypeError(f"{name} is the class {value.__name__}: give an instance of it.")
    check_takes(name, value, 1, "a schedule is called with the count of updates made so far")
    code = getattr(value, "__code__", None)
    if code is not None and code.co_varnames[:1] == ("params",):  # as optax calls one for a mask
        raise TypeError(
            f"{name}={short(value)} takes params, and a schedule is called with the count of "
            f"updates made so far. To give each leaf a number of its own, call the function "
            f"yourself: {name}=function(params)."
        )


def check_takes(name: str, function: Callable[..., Any], count: int, rule: str) -> None:
    """Refuse a function that cannot be called with so many arguments, before it is."""
    if transforms.compiling():
        return
    try:
        inspect.signature(function).bind(*range(count))
    except ValueError:  # what is written in C may have no signature to look at
        return
    except TypeError as error:
        raise TypeError(f"{name}={short(function)}: {rule}, and this has {error}.") from None


def short(value: object) -> str:
    """Return a repr in a line, whatever it is of."""
    return " ".join(reprlib.repr(value).split())


def _as_float(value: numbers.Real) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer too large, which as a float is out of every range
        return math.inf


def _check_tensor(own: Hyperparam, value: Tensor, source: str) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{own.path} is a tensor of {value.dtype}: give it a floating-point dtype.")
    _check_dense(own.path, value)
    check_values(own, value, f"{source} in a tensor of shape {tuple(value.shape)}")


_MANY = 16


def check_values(own: Hyperparam, value: Tensor, source: str = "") -> None:
    """Refuse a tensor with an element out of range, if its elements can be read without waiting."""
    if value.numel() > _MANY and not own.range.whole and elements_at_hand(value):
        value = torch.stack(value.aminmax())  # both are NaN if one element is
    values = transforms.values_at_hand(value) or ()
    for element in dict.fromkeys(values) if len(values) > 1 else values:
        check_number(own, element, source)


def _check_dense(name: str, value: Tensor) -> None:
    if not is_dense(value):
        raise TypeError(f"{name} is a tensor of {shown_layout(value)}: make it dense.")


def elements_at_hand(value: Tensor) -> bool:
    """Whether the elements of a tensor can be read at once, and are all that there is to it."""
    return (
        value.device.type == "cpu"
        and transforms.all_plain([value])
        and not transforms.tracing()
        and not transforms.transformed()
    )


def check_zero_dim(name: str, value: Number) -> None:
    """Refuse a stacked hyperparameter where one number is needed."""
    if isinstance(value, Tensor):
        _check_dense(name, value)
    if isinstance(value, Tensor) and value.ndim != 0:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: one update takes one number. Map over the "
            f"stacked optimizer with torch.func.vmap, or take one of its members."
        )


def call_schedule(name: str, schedule: Schedule, count: Tensor) -> Number:
    """Call a schedule with a copy of a count, with which it may do what it likes.

    Raises:
        RuntimeError: If it fails under vmap, where the count has no one value to go by. What a
            tracer has to say of a value that it does not know is left as it is.
        Exception: What the schedule raises, with a note that tells which one it was.
    """
    given = count.detach().clone()
    if transforms.tracing():
        return schedule(given)
    try:
        return schedule(given)
    except Exception as error:
        if isinstance(error, RuntimeError) and not transforms.readable():
            raise RuntimeError(
                f"{name}={short(schedule)} failed under vmap, where the count is that of many "
                f"members: no schedule can decide by its value, as by `if count < 10`, nor read "
                f"it, as by float(count). Write torch.where(count < 10, a, b) and other functions "
                f"of torch, or take funcopt.schedules.Piecewise or Join. What it failed with is "
                f"above."
            ) from error
        error.add_note(
            f"It was raised by the schedule {name}={short(schedule)}, called with the "
            f"count of updates."
        )
        raise


_FLOAT = frozenset((float,))
_INTEGERS = frozenset((torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8))


def number_at(own: Hyperparam, given: Number | Schedule, count: Tree) -> Number:
    """Return the number that a hyperparameter is after so many updates.

    The count is a tensor if a schedule was given. A hyperparameter is as `normalize` keeps it.

    Raises:
        TypeError: If a schedule returns no number.
        ValueError: If the number is out of range, as far as it can be read without waiting, or
            stacked.
    """
    if isinstance(given, (float, int, Tensor)):
        return _checked(own, given)
    return _from_schedule(own, given, count)


_COUNTS = frozenset((torch.float64, torch.float32, torch.int64, torch.int32))


def check_count(leaf: Any, path: Callable[[], str]) -> None:
    """Refuse what cannot be a count of updates."""
    if not isinstance(leaf, Tensor) or not is_dense(leaf) or leaf.dtype not in _COUNTS:
        raise TypeError(
            f"{path()} is {kind_of(leaf)}: the count must be a tensor of shape () that can count "
            f"far, in float64 as init() makes it, or in float32, int32 or int64."
        )
    if leaf.ndim != 0:
        raise ValueError(
            f"{path()} has shape {tuple(leaf.shape)}: the count must have shape (). A state that "
            f"vmap(init) made belongs to vmap(update)."
        )


def has_schedule(opt: Any) -> bool:
    """Whether one of the hyperparameters of a wrapper is a schedule."""
    return any(not isinstance(own.of(opt), (float, int, Tensor)) for own in opt.hyperparams)


def numbers_of(opt: Any, step: Tree) -> dict[str, Number]:
    """Return what the hyperparameters of a wrapper are at an update, by name.

    Args:
        opt: The wrapper.
        step: The count of updates in its state, or `()` if there is none.

    Raises:
        TypeError: As `number_at`.
        ValueError: As `number_at`, or if there is a schedule and no count.
    """
    if isinstance(step, Tensor):
        check_count(step, lambda: "state.step")
    numbers = {}
    for own in opt.hyperparams:
        given = own.of(opt)
        if not isinstance(given, (float, int)):
            if not isinstance(given, Tensor) and not isinstance(step, Tensor):
                raise ValueError(
                    f"{own.path} is a schedule, and the state has no count to call it with: "
                    f"state.step is {step!r}. Make the state with init() of this optimizer, or let "
                    f"it count from here: "
                    f"state._replace(step=torch.zeros((), dtype=torch.float64))."
                )
            given = number_at(own, given, step)
        numbers[own.name] = given
    return numbers


def numbers_at(
    rule: UpdateRule,
    opt: Any,
    olds: Sequence[Tensor],
    news: Sequence[Number],
    key: Number = 0.0,
) -> list[Any]:
    """Return the numbers of an update for each count of updates.

    Schedules go by the counts before the update. Leaves that share one after it share the numbers.
    That the counts are counts is for `check_counts`. `key` is that of random bits.
    """
    given = rule.setup_of(opt).numbers
    if given is not None:
        if len(news) == 1 or not _FLOAT.issuperset(map(type, news)):
            return [rule.numbers(detached(new), *given, key) for new in news]
        shared = {new: rule.numbers(new, *given, key) for new in dict.fromkeys(news)}
        return [shared[new] for new in news]
    pairs = list(zip(rule.hyperparams, rule.hyperparams_of(opt), strict=True))
    for own, number in pairs:
        if isinstance(number, Tensor):
            _checked(own, number)  # once, however many counts there are
    return [
        rule.numbers(
            detached(new),
            *(
                n if isinstance(n, (float, Tensor, *TREES)) else _from_schedule(own, n, old)
                for own, n in pairs
            ),
            key,
        )
        for old, new in zip(olds, news, strict=True)
    ]


def with_grad_scale(numbers: list[Any], grad_scale: Tensor | None) -> list[Any]:
    """Return the numbers with one that gradients are multiplied by; None is 1."""
    if grad_scale is None:
        return numbers
    value = float(grad_scale.item()) if transforms.on_host(grad_scale) else grad_scale
    shared = {id(own): own._replace(grad_scale=value) for own in numbers}
    return [shared[id(own)] for own in numbers]


def detached(number: Number) -> Number:
    """Return a number without a derivative: none flows through how often was counted, say.

    It is asked of none whether it has one: in forward mode it does not require a gradient.
    """
    return number.detach() if isinstance(number, Tensor) else number


def check_counts(counts: Sequence[Number]) -> None:
    """Refuse counts after an update that cannot be, as far as they can be read without waiting."""
    for count in dict.fromkeys(counts) if len(counts) > 1 else counts:
        if isinstance(count, Tensor):
            check_values(_STEP, count)
        elif not 1.0 <= count < math.inf:
            check_number(_STEP, count)


_STEP = Hyperparam(
    "step",
    Range("must be finite and count the updates from 1", lambda value: 1.0 <= value < math.inf),
)


def _from_schedule(own: Hyperparam, schedule: Schedule, count: Tensor) -> Number:
    value: Any = call_schedule(own.path, schedule, count)
    if isinstance(value, Tensor) and value.dtype in _INTEGERS:  # as of torch.where(count < 9, 4, 8)
        value = value.to(torch.float64)
    number: Number = normalize(own, value, source=" from its schedule")
    check_zero_dim(own.path, number)
    return number


def _checked(own: Hyperparam, number: Number) -> Number:
    check_zero_dim(own.path, number)
    if isinstance(number, Tensor):
        check_values(own, number)
    return number
