"""What a step on a GPU costs the host: `python -m tests.benchmarks.host --against CHECKOUT`.

A GPU waits where the host cannot feed it. That cost is measured here without one: tensors of the
CPU are served as those on a GPU are (no value is read, all leaves of a dtype go together, to the
Triton kernel), and the launch is replaced by nothing. Beside it stands `torch.optim.AdamW` with
fused=True, whose `_fused_adamw_` and `_foreach_add_` are replaced by nothing as well, and, if it is
given, another checkout of funcopt. They take turns, so that each meets the same machine.

Not in it: the launches (some ten microseconds each), what the allocator of the GPU takes, and what
goes there from pinned memory. The operators of wrappers are in it, as they run on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

__all__ = ["ROOT", "Host", "compare", "main"]

ROOT = Path(__file__).parents[2]


class Host:
    """A process with steps of so many leaves, of the funcopt in a checkout."""

    def __init__(self, checkout: Path, leaves: int) -> None:
        """Start it."""
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("host_process.py")), str(leaves)],
            env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.names: list[str] = json.loads(self._answer())

    def __enter__(self) -> Host:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._end()

    def seconds(self, name: str, count: int) -> float:
        """Return how long a step takes, as the mean over so many."""
        return float(self._ask(name, str(count)))

    def operators(self, name: str) -> int:
        """Return how many operators of torch a step calls."""
        return int(self._ask(name, "operators"))

    def _ask(self, name: str, what: str) -> str:
        self._process.stdin.write(f"{name} {what}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with {self._end()}")
        return line

    def _end(self) -> int:
        self._process.stdin.close()
        self._process.stdout.close()
        return self._process.wait()


class Row(NamedTuple):
    """One step: microseconds, as the median over the rounds, and medians of ratios."""

    name: str
    microseconds: float
    to_torch: float
    to_other: float | None  # the same step of the other checkout


def compare(leaves: int, other: Path | None, rounds: int, count: int) -> list[Row]:
    """Measure all steps of this checkout, and of another one, in turn."""
    with Host(ROOT, leaves) as mine, Host(other or ROOT, leaves) as theirs:
        samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in mine.names}
        for _ in range(rounds):
            torchs = mine.seconds("torch", count)
            for name, found in samples.items():
                found.append((mine.seconds(name, count), torchs, theirs.seconds(name, count)))
    return [
        Row(
            name,
            1e6 * statistics.median(own for own, _, _ in found),
            statistics.median(own / torchs for own, torchs, _ in found),
            statistics.median(own / others for own, _, others in found) if other else None,
        )
        for name, found in samples.items()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each number of leaves."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.host", description=__doc__)
    add = parser.add_argument
    add("--against", type=Path, help="another checkout of funcopt, measured beside this one")
    add("--leaves", type=int, nargs="+", default=[4, 148, 2000], help="how many leaves a tree has")
    add("--rounds", type=int, default=15, help="how often each step is measured (default: 15)")
    options = parser.parse_args(arguments)
    for leaves in options.leaves:
        print(f"{leaves} leaves: microseconds of the host; ratio to torch's host", end="")
        print(f"; to {options.against}" if options.against else "")
        for row in compare(leaves, options.against, options.rounds, max(1, 1000 // leaves)):
            beside = "" if row.to_other is None else f" {row.to_other:8.2f}"
            print(f"  {row.name:14s} {row.microseconds:10.1f} {row.to_torch:8.2f}{beside}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
