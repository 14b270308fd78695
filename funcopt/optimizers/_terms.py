"""Terms that the equations of several optimizers are made of."""

from __future__ import annotations

import torch
from torch import Tensor

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
