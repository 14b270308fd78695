"""Memory for the results of an update out of place: few allocations, used again once they are free.

The results of a step are written into fresh tensors. To allocate each of them takes longer than to
move a small leaf, so leaves that have the same shape but for the first dimension are split from one
tensor. They share its storage but no element, and are no views in the eyes of autograd: each has a
version of its own.

On the CPU, fresh memory of a large size comes from the system page by page, which takes longer than
the step itself. So funcopt keeps the storages of large results, and writes into one again once
nobody else holds it. Whoever holds a result in any way (a view, a detached tensor, NumPy, DLPack,
what autograd saved, another thread) is among those whom torch counts as users of its storage; a
storage that other processes see, or that was resized, has moved. No more is kept than the results
of four steps for trees of one look, and what was not asked for a while is given back.

On CUDA there is one user that is not counted: work that was queued on another stream, whose tensor
was marked by `record_stream` and then dropped. There, results are used again if one asks for it.
"""

from __future__ import annotations

import math
import operator
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import transforms
from .._core.tensors import with_large_pages
from .rule import StepOutputs

# The users of a storage. The question is private to torch; where it cannot be asked, nothing is
# kept, and every result is allocated.
_count_users: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)

# Where results are used again.
_reused = {"cpu"}

# So many at most share a storage, all of which lives as long as one of them. On a GPU, to allocate
# takes as long as to write some megabytes.
_SHARED = {"cpu": 1 << 21, "cuda": 1 << 26}  # bytes
# Where the next one may start: it can be viewed as any dtype, as a whole allocation can.
_ALIGNED = 16  # bytes
_PADDING = -1  # the index of what is no result
# Results of all columns share one where they are small: parameters and slots then live together.
_SHARED_BY_COLUMNS = 1 << 19  # bytes of a column
# Less is allocated each time by the allocator of C: to ask who holds it would take as long.
_WORTH_KEEPING = {"cpu": 1 << 16, "cuda": 0}  # bytes
# No storage below this has memory pages of its own.
_HAS_PAGES = 1 << 16  # bytes
# One storage holds what is old in the next step; the other is what that writes into. With two loops
# on trees of one look, or a few, that take turns, each holds one.
_MOST_KEPT = 4
# So many lists of where results start are remembered: those of all storages in turn.
_MOST_STARTS = 16
# Storages that were not asked for during so many updates are given back.
_PATIENCE = 32

_split = torch.unsafe_split_with_sizes


class _Kept(NamedTuple):
    """A storage that may be written again."""

    base: Tensor
    storage: torch.UntypedStorage
    address: int  # of the storage, by which torch counts who uses it
    alone: tuple[int, int, int]  # what `_held` said when nobody else held it


def _held(base: Tensor, storage: torch.UntypedStorage, address: int) -> tuple[int, int, int]:
    """Return how many hold a storage, how many its object in Python, and where its memory is.

    Torch makes one object of Python for a storage and counts that once, however many hold it.
    """
    users = _count_users(address) if _count_users is not None else -1
    return users, sys.getrefcount(storage), base.data_ptr()


