"""What a kernel is given and gives back: parallel lists of tensors, and six numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._core import transforms
from .._core.types import Number

__all__ = [
    "PUBLIC_NAMES",
    "Leaves",
    "Moved",
    "Scalars",
    "Variant",
    "compute_dtype",
    "fit",
    "for_each",
    "real",
    "unreadable",
    "unreal",
    "write",
    "write_all",
    "written",
]


class Leaves(NamedTuple):
    """The tensors of a step, leaf by leaf."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]  # empty unless amsgrad

    def take(self, indices: list[int]) -> Leaves:
        """Return the leaves at these indices, which are in order."""
        if len(indices) == len(self.params):
            return self
        return Leaves(*([column[i] for i in indices] if column else [] for column in self))


class Moved(NamedTuple):
    """The tensors after a step, leaf by leaf."""

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]  # empty unless amsgrad


def written(leaves: Leaves) -> Moved:
    """Return the columns that a step moves: all but the gradients."""
    return Moved(leaves.params, leaves.exp_avgs, leaves.exp_avg_sqs, leaves.max_exp_avg_sqs)


def write(old: Tensor, new: Tensor) -> None:
    """Write a tensor's new value into it."""
    if transforms.tracing():
        # Compiled by torch 2.13, `copy_` is silently dropped for a float64 tensor of shape (),
        # which is what a count of updates is. Writing through a view is not.
        old[...] = new
    else:
        old.copy_(new)


def write_all(leaves: Leaves, moved: Moved) -> None:
    """Write what came of a step into the leaves."""
    for olds, news in zip(written(leaves), moved, strict=True):
        for old, new in zip(olds, news, strict=True):
            write(old, new)


class Scalars(NamedTuple):
    """The numbers of a step.

    A tensor among them is 0-dim, or has the leading dimensions of every leaf (each of the same size
    or of size 1): that is how numbers that differ between the members of a vmap arrive here.

    Gradients are multiplied by `grad_factor` first, and rounded to their dtype. It is other than 1
    only where nobody watches, which is where a kernel can do it on its way; there it may be NaN.
    """

    step: Number  # counted from 1
    lr: Number
    beta1: Number
    beta2: Number
    eps: Number
    weight_decay: Number
    grad_factor: Number = 1.0

    @property
    def read(self) -> bool:
        """Whether all are Python numbers."""
        return _READ.issuperset(map(type, self))


_READ = frozenset((float,))


def for_each(scalars: Scalars | list[Scalars], count: int) -> list[Scalars]:
    """Return the numbers of each leaf, where they may be given once for all."""
    return [scalars] * count if isinstance(scalars, Scalars) else scalars


def unreadable(scalars: Scalars | None, device: torch.device) -> str | None:
    """Say which number on a device a kernel cannot take that reads all but count and lr itself."""
    for name, number in zip(Scalars._fields, scalars or (), strict=False):
        if not isinstance(number, Tensor) or transforms.on_host(number):
            continue
        if name == "grad_factor":  # no kernel that asks this is told of it
            continue
        if name not in ("step", "lr") or number.ndim > 0 or number.device != device:
            public = PUBLIC_NAMES.get(name, name)
            return f"it takes numbers whose value can be read, and {public} is on {number.device}"
    return None


# What a user calls those numbers that have another name here.
PUBLIC_NAMES = {"beta1": "betas[0]", "beta2": "betas[1]"}


class Variant(NamedTuple):
    """What is fixed about an optimizer: which equations, which kernel, who builds a graph."""

    amsgrad: bool
    maximize: bool
    kernel: str
    differentiable: bool | None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: 16-bit leaves are stored in 16 bits and computed in 32.

    In float16 itself, an eps of 1e-8 is zero, and a zero gradient makes 0 / 0.
    """
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def fit(number: Number, leaf: Tensor) -> Number:
    """Return a number so that it combines with a leaf: in its dtype, on its device, aligned.

    A number of shape (B,) meets a leaf of shape (B, ...) at the front, where broadcasting would
    meet it at the back.
    """
    if not isinstance(number, Tensor):
        return number
    number = number.to(device=leaf.device, dtype=leaf.dtype)
    if number.ndim == 0:
        return number
    return number.reshape(number.shape + (1,) * (leaf.ndim - number.ndim))


def real(tensor: Tensor) -> Tensor:
    """View a complex tensor as pairs of real ones, which is how AdamW treats it."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def unreal(tensor: Tensor, like: Tensor) -> Tensor:
    """Undo `real`, for a tensor that came of `like`."""
    return torch.view_as_complex(tensor) if like.is_complex() else tensor
