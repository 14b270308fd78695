"""How busy the machine was with other programs meanwhile, which nothing here can make up for."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["Load"]


class Load:
    """Watches the processors from when it is made."""

    def __init__(self) -> None:
        self._start = _seconds()

    def of_others(self) -> float | None:
        """Return the share of all processors' time that went to others; None if unknown."""
        if self._start is None or (now := _seconds()) is None:
            return None
        whole, busy, own = (after - before for after, before in zip(now, self._start, strict=True))
        if whole < 1:  # the system counts in hundredths of a second
            return None
        return max(0.0, (busy - own) / whole)


def _seconds() -> tuple[float, float, float] | None:
    """The time of all processors so far, how much of it they worked, and how much for us."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
    idle = ticks[3] + ticks[4]
    return sum(ticks), sum(ticks) - idle, time.process_time()
