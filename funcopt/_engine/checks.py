"""The checks before a step: what may be a leaf, what must agree, and what may be written in place.

Messages name the path. Everything is refused before anything is written.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set, ValuesView
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from .._core import transforms
from .._core.types import Number, is_dense, kind_of, shown, shown_layout
from .rule import StepInputs, UpdateRule, is_read

_DTYPES = frozenset(
    (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    )
)


def check_state(state: object, kind: type) -> None:
    """Refuse what is not the state of this optimizer, as where arguments are in another order."""
    if not isinstance(state, kind):
        raise TypeError(
            f"state is of type {type(state).__name__}: it must be the {kind.__name__} that init() "
            f"or the last update returned. The order is update(grads, state, params)."
        )


def is_like(
    value: object, shape: torch.Size, dtype: torch.dtype, device: torch.device | None = None
) -> bool:
    """Whether something is a dense tensor of a shape and dtype, and on a device if one is given."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_nested
        and value.shape == shape
        and value.dtype == dtype
        and (device is None or value.device == device)
    )


def check_dense(
    leaves: Sequence[Any], path: Callable[[int], str], spared: Collection[int] = ()
) -> None:
    """Refuse a tensor that is not dense, unless it is to be spared.

    What is no tensor is for others to judge.
    """
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or index in spared:
            continue
        if leaf.is_nested or leaf.layout is not torch.strided:
            raise TypeError(
                f"{path(index)} has {shown_layout(leaf)}: only dense (strided) tensors are served. "
                f"Make it dense, with .to_dense() say, or make leaves of the parts of a nested one."
            )


def _same(dtype: torch.dtype) -> torch.dtype:
    return dtype


def check_leaves(leaves: Sequence[Any], path: Callable[[int], str]) -> None:
    """Refuse whatever cannot be a parameter: no tensor, not dense, or of a dtype that cannot move.

    Nothing else is asked of a tensor before: a nested one has no shape and no strides.
    """
    for index, leaf in enumerate(leaves):
        if (
            not isinstance(leaf, Tensor)
            or leaf.dtype not in _DTYPES
            or leaf.layout is not torch.strided
            or leaf.is_nested
        ):
            _refuse_leaf(leaf, path(index))


def _refuse_leaf(leaf: Any, path: str) -> None:
    if not isinstance(leaf, Tensor):
        raise TypeError(
            f"{path} is {kind_of(leaf)}: every leaf must be a tensor. {_instead_of(leaf)}"
        )
    check_dense([leaf], lambda _: path)
    raise TypeError(
        f"{path} has dtype {leaf.dtype}: an optimizer moves float16, bfloat16, float32, float64, "
        f"complex64 and complex128 leaves. Keep others (counters, buffers) in a tree of their own."
    )


def check_alike(
    leaves: Sequence[Any],
    params: Sequence[Tensor],
    path: Callable[[int], str],
    what: str,
    dtype_of: Callable[[torch.dtype], torch.dtype] = _same,
    shape_of: Callable[[torch.Size], Sequence[int]] = tuple,
) -> None:
    """Refuse gradients or moments that are not like their parameters, but for a dtype of theirs."""
    if (shards := sharding()) is not None:
        shards.check_placed(leaves, params, path, what)
    for index, (leaf, param) in enumerate(zip(leaves, params, strict=True)):
        if not (
            isinstance(leaf, Tensor)
            and leaf.layout is torch.strided
            and not leaf.is_nested
            and leaf.shape == (param.shape if shape_of is tuple else tuple(shape_of(param.shape)))
            and leaf.dtype == dtype_of(param.dtype)
            and leaf.device == param.device
        ):
            shape = torch.Size(shape_of(param.shape))
            _refuse_unlike(leaf, param, path(index), what, dtype_of(param.dtype), shape)


def _refuse_unlike(
    leaf: Any, param: Tensor, path: str, what: str, dtype: torch.dtype, shape: torch.Size
) -> None:
    if not isinstance(leaf, Tensor):
        raise TypeError(f"{path} is {kind_of(leaf)}: {what} must be a tensor.")
    if not is_dense(leaf):
        raise TypeError(
            f"{path} has {shown_layout(leaf)}: {what} must be dense. Make it so with "
            f".to_dense(), or build an embedding with sparse=False."
        )
    if leaf.dtype != dtype and (what == "a moment" or leaf.dtype == param.dtype):
        raise ValueError(
            f"{path}: dtype {shown(leaf.dtype)}, and beside a parameter of {shown(param.dtype)} "
            f"this optimizer keeps {shown(dtype)}. Give it another moments=, such as "
            f"moments={leaf.dtype}, make the state with its init(), or convert this one with .to()."
        )
    for name in ("shape", "dtype", "device"):
        own, wanted = getattr(leaf, name), shape if name == "shape" else getattr(param, name)
        if own != wanted and (name != "dtype" or leaf.dtype != dtype):
            remedy = _REMEDIES[name]
            like = wanted == getattr(param, name)
            has = "the parameter has" if like else "and beside this parameter it must be"
            if what == "a moment" and name == "shape":
                remedy += of_members()
            raise ValueError(f"{path}: {name} {shown(own)}, {has} {shown(wanted)}. {remedy}")


