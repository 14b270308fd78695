"""The step of a parameter list as operators, which TorchScript calls, and saves by their names.

TorchScript drops an in-place operator on a list that was made on the spot, and cannot save what
calls a Python function. Of what happens inside an operator that is declared conservative it knows
nothing, and leaves it alone. So these do all that a step does but for keeping the state, which is
what a scripted module saves.

The state of a parameter is a dict of the tensors of `AdamWState`, for this parameter alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor

from .._core import transforms
from .._engine.checks import check_leaves
from ..optimizers.adamw import AdamW, AdamWState

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")

State: TypeAlias = dict[str, Tensor]

_make_library: Any = torch.library.Library  # which torch leaves untyped
_library = _make_library("funcopt", "FRAGMENT")
_OPTIONS = "Dict(str, float) defaults, bool amsgrad, bool maximize, bool foreach, bool fused"


def _operator(name: str, arguments: str, returned: str) -> Callable[[T], T]:
    """Make a function an operator, to which TorchScript leaves all that it is given.

    Conservative means that a call may write to any tensor, so that none is dropped or moved. The
    function stands for the operator on whatever device, and deals with autograd itself.
    """

    def register_operator(function: T) -> T:
        _library.define(f"{name}({arguments}) -> {returned}", alias_analysis="CONSERVATIVE")
        _library.impl(name, function, "CompositeImplicitAutograd")
        return function

    return register_operator


@_operator("adamw_check", _OPTIONS, "()")
def _check(*options: Any) -> None:
    _optimizer(*options)


def _optimizer(
    defaults: dict[str, float], amsgrad: bool, maximize: bool, foreach: bool, fused: bool
) -> AdamW:
    if foreach and fused:
        raise ValueError("foreach=True and fused=True: one kernel makes a step. Give one of them.")
    return AdamW(
        moments=None,  # as in torch
        lr=defaults["lr"],
        betas=(defaults["beta1"], defaults["beta2"]),
        eps=defaults["eps"],
        weight_decay=defaults["weight_decay"],
        amsgrad=amsgrad,
        maximize=maximize,
        step_per_leaf=True,
        kernel="foreach" if foreach else "fused" if fused else "plain",
    )


@_operator(
    "adamw_step_",
    f"Tensor[] params, Tensor?[] gradients, Dict(str, Tensor)[] states, {_OPTIONS}",
    "Dict(str, Tensor)[]",
)
def _step_(
    params: list[Tensor], gradients: list[Tensor | None], states: list[State], *options: Any
) -> list[State]:
    """Move what has a gradient; return the states that were made for it, where there was none.

    In place, as memory is what a trainer is short of, and after all checks. The trees that make the
    step have the index of a parameter for its path, so that messages name it.
    """
    if len(gradients) != len(params):
        raise ValueError(
            f"{len(gradients)} gradients for {len(params)} parameters: give one for each, None "
            f"where there is none."
        )
    opt = _optimizer(*options)
    # A trainer's parameters require a gradient, and its gradients may have a history. Neither
    # matters here: as in torch.optim, a step is no part of what is differentiated.
    grads = {i: grad.detach() for i, grad in enumerate(gradients) if grad is not None}
    leaves = {i: params[i].detach() for i in grads}
    names = ("step", *(slot.name for slot in AdamW.rule.kept_slots(opt)))
    started = [
        {} if states[i] or i not in grads else _zeros(leaves[i], names, i)
        for i in range(len(params))
    ]
    own = {i: _complete(states[i] or started[i], names, i) for i in grads}
    columns: dict[str, Any] = {name: {i: own[i][name] for i in own} for name in names}
    columns.setdefault("max_exp_avg_sq", ())
    opt.update_(grads, AdamWState(**columns), leaves)
    return started


def _zeros(param: Tensor, names: tuple[str, ...], index: int) -> State:
    """Make the state of a parameter that never moved.

    The count is float64, as in `funcopt.AdamWState`: in float32 it would stop at 2**24. It is on
    the CPU, as in torch, where reading it is free. Tensors that are made in inference mode could
    not be written outside of it.
    """
    check_leaves([param], lambda _: f"params[{index}]")
    with transforms.outside_inference_mode():
        step = torch.zeros((), dtype=torch.float64, device="cpu")
        return {"step": step, **{name: torch.zeros_like(param) for name in names[1:]}}


def _complete(state: State, names: tuple[str, ...], index: int) -> State:
    for name in names:
        if name not in state:
            raise ValueError(
                f"The state of parameter {index} has {', '.join(state)} and no {name}: a step "
                f"needs {', '.join(names)}. Load a state that was saved with the same amsgrad."
            )
    return state


# Whose turn it is to make a step. There is one lock for all optimizers, as several may share
# parameters (each trainer has one of its own in RPC training), and as TorchScript cannot keep one
# by optimizer. What TorchScript itself would need it for is the Dict of states, in which an
# insertion moves what another thread is reading. No thread begins a step within one of its own.
_turn: Any = threading.RLock()  # which knows whose it is from the moment that it is taken


def _start_anew() -> None:
    if not _turn._is_owned():  # a step of another thread does not go on in a child
        _turn._at_fork_reinit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def exclusively(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function when no other thread makes a step."""
    if not _turn._is_owned():
        with _turn:
            return function(*args, **kwargs)
    try:  # a step that did not come to its end, while it was traced, left the turn with this thread
        return function(*args, **kwargs)
    finally:
        _turn.release()


# TorchScript has no `try`, only a `with` that begins and ends. It ends what did not come to its
# beginning, too, and drops the error that there was nothing to end.
@_operator("begin_step", "", "()")
def _begin_step() -> None:
    if not _turn._is_owned():
        _turn.acquire()


_operator("end_step", "", "()")(_turn.release)
