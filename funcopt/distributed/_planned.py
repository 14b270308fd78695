"""The result of a plan: its rows, as a table and as a picture."""

from __future__ import annotations

import importlib
import itertools
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

from .._core.types import Optimizer

_COLORS = ("#0072b2", "#e69f00", "#cc79a7")


class PlanRow(NamedTuple):
    """What a run on so many processes takes of each of them, in bytes.

    Attributes:
        ranks: How many processes.
        state: The state on the first process, which has most of it.
        least_state: The state on the last one, which has least.
        collectives: How many collectives all planned steps make together, by kind.
        sent: How much one process sends in them, by kind.
        peak: The most that is alive at once in a step by `update`.
        peak_in_place: The same in one by `update_`.

    Example:
        >>> import torch, funcopt
        >>> from funcopt.distributed import plan
        >>> opt = funcopt.Adam(kernel="fused")
        >>> plan(opt, {"w": torch.empty(1000)}, 2).rows[0].peak_in_place
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
        >>> found = plan(Zero1(funcopt.Adam(), None), {"w": torch.empty(1000, device="meta")}, 8)
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
        title = (
            f"parameters {_text(self.params)}, gradients as much; {self.backend}, {self._steps()}"
        )
        table = ("  ".join(map(str.rjust, line, widths)) for line in lines)
        return "\n".join([title, *table])

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Write a picture of memory and traffic over the number of processes.

        The ending of the path says in which format, such as `.png` or `.svg`.

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
        self._draw_memory(memory)
        self._draw_traffic(traffic)
        for axes in (memory, traffic):
            axes.set_xticks(range(len(self.rows)), [f"{row.ranks:,}" for row in self.rows])
            axes.yaxis.set_major_formatter(lambda nbytes, _: _text(round(nbytes)))
            axes.set_xlabel("processes")
            axes.set_xlim(-0.5, len(self.rows) - 0.5)
            axes.set_axisbelow(True)
            axes.grid(axis="y", alpha=0.3)
        figure.savefig(path, dpi=150)

    def _draw_memory(self, axes: Any) -> None:
        for label, color, marker, values in (
            ("peak of update", "#d55e00", "o", [row.peak for row in self.rows]),
            ("peak of update_", "#0072b2", "s", [row.peak_in_place for row in self.rows]),
            ("state", "#009e73", "^", [row.state for row in self.rows]),
        ):
            axes.plot(values, color=color, marker=marker, label=label)
        axes.axhline(self.params, color="0.5", linestyle=":", label="parameters")
        axes.set_yscale("log", base=8)  # so that ticks are at round numbers of MiB and GiB
        axes.minorticks_off()
        axes.set_title("Memory of one process")
        axes.legend(frameon=False)

    def _draw_traffic(self, axes: Any) -> None:
        tops = [0] * len(self.rows)
        for kind, color in zip(self._kinds(), itertools.cycle(_COLORS)):
            sent = [row.sent.get(kind, 0) for row in self.rows]
            calls = max(row.collectives.get(kind, 0) for row in self.rows)
            label = f"{kind}, {calls} of them"
            axes.bar(range(len(sent)), sent, bottom=tops, color=color, width=0.6, label=label)
            tops = [top + more for top, more in zip(tops, sent, strict=True)]
        highest = max(tops, default=0)
        step = 1 << (highest // 5).bit_length()
        axes.set_yticks(range(0, highest + step, step))
        axes.set_ylim(0, max(1.3 * highest, 1))  # with room for the legend
        axes.set_title(f"Sent by one process in {self._steps()} ({self.backend})")
        if any(tops):
            axes.legend(frameon=False, loc="upper left")
        else:
            axes.text(0.5, 0.5, "nothing", transform=axes.transAxes, ha="center")

    def _steps(self) -> str:
        return "a step" if self.steps == 1 else f"{self.steps} steps"

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
