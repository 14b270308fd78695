"""The step out of place in one launch of a Triton kernel, which moves each byte once.

torch's fused kernel moves in place, so a pure update by it copies first: 13 reads and writes of a
leaf, where one that reads old tensors and writes new ones has 7. All leaves of a launch, and all
members of a vmap with numbers of their own, are told to it by one table of addresses and numbers,
which goes to the device without waiting for it. The bias corrections are computed there, in
float64, so that a count or a learning rate on the device is never read here, and a CUDA graph
replays a step with whatever they are by then.

Like torch's fused kernel, this one believes what it is told: that the tensors of a leaf are dense
and laid out alike, and, where numbers differ between members, that members lie one after another.
"""

from __future__ import annotations

import functools
import importlib
import os
from array import array
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..._core import transforms
from ..._core.types import Number
from ..._engine.rule import Kernel, StepInputs, StepOutputs
from ..adamw import HYPERPARAMS

_PATHS = {own.name: own.path for own in HYPERPARAMS}

# The step is bound by memory, so what counts is how much is under way. By its data sheet and a
# latency of some 0.8 microseconds, which is an estimate, an H200 needs 26 kB in each
# multiprocessor: 4.3 TB/s over 132 of them. None of it was measured here. With 4 warps a
# thread has 8 elements of a block, for float32 two loads of 16 bytes from each of 4 tensors before
# it uses any, and registers for 5 such programs: 80 kB. Larger blocks take more registers than
# that gains; smaller ones would pay more often for what comes before a program's first load.
_BLOCK = 1024
_WARPS = 4
# That is to find its leaf and its corrections, at the price of about two blocks. A run of blocks
# shares it, where that leaves programs enough to spread evenly over a GPU.
_LONGEST_RUN = 8
_ENOUGH_PROGRAMS = 4096

# The oldest architecture that Triton compiles for without reservations.
_OLDEST = 80
# What Triton takes for a yes.
_YES = ("1", "on", "true", "y", "yes")

# A captured copy reads its source again at each replay, for as long as the graph lives, which
# nobody tells us. What a graph has seen is therefore kept for good; it is a few kilobytes.
_read_at_replay: list[Tensor] = []


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


def _step_to(inputs: StepInputs, outputs: StepOutputs, numbers: Any, options: Any) -> None:
    source = _source()
    param = inputs.params[0]
    lead = param.shape[: max(n.ndim if isinstance(n, Tensor) else 0 for n in numbers)]
    values = [_values(number, lead, param.device) for number in numbers]
    members = max(1, *map(len, values))
    elements = [leaf.numel() // members for leaf in inputs.params]
    blocks = members * sum(-(-count // _BLOCK) for count in elements)
    run = max(1, min(_LONGEST_RUN, blocks // _ENOUGH_PROGRAMS))
    programs = [-(-count // (run * _BLOCK)) for count in elements]
    ends = list(accumulate(members * count for count in programs))
    if ends[-1] == 0:
        return
    words = [0, *ends[:-1], *programs, *elements]
    for column in (*inputs.columns, *outputs.columns):
        words += map(Tensor.data_ptr, column)
    with torch.cuda.device(param.get_device()):
        source.step_kernel[(ends[-1],)](
            _table(words, values, param.device),
            len(elements),
            run,
            DTYPE=getattr(source.tl, str(param.dtype).removeprefix("torch.")),
            AMSGRAD=options.amsgrad,
            MAXIMIZE=options.maximize,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            enable_fp_fusion=False,  # rounded as the equations are written
        )


def _values(number: Number, lead: torch.Size, device: torch.device) -> Tensor | list[float]:
    """Return one value, or one for each member: where they are if that is the device."""
    if not isinstance(number, Tensor):
        return [float(number)]
    if number.numel() != 1:
        number = number.expand(lead)
    number = number.to(torch.float64).reshape(-1).contiguous()
    if number.device == device:
        return number
    values: list[float] = number.tolist()
    return values


def _table(words: list[int], numbers: list[Tensor | list[float]], device: torch.device) -> Tensor:
    """Append the numbers, or where they are, and send all to the device."""
    ours = [number for number in numbers if isinstance(number, list)]
    table = torch.empty(
        len(words) + 2 * len(numbers) + sum(map(len, ours)), dtype=torch.int64, device=device
    )
    place = table.data_ptr() + 8 * (len(words) + 2 * len(numbers))
    for number in numbers:
        if isinstance(number, Tensor):
            words.append(number.data_ptr())
        else:
            words.append(place)
            place += 8 * len(number)
    words += [int(len(number) > 1) for number in numbers]
    bits = array("q", array("d", [value for number in ours for value in number]).tobytes())
    host = torch.frombuffer(array("q", words) + bits, dtype=torch.int64)
    if device.type == "cuda":
        # Only from pinned memory does a copy not wait. Its allocator waits for the copy instead
        # before it hands the memory out again.
        host = host.pin_memory()
        if transforms.capturing():
            _read_at_replay.append(host)
    return table.copy_(host, non_blocking=True)


ADAMW_TRITON = Kernel(
    _step_, _unsupported_reason, step_to=_step_to, scales_gradients=True, takes_members=True
)
