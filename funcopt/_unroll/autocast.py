"""Autocast as it was when steps were made first, for the time when they are made again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeAlias, TypeVar

import torch

from .._core import transforms

P = ParamSpec("P")
R = TypeVar("R")

Autocast: TypeAlias = tuple[tuple[str, torch.dtype], ...]
"""The devices on which it is on, and to which dtype it casts there."""

_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla")


def now() -> Autocast:
    """Return how autocast is in this thread."""
    if not transforms.autocasting():
        return ()
    on = filter(torch.is_autocast_enabled, _DEVICES)
    return tuple((device, torch.get_autocast_dtype(device)) for device in on)


def call(then: Autocast, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function with autocast as it was then."""
    if now() == then:
        return function(*args, **kwargs)
    with ExitStack() as stack:
        for device, _ in now():
            stack.enter_context(torch.autocast(device, enabled=False))
        for device, dtype in then:
            stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
        return function(*args, **kwargs)
