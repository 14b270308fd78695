"""Oracles: an optimizer written again from its paper, in float64, to hold the real one to.

An oracle shares no line with what it judges. It is a function `oracle(opt, grads, state, params)`
of trees in float64 that returns the parameters and the state after one update. The law
`matches_oracle` judges optimizers of registered classes. `OptimizerMachine` holds one without an
oracle to its own update, run in float64 one tree after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._core import pytree
from .._core.types import Tree
from ..optimizers.adamw import AdamW, AdamWState

__all__ = ["Oracle", "adamw", "oracle_of", "own_update", "register", "registered"]

Oracle = Callable[[Any, Tree, Any, Tree], tuple[Tree, Any]]

_ORACLES: dict[type, Oracle] = {}


def register(kind: type, oracle: Oracle) -> None:
    """Let `oracle` judge the optimizers of a class.

    Args:
        kind: The class.
        oracle: Called as `oracle(opt, grads, state, params)` with trees in float64 (complex128
            where leaves are complex); returns `(params, state)` after one update.
    """
    _ORACLES[kind] = oracle


def registered(opt: Any) -> Oracle | None:
    """Return the oracle of an optimizer's class, or of one that it inherits from; None if none."""
    found = (_ORACLES[kind] for kind in type(opt).__mro__ if kind in _ORACLES)
    return next(found, None)


def oracle_of(opt: Any) -> Oracle:
    """Return the oracle of an optimizer: the one of its class, or its own update."""
    return registered(opt) or own_update


def own_update(opt: Any, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    """Take the optimizer's own step, in the dtype of the trees."""
    moved: tuple[Tree, Any] = opt.update(grads, state, params)
    return moved


def adamw(opt: AdamW, grads: Tree, state: AdamWState, params: Tree) -> tuple[Tree, AdamWState]:
    """AdamW from the papers' equations, leaf by leaf."""
    leaves, structure = pytree.flatten(params)

    def column(tree: Tree, root: str) -> list[Any]:
        return pytree.pair(tree, root, structure).leaves

    counts = column(state.step, "step") if opt.step_per_leaf else [state.step] * len(leaves)
    maxima = column(state.max_exp_avg_sq, "max") if opt.amsgrad else [None] * len(leaves)
    columns = (column(grads, "grads"), column(state.exp_avg, "m"), column(state.exp_avg_sq, "v"))
    rows = [_one(opt, list(row)) for row in zip(leaves, *columns, maxima, counts, strict=True)]
    trees = [pytree.unflatten(structure, [row[i] for row in rows]) for i in range(5)]
    new_params, exp_avg, exp_avg_sq, largest, count = trees
    return new_params, AdamWState(
        count if opt.step_per_leaf else state.step + 1,
        exp_avg,
        exp_avg_sq,
        largest if opt.amsgrad else (),
    )


def _one(opt: AdamW, row: list[Any]) -> list[Any]:
    p, g, m, v, largest, t = row
    if g is None:
        return [p, m, v, largest, t]
    if p.is_complex():
        pairs = [
            None if x is None else torch.view_as_real(x.resolve_conj())
            for x in (p, g, m, v, largest)
        ]
        *moved, t = _one(opt, [*pairs, t])
        return [*(None if x is None else torch.view_as_complex(x) for x in moved), t]
    given: tuple[Any, ...] = (opt.lr, *opt.betas, opt.eps, opt.weight_decay)
    lr, beta1, beta2, eps, weight_decay = (own(t) if callable(own) else own for own in given)
    t = t + 1
    if opt.maximize:
        g = -g
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    if opt.amsgrad:
        largest = torch.maximum(largest, v)
    mean = m / (1 - beta1**t)
    spread = ((largest if opt.amsgrad else v) / (1 - beta2**t)).sqrt()
    return [p - lr * weight_decay * p - lr * mean / (spread + eps), m, v, largest, t]


register(AdamW, adamw)
