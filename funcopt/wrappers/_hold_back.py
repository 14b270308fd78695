"""What `Cautious` does to an update that was made: by the native kernel where nobody looks on.

In plain operators it takes some ten passes over memory, each with a call for each leaf. The kernel
takes two, and has their bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.tensors import compute_dtype, fit, view_as_complex_like, view_as_real
from .._core.types import Number, Tree
from .._engine import memory
from .._engine.checks import all_differ
from .._engine.prepare import may_recall
from .._engine.rule import StepInputs
from ._shared import read

# The least share of elements that count as moving, where the others are made up for.
_LEAST = 1e-3

# As they are numbered in the extension.
_DTYPES = {torch.float32: 0, torch.float64: 1}


class HoldBack(NamedTuple):
    """What is done to an update."""

    way: float  # the sign of an update times the gradient where it goes on, 0 where all do
    rescale: bool  # whether what goes on goes further
    decay: Number | None  # the share of what shrinks that is taken off; None for none

    def of(self, old: Tensor, new: Tensor, grad: Tensor) -> Tensor:
        """Return a parameter after an update of which some elements are held back."""
        if old.numel() == 0:
            return new
        wide = compute_dtype(old.dtype)
        start, end, slope = (view_as_real(tensor.to(wide)) for tensor in (old, new, grad))
        with torch.no_grad():
            direction = (end - start).sign()
        moved = self._masked(start, end, slope, direction) if self.way else end
        if self.decay is not None:
            shrinks = direction * start.detach().sign() <= 0
            decay = fit(self.decay, start)
            moved = moved - torch.where(shrinks, decay * start, 0.0)
        return view_as_complex_like(moved, old).to(old.dtype)

    def _masked(self, start: Tensor, end: Tensor, slope: Tensor, direction: Tensor) -> Tensor:
        """Return the new values, where they agree with the gradient, and else the old."""
        with torch.no_grad():
            # By their signs, since the product of two small numbers may be none.
            share = (direction * slope.sign() == self.way).to(start.dtype)
            if self.rescale:
                share = share / share.mean().clamp(min=_LEAST)
        return torch.lerp(start, end, share)

    def served(self, params: list[Tensor], grads: list[Tensor]) -> Served | None:
        """Return how the kernel holds updates of these leaves back; None if it does not."""
        if not params or not may_recall() or transforms.watched(params, grads):
            return None
        decay = read(self.decay) if isinstance(self.decay, Tensor) else self.decay
        if self.decay is not None and decay is None:
            return None
        inputs = StepInputs(params, grads, ())
        layout = memory.layout_of(inputs)
        if not layout.writable or [device.type for device in layout.devices] != ["cpu"]:
            return None
        wide = all(dtype.to_real() in _DTYPES for dtypes in layout.dtypes for dtype in dtypes)
        if not wide or _extension() is None:
            return None
        return Served(self, decay, inputs, layout)


class Served(NamedTuple):
    """Leaves whose updates the kernel holds back."""

    how: HoldBack
    decay: float | None
    inputs: StepInputs  # the parameters, and the gradients
    layout: memory.Layout

    def copies(self) -> list[Tensor]:
        """Return copies of the parameters, in memory that is used again."""
        copies = memory.results(self.inputs, self.layout)
        memory.copy_into(copies, self.inputs)
        return copies.params

    def write_between(self, olds: Sequence[Tensor], news: Sequence[Tensor]) -> None:
        """Write over the new parameters what they come to."""
        way, rescale, _ = self.how
        for group in self.layout.groups:
            columns = [[column[i] for i in group] for column in (olds, self.inputs.grads, news)]
            if not self.layout.real:
                columns = [list(map(view_as_real, column)) for column in columns]
            _extension().hold_back(
                _DTYPES[columns[0][0].dtype],
                int(way),
                rescale,
                self.decay,
                torch.get_num_threads(),
                list(map(Tensor.numel, columns[0])),
                list(map(Tensor.data_ptr, chain(*columns))),
            )

    def may_write(self, news: Sequence[Tensor], state: Tree) -> bool:
        """Whether nobody else has the new parameters, and they lie as the old ones do."""
        made = memory.layout_of(StepInputs(list(news), self.inputs.grads, ()))
        if not made.writable or made.groups != self.layout.groups:
            return False
        own = [leaf for leaf in pytree.flatten(state)[0] if isinstance(leaf, Tensor)]
        others = [*self.inputs.params, *self.inputs.grads]
        if not transforms.all_plain(own):
            return False
        return all_differ(list(map(Tensor.data_ptr, [*news, *others, *own])))


def _extension() -> Any:
    """Return the native kernel's module; None if it serves nothing here."""
    from ..optimizers import _native  # noqa: PLC0415  # loaded when it is first asked for

    return None if _native.unserved is not None else _native.extension
