"""The derivative of a loss after 20 steps with respect to the parameters before them.

Inner gradients are taken by `torch.func.grad`, the outer one by `torch.autograd.grad`, for
everyone: that is the outer one which all of them can do. Only the update differs.

Run as a module of its own, it prints how much memory each graph keeps. It counts what torch's
allocators hand out and take back, which torch's profiler sees: so each byte counts once, whoever
keeps it, and nobody's way of computing changes, as it would under a dispatch mode or hooks on saved
tensors. The profiler writes to the standard error stream, hence the process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad
from torch.nn.functional import linear
from torch.optim.adamw import adamw

import funcopt

from . import peers, unroll_long
from .measure import Absent, Candidate, Measured, Settings, Step, compare
from .processes import ask
from .results import Figure, Row, Section, above, at_most
from .workloads import Tensors, describe, mlp, random_like

__all__ = ["sections"]

_STEPS = 20
_WIDTHS = (64, 256, 256, 1)
_BATCH = 32
_RATE = 1e-2

FUNCOPT = "funcopt"
ACCELERATED = "TorchOpt accelerated"
SGD = "SGD"
SGD_WITH_RATE = "SGD, its rate requires a gradient"


class Update(NamedTuple):
    """An update that can be differentiated."""

    init: Callable[[Tensors], Any]
    step: Callable[[Tensors, Any, Tensors], tuple[Tensors, Any]]


def _funcopt() -> Update:
    # The initial parameters are leaves, and it is their history alone that is wanted.
    opt = funcopt.AdamW(lr=_RATE, differentiable=True)
    return Update(opt.init, opt.update)


def _torchopt(*, accelerated: bool) -> Update:
    return Update(*peers.torchopt_update(_RATE, accelerated=accelerated))


def _torch() -> Update:
    def init(params: Tensors) -> tuple[Tensors, ...]:
        counts = {name: torch.zeros(()) for name in params}
        return _zeros_like(params), _zeros_like(params), counts

    def step(grads: Tensors, state: Any, params: Tensors) -> tuple[Tensors, Any]:
        # It writes in place, over what the graph of the step before has kept unless it is cloned.
        moved, exp_avgs, exp_avg_sqs, counts = map(_clone, (params, *state))
        columns = (list(tree.values()) for tree in (moved, grads, exp_avgs, exp_avg_sqs))
        adamw(
            *columns,
            max_exp_avg_sqs=[],
            state_steps=list(counts.values()),
            foreach=False,
            differentiable=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=_RATE,
            weight_decay=1e-2,
            eps=1e-8,
            maximize=False,
        )
        return moved, (exp_avgs, exp_avg_sqs, counts)

    return Update(init, step)


def _sgd(rate: float | Tensor) -> Update:
    def step(grads: Tensors, state: None, params: Tensors) -> tuple[Tensors, None]:
        return {name: param - rate * grads[name] for name, param in params.items()}, None

    return Update(lambda params: None, step)


def _zeros_like(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def _clone(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}


_UPDATES: dict[str, Callable[[], Update]] = {
    FUNCOPT: _funcopt,
    "TorchOpt": partial(_torchopt, accelerated=False),
    ACCELERATED: partial(_torchopt, accelerated=True),
    "torch, differentiable": _torch,
    SGD: partial(_sgd, _RATE),
}


def _start() -> Tensors:
    # Wide enough that tanh is not linear, and no gradient is exactly zero: where one is, some of
    # the others give NaN.
    params = random_like(mlp(*_WIDTHS), seed=0, device=torch.device("cpu"))
    return {name: param.requires_grad_() for name, param in params.items()}


def _loss_after(update: Update, params: Tensors, steps: int = _STEPS) -> Tensor:
    source = torch.Generator().manual_seed(1)
    inputs, wanted = (torch.randn(_BATCH, width, generator=source) for width in (64, 1))

    def loss(params: Tensors) -> Tensor:
        hidden, last = inputs, len(_WIDTHS) - 2
        for layer in range(last + 1):
            hidden = linear(hidden, params[f"{layer}.weight"], params[f"{layer}.bias"])
            hidden = hidden if layer == last else hidden.tanh()
        return (hidden - wanted).square().mean()

    state = update.init(params)
    for _ in range(steps):
        params, state = update.step(grad(loss)(params), state, params)
    return loss(params)


def _meta_gradient(update: Update, params: Tensors) -> tuple[Tensor, ...]:
    return torch.autograd.grad(_loss_after(update, params), list(params.values()))


def sections(settings: Settings) -> list[Section]:
    """Measure time and memory of the unroll."""
    measured = _measure(settings)
    about = (
        f"Forward and backward through {_STEPS} steps, with torch.func.grad inside and "
        f"torch.autograd.grad outside for everyone. {measured.caution()}".strip()
    )
    size = describe(mlp(*_WIDTHS))
    kept = (
        f"The same unroll: what the graph keeps for a step, beyond what it keeps where the step is "
        f"SGD, `param - rate * grad`. With a constant rate that keeps nothing itself; with one "
        f"that requires a gradient it keeps `grad`. (By the last {_STEPS // 2} of {_STEPS} steps.)"
    )
    return [
        Section("unroll", size, about, f"time / {FUNCOPT}", _times(measured)),
        Section("unroll, memory", size, kept, "sizes of the parameters", _kept_rows(), drawn=False),
        *unroll_long.sections(settings),
    ]


def _measure(settings: Settings) -> Measured:
    def build(make: Callable[[], Update]) -> Step:
        return partial(_meta_gradient, make(), _start())

    everyone = [
        Candidate(name, partial(build, make), required=name == FUNCOPT)
        for name, make in _UPDATES.items()
    ]
    return compare(everyone, settings)


def _times(measured: Measured) -> list[Row]:
    rows = []
    for name in _UPDATES:
        target = above(1.0) if name.startswith("TorchOpt") else None
        note = _difference(name) if name in measured.seconds else ""
        row = measured.row(name, FUNCOPT, target=target, note=note, drawn=name != SGD)
        rows.append(row)
    return rows


def _difference(name: str) -> str:
    """Say so if the derivative is not what funcopt's is."""
    if name == SGD:
        return "another algorithm"
    params = _start()
    own, other = (
        torch.cat([part.flatten() for part in _meta_gradient(_UPDATES[who](), params)])
        for who in (name, FUNCOPT)
    )
    off = ((own - other).norm() / other.norm()).item()
    return f"its derivative is {off:.0%} off" if not off < 0.01 else ""


