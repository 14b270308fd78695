"""How long one has to wait for `torch.compile(opt.update)`.

An update of few leaves is asked to become one graph. One of many stays out of the graph, and how
soon that is so is measured.

Run as a module of its own, it compiles for one tree and prints the seconds. That happens in a new
process with an empty cache, so that nothing compiled before makes it look fast, and so that it can
be stopped when it takes too long.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time

import torch

import funcopt

from .processes import OutOfTime, ask
from .results import Figure, Row, Section, below
from .workloads import SHAPES, describe, random_like

__all__ = ["sections"]

# Whether the update has to become one graph.
_FULLGRAPH = {"gpt2-60m": True, "leaves-2000": False}

_LIMIT = 120  # seconds
_TARGET = 60


def sections() -> list[Section]:
    """Measure compiling."""
    about = (
        f"Until the first call returns, with nothing in the cache. It is stopped after {_LIMIT} s."
    )
    rows = [_row(workload) for workload in _FULLGRAPH]
    return [Section("compile", "`torch.compile(opt.update)`", about, "seconds", rows, drawn=False)]


def _row(workload: str) -> Row:
    label = f"funcopt update, {workload}"
    graph = "one graph" if _FULLGRAPH[workload] else "stays out of the graph"
    note = f"{describe(SHAPES[workload])}; {graph}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        try:
            seconds = ask(
                "compiling", workload, limit=_LIMIT, environment={"TORCHINDUCTOR_CACHE_DIR": cache}
            )
        except OutOfTime:
            seconds, note = math.inf, f"{note}; stopped after {_LIMIT} s"
        except RuntimeError as error:
            seconds, note = math.inf, f"{note}; fails: {error}"
    return Row(label, Figure(seconds), below(_TARGET), note)


def _compile(workload: str) -> float:
    device = torch.device("cpu")
    params, grads = (random_like(SHAPES[workload], seed, device) for seed in (0, 1))
    opt = funcopt.AdamW()
    state = opt.init(params)
    start = time.perf_counter()
    torch.compile(opt.update, fullgraph=_FULLGRAPH[workload])(grads, state, params)
    return time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps(_compile(sys.argv[1])))
