"""What a check found: a verdict on each law, and the report of all."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import textwrap
import traceback
from pathlib import Path
from types import TracebackType

import hypothesis
import optree
import torch

from .._core.types import Tree

# Who calls the user's code here, or is called by it: a line in these is nobody's own.
_NOT_OWN = tuple(
    str(Path(str(own.__file__)).resolve().parent) + os.sep for own in (hypothesis, optree, torch)
)
_FUNCOPT = str(Path(__file__).resolve().parent.parent) + os.sep
_PYTHON = str(Path(os.__file__).resolve().parent) + os.sep
_KIT = str(Path(__file__).resolve().parent) + os.sep

_BROKEN = ("fails", "error")
_SKIPPED = ("not applicable", "skipped")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found of one law.

    Attributes:
        law: Its name.
        status: `"holds"`; `"fails"`; `"error"` (the optimizer raised); `"not applicable"` (it lacks
            what the law speaks of); or `"skipped"` (as `skip=` asked).
        detail: Why it does not apply or was skipped, or how it fails.
        example: The smallest parameters and gradients found that break it; None otherwise.
        error: What was raised, with its traceback, if it fails or the optimizer raised.
        place: The line of the optimizer's own code that raised, as `file:line, in function: code`.
        seconds: How long it took.
    """

    law: str
    status: str
    detail: str = ""
    example: tuple[Tree, list[Tree]] | None = None
    error: Exception | None = dataclasses.field(default=None, compare=False, repr=False)
    place: str = ""
    seconds: float = dataclasses.field(default=0.0, compare=False, repr=False)

    @property
    def cause(self) -> tuple[str, ...]:
        """What breaks it: the same for laws that break by the same exception at the same place.

        An exception of another size or element is the same one: numbers in its message are left
        out.
        """
        if self.status != "error":
            return (self.law,)
        return (self.status, re.sub(r"\d+", "#", self.detail), self.place)

    def __str__(self) -> str:
        return _entry((self,))


@dataclasses.dataclass(frozen=True)
class Report:
    """The verdicts on one optimizer; printed, one law a line.

    Laws at which the optimizer raised the same exception are printed as one entry. A law that does
    not apply, or that `skip=` names, is printed as skipped, with the reason.
    """

    optimizer: str
    verdicts: tuple[Verdict, ...]

    @property
    def ok(self) -> bool:
        """Whether every law that applies holds."""
        return not self.broken

    @property
    def broken(self) -> tuple[str, ...]:
        """The names of the laws that do not hold, or at which the optimizer raised."""
        return tuple(v.law for v in self.verdicts if v.status in _BROKEN)

    @property
    def skipped(self) -> dict[str, str]:
        """The laws that were not judged, and why."""
        return {v.law: v.detail for v in self.verdicts if v.status in _SKIPPED}

    def require(self) -> None:
        """Raise if a law is broken; in a test of pytest, skip it if no law was judged.

        So a law that does not apply is not counted among the tests that passed.

        Raises:
            AssertionError: If a law is broken. The message is the report, and the cause the first
                exception.

        Example:
            >>> import funcopt
            >>> from funcopt.testing import check_optimizer
            >>> report = check_optimizer(funcopt.SGD(lr=0.1), laws=["deterministic"])
            >>> report.require()
        """
        if not self.ok:
            first = next(v.error for v in self.verdicts if v.status in _BROKEN)
            raise AssertionError(str(self)) from first
        in_pytest = "PYTEST_CURRENT_TEST" in os.environ and "pytest" in sys.modules
        if in_pytest and self.verdicts and len(self.skipped) == len(self.verdicts):
            sys.modules["pytest"].skip("; ".join(self.skipped.values()))

    def times(self) -> str:
        """Return a line for each law with the seconds that it took, the longest first.

        Example:
            >>> import funcopt
            >>> from funcopt.testing import check_optimizer
            >>> report = check_optimizer(funcopt.SGD(lr=0.1), laws=["deterministic"])
            >>> report.times().split()[-1]
            'deterministic'
        """
        slowest = sorted(self.verdicts, key=lambda v: -v.seconds)
        return "\n".join(f"{v.seconds:8.2f} s  {v.law}" for v in slowest)

    def __str__(self) -> str:
        counts = {
            "hold": sum(v.status == "holds" for v in self.verdicts),
            "broken": len(self.broken),
            "skipped": len(self.skipped),
        }
        summary = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        together: dict[tuple[str, ...], list[Verdict]] = {}
        for verdict in self.verdicts:
            together.setdefault(verdict.cause, []).append(verdict)
        return "\n".join([f"{self.optimizer}: {summary}", *map(_entry, together.values())])


_INDENT = " " * 18


def _entry(verdicts: list[Verdict] | tuple[Verdict, ...]) -> str:
    """Print the verdicts of one cause."""
    first, count = verdicts[0], len(verdicts)
    status = "skipped" if first.status in _SKIPPED else first.status
    detail = first.detail if not first.detail or first.status != "skipped" else _asked(first.detail)
    if count == 1:
        lines = [f"  {status:<15} {first.law}" + (f": {detail}" if detail else "")]
    else:
        lines = [f"  {status:<15} in {count} laws: {detail}"]
        names = ", ".join(verdict.law for verdict in verdicts)
        lines += textwrap.wrap(names, 100, initial_indent=_INDENT, subsequent_indent=_INDENT)
    if first.error is not None and first.status == "error":
        lines += [f"{_INDENT}{line}" for line in own_lines(first.error)]
    if first.example is not None:
        params, gradients = first.example
        lines.append(f"{_INDENT}params = {params!r}".replace("\n", " "))
        lines.append(f"{_INDENT}gradients = {gradients!r}".replace("\n", " "))
    return "\n".join(lines)


def _asked(reason: str) -> str:
    return f"as asked: {reason}"


def own_lines(error: BaseException) -> list[str]:
    """Return the lines of a traceback that are of the optimizer, the one that raised last.

    Where none is the user's own, those of the library outside of this kit.
    """
    frames = traceback.extract_tb(_of(error))
    own = [f for f in frames if _is_own(f.filename)]
    outside = [f for f in frames if not f.filename.startswith((_KIT, _NOT_OWN[0], _NOT_OWN[1]))]
    return [
        f"at {f.filename}:{f.lineno}, in {f.name}: {(f.line or '').strip()}"
        for f in own or outside[-1:]
    ]


def _is_own(filename: str) -> bool:
    name = str(Path(filename).resolve())
    of_python = name.startswith(_PYTHON) and "site-packages" not in name
    return not (of_python or name.startswith((*_NOT_OWN, _FUNCOPT)) or filename.startswith("<"))


def _of(error: BaseException) -> TracebackType | None:
    """Return the traceback of an exception, or of what it was raised from, which says where."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error.__traceback__
