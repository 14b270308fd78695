"""What a hyperparameter may be: the one table of ranges, and the messages that quote it."""

from __future__ import annotations

import inspect
import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import transforms
from .checks import is_dense, shown_layout
from .types import Number

__all__ = [
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

_AT_LEAST_ZERO = "must be finite and at least 0", lambda value: 0.0 <= value < math.inf
_ABOVE_ZERO = "must be finite and above 0", lambda value: 0.0 < value < math.inf
_BELOW_ONE = "must be at least 0 and below 1", lambda value: 0.0 <= value < 1.0

_RULES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": _AT_LEAST_ZERO,
    "betas[0]": _BELOW_ONE,
    "betas[1]": _BELOW_ONE,
    "eps": _AT_LEAST_ZERO,
    "weight_decay": _AT_LEAST_ZERO,
    "max_norm": _AT_LEAST_ZERO,
    "max_value": _AT_LEAST_ZERO,
    "decay": _BELOW_ONE,
    "alpha": ("must be at least 0 and at most 1", lambda value: 0.0 <= value <= 1.0),
    "clipping": _AT_LEAST_ZERO,
    "norm_type": (
        "must be above 0 (infinity takes the largest)",
        lambda value: value > 0.0,
    ),
    "every": (
        "must be a whole number of at least 1",
        lambda value: 1.0 <= value < math.inf and value == int(value),
    ),
    "max_consecutive": (
        "must be a whole number of at least 0, or infinite (never let one through)",
        lambda value: value == math.inf or (0.0 <= value < math.inf and value == int(value)),
    ),
    "init_scale": (
        "must be at least 2**-126 and at most 2**127, as float32 holds it",
        lambda value: 2.0**-126 <= value <= 2.0**127,
    ),
    "growth_factor": ("must be finite and above 1", lambda value: 1.0 < value < math.inf),
    "backoff_factor": ("must be above 0 and below 1", lambda value: 0.0 < value < 1.0),
    "growth_interval": (
        "must be a whole number of at least 1",
        lambda value: 1.0 <= value < math.inf and value == int(value),
    ),
    "step": ("must be finite and count the updates from 1", lambda value: 1.0 <= value < math.inf),
    "outer_lr": _AT_LEAST_ZERO,
    "outer_momentum": _BELOW_ONE,
    # Of schedules.
    "value": _AT_LEAST_ZERO,
    "start": _AT_LEAST_ZERO,
    "peak": _AT_LEAST_ZERO,
    "end": _AT_LEAST_ZERO,
    "steps": _ABOVE_ZERO,
    "warmup_steps": _AT_LEAST_ZERO,
    "decay_steps": _AT_LEAST_ZERO,
    "power": _ABOVE_ZERO,
    "rate": ("must be above 0 and at most 1", lambda value: 0.0 < value <= 1.0),
    "pct_start": ("must be above 0 and at most 1", lambda value: 0.0 < value <= 1.0),
    "div_factor": _ABOVE_ZERO,
    "final_div_factor": _ABOVE_ZERO,
    "base_momentum": _BELOW_ONE,
    "max_momentum": _BELOW_ONE,
    "values": _AT_LEAST_ZERO,
    "boundaries": _ABOVE_ZERO,
}

# Those that count something.
_WHOLE = frozenset(("every", "max_consecutive", "growth_interval"))


def check_number(name: str, value: float, source: str = "") -> float:
    """Return `value` if it is in the range of this hyperparameter; a NaN is in no range."""
    rule, holds = _RULES.get(name) or _RULES[name.partition("[")[0]]
    if not holds(value):
        raise ValueError(f"{name}={value}{source}: {name} {rule}.")
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


def normalize(name: str, value: Any, *, schedule: bool = False, source: str = "") -> Any:
    """Return a hyperparameter as it is kept: a float, a tensor or a schedule.

    Args:
        name: The hyperparameter, as its range is listed and as messages call it.
        value: A real number, a floating-point tensor, or a schedule. A tensor that is to be mapped
            over by vmap may still have the mapped dimension here.
        schedule: Whether a callable is allowed.
        source: Where the value came from, for the message.

    Raises:
        TypeError: If `value` is of another type.
        ValueError: If it is out of range. The elements of a tensor are checked too, unless they
            are traced, or on a device whose queue reading them would stall.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return check_number(name, _as_float(value), source)
    if isinstance(value, Tensor):
        _check_tensor(name, value, source)
        return value
    if schedule and callable(value) and not isinstance(value, torch.nn.Module):
        _check_schedule(name, value)
        return value
    kinds = "a number, a 0-dim tensor or a schedule" if schedule else "a number or a 0-dim tensor"
    hint = _hint(name, value, parameters=schedule and name == "lr")
    raise TypeError(
        f"{name}={short(value)}{source}: must be {kinds}, not {type(value).__name__}.{hint}"
    )


def normalize_fields(opt: object, *names: str) -> None:
    """Let these fields of a frozen dataclass be as `normalize` keeps them, schedules too.

    Whole numbers, which have no fraction by their range, are shown as such.
    """
    for name in names:
        kept = normalize(name, getattr(opt, name), schedule=True)
        whole = name in _WHOLE and isinstance(kept, float) and kept < math.inf
        object.__setattr__(opt, name, int(kept) if whole else kept)


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


def _hint(name: str, value: object, *, parameters: bool) -> str:
    """Return what to do with several numbers, or with parameters where torch takes them.

    Args:
        name: The hyperparameter.
        value: What was given for it.
        parameters: Whether parameters may have been meant.
    """
    if isinstance(value, str):
        return ""
    parts = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(parts, Sequence) and len(parts) > 0:
        if all(map(_is_one_number, parts)):
            return _GROUPS.format(name) + ("" if isinstance(value, Mapping) else _MEMBERS)
        if all(isinstance(part, Mapping) and "params" in part for part in parts):
            return _GROUPS.format("options")
    if (
        parameters
        and name == "lr"
        and isinstance(value, (Mapping, Sequence, Iterator, torch.nn.Module))
    ):
        return " Parameters are given to init(): opt = AdamW(lr=1e-3); state = opt.init(params)."
    return ""


_GROUPS = (
    " Give each group of leaves {} of its own by an optimizer of its own: "
    "Partition({{'body': AdamW(...), 'head': AdamW(...)}}, labels)."
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


def _check_tensor(name: str, value: Tensor, source: str) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{name} is a tensor of {value.dtype}: give it a floating-point dtype.")
    _check_dense(name, value)
    check_values(name, value, f"{source} in a tensor of shape {tuple(value.shape)}")


def check_values(name: str, value: Tensor, source: str = "") -> None:
    """Refuse a tensor with an element out of range, if its elements can be read without waiting."""
    values = transforms.values_at_hand(value) or ()
    for element in dict.fromkeys(values) if len(values) > 1 else values:
        check_number(name, element, source)


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
