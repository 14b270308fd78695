"""Those who take a step: torch.optim, funcopt, and the memory that all of them have to move.

A tree of 7 sizes has to pass: parameters, gradient and two moments are read, all but the gradient
written. No step is faster than that, whatever it computes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

import funcopt

from . import peers
from .measure import Absent, Candidate, Step, in_turn
from .workloads import Tensors

__all__ = [
    "BASELINE",
    "COMPILED",
    "LIMIT",
    "PASSES",
    "UPDATE",
    "UPDATE_",
    "UPDATE_FUSED",
    "UPDATE_FUSED_",
    "all_candidates",
    "memory_candidate",
    "torch_step",
]

BASELINE = "torch fused"
COMPILED = "torch compiled"
UPDATE_ = "funcopt update_"
UPDATE = "funcopt update"
# By torch's fused kernel, which serves where that of the optimizer's own choice is not built.
UPDATE_FUSED_ = "funcopt update_, kernel fused"
UPDATE_FUSED = "funcopt update, kernel fused"
LIMIT = "memory-bandwidth limit"

# A step moves so many times the memory of an in-place pass, or of a copy: 7 sizes, not 2.
PASSES = 3.5

# More leaves than that are not compiled: it takes many minutes.
_MOST_TO_COMPILE = 500


def all_candidates(params: Tensors, grads: Tensors) -> list[Candidate]:
    """Return everyone who can take a step on a tree. The tensors given are never written."""
    return [
        Candidate(BASELINE, partial(torch_step, params, grads, fused=True), required=True),
        Candidate(UPDATE_, partial(_update_, params, grads), required=True),
        Candidate(UPDATE, partial(_update, params, grads), required=True),
        Candidate(UPDATE_FUSED_, partial(_update_, params, grads, kernel="fused"), required=True),
        Candidate(UPDATE_FUSED, partial(_update, params, grads, kernel="fused"), required=True),
        Candidate("torch foreach", partial(torch_step, params, grads, foreach=True)),
        Candidate("torch single", partial(torch_step, params, grads, foreach=False, fused=False)),
        Candidate(COMPILED, partial(_compiled, params, grads)),
        *peers.candidates(params, grads),
    ]


def memory_candidate(params: Tensors) -> Candidate:
    """Return who moves 2 sizes of memory and does nothing else."""
    on_cpu = next(iter(params.values())).device.type == "cpu"
    return Candidate(LIMIT, partial(_pass if on_cpu else _copy, params), required=True)


def _torch_optimizer(params: Tensors, grads: Tensors, **kernel: bool) -> torch.optim.AdamW:
    own = [nn.Parameter(param.clone()) for param in params.values()]
    for param, grad in zip(own, grads.values(), strict=True):
        param.grad = grad
    return torch.optim.AdamW(own, **kernel)


def torch_step(params: Tensors, grads: Tensors, **kernel: bool) -> Step:
    return _torch_optimizer(params, grads, **kernel).step


def _compiled(params: Tensors, grads: Tensors) -> Step:
    if len(params) > _MOST_TO_COMPILE:
        raise Absent(f"not tried: compiling {len(params)} leaves takes many minutes")
    return torch.compile(_torch_optimizer(params, grads).step)


def _update_(params: Tensors, grads: Tensors, kernel: str = "auto") -> Step:
    own = {name: param.clone() for name, param in params.items()}
    opt = funcopt.AdamW(kernel=kernel)
    return in_turn(opt.update_, grads, opt.init(own), own)


def _update(params: Tensors, grads: Tensors, kernel: str = "auto") -> Step:
    opt = funcopt.AdamW(kernel=kernel)
    return in_turn(opt.update, grads, opt.init(params), params)


def _pass(params: Tensors) -> Step:
    memory = torch.cat([param.flatten() for param in params.values()])
    return partial(memory.mul_, -1.0)


def _copy(params: Tensors) -> Step:
    memory = torch.cat([param.flatten() for param in params.values()])
    return partial(torch.empty_like(memory).copy_, memory)
