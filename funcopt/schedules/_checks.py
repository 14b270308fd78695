"""What the numbers of a schedule may be, and the messages that say so."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .._core.types import Number
from .._engine.hyperparameters import elements_at_hand, normalize
from .._engine.rule import ABOVE_ZERO, AT_LEAST_ZERO, BELOW_ONE, SHARE, Hyperparam, Range

_RANGES: dict[str, Range] = {
    "value": AT_LEAST_ZERO,
    "values": AT_LEAST_ZERO,
    "start": AT_LEAST_ZERO,
    "peak": AT_LEAST_ZERO,
    "end": AT_LEAST_ZERO,
    "steps": ABOVE_ZERO,
    "warmup_steps": AT_LEAST_ZERO,
    "decay_steps": AT_LEAST_ZERO,
    "power": ABOVE_ZERO,
    "rate": SHARE,
    "pct_start": SHARE,
    "div_factor": ABOVE_ZERO,
    "final_div_factor": ABOVE_ZERO,
    "base_momentum": BELOW_ONE,
    "max_momentum": BELOW_ONE,
    "boundaries": ABOVE_ZERO,
}


def check_numbers(schedule: object, *names: str) -> None:
    """Check these fields, numbers or sequences of them, and keep them as floats and tensors.

    Raises:
        TypeError: If one is of another type.
        ValueError: If one is out of its range.
    """
    for name in names:
        value, own = getattr(schedule, name), Hyperparam(name, _RANGES[name])
        if isinstance(value, tuple | list):
            each = (own._replace(name=f"{name}[{i}]") for i in range(len(value)))
            kept: Any = tuple(map(normalize, each, value))
        else:
            kept = normalize(own, value)
        object.__setattr__(schedule, name, kept)


def check_steps(schedule: object, *names: str) -> None:
    """Check these fields as `check_numbers` does, and keep an integer as it is."""
    for name in names:
        given = getattr(schedule, name)
        check_numbers(schedule, name)
        if isinstance(given, int):
            object.__setattr__(schedule, name, given)
        elif isinstance(given, tuple | list):
            checked = getattr(schedule, name)
            kept = (g if isinstance(g, int) else c for g, c in zip(given, checked, strict=True))
            object.__setattr__(schedule, name, tuple(kept))


def check_together(
    numbers: Sequence[Number], holds: Callable[[], bool | Tensor], message: Callable[[], str]
) -> None:
    """Hold numbers against each other, if they can be read and are not stacked apart.

    Args:
        numbers: The numbers.
        holds: Whether they go together, for each member if they are stacked.
        message: What to say if not.

    Raises:
        ValueError: With this message.
    """
    tensors = [number for number in numbers if isinstance(number, Tensor)]
    if not all(map(elements_at_hand, tensors)):
        return
    if len({tensor.shape for tensor in tensors if tensor.ndim}) > 1:
        return  # stacked for two vmaps, one within the other
    held = holds()
    if not (bool(held.all()) if isinstance(held, Tensor) else held):
        raise ValueError(message())


def check_pieces(schedule: object, name: str) -> None:
    """Check that boundaries lie between as many pieces, and ascend; keep both as tuples.

    Raises:
        TypeError: If one is no sequence.
        ValueError: If they do not match, or a boundary comes too early.
    """
    for field in (name, "boundaries"):
        if not isinstance(getattr(schedule, field), tuple | list):
            raise TypeError(f"{field}={getattr(schedule, field)!r}: must be a tuple.")
        object.__setattr__(schedule, field, tuple(getattr(schedule, field)))
    check_steps(schedule, "boundaries")
    pieces, boundaries = getattr(schedule, name), vars(schedule)["boundaries"]
    if len(pieces) != len(boundaries) + 1:
        raise ValueError(
            f"{len(pieces)} {name} for {len(boundaries)} boundaries: there must be one more than "
            f"boundaries. The first is there from step 0, and needs none."
        )
    for index in range(1, len(boundaries)):
        _check_ascent(boundaries, index, name)


def _check_ascent(boundaries: tuple[Number, ...], index: int, name: str) -> None:
    low, high = boundaries[index - 1 : index + 1]
    check_together(
        (low, high),
        lambda: low < high,
        lambda: (
            f"boundaries[{index}]={high}: must be above boundaries[{index - 1}]={low}. Sort them, "
            f"with their {name}."
        ),
    )


def check_step(step: Any) -> None:
    """Refuse what is no number or counts nothing. A tensor is not read.

    Raises:
        TypeError: If it is neither a number nor a tensor.
        ValueError: If it is a number below 0, NaN or infinite.
    """
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
