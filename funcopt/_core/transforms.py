"""Who is watching: the one place that knows torch's transforms, tracers and modes.

Each question is about this thread, since another one may be compiling, or inside a transform, at
the same time. It is asked of torch's dispatcher, which keeps its state for each thread, so that an
answer costs well under a microsecond and holds for every tensor of the step. Where torch keeps one
state for all threads, as it does of plain forward mode, the tensors of the step are asked. The
queries are private to torch, which has no public ones; all of them live here. Where torch no longer
had those of functorch's levels, the answer falls on the safe side: plain operators, which are right
everywhere and only slower.

Modes that must not reach into an update (autocast, gradients) are turned off here during a call.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from itertools import chain, repeat
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

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
        pop_dynamic_layer_stack,
        push_dynamic_layer_stack,
    )
    from torch._functorch.pyfunctorch import (
        VmapInterpreter,
        retrieve_current_functorch_interpreter,
    )

    _RULED: set[TransformType] | None = {TransformType.Vmap, TransformType.Grad}
    _ONE_VALUE = {TransformType.Grad, TransformType.Jvp}
except ImportError:  # pragma: no cover
    _RULED = None

# Whether this very Python code is being compiled. Dynamo, which reads the code, takes the answer to
# be yes; where the code runs, it is no. `is_compiling` would be a flag of the process: true in each
# thread while one of them compiles.
compiling = torch.compiler.is_dynamo_compiling

# Whether code that is being compiled is compiled for an export: a flag of the process, for want of
# one of the thread. It decides how long compiling takes, and no number.
exporting = torch.compiler.is_exporting

# Whether Dynamo is one that has to be told more, by `old_dynamo`, which nobody else needs.
OLD_DYNAMO = torch.__version__ < "2.13"
if OLD_DYNAMO:
    from . import old_dynamo

    exporting = old_dynamo.exporting


def tracing() -> bool:
    """Whether operators are being recorded: a tensor may have neither memory nor a value."""
    if compiling() or (_count_modes() > 0 and any(map(_mode_of, _TRACERS))):
        return True
    return _is_jit_tracing() or _is_included(_PRE_DISPATCH)


def observed() -> bool:
    """Whether somebody sees the operators one by one, so that no value is to be read meanwhile.

    That is a tracer, or a dispatch mode that looks on while real tensors are computed, as
    `FlopCounterMode` does. What a mode does with what it sees cannot be known, so it is shown the
    equations in plain operators.
    """
    if compiling():
        return True
    modes = _count_modes()
    if modes > 0 and modes > _onlookers.get():
        return True
    return _is_jit_tracing() or _is_included(_PRE_DISPATCH)


_count_modes = torch._C._len_torch_dispatch_stack
_cuda_is_in_use: Any = torch.cuda.is_initialized  # which torch leaves untyped


def capturing() -> bool:
    """Whether a CUDA graph is being captured on this thread's stream.

    It replays what the GPU is told, and nothing of what the host does. Where CUDA is not in use
    none is; there, torch's own question is an error if there is no driver.
    """
    return torch.cuda.is_current_stream_capturing() if _cuda_is_in_use() else False


# The modes that record, or work on stand-ins for tensors: torch has a place of its own for each.
_TRACERS = tuple(torch._C._TorchDispatchModeKey.__members__.values())
_mode_of = torch._C._get_dispatch_mode
_is_jit_tracing = torch._C._is_tracing
# Where `make_fx` or export records above autograd, which takes another stack of modes.
_is_included = torch._C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


# How many of the modes on torch's stack only look on, and are to see the operators of a real step.
_onlookers: ContextVar[int] = ContextVar("onlookers", default=0)


def find_dtensor() -> type | None:
    """Return the type of DTensors, if it was imported. A compiler may do so: it has no guard."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


find_dtensor._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler's mark


