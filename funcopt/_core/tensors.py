"""How tensors are computed with, for optimizers and wrappers alike.

In which dtype, by which operators, on how many threads, in what memory, and whether autograd
records it. The `_foreach_` functions are private in name only: torch documents them as the building
blocks of its own optimizers. A torch that lacked one would be served tensor by tensor, with the
same bits.
"""

from __future__ import annotations

import ctypes
import mmap
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import ParamSpec, TypeVar, overload

import torch
from torch import Tensor
from torch.autograd.graph import Node

from . import transforms
from .types import Number

vector_norm: Callable[..., Tensor] = torch.linalg.vector_norm

_HAS_FOREACH = all(
    hasattr(torch, f"_foreach_{name}") for name in ("add", "add_", "lerp", "lerp_", "mul", "norm")
)


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether numbers have 16 bits, so that a small step may be rounded away."""
    return dtype in (torch.float16, torch.bfloat16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: 16-bit leaves are stored in 16 bits and computed in 32.

    In float16 itself, an eps of 1e-8 is zero, and a zero gradient makes 0 / 0.
    """
    return torch.float32 if is_narrow(dtype) else dtype


def double(number: Number) -> Number:
    """Return a number in float64, as Python's are: `1 - beta**t` loses its digits in less."""
    return number.double() if isinstance(number, Tensor) else number


@overload
def fit(number: Tensor, leaf: Tensor) -> Tensor: ...
@overload
def fit(number: Number, leaf: Tensor) -> Number: ...
def fit(number: Number, leaf: Tensor) -> Number:
    """Return a number so that it combines with a leaf: in its dtype, on its device, aligned.

    A number of shape (B,) meets a leaf of shape (B, ...) at the front, where broadcasting would
    meet it at the back. For a complex leaf it has the dtype of the real part.
    """
    if not isinstance(number, Tensor):
        return number
    dtype = leaf.real.dtype if leaf.is_complex() else leaf.dtype
    number = number.to(device=leaf.device, dtype=dtype)
    if number.ndim == 0:
        return number
    return number.reshape(number.shape + (1,) * (leaf.ndim - number.ndim))


def view_as_real(tensor: Tensor) -> Tensor:
    """View a complex tensor as pairs of real ones, which is how elementwise optimizers treat it."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def view_as_complex_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Undo `view_as_real`, for a tensor that came of `like`."""
    return torch.view_as_complex(tensor) if like.is_complex() else tensor


def write(old: Tensor, new: Tensor) -> None:
    """Write a tensor's new value into it."""
    if transforms.tracing():
        # Compiled by torch 2.13, `copy_` is silently dropped for a float64 tensor of shape (),
        # which is what a count of updates is. Writing through a view is not.
        old[...] = new
    else:
        old.copy_(new)


def norms(tensors: Sequence[Tensor], order: float) -> list[Tensor]:
    """Return the norm of each tensor, of 16-bit ones in float32. None is empty."""
    if _alike_on_a_device(tensors) and use_foreach(tensors):
        own = tensors[0].dtype
        wider = {"dtype": compute_dtype(own)} if is_narrow(own) else {}
        return list(torch._foreach_norm(list(tensors), order, **wider))
    wide = list(map(_wide, tensors))
    if wide and use_foreach(wide):
        return list(torch._foreach_norm(wide, order))
    return [
        differentiable_norm(tensor, order)
        if tensor.requires_grad or transforms.transformed()
        else vector_norm(tensor, order)
        for tensor in wide
    ]


def _alike_on_a_device(tensors: Sequence[Tensor]) -> bool:
    """Whether one call for a list computes all in one pass: of one dtype, and not on the CPU."""
    return (
        len(tensors) > 0
        and not transforms.on_host(tensors[0])
        and len({tensor.dtype for tensor in tensors}) == 1
    )


def differentiable_norm(
    tensor: Tensor, order: float, dims: tuple[int, ...] | None = None
) -> Tensor:
    """Return a norm whose derivatives of every order are 0 where the norm is 0.

    Those of `torch.linalg.vector_norm` are 0 / 0 there. It sets the first one to 0, but the second
    one is NaN. Dimensions that are given are kept with size 1; over all of them, none is kept.
    """
    is_zero = tensor == 0
    zero = is_zero.all() if dims is None else is_zero.all(dims, keepdim=True)
    filled = tensor.masked_fill(zero, 1.0)
    return vector_norm(filled, order, dims, keepdim=dims is not None).masked_fill(zero, 0.0)


