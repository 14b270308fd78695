"""Ctrl-C at every place where it can come: real ones, each at a chosen bytecode.

CPython notices that a signal came after certain bytecodes only (calls, the start of a function,
jumps backward), and then calls its handler. So a function is run once under a tracer that lists
those places, and once more for each: just before the bytecode the interrupt is set, by a function
in C, after which CPython notices it wherever it does so.
"""

from __future__ import annotations

import ctypes
import dis
import gc
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import funcopt

__all__ = ["PACKAGE", "interrupts"]

PACKAGE = str(pathlib.Path(funcopt.__file__).parent)
_NOTICING = ("CALL", "JUMP_BACKWARD", "FOR_ITER", "BEFORE_WITH")

# Sets the flag that a signal handler in C sets when Ctrl-C comes. Called as a trace function; no
# Python code runs between it and the bytecode that was waited for.
_set_interrupt: Any = ctypes.PyDLL(None).PyErr_SetInterrupt
_set_interrupt.argtypes = [ctypes.py_object] * 3
_set_interrupt.restype = None


class _Tracer:
    """Lists the places in what a function of the package calls, or interrupts at one of them."""

    def __init__(self, within: str, armed_at: int | None = None) -> None:
        self._within = within
        self.places: list[tuple[Any, int, int]] = []  # code, offset, and where to arm for it
        self._armed_at = armed_at
        self._count = 0
        self._last: dict[FrameType | None, int] = {}  # the last event in a frame

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        inside = file.startswith(PACKAGE) or frame.f_back in self._last
        if event != "call" or not inside or not file.startswith(self._within):
            return None
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        return self._note(frame)

    def _note(self, frame: FrameType) -> Any:
        number, self._count = self._count, self._count + 1
        self._last[frame] = number
        return _set_interrupt if number == self._armed_at else self._local

    def _local(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "return":
            self._last.pop(frame, None)
            return self._local
        if event != "opcode":
            return self._local
        opcode = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        if self._armed_at is None and opcode.startswith(_NOTICING):
            self.places.append((frame.f_code, frame.f_lasti, self._last[frame]))
        return self._note(frame)


def _on_interrupt(_: int, frame: FrameType | None) -> None:
    sys.settrace(None)
    while frame is not None:
        frame.f_trace = None
        frame = frame.f_back
    raise KeyboardInterrupt


def interrupts(
    make: Callable[[], Callable[[], Any]], warm: int = 3, within: str = ""
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield for each place its name, and a function that makes a call and interrupts it there.

    Args:
        make: Makes what is to be called, anew each time.
        warm: How often it is called before, so that what is found out once was found out.
        within: The start of the path of the files whose places are wanted. By default those of the
            package, and of all that they call.
    """
    for _ in range(warm):
        make()()
    listed = _Tracer(within)
    _trace(listed, make())
    seen = set()
    for code, offset, armed_at in listed.places:
        if (code, offset) in seen:
            continue
        seen.add((code, offset))
        line = list(code.co_positions())[offset // 2][0]
        name = f"{pathlib.Path(code.co_filename).name}:{line} {code.co_qualname} at {offset}"
        yield name, lambda armed_at=armed_at: _trace(_Tracer(within, armed_at), make())


def _trace(tracer: _Tracer, function: Callable[[], Any]) -> None:
    collecting, handler = gc.isenabled(), signal.signal(signal.SIGINT, _on_interrupt)
    lost: list[Any] = []  # Python drops what is raised where a generator is being freed
    hook, sys.unraisablehook = sys.unraisablehook, lost.append
    gc.disable()
    sys.settrace(tracer)
    try:
        function()
    finally:
        sys.settrace(None)
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, handler)
        if collecting:
            gc.enable()
    if lost:
        raise KeyboardInterrupt
