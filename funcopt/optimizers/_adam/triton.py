"""The step out of place in one launch of a Triton kernel, which moves each byte once.

torch's fused kernel moves in place, so a pure update by it copies first: 13 reads and writes of a
leaf, where one that reads old tensors and writes new ones has 7. All leaves of a launch, and all
members of a vmap with numbers of their own, are told to it by one table of addresses, which goes to
the device without waiting for it and is kept there. The bias corrections are computed there, in
float64, so that a count or a learning rate on the device is never read here, and a CUDA graph
replays a step with whatever they are by then.

Like torch's fused kernel, this one believes what it is told: that the tensors of a leaf are dense
and laid out alike, and, where numbers differ between members, that members lie one after another.
"""

from __future__ import annotations

import functools
import importlib
import os
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._core import transforms
from ..._engine.kernels import serves_float64_alone
from ..._engine.rule import Kernel, StepInputs, StepOutputs
from ..adamw import HYPERPARAMS
from .triton_arguments import arguments_of, sent
from .triton_launch import Launch

_PATHS = {own.name: own.path for own in HYPERPARAMS}

# The step is bound by memory, so what counts is how much is under way. With 4 warps a thread has 8
# elements of a block, for float32 two loads of 16 bytes from each of 4 tensors before it uses any.
# On an H200 the kernel moves 4.0 TB/s so, of the 4.2 of a plain copy. Larger blocks take more
# registers than that gains; smaller ones would pay more often for what comes before a program's
# first load.
_BLOCK = 1024
# That is to find its leaf and its corrections, at the price of about two blocks. A run of blocks
# shares it, where that leaves programs enough to spread evenly over a GPU.
_LONGEST_RUN = 8
_ENOUGH_PROGRAMS = 4096

# The oldest architecture that Triton compiles for without reservations.
_OLDEST = 80
# What Triton takes for a yes.
_YES = ("1", "on", "true", "y", "yes")


def _unsupported_reason(device: torch.device, numbers: Any) -> str | None:
    reason = _unfit(device)
    if reason is not None:
        return reason
    for name, number in zip(getattr(numbers, "_fields", ()), numbers or (), strict=True):
        if isinstance(number, Tensor) and number.device not in (device, torch.device("cpu")):
            return (
                f"it takes numbers on {device} or the CPU, and {_PATHS.get(name, name)} is on "
                f"{number.device}"
            )
    return None


def _step_(inputs: StepInputs, numbers: Any, options: Any) -> None:
    _step_to(inputs, inputs.targets, numbers, options)


def _step_to(inputs: StepInputs, outputs: StepOutputs, numbers: Any, options: Any) -> None:
    launcher(inputs, options).step(inputs, outputs, numbers)


# The launchers of the trees that were moved last, by what they were made for.
_launchers: dict[object, Launcher] = {}
_MOST_LAUNCHERS = 32


def launcher(inputs: StepInputs, options: Any) -> Launcher:
    """Return what launches steps of leaves of these sizes."""
    param = inputs.params[0]
    sizes = tuple(map(Tensor.numel, inputs.params))
    slot_dtype, by_chance = inputs.slots[0][0].dtype, options.rounding == "stochastic"
    key = (
        sizes,
        (param.dtype, slot_dtype),
        param.device,
        options.amsgrad,
        options.maximize,
        by_chance,
    )
    found = _launchers.get(key)
    if found is None:
        if len(_launchers) >= _MOST_LAUNCHERS:
            _launchers.clear()
        found = _launchers[key] = Launcher(*key)
    return found


class _Table(NamedTuple):
    """A table on the device, and all that what is in it depends on."""

    members: int
    addresses: list[int]
    stream: int
    words: Tensor


class _Shape(NamedTuple):
    """How the leaves are cut into programs, for so many members."""

    programs: int
    run: int  # of how many blocks
    words: list[int]  # the part of the table that says so


