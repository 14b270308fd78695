"""What a leaf without a gradient must leave alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..._core import pytree
from ..._core.types import Tree
from .._compare import ROUNDING, NotApplicable, compare
from .._subject import Step, leaves_of, run
from ._leaves import check_blind_to_names

_LAW = "missing_gradients_leave_others_alone"


def missing_gradients_leave_others_alone(
    opt: Any, params: Tree, gradient_sequence: list[Tree]
) -> None:
    """A leaf whose gradient is None stays as it is, and others move as in a tree without it.

    So do the trees of the state, if they have the keys of the parameters. The tree has three leaves
    of one shape, so that a gradient that goes to the wrong leaf is found: each of them in turn has
    no gradient in any step.
    """
    check_blind_to_names(opt)
    leaves = leaves_of(params)
    firsts = [pytree.flatten(grads)[0][:1] for grads in gradient_sequence]
    if not leaves or any(not isinstance(grad, Tensor) for first in firsts for grad in first):
        raise NotApplicable("there is no leaf with a gradient")
    tree, sequence = _three(leaves[0]), [_three(grad) for [grad] in firsts]
    _check_takes_none(opt, tree, sequence[0])
    for name in tree:
        missing = [{**grads, name: None} for grads in sequence]
        others = run(opt, _without(name, tree), [_without(name, grads) for grads in sequence])
        for step, other in zip(run(opt, tree, missing), others, strict=True):
            _hold(name, step, other)


def _hold(name: str, step: Step, other: Step) -> None:
    """Hold a step with a leaf without a gradient to one in a tree without this leaf."""
    law, number, key = f"{_LAW} (grads[{name!r}] is None)", step.number, f"[{name!r}]"
    compare(law, number, f"params{key}", step.new_params[name], step.params[name])
    old, new, expected = map(_by_path, (step.state, step.new_state, other.new_state))
    for path in new:
        if key in path and path in old:
            compare(law, number, path, new[path], old[path])
    before = _without(name, step.params)
    rest = _without(name, step.new_params)
    compare(law, number, "params", rest, other.new_params, ROUNDING, before)
    named = {path for path in new if key not in path}
    if named == expected.keys() and old.keys() == new.keys():  # or the state is made otherwise
        for path, wanted in expected.items():
            # What has an element for each leaf has other elements there.
            if getattr(new[path], "shape", ()) == getattr(wanted, "shape", ()):
                compare(law, number, path, new[path], wanted, ROUNDING, old[path])


def _three(leaf: Tensor) -> dict[str, Tensor]:
    """Return three leaves that no gradient or state of another fits."""
    return {"leaf 0": leaf, "leaf 1": leaf * 1.5, "leaf 2": leaf * -2}


def _without(name: str, tree: dict[str, Tensor]) -> dict[str, Tensor]:
    return {other: leaf for other, leaf in tree.items() if other != name}


def _by_path(state: Tree) -> dict[str, Any]:
    leaves, structure = pytree.flatten(state)
    return dict(zip(pytree.paths(structure, "state"), leaves, strict=True))


def _check_takes_none(opt: Any, params: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
    """Leave out an optimizer that refuses None, as one may that is a plain function of tensors."""
    missing: dict[str, Tensor | None] = {**grads, "leaf 0": None}
    try:
        opt.update(missing, opt.init(params), params)
    except (TypeError, AttributeError, ValueError) as error:
        raise NotApplicable(
            f"it takes no gradient that is None: {type(error).__name__}: {error}"
        ) from error
