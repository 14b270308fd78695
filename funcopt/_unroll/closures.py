"""What a function closes over: the tensors through which a derivative or members come in.

A function that is made again later must be given these anew, as it is given its arguments; else
their derivative would be zero without a word. So they are looked for in all that the function can
reach by plain Python: cells, defaults, globals that its code names, partials, methods, containers,
dataclasses such as optimizers, modules and other objects with attributes. A copy of these is made
around the tensors that are given, and whatever reaches none of them is shared.

Random generators are found likewise, since a function that is made again must draw the same.
"""

from __future__ import annotations

import copy
import dataclasses
import dis
import io
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import transforms


class Closure(NamedTuple):
    """What a function reaches besides its arguments."""

    tensors: list[Tensor]
    generators: list[torch.Generator]
    rebuild: Callable[[Sequence[Tensor]], Callable[..., Any]]  # the function around other tensors


def closure_of(function: Callable[..., Any], name: str) -> Closure:
    """Find the tensors that carry a derivative or members, and the generators.

    Raises:
        ValueError: If the function reads an iterator, which is named by its path from `name`.
    """
    walk = _Walk()
    walk.visit(function, name)
    changed = walk.around_tensors()

    def rebuild(tensors: Sequence[Tensor]) -> Callable[..., Any]:
        if not tensors:
            return function
        made: dict[int, Any] = dict(zip(map(id, walk.tensors), tensors, strict=True))
        return _Copy(changed, made).of(function)  # type: ignore[no-any-return]

    return Closure(walk.tensors, walk.generators, rebuild)


class _Walk:
    """All that is reached from one object, each part once."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.generators: list[torch.Generator] = []
        self._seen: dict[int, Any] = {}  # which keeps what was made on the way, and so its id
        self._holders: dict[int, list[int]] = {}

    def visit(self, root: Any, name: str) -> None:
        pending = [(root, name)]
        self._seen[id(root)] = root
        while pending:
            holder, path = pending.pop()
            self._note(holder, path)
            for label, part in _parts(holder).items():
                self._holders.setdefault(id(part), []).append(id(holder))
                if id(part) not in self._seen:
                    self._seen[id(part)] = part
                    pending.append((part, path + label.shown))

    def _note(self, part: Any, path: str) -> None:
        if isinstance(part, Tensor):
            if part.requires_grad or transforms.beneath(part) is not None:
                self.tensors.append(part)
        elif isinstance(part, torch.Generator):
            self.generators.append(part)
        elif isinstance(part, Iterator) and not isinstance(part, io.IOBase):
            raise ValueError(
                f"{path} is {type(part).__name__}, an iterator, which would give other values when "
                f"steps are made again for the derivative. Give a list or a tensor, and take "
                f"what step i needs by its index."
            )

    def around_tensors(self) -> set[int]:
        """Return which of the parts reach one of the tensors."""
        found: set[int] = set()
        pending = list(map(id, self.tensors))
        while pending:
            for holder in self._holders.get(pending.pop(), ()):
                if holder not in found:
                    found.add(holder)
                    pending.append(holder)
        return found


class _Copy:
    """Copies of the parts that reach a tensor, each made once, around other tensors."""

    def __init__(self, changed: set[int], made: dict[int, Any]) -> None:
        self._changed, self._made = changed, made

    def of(self, part: Any) -> Any:
        if id(part) in self._made:
            return self._made[id(part)]
        if id(part) not in self._changed:
            return part
        own: Any = _empty_copy(part, self._has_own_globals(part))
        if own is not None:  # before its parts, of which one may lead back to it
            self._made[id(part)] = own
        parts = {label: self.of(child) for label, child in _parts(part).items()}
        own = _filled(part, own, parts)
        self._made[id(part)] = own
        return own

    def _has_own_globals(self, part: Any) -> bool:
        """Whether a function needs globals of its own; else it shares those of its module."""
        return any(
            id(child) in self._made or id(child) in self._changed
            for label, child in _parts(part).items()
            if label.kind == "global"
        )


class _Label(NamedTuple):
    """Where a part is in what holds it, and how that is shown in a path."""

    kind: str
    key: Any
    shown: str


def _parts(holder: Any) -> dict[_Label, Any]:
    """Return what an object holds, by where."""
    if isinstance(holder, types.FunctionType):
        return _parts_of_function(holder)
    if isinstance(holder, (types.MethodType, partial)):
        names = (
            ("__self__", "__func__")
            if isinstance(holder, types.MethodType)
            else ("func", "args", "keywords")
        )
        return {_Label("attribute", name, ""): getattr(holder, name) for name in names}
    if isinstance(holder, dict):
        return {_Label("item", key, f"[{key!r}]"): part for key, part in holder.items()}
    if isinstance(holder, (list, tuple, deque)):
        return {_Label("item", index, f"[{index}]"): part for index, part in enumerate(holder)}
    return {
        _Label("attribute", name, f".{name}"): part
        for name, part in _attributes(holder).items()
        if isinstance(part, (Tensor, torch.Generator)) or not isinstance(part, Iterator)
    }


def _parts_of_function(function: types.FunctionType) -> dict[_Label, Any]:
    found: dict[_Label, Any] = {}
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            found[_Label("cell", name, f": {name}")] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for index, value in enumerate(function.__defaults__ or ()):
        found[_Label("default", index, f": default {index}")] = value
    for name, value in (function.__kwdefaults__ or {}).items():
        found[_Label("keyword", name, f": {name}")] = value
    own = function.__globals__
    if not _is_of_library(own.get("__name__", "")):
        for name in _globals_named(function.__code__):
            if name in own:
                found[_Label("global", name, f": {name}")] = own[name]
    return found


@cache
def _globals_named(code: types.CodeType) -> frozenset[str]:
    """Return the globals that code reads, or the functions within it."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    within = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return frozenset(names.union(*map(_globals_named, within)))


