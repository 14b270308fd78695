"""The step by a kernel of our own on the CPU: one pass over memory, out of place as in place.

torch's fused kernels move in place, so a pure update by them copies first: 13 reads and writes of a
leaf by Adam, where one that reads old tensors and writes new ones has 7. The kernel is the compiled
module `funcopt._native`. Where that could not be built, this file can be imported all the same, and
its kernels say why they serve nothing.

On whole vectors its bits are those of torch's fused kernels. torch rounds the elements behind the
last whole vector in another way; here all are rounded alike, so that no bit depends on where an
element lies, with what it is packed or how many threads there are.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._core import transforms
from .._engine.counts import PerLeaf
from .._engine.kernels import serves_float64_alone
from .._engine.rule import Kernel, StepInputs, StepOutputs, is_read
from .adamw import HYPERPARAMS

extension: Any = None
unserved: str | None = None  # why it serves nothing on this machine
try:
    extension = importlib.import_module("funcopt._native")
except ImportError as error:
    unserved = f"its extension was not built: {error}"
else:
    if not extension.instructions()[0][1]:
        unserved = "this processor has no instruction for a fused multiply-add"


def threads_of_torch() -> tuple[int, ...]:
    """Return the addresses of what starts and tells apart torch's threads, or none.

    torch has an OpenMP of its own on Linux, and a second one beside it would be a second set of
    threads. So its functions are looked up among those that torch itself was linked with.
    """
    if not sys.platform.startswith("linux"):
        return ()
    names = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        found = [ctypes.cast(library[name], ctypes.c_void_p).value for name in names]
    except (OSError, AttributeError):  # a build of another kind
        return ()
    return tuple(address for address in found if address)


if extension is not None:
    extension.take_threads(*threads_of_torch())
    # The child of a fork has none of the threads that its parent had, and would wait for them.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=extension.take_threads)

# As they are numbered in the extension.
ADAM_RULE, ADAMW_RULE, SGD_RULE, LION_RULE = range(4)
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_ROUNDINGS = {"nearest": 0, "stochastic": 1, "compensated": 2}

# Those names that users know by another one are the same in every optimizer.
_PATHS = {own.name: own.path for own in HYPERPARAMS}


class _Launcher:
    """Makes steps of leaves of certain sizes."""

    def __init__(self, rule: int, inputs: StepInputs, options: Any) -> None:
        """Note what all steps have in common."""
        param = inputs.params[0]
        slot_dtype = inputs.slots[0][0].dtype if inputs.slots else param.dtype
        self._fixed = (
            rule,
            _DTYPES[param.dtype],
            _DTYPES[slot_dtype],
            _ROUNDINGS[options.rounding],
            len(inputs.columns),
            options.maximize,
            getattr(options, "nesterov", False),
        )
        self._sizes = list(map(Tensor.numel, inputs.params))
        self._has_values = not param.is_meta

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
        del new_count, applies  # which are for devices
        if not self._has_values:
            return
        members, values, kept = _values(inputs.params[0], numbers)
        starts = addresses or list(map(Tensor.data_ptr, chain(*inputs.columns)))
        if outputs.params is not inputs.params:
            starts = starts + (
                outputs.starts or list(map(Tensor.data_ptr, chain(*outputs.columns)))
            )
        extension.step(
            *self._fixed,
            members,
            torch.get_num_threads(),
            self._sizes,
            inputs.ids,
            starts,
            values,
        )
        del kept  # whose memory was read


def _step_(rule: int, inputs: StepInputs, numbers: Any, options: Any) -> None:
    if inputs.params:
        _Launcher(rule, inputs, options).step(inputs, inputs.targets, numbers)


def _step_to(
    rule: int, inputs: StepInputs, outputs: StepOutputs, numbers: Any, options: Any
) -> None:
    if inputs.params:
        _Launcher(rule, inputs, options).step(inputs, outputs, numbers)


def _values(param: Tensor, numbers: Any) -> tuple[int, tuple[float | int, ...], tuple[Tensor, ...]]:
    """Return how many members stacked leaves have, the numbers, and what holds their memory.

    A number is a float for all members, or the address of one for each. There are 0 members where
    it has one for each leaf.
    """
    if is_read(numbers):
        return 1, numbers, ()
    values, kept = list(numbers), []
    per_leaf = False
    others = [index for index, number in enumerate(values) if type(number) is not float]
    ndim = max([values[i].ndim for i in others if isinstance(values[i], Tensor)], default=0)
    lead = param.shape[:ndim]
    for index in others:
        number = values[index]
        if isinstance(number, PerLeaf):
            values[index], per_leaf = number.address, True
            continue
        if not isinstance(number, Tensor) or number.ndim == 0:
            values[index] = float(number)
            continue
        # Of size 1 in a dimension of members over which it does not differ.
        own = number if number.shape == lead else number.expand(lead)
        if own.dtype is not torch.float64 or not own.is_contiguous():
            own = own.to(torch.float64).contiguous()
        kept.append(own)
        values[index] = own.data_ptr()
    return 0 if per_leaf else lead.numel(), tuple(values), tuple(kept)


def _unsupported_reason(device: torch.device, numbers: Any) -> str | None:
    if device.type != "cpu":
        return f"it serves cpu, not {device.type}"
    if unserved is not None or numbers is None or is_read(numbers):
        return unserved
    for name, number in zip(numbers._fields, numbers, strict=True):
        if isinstance(number, Tensor) and not transforms.on_host(number):
            path = _PATHS.get(name, name)
            return f"it takes numbers whose value can be read, and {path} is on {number.device}"
    return None


def instruction_sets() -> list[tuple[str, bool]]:
    """Return those that this processor has, best first: names, and whether a step is fast."""
    sets: list[tuple[str, bool]] = extension.instructions()
    return sets


def use(name: str) -> None:
    """Use this set of instructions from now on, for tests: results do not depend on it."""
    extension.use(name)


def _kernel(rule: int) -> Kernel:
    return Kernel(
        partial(_step_, rule),
        _unsupported_reason,
        step_to=partial(_step_to, rule),
        scales_gradients=True,
        takes_members=True,
        takes_leaves=True,
        launcher=partial(_Launcher, rule),
        serves_dtypes=serves_float64_alone,
        rounds_stochastically=True,
    )


ADAM = _kernel(ADAM_RULE)
ADAMW = _kernel(ADAMW_RULE)
SGD = _kernel(SGD_RULE)
LION = _kernel(LION_RULE)
