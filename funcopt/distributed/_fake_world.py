"""A world of any number of processes in which this one is alone: nothing is sent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import destroy_process_group, init_process_group, is_initialized
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# Private to torch, which tests its own sharding with it: importing it registers a backend whose
# collectives return at once, and leave their results as they are.
from torch.testing._internal.distributed.fake_pg import FakeStore

from ._collectives import planned_backend

__all__ = ["fake_mesh"]


@contextmanager
def fake_mesh(size: int, rank: int, backend: str) -> Iterator[DeviceMesh]:
    """Be one rank of a mesh of so many processes.

    Args:
        size: How many.
        rank: Which of them this one is.
        backend: What is called is what would be called with this one.

    Raises:
        RuntimeError: If this process has a group already, beside which there can be no other world.
    """
    if is_initialized():
        raise RuntimeError(
            "torch.distributed is initialized: a process can be in one world only, and plan() makes "
            "its own. Plan before init_process_group(), or in another process."
        )
    init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    token = planned_backend.set(backend)
    try:
        yield init_device_mesh("cpu", (size,))
    finally:
        planned_backend.reset(token)
        destroy_process_group()
