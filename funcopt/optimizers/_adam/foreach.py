"""The step as operations on whole lists: the arithmetic of torch.optim's foreach AdamW, to the bit.

The `_foreach_` functions are private in name only: torch documents them as the building blocks of
its own optimizers. A torch that lacked one would be served by the plain kernel.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..._core.types import Number
from ..._engine.rule import Leaves, Scalars, Variant, compute_dtype, fit, unreadable
from .equations import Corrections, double

__all__ = ["refusal", "scaled", "step_"]

_NEEDED = (
    "_foreach_add_",
    "_foreach_addcdiv_",
    "_foreach_addcmul_",
    "_foreach_copy_",
    "_foreach_div_",
    "_foreach_lerp_",
    "_foreach_maximum_",
    "_foreach_mul",
    "_foreach_mul_",
    "_foreach_neg",
    "_foreach_sqrt",
)


def refusal(device: torch.device, scalars: Scalars | None) -> str | None:
    """Say why leaves on this device (with these numbers, if given) cannot be served."""
    if not all(hasattr(torch, name) for name in _NEEDED):  # pragma: no cover
        return f"torch {torch.__version__} lacks some of the _foreach_ functions"
    if device.type not in ("cpu", "cuda"):
        return f"it serves cpu and cuda, not {device.type}"
    return unreadable(scalars, device)


def scaled(tensors: list[Tensor], factor: Number) -> list[Tensor]:
    """Return tensors of one dtype and device times a number, rounded to that dtype."""
    dtype = tensors[0].dtype
    wide = [tensor.to(compute_dtype(dtype)) for tensor in tensors]
    own = fit(factor, wide[0].real)
    if not hasattr(torch, "_foreach_mul"):  # pragma: no cover
        return [(tensor * own).to(dtype) for tensor in wide]
    return [product.to(dtype) for product in torch._foreach_mul(wide, own)]


def step_(leaves: Leaves, scalars: Scalars, variant: Variant) -> None:
    """Move leaves of one dtype and device in place."""
    dtype = leaves.params[0].dtype
    if compute_dtype(dtype) is dtype:
        _step_(leaves, scalars, variant)
        return
    wide = Leaves(*([tensor.float() for tensor in column] for column in leaves))
    _step_(wide, scalars, variant)
    for column, computed in zip(leaves, wide, strict=True):
        if column and column is not leaves.grads:
            torch._foreach_copy_(column, computed)


def _step_(leaves: Leaves, scalars: Scalars, variant: Variant) -> None:
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs = leaves
    beta1, beta2, eps = cast(tuple[float, float, float], scalars[2:5])
    corrections = Corrections(scalars)
    if variant.maximize:
        grads = list(torch._foreach_neg(grads))
    decay = fit(1 - double(scalars.lr) * double(scalars.weight_decay), params[0])
    step_size = fit(corrections.step_size, params[0])
    torch._foreach_mul_(params, decay)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    if variant.amsgrad:
        torch._foreach_maximum_(max_exp_avg_sqs, exp_avg_sqs)
    denominators = torch._foreach_sqrt(max_exp_avg_sqs if variant.amsgrad else exp_avg_sqs)
    torch._foreach_div_(denominators, fit(corrections.correction2_root, params[0]))
    torch._foreach_add_(denominators, eps)
    if isinstance(step_size, Tensor):  # on the device, where its value is not read
        torch._foreach_div_(denominators, -step_size)
        torch._foreach_addcdiv_(params, exp_avgs, denominators)
    else:
        torch._foreach_addcdiv_(params, exp_avgs, denominators, -step_size)
