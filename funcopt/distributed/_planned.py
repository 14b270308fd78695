"""What a plan says: its rows, as a table and as a picture."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

from .._types import Optimizer

__all__ = ["Plan", "PlanRow"]


class PlanRow(NamedTuple):
    """What a run on so many processes takes of each of them, in bytes.

    Attributes:
        ranks: How many processes.
        state: The state on the one that has most of it, the first.
        least_state: The state on the one that has least, the last.
        collectives: How many collectives a step makes, by kind.
        sent: How much one process sends in them, by kind.
        peak: The most that is alive at once in a step by `update`.
        peak_in_place: And in one by `update_`.

    Example:
        >>> import torch, funcopt
        >>> from funcopt.distributed import plan
        >>> plan(funcopt.AdamW(), {"w": torch.empty(1000)}, 2).rows[0].peak_in_place
        16012
    """

    ranks: int
    state: int
    least_state: int
    collectives: dict[str, int]
    sent: dict[str, int]
    peak: int
    peak_in_place: int


@dataclass(frozen=True)
class Plan:
    """What `plan` found: a table as `str`, its rows, and a picture by `draw`.

    Attributes:
        opt: The optimizer that was planned for.
        params: The bytes of all parameters, and of all gradients.
        backend: The backend that was planned for.
        steps: Over how many steps `collectives` and `sent` are added up.
        rows: One for each number of processes.

    Example:
        >>> import torch, funcopt
        >>> from funcopt.distributed import Zero1, plan
        >>> found = plan(Zero1(funcopt.AdamW(), None), {"w": torch.empty(1000, device="meta")}, 8)
        >>> found.params, found.rows[0].state
        (4000, 1008)
    """

    opt: Optimizer[Any]
    params: int
    backend: str
    steps: int
    rows: tuple[PlanRow, ...]

    def __str__(self) -> str:
        """Return a table."""
        kinds = self._kinds()
        head = ["ranks", "state", "(least)", "peak", "in place"]
        lines = [[*head, *(f"{kind} sent" for kind in kinds)]]
        for row in self.rows:
            memory = map(_text, (row.state, row.least_state, row.peak, row.peak_in_place))
            traffic = (f"{row.collectives.get(k, 0)} x, {_text(row.sent.get(k, 0))}" for k in kinds)
            lines.append([f"{row.ranks:,}", *memory, *traffic])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        steps = "a step" if self.steps == 1 else f"{self.steps} steps"
        title = f"parameters {_text(self.params)}, gradients as much; {self.backend}, {steps}"
        table = ("  ".join(map(str.rjust, line, widths)) for line in lines)
        return "\n".join([title, *table])

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Write a picture of memory and traffic over the number of processes.

        Args:
            path: Where to. Its ending says in which format, such as `.png` or `.svg`.

        Raises:
            ImportError: If matplotlib is not installed, which the extra `funcopt[plot]` brings.
        """
        try:
            figures: Any = importlib.import_module("matplotlib.figure")
        except ImportError as error:
            raise ImportError(
                "to draw a plan takes matplotlib: pip install 'funcopt[plot]'"
            ) from error
        figure = figures.Figure(figsize=(9, 4), layout="constrained")
        memory, traffic = figure.subplots(1, 2)
        ranks = [row.ranks for row in self.rows]
        for label, color, marker, values in (
            ("peak of update", "#d55e00", "o", [row.peak for row in self.rows]),
            ("peak of update_", "#0072b2", "s", [row.peak_in_place for row in self.rows]),
            ("state", "#009e73", "^", [row.state for row in self.rows]),
        ):
            memory.plot(ranks, values, color=color, marker=marker, label=label)
        memory.axhline(self.params, color="0.5", linestyle=":", label="parameters")
        memory.set_title("Memory of one process")
        for kind, color, marker in zip(
            self._kinds(), ("#0072b2", "#e69f00", "#cc79a7"), "osD", strict=False
        ):
            sent = [row.sent.get(kind, 0) for row in self.rows]
            calls = self.rows[-1].collectives.get(kind, 0)
            traffic.plot(ranks, sent, color=color, marker=marker, label=f"{kind}, {calls} calls")
        traffic.axhline(self.params, color="0.5", linestyle=":", label="parameters")
        steps = "a step" if self.steps == 1 else f"{self.steps} steps"
        traffic.set_title(f"Sent by one process in {steps} ({self.backend})")
        for axes in (memory, traffic):
            axes.set_xscale("log", base=2)
            axes.set_xticks(ranks, [f"{size:,}" for size in ranks])
            axes.minorticks_off()
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: _text(int(value)))
            axes.set_xlabel("processes")
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        figure.savefig(path, dpi=150)

    def _kinds(self) -> list[str]:
        return list(dict.fromkeys(kind for row in self.rows for kind in row.collectives))


def _text(nbytes: int) -> str:
    """Return a number of bytes for people: 1.5 GiB."""
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{nbytes} B" if unit == "B" else f"{value:,.1f} {unit}"
