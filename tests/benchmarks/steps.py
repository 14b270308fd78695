"""One step on one tree: everyone against torch's fused step."""

from __future__ import annotations

import statistics

from . import candidates, peers
from .candidates import BASELINE, LIMIT, PASSES, UPDATE, UPDATE_
from .measure import Measured, Settings, compare
from .results import Row, Section, Target, at_least, at_most
from .workloads import SHAPES, Tensors, describe, random_like

__all__ = ["WORKLOADS", "section"]

# What update_ and update are held to on the CPU, as multiples of the fused step.
_BOUNDS = {
    "gpt2-60m": (1.00, 1.08),
    "resnet-25m": (1.00, 1.10),
    "leaves-2000": (0.25, 0.45),
    "mlp": (0.60, 0.90),
    "mlp-tiny": (0.45, 0.60),
}
_BOUNDS_ON_A_GPU = (1.00, 1.10)

# And update to other libraries' steps, on the largest tree.
_TO_PEERS = {peers.OPTAX: at_most(0.30), peers.TORCHOPT: at_most(0.12)}

WORKLOADS = tuple(_BOUNDS)

# So large that nothing stays in a cache, so that moving memory is what a step waits for.
_LARGE = ("gpt2-60m", "resnet-25m")

_ABOUT_THE_LIMIT = (
    f"The memory-bandwidth limit is {PASSES:g} times what it takes, in the same round, to move 2 "
    f"sizes of the parameters by one operator: a step has to move {2 * PASSES:g}."
)


def section(workload: str, settings: Settings) -> Section:
    """Measure a workload."""
    shapes = SHAPES[workload]
    params, grads = (random_like(shapes, seed, settings.device) for seed in (0, 1))
    everyone = candidates.all_candidates(params, grads)
    if workload in _LARGE:
        everyone.append(candidates.memory_candidate(params))
    measured = compare(everyone, settings)
    on_cpu = settings.device.type == "cpu"
    bounds = _BOUNDS[workload] if on_cpu else _BOUNDS_ON_A_GPU
    targets = dict(zip((UPDATE_, UPDATE), map(at_most, bounds), strict=True))
    rows = [
        measured.row(candidate.name, BASELINE, target=targets.get(candidate.name))
        for candidate in everyone
        if candidate.name != LIMIT
    ]
    if workload in _LARGE:
        rows.append(measured.row(LIMIT, BASELINE, factor=PASSES))
    if workload == "gpt2-60m" and on_cpu:
        rows += [
            measured.row(UPDATE, peer, label=f"{UPDATE} / {peer}", target=target, drawn=False)
            for peer, target in _TO_PEERS.items()
        ]
    if workload in _LARGE and not on_cpu:
        rows = [_with_bandwidth(row, measured, params) for row in rows]
        rows += _shares(measured)
    about = f"{_ABOUT_THE_LIMIT if workload in _LARGE else ''} {measured.caution()}".strip()
    return Section(workload, describe(shapes), about, f"time / {BASELINE}", rows)


def _shares(measured: Measured) -> list[Row]:
    """How much of the bandwidth of a copy the steps reach, counting what each has to move."""
    targets: dict[str, Target | None] = {BASELINE: None, UPDATE_: None, UPDATE: at_least(0.85)}
    return [
        measured.row(
            LIMIT,
            name,
            label=f"{name}: share of a copy's bandwidth",
            factor=PASSES,
            target=target,
            drawn=False,
        )
        for name, target in targets.items()
    ]


def _with_bandwidth(row: Row, measured: Measured, params: Tensors) -> Row:
    """Add to the note how much memory passes in a second, counting what a step has to move."""
    if row.label not in measured.seconds:
        return row
    sizes = 2.0 if row.label == LIMIT else 2 * PASSES
    size = sum(param.nbytes for param in params.values())
    rate = sizes * size / statistics.median(measured.seconds[row.label]) / 1e9
    return row._replace(note=f"{rate:.0f} GB/s")
