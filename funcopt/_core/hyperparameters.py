"""What a hyperparameter may be: the one table of ranges, and the messages that quote it."""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import transforms
from .types import Number, Schedule, is_dense, shown_layout

__all__ = [
    "ABOVE_ZERO",
    "AT_LEAST_ZERO",
    "BELOW_ONE",
    "COUNT",
    "FRACTION",
    "SHARE",
    "Hyperparam",
    "Range",
    "call_schedule",
    "check_choice",
    "check_flag",
    "check_number",
    "check_takes",
    "check_values",
    "check_zero_dim",
    "elements_at_hand",
    "normalize",
    "normalize_fields",
    "short",
]


class Range(NamedTuple):
    """What values a hyperparameter may have."""

    words: str  # as a message says it: "must be ..."
    holds: Callable[[float], bool]  # False for a NaN, which is in no range
    whole: bool = False  # it counts something


AT_LEAST_ZERO = Range("must be finite and at least 0", lambda value: 0.0 <= value < math.inf)
ABOVE_ZERO = Range("must be finite and above 0", lambda value: 0.0 < value < math.inf)
BELOW_ONE = Range("must be at least 0 and below 1", lambda value: 0.0 <= value < 1.0)
FRACTION = Range("must be at least 0 and at most 1", lambda value: 0.0 <= value <= 1.0)
SHARE = Range("must be above 0 and at most 1", lambda value: 0.0 < value <= 1.0)
COUNT = Range(
    "must be a whole number of at least 1",
    lambda value: 1.0 <= value < math.inf and value == int(value),
    whole=True,
)


class Hyperparam(NamedTuple):
    """A number of an optimizer.

    Attributes:
        name: As the equations call it, such as `"beta1"`.
        range: What it may be.
        field: The field of the optimizer that holds it, if that has another name. `"betas[0]"` is
            the first of a pair.
    """

    name: str
    range: Range
    field: str = ""

    @property
    def path(self) -> str:
        """As users and messages call it."""
        return self.field or self.name

    @property
    def place(self) -> tuple[str, int | None]:
        """The field that holds it, and which one of several in there it is."""
        field, _, index = self.path.partition("[")
        return field, int(index[:-1]) if index else None

    def of(self, opt: Any) -> Any:
        """Return what an optimizer was given for it."""
        field, index = self.place
        value = getattr(opt, field)
        return value if index is None else value[index]

    def put(self, opt: Any, value: Any) -> None:
        """Replace what a frozen optimizer was given for it."""
        field, index = self.place
        if index is not None:
            own = getattr(opt, field)
            value = (*own[:index], value, *own[index + 1 :])
        object.__setattr__(opt, field, value)


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

    Args:
        own: The hyperparameter.
        value: A real number, a floating-point tensor, or a schedule. A tensor that is to be mapped
            over by vmap may still have the mapped dimension here.
        schedule: Whether a callable is allowed.
        source: Where the value came from, for the message.
        owner: The class that was given it where parameters might have been meant, for the message.

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
    hint = _hint(name, value, owner)
    raise TypeError(
        f"{name}={short(value)}{source}: must be {kinds}, not {type(value).__name__}.{hint}"
    )


def normalize_fields(opt: object, hyperparams: Iterable[Hyperparam]) -> None:
    """Let these hyperparameters of a frozen dataclass be as `normalize` keeps them, schedules too.

    Whole numbers, which have no fraction by their range, are shown as such.
    """
    dataclass: Any = opt
    first = dataclasses.fields(dataclass)[0].name
    for own in hyperparams:
        owner = type(opt).__name__ if own.path == first else ""
        kept = normalize(own, own.of(opt), schedule=True, owner=owner)
        whole = own.range.whole and isinstance(kept, float) and kept < math.inf
        own.put(opt, int(kept) if whole else kept)


def _check_schedule(name: str, value: Callable[..., Any]) -> None:
    """Refuse what cannot be called with the count of updates, as where an instance was meant."""
    if isinstance(value, type):
        raise TypeError(f"{name} is the class {value.__name__}: give an instance of it.")
    check_takes(name, value, 1, "a schedule is called with the count of updates made so far")


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


def _hint(name: str, value: object, owner: str) -> str:
    """Return what to do with several numbers, or with parameters where torch takes them."""
    if isinstance(value, str):
        return ""
    parts = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(parts, Sequence) and len(parts) > 0:
        if all(map(_is_one_number, parts)):
            return _GROUPS.format(name) + ("" if isinstance(value, Mapping) else _MEMBERS)
        if all(isinstance(part, Mapping) and "params" in part for part in parts):
            return _GROUPS.format("options")
    if owner and isinstance(value, (Mapping, Sequence, Iterator, torch.nn.Module)):
        return f" Parameters are given to init(): opt = {owner}(); state = opt.init(params)."
    return ""


_GROUPS = (
    " Give each group of leaves {} of its own by an optimizer of its own: "
    "Partition({{'body': ..., 'head': ...}}, labels)."
)
_MEMBERS = " For the members of a vmap, give one tensor: torch.tensor([...])."


def _is_one_number(value: object) -> bool:
    """Whether a hyperparameter may be this; a parameter of shape () is none."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and not isinstance(value, torch.nn.Parameter)
    return isinstance(value, numbers.Real) or (
        callable(value) and not isinstance(value, torch.nn.Module)
    )


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


def check_values(own: Hyperparam, value: Tensor, source: str = "") -> None:
    """Refuse a tensor with an element out of range, if its elements can be read without waiting."""
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
    """
    given = count.detach().clone()
    if transforms.readable() or transforms.tracing():
        return schedule(given)
    try:
        return schedule(given)
    except RuntimeError as error:
        raise RuntimeError(
            f"{name}={short(schedule)} failed under vmap, where the count is that of many members: "
            f"no schedule can decide by its value, as by `if count < 10`, nor read it, as by "
            f"float(count). Write torch.where(count < 10, a, b) and other functions of torch, or "
            f"take funcopt.schedules.Piecewise or Join. What it failed with is above."
        ) from error
