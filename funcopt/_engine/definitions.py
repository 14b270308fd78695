"""What a class must be to become an optimizer: asked when it is defined, not at an update."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from .._core.types import Hyperparam
from .rule import UpdateRule


def check_definition(cls: type[Any]) -> None:
    """Refuse a class that is no frozen dataclass, or whose hyperparameters name no field of it.

    Raises:
        TypeError: If it is none, or if they do; the message says what to write.
    """
    name = cls.__name__
    if not dataclasses.is_dataclass(cls):
        raise TypeError(
            f"{name} is no dataclass: register_optimizer takes a frozen dataclass, whose fields "
            f"are the hyperparameters. Write @dataclass(frozen=True) above the class, and "
            f"@extend.register_optimizer above that."
        )
    parameters: Any = cls.__dict__.get("__dataclass_params__", None)
    if parameters is not None and not parameters.frozen:
        raise TypeError(
            f"{name} is a dataclass that is not frozen: an optimizer is a value, which never "
            f"changes, and by which updates are remembered. Write @dataclass(frozen=True)."
        )
    fields = [field.name for field in dataclasses.fields(cls)]
    for own in _hyperparams_of(cls):
        field, _ = own.place
        if field not in fields:
            has = f"has the fields {', '.join(fields)}" if fields else "has no fields"
            raise TypeError(
                f"{name} has Hyperparam({own.name!r}), for which there is no field {field!r}: it "
                f"{has}. Give it that field, or name the one that holds the number, as "
                f"Hyperparam({own.name!r}, ..., field='betas[0]') does."
            )


def _hyperparams_of(cls: type[Any]) -> Iterable[Hyperparam]:
    """Return those of its rule, or those that a wrapper names; none if neither is known yet."""
    rule = cls.__dict__.get("rule")
    own = rule.hyperparams if isinstance(rule, UpdateRule) else cls.__dict__.get("hyperparams")
    return own if isinstance(own, tuple) else ()
