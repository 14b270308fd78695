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

import torch

__all__ = ["one_thread"]


class one_thread:  # noqa: N801  # a context manager, as torch.no_grad is one
    """Let operators called within, from this very thread, start no other threads."""

    __slots__ = ("_count",)

    def __enter__(self) -> None:
        """Take one thread, if there are more and they can be counted."""
        self._count = torch.get_num_threads()
        set_count = _setter()
        if set_count is not None:
            set_count(1)

    def __exit__(self, *_: object) -> None:
        """Take as many as before."""
        set_count = _setter()
        if set_count is not None:
            set_count(self._count)


@cache
def _setter() -> Callable[[int], object] | None:
    """Find `omp_set_num_threads` of the runtime that torch itself listens to."""
    try:
        set_count: Callable[[int], object] = ctypes.PyDLL(None).omp_set_num_threads
    except (AttributeError, OSError, TypeError):  # pragma: no cover
        return None
    count = torch.get_num_threads()
    set_count(count + 1)
    heard = torch.get_num_threads() == count + 1
    set_count(count)
    return set_count if heard else None
