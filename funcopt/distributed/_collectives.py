"""What is sent between processes: the mean of flat gradients, and the shares of flat parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

# What a fake group stands for.
planned_backend: ContextVar[str] = ContextVar("planned_backend", default="nccl")


class Ranks(NamedTuple):
    """The processes among which flat tensors are shared out, each an equal share in order."""

    group: Any  # None for a process alone
    size: int
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh | None) -> Ranks:
        """Return the processes of a mesh of one dimension; None is this one alone."""
        if mesh is None:
            return cls(None, 1, 0)
        return cls(mesh.get_group(), mesh.size(), mesh.get_local_rank())

    def share(self, numel: int) -> int:
        """How many elements each has of so many, the last ones fewer, as torch.chunk shares."""
        return -(-numel // self.size)

    def span(self, numel: int) -> tuple[int, int]:
        """Return where this one's elements start and end."""
        share = self.share(numel)
        return min(self.rank * share, numel), min((self.rank + 1) * share, numel)


class Started(NamedTuple):
    """A collective that is under way."""

    work: Any  # None if there was nothing to send
    finish: Callable[[], Tensor]

    def wait(self) -> Tensor:
        """Return the result, after waiting for it; on a GPU only its stream waits."""
        if self.work is not None:
            self.work.wait()
        return self.finish()


def start_mean(flat: Tensor, ranks: Ranks) -> Started:
    """Begin to average a flat tensor over all processes, of which each gets its share.

    Its length is the same on all, and a multiple of their number. It may be written.
    """
    if ranks.size == 1 or flat.numel() == 0:
        return Started(None, lambda: flat[: flat.numel() // ranks.size])
    backend = dist.get_backend(ranks.group)
    if backend == "gloo" or (backend == "fake" and planned_backend.get() == "gloo"):
        # Gloo's own reduce-scatter reduces everything to all, for which it sends twice as much.
        shares = torch.empty_like(flat)
        work = dist.all_to_all_single(shares, flat, group=ranks.group, async_op=True)
        return Started(work, lambda: _keep(flat, shares.view(ranks.size, -1).mean(0)))
    share = flat.new_empty(flat.numel() // ranks.size)
    flat.div_(ranks.size)  # before the sum, which could overflow in 16 bits
    # Named so since torch 2.13, which deprecates the old name.
    reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    work = reduce_scatter(share, flat, group=ranks.group, async_op=True)
    return Started(work, lambda: _keep(flat, share))


def start_sum(flat: Tensor, group: Any) -> Any:
    """Begin to add up a flat tensor over the processes of a group, in place; return the work."""
    return dist.all_reduce(flat, group=group, async_op=True)


def start_all_gather(share: Tensor, length: int, ranks: Ranks) -> Started:
    """Begin to put the shares of all processes together; `length` is that of the longest share."""
    if ranks.size == 1 or length == 0:
        return Started(None, lambda: share)
    if share.numel() < length:
        share = torch.cat([share, share.new_zeros(length - share.numel())])
    flat = share.new_empty(length * ranks.size)
    all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work = all_gather(flat, share, group=ranks.group, async_op=True)
    return Started(work, lambda: _keep(share, flat))


def _keep(_: Tensor, result: Tensor) -> Tensor:
    """Return a result; what was sent is kept until it is asked for."""
    return result


def one_ahead(started: Iterable[Started]) -> Iterator[Tensor]:
    """Yield the results of collectives in order, each once the next has been started.

    So a result is used while the next is under way, and only two are in memory at a time.
    """
    before: Started | None = None
    for current in started:
        if before is not None:
            yield before.wait()
        before = current
    if before is not None:
        yield before.wait()
