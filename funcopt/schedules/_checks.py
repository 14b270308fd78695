"""What the numbers of a schedule may be, and the messages that say so."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from .._core.types import ABOVE_ZERO, AT_LEAST_ZERO, BELOW_ONE, SHARE, Hyperparam, Number, Range
from .._engine.hyperparameters import check_flag, elements_at_hand, normalize

_NAMES: dict[Range, tuple[str, ...]] = {
    AT_LEAST_ZERO: ("value", "values", "start", "peak", "end", "warmup_steps", "decay_steps"),
    ABOVE_ZERO: ("steps", "boundaries", "power", "div_factor", "final_div_factor"),
    BELOW_ONE: ("base_momentum", "max_momentum"),
    SHARE: ("rate", "pct_start"),
}
_RANGES = {name: span for span, names in _NAMES.items() for name in names}
_COUNTS = ("steps", "warmup_steps", "decay_steps", "boundaries")
_FLAGS = ("staircase", "three_phase")


def check_fields(schedule: object) -> None:
    """Check flags, numbers and sequences of numbers, and keep numbers as floats and tensors.

    Counts of updates that are integers stay integers.
    """
    for name, value in list(vars(schedule).items()):
        if name in _FLAGS:
            check_flag(name, value)
        elif name in _RANGES:
            own = Hyperparam(name, _RANGES[name])
            kept: Any
            if isinstance(value, tuple | list):
                each = (own._replace(name=f"{name}[{i}]") for i in range(len(value)))
                kept = tuple(map(_kept, each, value))
            else:
                kept = _kept(own, value)
            object.__setattr__(schedule, name, kept)


def _kept(own: Hyperparam, value: Any) -> Any:
    checked = normalize(own, value)
    return value if own.name.startswith(_COUNTS) and isinstance(value, int) else checked


def check_together(
    numbers: Sequence[Number], holds: Callable[..., bool | Tensor], message: str
) -> None:
    """Refuse numbers that do not go together, if they can be read and are not stacked apart.

    `holds` is called with them, and tells it for each member if they are stacked. The message is a
    format, which they fill in.
    """
    tensors = [number for number in numbers if isinstance(number, Tensor)]
    if not all(map(elements_at_hand, tensors)):
        return
    if len({tensor.shape for tensor in tensors if tensor.ndim}) > 1:
        return  # stacked for two vmaps, one within the other
    held = holds(*numbers)
    if not (bool(held.all()) if isinstance(held, Tensor) else held):
        raise ValueError(message.format(*numbers))


def check_pieces(schedule: object, name: str) -> None:
    """Check all fields, and that ascending boundaries lie between as many pieces, all in tuples."""
    for field in (name, "boundaries"):
        if not isinstance(getattr(schedule, field), tuple | list):
            raise TypeError(f"{field}={getattr(schedule, field)!r}: must be a tuple.")
        object.__setattr__(schedule, field, tuple(getattr(schedule, field)))
    check_fields(schedule)
    pieces, boundaries = getattr(schedule, name), vars(schedule)["boundaries"]
    if len(pieces) != len(boundaries) + 1:
        raise ValueError(
            f"{len(pieces)} {name} for {len(boundaries)} boundaries: there must be one more than "
            f"boundaries. The first is there from step 0, and needs none."
        )
    for index, pair in enumerate(pairwise(boundaries), 1):
        check_together(
            pair,
            lambda low, high: low < high,
            f"boundaries[{index}]={{1}}: must be above boundaries[{index - 1}]={{0}}. Sort them, "
            f"with their {name}.",
        )


def check_step(step: Any) -> None:
    """Refuse what is no number or counts nothing. A tensor is not read."""
    if not isinstance(step, numbers.Real | Tensor):
        raise TypeError(
            f"step is of type {type(step).__name__}: must be a number or a tensor. For the values "
            f"at many steps give a tensor of them, such as torch.arange(10), or torch.as_tensor() "
            f"of what there is."
        )
    number: Any = step
    if not isinstance(number, Tensor) and not 0 <= number < math.inf:
        raise ValueError(
            f"step={step}: must be finite and at least 0. A schedule is asked for the value after "
            f"so many updates."
        )
