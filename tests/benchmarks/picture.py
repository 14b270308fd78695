"""The picture: for each workload a panel, for each candidate a dot with its quartiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, NullLocator

from .results import Row, Section, shown

__all__ = ["draw"]

# After Okabe and Ito, whose colours the colour-blind can tell apart. The labels say the same.
_COLORS = {"TorchOpt": "#D55E00", "optax": "#00795A", "torch": "#333333"}
_OURS = "#0072B2"
_LIMIT = "#777777"

_FEW_TICKS = (0.001, 0.01, 0.1, 1, 10, 100)
_TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
_ROW = 0.24  # inches
_FRAME = 1.2  # inches: title, ticks and label of a panel


def draw(sections: Sequence[Section], path: Path) -> bool:
    """Draw all ratios of times, and say whether there are any."""
    groups: dict[str, list[Section]] = {}
    for section in sections:
        if section.drawn:
            groups.setdefault(section.unit, []).append(section)
    if not groups:
        return False
    first, *others = groups.values()
    lines = [[first], others] if others else [[first]]
    heights = [max(_FRAME + _ROW * len(_labels(group)) for group in line) for line in lines]
    with mpl.rc_context({"font.size": 9, "axes.titlesize": 10}):
        figure = Figure(figsize=(10, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(lines), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, line in zip(parts, lines, strict=True):
            widths = [len(group) + 0.75 for group in line]
            cells = part.subfigures(1, len(line), width_ratios=widths, squeeze=False)[0]
            for cell, group in zip(cells, line, strict=True):
                _draw_group(cell, group)
        figure.savefig(path, dpi=160)
    return True


def _labels(group: Sequence[Section]) -> list[str]:
    rows = (row for section in group for row in section.rows)
    return list(dict.fromkeys(row.label for row in rows if row.drawn))


def _draw_group(part: SubFigure, group: Sequence[Section]) -> None:
    """Draw workloads that have their baseline and candidates in common."""
    labels = _labels(group)
    panels = part.subplots(1, len(group), sharex=True, sharey=True, squeeze=False)[0]
    for axes, section in zip(panels, group, strict=True):
        _draw_section(axes, section, labels)
    panels[0].set_yticks(range(len(labels)), labels)
    for tick in panels[0].get_yticklabels():
        tick.set_color(_color(tick.get_text()))
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    _set_scale(panels[0], group)
    part.supxlabel(f"{group[0].unit}  (log scale; left of 1 is faster)", fontsize=9)


def _draw_section(axes: Axes, section: Section, labels: Sequence[str]) -> None:
    axes.set_title(section.title, loc="left", fontweight="bold", pad=30)
    size = section.size.replace(" in ", "\nin ")
    just_above = {"xycoords": "axes fraction", "textcoords": "offset points", "xytext": (0, 4)}
    axes.annotate(size, (0, 1), va="bottom", fontsize=8, color="#555555", **just_above)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1, zorder=1)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    rows = {row.label: row for row in section.rows}
    for position, label in enumerate(labels):
        _draw_row(axes, position, rows.get(label))


def _draw_row(axes: Axes, position: int, row: Row | None) -> None:
    """Draw the dot, the whiskers, and at the right edge the figure in digits."""
    beside = {"x": 1.01, "y": position, "transform": axes.get_yaxis_transform(), "va": "center"}
    if row is None or row.figure is None:
        axes.text(s="-", color=_LIMIT, **beside)
        return
    value, low, high = row.figure
    color = _color(row.label)
    if low is not None and high is not None:
        axes.plot([low, high], [position] * 2, color=color, linewidth=1.6, alpha=0.6)
    marker = "D" if "limit" in row.label else "o"
    axes.plot(value, position, marker, color=color, markersize=6 if color == _OURS else 5)
    axes.text(s=shown(value), color=color, fontsize=8, **beside)


def _color(label: str) -> str:
    if "limit" in label:
        return _LIMIT
    return next((color for start, color in _COLORS.items() if label.startswith(start)), _OURS)


def _set_scale(axes: Axes, group: Sequence[Section]) -> None:
    """Make room for all medians. Whiskers of a restless machine may leave the picture."""
    rows = [row for section in group for row in section.rows if row.drawn and row.figure]
    values = [row.figure.value for row in rows if row.figure and row.figure.value > 0]
    lowest, highest = min(0.5, *values), max(2.0, *values)
    axes.set_xlim(lowest / 1.25, highest * 1.25)
    candidates = _TICKS if highest < 60 * lowest else _FEW_TICKS
    ticks = [tick for tick in candidates if lowest / 1.25 < tick < highest * 1.25]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