def _kept_rows() -> list[Row]:
    kept = ask("unroll", limit=300, environment={})
    rows = []
    for base, short in ((SGD, "SGD"), (SGD_WITH_RATE, "SGD with such a rate")):
        for name in _UPDATES:
            if name == SGD:
                continue
            target = at_most(2.1) if (name, base) == (FUNCOPT, SGD_WITH_RATE) else None
            found = kept[name]
            figure = None if isinstance(found, str) else Figure(found - kept[base])
            note = found if isinstance(found, str) else ""
            rows.append(Row(f"{name}, beyond {short}", figure, target, note))
    return rows


def _kept(update: Update) -> float:
    """Return what the graph keeps for a step, in sizes of the parameters."""
    params = _start()
    _loss_after(update, params)
    most, least = (
        _bytes_held(partial(_loss_after, update, params, n)) for n in (_STEPS, _STEPS // 2)
    )
    return (most - least) / (_STEPS - _STEPS // 2) / sum(param.nbytes for param in params.values())


def _bytes_held(make: Callable[[], Tensor]) -> int:
    """Return how much memory is in use for a result and its history."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=False) as profile:
        result = make()
    events = profile.kineto_results.events()
    del result
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def _kept_by_all() -> dict[str, float | str]:
    rate = torch.tensor(_RATE, requires_grad=True)
    found: dict[str, float | str] = {}
    for name, make in {**_UPDATES, SGD_WITH_RATE: partial(_sgd, rate)}.items():
        try:
            found[name] = _kept(make())
        except Absent as reason:
            found[name] = str(reason)
        except Exception as error:
            found[name] = f"fails: {type(error).__name__}"
    return found


if __name__ == "__main__":
    print(json.dumps(_kept_by_all()))
