"""Where the steps lead."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..._core import pytree
from ..._core.tensors import view_as_complex_like, view_as_real
from ..._core.types import Tree, traits_of
from .._compare import LawBroken, NotApplicable, wide
from .._subject import Step, clone, fields, leaves_of, run, tree_map
from .._tensors import build

# An optimizer may take several gradients for one step, and may take a step back now and then.
_UPDATES = 10


def goes_downhill(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:  # noqa: ARG001
    """On a constant slope the loss is never above that at the start; below, if it maximizes.

    The loss is linear, the sum of slope times parameter, and the parameters begin at zero. There
    right steps of any size obey: momentum has no minimum to overshoot, and weight decay, or what
    a `Lookahead` takes back, leads to the start and no further. Each leaf by itself must obey if
    the optimizer is `leafwise`, all together if it does not say so. What does not move is not
    judged.
    """
    maximize = set(fields(opt, "maximize"))
    if len(maximize) > 1:
        raise NotApplicable("some of it maximizes, and some does not")
    start = tree_map(torch.zeros_like, params)
    # Where leaves are rounded to 16 bits, a part of the size is noise.
    noise = 4 * max((torch.finfo(leaf.dtype).eps for leaf in leaves_of(params)), default=0.0)
    moved = False
    for slope in _opposite_slopes(start):
        for step in run(opt, clone(start), [clone(slope) for _ in range(_UPDATES)]):
            for path, rise, size in _rises(step, slope, by_leaf=traits_of(opt).leafwise):
                moved = moved or size > 0
                loss = -rise if True in maximize else rise
                if loss > noise * size:
                    raise LawBroken(
                        f"goes_downhill: step {step.number}, {path}: got a loss that changed by "
                        f"{rise:.9g} on a slope along which steps should "
                        f"{'raise' if True in maximize else 'lower'} it"
                    )
    if not moved:
        raise NotApplicable(f"it moves nothing in {_UPDATES} updates")


def _opposite_slopes(start: Tree) -> tuple[Tree, Tree]:
    """Return a gradient of which no element is near zero, and its opposite."""
    leaves, structure = pytree.flatten(start)
    slopes = []
    for seed, leaf in enumerate(leaves):
        drawn = build(tuple(leaf.shape), leaf.dtype, "normal", "contiguous", seed)
        real = view_as_real(drawn)
        away = real + torch.ones_like(real).copysign(real)
        slopes.append(view_as_complex_like(away, drawn).to(leaf.device))
    return pytree.unflatten(structure, slopes), pytree.unflatten(structure, map(torch.neg, slopes))


def _rises(step: Step, slope: Tree, *, by_leaf: bool) -> list[tuple[str, float, float]]:
    """Return by how much the loss has changed since the start, and by how much at most it could.

    For each leaf, with its path, or for all.
    """
    slopes, structure = pytree.flatten(slope)
    rises = []
    for path, leaf, own in zip(
        pytree.paths(structure, "params"),
        pytree.pair(step.new_params, "params", structure).leaves,
        slopes,
        strict=True,
    ):
        change = (wide(own).conj() * wide(leaf.detach())).real
        size = wide(own).abs() * wide(leaf.detach()).abs()
        rises.append((path, float(change.sum()), float(size.sum())))
    if not all(math.isfinite(size) for _, _, size in rises):
        raise NotApplicable("its steps overflow")
    if by_leaf:
        return rises
    return [("params", sum(rise for _, rise, _ in rises), sum(size for _, _, size in rises))]
