"""Who is watching: the one place that knows torch's transforms, tracers and modes.

Each question is asked of torch's dispatcher as a whole, never of a tensor, so the answers cost well
under a microsecond and hold for every tensor of the step. The queries are private to torch, which
has no public ones; all of them live here. Where torch no longer had those of functorch's levels,
the answer falls on the safe side: plain operators, which are right everywhere and only slower.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "Members",
    "all_plain",
    "beneath_vmap",
    "compiling",
    "exporting",
    "followed",
    "forward_mode",
    "looked_on",
    "readable",
    "stand_in",
    "tracing",
    "transformed",
    "uncompiled",
    "values_at_hand",
    "watched",
    "watched_by_operator",
]

P = ParamSpec("P")
R = TypeVar("R")

try:
    from torch._C._functorch import (
        TransformType,
        _add_batch_dim,
        _unwrap_batched,
        get_interpreter_stack,
        get_unwrapped,
        is_functionaltensor,
        is_functorch_wrapped_tensor,
    )
    from torch._functorch.pyfunctorch import (
        VmapInterpreter,
        retrieve_current_functorch_interpreter,
    )

    _RULED: set[TransformType] | None = {TransformType.Vmap, TransformType.Grad}
    _ONE_VALUE = {TransformType.Grad, TransformType.Jvp}
except ImportError:  # pragma: no cover
    _RULED = None


# Whether this very Python code is being compiled or exported.
compiling = torch.compiler.is_compiling

# Whether it is being compiled for an export.
exporting = torch.compiler.is_exporting


def tracing() -> bool:
    """Whether operators are being recorded, so that no tensor's value may be read."""
    if compiling():
        return True
    modes = torch._C._len_torch_dispatch_stack()
    return (modes > 0 and modes > _onlookers.get()) or torch._C._get_tracing_state() is not None


# How many of the modes on torch's stack only look on.
_onlookers: ContextVar[int] = ContextVar("onlookers", default=0)


@contextlib.contextmanager
def looked_on() -> Iterator[None]:
    """Let steps on the meta device be made as on the CPU, while one mode looks on.

    The mode sees the operators of a real step, not those that a tracer is shown. That a device has
    no values to read is found out as anywhere: it is taken for one that is not to be waited for.
    """
    token = _onlookers.set(1)
    try:
        yield
    finally:
        _onlookers.reset(token)


def stand_in(device: torch.device) -> torch.device:
    """Return the device whose kernels serve tensors on this one."""
    return torch.device("cpu") if device.type == "meta" and _onlookers.get() else device


def uncompiled(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function outside of the graph that is being compiled, which breaks there."""
    result: R = _uncompiled(function, *args, **kwargs)
    return result


_disable: Any = torch.compiler.disable  # which torch leaves untyped
_uncompiled = _disable(
    lambda function, *args, **kwargs: function(*args, **kwargs),
    reason="An update of many leaves takes longer to compile than it gains, since its kernels are "
    "compiled already; one of DTensors, or one that sends something, cannot be compiled. Compile "
    "without fullgraph=True, or leave the update outside.",
)


# Whether any transform of `torch.func` is under way (vmap, grad, jvp, functionalize, ...).
transformed = torch._C._are_functorch_transforms_active


def forward_mode() -> bool:
    """Whether a forward-mode derivative is under way, in `torch.func` or in plain autograd."""
    return forward_ad._current_level >= 0


def followed() -> bool:
    """Whether what operators compute may be differentiated."""
    return torch.is_grad_enabled() or transformed() or forward_mode()


def watched() -> bool:
    """Whether a transform or forward mode follows the step, for its members or its derivative."""
    return transformed() or forward_mode()


def readable() -> bool:
    """Whether a tensor has one value, which may be read: not recorded, nor one for each member."""
    if tracing():
        return False
    if not transformed():
        return True
    if _RULED is None:  # pragma: no cover
        return False
    return all(level.key() in _ONE_VALUE for level in get_interpreter_stack() or ())


def watched_by_operator() -> bool:
    """Whether the step must be spelt out in plain operators.

    True for tracers, which would record a fused call or a constant in place of the equations, and
    for forward-mode derivatives and functionalize, which know no rule for a step as a whole. False
    in plain eager code and under vmap and reverse-mode grad, for which there is such a rule.
    """
    if tracing() or forward_mode():
        return True
    if not transformed():
        return False
    if _RULED is None:  # pragma: no cover
        return True
    return any(level.key() not in _RULED for level in get_interpreter_stack() or ())


class Members:
    """The members of one vmap: how they lie in a tensor that is mapped over, and in a result."""

    def __init__(self, interpreter: VmapInterpreter) -> None:
        """Note how many members there are, and at which level of nesting."""
        self.size = interpreter.batch_size()
        self._level = interpreter.level()

    def unwrap(self, operand: Any) -> tuple[Any, int | None]:
        """Return what is beneath an operand and its dimension of members, None if it has none."""
        if not isinstance(operand, Tensor):
            return operand, None
        return _unwrap_batched(operand, self._level)

    def wrap(self, result: Tensor) -> Tensor:
        """Return the tensor that stands for each member of a result, stacked in front."""
        return _add_batch_dim(result, 0, self._level)


@contextlib.contextmanager
def beneath_vmap() -> Iterator[Members | None]:
    """Step beneath the innermost vmap, if nothing but vmaps is under way; else give None.

    A vmap alone may be stepped beneath by hand: what follows sees the stacked tensors. Above or
    beneath a grad, order matters, which the rules of an `autograd.Function` know; they take several
    times longer.
    """
    levels = get_interpreter_stack() if _RULED is not None else None
    if not levels or any(level.key() != TransformType.Vmap for level in levels):
        yield None
        return
    interpreter: Any = retrieve_current_functorch_interpreter()
    members = Members(interpreter)
    with interpreter.lower():
        yield members


def values_at_hand(tensor: Tensor) -> list[float] | None:
    """Return all values of a tensor, if they can be read now and without waiting; else None.

    Of a tensor that is mapped over by vmap these are the values of all members. What is read here
    is for checks alone: no derivative and no member is told of it.
    """
    if tracing():
        return None
    if transformed():
        if _RULED is None:  # pragma: no cover
            return None
        while is_functorch_wrapped_tensor(tensor):
            if is_functionaltensor(tensor):  # its value may be another one by now
                return None
            tensor = get_unwrapped(tensor)
    if not tensor.is_cpu or type(tensor) not in _PLAIN:
        return None
    values = tensor.tolist()
    return _flat(values) if isinstance(values, list) else [values]


def _flat(values: list[Any]) -> list[float]:
    if not values or not isinstance(values[0], list):
        return values
    return [value for part in values for value in _flat(part)]


def all_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors are just tensors: no fake, sharded or otherwise overriding subclass."""
    return _PLAIN.issuperset(map(type, tensors))


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
