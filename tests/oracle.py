"""AdamW written from the papers' equations, in float64, leaf by leaf: what every result is held to.

It shares no line with the library: no kernel, no tree code, no rule of a transform. In plain torch
operators it can also be differentiated and mapped over, which gives the references for those.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class OracleState(NamedTuple):
    step: float
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor


def init(param: Tensor) -> OracleState:
    zeros = torch.zeros_like(param, dtype=torch.float64)
    return OracleState(0.0, zeros, zeros, zeros)


def update(
    grad: Tensor,
    state: OracleState,
    param: Tensor,
    *,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=1e-2,
    amsgrad=False,
    maximize=False,
) -> tuple[Tensor, OracleState]:
    """One update of one real leaf."""
    beta1, beta2 = betas
    step = state.step + 1
    if maximize:
        grad = -grad
    exp_avg = beta1 * state.exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * state.exp_avg_sq + (1 - beta2) * grad * grad
    largest = torch.maximum(state.max_exp_avg_sq, exp_avg_sq) if amsgrad else exp_avg_sq
    mean = exp_avg / (1 - beta1**step)
    spread = torch.sqrt(largest / (1 - beta2**step))
    param = param - lr * weight_decay * param - lr * mean / (spread + eps)
    return param, OracleState(step, exp_avg, exp_avg_sq, largest)
