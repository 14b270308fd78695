"""What to do instead, where a hyperparameter was given what it cannot be."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor


def hint_for(name: str, value: object, owner: str) -> str:
    """Return what to do with several numbers, or with parameters where torch takes them."""
    if isinstance(value, bool):
        return " For a mask, give each leaf its number: 0.1, say, for True and 0.0 for False."
    if isinstance(value, str):
        return ""
    parts = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(parts, Sequence) and len(parts) > 0:
        if all(map(_is_one_number, parts)):
            return _GROUPS.format(name) + ("" if isinstance(value, Mapping) else _MEMBERS)
        if all(isinstance(part, Mapping) and "params" in part for part in parts):
            return _GROUPS.format("options")
    learned = _LEARNED.format(name) if _are_numbers_to_learn(value) else ""
    if owner and isinstance(value, (Mapping, Sequence, Iterator, torch.nn.Module)):
        return to_init(owner) + learned
    return learned


def to_init(owner: str) -> str:
    """Return where parameters go that were given to a class."""
    return f" Parameters are given to init(): opt = {owner}(); state = opt.init(params)."


_GROUPS = (
    " Give each group of leaves {} of its own by an optimizer of its own: "
    "Partition({{'body': ..., 'head': ...}}, labels)."
)
_LEARNED = (
    " For numbers that are learned, give tensors that are no nn.Parameter, by which each gets its "
    "gradient: {}={{key: number.view_as(number) for key, number in learned.items()}}."
)
_MEMBERS = " For the members of a vmap, give one tensor: torch.tensor([...])."


def _is_one_number(value: object) -> bool:
    """Whether a hyperparameter may be this; a parameter of shape () is none."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and not isinstance(value, torch.nn.Parameter)
    return isinstance(value, numbers.Real) or (
        callable(value) and not isinstance(value, torch.nn.Module)
    )


def _are_numbers_to_learn(value: object) -> bool:
    """Whether it may be a tree of numbers, each of which is a parameter of its own."""
    parts = list(value.values()) if isinstance(value, Mapping) else []
    return bool(parts) and all(
        isinstance(part, torch.nn.Parameter) and part.ndim == 0 for part in parts
    )
