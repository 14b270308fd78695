"""Oracles: an optimizer written again from its paper, in float64, to hold the real one to.

An oracle shares no line with what it judges. It is a function `oracle(opt, grads, state, params)`
of trees in float64 that returns the parameters and the state after one update. The law
`matches_oracle` judges optimizers of registered classes. `OptimizerMachine` holds one without an
oracle to its own update, run in float64 one tree after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from .._core import pytree
from .._core.types import Tree
from ..optimizers.adafactor import Adafactor
from ..optimizers.adagrad import Adagrad
from ..optimizers.adam import Adam
from ..optimizers.adamw import AdamW
from ..optimizers.lion import Lion
from ..optimizers.nadam import NAdam
from ..optimizers.radam import RAdam
from ..optimizers.rmsprop import RMSprop
from ..optimizers.sgd import SGD

__all__ = [
    "Oracle",
    "adafactor",
    "adagrad",
    "adam",
    "adamw",
    "lion",
    "nadam",
    "oracle_of",
    "own_update",
    "radam",
    "register",
    "registered",
    "rmsprop",
    "sgd",
]

Oracle = Callable[[Any, Tree, Any, Tree], tuple[Tree, Any]]

_ORACLES: dict[type, Oracle] = {}


def register(kind: type, oracle: Oracle) -> None:
    """Let `oracle` judge the optimizers of a class.

    The class may be one that `funcopt.pure` runs, such as a subclass of `torch.optim.Optimizer`:
    then the oracle judges the class itself, whatever a factory makes of it, and `pure` of it. What
    it is given for a state is a `PureState`, that of all leaves in trees like the parameters:
    `state.slots["momentum"]` has the tensors that the class keeps as `state[param]["momentum"]`,
    `state.numbers["step"]` the Python numbers, as tensors of shape (). The learning rate is
    `opt.lr`, and other options that are not the defaults of the class are in
    `opt.hyperparameters`, by name.

    Args:
        kind: The class.
        oracle: Called as `oracle(opt, grads, state, params)` with trees in float64 (complex128
            where leaves are complex); returns `(params, state)` after one update.

    Example:
        >>> import torch
        >>> from funcopt.testing import check_optimizer, oracles, strategies
        >>> class Averaged(torch.optim.Optimizer):
        ...     def __init__(self, params, lr=0.1, beta=0.9):
        ...         super().__init__(params, {"lr": lr, "beta": beta})
        ...
        ...     @torch.no_grad()
        ...     def step(self, closure=None):
        ...         for group in self.param_groups:
        ...             for param in group["params"]:
        ...                 mean = self.state[param].setdefault("mean", torch.zeros_like(param))
        ...                 mean.lerp_(param.grad, 1 - group["beta"])
        ...                 param.sub_(group["lr"] * mean)
        >>> def by_hand(opt, grads, state, params):
        ...     beta = opt.hyperparameters.get("beta", 0.9)
        ...     olds = state.slots["mean"]
        ...     mean = {name: beta * olds[name] + (1 - beta) * grads[name] for name in params}
        ...     params = {name: params[name] - opt.lr * mean[name] for name in params}
        ...     return params, state._replace(slots={"mean": mean})
        >>> oracles.register(Averaged, by_hand)
        >>> dicts = strategies.params(nodes=["dict"], max_leaves=2)
        >>> for opt in (Averaged, lambda params: Averaged(params, beta=0.5)):
        ...     print(check_optimizer(opt, laws=["matches_oracle"], params=dicts, max_examples=5))
        Averaged: 1 hold
          holds           matches_oracle
        Averaged: 1 hold
          holds           matches_oracle
    """
    _ORACLES[kind] = oracle


def registered(opt: Any) -> Oracle | None:
    """Return the oracle of an optimizer's class, or of one that it inherits from; None if none.

    Of one that runs another class, as `funcopt.pure` does, it may be the oracle of that class.
    """
    run = getattr(opt, "kind", None)
    kinds = (*type(opt).__mro__, *(run.__mro__ if isinstance(run, type) else ()))
    return next((_ORACLES[kind] for kind in kinds if kind in _ORACLES), None)


def oracle_of(opt: Any) -> Oracle:
    """Return the oracle of an optimizer: the one of its class, or its own update."""
    return registered(opt) or own_update


def own_update(opt: Any, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    """Take the optimizer's own step, in the dtype of the trees."""
    moved: tuple[Tree, Any] = opt.update(grads, state, params)
    return moved


_Numbers = Mapping[str, Any]
_Move = Callable[[Any, _Numbers, list[Any]], list[Any]]