@overload
def choose(condition: bool | Tensor, yes: Tensor, no: Tensor) -> Tensor: ...
@overload
def choose(condition: bool | Tensor, yes: Number, no: Number) -> Number: ...
def choose(condition: bool | Tensor, yes: Number, no: Number) -> Number:
    """Return one or the other; element by element, where the condition is a tensor."""
    if not isinstance(condition, Tensor):
        return yes if condition else no
    if not isinstance(yes, Tensor):  # of two numbers, where makes a float32
        yes = torch.full((), yes, dtype=torch.float64, device=condition.device)
    return torch.where(condition, yes, no)


def scaled(tensors: Sequence[Tensor], scale: Number) -> list[Tensor]:
    """Return tensors times a number (if a tensor, of shape ()), each in its own dtype."""
    results = list(tensors)
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(index)
    for indices in by_kind.values():
        wide = [_wide(tensors[index]) for index in indices]
        own = fit(scale, wide[0])
        numbers = [scale] if isinstance(scale, Tensor) else []
        if use_foreach([*(tensors[index] for index in indices), *numbers]):
            products = list(torch._foreach_mul(wide, own))
        else:
            products = [tensor * own for tensor in wide]
        for index, product in zip(indices, products, strict=True):
            results[index] = product.to(tensors[index].dtype)
    return results


