"""A state as a flat dict from path to tensor, and back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.types import Tree, is_dense, shown_layout
from .._dtensor.shards import dtensor, local_part
from ._entries import key_of, recount

StateT = TypeVar("StateT")

# Every other key begins with "state" or "torch", so that no path can be taken for this one.
_FORMAT = "funcopt.format"
_VERSION = 1

# The most faults that one message lists.
_MOST = 20


def to_state_dict(state: Tree) -> dict[str, Tensor]:
    """Return a state as a flat dict from path to tensor.

    `torch.save` (with `torch.load(weights_only=True)`), `safetensors.torch.save_file` and
    `torch.distributed.checkpoint.save` take it as it is; the last with sharded tensors too. Do not
    hand a state itself to that one: it stores a NamedTuple as opaque bytes, and each rank then
    silently reloads what rank 0 had.

    A key is the Python expression that reaches the tensor from `state`, such as
    `state.exp_avg['0.weight']`, so that no two keys of a tree, be they strings with dots or
    integers, can be taken for each other; other keys appear as they print. A complex tensor is
    stored as pairs of real numbers, which every format knows, under
    `torch.view_as_real(state.exp_avg['w'])`. The entry `funcopt.format` is the version of this
    format: now 1.

    A tensor that is contiguous and has a storage to itself is given as it is, not as a copy: it
    goes on to change if `update_` writes into the state. Others are copied, since safetensors takes
    no two that share a storage, and `torch.save` would write all of it.

    Hyperparameters that are numbers are no tensors, and in no checkpoint: the optimizer with which
    a run goes on has them. Processes of which each has tensors of its own under a path, as with
    `LocalUpdates`, need paths of their own.

    Args:
        state: What `init` or `update` of any optimizer returned, or any other tree of dense
            tensors: `{"params": params, "state": state}`, say.

    Raises:
        TypeError: If a leaf is not a dense tensor.
        ValueError: If two leaves have the same path.

    Example:
        >>> import torch, funcopt
        >>> from funcopt.interop import to_state_dict
        >>> for key, tensor in to_state_dict(funcopt.AdamW().init([torch.ones(2)])).items():
        ...     print(key, tensor)
        funcopt.format tensor(1)
        state.step tensor(0., dtype=torch.float64)
        state.exp_avg[0] tensor([0., 0.])
        state.exp_avg_sq[0] tensor([0., 0.])
    """
    entries = {_FORMAT: torch.tensor(_VERSION, dtype=torch.int64, device="cpu")}
    taken: set[int] = set()
    for key, leaf in _entries(state).items():
        entries[key] = _with_own_storage(leaf, taken)
    return entries


@transforms.restoring
def from_state_dict(template: StateT, d: Mapping[str, Tensor], *, strict: bool = True) -> StateT:
    """Return the state that `to_state_dict` turned into a dict, in fresh memory.

    A leaf requires a gradient where that of the template does, as the parameters of a module do.

    To resume with `torch.distributed.checkpoint`, load into the dict of a new state, whose tensors
    it writes over: `d = to_state_dict(opt.init(params))`, `load(d, ...)`, and then this. Note that
    it casts to the dtypes it finds there without a word.

    Args:
        template: A state such as `opt.init(params)`, which gives structure, shapes, dtypes, layout
            and devices, and is not changed. Tensors of `d` on another device are moved.
        d: The dict.
        strict: Whether every leaf of the template must have an entry, and every entry a leaf. If
            not, a leaf without one is copied from the template, and an entry without one is left
            out. Whatever is there must fit nevertheless, and the version must be known; moments
            must have their counts. One count for all leaves is given to each of them in a template
            made with `step_per_leaf`; counts of each become one count if they are equal.

    Raises:
        TypeError: If `d` is not a mapping, or a leaf of the template is not a dense tensor.
        ValueError: If the version is missing or unknown, or if entries are missing, extra, of
            another shape or dtype, or hold no values, or if moments have no count, or several
            counts where the template has one: all are named at once.

    Example:
        >>> import torch, funcopt
        >>> from funcopt.interop import from_state_dict, to_state_dict
        >>> opt, params = funcopt.AdamW(), {"w": torch.ones(2)}
        >>> _, state = opt.update({"w": torch.ones(2)}, opt.init(params), params)
        >>> from_state_dict(opt.init(params), to_state_dict(state)).exp_avg
        {'w': tensor([0.1000, 0.1000])}
    """
    if not isinstance(d, Mapping):
        raise TypeError(
            f"the second argument is of type {type(d).__name__}: it must be the dict that "
            f"to_state_dict() made. The order is from_state_dict(template, d)."
        )
    wanted = _entries(template)
    _check_version(d)
    d, faults = recount(template, d, strict=strict)
    faults += _faults(wanted, d, strict)
    if faults:
        shown = faults if len(faults) <= _MOST else [*faults[:_MOST], f"... ({len(faults)} in all)"]
        raise ValueError(
            "\n  ".join(["the dict does not fit the template:", *shown])
            + f"\nMake the template with init() of the same optimizer from the same parameters."
            f"{_advice(wanted, d)}"
        )
    _, structure = pytree.flatten(template)
    with torch.no_grad():
        leaves = [_filled(leaf, d.get(key)) for key, leaf in wanted.items()]
    state: StateT = pytree.unflatten(structure, leaves)
    return state


def _entries(tree: Tree) -> dict[str, Tensor]:
    """Return the leaves by the keys of their entries, in order."""
    leaves, structure = pytree.flatten(tree)
    entries: dict[str, Tensor] = {}
    for path, leaf in zip(pytree.paths(structure, "state"), leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{path} is of type {type(leaf).__name__}: a checkpoint holds tensors alone. Make "
                f"a number a 0-dim tensor."
            )
        if not is_dense(leaf):
            raise TypeError(
                f"{path} has {shown_layout(leaf)}: make it dense, with .to_dense() say."
            )
        key = key_of(path, leaf)
        if key in entries:
            raise ValueError(
                f"{path} is the path of two leaves: their keys print alike. Use strings as keys."
            )
        entries[key] = leaf
    return entries


def _with_own_storage(leaf: Tensor, taken: set[int]) -> Tensor:
    """Return a contiguous real tensor alone in its storage: the leaf itself if it is one already.

    `taken` is where the storages start that earlier entries have to themselves, to be added to.
    """
    tensor = _real(leaf.detach()).resolve_neg()
    if not transforms.all_plain([tensor]):  # sharded or fake: what saves it knows its memory
        return tensor
    storage = tensor.untyped_storage()
    fills = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
    if not fills or storage.data_ptr() in taken:
        return tensor.clone(memory_format=torch.contiguous_format)
    taken.add(storage.data_ptr())
    return tensor


def _check_version(d: Mapping[str, Any]) -> None:
    """Refuse a dict of another format before its entries are read as if they were of this one."""
    if _FORMAT not in d:
        raise ValueError(
            f"the dict has no entry {_FORMAT!r}: to_state_dict() did not make it. A state dict of "
            f"an optimizer of torch is read by from_torch()."
        )
    version = d[_FORMAT]
    if isinstance(version, Tensor) and version.is_meta:
        raise ValueError("the dict is on the meta device, where it holds no values.")
    value = version.tolist() if isinstance(version, Tensor) else version
    if value != _VERSION:
        raise ValueError(
            f"{_FORMAT} is {value}: this version of funcopt reads {_VERSION}. A newer one may read "
            f"it."
        )


def _faults(wanted: dict[str, Tensor], d: Mapping[str, Any], strict: bool) -> Iterator[str]:
    for key, leaf in wanted.items():
        if leaf.is_meta:
            yield f"{key}: the template is on the meta device, and would hold no values"
        if key in d:
            yield from _differences(key, d[key], leaf)
        elif strict:
            yield f"{key}: missing"
    if strict:
        yield from (
            f"{key}: not in the template" for key in d if key not in wanted and key != _FORMAT
        )


def _differences(key: str, entry: Any, leaf: Tensor) -> Iterator[str]:
    if not isinstance(entry, Tensor):
        yield f"{key}: of type {type(entry).__name__}, not a tensor"
        return
    if not is_dense(entry):
        yield f"{key}: {shown_layout(entry)}, which is not dense"
        return
    expected = _real(leaf)
    if entry.shape != expected.shape:
        yield f"{key}: shape {tuple(entry.shape)}, the template has {tuple(expected.shape)}"
    if entry.dtype != expected.dtype:
        yield f"{key}: dtype {entry.dtype}, the template has {expected.dtype}"
    if entry.is_meta:
        yield f"{key}: on the meta device, where it holds no values"


def _advice(wanted: dict[str, Tensor], d: Mapping[str, Any]) -> str:
    """Return what else to do where a dict is of members, or where one side has a wrapper more."""
    pairs = [(_real(leaf), d[key]) for key, leaf in wanted.items() if key in d]
    pairs = [pair for pair in pairs if isinstance(pair[1], Tensor) and is_dense(pair[1])]
    both = [(own.shape, entry.shape) for own, entry in pairs if own.shape != entry.shape]
    of_members = {there[0] for own, there in both if there[1:] == own and len(there) > 0}
    if both and len(of_members) == 1 and all(there[1:] == own for own, there in both):
        return (
            f" The dict is of {of_members.pop()} members: a template for these is made by "
            f"torch.func.vmap(opt.init)(params), or by init() of Members(opt)."
        )
    extra, missing = d.keys() - wanted.keys() - {_FORMAT}, wanted.keys() - d.keys()
    if any(_within(key, missing) for key in extra):
        return " The dict is of one with a wrapper more: its entries begin with .inner."
    if any(_within(key, extra) for key in missing):
        return " The template is of one with a wrapper more: its entries begin with .inner."
    return ""


def _within(key: str, others: Collection[str]) -> bool:
    """Whether one of the other keys is this one without a wrapper."""
    return any(key.replace(".inner", "", 1) == other for other in others)


def _filled(leaf: Tensor, entry: Tensor | None) -> Tensor:
    """Return a tensor like a leaf of the template, with the values of its entry, if it has one."""
    fresh = torch.empty_like(leaf, requires_grad=False)
    if entry is None:
        fresh.copy_(leaf)
    else:
        _real(fresh).copy_(entry)
    return fresh.requires_grad_(leaf.requires_grad)


def _real(tensor: Tensor) -> Tensor:
    """Return a tensor as its entry shows it: a complex one as pairs, in the same memory.

    Only one whose conjugation is still to be made is copied.
    """
    if not tensor.is_complex():
        return tensor
    kind: Any = dtensor()
    if kind is None or not isinstance(tensor, kind):
        return torch.view_as_real(tensor.resolve_conj())
    # That of a DTensor sharded along its last dimension is a copy, replicated everywhere.
    pairs = torch.view_as_real(local_part(tensor).resolve_conj())
    whole: Tensor = kind.from_local(
        pairs,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=torch.Size([*tensor.shape, 2]),
        stride=(*(2 * stride for stride in tensor.stride()), 1),
    )
    return whole