_REMEDIES = {
    "shape": "Nothing is broadcast: give both the same shape.",
    "dtype": "Nothing is cast silently: convert one with .to().",
    "device": "Nothing is moved silently: put both on one device with .to().",
}


def of_members() -> str:
    """Return how the state of members is made, to end a message with; nothing if there are none."""
    if not transforms.transformed():
        return ""
    return " Under vmap, the state is made by vmap, too: state = vmap(opt.init)(params)."


def starts(leaves: Sequence[Any]) -> list[int] | None:
    """Return where leaves start in memory; None if one of them is no plain tensor, or sparse."""
    if not transforms.all_plain(leaves):
        return None
    try:
        return list(map(Tensor.data_ptr, leaves))
    except RuntimeError:  # which has no place of its own
        return None


def are_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors start at places of their own, as nearly always."""
    return all_differ(list(map(Tensor.data_ptr, tensors)))


def all_differ(addresses: list[int]) -> bool:
    """Whether no two addresses are the same; empty tensors start nowhere, at 0."""
    if len(set(addresses)) == len(addresses):
        return True
    addresses = [address for address in addresses if address]
    return len(set(addresses)) == len(addresses)


def check_distinct(leaves: Sequence[Tensor], path: Callable[[int], str], what: str) -> None:
    """Refuse two leaves that start at the same place in memory, such as tied weights.

    Those without memory of their own (fake, meta, empty, sparse) are passed over. The message says
    by `what` what goes wrong.
    """
    pointers = starts(leaves)
    if pointers is None:
        with torch.no_grad():
            shards = sharding()
            parts = leaves if shards is None else list(map(shards.part_or_leaf, leaves))
        pointers = [(starts([part]) or [0])[0] for part in parts]
    if len(set(pointers)) == len(pointers):
        return
    first: dict[int, int] = {}
    for index, pointer in enumerate(pointers):
        if pointer == 0 or leaves[index].is_meta or leaves[index].numel() == 0:
            continue
        if pointer in first:
            raise ValueError(
                f"{path(index)} shares its memory with {path(first[pointer])}: {what}. "
                f"Keep a shared tensor at one path only, or clone it."
            )
        first[pointer] = index


_shards: Any = None


def sharding() -> Any:
    """Return what knows of sharded tensors, None where there can be none.

    The module of DTensors is imported by whoever makes one, never from here.
    """
    global _shards  # noqa: PLW0603
    if transforms.compiling():
        from .._dtensor import shards  # noqa: PLC0415  # a graph sets no global

        return shards if transforms.find_dtensor() is not None else None
    if _shards is None and transforms.find_dtensor() is not None:
        from .._dtensor import shards as _shards  # noqa: PLC0415
    return _shards


def _instead_of(leaf: object) -> str:
    if leaf is None:
        return "Leave its key out."
    if isinstance(leaf, torch.nn.Module):
        return "Pass dict(module.named_parameters())."
    if isinstance(leaf, (Iterator, Set, ValuesView, str)):  # a string is that of a pair
        return "Pass dict(module.named_parameters()), or a dict of other pairs of name and tensor."
    if isinstance(leaf, numbers.Number) or hasattr(leaf, "__array__"):
        return "Make it one, with torch.as_tensor()."
    return "Take it out of the tree, or register its type as a pytree node."


_FLOAT = frozenset((float,))


class Writing(Protocol):
    """An update in place, laid out flat."""

    @property
    def inputs(self) -> StepInputs:
        """The leaves that have a gradient."""

    @property
    def layout(self) -> Any:
        """What is known of them; None while operators are traced."""

    @property
    def counts(self) -> Any:
        """The counts of updates."""

    def written(self) -> dict[str, list[Tensor]]:
        """Return the tensors that are written, by the name of their tree."""

    def path(self, root: str, index: int) -> str:
        """Return the path of one of them, or of a gradient, for a message."""


def check_inplace(
    rule: UpdateRule, prepared: Writing, counts: list[Number], numbers: list[Any]
) -> None:
    """Refuse to write in place where that would lose a derivative or memory.

    What is to be written into a count is a float where that was read.

    Raises:
        RuntimeError: Under a transform of `torch.func` or forward mode, or if anything that goes
            into the update carries history.
        ValueError: If a tensor to be written is expanded, or starts where another one or a gradient
            does.
    """
    check_unwatched(*prepared.inputs.columns, prepared.counts.tensors, *numbers)
    if prepared.layout is not None and _is_plainly_fine(prepared, prepared.layout, counts, numbers):
        return
    check_no_history(_history(rule, prepared, numbers))
    if prepared.layout is not None:  # while operators are traced there is no memory yet
        for root, tensors in prepared.written().items():
            check_writable(tensors, partial(prepared.path, root))
        columns = prepared.written()
        places = [(root, index) for root, found in columns.items() for index in range(len(found))]
        check_apart(
            list(chain.from_iterable(columns.values())),
            prepared.inputs.grads,
            lambda position: prepared.path(*places[position]),
            partial(prepared.path, "grads"),
        )


def check_unwatched(*columns: Iterable[object]) -> None:
    """Refuse to write in place under a transform, or what is of tensors that have a tangent."""
    if transforms.watched(*columns):
        raise RuntimeError(
            "update_() writes in place, which a transform (vmap, grad, jvp, ...) cannot follow. "
            "Use update()."
        )


def _is_plainly_fine(
    prepared: Writing, layout: Any, new_counts: list[Number], numbers: Iterable[Any]
) -> bool:
    """Whether nothing can stand against it, as nearly always; else the fault is looked for.

    The layout vouches for the leaves, save for where they start and for parameters' histories. A
    count that was read vouches for itself: only a plain one without history is.
    """
    counts = prepared.counts.tensors
    tensors = [*chain.from_iterable(prepared.inputs.columns), *counts]
    return (
        layout.writable
        and _FLOAT.issuperset(map(type, new_counts))
        and all(map(is_read, numbers))
        and not any(map(Tensor.is_inference, counts))
        and not (layout.params_require_grad and any(not p.is_leaf for p in prepared.inputs.params))
        and are_apart(tensors)
    )


def check_apart(
    targets: Sequence[Tensor],
    grads: Sequence[Tensor],
    path: Callable[[int], str],
    grad_path: Callable[[int], str],
) -> None:
    """Refuse tensors that would be written over another one, or over a gradient still read."""
    pointers = starts([*targets, *grads])
    if pointers is not None and len(set(pointers)) == len(pointers):
        return
    check_distinct(targets, path, "one would be written over the other")
    if pointers is None:  # fake tensors have no memory to share
        return
    check_not_among(grads, targets, grad_path, "a tensor that is to be written")


def check_not_among(
    tensors: Sequence[Tensor], others: Sequence[Tensor], path: Callable[[int], str], what: str
) -> None:
    """Refuse tensors that start in memory where one of the others does, which `what` names."""
    taken = {tensor.data_ptr() for tensor in others if tensor.numel() > 0}
    for index, tensor in enumerate(tensors):
        if tensor.numel() > 0 and tensor.data_ptr() in taken and not tensor.is_meta:
            raise ValueError(
                f"{path(index)} shares its memory with {what}. Clone it, or use update()."
            )


def check_no_history(found: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse the first of these tensors, each of which has a derivative to lose, by its name."""
    for name, tensor in found:
        raise RuntimeError(
            f"{name} {'has a history' if tensor.grad_fn else 'requires a gradient'}, which writing "
            f"in place would lose. Use update(), or detach it if no derivative is wanted."
        )


