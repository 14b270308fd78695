"""One thread for small tensors, for each of which the fused kernel would start a team of threads.

OpenMP keeps the number of threads for each thread that starts a team, so setting it here for the
length of a call, and back, is noticed by no other thread. `torch.set_num_threads` would not do: it
also sets what threads that start later find. Torch has no call for one thread alone, so this asks
the OpenMP runtime that torch loaded; where that cannot be found, nothing is done.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch

__all__ = ["on_one_thread"]

P = ParamSpec("P")
R = TypeVar("R")


def on_one_thread(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function whose operators start no other threads.

    No context manager: in one that is written in Python, an interrupt (Ctrl-C) may come when it has
    changed the number and nobody knows of it yet. Here it finds itself within the `try`.
    """
    set_count, count = _setter(), torch.get_num_threads()
    if set_count is None:
        return function(*args, **kwargs)
    try:
        set_count(1)
        return function(*args, **kwargs)
    finally:
        set_count(count)


@cache
def _setter() -> Callable[[int], object] | None:
    """Find `omp_set_num_threads` of the runtime that torch itself listens to."""
    try:
        set_count: Callable[[int], object] = ctypes.PyDLL(None).omp_set_num_threads
    except (AttributeError, OSError, TypeError):  # pragma: no cover
        return None
    count = torch.get_num_threads()
    try:
        set_count(count + 1)
        heard = torch.get_num_threads() == count + 1
    finally:
        set_count(count)
    return set_count if heard else None
