"""What the equations of an optimizer imply, whatever the numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._core import pytree
from ..._core.types import Tree
from ...optimizers.adam import Adam
from ...optimizers.adamw import AdamW
from ...optimizers.lion import Lion
from .._compare import ROUNDING, NotApplicable, compare, wide
from .._subject import (
    field,
    fields,
    fixed_lr,
    last,
    other_than,
    replace,
    run,
    tree_map,
    variants,
)


def zero_lr_moves_nothing(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """With a learning rate of zero the parameters keep their bits."""
    field(opt, "lr")
    for step in run(replace(opt, lr=0.0), params, gradient_sequence):
        compare("zero_lr_moves_nothing", step.number, "params", step.new_params, params)


def maximize_is_minimize_negated(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """To maximize is to minimize with the gradients negated, to the bit, in every kernel."""
    maximize = field(opt, "maximize")
    negated = [tree_map(torch.neg, grads) for grads in gradient_sequence]
    for variant in variants(opt, params):
        other = replace(variant, maximize=not maximize)
        expected = list(run(variant, params, gradient_sequence))
        for step, wanted in zip(run(other, params, negated), expected, strict=True):
            # Not the state: whether a gradient is kept there before or after its sign is turned is
            # the optimizer's own affair.
            law = "maximize_is_minimize_negated"
            compare(law, step.number, "params", step.new_params, wanted.new_params)


def _only(opt: Any, *kinds: type) -> None:
    if not isinstance(opt, kinds):
        names = " and ".join(kind.__name__ for kind in kinds)
        raise NotApplicable(f"it holds for {names}, and {other_than(opt, kinds)}")


def decay_is_decoupled(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Weight decay shrinks the parameters by 1 - lr * decay, and touches nothing else."""
    _only(opt, AdamW, Lion)
    lr, decay = fixed_lr(opt), 0.25
    with_decay, without = replace(opt, weight_decay=decay), replace(opt, weight_decay=0.0)
    for step in run(with_decay, params, gradient_sequence):
        bare, state = without.update(*step.given)
        compare("decay_is_decoupled", step.number, "state", step.new_state, state, ROUNDING)
        leaves, structure = pytree.flatten(bare)
        pairs = zip(leaves, pytree.flatten(step.params)[0], strict=True)
        shrunk = [(wide(new) - wide(old) * (lr * decay)).to(new.dtype) for new, old in pairs]
        expected = pytree.unflatten(structure, shrunk)
        compare("decay_is_decoupled", step.number, "params", step.new_params, expected, _LOOSE)


# A difference of two rounded parameters is compared: an ulp of each.
_LOOSE = {dtype: 2 * ulps for dtype, ulps in ROUNDING.items()}


def scale_invariant(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Without eps, gradients four times as large move the parameters by the same."""
    _only(opt, AdamW)
    if torch.float16 in fields(opt, "moments"):
        raise NotApplicable("a square in float16 loses digits where it is small")
    bare = replace(opt, eps=0.0)
    nonzero = [tree_map(_nonzero, grads) for grads in gradient_sequence]
    scaled = [tree_map(lambda g: g * 4, grads) for grads in nonzero]
    expected = list(run(bare, params, nonzero))
    for step, wanted in zip(run(bare, params, scaled), expected, strict=True):
        # From the second step on, what was rounded into the moments differs as well.
        ulps = ROUNDING if step.number == 1 else _MOMENTS_TOO
        moved, expected = step.new_params, wanted.new_params
        compare("scale_invariant", step.number, "params", moved, expected, ulps)


_MOMENTS_TOO = {dtype: 64 * ulps for dtype, ulps in ROUNDING.items()}


def first_step_is_sign(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Without eps and decay, the first step has the size of lr and the sign of the gradient."""
    _only(opt, AdamW, Adam)
    if getattr(opt, "nesterov", False):
        raise NotApplicable("with nesterov it looks ahead, so that its first step is larger")
    lr = fixed_lr(opt)
    leaves, structure = pytree.flatten(params)
    paired = pytree.pair(gradient_sequence[0], "grads", structure).leaves
    given = [(p, g) for p, g in zip(leaves, paired, strict=True) if not p.is_complex()]
    if not given or any(g is None for _, g in given):
        raise NotApplicable("a complex leaf has no sign, and None none either")
    real, grads = [p for p, _ in given], [_nonzero(g) for _, g in given]
    step = last(replace(opt, eps=0.0, weight_decay=0.0), real, [grads])
    sign = -1.0 if field(opt, "maximize") else 1.0
    expected = [
        (wide(p) - lr * sign * wide(g).sign()).to(p.dtype) for p, g in zip(real, grads, strict=True)
    ]
    compare("first_step_is_sign", 1, "params", step.new_params, expected, ROUNDING)


def _nonzero(grad: Tensor) -> Tensor:
    return torch.where(grad == 0, torch.ones_like(grad), grad)
