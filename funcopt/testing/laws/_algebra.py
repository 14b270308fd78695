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
from .._subject import field, kernels, last, replace, run, tree_map


def zero_lr_moves_nothing(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """With a learning rate of zero the parameters keep their bits."""
    field(opt, "lr")
    for step in run(replace(opt, lr=0.0), params, gradient_sequence):
        compare("zero_lr_moves_nothing", step.number, "params", step.new_params, params)


def maximize_is_minimize_negated(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """To maximize is to minimize with the gradients negated, to the bit, in every kernel."""
    maximize = field(opt, "maximize")
    negated = [tree_map(torch.neg, grads) for grads in gradient_sequence]
    for variant in _kernels(opt):
        other = replace(variant, maximize=not maximize)
        expected = list(run(variant, params, gradient_sequence))
        for step, wanted in zip(run(other, params, negated), expected, strict=True):
            # Not the state: whether a gradient is kept there before or after its sign is turned is
            # the optimizer's own affair.
            law = "maximize_is_minimize_negated"
            compare(law, step.number, "params", step.new_params, wanted.new_params)


def _kernels(opt: Any) -> list[Any]:
    """The optimizer with each of its kernels, if it has a choice of them."""
    try:
        names = kernels(opt, [torch.device("cpu")])
    except NotApplicable:
        return [opt]
    return [replace(opt, kernel=name) for name in names if name != "auto"]


def _only(opt: Any, *kinds: type) -> None:
    if not isinstance(opt, kinds):
        names = " and ".join(kind.__name__ for kind in kinds)
        raise NotApplicable(f"it holds for {names}, and this is a {type(opt).__name__}")


def decay_is_decoupled(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Weight decay shrinks the parameters by 1 - lr * decay, and touches nothing else."""
    _only(opt, AdamW, Lion)
    lr = field(opt, "lr")
    if callable(lr):
        raise NotApplicable("its lr is a schedule")
    decay = 0.25
    with_decay, without = replace(opt, weight_decay=decay), replace(opt, weight_decay=0.0)
    for step in run(with_decay, params, gradient_sequence):
        bare, state = without.update(step.grads, step.state, step.params)
        compare("decay_is_decoupled", step.number, "state", step.new_state, state, ROUNDING)
        shrunk = tree_map(lambda p: wide(p) * (float(lr) * decay), step.params)
        expected = _combine(lambda p, s: (wide(p) - s).to(p.dtype), bare, shrunk)
        compare("decay_is_decoupled", step.number, "params", step.new_params, expected, _LOOSE)


# A difference of two rounded parameters is compared: an ulp of each.
_LOOSE = {dtype: 2 * ulps for dtype, ulps in ROUNDING.items()}


def scale_invariant(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Without eps, gradients four times as large move the parameters by the same."""
    _only(opt, AdamW)
    bare = replace(opt, eps=0.0)
    nonzero = [tree_map(_nonzero, grads) for grads in gradient_sequence]
    scaled = [tree_map(lambda g: g * 4, grads) for grads in nonzero]
    expected = list(run(bare, params, nonzero))
    for step, wanted in zip(run(bare, params, scaled), expected, strict=True):
        # From the second step on, what was rounded into the moments differs as well.
        allowed = ROUNDING if step.number == 1 else _MOMENTS_TOO
        compare(
            "scale_invariant", step.number, "params", step.new_params, wanted.new_params, allowed
        )


_MOMENTS_TOO = {dtype: 64 * ulps for dtype, ulps in ROUNDING.items()}


def first_step_is_sign(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Without eps and decay, the first step has the size of lr and the sign of the gradient."""
    _only(opt, AdamW, Adam)
    lr = field(opt, "lr")
    if callable(lr):
        raise NotApplicable("its lr is a schedule")
    real = [leaf for leaf in pytree.flatten(params)[0] if not leaf.is_complex()]
    first = [
        leaf
        for leaf in pytree.flatten(gradient_sequence[0])[0]
        if leaf is not None and not leaf.is_complex()
    ]
    if not real or len(first) != len(real):
        raise NotApplicable("a complex leaf has no sign, and None none either")
    paired = pytree.pair(gradient_sequence[0], "grads", pytree.flatten(params)[1]).leaves
    grads = [_nonzero(g) for g in paired if not g.is_complex()]
    step = last(replace(opt, eps=0.0, weight_decay=0.0), real, [grads])
    sign = -1.0 if field(opt, "maximize") else 1.0
    expected = [
        (wide(p) - float(lr) * sign * wide(g).sign()).to(p.dtype)
        for p, g in zip(real, grads, strict=True)
    ]
    compare("first_step_is_sign", 1, "params", step.new_params, expected, ROUNDING)


def _nonzero(grad: Tensor) -> Tensor:
    return torch.where(grad == 0, torch.ones_like(grad), grad)


def _combine(function: Any, one: Tree, other: Tree) -> Tree:
    leaves, structure = pytree.flatten(one)
    return pytree.unflatten(structure, map(function, leaves, pytree.flatten(other)[0]))
