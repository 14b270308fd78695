"""What the transforms of torch.func must give: the members of a map, and true derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from ..._core import pytree
from ..._core.types import Tree
from .._compare import ROUNDING, LawBroken, NotApplicable, compare
from .._subject import cast, field, last, leaves_of, replace, tree_map

_MEMBERS = 3


def vmap_is_loop(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Under vmap each member gets what it would get alone, whatever dimension is mapped."""
    sequence = _without_none(gradient_sequence)
    for dim in (0, -1):
        stacked, gradients = _stack(params, dim), [_stack(grads, dim) for grads in sequence]
        state = vmap(opt.init, dim)(stacked)
        for number, grads in enumerate(gradients, 1):
            mapped = vmap(opt.update, (dim, 0, dim))(grads, state, stacked)
            for i in range(_MEMBERS):
                given = _member(grads, i, dim), _member(state, i), _member(stacked, i, dim)
                _same_member("vmap_is_loop", number, i, mapped, opt.update(*given), given)
            stacked, state = vmap(_same, 0, (dim, 0))(*mapped)


def nested_vmap_is_loop(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Under a vmap of a vmap each member gets what it would get alone."""
    sequence = _without_none(gradient_sequence)
    stacked, gradients = _stack(_stack(params)), [_stack(_stack(grads)) for grads in sequence]
    state = vmap(vmap(opt.init))(stacked)
    for number, grads in enumerate(gradients, 1):
        mapped = vmap(vmap(opt.update))(grads, state, stacked)
        for i in range(_MEMBERS):
            given = [_member(_member(tree, i), i) for tree in (grads, state, stacked)]
            inner = tuple(_member(tree, i) for tree in mapped)
            _same_member("nested_vmap_is_loop", number, i, inner, opt.update(*given), given)
        stacked, state = mapped


def per_member_hyperparameters(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Under vmap each member may have a learning rate of its own."""
    lr = field(opt, "lr")
    if callable(lr):
        raise NotApplicable("its lr is a schedule")
    sequence = _without_none(gradient_sequence)
    lrs = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, device="cpu") * float(lr)
    stacked = _stack(params)
    state = vmap(opt.init)(stacked)
    step = vmap(lambda lr, g, s, p: replace(opt, lr=lr).update(g, s, p))
    for number, grads in enumerate(map(_stack, sequence), 1):
        mapped = step(lrs, grads, state, stacked)
        for i in range(_MEMBERS):
            member = replace(opt, lr=lrs[i].item())
            given = [_member(tree, i) for tree in (grads, state, stacked)]
            own = member.update(*given)
            _same_member("per_member_hyperparameters", number, i, mapped, own, given)
        stacked, state = mapped


def _same(*trees: Tree) -> tuple[Tree, ...]:
    return trees


def _stack(tree: Tree, dim: int = 0) -> Tree:
    """Stack members that differ, so that no two can be confused."""
    if not leaves_of(tree):
        raise NotApplicable("there is nothing to map over")
    return tree_map(lambda t: torch.stack([t * (i + 1) / 2 for i in range(_MEMBERS)], dim), tree)


def _member(tree: Tree, i: int, dim: int = 0) -> Tree:
    return tree_map(lambda t: t.select(dim, i), tree)


def _without_none(gradient_sequence: list[Tree]) -> list[Tree]:
    """Drop None: what has no gradient is no input to map over."""
    if any(leaf is None for grads in gradient_sequence for leaf in pytree.flatten(grads)[0]):
        raise NotApplicable("a leaf has no gradient")
    return gradient_sequence


def _same_member(
    law: str, number: int, i: int, mapped: Tree, own: Tree, given: Sequence[Tree]
) -> None:
    """Hold member i of a mapped update against its own, both of which came of `given`."""
    _, state, params = given
    trees = zip(("params", "state"), mapped, own, (params, state), strict=True)
    for root, whole, alone, before in trees:
        compare(f"{law} (member {i})", number, root, _member(whole, i), alone, ROUNDING, before)


def gradient_is_finite(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Derivatives through the updates are finite, also where a gradient is exactly zero."""
    after = _differentiable(opt, params, gradient_sequence)
    wide = cast(params, torch.float64)
    zeros = [tree_map(torch.zeros_like, grads) for grads in gradient_sequence]
    for law, sequence in (("", gradient_sequence), (" (zero gradients)", zeros)):
        slopes = grad(after, (0, 1))(wide, [cast(grads, torch.float64) for grads in sequence])
        finite = tree_map(lambda t: torch.where(t.isfinite(), t, torch.zeros_like(t)), slopes)
        for root, slope, expected in zip(("params", "grads"), slopes, finite, strict=True):
            compare(f"gradient_is_finite{law}", len(sequence), root, slope, expected)


def gradient_matches_differences(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """The derivative along a direction is the limit of differences, in reverse and forward mode."""
    after = _differentiable(opt, params, gradient_sequence)
    wide = cast(params, torch.float64)
    sequence = [cast(grads, torch.float64) for grads in gradient_sequence]

    def along(scale: Tensor) -> Tensor:
        # Scaling keeps a zero gradient where it is, which is where differences could not follow.
        scaled = [tree_map(lambda g, i=i: g * scale ** (i + 1), g) for i, g in enumerate(sequence)]
        return after(tree_map(lambda p: p * scale, wide), scaled)

    one, h = torch.ones((), dtype=torch.float64, device="cpu"), 1e-5
    difference = (along(one + h) - along(one - h)) / (2 * h)
    for mode, slope in (
        ("reverse", grad(along)(one)),
        ("forward", jvp(along, (one,), (one,))[1]),
    ):
        allowed = 1e-5 * (1 + difference.abs())
        if not bool((slope - difference).abs() <= allowed):
            raise LawBroken(
                f"gradient_matches_differences ({mode} mode): step {len(sequence)}, the sum of "
                f"squares of params: got {slope.item():.9g}, expected {difference.item():.9g}"
            )


def _differentiable(
    opt: Any, params: Tree, gradient_sequence: list[Tree]
) -> Callable[[Tree, list[Tree]], Tensor]:
    """Return the sum of squares after training, as a function, if the optimizer keeps a history."""

    def after(params: Tree, gradients: list[Tree]) -> Tensor:
        final = last(opt, params, gradients).new_params
        return torch.stack([leaf.abs().square().sum() for leaf in leaves_of(final)]).sum()

    # All of them: what the first alone decides may show later, as in an accumulation.
    wide = cast(gradient_sequence, torch.float64)
    tracked = tree_map(lambda g: g.detach().clone().requires_grad_(), wide)
    if not leaves_of(tracked):
        raise NotApplicable("there is no gradient")
    try:
        result = after(cast(params, torch.float64), tracked)
    except RuntimeError as error:
        if "requires grad" not in str(error) and "require grad" not in str(error):
            raise
        raise NotApplicable(f"it is not differentiable: {error}") from error
    if not result.requires_grad:
        raise NotApplicable("it is not differentiable: its results have no history")
    return after
