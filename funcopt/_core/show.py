"""How optimizers and states show themselves: by what is not the default, and by shapes."""

from __future__ import annotations

import dataclasses
import html
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_MOST_NUMBERS = 16  # of a tensor that is shown by its numbers
_MOST_ENTRIES = 8  # of a dict, list or tuple


def let_optimizers_show(cls: Any) -> None:
    """Give a dataclass a `__repr__` that names what is not the default, unless it has its own."""
    code = getattr(getattr(cls.__repr__, "__wrapped__", None), "__code__", None)
    if code is not None and code.co_filename == "<string>":  # which dataclasses made
        cls.__repr__ = show_optimizer


def let_states_show(cls: Any) -> None:
    """Let a NamedTuple show shapes, and torch load it without asking what it is."""
    cls.__repr__, cls._repr_html_ = show, _table
    torch.serialization.add_safe_globals([cls])


def show_optimizer(opt: Any) -> str:
    """Return the call that makes an optimizer, with what differs from the default."""
    parts = []
    for field in dataclasses.fields(opt):
        value = getattr(opt, field.name)
        if field.repr and not _is_default(value, field):
            parts.append(show(value) if field.name == "inner" else f"{field.name}={show(value)}")
    return f"{type(opt).__name__}({', '.join(parts)})"


def _is_default(value: Any, field: dataclasses.Field[Any]) -> bool:
    if field.default is not dataclasses.MISSING:
        return _is_same(value, field.default)
    if field.default_factory is not dataclasses.MISSING:
        return _is_same(value, field.default_factory())
    return False


def _is_same(value: Any, default: Any) -> bool:
    if isinstance(value, tuple) and isinstance(default, tuple):
        return len(value) == len(default) and all(map(_is_same, value, default))
    return type(value) is type(default) and not isinstance(value, Tensor) and value == default


def show(value: Any) -> str:
    """Return what is written of a value: a large tensor by its shape, a long tree by its begin."""
    if isinstance(value, Tensor):
        return _show_tensor(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = zip(value._fields, value, strict=True)
        return f"{type(value).__name__}({', '.join(f'{name}={show(own)}' for name, own in fields)})"
    if type(value) in (dict, OrderedDict):
        listed = "{" + _listed(f"{key!r}: {show(own)}" for key, own in value.items()) + "}"
        return listed if type(value) is dict else f"OrderedDict({listed})"
    if type(value) is list:
        return "[" + _listed(map(show, value)) + "]"
    if type(value) is tuple and value:
        return "(" + _listed(map(show, value)) + ("," if len(value) == 1 else "") + ")"
    return repr(value)


def _listed(parts: Iterator[str]) -> str:
    listed = list(parts)
    if len(listed) > _MOST_ENTRIES + 1:  # to say that there is one more is no shorter than it
        more = len(listed) - _MOST_ENTRIES
        listed = [*listed[:_MOST_ENTRIES], f"... {more} more"]
    return ", ".join(listed)


def _show_tensor(tensor: Tensor) -> str:
    if tensor.numel() <= _MOST_NUMBERS:
        return repr(tensor)
    kind = "" if type(tensor) is Tensor else f"{type(tensor).__name__} "
    place = "" if tensor.device.type == "cpu" else f" on {tensor.device}"
    return f"{kind}{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}{place}"


def _table(state: Any) -> str:
    """Return a table for notebooks: what each field holds, and how much memory it takes."""
    rows = [_row(name, own) for name, own in zip(state._fields, state, strict=True)]
    rows.append(_row("all", tuple(state)))
    head = "".join(f"<th>{name}</th>" for name in ("", "tensors", "elements", "dtypes", "bytes"))
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    title = html.escape(type(state).__name__)
    return f"<table><caption>{title}</caption><tr>{head}</tr>{body}</table>"


def _row(name: str, tree: Any) -> tuple[str, ...]:
    tensors = list(_tensors_in(tree))
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    elements = sum(tensor.numel() for tensor in tensors)
    taken = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    cells = (name, f"{len(tensors):,}", f"{elements:,}", ", ".join(dtypes), f"{taken:,}")
    return tuple(map(html.escape, cells))


def _tensors_in(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for own in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors_in(own)
