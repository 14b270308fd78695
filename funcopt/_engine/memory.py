"""What a step needs to know of its leaves, and the memory that kernels work in.

A training loop makes the same step thousands of times, on other numbers in tensors that look as
they did before. Asking thousands of tensors for their types, shapes, dtypes and strides one by one
costs more than a step of small ones. So what was found is remembered beside a guard, a list of what
the tensors looked like, which torch compares with other tensors in one call. No tensor is kept
alive by it but results that are used again, and nothing in memory is believed: where tensors start
is asked each time.

Kernels want the tensors of a leaf laid out alike and densely. Whatever is laid out otherwise is
copied into the parameter's layout, so that any strides are served and none slows down the others.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import transforms
from .._core.tensors import scaled, write
from .._core.types import Number
from .rule import StepInputs, StepOutputs


def results(inputs: StepInputs, layout: Layout) -> StepOutputs:
    """Return tensors that the results of a step on just tensors may be written into."""
    return _results(inputs, layout, columns_share=True)


def results_apart(inputs: StepInputs, layout: Layout) -> StepOutputs:
    """Return them so that parameters and slots share no storage.

    Of a step that is recorded, a derivative keeps some columns, and would keep the others, too.
    """
    return _results(inputs, layout, columns_share=False)


def _results(inputs: StepInputs, layout: Layout, *, columns_share: bool) -> StepOutputs:
    key = "results", columns_share
    made = layout.plans.get(key)
    if made is None:
        from .results import Results  # noqa: PLC0415  # which nobody needs who writes in place

        made = Results(inputs.params, inputs.slots, columns_share=columns_share)
        layout.plans[key] = made
    outputs: StepOutputs = made.make()
    return outputs


def copy_into(outputs: StepOutputs, inputs: StepInputs) -> None:
    """Copy what a step in place is to write into tensors of the same layout."""
    for new, old in zip(outputs.columns, inputs.targets.columns, strict=True):
        _copy_all(new, old)


def _copy_each(news: list[Tensor], olds: list[Tensor]) -> None:
    for new, old in zip(news, olds, strict=True):
        new.copy_(old)


# One call for a list, where torch has it.
_copy_all: Callable[[list[Tensor], list[Tensor]], object] = getattr(
    torch, "_foreach_copy_", _copy_each
)


def clones(inputs: StepInputs) -> StepInputs:
    """Return leaves of whatever class, copied, beside gradients as they are."""
    return StepInputs(
        [param.clone() for param in inputs.params],
        inputs.grads,
        tuple([tensor.clone() for tensor in column] for column in inputs.slots),
        inputs.ids,
    )


def scaled_pieces(inputs: StepInputs, grad_scale: Number) -> Iterator[StepInputs]:
    """Yield leaves of one dtype and device piece by piece, with gradients times a number.

    The pieces are parts of the leaves, a large one in many, to be moved before the next is asked
    for: products are made where the last ones were, so that they never leave the cache. None but a
    leaf's last ends within a vector, so a kernel moves the pieces as it does the whole, to the bit.
    The gradients themselves are not written, as torch's fused kernel would that scales by itself.
    """
    if inputs.params[0].is_meta:
        yield inputs  # which have no values, so that nothing is made of them
        return
    if not inputs.params[0].is_cpu:
        yield inputs._replace(grads=scaled(inputs.grads, grad_scale))
        return
    whole = []
    products: Tensor | None = None
    for index, param in enumerate(inputs.params):
        tensors = [column[index] for column in inputs.columns]
        if param.numel() <= IN_CACHE or not all(map(Tensor.is_contiguous, tensors)):
            whole.append(index)
            continue
        if products is None:
            products = torch.empty_like(param.view(-1)[:IN_CACHE])
        parts = [torch.split(tensor.view(-1), IN_CACHE) for tensor in tensors]
        for piece, grad, *slots in zip(*parts, strict=True):
            product = torch.mul(grad, grad_scale, out=products[: grad.numel()])
            yield StepInputs([piece], [product], tuple([slot] for slot in slots))
    for batch in cut(whole, inputs.params):
        piece = inputs.take(batch.indices)
        yield piece._replace(grads=scaled(piece.grads, grad_scale))


def borrow(inputs: StepInputs) -> StepInputs:
    """Return the leaves themselves, or same_layout copies of those that a kernel could not take."""
    params = [param if _is_dense(param) else param.clone() for param in inputs.params]
    others = (_map(_in_layout_of, column, params) for column in inputs.columns[1:])
    return StepInputs.of([params, *others], inputs.ids)


def give_back(borrowed: StepInputs, inputs: StepInputs) -> None:
    """Write what was computed on copies into the tensors that were copied."""
    moved = [*inputs.params, *chain(*inputs.slots)]
    if borrowed is not inputs:
        for new, old in zip([*borrowed.params, *chain(*borrowed.slots)], moved, strict=True):
            if new is not old:
                write(old, new)
    note_written(moved)


def note_written(tensors: list[Tensor]) -> None:
    """Tell autograd what a kernel has written, so that who needs the old values is refused."""
    if torch.is_inference_mode_enabled():  # where tensors have no version
        tensors = [tensor for tensor in tensors if not tensor.is_inference()]
    torch.autograd.graph.increment_version(tensors)


def any_lazy(inputs: StepInputs, layout: Layout) -> bool:
    """Whether a tensor to be written is a conjugate view, whose memory does not hold its values."""
    return not layout.ready and any(
        any(map(Tensor.is_conj, column)) for column in inputs.targets.columns
    )


def write_all(inputs: StepInputs, outputs: StepOutputs) -> None:
    """Write what came of a step into the leaves."""
    for olds, news in zip(inputs.targets.columns, outputs.columns, strict=True):
        for old, new in zip(olds, news, strict=True):
            write(old, new)


def _map(
    function: Callable[[Tensor, Tensor], Tensor], tensors: list[Tensor], params: list[Tensor]
) -> list[Tensor]:
    return [function(tensor, param) for tensor, param in zip(tensors, params, strict=True)]


def _in_layout_of(tensor: Tensor, param: Tensor) -> Tensor:
    if tensor.shape != param.shape:  # a slot of a rule that is served by its equations alone
        return tensor.clone() if tensor.is_neg() else tensor
    if tensor.stride() == param.stride() and not tensor.is_neg():
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)


def _is_dense(param: Tensor) -> bool:
    if param.is_neg():
        return False
    if param.is_contiguous():
        return True
    return param.stride() == torch.empty_like(param, device="meta").stride()


# The guard that Dynamo sets before compiled code, on types, dtypes, devices, shapes, strides,
# laziness, inference mode and requires_grad at once. It is private: without it nothing is
# remembered, and every step looks at its tensors anew.
_guard_of: Callable[..., Any] | None
try:
    from torch._C._dynamo import guards as _dynamo_guards

    _guard_of = _dynamo_guards.TensorGuards
except (ImportError, AttributeError):  # pragma: no cover
    _guard_of = None

_is_nested = operator.attrgetter("is_nested")

_REMEMBERED = 32

# Starting a team of threads costs as much as moving about this many elements.
_SMALL = 4096
# From so many on, small leaves are worth a call of their own.
_ENOUGH = 8
# So many elements of each tensor of a step stay in a core's cache between copying and moving.
IN_CACHE = 1 << 18


class Batch(NamedTuple):
    """Leaves of one device and dtype to be moved by one call of a kernel."""

    indices: list[int]
    small: bool = False  # so small that a second thread would cost more than it does

    def among(self, indices: list[int]) -> Batch:
        """Return the batch for leaves of which these were taken."""
        return self._replace(indices=[indices[index] for index in self.indices])


class Layout(NamedTuple):
    """What is the same for all leaves that look like these."""

    groups: list[list[int]]  # the leaves of each device and dtypes
    dtypes: set[tuple[torch.dtype, ...]]  # of a parameter and its slots: those that there are
    batches: list[list[Batch]]  # for each of these, how to move copies of its leaves
    batches_in_place: list[list[Batch]]  # and how to move the leaves themselves
    devices: list[torch.device]  # where leaves are
    plans: dict[Any, Any]  # what was decided before: by rule, kernel and whether in place; and
    # where results go
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
    return known_flat(list(chain(*inputs.columns)), tuple(map(len, inputs.columns)))


def known_flat(tensors: list[Tensor], lengths: tuple[int, ...]) -> Layout | None:
    """Return it for columns of these lengths, one after another."""
    global _recent  # noqa: PLW0603  # replaced whole, so that threads need no lock
    recent = _recent
    try:
        if recent and any(map(_is_nested, tensors)):  # to compare one ends the process
            return None
    except AttributeError:  # which is no tensor
        return None
    for entry in recent:
        if entry.lengths == lengths and entry.unchanged(*tensors):
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
    # Slots of other shapes are looked at each time: who knows tensors by their looks asks for none.
    alike = all(
        one.shape == param.shape
        for column in inputs.slots
        for one, param in zip(column, inputs.params, strict=True)
    )
    unchanged = guard(list(chain(*inputs.columns))) if alike else None
    if unchanged is not None:
        entry = _Known(tuple(map(len, inputs.columns)), unchanged, layout)
        _recent = (entry, *_recent[: _REMEMBERED - 1])
    return layout


def guard(
    tensors: Sequence[Any], sizes: list[list[None]] | None = None
) -> Callable[..., bool] | None:
    """Return whether tensors look as these do, as a function of them, if it can be had.

    `sizes` has None for each dimension whose size and stride may be any.
    """
    # A guard lets nothing pass in which one tensor comes twice.
    if _guard_of is None or len(set(map(id, tensors))) < len(tensors):
        return None
    try:
        made = _guard_of(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=sizes)
    except Exception:  # whatever is private may change
        return None
    check: Callable[..., bool] = made.check
    return check


def _survey(inputs: StepInputs) -> Layout:
    params, *others = inputs.columns
    tensors = [*params, *chain(*others)]
    plain = transforms.all_plain(tensors)
    ready = all(map(_is_ready, tensors))
    by_kind: dict[tuple[torch.device, tuple[torch.dtype, ...]], list[int]] = {}
    for index, param in enumerate(params):
        kept = tuple([column[index].dtype for column in inputs.slots])
        by_kind.setdefault((param.device, (param.dtype, *kept)), []).append(index)
    groups = list(by_kind.values())
    real = not any(map(Tensor.is_complex, params))
    others_require_grad = any(map(_any_requires_grad, others))
    inferred = any(map(Tensor.is_inference, tensors))
    writable = plain and ready and not inferred and not others_require_grad
    return Layout(
        groups=groups,
        dtypes={dtypes for _, dtypes in by_kind},
        batches=[_batches(group, params) for group in groups],
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


def _batches(group: list[int], params: Sequence[Tensor]) -> list[Batch]:
    found = _batches_in_place(group, params)
    if params[group[0]].device.type != "cpu":
        return found
    return [
        part for batch in found for part in ([batch] if batch.small else cut(batch.indices, params))
    ]


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


def members(inputs: StepInputs, numbers: Any) -> Iterator[tuple[StepInputs, Any]]:
    """Split stacked leaves into members, each with numbers of its own."""
    values = [n.tolist() if isinstance(n, Tensor) and n.ndim > 0 else n for n in numbers]
    for member, own in _split(inputs, values):
        yield member, numbers._make(own)


def _split(inputs: StepInputs, values: list[Any]) -> Iterator[tuple[StepInputs, list[Any]]]:
    if not any(isinstance(value, list) for value in values):
        yield inputs, values
        return
    members = [[tensor.unbind(0) for tensor in column] for column in inputs.columns]
    for i in range(inputs.params[0].shape[0]):
        columns = [[slices[i] for slices in column] for column in members]
        own = StepInputs.of(columns, inputs.ids)
        # A dimension may have been left at size 1 because all share one.
        nth = [value[i % len(value)] if isinstance(value, list) else value for value in values]
        yield from _split(own, nth)
