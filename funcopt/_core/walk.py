"""A walk through states and optimizers: every part of a tree, by the steps that lead to it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .types import Optimizer


class Step(NamedTuple):
    """One step into a tree: to a field, or to an item."""

    key: Any
    is_field: bool


class Place(NamedTuple):
    """A part of a tree, and the steps that lead to it."""

    steps: tuple[Step, ...]
    value: Any

    def matches(self, what: str | type) -> bool:
        """Whether this is what is asked for."""
        if not isinstance(what, str):
            return isinstance(self.value, what)
        return self.is_field and bool(self.steps[-1].key == what)

    @property
    def is_field(self) -> bool:
        """Whether this is a field of something."""
        return bool(self.steps) and self.steps[-1].is_field

    @property
    def has_fields(self) -> bool:
        """Whether this has fields itself."""
        return any(step.is_field for step, _ in children(self.value))

    def is_within(self, part: str) -> bool:
        """Whether this is in the part of that path, or of that label."""
        if part == "":
            return True
        return any(
            (not step.is_field and isinstance(step.key, str) and step.key == part)
            or text(self.steps[: index + 1]) == part
            for index, step in enumerate(self.steps)
        )


def text(steps: Sequence[Step]) -> str:
    """Return the expression that follows these steps."""
    parts = [f".{step.key}" if step.is_field else f"[{step.key!r}]" for step in steps]
    return "".join(parts).removeprefix(".")


def children(node: Any) -> list[tuple[Step, Any]]:
    """Return what is in a node; nothing if it is none."""
    if isinstance(node, Tensor):
        return []
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        fields = zip(node._fields, node, strict=True)
        # A wrapper that would count for a schedule, and has none, has () for its count.
        return [
            (Step(name, True), value)
            for name, value in fields
            if not (name == "step" and isinstance(value, tuple) and value == ())
        ]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [field.name for field in dataclasses.fields(node) if field.init]
        return [(Step(name, True), getattr(node, name)) for name in names]
    if isinstance(node, Mapping):
        return [(Step(key, False), value) for key, value in node.items()]
    if isinstance(node, (list, tuple)):
        return [(Step(index, False), value) for index, value in enumerate(node)]
    return []


def walk(node: Any, steps: tuple[Step, ...]) -> Iterator[Place]:
    """Yield a tree and all its parts, each before what is in it."""
    yield Place(steps, node)
    for step, child in children(node):
        yield from walk(child, (*steps, step))


class Change(NamedTuple):
    """What a part of a tree is to be."""

    value: Any


def edited(
    place: Place, in_optimizer: bool, change: Callable[[Place, bool], Change | None]
) -> Change | None:
    """Return what a tree is to be, its parts changed from within; None if nothing changes.

    What a part is to be comes from its place, and whether that is in an optimizer; None leaves it.
    """
    news = {}
    for step, child in children(place.value):
        # To ask whether something has the methods of an optimizer takes long.
        inside = in_optimizer or (not isinstance(child, Tensor) and isinstance(child, Optimizer))
        new = edited(Place((*place.steps, step), child), inside, change)
        if new is not None:
            news[step.key] = new.value
    node = with_children(place.value, news) if news else place.value
    own = change(Place(place.steps, node), in_optimizer)
    return Change(node) if own is None and news else own


def with_children(node: Any, news: dict[Any, Any]) -> Any:
    """Return a node with some of what is in it replaced."""
    if isinstance(node, tuple) and hasattr(node, "_asdict"):
        return type(node)(**{**node._asdict(), **news})
    if type(node) is dict:
        return {**node, **news}
    if isinstance(node, MutableMapping):
        items = copy.copy(node)  # which keeps what a defaultdict, say, has besides
        items.update(news)
        return items
    if isinstance(node, Mapping):
        build: Any = type(node)
        return build({**node, **news})
    if isinstance(node, (list, tuple)):
        return type(node)(news.get(index, value) for index, value in enumerate(node))
    return dataclasses.replace(node, **news)