def adamw(opt: AdamW, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    """AdamW from the papers' equations, leaf by leaf."""
    return _leaf_by_leaf(partial(_adam_move, decoupled=True), _ADAM, opt, grads, state, params)


def adam(opt: Adam, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    """Adam with coupled weight decay, from the papers' equations, leaf by leaf."""
    return _leaf_by_leaf(partial(_adam_move, decoupled=False), _ADAM, opt, grads, state, params)


_ADAM = ("lr", "betas", "eps", "weight_decay")


def _adam_move(opt: Any, n: _Numbers, row: list[Any], *, decoupled: bool) -> list[Any]:
    p, g, m, v, *largest = row
    beta1, beta2 = n["betas"]
    if decoupled:
        decayed = p - n["lr"] * n["weight_decay"] * p
    else:
        decayed, g = p, g + n["weight_decay"] * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    largest = [torch.maximum(own, v) for own in largest]
    spread = ((largest[0] if opt.amsgrad else v) / (1 - beta2 ** n["t"])).sqrt()
    mean = m / (1 - beta1 ** n["t"])
    if getattr(opt, "nesterov", False):
        ahead = beta1 * m / (1 - beta1 ** (n["t"] + 1))
        mean = ahead + (1 - beta1) * g / (1 - beta1 ** n["t"])
    step = n["lr"] * mean / (spread + n["eps"])
    return [decayed - step, m, v, *largest]


def sgd(opt: SGD, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    """SGD as torch's documentation has it, leaf by leaf."""

    def move(opt: SGD, n: _Numbers, row: list[Any]) -> list[Any]:
        p, g, *buffers = row
        g = g + n["weight_decay"] * p
        first = torch.as_tensor(n["t"] == 1, device=p.device)
        later = [n["momentum"] * b + (1 - n["dampening"]) * g for b in buffers]
        buffers = [torch.where(first, g, b) for b in later]
        for b in buffers:
            g = g + n["momentum"] * b if opt.nesterov else b
        return [p - n["lr"] * g, *buffers]

    names = ("lr", "momentum", "dampening", "weight_decay")
    return _leaf_by_leaf(move, names, opt, grads, state, params)


def lion(opt: Lion, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    """Lion as optax has it, leaf by leaf."""

    def move(_opt: Lion, n: _Numbers, row: list[Any]) -> list[Any]:
        p, g, m = row
        beta1, beta2 = n["betas"]
        update = ((1 - beta1) * g + beta1 * m).sign() + n["weight_decay"] * p
        return [p - n["lr"] * update, (1 - beta2) * g + beta2 * m]

    return _leaf_by_leaf(move, ("lr", "betas", "weight_decay"), opt, grads, state, params)


def rmsprop(opt: RMSprop, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    """RMSprop as torch's documentation has it, leaf by leaf."""

    def move(opt: RMSprop, n: _Numbers, row: list[Any]) -> list[Any]:
        p, g, v, *slots = row
        g = g + n["weight_decay"] * p
        v = n["alpha"] * v + (1 - n["alpha"]) * g * g
        means = [n["alpha"] * slots.pop() + (1 - n["alpha"]) * g] if opt.centered else []
        spread = (v - means[0] * means[0]).clamp(min=0) if means else v
        step = g / (spread.sqrt() + n["eps"])
        buffers = [n["momentum"] * b + step for b in slots]
        return [p - n["lr"] * (buffers[0] if buffers else step), v, *buffers, *means]

    names = ("lr", "alpha", "eps", "weight_decay", "momentum")
    return _leaf_by_leaf(move, names, opt, grads, state, params)


def adagrad(opt: Adagrad, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    """Adagrad as torch's documentation has it, leaf by leaf."""

    def move(_opt: Adagrad, n: _Numbers, row: list[Any]) -> list[Any]:
        p, g, total = row
        g = g + n["weight_decay"] * p
        total = total + g * g
        rate = n["lr"] / (1 + (n["t"] - 1) * n["lr_decay"])
        return [p - rate * g / (total.sqrt() + n["eps"]), total]

    names = ("lr", "lr_decay", "eps", "weight_decay")
    return _leaf_by_leaf(move, names, opt, grads, state, params)


def nadam(opt: NAdam, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    """NAdam as torch's documentation has it, leaf by leaf."""

    def move(opt: NAdam, n: _Numbers, row: list[Any]) -> list[Any]:
        p, g, m, v = row
        (beta1, beta2), count = n["betas"], int(n["t"])
        if opt.decoupled_weight_decay:
            p = p - n["lr"] * n["weight_decay"] * p
        else:
            g = g + n["weight_decay"] * p
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        mus = [beta1 * (1 - 0.96 ** (i * n["momentum_decay"]) / 2) for i in range(1, count + 2)]
        by_grad = (1 - mus[-2]) / (1 - math.prod(mus[:-1]))
        by_mean = mus[-1] / (1 - math.prod(mus))
        spread = (v / (1 - beta2 ** n["t"])).sqrt() + n["eps"]
        return [p - n["lr"] * (by_grad * g + by_mean * m) / spread, m, v]

    return _leaf_by_leaf(move, (*_ADAM, "momentum_decay"), opt, grads, state, params)


def radam(opt: RAdam, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    """RAdam as torch's documentation has it, leaf by leaf."""

    def move(opt: RAdam, n: _Numbers, row: list[Any]) -> list[Any]:
        p, g, m, v = row
        (beta1, beta2), t = n["betas"], n["t"]
        if opt.decoupled_weight_decay:
            p = p - n["lr"] * n["weight_decay"] * p
        else:
            g = g + n["weight_decay"] * p
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        step, rho_inf = n["lr"] * m / (1 - beta1**t), 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        if rho > 5:
            squared = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
            step = step * squared**0.5 * (1 - beta2**t) ** 0.5 / (v.sqrt() + n["eps"])
        return [p - step, m, v]

    return _leaf_by_leaf(move, _ADAM, opt, grads, state, params)


def adafactor(opt: Adafactor, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    """Adafactor as torch's documentation has it, leaf by leaf."""

    def move(_opt: Adafactor, n: _Numbers, row: list[Any]) -> list[Any]:
        p, g, r, c, v = row
        eps1, eps2 = n["eps"]
        least = torch.finfo(p.dtype).eps if eps1 is None else eps1
        beta2 = 1 - n["t"] ** n["beta2_decay"]
        alpha = max(eps2, _size(p)) * min(n["lr"], n["t"] ** -0.5)
        if p.ndim > 1:
            rows, columns = p.shape[-2:]
            r = beta2 * r + (1 - beta2) * (g * g).sum(-1, keepdim=True) / max(columns, 1)
            c = beta2 * c + (1 - beta2) * (g * g).sum(-2, keepdim=True) / max(rows, 1)
            spread = r @ c / (r.sum(-2, keepdim=True) / max(rows, 1)).clamp(min=least)
        else:
            v = beta2 * v + (1 - beta2) * g * g
            spread = v
        u = g / spread.sqrt().clamp(min=least)
        step = alpha * u / max(1, _size(u) / n["d"])
        return [p - n["lr"] * n["weight_decay"] * p - step, r, c, v]

    names = ("lr", "beta2_decay", "eps", "d", "weight_decay")
    return _leaf_by_leaf(move, names, opt, grads, state, params)


def _size(leaf: Any) -> Any:
    """The root mean square of a leaf."""
    return (leaf.norm() / max(leaf.numel(), 1) ** 0.5).item()


def _leaf_by_leaf(
    move: _Move, names: Sequence[str], opt: Any, grads: Tree, state: Any, params: Tree
) -> tuple[Tree, Any]:
    """Take a step of each leaf that has a gradient.

    `move(opt, numbers, [param, grad, *slots])` returns the parameter and the slots after one step.
    The numbers are the optimizer's fields of these names, and `t`, the count of updates with this
    one. The state is a count, the slots, `()` where one is not kept, and perhaps a key of random
    bits, by which nothing is rounded in float64.
    """
    leaves, structure = pytree.flatten(params)

    def column(tree: Tree, root: str) -> list[Any]:
        return pytree.pair(tree, root, structure).leaves

    slots = {
        name: tree
        for name, tree in state._asdict().items()
        if name not in ("step", "key")
        and not (isinstance(tree, tuple) and tree == () and params != ())
    }
    counts = column(state.step, "step") if opt.step_per_leaf else [state.step] * len(leaves)
    columns = [leaves, column(grads, "grads"), *(column(slots[name], name) for name in slots)]
    rows = [_one(move, names, opt, list(row)) for row in zip(counts, *columns, strict=True)]
    news = [pytree.unflatten(structure, [row[i] for row in rows]) for i in range(2 + len(slots))]
    count, new_params, *new_slots = news
    step = count if opt.step_per_leaf else state.step + 1
    return new_params, state._replace(step=step, **dict(zip(slots, new_slots, strict=True)))


def _one(move: _Move, names: Sequence[str], opt: Any, row: list[Any]) -> list[Any]:
    t, p, g, *slots = row
    if g is None:
        return [t, p, *slots]
    if p.is_complex():
        pairs = [torch.view_as_real(x.resolve_conj()) for x in (p, g, *slots)]
        t, *moved = _one(move, names, opt, [t, *pairs])
        return [t, *map(torch.view_as_complex, moved)]
    numbers = {name: _at(getattr(opt, name), t) for name in names}
    return [t + 1, *move(opt, {**numbers, "t": t + 1}, [p, -g if opt.maximize else g, *slots])]


def _at(given: Any, count: Any) -> Any:
    """Return what a number is after so many updates, or each of a pair of numbers."""
    if isinstance(given, tuple):
        return tuple(_at(own, count) for own in given)
    return given(count) if callable(given) else given


for _kind, _oracle in (
    (AdamW, adamw),
    (Adam, adam),
    (SGD, sgd),
    (Lion, lion),
    (RAdam, radam),
    (NAdam, nadam),
    (Adagrad, adagrad),
    (Adafactor, adafactor),
    (RMSprop, rmsprop),
):
    register(_kind, _oracle)
