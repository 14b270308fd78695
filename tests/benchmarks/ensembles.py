"""A step of many members at once under vmap, against the same step on the stacked tensors."""

from __future__ import annotations

from functools import partial

import torch
from torch.func import vmap

import funcopt

from . import peers
from .candidates import torch_step
from .measure import Candidate, Measured, Settings, Step, compare, in_turn
from .results import Row, Section, at_most, below
from .workloads import MEMBERS, SHAPES, Tensors, describe, random_like

__all__ = ["WORKLOADS", "section"]

WORKLOADS = ("ensemble-large", "ensemble-small")

DIRECT = "funcopt update, no vmap"
MAPPED = "vmap(update)"
SHARED = "vmap(update), step shared"
SWEEP = "vmap(update), lr and decay per member"
IDENTITY = "vmap(identity)"


def section(workload: str, settings: Settings) -> Section:
    """Measure a workload."""
    shapes = SHAPES[workload]
    params, grads = (random_like(shapes, seed, settings.device) for seed in (0, 1))
    everyone = [
        Candidate(name, partial(build, params, grads), required=True)
        for name, build in (
            (DIRECT, _direct),
            (MAPPED, _mapped),
            (SHARED, _with_step_shared),
            (SWEEP, _sweep),
            (IDENTITY, _identity),
        )
    ]
    everyone += [
        Candidate("torch fused, on the stack", partial(torch_step, params, grads, fused=True)),
        Candidate(peers.OPTAX_MAPPED, partial(peers.optax_mapped, params, grads)),
    ]
    measured = compare(everyone, settings)
    about = (
        f"{MEMBERS} members, stacked. The identity shows what vmap itself takes: it returns "
        f"parameters and state as they are. {measured.caution()}".strip()
    )
    rows = _rows(workload, everyone, measured)
    return Section(workload, describe(shapes), about, f"time / {DIRECT}", rows)


def _rows(workload: str, everyone: list[Candidate], measured: Measured) -> list[Row]:
    large = workload == "ensemble-large"
    bounds = {MAPPED: 1.15, SHARED: 1.15, SWEEP: 1.3} if large else {SWEEP: 2.5}
    targets = {name: at_most(bound) for name, bound in bounds.items()}
    rows = [
        measured.row(
            candidate.name,
            DIRECT,
            target=targets.get(candidate.name),
            drawn=candidate.name != IDENTITY,
        )
        for candidate in everyone
    ]
    rows.append(
        measured.row(
            MAPPED,
            peers.OPTAX_MAPPED,
            label=f"{MAPPED} / {peers.OPTAX_MAPPED}",
            target=below(1.0),
            drawn=False,
        )
    )
    if not large:
        rows += [
            measured.row(
                name,
                DIRECT,
                IDENTITY,
                label=f"{name} / (no vmap + identity)",
                target=at_most(1.6),
                drawn=False,
            )
            for name in (MAPPED, SHARED)
        ]
    return rows


def _direct(params: Tensors, grads: Tensors) -> Step:
    opt = funcopt.AdamW()
    return in_turn(opt.update, grads, opt.init(params), params)


def _mapped(params: Tensors, grads: Tensors) -> Step:
    opt = funcopt.AdamW()
    return in_turn(vmap(opt.update), grads, vmap(opt.init)(params), params)


def _with_step_shared(params: Tensors, grads: Tensors) -> Step:
    opt = funcopt.AdamW()
    dims = funcopt.AdamWState(None, 0, 0, ())
    update = vmap(opt.update, in_dims=(0, dims, 0), out_dims=(0, dims))
    return in_turn(update, grads, opt.init(params), params)


def _sweep(params: Tensors, grads: Tensors) -> Step:
    opt = funcopt.AdamW(
        lr=torch.logspace(-4, -2, MEMBERS, dtype=torch.float64),
        weight_decay=torch.linspace(0, 0.1, MEMBERS, dtype=torch.float64),
    )
    update = vmap(lambda own, grads, state, params: own.update(grads, state, params))
    return in_turn(partial(update, opt), grads, vmap(opt.init)(params), params)


def _identity(params: Tensors, grads: Tensors) -> Step:
    identity = vmap(lambda grads, state, params: (params, state))
    state = vmap(funcopt.AdamW().init)(params)
    return in_turn(identity, grads, state, params)
