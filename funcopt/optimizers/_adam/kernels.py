"""Adam's and AdamW's step by torch's own kernels: fused, and operations on whole lists.

`torch._fused_adamw_` believes whatever it is told: it reads shapes and strides off the parameters
alone, updates a tensor listed twice twice, ignores autograd, and bumps no version counter. The
engine establishes what it needs to be right before it is called. The names are private to torch,
the `_foreach_` ones in name only: torch documents them as the building blocks of its optimizers.
Where torch lacks one, the equations serve.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._core.tensors import double, fit
from ..._engine import kernels
from ..._engine.rule import StepInputs
from ..adamw import HYPERPARAMS, coefficients


def _fused_(operator: str, inputs: StepInputs, numbers: Any, options: Any) -> None:
    exp_avgs, exp_avg_sqs, *maxima = inputs.slots
    device, lr = inputs.params[0].device, numbers.lr
    # The kernel reads the count as float32, whatever it is given. Beyond 2**24 that rounds, by one
    # part in 2**24, which shows in the corrections only where a beta is that close to 1.
    count = (
        numbers.step.to(device, torch.float32)
        if isinstance(numbers.step, Tensor)
        else torch.scalar_tensor(numbers.step, dtype=torch.float32, device=device)
    )
    getattr(torch, operator)(
        inputs.params,
        inputs.grads,
        exp_avgs,
        exp_avg_sqs,
        maxima[0] if maxima else [],
        [count] * len(inputs.params),
        lr=kernels.fused_lr(lr, device) if isinstance(lr, Tensor) else lr,
        beta1=numbers.beta1,
        beta2=numbers.beta2,
        weight_decay=numbers.weight_decay,
        eps=numbers.eps,
        amsgrad=options.amsgrad,
        maximize=options.maximize,
    )


def _foreach_(decoupled: bool, inputs: StepInputs, numbers: Any, options: Any) -> None:
    params, grads, (exp_avgs, exp_avg_sqs, *maxima), _ = inputs
    own = coefficients(numbers._make(map(double, numbers)), options)
    if options.maximize:
        grads = list(torch._foreach_neg(grads))
    if decoupled:
        torch._foreach_mul_(params, fit(own.decay, params[0]))
    elif numbers.weight_decay != 0:
        grads = list(torch._foreach_add(grads, params, alpha=numbers.weight_decay))
    torch._foreach_lerp_(exp_avgs, grads, 1 - numbers.beta1)
    torch._foreach_mul_(exp_avg_sqs, numbers.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - numbers.beta2)
    if maxima:
        torch._foreach_maximum_(maxima[0], exp_avg_sqs)
    denominators = torch._foreach_sqrt(maxima[0] if maxima else exp_avg_sqs)
    torch._foreach_div_(denominators, fit(own.correction2_root, params[0]))
    torch._foreach_add_(denominators, numbers.eps)
    descent = fit(own.descent, params[0])
    if isinstance(descent, Tensor):  # on the device, where its value is not read
        torch._foreach_div_(denominators, descent)
        torch._foreach_addcdiv_(params, exp_avgs, denominators)
    else:
        torch._foreach_addcdiv_(params, exp_avgs, denominators, descent)


_PATHS = {own.name: own.path for own in HYPERPARAMS}
_NEEDED = (
    "add",
    "add_",
    "addcdiv_",
    "addcmul_",
    "div_",
    "lerp_",
    "maximum_",
    "mul_",
    "neg",
    "sqrt",
)

ADAMW_FUSED = kernels.fused(partial(_fused_, "_fused_adamw_"), "_fused_adamw_", _PATHS)
ADAM_FUSED = kernels.fused(partial(_fused_, "_fused_adam_"), "_fused_adam_", _PATHS)
ADAMW_FOREACH = kernels.foreach(partial(_foreach_, True), _NEEDED, _PATHS)
ADAM_FOREACH = kernels.foreach(partial(_foreach_, False), _NEEDED, _PATHS)
