"""Whether plain autograd is to record what is done around an update: copies, choices, averages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .._core import transforms
from .._core.tensors import recording


def is_recorded(
    opt: object, params: Sequence[Tensor], grads: Sequence[Tensor], others: Sequence[Tensor]
) -> bool:
    """Whether plain autograd is to record what an update does to its tensors.

    The rule is that of `recording`. Under vmap, the tensors beneath it are asked: parameters that
    merely require a gradient would otherwise leave a history in whatever is chosen from them. The
    others are those of the state; the hyperparameters of `opt`, and of optimizers within it, come
    to them.
    """
    numbers: list[Tensor] = []
    flags: set[object] = set()
    for name, value in _fields(opt):
        if isinstance(value, Tensor):
            numbers.append(value)
        elif name == "differentiable":
            flags.add(value)
    differentiable = True if True in flags else (False if flags == {False} else None)
    return _records(list(params), list(grads), [*others, *numbers], differentiable)


def _records(
    params: list[Tensor], grads: list[Tensor], others: list[Tensor], differentiable: bool | None
) -> bool:
    if not transforms.tracing() and transforms.in_vmaps_alone():

        def beneath(members: transforms.Members) -> bool:
            one, two, three = (
                [members.unwrap(t)[0] for t in column] for column in (params, grads, others)
            )
            return _records(one, two, three, differentiable)

        return transforms.beneath_vmap(beneath)
    with recording(params, grads, others, differentiable):
        return torch.is_grad_enabled()


def _fields(opt: object) -> Iterator[tuple[str, object]]:
    """Yield the fields of an optimizer and of those within it, by name."""
    if not dataclasses.is_dataclass(opt):
        return
    for field in dataclasses.fields(opt):
        value = getattr(opt, field.name)
        parts = value.values() if isinstance(value, Mapping) else value
        is_one = isinstance(parts, (str, Tensor)) or not isinstance(parts, Iterable)
        for part in [parts] if is_one else parts:
            if dataclasses.is_dataclass(part):
                yield from _fields(part)
            else:
                yield field.name, part
