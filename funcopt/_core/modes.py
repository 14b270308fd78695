"""Modes of this thread, turned off for the length of a call and put back whatever ends it."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from itertools import repeat
from typing import Any, ParamSpec, TypeVar

import torch

from .transforms import compiling, tracing

__all__ = [
    "autocasting",
    "outside_autocast",
    "outside_inference_mode",
    "restoring",
    "set_grad_enabled",
    "uncompiled",
    "without_autocast",
    "without_gradients",
]

P = ParamSpec("P")
R = TypeVar("R")

# Functions in C, so that an interrupt (Ctrl-C) comes before or after, and finds them done or not.
# Torch's context managers are written in Python: one that is interrupted leaves what it changed.
set_grad_enabled = torch._C._set_grad_enabled
outside_inference_mode = functools.partial(torch._C._InferenceMode, False)


def without_gradients(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function under `no_grad`, to enter which takes longer than to move a small leaf."""
    enabled = torch.is_grad_enabled()
    try:
        set_grad_enabled(False)
        return function(*args, **kwargs)
    finally:
        set_grad_enabled(enabled)


def restoring(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function leave the thread's gradient mode as it was, also where it is interrupted."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if compiling():
            return function(*args, **kwargs)
        enabled = torch.is_grad_enabled()
        try:
            return function(*args, **kwargs)
        except BaseException:
            set_grad_enabled(enabled)
            raise

    return call


def uncompiled(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function outside of the graph that is being compiled, which breaks there."""
    result: R = _uncompiled(function, *args, **kwargs)
    return result


_disable: Any = torch.compiler.disable  # which torch leaves untyped
_uncompiled = _disable(
    lambda function, *args, **kwargs: function(*args, **kwargs),
    reason="An update of many leaves takes longer to compile than it gains, since its kernels are "
    "compiled already; one of DTensors, or one that sends something, cannot be compiled. Compile "
    "without fullgraph=True, or leave the update outside.",
)


def _any_autocast() -> bool:
    return any(map(torch.is_autocast_enabled, _AUTOCAST_DEVICES))


_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla")

# Whether operators cast what they are given, on any device, in this thread. One private question
# takes a tenth of a microsecond, the public one for each device a whole one.
autocasting: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", _any_autocast)


def without_autocast(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function with autocast turned off, on whatever devices it is on.

    Autocast is for a loss. Operators such as `torch.cat` cast under it, or refuse a 16-bit dtype
    that is not its own, where an update has to keep the dtypes of its leaves.
    """
    devices = [device for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]
    if devices and tracing():  # by who knows the context manager
        with torch.autocast(devices[0], enabled=False):
            return without_autocast(function, *args, **kwargs)
    put_back = map(torch.set_autocast_enabled, devices, repeat(True))
    try:
        for device in devices:
            torch.set_autocast_enabled(device, False)
        return function(*args, **kwargs)
    finally:
        deque(put_back, 0)  # all in one call of C, which no interrupt divides


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function be called with autocast turned off, whether or not it is on."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if autocasting():
            return without_autocast(function, *args, **kwargs)
        return function(*args, **kwargs)

    return call
