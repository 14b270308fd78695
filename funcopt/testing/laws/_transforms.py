"""What the transforms of torch.func must give: the members of a map, and true derivatives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from ..._core import pytree
from ..._core.types import Tree
from .._compare import ROUNDING, LawBroken, NotApplicable, compare, compare_moved
from .._subject import (
    cast,
    finite,
    fixed_lr,
    last,
    leaves_of,
    replace,
    tree_map,
    with_moments_of_params,
)

_MEMBERS = 3


def vmap_is_loop(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Under vmap each member gets what it would get alone, whatever dimension is mapped."""
    for dim in (0, -1):
        mapped = vmap(opt.update, (dim, 0, dim), (dim, 0))
        stacked = stack(params, dim), [stack(grads, dim) for grads in gradient_sequence]
        _members_agree("vmap_is_loop", [opt] * _MEMBERS, stacked, vmap(opt.init, dim), mapped, dim)


def nested_vmap_is_loop(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Under a vmap of a vmap each member gets what it would get alone."""
    stacked = stack(stack(params)), [stack(stack(grads)) for grads in gradient_sequence]
    opts, mapped = [opt] * _MEMBERS, vmap(vmap(opt.update))
    _members_agree("nested_vmap_is_loop", opts, stacked, vmap(vmap(opt.init)), mapped, depth=2)


def per_member_hyperparameters(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Under vmap each member may have a learning rate of its own."""
    lrs = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, device="cpu") * fixed_lr(opt)
    mapped = partial(vmap(lambda lr, *given: replace(opt, lr=lr).update(*given)), lrs)
    opts = [replace(opt, lr=lr) for lr in lrs.tolist()]
    stacked = stack(params), list(map(stack, gradient_sequence))
    _members_agree("per_member_hyperparameters", opts, stacked, vmap(opt.init), mapped)


def _members_agree(
    law: str,
    opts: list[Any],
    stacked: tuple[Tree, list[Tree]],
    init: Callable[[Tree], Tree],
    update: Callable[[Tree, Tree, Tree], Any],
    dim: int = 0,
    depth: int = 1,
) -> None:
    """Hold each member of a mapped run to what an optimizer of its own does with it alone.

    `stacked` are the parameters and gradients of all members, `dim` is where they are stacked, and
    `depth` how often.
    """
    params, gradient_sequence = stacked
    state = init(params)
    for number, grads in enumerate(gradient_sequence, 1):
        mapped = update(grads, state, params)
        for i, opt in enumerate(opts):
            given = [
                member_of(tree, i, own_dim, depth)
                for tree, own_dim in ((grads, dim), (state, 0), (params, dim))
            ]
            moved = member_of(mapped[0], i, dim, depth), member_of(mapped[1], i, 0, depth)
            before = given[2], given[1]
            name = f"{law} (member {i})"
            compare_moved(name, number, moved, opt.update(*given), ROUNDING, before)
        params, state = mapped


def stack(tree: Tree, dim: int = 0) -> Tree:
    """Stack members that differ, so that no two can be confused."""
    leaves = pytree.flatten(tree)[0]
    if any(leaf is None for leaf in leaves):  # which is no input to map over
        raise NotApplicable("a leaf has no gradient")
    if not leaves:
        raise NotApplicable("there is nothing to map over")
    return tree_map(lambda t: torch.stack([t * (i + 1) / 2 for i in range(_MEMBERS)], dim), tree)


def member_of(tree: Tree, i: int, dim: int = 0, depth: int = 1) -> Tree:
    """Return one member of a tree that was stacked so often."""
    for _ in range(depth):
        tree = tree_map(lambda t: t.select(dim, i), tree)
    return tree


def gradient_is_finite(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Derivatives through the updates are finite, also where a gradient is exactly zero."""
    after = _differentiable(opt, params, gradient_sequence)
    wide = cast(params, torch.float64)
    zeros = [tree_map(torch.zeros_like, grads) for grads in gradient_sequence]
    for law, sequence in (("", gradient_sequence), (" (zero gradients)", zeros)):
        slopes = grad(after, (0, 1))(wide, [cast(grads, torch.float64) for grads in sequence])
        for root, slope, expected in zip(("params", "grads"), slopes, finite(slopes), strict=True):
            compare(f"gradient_is_finite{law}", len(sequence), root, slope, expected)


def gradient_matches_differences(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """The derivative along a direction is the limit of differences, in reverse and forward mode.

    A problem at a kink, where the limits from both sides differ, has no derivative to judge: as
    where the larger of two numbers is taken, and they are equal.
    """
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
            if bool(_jump(along, h) > allowed):
                raise NotApplicable("its slopes to both sides differ: it has no derivative there")
            raise LawBroken(
                f"gradient_matches_differences ({mode} mode): step {len(sequence)}, the slope of "
                f"the sum of squares of params, with respect to a factor by which params and "
                f"grads are multiplied (grads of step i by its power i): got a slope of "
                f"{slope.item():.9g}, expected {difference.item():.9g}, that of differences"
            )


def _jump(along: Callable[[Tensor], Tensor], h: float) -> Tensor:
    """Return how far the slopes to both sides of 1 differ; 0 if they meet as they are taken nearer.

    Where a slope changes gradually, their difference falls with the distance; at a kink it stays.
    """
    one = torch.ones((), dtype=torch.float64, device="cpu")
    wide, near = (
        ((along(one + size) - 2 * along(one) + along(one - size)) / size).abs()
        for size in (h, h / 10)
    )
    return near if bool(near > wide / 2) else torch.zeros_like(near)


def _differentiable(
    opt: Any, params: Tree, gradient_sequence: list[Tree]
) -> Callable[[Tree, list[Tree]], Tensor]:
    """Return the sum of squares after training, as a function, if the optimizer keeps a history.

    All of it is in float64, the moments as well.
    """
    opt = with_moments_of_params(opt)

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
