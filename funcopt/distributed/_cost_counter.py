"""Counts what operators cost while they run: memory that is alive at once, and bytes sent."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# Torch's operators have such names, with underscores or without, and say how buffers lie.
_KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
_FORMS = ("_base", "_into_tensor", "_tensor", "_single")
_SILENT = ("wait_tensor", "barrier")


class CostCounterMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # which torch left untyped
    """Adds up storages that are alive, and collectives, from one call of an operator to the next.

    Attributes:
        peak: The most bytes that were alive at once. A storage counts once, with all its bytes.
        calls: The collectives that were made, by kind.
        sent: The bytes that this process sent in them, by kind.
    """

    def __init__(self, size: int, rank: int, held: Iterable[Tensor]) -> None:
        """Count for one of so many processes, and begin with the memory of these tensors."""
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self.peak = 0
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self._size, self._rank = size, rank
        self._alive: dict[int, int] = {}  # the bytes of each storage
        self._total = 0
        for tensor in held:
            self._see(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call an operator and note what came of it."""
        if DTensor in types:
            return NotImplemented  # so that it calls others on its local part, which are seen
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name.startswith("_fused_") and name.endswith("_"):
            return None  # it writes in place and allocates nothing; not each has a meta kernel
        result = _read(func, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._see(tensor)
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(name, [*args, result])
        return result

    def _see(self, tensor: Tensor) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self._total += storage.nbytes()
            self.peak = max(self.peak, self._total)
            weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self._total -= self._alive.pop(key)

    def _count(self, name: str, operands: list[Any]) -> None:
        name = name.strip("_")
        if name in _SILENT:
            return
        for form in _FORMS:
            name = name.removesuffix(form)
        kind = next((k for k in _KINDS if k.replace("_", "") == name.replace("_", "")), None)
        if kind is None:
            raise NotImplementedError(f"the optimizer calls {name}, whose traffic is not known.")
        self.calls[kind] += 1
        self.sent[kind] += self._sent(kind, operands)

    def _sent(self, kind: str, operands: list[Any]) -> int:
        splits = [own for own in operands if isinstance(own, list) and _are_counts(own)]
        if kind == "all_to_all" and len(splits) > 1:  # of what is taken, then of what is given
            given: Tensor = operands[1]
            others: int = sum(splits[1]) - splits[1][self._rank]
            return others * given.nbytes // max(given.shape[0], 1)
        # Of what is sent and what comes of it, that which is whole.
        nbytes = max(sum(tensor.nbytes for tensor in _tensors(operand)) for operand in operands)
        times = 2 if kind == "all_reduce" else 1
        return -(-times * (self._size - 1) * nbytes // self._size)


def _are_counts(operand: list[Any]) -> bool:
    """Whether these are how many rows go to each process, or come from each."""
    return len(operand) > 0 and all(isinstance(count, int) for count in operand)


def _read(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Return ones for values that leave the meta device, which has none, for another device.

    They are numbers and conditions made of gradients, and 1 is what a step finds if all is well.
    """
    if func is torch.ops.aten._to_copy.default and _is_meta(args[0]):
        device = torch.device(kwargs.get("device") or "meta")
        if device.type != "meta":
            dtype = kwargs.get("dtype") or args[0].dtype
            return torch.ones(args[0].shape, dtype=dtype, device=device)
    if func is torch.ops.aten.copy_.default:
        target: Tensor = args[0]
        if _is_meta(args[1]) and not target.is_meta:
            return target.fill_(1)
    return None


def _is_meta(value: Any) -> bool:
    # Beneath a vmap, a number may come as it is where there would be a tensor.
    return isinstance(value, Tensor) and value.is_meta


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of what an operator takes or returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
