"""How a launch goes out: by the driver itself, once Triton has compiled the kernel.

Triton asks at each launch for the types of all arguments and for what was compiled for them, and
even a compiled kernel takes some ten microseconds from Python, as long as a small step. Here
arguments are always of the same types, so the extension calls the driver. Where it is not built,
where the kernel wants more than a plain launch, or where somebody wants to be told of launches, as
a profiler may, Triton launches.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from torch import Tensor

from .. import _native
from .triton_arguments import bits_of

_WARPS = 4


class Launch:
    """A kernel with certain constants, compiled at the first launch."""

    def __init__(self, source: Any, constants: dict[str, Any]) -> None:
        """Note what all launches have in common."""
        self._source, self._constants = source, constants
        self._kernel: Any = None  # as Triton compiled it
        self._plain: tuple[int, int, int] | None = None  # as the driver knows it

    def go(self, programs: int, stream: int, table: Tensor, *others: int | float) -> None:
        """Launch so many programs. Of a float, the kernel is given the bits."""
        if self._plain is not None and not self._source.launches_are_watched():
            function, threads, shared = self._plain
            arguments = (table.data_ptr(), *others)
            said = _native.extension.launch(
                _driver(), function, programs, threads, shared, stream, arguments
            )
            if said == 0:
                return
            # Whatever it is, such as a thread that never used the device, Triton mends it or says.
        grid, words = (programs, 1, 1), bits_of(others)
        if self._kernel is not None:
            self._kernel[grid](table, *words, *self._constants.values())
            return
        kernel = self._source.step_kernel[grid](
            table,
            *words,
            **self._constants,
            num_warps=_WARPS,
            enable_fp_fusion=False,  # rounded as the equations are written
        )
        if self._source.is_compiled(kernel):
            self._kernel = kernel
            if _native.extension is not None and _driver():
                self._plain = self._source.plain_launch_of(kernel)


@functools.cache
def _driver() -> int:
    """Return the address of the driver's function that launches a kernel, 0 if there is none."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            function = ctypes.CDLL(name).cuLaunchKernel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0
