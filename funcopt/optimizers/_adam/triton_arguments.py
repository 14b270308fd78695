"""The numbers of a step as arguments of a launch, and what else goes to the device.

A number is 64 bits: those of a float64, or the address of a tensor on the device that has it.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._core import transforms
from ..._core.types import Number
from ..._engine.counts import PerLeaf
from ..._engine.rule import is_read

# A captured copy reads its source again at each replay, for as long as the graph lives, which
# nobody tells us. What a graph has seen is therefore kept for good; it is a few kilobytes.
_read_at_replay: list[Tensor] = []


class Arguments(NamedTuple):
    """The numbers of a step as the kernel takes them."""

    members: int  # how many have numbers of their own; 1 if all share them
    words: Sequence[int | float]  # the numbers, or the addresses of tensors
    kinds: int
    tensors: list[Tensor]  # these


# What a number is, in the bits that the kernel is told of it.
_IS_ADDRESS, _IS_FLOAT32, _IS_PER_MEMBER, _IS_PER_LEAF = 1, 2, 4, 8
# The dtypes that it reads.
_AS_THEY_ARE = frozenset((torch.float64, torch.float32))


def arguments_of(numbers: Any, param: Tensor, device: torch.device) -> Arguments:
    """Return the numbers of a step on such parameters as the kernel takes them."""
    if is_read(numbers):
        return Arguments(1, numbers, 0, [])
    words, kinds, tensors = list(numbers), 0, []
    for index, number in enumerate(numbers):
        if type(number) is float:
            continue
        if isinstance(number, PerLeaf):
            own = sent(bits_of(number.values), device)
            kinds |= (_IS_ADDRESS | _IS_PER_LEAF) << (4 * index)
            words[index] = own.data_ptr()
            tensors.append(own)
            continue
        if not isinstance(number, Tensor):
            words[index] = float(number)
            continue
        if number.ndim > 0 or number.device != device or number.dtype not in _AS_THEY_ARE:
            return _of_members(numbers, param, device)
        kinds |= _kind(number) << (4 * index)
        words[index] = number.data_ptr()
        tensors.append(number)
    return Arguments(1, tuple(words), kinds, tensors)


def _of_members(numbers: Any, param: Tensor, device: torch.device) -> Arguments:
    """Return numbers of which some have to be sent, or differ between the members."""
    lead = param.shape[: max(n.ndim if isinstance(n, Tensor) else 0 for n in numbers)]
    words: list[int | float] = []
    kinds, members, tensors = 0, 1, []
    for index, number in enumerate(numbers):
        is_per_leaf = isinstance(number, PerLeaf)
        value = (
            sent(bits_of(number.values), device) if is_per_leaf else _value(number, lead, device)
        )
        if isinstance(value, Tensor):
            kind = _IS_ADDRESS | _IS_PER_LEAF if is_per_leaf else _kind(value)
            if value.numel() != 1 and not is_per_leaf:
                kind, members = kind | _IS_PER_MEMBER, value.numel()
            kinds |= kind << (4 * index)
            words.append(value.data_ptr())
            tensors.append(value)
        else:
            words.append(value)
    return Arguments(max(1, members), tuple(words), kinds, tensors)


def _kind(number: Tensor) -> int:
    return _IS_ADDRESS | (_IS_FLOAT32 if number.dtype is torch.float32 else 0)


def bits_of(values: Sequence[int | float]) -> list[int]:
    """Return integers as they are, and floats as integers of the same bits."""
    return [v if isinstance(v, int) else _INTEGER.unpack(_FLOAT.pack(v))[0] for v in values]


_FLOAT, _INTEGER = struct.Struct("d"), struct.Struct("q")


def _value(number: Number, lead: torch.Size, device: torch.device) -> Tensor | float:
    """Return a value, or a tensor on the device that has it, or one for each member."""
    if not isinstance(number, Tensor):
        return float(number)
    if number.ndim == 0 and number.device == device and number.dtype in _AS_THEY_ARE:
        return number
    if number.numel() != 1:
        number = number.expand(lead)
    if number.device == device:
        if number.dtype is not torch.float32:
            number = number.to(torch.float64)
        return number.reshape(-1).contiguous()
    values: list[float] = number.to(torch.float64).reshape(-1).tolist()
    if len(values) == 1:
        return values[0]
    return sent(bits_of(values), device).view(torch.float64)


def sent(words: Sequence[int], device: torch.device) -> Tensor:
    """Return integers on the device, which are sent there without waiting for it."""
    host = torch.frombuffer(array("q", words), dtype=torch.int64)
    if device.type != "cuda":
        return host
    # Only from pinned memory does a copy not wait. Its allocator waits for the copy instead before
    # it hands the memory out again.
    host = host.pin_memory()
    if transforms.capturing():
        _read_at_replay.append(host)
    return host.to(device, non_blocking=True)
