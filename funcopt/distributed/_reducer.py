"""Gradients as DistributedDataParallel has them: averaged, a bucket at a time, in backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from ._collectives import start_sum


def check_reducer(module: DistributedDataParallel) -> None:
    """Refuse ways of reducing that do not say in time which gradients there are."""
    for name in ("find_unused_parameters", "static_graph", "mixed_precision"):
        if getattr(module, name, None):
            raise ValueError(
                f"module has {name}={getattr(module, name)!r}: which parameters have a gradient, "
                f"or the gradient itself, is then known only after the backward pass. Leave it "
                f"out, or update after the backward pass."
            )


class _Pending(NamedTuple):
    """A bucket that is being reduced."""

    work: Any
    params: list[Tensor]
    grads: list[Tensor]


class BucketHook:
    """What a module calls with each bucket in place of its own reduction, whose bits it has.

    While one bucket is reduced, the one before it is used. A module takes one such hook for life;
    while it is `closed`, as at first, it does what the module would.
    """

    def __init__(
        self,
        module: DistributedDataParallel,
        params: Sequence[Tensor],
        move: Callable[[Tensor, Tensor], None],
    ) -> None:
        """Become the hook of a module that moves these parameters.

        `move` is called with each of them and its averaged gradient, which it may not keep.
        """
        self.closed = True
        self._params = params
        self._move = move
        self._group = module.process_group
        self._are_views = bool(module.gradient_as_bucket_view)
        self._pending: _Pending | None = None
        self._moved: list[Tensor] = []
        # Without annotations, which a module compares with its own.
        module.register_comm_hook(None, lambda _, bucket: self._take(bucket))
        # Private, and used by torch itself for this purpose: it keeps the module from copying the
        # buckets into gradients of their own. A torch without it makes them, to be freed at once.
        reducer: Any = module.reducer
        self._no_copies = hasattr(reducer, "_set_optimizer_in_backward")
        if self._no_copies:
            reducer._set_optimizer_in_backward()

    def _take(self, bucket: Any) -> torch.futures.Future[Tensor]:
        flat, params, grads = bucket.buffer(), bucket.parameters(), bucket.gradients()
        flat.mul_(1.0 / self._group.size())
        work = start_sum(flat, self._group)
        if bucket.index() == 0:
            self._pending, self._moved = None, []  # that a pass which failed may have left
        if self.closed:
            _wait_and_give(_Pending(work, params, grads))
        else:
            if bucket.index() == 0 and (self._are_views or not self._no_copies):
                self._free_at_the_end()
            if not self._are_views:
                for param in params:
                    param.grad = None  # it was copied into the bucket
            self._use_pending()
            self._pending = _Pending(work, params, grads)
            if bucket.is_last():
                self._use_pending()
                if len(self._moved) < len(self._params):
                    raise RuntimeError(
                        f"DistributedDataParallel averages {len(self._moved)} parameters, of "
                        f"{len(self._params)} that required a gradient when this began: the others "
                        f"did not when it was made. Make it anew, or let them require none."
                    )
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(flat)
        return done

    def _use_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.work.wait()
            for param, grad in zip(pending.params, pending.grads, strict=True):
                self._move(param, grad)
                self._moved.append(param)

    def _free_at_the_end(self) -> None:
        """Free the gradients that the module still makes when it has seen all buckets."""
        queue: Any = Variable._execution_engine.queue_callback
        # What is queued by a callback comes after the module's own.
        queue(lambda: queue(self._free))

    def _free(self) -> None:
        for param in self._moved:
            param.grad = None
        self._moved = []


def _wait_and_give(pending: _Pending) -> None:
    """Let the parameters have their averaged gradients, where these are no views of the bucket."""
    pending.work.wait()
    for param, grad in zip(pending.params, pending.grads, strict=True):
        if param.grad is None:
            param.grad = grad.clone()
        elif param.grad.data_ptr() != grad.data_ptr():
            param.grad.copy_(grad)
