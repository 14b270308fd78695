"""From an optimizer of `torch.optim` to a value and its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.tensors import is_narrow
from .._core.types import Tree, is_dense, shown, shown_layout
from .._engine.prepare import check_untied, flatten_params
from .._engine.rule import Slot, slot_dtype
from ..optimizers.frozen import Frozen
from ..wrappers.labels import name_leaves
from ..wrappers.partition import Partition, PartitionState
from ._counterparts import Counterpart
from ._getter import warn_if_made_up
from ._source import Source, places, read, within


@transforms.restoring
def from_torch(
    source: torch.optim.Optimizer | Mapping[str, Any],
    params: Tree,
    *,
    step_per_leaf: bool | None = None,
    group_names: Sequence[str] | None = None,
    frozen: str | None = None,
) -> tuple[Any, Any]:
    """Take over a run of an optimizer of torch: return the optimizer and its state.

    It may be a `torch.optim.AdamW`, `Adam`, `SGD`, `NAdam`, `RAdam`, `RMSprop`, `Adagrad`,
    `Adafactor` or `Muon`.

    Of one param group, that is an `AdamW` and its `AdamWState`, say; of several, a `Partition` with
    an optimizer for each, and its `PartitionState`. The label of a group is its own `"name"`, if it
    has that key with a string, else its number: `"0"` for the first. The labels of the leaves are a
    tree with the keys of `params`.

    Going on with them gives the bits that torch would have, in float32 and float64, and for complex
    leaves of an `AdamW`, unless the source is capturable (and not fused) or differentiable or has a
    tensor for a hyperparameter: it then computes some of its numbers in another order or in
    float32, funcopt in float64. By rounding alone differ an `NAdam`, whose product of momenta is
    computed anew, an `RAdam` by foreach, an `Adafactor`, and an `Adagrad` that is fused, which goes
    on by `"auto"`.

    **Torch's `SGD` and `Muon` do not count their updates.** A parameter that has a momentum buffer
    is taken to have had one update, any other none. That is all the equations ask; but a schedule
    that is put in place of a number begins there. To begin it elsewhere, write the count into the
    state: `state._replace(step=torch.tensor(500.0, dtype=torch.float64))`.

    Parameters and state are matched by identity if `params` has the tensors of the optimizer
    itself; else by name, if the source was built from `named_parameters()`, where the name of a
    leaf in a nested tree is its keys joined by dots; else by order, if `params` is flat, where the
    order is that in which a dict was filled, as `dict(model.named_parameters())` is. (torch itself
    always goes by order, whatever the names.) Each moment must have its parameter's shape, and
    is moved to its device; the optimizer's `moments` is such that all stay in the dtypes in which
    they come, which torch has made those of the parameters.

    **The order of several groups is that of one group after the other, which need not be the
    model's**: if they have no names, give `params` in their order, or load the state dict into an
    optimizer that is built as the source was, and take over that with its own tensors, by identity.

    The kernel is the one that the source used: fused, foreach, or plain for neither. Where both
    flags are None, torch takes foreach if all parameters are on CUDA, and lr is no tensor, and
    plain elsewhere; so does this. Tensors among the hyperparameters stay tensors, and
    `differentiable=False` becomes None, the default. A scheduler is no part of the optimizer: lr is
    what it is at the moment. A parameter without an entry in the source's state is one that never
    had a gradient: torch writes none for it.

    State dicts that `torch.distributed.checkpoint.state_dict` gives are taken, too. Of an optimizer
    that has made no step yet, its getters make up a state with a count of 1 and moments of zero,
    from which the next update would have the wrong size: that is warned of. (Of an `SGD` they make
    up buffers of zero, with which only dampening comes too early.) From one that was laid out flat
    (`flatten_optimizer_state_dict=True`), param groups with the same options come as one.
    State dicts of other libraries are refused: `funcopt.interop` says what of them can be used.

    Args:
        source: The optimizer, or what its `state_dict()` or `get_optimizer_state_dict` gave. It is
            not changed, and nothing that is returned shares its memory.
        params: The parameters: `dict(model.named_parameters())`, or any tree of them.
        step_per_leaf: Whether each leaf is to have its own count, as in torch. None: if counts
            differ within its group, or only some parameters ever had a gradient. Where all counts
            are the same, but gradients may be None later on, say True to go on exactly as torch
            would.
        group_names: Labels for the param groups, in their order, instead of their own. A
            `Partition` is then returned of one group too.
        frozen: A label for the leaves of `params` that the source lacks, because torch does not
            train them, whose optimizer is then `Frozen()`. A `Partition` is returned, with that
            label if there are any. They can be told by identity or name alone. None: they are an
            error.

    Raises:
        TypeError: If the source is neither, or a hyperparameter or leaf is of the wrong type.
        ValueError: If the source is none of these (Adamax, say), if two of its param groups have
            one name, or one of several is empty; if a parameter is missing, extra, on the meta
            device, or of another shape or dtype, or the order is not certain; if its state is
            incomplete; if counts differ and `step_per_leaf` is False; or if `group_names` are too
            few or many, or `frozen` is the label of a group.

    Example:
        >>> import torch
        >>> from funcopt.interop import from_torch
        >>> model = torch.nn.Linear(2, 1)
        >>> theirs = torch.optim.AdamW(model.named_parameters(), lr=0.1, fused=True)
        >>> model(torch.ones(2)).backward()
        >>> theirs.step()
        >>> opt, state = from_torch(theirs, dict(model.named_parameters()))
        >>> opt.lr, opt.kernel, state.step
        (0.1, 'fused', tensor(1., dtype=torch.float64))

        Of two param groups:

        >>> groups = [{"params": [model.weight], "name": "decay"}, {"params": [model.bias]}]
        >>> theirs = torch.optim.AdamW(groups, lr=0.1)
        >>> opt, state = from_torch(theirs, dict(model.named_parameters()))
        >>> opt.labels, state.inner["1"].exp_avg
        ({'weight': 'decay', 'bias': '1'}, {'bias': tensor([0.])})
    """
    leaves, structure = pytree.flatten(params)
    check_untied(leaves, structure)
    theirs = read(source, group_names)
    found = places(theirs, leaves, structure, partial=frozen is not None)
    if len(theirs.groups) == 1 and group_names is None and frozen is None:
        (label,) = theirs.groups
        own_places = pytree.unflatten(structure, found)
        opt, state = _take_over(theirs, label, params, own_places, step_per_leaf)
        warn_if_made_up([state])
        return opt, state
    if frozen is not None and not isinstance(frozen, str):
        raise TypeError(f"frozen={frozen!r}: must be a label, a string such as 'frozen', or None.")
    if frozen in theirs.groups:
        raise ValueError(
            f"frozen={frozen!r}: a param group has that label, and trains its parameters. Choose "
            f"another one."
        )
    labels = [frozen if place is None else theirs.owners[place] for place in found]
    inner: dict[str, Any] = {}
    states: dict[str, Any] = {}
    named = list(zip(labels, name_leaves(structure), leaves, found, strict=True))
    for label in theirs.groups:
        own = {name: leaf for owner, name, leaf, _ in named if owner == label}
        own_places = {name: place for owner, name, _, place in named if owner == label}
        with within(f"param group {label!r}"):
            inner[label], states[label] = _take_over(theirs, label, own, own_places, step_per_leaf)
    warn_if_made_up(states.values())
    if frozen is not None and frozen in labels:
        inner[frozen], states[frozen] = Frozen(), ()
    return Partition(inner, pytree.unflatten(structure, labels)), PartitionState(states)


def _take_over(
    theirs: Source, label: str, params: Tree, found: Tree, step_per_leaf: bool | None
) -> tuple[Any, Any]:
    """Take over one param group, of these parameters; `found` is a tree of their places."""
    leaves, structure = flatten_params(params)
    kind, options = theirs.kinds[label], theirs.groups[label]
    entries = [_entry(kind, theirs.entries[place]) for place in pytree.flatten(found)[0]]
    path = partial(pytree.path, structure, "params")
    for index, (leaf, entry) in enumerate(zip(leaves, entries, strict=True)):
        if leaf.is_meta:
            raise ValueError(
                f"{path(index)} is on the meta device, where its moments would hold no values. "
                f"Give the parameters where they are to be trained."
            )
        _check_entry(kind, options, entry, leaf, partial(path, index))
    counts = [_count(kind, entry, partial(path, index)) for index, entry in enumerate(entries)]
    uneven = len(set(counts)) > 1
    if uneven and step_per_leaf is False:
        raise ValueError(
            f"step_per_leaf=False: the source made {min(counts):g} updates of one parameter and "
            f"{max(counts):g} of another. Leave step_per_leaf out, or say True."
        )
    moments = _moments(kind, options, leaves, entries)
    for index, (leaf, entry) in enumerate(zip(leaves, entries, strict=True)):
        _check_dtypes(kind, options, moments, entry, leaf, partial(path, index))
    opt = kind.ours(
        moments=moments,
        **{name: _own(name, options[name]) for name in kind.fields},
        step_per_leaf=uneven if step_per_leaf is None else step_per_leaf,
        kernel=_kernel(kind, options, leaves),
        differentiable=True if options.get("differentiable") else None,
    )
    state = opt.init(params)
    for step, count in zip(pytree.flatten(state.step)[0], counts, strict=False):
        step.fill_(count)
    with torch.no_grad():
        for slot in kind.kept_slots(options):
            tensors = pytree.flatten(getattr(state, slot.name))[0]
            for leaf, moment, entry in zip(leaves, tensors, entries, strict=True):
                if entry and kind.keeps(slot.name, leaf):
                    moment.copy_(entry[slot.name])
    return opt, state


def _entry(kind: Counterpart, entry: Any) -> Any:
    """Return the state of a parameter. Old versions of SGD wrote None where there is no buffer."""
    if kind.counts or not isinstance(entry, Mapping):
        return entry
    return {} if all(value is None for value in entry.values()) else entry


def _check_entry(
    kind: Counterpart,
    options: Mapping[str, Any],
    entry: Mapping[str, Any],
    leaf: Tensor,
    path: Callable[[], str],
) -> None:
    """Refuse the state of a parameter that is not all there, or not of this parameter."""
    slots = {slot.name: slot for slot in kind.kept_slots(options, leaf)}
    wanted = slots.keys() | ({"step", *kind.computed} if kind.counts else set())
    if not isinstance(entry, Mapping):
        raise TypeError(
            f"the state for {path()} is of type {type(entry).__name__}: it must be a dict of "
            f"{', '.join(sorted(wanted))}."
        )
    if entry and entry.keys() != wanted:
        lacks, extra = sorted(wanted - entry.keys()), sorted(entry.keys() - wanted)
        found = [f"lacks {', '.join(lacks)}"] * bool(lacks)
        found += [f"has {', '.join(map(str, extra))} beyond it"] * bool(extra)
        chosen = [slot.option for slot in kind.rule.slots if slot.option]
        given = " and ".join(f"{option}={options[option]}" for option in chosen)
        raise ValueError(
            f"the state for {path()} {' and '.join(found)}: {f'with {given} ' * bool(given)}it is "
            f"{', '.join(sorted(wanted)) or 'empty'}."
        )
    for name in slots.keys() & entry.keys():
        moment = entry[name]
        if not isinstance(moment, Tensor):
            raise TypeError(
                f"{name} for {path()} is of type {type(moment).__name__}, not a tensor."
            )
        if not is_dense(moment):
            raise ValueError(
                f"{name} for {path()}: {shown_layout(moment)}, the parameter is dense. Make "
                f"it dense, with .to_dense() say."
            )
        wanted_shape = torch.Size(slots[name].shape_of(leaf.shape))
        if moment.shape != wanted_shape:
            beside = "the parameter has" if wanted_shape == leaf.shape else "it must be"
            raise ValueError(
                f"{name} for {path()}: shape {shown(moment.shape)}, {beside} "
                f"{shown(wanted_shape)}. Is it that of another parameter, or another model?"
            )
        _check_has_value(f"{name} for {path()}", moment)


_MOMENTS = ("auto", None, torch.float32, torch.bfloat16, torch.float16)


def _moments(
    kind: Counterpart,
    options: Mapping[str, Any],
    leaves: Sequence[Tensor],
    entries: Sequence[Mapping[str, Any]],
) -> torch.dtype | str | None:
    """Return what keeps moments in the dtypes in which they come; as torch does, if none come."""
    slots = kind.kept_slots(options)
    beside = [(leaf, entry) for leaf, entry in zip(leaves, entries, strict=True) if entry]
    if not beside or not slots:
        narrow = any(is_narrow(leaf.dtype) for leaf in leaves)
        return None if narrow else "auto"
    for moments in _MOMENTS:
        if all(
            entry[slot.name].dtype is _dtype_beside(slot, moments, leaf)
            for leaf, entry in beside
            for slot in slots
            if kind.keeps(slot.name, leaf)
        ):
            return moments
    return None


def _dtype_beside(
    slot: Slot, moments: torch.dtype | str | None, leaf: Tensor
) -> torch.dtype | None:
    try:
        return slot_dtype(slot, moments, leaf.dtype)
    except ValueError:  # which no complex leaf has
        return None


def _check_dtypes(
    kind: Counterpart,
    options: Mapping[str, Any],
    moments: torch.dtype | str | None,
    entry: Mapping[str, Any],
    leaf: Tensor,
    path: Callable[[], str],
) -> None:
    """Refuse moments that do not have one dtype beside parameters of one."""
    for slot in kind.kept_slots(options, leaf) if entry else []:
        has, needed = entry[slot.name].dtype, slot_dtype(slot, moments, leaf.dtype)
        if has != needed:
            raise ValueError(
                f"{slot.name} for {path()}: dtype {shown(has)}, the parameter has "
                f"{shown(needed)}. Is it that of another parameter, or another model?"
            )


def _count(kind: Counterpart, entry: Mapping[str, Any], path: Callable[[], str]) -> float:
    if not kind.counts:
        return 1.0 if entry else 0.0
    step = entry.get("step", 0.0)
    _check_has_value(f"step for {path()}", step)
    single = isinstance(step, Tensor) and is_dense(step) and step.numel() == 1
    count = float(step.item()) if single else step
    if not isinstance(count, float | int) or not (count >= 0 and count == count // 1):
        raise ValueError(
            f"step for {path()} is {step!r}: a count of updates is a whole number, at least 0."
        )
    return float(count)


def _check_has_value(name: str, value: object) -> None:
    if isinstance(value, Tensor) and value.is_meta:
        raise ValueError(
            f"{name} is on the meta device, where it has no value. Give a source that was saved or "
            f"loaded with its values."
        )


def _own(name: str, number: Any) -> Any:
    """Return a copy of a tensor, which in torch may have one dimension; and a number as it is."""
    if isinstance(number, tuple | list):
        return tuple(_own(f"{name}[{index}]", each) for index, each in enumerate(number))
    if not isinstance(number, Tensor) or not is_dense(number):  # which is refused
        return number
    _check_has_value(name, number)
    return number.detach().clone().reshape(() if number.numel() == 1 else number.shape)


def _kernel(kind: Counterpart, options: Mapping[str, Any], leaves: list[Tensor]) -> str:
    """The kernel that torch takes, by its own rule; ours may have none that is fused."""
    foreach, fused = options.get("foreach"), options.get("fused")
    if foreach is None and fused is None:
        foreach = (
            all(leaf.is_cuda for leaf in leaves)
            and not options.get("differentiable")
            and (options.get("capturable", True) or not isinstance(options["lr"], Tensor))
        )
    kernel = "fused" if fused else "foreach" if foreach else "plain"
    is_ours = kernel in kind.rule.kernels or (kernel == "plain" and kind.flags)
    return kernel if is_ours else "auto"
