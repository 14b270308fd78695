"""Fresh memory for large tensors, in large pages.

Fresh memory is handed out by the operating system page by page, as each is first touched, and
touching a gigabyte of 4 KiB pages takes as long as the step itself. Linux hands it out in pages of
2 MiB if it is told that a range should have them. That is said here of the range of one tensor, of
those so large that malloc maps them from the system by themselves and gives them back when they
are freed, so that nobody else's memory is affected. Where it cannot be said, nothing is.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

__all__ = ["copies_of", "copy_of", "is_mapped"]

# The size from which on malloc always maps a block by itself, whatever it has learnt.
_MAPPED = 32 << 20


def is_mapped(tensor: Tensor) -> bool:
    """Whether fresh memory of this size comes from the system, and costs what that costs."""
    return tensor.nbytes >= _MAPPED and tensor.device.type == "cpu"


def copies_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of tensors, in the same layout."""
    return [copy_of(tensor) if is_mapped(tensor) else tensor.clone() for tensor in tensors]


def copy_of(tensor: Tensor) -> Tensor:
    """Return a copy of a large tensor, in the same layout."""
    copy = torch.empty_like(tensor)
    advise = _advise()
    if advise is not None:
        page = mmap.PAGESIZE
        start = -(-copy.data_ptr() // page) * page
        end = (copy.data_ptr() + copy.nbytes) // page * page
        advise(start, end - start, mmap.MADV_HUGEPAGE)
    return copy.copy_(tensor)


@cache
def _advise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        madvise = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):  # pragma: no cover
        return None
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise
