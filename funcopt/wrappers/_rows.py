"""Rows of stacked tensors: those of the members that are updated, taken out and written back.

A member that is not active costs nothing where its rows are not read, and it keeps every bit where
they are not written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._core import transforms

# Operators on the CPU take so many numbers at a time, and those that are left one by one.
_AT_A_TIME = 32


def rows_of(active: Tensor | None) -> Tensor | None:
    """Return the indices of the active members; None if the mask cannot be read without waiting."""
    if active is None or not transforms.readable() or transforms.transformed():
        return None
    if not transforms.on_host(active) or not transforms.all_plain([active]):
        return None
    return active.nonzero().squeeze(1)


class Rows(NamedTuple):
    """Some rows of stacked tensors, for operators that shall round as they do on all rows."""

    taken: Tensor  # the indices of those that are computed with
    first: Tensor  # the indices of those that are written: the first of these ...
    last: Tensor  # ... and some among the last of them,
    places: Tensor  # which are there

    @classmethod
    def of(cls, rows: Tensor, members: int, numbers: Iterable[Tensor]) -> Rows | None:
        """Return the rows of active members, and such others as it takes for the same bits.

        None if they would be all there are. Some bits depend on the other rows in three ways:

        - Operators such as a power round otherwise at the end of a tensor, where fewer numbers are
          left than the processor takes at a time. So the last rows stay the last ones.
        - A sum over a single row may be added up in another order. So there are always two.
        - Which kernel serves members depends on whether they share their numbers. So if a number
          differs between all members, it also does between these.
        """
        own = _who_differ(rows, numbers)
        end = members - members % _AT_A_TIME
        last, first = torch.arange(end, members, device=rows.device), rows[rows < end]
        own = own[own < end]
        missing = -(len(first) + len(own)) % _AT_A_TIME
        if len(first) + len(own) + missing + len(last) < 2:
            missing += _AT_A_TIME
        taken = torch.cat((first, own, rows.new_zeros(missing), last))
        if len(taken) >= members:
            return None
        written = rows[rows >= end]
        return cls(taken, first, written, written - end + len(taken) - len(last))

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return copies of these rows; parameters among them still require a gradient."""
        with torch.no_grad():
            taken = [tensor.index_select(0, self.taken) for tensor in tensors]
        for own, tensor in zip(taken, tensors, strict=True):
            if tensor.requires_grad:
                own.requires_grad_()
        return taken

    def put(self, tensors: Sequence[Tensor], news: Sequence[Tensor]) -> None:
        """Write what came of the rows of active members over the old ones."""
        with torch.no_grad():
            for tensor, new in zip(tensors, news, strict=True):
                tensor.index_copy_(0, self.first, new.detach()[: len(self.first)])
                if len(self.last):
                    tensor.index_copy_(0, self.last, new.detach()[self.places])


def _who_differ(rows: Tensor, numbers: Iterable[Tensor]) -> Tensor:
    """Return for each number that these rows share, and not all rows, one for which it differs."""
    others = []
    for number in numbers:
        differs = number != number[rows[0]]
        found = differs.nonzero()
        if len(found) and not bool(differs[rows].any()):
            others.append(int(found[0]))
    return torch.tensor(list(dict.fromkeys(others)), dtype=rows.dtype, device=rows.device)
