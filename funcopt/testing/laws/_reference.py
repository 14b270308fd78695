"""Agreement with another optimizer, which is known to be right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._core.types import Tree
from .._compare import ROUNDING, NotApplicable, compare
from .._subject import leaves_of, run, tree_map


def matches_reference(
    opt: Any, params: Tree, gradient_sequence: list[Tree], like: Any = None
) -> None:
    """Parameters move as those of a reference do, up to a few roundings in each step.

    It applies if a reference is given: `check_optimizer(opt, like=reference)`. Both make all steps
    by themselves, each from its own state, which may be made in another way. Parameters and
    gradients are real here: in float64 if all were drawn in double precision, else in float32, as
    two that are right need not agree on what is lost in 16 bits.
    """
    if like is None:
        raise NotApplicable("no reference is given, as check_optimizer(opt, like=...)")
    doubles = torch.float64, torch.complex128
    wide = all(leaf.dtype in doubles for leaf in leaves_of(params))
    dtype = torch.float64 if wide else torch.float32

    def prepared(tensor: Tensor) -> Tensor:
        return torch.real(tensor).to(dtype)

    start = tree_map(prepared, params)
    sequence = [tree_map(prepared, grads) for grads in gradient_sequence]
    law = f"matches_reference (like={type(like).__name__}, {dtype})"
    theirs = run(like, start, sequence)
    for step, wanted in zip(run(opt, start, sequence), theirs, strict=True):
        ulps = {own: step.number * allowed for own, allowed in ROUNDING.items()}
        moved, expected = step.new_params, wanted.new_params
        compare(law, step.number, "params", moved, expected, ulps, step.params)
