"""How much memory steps take at their peak, beyond what was in use before them.

Linux keeps the largest resident size a process ever had, and forgets it on request. Memory that an
allocator merely keeps for later would hide what a step takes, so it is given back to the system
first; so is what funcopt keeps of results. Then come so many steps that all is kept again that ever
will be: the peak includes it.

Run as a module of its own, it measures one candidate and prints its figures. Each is measured in a
new process: an allocator whose memory others have cut into pieces needs more of it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import funcopt

from .candidates import COMPILED, UPDATE, UPDATE_, all_candidates
from .measure import Absent, Step, attempt
from .processes import ask
from .results import Figure, Row, Section, at_most
from .workloads import SHAPES, describe, random_like

__all__ = ["sections"]

_WORKLOAD = "gpt2-60m"
_SAMPLES = 5
_LIMIT = 600  # seconds
# So that glibc returns what is freed at once: what it keeps depends on what was freed before.
_RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
_WARM_UP = 2
# The first two write into memory that is kept from then on, the third into what the first kept.
_STEPS = 3
_SETTING = " ".join(f"`{name}={value}`" for name, value in _RETURNING.items())
_TARGETS = {UPDATE_: at_most(0.1), UPDATE: at_most(3.1)}
# What remains of that once it is given back.
_MOST_LEFT = at_most(0.1)


def sections() -> list[Section]:
    """Measure the peak memory of everyone's steps."""
    about = (
        f"The peak during {_STEPS} steps beyond what was in use before them, by the largest of "
        f"{_SAMPLES} samples. What goes into the first, the results of the last one included, was "
        f"there before. What funcopt keeps was given back before, and counts from then on. The "
        f"allocator returns what is freed at once ({_SETTING})."
    )
    rows = [
        row
        for candidate in all_candidates({}, {})
        if candidate.name != COMPILED  # it would take a minute to say the same as fused
        for row in _rows(candidate.name)
    ]
    title, in_words = f"memory, {_WORKLOAD}", describe(SHAPES[_WORKLOAD])
    return [Section(title, in_words, about, "sizes of the parameters", rows, drawn=False)]


def _rows(name: str) -> list[Row]:
    target = _TARGETS.get(name)
    found = ask("memory", name, limit=_LIMIT, environment=_RETURNING)
    if isinstance(found, str):
        return [Row(name, None, target, found)]
    peak, left = found
    rows = [Row(name, Figure(peak), target)]
    if name == UPDATE:
        rows.append(Row(f"{UPDATE}, after memory.release()", Figure(left), _MOST_LEFT))
    return rows


def _measure(name: str) -> tuple[float, float] | str:
    """Return the largest peak of a candidate, and the most that is left; or why there is none."""
    shapes, device = SHAPES[_WORKLOAD], torch.device("cpu")
    params, grads = (random_like(shapes, seed, device) for seed in (0, 1))
    size = sum(param.nbytes for param in params.values())
    (candidate,) = (own for own in all_candidates(params, grads) if own.name == name)
    uses = attempt(candidate, used_by)
    if isinstance(uses, str):
        return uses
    return max(use.peak for use in uses) / size, max(use.left for use in uses) / size


class Use(NamedTuple):
    """How many bytes more than before some steps were resident."""

    peak: int
    left: int  # afterwards, when all that is kept is given back


def used_by(step: Step, samples: int = _SAMPLES) -> Sequence[Use]:
    """Return how much memory a few calls in a row use, for some such samples.

    Raises:
        Absent: Where the system does not tell.
    """
    for _ in range(_WARM_UP):
        step()
    try:
        return [_use(step) for _ in range(samples)]
    except OSError:
        raise Absent("not measured: that needs Linux's /proc/self") from None


def _use(step: Step) -> Use:
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
    before = _resident("VmRSS")
    for _ in range(_STEPS):
        step()
    peak = _resident("VmHWM") - before
    _give_back()
    return Use(peak, _resident("VmRSS") - before)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise OSError(f"/proc/self/status has no {field}")


def _give_back() -> None:
    """Return to the system what funcopt keeps, and what the allocator does, if it is glibc's."""
    gc.collect()
    funcopt.memory.release()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1])))