class _Like(NamedTuple):
    """What a result looks like."""

    shape: tuple[int, ...]
    strides: tuple[int, ...] | None  # None if it is contiguous
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, param: Tensor) -> _Like:
        """Return what a copy of a tensor looks like: dense, in the order of its dimensions."""
        strides = None
        if not param.is_contiguous():
            strides = torch.empty_like(param, device="meta").stride()
        return cls(tuple(param.shape), strides, param.dtype, param.device)

    def allocator(self) -> Callable[[], Tensor]:
        """Return what returns such tensors, whose values mean nothing."""
        # torch allocates by strides in half the time that it takes by a shape alone.
        strides = self.strides or torch.empty(self.shape, device="meta").stride()
        return partial(
            torch.empty_strided, self.shape, strides, dtype=self.dtype, device=self.device
        )

    @property
    def step(self) -> int:
        """How many bytes lie between the first elements of two rows."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class _Block:
    """Results that share a storage: parts of one tensor, of so many rows each."""

    def __init__(self, whole: _Like, rows: list[int]) -> None:
        """Plan for them; without rows, the whole is the only one, and cannot be split."""
        self.whole, self.rows = whole, rows
        self.nbytes = whole.nbytes
        least = _WORTH_KEEPING.get(whole.device.type, 0)
        self.is_worth_keeping = len(rows) > 0 and self.nbytes >= least
        self.kept: dict[object, list[_Kept]] = {}  # by the stream that writes and reads them
        self._allocate = whole.allocator()

    @cached_property
    def offsets(self) -> list[int]:
        """Where the results start, from the first on, in bytes."""
        step = self.whole.step
        return [rows * step for rows in accumulate(self.rows[:-1], initial=0)]

    def results(self, stream: object | None) -> tuple[Sequence[Tensor], int]:
        """Return tensors to write into, and where they start.

        Without a stream, nothing is kept or used again.
        """
        if stream is None or not self.is_worth_keeping:
            base = self._allocate()
            if self.nbytes >= _HAS_PAGES:
                base = with_large_pages(base)
            return _split(base, self.rows) if len(self.rows) > 1 else [base], base.data_ptr()
        kept = self.kept.setdefault(stream, [])
        for _ in range(len(kept)):
            try:
                found = kept.pop(0)  # so that no other thread takes it
            except IndexError:
                break
            base, storage, address, alone = found
            held = _held(base, storage, address)
            if held == alone:
                results = _split(base, self.rows)
                kept.append(found)
                return results, alone[2]
            if held[2] == alone[2]:  # it was not resized, nor do other processes see it
                kept.append(found)
        return self._keep(with_large_pages(self._allocate()), kept)

    def _keep(self, base: Tensor, kept: list[_Kept]) -> tuple[Sequence[Tensor], int]:
        storage = base.untyped_storage()
        address = storage._cdata
        fresh = _Kept(base, storage, address, (0, 0, 0))
        fresh = fresh._replace(alone=_held(base, storage, address))
        results = _split(base, self.rows)
        del kept[: max(0, 1 + len(kept) - _MOST_KEPT)]
        kept.append(fresh)  # now that it is held, so that no other thread finds it free
        return results, fresh.alone[2]


class Results:
    """Where steps on leaves that look alike write what comes of them."""

    def __init__(
        self,
        params: Sequence[Tensor],
        slots: Sequence[Sequence[Tensor]],
        *,
        columns_share: bool = True,
    ) -> None:
        """Take note of what results there are: parameters first, all laid out like these."""
        self._columns_share = columns_share
        likes = list(map(_Like.of, params))
        self._length = len(likes)
        self._columns = [
            likes,
            *(
                [
                    like._replace(dtype=tensor.dtype)
                    if tuple(tensor.shape) == like.shape
                    else _Like.of(tensor)
                    for like, tensor in zip(likes, slot, strict=True)
                ]
                for slot in slots
            ),
        ]
        self._starts: dict[tuple[int, ...], list[int]] = {}
        self.last = 0  # when memory was asked for

    @cached_property
    def _blocks(self) -> list[_Block]:
        return [block for block, _ in self._plan]

    @cached_property
    def _plan(self) -> list[tuple[_Block, list[int]]]:
        """The blocks, and which results lie in each."""
        return list(_plan_blocks(self._columns, self._columns_share))

    @cached_property
    def _order(self) -> Callable[[Any], Any] | None:
        """What puts the results of all blocks into the order of the columns, if they are not."""
        found = list(chain.from_iterable(indices for _, indices in self._plan))
        if found == list(range(len(found))):
            return None
        places = {index: place for place, index in enumerate(found)}
        order = [places[index] for index in sorted(places) if index >= 0]
        # Of one place, an itemgetter gives no tuple.
        return operator.itemgetter(*order) if len(order) > 1 else operator.itemgetter(slice(1))

    @cached_property
    def _is_worth_keeping(self) -> bool:
        return any(block.is_worth_keeping for block in self._blocks)

    @cached_property
    def _device(self) -> torch.device | None:
        """The one device of all results, None if there are several."""
        devices = {like.device for like in self._columns[0]}
        return devices.pop() if len(devices) == 1 else None

    def make(self) -> StepOutputs:
        """Return tensors to write the results into, whose values mean nothing."""
        stream = self._stream() if self._is_worth_keeping else None
        flat: list[Tensor] = []
        bases = []
        for block in self._blocks:
            own, base = block.results(stream)
            flat += own
            bases.append(base)
        if self._order is not None:
            flat = list(self._order(flat))
        count = self._length
        slots = [flat[i * count : (i + 1) * count] for i in range(1, len(self._columns))]
        return StepOutputs(flat[:count], tuple(slots), self._starts_at(tuple(bases)))

    def _starts_at(self, bases: tuple[int, ...]) -> list[int]:
        """Return where all results start, from where their blocks do: the same list if known."""
        starts = self._starts.get(bases)
        if starts is None:
            found: list[int] = []
            for base, block in zip(bases, self._blocks, strict=True):
                found += map(base.__add__, block.offsets)
            starts = list(self._order(found)) if self._order is not None else found
            if len(self._starts) >= _MOST_STARTS:
                self._starts = {}
            self._starts[bases] = starts
        return starts

    def _stream(self) -> object | None:
        """Return what orders the steps on this memory, None if it is not to be used again."""
        device = self._device
        if _count_users is None or device is None or device.type not in _reused:
            return None
        if torch.is_inference_mode_enabled() or transforms.capturing():
            return None
        _note(self)
        return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else "cpu"

    @property
    def nbytes(self) -> int:
        """How many bytes are kept."""
        return sum(
            len(kept) * block.nbytes for block in self._blocks for kept in block.kept.values()
        )

    def release(self) -> None:
        """Give back what is kept."""
        for block in self._blocks:
            block.kept = {}
        self.last = 0
        _keepers.discard(self)


def _plan_blocks(columns: Sequence[list[_Like]], share: bool) -> Iterator[tuple[_Block, list[int]]]:
    """Group results by what they may share a storage with, and cut the groups."""
    alike: dict[object, list[tuple[int, _Like]]] = {}
    for place, column in enumerate(columns):
        is_small = share and sum(like.nbytes for like in column) <= _SHARED_BY_COLUMNS
        for number, like in enumerate(column, place * len(column)):
            key: object = number
            can_be_padded = len(like.shape) == 1 and like.nbytes > 0
            if like.shape and not like.strides and (can_be_padded or like.nbytes % _ALIGNED == 0):
                key = like.shape[1:], like.dtype, like.device, None if is_small else place
            alike.setdefault(key, []).append((number, like))
    for group in alike.values():
        yield from _cut(group)


def _cut(group: list[tuple[int, _Like]]) -> Iterator[tuple[_Block, list[int]]]:
    most = _SHARED.get(group[0][1].device.type, _SHARED["cpu"])
    start, nbytes = 0, 0
    for end, (_, like) in enumerate(group):
        if end > start and nbytes + like.nbytes > most:
            yield _block(group[start:end])
            start, nbytes = end, 0
        nbytes += like.nbytes
    yield _block(group[start:])


def _block(group: list[tuple[int, _Like]]) -> tuple[_Block, list[int]]:
    first = group[0][1]
    if first.strides is not None or not first.shape:
        return _Block(first, []), [index for index, _ in group]
    rows, places = [], []
    for index, like in group:
        rows.append(like.shape[0])
        places.append(index)
        if len(like.shape) == 1 and like.nbytes % _ALIGNED:  # what lies between it and the next
            rows.append(-like.nbytes % _ALIGNED // like.dtype.itemsize)
            places.append(_PADDING)
    return _Block(first._replace(shape=(sum(rows), *first.shape[1:])), rows), places


# Those that may keep something, and how often any was asked.
_keepers: weakref.WeakSet[Results] = weakref.WeakSet()
_asked = 0


def _note(results: Results) -> None:
    """Note that memory was asked for, and give back what nobody has asked for in a while."""
    global _asked  # noqa: PLW0603  # a count that threads may lose a step of
    _asked += 1
    if results.last == 0:
        _keepers.add(results)
    results.last = _asked
    if _asked % _PATIENCE == 0:
        for other in list(_keepers):
            if other.last < _asked - _PATIENCE:
                other.release()


def kept_bytes() -> int:
    """Return how many bytes of results are kept to be used again, held by somebody or not."""
    return sum(results.nbytes for results in list(_keepers))


def release_all() -> None:
    """Give back what is kept. Results that somebody holds stay as they are."""
    for results in list(_keepers):
        results.release()


def set_reuse(device_type: str, enabled: bool) -> None:
    """Use results on devices of a type again, or do not."""
    (_reused.add if enabled else _reused.discard)(device_type)
    if not enabled:
        release_all()
