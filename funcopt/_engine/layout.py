"""What a step needs to know of its leaves, found once for leaves that look the same.

A training loop makes the same step thousands of times, on other numbers in tensors that look as
they did before. Asking thousands of tensors for their types, shapes, dtypes and strides one by one
costs more than moving them, if they are small. So what was found is remembered beside a guard, a
list of what the tensors looked like, which torch compares with other tensors in one call. No tensor
is kept alive by it, and nothing in memory is believed: where tensors start is asked each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import transforms
from .rule import StepInputs

__all__ = ["IN_CACHE", "Batch", "Layout", "cut", "forget", "known", "layout_of"]

# The guard that Dynamo sets before compiled code, on types, dtypes, devices, shapes, strides,
# laziness, inference mode and requires_grad at once. It is private: without it nothing is
# remembered, and every step looks at its tensors anew.
_guard_of: Callable[..., Any] | None
try:
    from torch._C._dynamo import guards as _dynamo_guards

    _guard_of = _dynamo_guards.TensorGuards
except (ImportError, AttributeError):  # pragma: no cover
    _guard_of = None

_REMEMBERED = 32

# Starting a team of threads costs as much as moving about this many elements.
_SMALL = 4096
# Kernels work on vectors, and on what remains at the end of a leaf in another way, which may round
# differently. Leaves of a multiple of this many elements have no remainder in any dtype, so packing
# them changes no bit.
_LANES = 32
# From so many on, small leaves are worth a call of their own.
_ENOUGH = 8
# So many elements of each tensor of a step stay in a core's cache between copying and moving. It is
# also the most that share a storage.
IN_CACHE = 1 << 18


class Batch(NamedTuple):
    """Leaves of one device and dtype to be moved by one call of a kernel."""

    indices: list[int]
    sizes: list[int] | None = None  # to be laid side by side as one leaf: first dimension of each
    small: bool = False  # so small that a second thread would cost more than it does

    def among(self, indices: list[int]) -> Batch:
        """Return the batch for leaves of which these were taken."""
        return self._replace(indices=[indices[index] for index in self.indices])


class Layout(NamedTuple):
    """What is the same for all leaves that look like these."""

    batches: list[list[Batch]]  # for each device and dtype, how to move copies of its leaves
    batches_in_place: list[list[Batch]]  # and how to move the leaves themselves
    devices: list[torch.device]  # where leaves are
    plans: dict[Any, Any]  # what was decided before: by rule, kernel and whether in place
    plain: bool  # no tensor is of a subclass that overrides operators
    ready: bool  # every tensor is contiguous, and no view that conjugates or negates when read
    real: bool  # none is complex
    params_require_grad: bool  # some parameter does
    others_require_grad: bool  # some gradient or slot does
    writable: bool  # nothing that is known stands against writing into the tensors
    fast_path_ok: bool  # nothing at all about them asks for more than to be moved by a kernel


class _Known(NamedTuple):
    lengths: tuple[int, ...]
    unchanged: Callable[..., bool]
    layout: Layout


_recent: tuple[_Known, ...] = ()


def known(inputs: StepInputs) -> Layout | None:
    """Return what was learned of leaves that looked the same, if that is remembered."""
    global _recent  # noqa: PLW0603  # replaced whole, so that threads need no lock
    columns = inputs.columns
    lengths = tuple(map(len, columns))
    recent = _recent
    for entry in recent:
        if entry.lengths == lengths and entry.unchanged(*chain.from_iterable(columns)):
            if entry is not recent[0]:  # so that the one in use is found first
                _recent = (entry, *(other for other in recent if other is not entry))
            return entry.layout
    return None


def forget() -> None:
    """Forget all that was learned, and what was decided from it."""
    global _recent  # noqa: PLW0603  # replaced whole, so that threads need no lock
    _recent = ()


def layout_of(inputs: StepInputs) -> Layout:
    """Return what there is to know of leaves that were checked, and remember it."""
    return known(inputs) or _learn(inputs)


def _learn(inputs: StepInputs) -> Layout:
    global _recent  # noqa: PLW0603  # replaced whole, so that threads need no lock
    layout = _survey(inputs)
    unchanged = _guard(list(chain(*inputs.columns)))
    if unchanged is not None:
        entry = _Known(tuple(map(len, inputs.columns)), unchanged, layout)
        _recent = (entry, *_recent[: _REMEMBERED - 1])
    return layout


def _guard(tensors: list[Tensor]) -> Callable[..., bool] | None:
    """Return whether tensors look as these do, as a function of them, if it can be had."""
    # A guard lets nothing pass in which one tensor comes twice.
    if _guard_of is None or len(set(map(id, tensors))) < len(tensors):
        return None
    try:
        guard = _guard_of(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except Exception:  # whatever is private may change
        return None
    check: Callable[..., bool] = guard.check
    return check


def _survey(inputs: StepInputs) -> Layout:
    params, *others = inputs.columns
    tensors = [*params, *chain(*others)]
    plain = transforms.all_plain(tensors)
    ready = all(map(_is_ready, tensors))
    by_kind: dict[object, list[int]] = {}
    for index, param in enumerate(params):
        by_kind.setdefault((param.device, param.dtype), []).append(index)
    groups = list(by_kind.values())
    real = not any(map(Tensor.is_complex, params))
    others_require_grad = any(map(_any_requires_grad, others))
    inferred = any(map(Tensor.is_inference, tensors))
    writable = plain and ready and not inferred and not others_require_grad
    return Layout(
        batches=[_batches(group, params, packing=plain and ready) for group in groups],
        batches_in_place=[_batches_in_place(group, params) for group in groups],
        devices=list({param.device for param in params}),
        plans={},
        plain=plain,
        ready=ready,
        real=real,
        params_require_grad=_any_requires_grad(params),
        others_require_grad=others_require_grad,
        writable=writable,
        fast_path_ok=writable and real,
    )


def _batches_in_place(group: list[int], params: Sequence[Tensor]) -> list[Batch]:
    small = [index for index in group if params[index].numel() <= _SMALL]
    if params[group[0]].device.type != "cpu" or len(small) < min(_ENOUGH, len(group)):
        return [Batch(group)]
    large = [index for index in group if params[index].numel() > _SMALL]
    return [batch for batch in (Batch(small, small=True), Batch(large)) if batch.indices]


def _batches(group: list[int], params: Sequence[Tensor], packing: bool) -> list[Batch]:
    if params[group[0]].device.type != "cpu":
        return [Batch(group)]
    batches = list(_packs(group, params)) if packing else []
    packed = {index for pack in batches for index in pack.indices}
    rest = [index for index in group if index not in packed]
    for batch in _batches_in_place(rest, params) if rest else []:
        batches.extend([batch] if batch.small else cut(batch.indices, params))
    return batches


def _packs(group: list[int], params: Sequence[Tensor]) -> Iterator[Batch]:
    """Find small leaves that can lie side by side, as parts of one: their trailing shape is one."""
    by_trailing: dict[object, list[int]] = {}
    for index in group:
        param = params[index]
        if param.ndim > 0 and 0 < param.numel() <= _SMALL and param.numel() % _LANES == 0:
            by_trailing.setdefault(param.shape[1:], []).append(index)
    for indices in by_trailing.values():
        for pack in cut(indices, params):
            if len(pack.indices) >= _ENOUGH:
                sizes = [params[index].shape[0] for index in pack.indices]
                yield Batch(pack.indices, sizes, small=True)


def cut(indices: list[int], params: Sequence[Tensor]) -> Iterator[Batch]:
    """Cut into batches whose copies a kernel finds in the cache, unless a leaf is larger."""
    batch, elements = [], 0
    for index in indices:
        batch.append(index)
        elements += params[index].numel()
        if elements >= IN_CACHE:
            yield Batch(batch)
            batch, elements = [], 0
    if batch:
        yield Batch(batch)


def _is_ready(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj()


def _any_requires_grad(tensors: Sequence[Any]) -> bool:
    return any(tensor.requires_grad for tensor in tensors)
