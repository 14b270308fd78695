"""What decides how a leaf moves: nothing beyond what the optimizer says of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._core import pytree
from ..._core.types import Tree, optimizers_in, own_traits, traits_of
from .._compare import ROUNDING, NotApplicable, compare
from .._subject import run


def names_do_not_matter(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """A leaf moves as it would under another name, elsewhere in the tree.

    It need not for an optimizer that says it treats leaves by their names, as `Partition` may.
    """
    check_blind_to_names(opt)
    structure = pytree.flatten(params)[1]
    names = [f"x{index}" for index in reversed(range(structure.num_leaves))]

    def renamed(tree: Tree) -> Tree:
        leaves = pytree.pair(tree, "grads", structure).leaves
        return dict(zip(names, reversed(leaves), strict=True))

    others = run(opt, renamed(params), [renamed(grads) for grads in gradient_sequence])
    for step, other in zip(run(opt, params, gradient_sequence), others, strict=True):
        expected = renamed(step.new_params)
        compare("names_do_not_matter", step.number, "params", other.new_params, expected, ROUNDING)


def leaves_are_independent(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """A leaf moves as it would alone, if the optimizer says so: by its trait `leafwise`.

    One that takes a norm over all gradients is right, and does not say it. `elementwise` says it,
    too.
    """
    _check_says(opt, "leafwise", "each leaf moves by itself")
    _alone(opt, params, gradient_sequence, lambda tensor: tensor, "leaves_are_independent")


def elements_are_independent(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """A leaf moves as it would stacked on itself, if the optimizer says that it is `elementwise`.

    One that looks at rows, columns or whole matrices is right, and does not say it.
    """
    _check_says(opt, "elementwise", "each element moves by itself")
    law = "elements_are_independent"
    _alone(opt, params, gradient_sequence, lambda tensor: torch.stack([tensor, tensor]), law)


def _check_says(opt: Any, trait: str, what: str) -> None:
    if not getattr(traits_of(opt), trait):
        raise NotApplicable(
            f"it does not say that {what}, by traits = Traits({trait}=True) in its class"
        )


def check_blind_to_names(opt: Any) -> None:
    """Let pass an optimizer that does not say that it treats leaves by their names."""
    for part in optimizers_in(opt):
        # A count for each leaf is another reason to say so, by which names do not matter.
        if own_traits(part).tells_leaves_apart and not getattr(part, "step_per_leaf", False):
            raise NotApplicable(
                f"{type(part).__name__} says that it treats leaves by their names, by "
                f"traits = Traits(tells_leaves_apart=True) in its class"
            )


def _alone(
    opt: Any,
    params: Tree,
    gradient_sequence: list[Tree],
    prepare: Callable[[Tensor], Tensor],
    law: str,
) -> None:
    """Hold each leaf, prepared and updated alone, to what it became among the others."""
    check_blind_to_names(opt)  # alone, it has no name
    leaves, structure = pytree.flatten(params)
    rows = [pytree.pair(grads, "grads", structure).leaves for grads in gradient_sequence]
    whole = [pytree.flatten(step.new_params)[0] for step in run(opt, params, gradient_sequence)]
    for index, path in enumerate(pytree.paths(structure, "params")):
        grads = [None if row[index] is None else prepare(row[index]) for row in rows]
        for step in run(opt, [prepare(leaves[index])], [[grad] for grad in grads]):
            expected = prepare(whole[step.number - 1][index])
            compare(law, step.number, path, step.new_params[0], expected, ROUNDING)
