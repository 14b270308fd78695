"""Terms that the equations of several optimizers are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core.tensors import fit
from .._core.types import Number


def add_scaled(tensor: Tensor, other: Tensor, scale: Number) -> Tensor:
    """Return `tensor + scale * other`, by one operator if the number is one of Python's."""
    if isinstance(scale, Tensor):
        return tensor + other * scale
    return torch.add(tensor, other, alpha=scale)


def add_decay(grad: Tensor, param: Tensor, weight_decay: Number) -> Tensor:
    """Return a gradient with coupled weight decay; without any, it is the gradient itself."""
    if isinstance(weight_decay, Tensor) or weight_decay != 0:
        return add_scaled(grad, param, weight_decay)
    return grad


def with_decay(param: Tensor, grad: Tensor, own: Any, options: Any) -> tuple[Tensor, Tensor]:
    """Return a parameter and the gradient to descend by, with decoupled or coupled weight decay."""
    grad = -grad if options.maximize else grad
    if options.decoupled_weight_decay:
        return param * own.decay, grad
    return param, add_decay(grad, param, own.weight_decay)


def add_product(tensor: Tensor, one: Tensor, other: Tensor, scale: Number) -> Tensor:
    """Return `tensor + scale * one * other`, by one operator as `add_scaled`."""
    if isinstance(scale, Tensor):
        return torch.addcmul(tensor, one * scale, other)
    return torch.addcmul(tensor, one, other, value=scale)


def add_quotient(tensor: Tensor, one: Tensor, other: Tensor, scale: Number) -> Tensor:
    """Return `tensor + scale * one / other`, by one operator as `add_scaled`."""
    if isinstance(scale, Tensor):
        return torch.addcdiv(tensor, one * scale, other)
    return torch.addcdiv(tensor, one, other, value=scale)


def foreach_add_scaled_(tensors: list[Tensor], others: list[Tensor], scale: Number) -> None:
    """Add `scale * other` to each tensor. A scale that is a tensor is not read."""
    if isinstance(scale, Tensor):
        torch._foreach_add_(tensors, torch._foreach_mul(others, fit(scale, others[0])))
    else:
        torch._foreach_add_(tensors, others, alpha=scale)


def foreach_add_quotients_(
    tensors: list[Tensor], ones: list[Tensor], others: list[Tensor], scale: Number
) -> None:
    """Add `scale * one / other` to each tensor. A scale that is a tensor is not read."""
    if isinstance(scale, Tensor):
        ones = list(torch._foreach_mul(ones, fit(scale, ones[0])))
        torch._foreach_addcdiv_(tensors, ones, others)
    else:
        torch._foreach_addcdiv_(tensors, ones, others, scale)


def foreach_decayed_grads(
    grads: list[Tensor], params: list[Tensor], weight_decay: float, *, maximize: bool
) -> list[Tensor]:
    """Return gradients to descend by, with coupled weight decay. None of them is written."""
    if maximize:
        grads = list(torch._foreach_neg(grads))
    if weight_decay != 0:
        grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    return grads


def foreach_with_decay_(
    params: list[Tensor], grads: list[Tensor], decay: Number, weight_decay: float, options: Any
) -> list[Tensor]:
    """Return gradients to descend by, as `with_decay`; decoupled decay is written into params."""
    coupled = 0.0 if options.decoupled_weight_decay else weight_decay
    grads = foreach_decayed_grads(grads, params, coupled, maximize=options.maximize)
    if options.decoupled_weight_decay:
        torch._foreach_mul_(params, fit(decay, params[0]))
    return grads


def foreach_moments_(
    exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], grads: list[Tensor], numbers: Any
) -> None:
    """Let the running means of gradients and of their squares, as Adam has them, take these."""
    torch._foreach_lerp_(exp_avgs, grads, 1 - numbers.beta1)
    torch._foreach_mul_(exp_avg_sqs, numbers.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - numbers.beta2)
