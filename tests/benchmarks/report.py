"""The report: what was measured on, the tables, and which targets hold, in Markdown."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import optree
import torch

import funcopt
from funcopt.optimizers import _native

from . import peers
from .results import Row, Section, shown

__all__ = ["failing", "header", "markdown"]

_PEERS = {"TorchOpt": "torchopt", "optax": "optax", "jax": "jax"}


def header(device: torch.device, arguments: Sequence[str]) -> str:
    """Say what was run, with which versions, on which machine."""
    versions = {"Python": platform.python_version(), "torch": str(torch.__version__)}
    versions["optree"] = optree.__version__
    versions |= {name: peers.version(library) for name, library in _PEERS.items()}
    machine = f"{_processor()}, cores: {os.cpu_count()}, torch's threads: {torch.get_num_threads()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        machine = f"{name}, CUDA {torch.version.cuda}; {machine}"
    lines = [
        f"- command: `{shlex.join(['python', '-m', __package__ or '', *arguments])}`",
        f"- versions: {', '.join(f'{name} {number}' for name, number in versions.items())}",
        f"- machine: {machine}",
        f"- funcopt's kernels for AdamW there: {', '.join(_kernels(device))}",
        "- figures: the median over rounds of what a step takes as a multiple of what the baseline "
        "takes in the same round, and the quartiles; so 0.5 is twice as fast. A figure is judged "
        "as it is shown.",
    ]
    return "\n".join(lines)


def _kernels(device: torch.device) -> list[str]:
    """Return those that serve, in the order in which they are tried, the native one in detail."""
    rule = funcopt.AdamW.rule
    names = [n for n in rule.kernels if rule.kernel(n).unsupported_reason(device, None) is None]
    instructions = _native.instruction_sets()[0][0] if "native" in names else ""
    return [f"native ({instructions})" if name == "native" else name for name in names]


def markdown(heading: str, sections: Sequence[Section]) -> str:
    """Return the whole report."""
    parts = ["# Benchmarks", heading]
    for section in sections:
        about = f"{section.size}. {section.about}".strip()
        parts += [f"## {section.title}", about, _table(section)]
    return "\n\n".join([*parts, "## Targets", _summary(sections)]) + "\n"


def failing(sections: Iterable[Section]) -> list[str]:
    """Return the rows whose targets do not hold."""
    return _judged(sections, "no")


def _judged(sections: Iterable[Section], verdict: str) -> list[str]:
    return [
        f"{section.title}: {row.label}"
        for section in sections
        for row in section.rows
        if row.verdict == verdict
    ]


def _summary(sections: Sequence[Section]) -> str:
    holding, broken, open_ = (_judged(sections, word) for word in ("yes", "no", "not judged"))
    lines = [f"{len(holding)} of {len(holding) + len(broken)} targets hold."]
    for intro, names in (("Not held:", broken), ("Not judged:", open_)):
        if names:
            lines.append("\n".join([intro, "", *(f"- {name}" for name in names)]))
    return "\n\n".join(lines)


def _table(section: Section) -> str:
    lines = [["", section.unit, "quartiles", "target", "holds", "remark"]]
    lines += [_cells(row) for row in section.rows]
    columns = [column for column in zip(*lines, strict=True) if any(column[1:])]
    widths = [max(3, *map(len, column)) for column in columns]
    padded = [list(map(str.ljust, line, widths)) for line in zip(*columns, strict=True)]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _cells(row: Row) -> list[str]:
    figure = "" if row.figure is None else shown(row.figure.value)
    quartiles = ""
    if row.figure is not None and row.figure.low is not None and row.figure.high is not None:
        quartiles = f"{shown(row.figure.low)} to {shown(row.figure.high)}"
    target = "" if row.target is None else str(row.target)
    return [row.label, figure, quartiles, target, row.verdict, row.note]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