class Launcher:
    """Launches steps of leaves of certain sizes, and keeps the tables that it made for them.

    A table is written once and never again, and dropped if it was not used of late. A launch that
    is queued may read it after that: its memory comes from the allocator of the stream on which it
    is used, which hands memory out again for what comes later on that stream. Another stream has
    tables of its own: it would not wait until one has arrived, nor may two launches at once count
    their programs in the same word of it. A graph that is captured has its own as well, which it
    copies again at each replay; what it copies from is kept for good. Numbers are no part of a
    table but arguments of the launch. So nothing that changes from step to step is copied, and
    nothing that is queued can see a number of a later step.
    """

    # A loop that hands out results in turn, or keeps some, has several sets of addresses.
    _MOST_TABLES = 8

    def __init__(
        self,
        sizes: tuple[int, ...],
        dtypes: tuple[torch.dtype, torch.dtype],
        device: torch.device,
        amsgrad: bool,
        maximize: bool,
        by_chance: bool,
    ) -> None:
        """Note what all launches have in common."""
        self._source = _source()
        self._sizes = sizes
        self._device = device
        self._index = -1 if device.type == "cpu" else device.index or 0
        own, slot = [getattr(self._source.tl, str(d).removeprefix("torch.")) for d in dtypes]
        fixed = {"DTYPE": own, "SLOT_DTYPE": slot, "AMSGRAD": amsgrad, "MAXIMIZE": maximize}
        fixed["STOCHASTIC"] = self._by_chance = by_chance
        # Without and with a condition.
        self._launches = [
            Launch(self._source, {**fixed, "CONDITIONAL": conditional, "BLOCK": _BLOCK})
            for conditional in (False, True)
        ]
        self._shapes: dict[int, _Shape] = {}
        self._tables: tuple[_Table, ...] = ()
        self._in_place: _Table | None = None  # the last one, by the list of the engine

    def step(
        self,
        inputs: StepInputs,
        outputs: StepOutputs,
        numbers: Any,
        new_count: Tensor | None = None,
        applies: Tensor | None = None,
        addresses: list[int] | None = None,
    ) -> None:
        """Write the new parameters and slots, as a `Launcher` does."""
        if self._index < 0 or self._index == torch.cuda.current_device():
            self._step(inputs, outputs, numbers, new_count, applies, addresses)
        else:
            with torch.cuda.device(self._index):
                self._step(inputs, outputs, numbers, new_count, applies, addresses)

    def _step(
        self,
        inputs: StepInputs,
        outputs: StepOutputs,
        numbers: Any,
        new_count: Tensor | None,
        applies: Tensor | None,
        addresses: list[int] | None,
    ) -> None:
        own = arguments_of(numbers, inputs.params[0], self._device)
        shape = self._shapes.get(own.members) or self._shape(own.members)
        if shape.programs == 0:
            if new_count is not None:
                torch.add(numbers.step, 1 if applies is None else applies, out=new_count)
            return
        in_place = outputs.params is inputs.params
        starts = addresses or list(map(Tensor.data_ptr, chain(*inputs.columns)))
        stream = self._source.stream_of(self._index)
        ids = inputs.ids or list(range(len(self._sizes))) if self._by_chance else []
        table = self._table(starts, None if in_place else outputs, ids, shape, own.members, stream)
        conditional = applies is not None or not isinstance(numbers.active, float)
        self._launches[conditional].go(
            shape.programs,
            stream,
            table,
            len(self._sizes),
            shape.run,
            *own.words,
            own.kinds,
            0 if new_count is None else new_count.data_ptr(),
            0 if applies is None else applies.data_ptr(),
        )

    def _shape(self, members: int) -> _Shape:
        elements = [size // members for size in self._sizes]
        blocks = members * sum(-(-count // _BLOCK) for count in elements)
        run = max(1, min(_LONGEST_RUN, blocks // _ENOUGH_PROGRAMS))
        programs = [-(-count // (run * _BLOCK)) for count in elements]
        ends = list(accumulate(members * count for count in programs))
        shape = _Shape(ends[-1], run, [0, *ends[:-1], *programs, *elements])
        self._shapes[members] = shape
        return shape

    def _table(
        self,
        starts: list[int],
        outputs: StepOutputs | None,
        ids: list[int],
        shape: _Shape,
        members: int,
        stream: int,
    ) -> Tensor:
        """Return the table of leaves that start there; without outputs, of a step in place."""
        last, capturing = self._in_place, transforms.capturing()
        if outputs is not None or capturing:
            last = None
        if last is not None and last.addresses is starts and last[:3:2] == (members, stream):
            return last.words
        count = len(self._sizes)
        if outputs is None:
            addresses = [*starts, *starts[:count], *starts[2 * count :], 0, *ids]
        else:
            news = outputs.starts or list(map(Tensor.data_ptr, chain(*outputs.columns)))
            addresses = [*starts, *news, 0, *ids]
        if capturing:
            return sent([*shape.words, *addresses], self._device)
        found = self._found(addresses, stream, members)
        if found is None:
            words = sent([*shape.words, *addresses], self._device)
            found = _Table(members, addresses, stream, words)
            # Replaced whole, so that threads need no lock.
            self._tables = (found, *self._tables[: self._MOST_TABLES - 1])
        if outputs is None:
            self._in_place = found._replace(addresses=starts)
        return found.words

    def _found(self, addresses: list[int], stream: int, members: int) -> _Table | None:
        for table in self._tables:
            if table.addresses == addresses and table.stream == stream and table.members == members:
                return table
        return None


@functools.cache
def _source() -> Any:
    """Import Triton and what is written in it. It takes half a second, so who needs it pays it."""
    return importlib.import_module(".triton_source", __package__)


@functools.cache
def _unfit(device: torch.device) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in _YES
    served = "cpu" if interpreted else "cuda"
    if device.type != served:
        return f"it serves {served}, not {device.type}"
    triton = _source().triton
    if triton is None:
        return "Triton cannot be imported"
    return None if interpreted else _unfit_gpu(device, triton)


def _unfit_gpu(device: torch.device, triton: Any) -> str | None:
    try:
        with torch.cuda.device(device):
            target = triton.runtime.driver.active.get_current_target()
    except Exception as error:  # whatever it lacks: Triton builds its driver with a C compiler
        return f"Triton does not run here: {error}"
    if target.backend != "cuda" or target.arch < _OLDEST:
        return (
            f"it was made for CUDA architectures from {_OLDEST}, not {target.backend} {target.arch}"
        )
    return None


ADAMW_TRITON = Kernel(
    _step_,
    _unsupported_reason,
    scales_gradients=True,
    takes_members=True,
    takes_leaves=True,
    step_to=_step_to,
    launcher=launcher,
    counts_on_device=True,
    serves_dtypes=serves_float64_alone,
    rounds_stochastically=True,
)
