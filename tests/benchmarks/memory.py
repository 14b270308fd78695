"""How much memory a step takes at its peak, beyond what was in use before it.

Linux keeps the largest resident size a process ever had, and forgets it on request. Memory that an
allocator merely keeps for later would hide what a step takes, so it is given back to the system
first. Each candidate is alone in memory when it is measured.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

from .candidates import COMPILED, UPDATE, UPDATE_, all_candidates
from .measure import Absent, Candidate, Settings, Step, attempt
from .results import Figure, Row, Section, at_most
from .workloads import SHAPES, describe, random_like

__all__ = ["sections"]

_WORKLOAD = "gpt2-60m"
_SAMPLES = 5
_WARM_UP = 2
_TARGETS = {UPDATE_: at_most(0.1), UPDATE: at_most(3.1)}


def sections(settings: Settings) -> list[Section]:
    """Measure the peak memory of everyone's step."""
    shapes = SHAPES[_WORKLOAD]
    params, grads = (random_like(shapes, seed, settings.device) for seed in (0, 1))
    size = sum(param.nbytes for param in params.values())
    about = (
        f"The peak during a step beyond what was in use before it, by the largest of {_SAMPLES} "
        f"steps. What goes into the step, the results of the last one included, was there before."
    )
    rows = [
        _row(candidate, size)
        for candidate in all_candidates(params, grads)
        if candidate.name != COMPILED  # it would take a minute to say the same as fused
    ]
    title, in_words = f"memory, {_WORKLOAD}", describe(shapes)
    return [Section(title, in_words, about, "sizes of the parameters", rows, drawn=False)]


def _row(candidate: Candidate, size: int) -> Row:
    target = _TARGETS.get(candidate.name)
    peaks = attempt(candidate, peaks_of)
    if isinstance(peaks, str):
        return Row(candidate.name, None, target, peaks)
    return Row(candidate.name, Figure(max(peaks) / size), target)


def peaks_of(step: Step, samples: int = _SAMPLES) -> Sequence[int]:
    """Return for some calls how many bytes more than before were resident at the peak.

    Raises:
        Absent: Where the system does not tell.
    """
    for _ in range(_WARM_UP):
        step()
    try:
        return [_peak(step) for _ in range(samples)]
    except OSError:
        raise Absent("not measured: that needs Linux's /proc/self") from None


def _peak(step: Step) -> int:
    gc.collect()
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise OSError(f"/proc/self/status has no {field}")


def _give_back() -> None:
    """Let the allocator return what is free to the system, if it is glibc's."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
