"""What is wrong with what the equations of a rule returned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor

from .rule import UpdateRule


def refuse_result(rule: UpdateRule, news: Any, olds: Sequence[Tensor]) -> NoReturn:
    """Refuse what the equations of a rule returned for a leaf, where it does not fit.

    Args:
        rule: The rule.
        news: What its equations returned.
        olds: The parameter and the slots that are kept, which it was to replace.

    Raises:
        TypeError: If it is no list of so many tensors.
        ValueError: If one of these has another shape than what it replaces.
    """
    if not isinstance(news, (list, tuple)) or len(news) != len(olds):
        raise TypeError(_message(rule, len(olds), _shown(news)))
    for index, new in enumerate(news):
        if not isinstance(new, Tensor):
            raise TypeError(_message(rule, len(olds), f"{_shown(new)} as number {index}"))
    index = next(i for i, old in enumerate(olds) if news[i].shape != old.shape)
    got = _message(rule, len(olds), f"{_shown(news[index])} as number {index}")
    raise ValueError(
        f"{got} Number {index} must have shape {tuple(olds[index].shape)}, as what it replaces has."
    )


def _message(rule: UpdateRule, count: int, got: str) -> str:
    name = getattr(rule.equations, "__qualname__", repr(rule.equations))
    kept = [slot.name for slot in rule.slots]
    which = f" ({', '.join(kept)})" if len(kept) == count - 1 else ""
    slots = f" and then the new value of each slot that is kept{which}" if count > 1 else ""
    return (
        f"equations {name} of the rule with the state {rule.state.__name__} returned {got}: they "
        f"must return a list of {count} {'tensors' if count > 1 else 'tensor'}, the new "
        f"parameter{slots}, each of the shape of what it replaces."
    )


def _shown(value: Any) -> str:
    """Say what was returned, without numbers from within tensors."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of length {len(value)}"
    return "None" if value is None else f"an object of class {type(value).__name__}"