def looked_on(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function that makes steps on the meta device as on the CPU, while one mode looks on.

    The mode sees the operators of a real step, not those that a tracer is shown. That a device has
    no values to read is found out as anywhere: it is taken for one that is not to be waited for.
    """
    before = _onlookers.get()
    try:
        _onlookers.set(1)
        return function(*args, **kwargs)
    finally:
        _onlookers.set(before)


def seen_by(
    mode: TorchDispatchMode, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> R:
    """Call a function of which a mode sees the operators."""
    try:
        torch._C._push_on_torch_dispatch_stack(mode)
        return function(*args, **kwargs)
    finally:
        torch._C._pop_torch_dispatch_stack(None)


def stand_in(device: torch.device) -> torch.device:
    """Return the device whose kernels serve tensors on this one."""
    return torch.device("cpu") if device.type == "meta" and _onlookers.get() else device


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
# Whether any transform of `torch.func` is under way (vmap, grad, jvp, functionalize, ...).
transformed = torch._C._are_functorch_transforms_active


def may_be_dual() -> bool:
    """Whether any tensor can be dual: somebody is inside `forward_ad.dual_level()`.

    The level is the process's: that may be another thread, or this one for what has nothing to do
    with the step. So while there is one, the tensors are asked.
    """
    return not compiling() and forward_ad._current_level >= 0


def any_dual(*columns: Iterable[object]) -> bool:
    """Whether a tensor among these is dual: it carries a tangent of plain forward-mode autograd."""
    if not may_be_dual():
        return False
    tensors = (value for column in columns for value in column if isinstance(value, Tensor))
    return any(map(_is_dual, tensors))


def _is_dual(tensor: Tensor) -> bool:
    with torch._C._DisableFuncTorch():  # a tangent belongs to what is beneath every transform
        try:
            while _RULED is not None and is_functorch_wrapped_tensor(tensor):
                tensor = get_unwrapped(tensor)
            return _unpack_dual(tensor).tangent is not None
        except Exception:  # a subclass may not let it be asked: to follow it is right in any case
            return True


_unpack_dual: Any = forward_ad.unpack_dual  # which torch leaves untyped


def beneath(tensor: Tensor) -> Tensor | None:
    """Return the tensor that a transform has wrapped in this one, None if none has."""
    wrapped = _RULED is not None and is_functorch_wrapped_tensor(tensor)
    return get_unwrapped(tensor) if wrapped else None


def has_derivative(tensor: Tensor) -> bool:
    """Whether a derivative may be lost with a tensor, in reverse or in forward mode."""
    return tensor.requires_grad or (may_be_dual() and any_dual((tensor,)))


def followed(*columns: Iterable[object]) -> bool:
    """Whether what operators compute of these tensors may be differentiated."""
    return torch.is_grad_enabled() or transformed() or any_dual(*columns)


def watched(*columns: Iterable[object]) -> bool:
    """Whether a transform, or forward mode by way of a tensor among these, follows the step.

    It follows it for its members or its derivative.
    """
    return transformed() or (may_be_dual() and any_dual(*columns))


def readable() -> bool:
    """Whether a tensor has one value, which may be read: not recorded, nor one for each member."""
    if observed():
        return False
    if not transformed():
        return True
    if _RULED is None:  # pragma: no cover
        return False
    return all(level.key() in _ONE_VALUE for level in get_interpreter_stack() or ())


def on_host(tensor: Tensor) -> bool:
    """Whether a tensor is in the host's memory, where reading it waits for nothing."""
    return tensor.is_cpu


def needs_plain_operators(*columns: Iterable[object]) -> bool:
    """Whether the step on these tensors must be spelt out in plain operators.

    True for tracers and modes, which would see a fused call or a constant instead of equations, and
    for forward-mode derivatives and functionalize, which know no rule for a step as a whole. False
    in plain eager code and under vmap and reverse-mode grad, for which there is such a rule.
    """
    if observed() or any_dual(*columns):
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


def in_vmaps_alone() -> bool:
    """Whether vmaps are under way, and nothing but vmaps.

    Those may be stepped beneath by hand: what follows sees the stacked tensors. Above or beneath a
    grad, order matters, which the rules of an `autograd.Function` know; they take several times
    longer.
    """
    levels = get_interpreter_stack() if _RULED is not None else None
    return bool(levels) and all(level.key() == TransformType.Vmap for level in levels or ())


def beneath_vmap(function: Callable[[Members], R]) -> R:
    """Call a function beneath the innermost vmap, with its members, where `in_vmaps_alone`."""
    interpreter: Any = retrieve_current_functorch_interpreter()
    members = Members(interpreter)
    layers: list[Any] = []
    try:
        # In one call of C: no interrupt comes between the layer and the list that remembers it.
        layers.extend(map(operator.call, (pop_dynamic_layer_stack,)))
        return function(members)
    finally:
        if layers:
            push_dynamic_layer_stack(layers[0])


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
    values = values if isinstance(values, list) else [values]
    while values and isinstance(values[0], list):
        values = list(chain.from_iterable(values))
    return values


def all_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors are just tensors: no fake, sharded or otherwise overriding subclass."""
    return _PLAIN.issuperset(map(type, tensors))


# Functions in C, so that an interrupt (Ctrl-C) comes before or after, and finds them done or not.
# Torch's context managers are written in Python: one that is interrupted leaves what it changed.
set_grad_enabled = torch._C._set_grad_enabled
outside_inference_mode = functools.partial(torch._C._InferenceMode, False)


def without_gradients(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function under `no_grad`, to enter which takes longer than to move a small leaf."""
    enabled = torch.is_grad_enabled()
    try:
        set_grad_enabled(False)
        return function(*args, **kwargs)
    finally:
        set_grad_enabled(enabled)


def restoring(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function leave the thread's gradient mode as it was, also where it is interrupted."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if compiling():
            return function(*args, **kwargs)
        enabled = torch.is_grad_enabled()
        try:
            return function(*args, **kwargs)
        except BaseException:
            set_grad_enabled(enabled)
            raise

    return call


def uncompiled(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function outside of the graph that is being compiled, which breaks there."""
    from .uncompiled import call  # noqa: PLC0415  # with which comes the compiler, a second's worth

    result: R = call(function, *args, **kwargs)
    return result


_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla")

# Whether operators cast what they are given, on any device, in this thread. One private question
# takes a tenth of a microsecond, the public one for each device a whole one.
autocasting: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", None) or (
    lambda: any(map(torch.is_autocast_enabled, _AUTOCAST_DEVICES))
)


def without_autocast(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function with autocast turned off, on whatever devices it is on.

    Autocast is for a loss. Operators such as `torch.cat` cast under it, or refuse a 16-bit dtype
    that is not its own, where an update has to keep the dtypes of its leaves.
    """
    devices = [device for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]
    if devices and tracing():  # by who knows the context manager
        with torch.autocast(devices[0], enabled=False):
            return without_autocast(function, *args, **kwargs)
    put_back = map(torch.set_autocast_enabled, devices, repeat(True))
    try:
        for device in devices:
            torch.set_autocast_enabled(device, False)
        return function(*args, **kwargs)
    finally:
        deque(put_back, 0)  # all in one call of C, which no interrupt divides


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function be called with autocast turned off, whether or not it is on."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if autocasting():
            return without_autocast(function, *args, **kwargs)
        return function(*args, **kwargs)

    return call
