"""Hyperparameters that are trees: each leaf of the parameters has a number of its own.

`SGD(lr={"body": 1e-4, "head": 1e-3})` has a tree in place of a number: like the parameters, or
like the top of them, so that what stands there holds for all that is below it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from .._core import pytree, transforms
from .._core.types import Hyperparam, Tree
from .counts import PerLeaf
from .hyperparameters import check_values, number_at
from .rule import Setup, UpdateRule


def read(rule: UpdateRule, opt: Any, setup: Setup, structure: pytree.Structure, own: Any) -> Any:
    """Return numbers with those of each leaf in place of trees, if all can be read for nothing.

    Else a tree is left as it is. What was read is remembered until a tensor is written.
    """
    known = vars(opt).get("_read")
    if (
        known is not None
        and (known[0] is structure or pytree.same(known[0], structure))
        and all(tensor._version == version for tensor, version in known[1])
    ):
        return own._replace(**known[2])
    found: dict[str, PerLeaf] = {}
    tensors: list[Tensor] = []
    for index in setup.trees:
        hyperparam = rule.hyperparams[index]
        leaves = _of_leaves(hyperparam, hyperparam.of(opt), structure)
        if not all(map(_can_be_read, leaves)):
            return own
        paths = pytree.paths(structure, hyperparam.path)
        values = [
            _read(hyperparam._replace(field=path), leaf)
            for path, leaf in zip(paths, leaves, strict=True)
        ]
        tensors += [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        found[hyperparam.name] = PerLeaf(values)
    versions = [(tensor, tensor._version) for tensor in tensors]
    object.__setattr__(opt, "_read", (structure, versions, found))
    return own._replace(**found)


def check_fit(rule: UpdateRule, opt: Any, setup: Setup, structure: pytree.Structure) -> None:
    """Refuse trees that do not match the parameters.

    Raises:
        ValueError: If one does not.
    """
    for index in setup.trees:
        own = rule.hyperparams[index]
        _of_leaves(own, own.of(opt), structure)


def spread(
    rule: UpdateRule,
    opt: Any,
    setup: Setup,
    params: pytree.Paired,
    active: Sequence[int],
    counted: Sequence[tuple[Tensor, Any]],
) -> list[Any]:
    """Return the numbers of each leaf that has a gradient.

    Args:
        rule: The rule of the optimizer.
        opt: The optimizer.
        setup: What is fixed about it.
        params: The parameters.
        active: The places of those that have a gradient.
        counted: For each leaf that has a gradient, or for all together, the count before the
            update, and the numbers, with the trees as they were given.

    Raises:
        ValueError: If a tree does not match the parameters, or a number is out of range or has the
            shape of neither a number nor the leaf.
    """
    structure = params.structure
    rows = list(counted) * len(active) if len(counted) == 1 else list(counted)
    numbers = [own for _, own in rows]
    for index in setup.trees:
        hyperparam = rule.hyperparams[index]
        leaves = _of_leaves(hyperparam, hyperparam.of(opt), structure)
        for place, leaf_index in enumerate(active):
            path = pytree.path(structure, hyperparam.path, leaf_index)
            own = hyperparam._replace(field=path)
            given = leaves[leaf_index]
            if isinstance(given, Tensor):
                _check_shape(path, given, params.leaves[leaf_index])
                check_values(own, given)
            elif not isinstance(given, float):
                given = number_at(own, given, rows[place][0])
            numbers[place] = numbers[place]._replace(**{hyperparam.name: given})
    return numbers


def _of_leaves(own: Hyperparam, tree: Tree, structure: pytree.Structure) -> list[Any]:
    """Return what a tree, or the top of one, has for each leaf of the parameters, by key."""
    given, tops = pytree.flatten_above(tree, callable)
    by_path = dict(zip(pytree.paths(tops, ""), given, strict=True))
    used: set[str] = set()
    found: list[Any] = []
    missing: list[str] = []
    for path in pytree.paths(structure, ""):
        top = path if path in by_path else _top_of(path, by_path)
        if top is None:
            missing.append(path)
        else:
            used.add(top)
            found.append(by_path[top])
    extra = [own.path + path for path in by_path if path not in used]
    if missing or extra:
        parts = [f"it has nothing for {pytree.some(['params' + m for m in missing])}"]
        parts = parts * bool(missing) + [f"params has no leaf at {pytree.some(extra)}"] * bool(
            extra
        )
        raise ValueError(
            f"{own.path} is a tree that does not fit the parameters: {' and '.join(parts)}. It "
            f"must have their keys, at the top at least; inside a Partition, those of its group. "
            f"For the members of a vmap, give one tensor: torch.tensor([...]). Parameters "
            f"themselves are given to init()."
        )
    return found


def _top_of(path: str, tops: Iterable[str]) -> str | None:
    """Return what stands above a leaf, if anything does."""
    return next((top for top in tops if path.startswith((top + "[", top + "."))), None)


def _check_shape(path: str, number: Tensor, param: Tensor) -> None:
    """Refuse what is neither one number for a leaf nor one for each of its elements."""
    fits = number.ndim == param.ndim and all(
        own in (1, size) for own, size in zip(number.shape, param.shape, strict=True)
    )
    if number.ndim != 0 and not fits:
        raise ValueError(
            f"{path} has shape {tuple(number.shape)}, and its parameter {tuple(param.shape)}: must "
            f"have shape (), or that of the parameter, in which a size may be 1."
        )


def _can_be_read(number: Any) -> bool:
    if isinstance(number, float):
        return True
    return (
        type(number) is Tensor
        and number.ndim == 0
        and transforms.on_host(number)
        and not number.requires_grad
        and not number.is_inference()
        and not transforms.may_be_dual()
    )


def _read(own: Hyperparam, number: float | Tensor) -> float:
    if isinstance(number, Tensor):
        check_values(own, number)
    return float(number)
