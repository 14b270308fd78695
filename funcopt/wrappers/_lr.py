"""Learning rates inside an optimizer, at whatever depth, and the same optimizer with others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .._core import pytree
from .._core.tensors import choose
from .._core.types import TREES, Number, optimizers_in
from .._core.walk import children, with_children
from .._engine.registration import is_registered, register_dataclass
from ._scores import read_all

# What has nothing inside, of which most fields are.
_PLAIN = frozenset((float, int, bool, str, type(None), Tensor))


def learning_rates(node: Any) -> Iterator[Any]:
    """Yield each field that is called lr, in an optimizer or in a schedule of one.

    That of a class of torch is among its hyperparameters, or what the class has by default.
    """
    if _is_class_of_torch(node):
        yield from [] if node.lr is None else [node.lr]
        return
    for step, child in children(node):
        if step.is_field and step.key == "lr":
            yield child
        elif type(child) not in _PLAIN:
            yield from learning_rates(child)


def with_scaled_lr(node: Any, scale: Number, min_lr: Number) -> Any:
    """Return an optimizer with each learning rate times a number, but no lower than a bound.

    A number is a number after that, and so is a tensor, if all can be read at no price; a schedule
    is a schedule. What has none inside is not copied.
    """
    new = _with_scaled_lr(node, scale, min_lr)
    return node if new is None else new


def _with_scaled_lr(node: Any, scale: Number, min_lr: Number) -> Any:
    """Return the same, or None where no learning rate is inside."""
    if _is_class_of_torch(node):
        if node.lr is None:
            return None
        own = {**node.hyperparameters, "lr": _scaled_lr(node.lr, scale, min_lr)}
        return _rebuilt(node, {"hyperparameters": own})
    news = {}
    for step, child in children(node):
        if step.is_field and step.key == "lr":
            news[step.key] = _scaled_lr(child, scale, min_lr)
        elif type(child) not in _PLAIN:
            new = _with_scaled_lr(child, scale, min_lr)
            if new is not None:
                news[step.key] = new
    return _rebuilt(node, news) if news else None


def _is_class_of_torch(node: Any) -> bool:
    """Whether this is what `pure` returns. It is asked in a way that Dynamo can follow."""
    return isinstance(getattr(node, "hyperparameters", None), dict)


def _rebuilt(node: Any, news: dict[Any, Any]) -> Any:
    """Return a node with some of what is in it replaced, all of which was checked before."""
    if not is_registered(node):
        return with_children(node, news)
    new = object.__new__(type(node))
    for field in fields(node):  # as where a transform rebuilds it; Dynamo of 2.11 knows no vars()
        own = news[field.name] if field.name in news else getattr(node, field.name)
        object.__setattr__(new, field.name, own)
    return new


def _scaled_lr(lr: Any, scale: Number, min_lr: Number) -> Any:
    if isinstance(lr, (int, float, Tensor)):
        with torch.enable_grad():  # so that it has a history where the learning rate has one
            return scaled(lr, scale, min_lr)
    if isinstance(lr, TREES):  # of learning rates, one for each leaf
        leaves, structure = pytree.flatten_above(lr, callable)
        return pytree.unflatten(structure, [_scaled_lr(own, scale, min_lr) for own in leaves])
    return ScaledSchedule(lr, scale, min_lr)


def scaled(lr: Number, scale: Number, min_lr: Number) -> Number:
    """Return a learning rate times a number, or the bound if it would be lowered beyond that."""
    given = {"lr": lr, "scale": scale, "min_lr": min_lr}
    lr, scale, min_lr = read_all(given, _place(*given.values())).values()
    product = lr * scale
    return choose(product >= min_lr, product, choose(lr <= min_lr, lr, min_lr))


def _place(*numbers: Number) -> torch.device:
    """Return where to reckon if not on the host: on the GPU if one of the numbers is there."""
    places = [number.device for number in numbers if isinstance(number, Tensor)]
    others = [place for place in places if place.type != "cpu"]
    return next(iter(others or places), torch.device("cpu"))


@register_dataclass
@dataclass(frozen=True)
class ScaledSchedule:
    """A schedule whose values are scaled, but not below a bound."""

    schedule: Callable[[Any], Number]
    scale: Number
    min_lr: Number

    def __call__(self, step: Any) -> Number:
        return scaled(self.schedule(step), self.scale, self.min_lr)


def own_rates(opt: Any) -> list[Any]:
    """Return the learning rates of an optimizer and of those within it, equal numbers once."""
    found = [_own_rate(part) for part in optimizers_in(opt)]
    rates = [rate for rate in found if rate is not None]
    numbers = dict.fromkeys(rate for rate in rates if isinstance(rate, float))
    return [*numbers, *(rate for rate in rates if not isinstance(rate, float))]


def _own_rate(part: Any) -> Any:
    """Return the learning rate of one optimizer itself, None if it has none.

    Of a class of torch it is among its hyperparameters. That of a wrapper is another's.
    """
    return part.lr if _is_class_of_torch(part) else vars(part).get("lr")


def the_rate(wrapper: str, inner: Any) -> Any:
    """Return the learning rate within, by which a wrapper goes, too.

    Raises:
        ValueError: If there is none, or one for each of several groups or leaves.
    """
    rates = own_rates(inner)
    if len(rates) == 1 and not isinstance(rates[0], TREES):
        return rates[0]
    many = f"{len(rates)} learning rates" if len(rates) > 1 else "a learning rate for each leaf"
    raise ValueError(
        f"inner={inner!r} has {many if rates else 'no learning rate'}, where {wrapper} takes the "
        f"one that there is: let it be inside, around each group with an lr of its own."
    )