_LIBRARIES = sys.stdlib_module_names | {"funcopt", "matplotlib", "numpy", "optree", "torch"}


def _is_of_library(module: str) -> bool:
    """Whether a module is one whose globals are no tensors of the user."""
    return module != "__main__" and module.partition(".")[0] in _LIBRARIES


def _attributes(holder: Any) -> dict[str, Any]:
    """Return what an object has as attributes; of most objects of libraries, nothing."""
    if isinstance(holder, (type, types.ModuleType, Tensor)):
        return {}
    if dataclasses.is_dataclass(holder):
        names = [field.name for field in dataclasses.fields(holder)]
        return {name: getattr(holder, name) for name in names if hasattr(holder, name)}
    module = type(holder).__module__
    if _is_of_library(module) and not isinstance(holder, torch.nn.Module):
        return vars(holder) if module.startswith("torch.distributions") else {}
    return getattr(holder, "__dict__", {})


def _empty_copy(part: Any, own_globals: bool) -> Any:
    """Return a copy whose parts are put in later; None of what is made with them at once."""
    if isinstance(part, types.FunctionType):
        cells = tuple(types.CellType() for _ in part.__closure__ or ())
        names = dict(part.__globals__) if own_globals else part.__globals__
        own = types.FunctionType(part.__code__, names, part.__name__, None, cells)
        own.__dict__.update(part.__dict__)
        return own
    if isinstance(part, (types.MethodType, partial, tuple)):
        return None
    if isinstance(part, (dict, list, deque)):
        return copy.copy(part)
    own = object.__new__(type(part))
    if not dataclasses.is_dataclass(part):
        own.__dict__.update(part.__dict__)
    return own


def _filled(part: Any, own: Any, parts: dict[_Label, Any]) -> Any:
    """Return the copy with its parts."""
    values = list(parts.values())
    if isinstance(part, types.FunctionType):
        return _filled_function(part, own, parts)
    if isinstance(part, types.MethodType):
        return types.MethodType(values[1], values[0])
    if isinstance(part, partial):
        return type(part)(values[0], *values[1], **values[2])
    if isinstance(part, tuple):
        make = getattr(part, "_make", None)
        return make(values) if make else type(part)(values)
    for label, value in parts.items():
        if label.kind == "item":
            own[label.key] = value
        elif dataclasses.is_dataclass(part):
            object.__setattr__(own, label.key, value)
        else:
            own.__dict__[label.key] = value
    return own


def _filled_function(
    part: types.FunctionType, own: types.FunctionType, parts: dict[_Label, Any]
) -> types.FunctionType:
    cells = dict(zip(part.__code__.co_freevars, own.__closure__ or (), strict=True))
    defaults = list(part.__defaults__ or ())
    keywords = dict(part.__kwdefaults__ or {})
    for label, value in parts.items():
        if label.kind == "cell":
            cells[label.key].cell_contents = value
        elif label.kind == "default":
            defaults[label.key] = value
        elif label.kind == "keyword":
            keywords[label.key] = value
        elif own.__globals__ is not part.__globals__:
            own.__globals__[label.key] = value
    own.__defaults__ = tuple(defaults) or None
    own.__kwdefaults__ = keywords or None
    return own