def _history(
    rule: UpdateRule, prepared: Writing, numbers: Iterable[Any]
) -> Iterator[tuple[str, Tensor]]:
    """Yield what would have its derivative lost, by name."""
    for own in numbers:
        for path, number in zip(rule.paths.values(), own, strict=True):
            if isinstance(number, Tensor) and number.requires_grad:
                yield path, number
    columns = {"grads": prepared.inputs.grads, **prepared.written()}
    for root, tensors in columns.items():
        for index, tensor in enumerate(tensors):
            # A parameter that merely requires a gradient is what everyone trains.
            if tensor.requires_grad and not (root == "params" and tensor.is_leaf):
                yield prepared.path(root, index), tensor


def check_writable(tensors: Sequence[Tensor], path: Callable[[int], str]) -> None:
    """Refuse tensors of inference mode outside of it, and those whose elements share memory."""
    if not torch.is_inference_mode_enabled() and any(map(Tensor.is_inference, tensors)):
        index = [tensor.is_inference() for tensor in tensors].index(True)
        raise RuntimeError(
            f"{path(index)} was made in inference mode, outside of which it cannot be written. "
            f"Use update(), or clone it first."
        )
    if all(map(Tensor.is_contiguous, tensors)):
        return
    for index, tensor in enumerate(tensors):
        if any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ValueError(
                f"{path(index)} has strides {tensor.stride()} at shape {tuple(tensor.shape)}: "
                f"several elements share one place in memory. Clone it first."
            )