def add(tensors: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """Return sums, in the dtypes of the first."""
    if tensors and use_foreach([*tensors, *others]):
        return list(torch._foreach_add(tensors, others))
    return [tensor + other for tensor, other in zip(tensors, others, strict=True)]


def add_(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Add to tensors in place."""
    if tensors and use_foreach([*tensors, *others]):
        torch._foreach_add_(tensors, others)
        return
    for tensor, other in zip(tensors, others, strict=True):
        tensor.add_(other)


def lerp(starts: list[Tensor], ends: list[Tensor], weight: Number) -> list[Tensor]:
    """Return start + weight * (end - start) of each pair, in the dtypes of the starts.

    The numbers are those of `torch.lerp`: at a weight of 1, each is the end itself.
    """
    weights = _weights(starts, ends, weight)
    if weights is None:
        return [_lerp_pair(*pair, weight) for pair in zip(starts, ends, strict=True)]
    alike = [end.to(start.dtype) for start, end in zip(starts, ends, strict=True)]
    return list(torch._foreach_lerp(starts, alike, weights))


def lerp_(starts: list[Tensor], ends: list[Tensor], weight: Number) -> None:
    """Do the same, written into the starts."""
    weights = _weights(starts, ends, weight)
    if weights is None or any(map(Tensor.is_neg, starts)):  # which no list that is written may have
        for start, end in zip(starts, ends, strict=True):
            write(start, _lerp_pair(start, end, weight))
    elif list(map(_dtype, starts)) == list(map(_dtype, ends)):
        torch._foreach_lerp_(starts, ends, weights)
    else:
        # One by one, so that only one end at a time is copied into another dtype.
        for start, end in zip(starts, ends, strict=True):
            start.lerp_(end.to(start.dtype), weight)


def _weights(
    starts: list[Tensor], ends: list[Tensor], weight: Number
) -> float | list[Tensor] | None:
    """Return what one call for all pairs takes for a weight; None if there is no such call."""
    if not _use_foreach_lerp(starts, ends):
        return None
    if not isinstance(weight, Tensor):
        return weight
    # One on a device, which is not to be read, has to be given once for each pair.
    dtype = starts[0].dtype
    serves = _alike_on_a_device(starts) and not is_narrow(dtype) and use_foreach([weight])
    if not serves or any(start.device != weight.device for start in starts):
        return None
    return [weight.to(dtype)] * len(starts)


def _lerp_pair(start: Tensor, end: Tensor, weight: Number) -> Tensor:
    """Return that of one pair: in float32 if in 16 bits, of its two parts if complex."""
    wide = compute_dtype(start.dtype)
    origin, goal = view_as_real(start.to(wide)), view_as_real(end.to(wide))
    own = weight.to(origin) if isinstance(weight, Tensor) else weight
    return view_as_complex_like(torch.lerp(origin, goal, own), start).to(start.dtype)


def _use_foreach_lerp(starts: list[Tensor], ends: list[Tensor]) -> bool:
    tensors = [*starts, *ends]
    return len(starts) > 0 and not any(map(Tensor.is_complex, tensors)) and use_foreach(tensors)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32) if is_narrow(tensor.dtype) else tensor


_requires_grad, _dtype = map(operator.attrgetter, ("requires_grad", "dtype"))


def use_foreach(tensors: Sequence[Tensor]) -> bool:
    """Whether one call for a list will do, since nobody sees each operator."""
    return (
        _HAS_FOREACH
        and not transforms.observed()
        and not transforms.watched(tensors)
        and transforms.all_plain(tensors)
        and not (torch.is_grad_enabled() and any(map(_requires_grad, tensors)))
    )


# The size from which on malloc always maps a block by itself, whatever it has learnt.
_MAPPED = 32 << 20

_CLONE_ALL: Callable[..., list[Tensor]] | None = getattr(torch, "_foreach_clone", None)


def is_mapped(tensor: Tensor) -> bool:
    """Whether fresh memory of this size comes from the system, and costs what that costs."""
    return tensor.nbytes >= _MAPPED and tensor.device.type == "cpu"


def copies_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of tensors, in the same layout."""
    if _CLONE_ALL is not None and _alike_on_a_device(tensors):
        return list(_CLONE_ALL(list(tensors)))
    return [copy_of(tensor) if is_mapped(tensor) else tensor.clone() for tensor in tensors]


def copy_of(tensor: Tensor) -> Tensor:
    """Return a copy of a large tensor, in the same layout."""
    return with_large_pages(torch.empty_like(tensor)).copy_(tensor)


def with_large_pages(fresh: Tensor) -> Tensor:
    """Ask the system to back the fresh memory of a large tensor by large pages, and return it."""
    advise = _advise() if is_mapped(fresh) else None
    if advise is not None:
        page = mmap.PAGESIZE
        start = -(-fresh.data_ptr() // page) * page
        end = (fresh.data_ptr() + fresh.nbytes) // page * page
        advise(start, end - start, mmap.MADV_HUGEPAGE)
    return fresh


@cache
def _advise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        madvise = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):  # pragma: no cover
        return None
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise


P = ParamSpec("P")
R = TypeVar("R")


def on_one_thread(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function whose operators start no other threads.

    No context manager: in one that is written in Python, an interrupt (Ctrl-C) may come when it has
    changed the number and nobody knows of it yet. Here it finds itself within the `try`.
    """
    set_count, count = _setter(), torch.get_num_threads()
    if set_count is None:
        return function(*args, **kwargs)
    try:
        set_count(1)
        return function(*args, **kwargs)
    finally:
        set_count(count)


@cache
def _setter() -> Callable[[int], object] | None:
    """Find `omp_set_num_threads` of the runtime that torch itself listens to."""
    try:
        set_count: Callable[[int], object] = ctypes.PyDLL(None).omp_set_num_threads
    except (AttributeError, OSError, TypeError):  # pragma: no cover
        return None
    count = torch.get_num_threads()
    try:
        set_count(count + 1)
        heard = torch.get_num_threads() == count + 1
    finally:
        set_count(count)
    return set_count if heard else None


def recording(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    others: Iterable[object],
    differentiable: bool | None,
) -> AbstractContextManager[object]:
    """Turn gradient recording off unless plain autograd is to record this step.

    Under a transform of `torch.func` nothing is turned off: `grad` and its kin always see the step,
    and what plain autograd records beneath a vmap is decided where vmap's rule gets to the tensors.

    The others are whatever else goes into the step: moments and numbers. `differentiable` is what
    the user said: yes, no, or None for what the inputs say.
    """
    if transforms.transformed() or not torch.is_grad_enabled():
        return nullcontext()
    if differentiable is None:
        differentiable = any(
            isinstance(other, Tensor) and other.requires_grad for other in others
        ) or _from_elsewhere(grads, params)
    return torch.set_grad_enabled(differentiable)


def _from_elsewhere(grads: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
    """Whether the gradients depend on anything that requires a gradient, besides the parameters.

    Parameters that merely require a gradient must not count, or the loop that everyone writes would
    grow a graph without end. They also give their gradients a history (`torch.func.grad` at an
    `nn.Parameter` does), so a history that leads back to these very parameters and nowhere else
    does not count either.
    """
    if not any(grad.requires_grad for grad in grads):
        return False
    if transforms.tracing():  # no graph to walk: go by the parameters alone
        return not any(param.requires_grad and param.is_leaf for param in params)
    own = {id(_origin(param)) for param in params}
    pending: list[Node] = []
    for grad in grads:
        if grad.grad_fn is not None:
            pending.append(grad.grad_fn)
        elif grad.requires_grad and id(grad) not in own:
            return True
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if (leaf := _leaf_of(node)) is not None and id(leaf) not in own:
            return True
        pending.extend(following for following, _ in node.next_functions if following is not None)
    return False


def _origin(param: Tensor) -> Tensor:
    """The leaf of which a parameter is a view: vmap's rule sees views of what the user gave."""
    node = param.grad_fn if param._is_view() else None
    while node is not None:
        if (leaf := _leaf_of(node)) is not None:
            return leaf
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    return param


def _leaf_of(node: Node) -> Tensor | None:
    """The leaf whose gradient is accumulated at this node, where its graph ends."""
    return getattr(node, "variable", None)
