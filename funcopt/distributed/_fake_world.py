"""A world of any number of processes in which this one is alone: nothing is sent."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.distributed import destroy_process_group, init_process_group, is_initialized
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ._collectives import planned_backend

R = TypeVar("R")

# Private to torch, which tests its own sharding with it. To import it registers a backend whose
# collectives return at once, and leave their results as they are.
_FAKE = "torch.testing._internal.distributed.fake_pg"


def in_fake_world(size: int, rank: int, backend: str, function: Callable[[DeviceMesh], R]) -> R:
    """Call a function with a mesh of `size` processes, of which this one is `rank`.

    What the function sends is what it would send by this backend. If this process has a group
    already, there can be no other world beside it, and this raises a RuntimeError.
    """
    if is_initialized():
        raise RuntimeError(
            "torch.distributed is initialized: a process is in one world at a time, and plan() "
            "makes its own. Plan before init_process_group(), or in another process."
        )
    try:
        store = importlib.import_module(_FAKE).FakeStore()
    except (ImportError, AttributeError) as error:  # pragma: no cover
        raise RuntimeError(
            f"torch {torch.__version__} has no fake process group to plan with, where others have "
            f"it: {_FAKE}."
        ) from error
    excepthook = sys.excepthook  # to which it puts another in front, for each world
    before = planned_backend.get()
    try:
        init_process_group("fake", rank=rank, world_size=size, store=store)
        planned_backend.set(backend)
        result = function(init_device_mesh("cpu", (size,)))
        _leave(before, excepthook)
    except BaseException:  # also an interrupt in the middle of leaving
        _leave(before, excepthook)
        raise
    return result


def _leave(backend: str, excepthook: Any) -> None:
    planned_backend.set(backend)
    if is_initialized():
        destroy_process_group()
    sys.excepthook = excepthook
