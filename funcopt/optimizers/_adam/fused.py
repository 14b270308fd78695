"""The step as torch's one fused kernel: one pass over memory.

`torch._fused_adamw_` believes whatever it is told: it reads shapes and strides off the parameters
alone, updates a tensor listed twice twice, ignores autograd, and bumps no version counter. What it
needs to be right is established before it is called: same shapes, dtypes and dense strides in
every list (`_memory`), no tensor twice (`_checks`), no history and no transform (`_history`, and
`run` of this package). The name is private to torch; one without it gets the foreach kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._engine.rule import Leaves, Scalars, Variant, unreadable

__all__ = ["refusal", "step_"]


def refusal(device: torch.device, scalars: Scalars | None) -> str | None:
    """Say why leaves on this device (with these numbers, if given) cannot be served."""
    if not hasattr(torch, "_fused_adamw_"):  # pragma: no cover
        return f"torch {torch.__version__} has no fused AdamW"
    if device.type not in ("cpu", "cuda"):
        return f"it serves cpu and cuda, not {device.type}"
    return unreadable(scalars, device)


def step_(leaves: Leaves, scalars: Scalars, variant: Variant) -> None:
    """Move leaves of one dtype and device in place."""
    device = leaves.params[0].device
    # The kernel reads the count as float32, whatever it is given. Beyond 2**24 that rounds, by one
    # part in 2**24, which shows in the corrections only where a beta is that close to 1.
    count = (
        scalars.step.to(device, torch.float32)
        if isinstance(scalars.step, Tensor)
        else torch.scalar_tensor(scalars.step, dtype=torch.float32, device=device)
    )
    # On CUDA it takes a learning rate as a double, or as a tensor in float32 and in no other dtype.
    # One that could be read without waiting is a Python number by now, and loses nothing. One on
    # the device is rounded, by a part in 2**24 at most.
    lr = scalars.lr.to(device, torch.float32) if isinstance(scalars.lr, Tensor) else scalars.lr
    fused_adamw: Any = torch._fused_adamw_  # overloaded on lr in ways no type checker follows
    fused_adamw(
        leaves.params,
        leaves.grads,
        leaves.exp_avgs,
        leaves.exp_avg_sqs,
        leaves.max_exp_avg_sqs,
        [count] * len(leaves.params),
        lr=lr,
        beta1=scalars.beta1,
        beta2=scalars.beta2,
        weight_decay=scalars.weight_decay,
        eps=scalars.eps,
        amsgrad=variant.amsgrad,
        maximize=variant.maximize,
    )
