"""The command line: `python -m tests.benchmarks --help`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import compiling, ensembles, memory, picture, report, steps, training, unroll
from .measure import Settings
from .results import Section

Measure = Callable[[Settings], list[Section]]


def _one(module_section: Callable[[str, Settings], Section], workload: str) -> Measure:
    return lambda settings: [module_section(workload, settings)]


WORKLOADS: dict[str, Measure] = {
    **{name: _one(steps.section, name) for name in steps.WORKLOADS},
    **{name: _one(ensembles.section, name) for name in ensembles.WORKLOADS},
    **{name: _one(training.section, name) for name in training.WORKLOADS},
    "unroll": unroll.sections,
    "memory": lambda _: memory.sections(),
    "compile": lambda _: compiling.sections(),
}

# The others measure what a GPU does not change, or is too small for one.
ON_A_GPU = ("gpt2-60m", "resnet-25m", "leaves-2000", "mlp", "ensemble-large", "training")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    settings = Settings(options.device, options.rounds, options.seconds)
    heading = report.header(options.device, arguments)
    sections: list[Section] = []
    for workload in options.only:
        start = time.monotonic()
        print(f"{workload} ...", end=" ", file=sys.stderr, flush=True)
        sections += WORKLOADS[workload](settings)
        print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    text = report.markdown(heading, sections)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.md").write_text(text)
    print(text)
    files = "results.md"
    if picture.draw(sections, options.output / "results.png"):
        files += " and results.png"
    print(f"Written to {options.output}: {files}.")
    return 1 if options.check and report.failing(sections) else 0


class Options(argparse.Namespace):
    """The flags, once they are known to make sense."""

    only: list[str]
    rounds: int
    seconds: float
    device: torch.device
    output: Path
    check: bool


def _parse(arguments: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description="Measure the speed and the memory of funcopt, torch.optim and other libraries.",
    )
    add = parser.add_argument
    add(
        "--only",
        nargs="+",
        choices=WORKLOADS,
        metavar="WORKLOAD",
        help=f"measure these alone, of {', '.join(WORKLOADS)}",
    )
    add(
        "--rounds",
        type=int,
        default=100,
        help="at most so many samples of each candidate (default: 100)",
    )
    add(
        "--seconds",
        type=float,
        default=20.0,
        help="stop a workload after so many seconds of measuring, though not before five rounds "
        "(default: 20)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (default: cpu)")
    add(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results",
        help="the folder for results.md and results.png (default: results, beside the benchmark)",
    )
    add(
        "--check",
        action="store_true",
        help="exit with status 1 if a target does not hold; one that cannot be judged, for want of "
        "another library, does not count",
    )
    options = parser.parse_args(arguments, namespace=Options())
    if options.rounds < 1:
        parser.error("argument --rounds: must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: this torch finds no CUDA device here")
    options.device = torch.device(options.device)
    on_cpu = options.device.type == "cpu"
    options.only = options.only or list(WORKLOADS if on_cpu else ON_A_GPU)
    refused = [] if on_cpu else [name for name in options.only if name not in ON_A_GPU]
    if refused:
        parser.error(f"argument --only: measured on the CPU alone: {', '.join(refused)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
