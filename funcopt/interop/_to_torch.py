"""From a value and its state to a state dict of an optimizer of `torch.optim`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core import pytree
from .._core.types import Tree
from .._engine.hyperparameters import check_zero_dim
from .._engine.prepare import flatten_params, prepare
from ..optimizers.frozen import Frozen
from ..wrappers.labels import name_leaves
from ..wrappers.partition import Partition, PartitionState
from ._counterparts import SERVED, Counterpart, counterpart_of
from ._source import within

# From here on float32, in which torch counts, no longer holds every count.
_FLOAT32_STOPS = 2**24


def to_torch(opt: Any, state: Any, params: Tree) -> dict[str, Any]:
    """Hand a run over to torch: return a state dict that its optimizer of that name loads.

    There are `AdamW`, `Adam`, `SGD`, `NAdam`, `RAdam`, `RMSprop`, `Adagrad`, `Adafactor` and
    `Muon`, and the bits of the last six are torch's as far as `from_torch` says. Torch's `Muon`
    takes leaves of two dimensions alone.

    One of these becomes one param group, a `Partition` one for each of its optimizers, in their
    order, but none for `Frozen()`, whose leaves are then no parameters of torch's optimizer, and
    none where a label has no leaf, since torch takes no group of names without one. The
    label stands under `"name"`, unless it is the number that the group has in torch anyway.

    Going on there gives the bits that `update` would have, in float32 and float64, for the same
    kernel and unless `differentiable` is True; but without `step_per_leaf` only while every leaf
    has a gradient, since torch counts the updates of each parameter. `load_state_dict` takes the
    options from the dict too, the kernel among them. `"auto"`, `"native"` and `"triton"` are handed
    over as `fused=True`. On the CPU that rounds the last elements of a leaf, behind its last whole
    vector, in another way than `"native"`, which `"auto"` runs there. Where torch's fused kernel
    refuses, they become both flags False, and the results of all leaves of that group differ by
    rounding: if one is complex, `differentiable` is True, a count is 2**24 or more, or a leaf of an
    `SGD` is of 16 bits on the CPU, where torch's fused kernel is wrong. Complex leaves of an `SGD`,
    or of an `Adam` with weight decay, differ by rounding whatever the kernel. The count of an `SGD`
    is lost, since torch's has none.

    A scheduler that keeps numbers of its own in the param groups, as OneCycleLR does, loses them
    when the dict is loaded, since they are no part of an optimizer. Keep them by adding what lacks
    to each group: `d["param_groups"][0] = {**theirs.param_groups[0], **d["param_groups"][0]}`.

    torch loads by order, not by name: the parameters of its optimizer must come in the order of
    `params`, where that of a dict is the order in which it was filled, `model.parameters()`'s own
    for `dict(model.named_parameters())`; and if there are several param groups, in that order
    within each. Their names stand in the dict, from which the groups can be built as in the example
    below. Tensors among the hyperparameters are handed over as numbers. A parameter that was never
    updated has no entry, as in torch. Moments are handed over in their dtypes: beside 16-bit
    parameters, torch rounds those in float32 to 16 bits when it loads them, and its second moment
    stalls there as with `moments=None`.

    Args:
        opt: The optimizer.
        state: Its state. Nothing that is returned shares its memory.
        params: The parameters.

    Raises:
        TypeError: If `opt` or `state` is not that of one of these, or of a Partition of them. Of
            a wrapper hand over what is in it: `to_torch(opt.inner, state.inner, params)`.
        ValueError: If a Partition has optimizers with states of several kinds; if an optimizer
            rounds stochastically, or has an option that torch lacks; if a hyperparameter is a
            schedule or stacked, if state and parameters do not match, if two leaves have one name,
            if all are frozen, or if torch's kernel of the name that was asked for cannot go on:
            fused where it refuses or is wrong, as above, foreach if `differentiable` is True.

    Example:
        >>> import torch, funcopt
        >>> from funcopt.interop import to_torch
        >>> model = torch.nn.Linear(2, 1)
        >>> params = dict(model.named_parameters())
        >>> opt = funcopt.AdamW(lr=0.1)
        >>> theirs = torch.optim.AdamW(model.named_parameters())
        >>> theirs.load_state_dict(to_torch(opt, opt.init(params), params))
        >>> theirs.param_groups[0]["lr"], theirs.param_groups[0]["fused"]
        (0.1, True)

        Of two param groups:

        >>> inner = {"decay": opt, "no_decay": funcopt.AdamW(weight_decay=0.0)}
        >>> opt = funcopt.Partition(inner, funcopt.decay_label)
        >>> d = to_torch(opt, opt.init(params), params)
        >>> theirs = torch.optim.AdamW(
        ...     {"params": [(name, params[name]) for name in group["param_names"]]}
        ...     for group in d["param_groups"]
        ... )
        >>> theirs.load_state_dict(d)
        >>> [(group["name"], group["param_names"]) for group in theirs.param_groups]
        [('decay', ['weight']), ('no_decay', ['bias'])]
    """
    if not isinstance(opt, Partition) or not isinstance(state, PartitionState):
        group, entries = _hand_over(opt, state, params, 0)
        names = group["param_names"]
        if all(name.isdigit() or not name for name in names):  # of a list, or a tensor alone
            del group["param_names"]
        return {"state": entries, "param_groups": [group]}
    groups: list[dict[str, Any]] = []
    entries, first = {}, 0
    parts = _parts(opt, state, params)
    _check_alike({label: own_opt for label, (own_opt, _, _) in parts.items()})
    for label, (own_opt, own_state, own_params) in parts.items():
        with within(f"inner[{label!r}]"):
            group, own_entries = _hand_over(own_opt, own_state, own_params, first)
        groups.append(group if label == str(len(groups)) else {**group, "name": label})
        entries.update(own_entries)
        first += len(own_params)
    return {"state": entries, "param_groups": groups}


def _parts(
    opt: Partition, state: PartitionState, params: Tree
) -> dict[str, tuple[Any, Any, dict[str, Tensor]]]:
    """Return what moves, by label: the optimizer, its state, and its leaves in torch's order."""
    groups = opt._groups(params)
    no_grads = pytree.unflatten(groups.structure, [None] * len(groups.leaves))
    order = [groups.names[index] for index in pytree.insertion_order(groups.structure)]
    parts = {}
    for label, own in opt._updates(groups, no_grads, state).items():
        if not isinstance(own.opt, Frozen) and (own.params or not order):
            leaves = {name: own.params[name] for name in order if name in own.params}
            parts[label] = own.opt, own.state, leaves
    if not parts:
        raise ValueError("every optimizer is Frozen(): torch.optim needs one that moves something.")
    return parts


def _check_alike(opts: dict[str, Any]) -> None:
    """Refuse optimizers that torch cannot have in one: their groups must have the same state."""
    known = {label: kind for label, opt in opts.items() if (kind := counterpart_of(opt))}
    first = next(iter(known), "")
    for label, kind in known.items():
        if kind.rule.slots != known[first].rule.slots:
            raise ValueError(
                f"inner[{first!r}] is of {known[first].ours.__name__} and inner[{label!r}] of "
                f"{kind.ours.__name__}, which no optimizer of torch is at once. Hand them over one "
                f"by one, each with its own leaves and the state state.inner[{label!r}]."
            )


def _hand_over(
    opt: Any, state: Any, params: Tree, first: int
) -> tuple[dict[str, Any], dict[int, dict[str, Tensor]]]:
    """Return a param group, and the state of its parameters by their numbers, from `first` on."""
    kind = counterpart_of(opt)
    if kind is None or not isinstance(state, kind.rule.state):
        raise TypeError(
            f"got {type(opt).__name__} and {type(state).__name__}: that is no {SERVED} with its "
            f"state, nor a Partition of them. For a wrapper around one, hand over opt.inner and "
            f"state.inner. The order is to_torch(opt, state, params)."
        )
    _check_torch_has(kind, opt)
    leaves, structure = flatten_params(params)
    none = pytree.unflatten(structure, [None] * len(leaves))
    prepared = prepare(opt, opt.rule, none, state, params)
    counts = [float(count.item()) for count in prepared.counts.tensors]
    flags = _flags(kind, opt, leaves, max(counts, default=0.0))
    names, order = name_leaves(structure), pytree.insertion_order(structure)
    _check_torch_takes(kind, leaves, names)
    entries: dict[int, dict[str, Tensor]] = {}
    given = {name: _given(name, getattr(opt, name)) for name in kind.fields}
    kept = kind.rule.kept_slots(opt)
    for place, index in enumerate(order, first):
        count = counts[index if opt.step_per_leaf else 0]
        moments = {
            slot.name: _copy_like(leaves[index], paired.leaves[index])
            for slot, paired in zip(kept, prepared.slots, strict=True)
            if kind.keeps(slot.name, leaves[index])
        }
        entry = {"step": _step(count)} if kind.counts else {}
        for name, value_at in kind.computed.items():
            entry[name] = torch.tensor(value_at(given, count), dtype=torch.float32, device="cpu")
        entry.update(moments)
        if entry and (count > 0 or any(bool(moment.any()) for moment in moments.values())):
            entries[place] = entry
    for slot in kept:
        if slot not in kind.kept_slots(given):
            raise ValueError(
                f"{slot.option} is 0, at which torch keeps no {slot.name}, and this optimizer "
                f"does. Hand over dataclasses.replace(opt, {slot.option}=0.0) and "
                f"state._replace({slot.name}=()), if that is what is meant."
            )
    return {
        **given,
        **flags,
        **{name: value for name, value in kind.constants.items() if name == "capturable"},
        **({"differentiable": opt.differentiable is True} if kind.records else {}),
        **{name: value for name, value in kind.constants.items() if name != "capturable"},
        "params": list(range(first, first + len(order))),
        "param_names": [names[index] for index in order],
    }, entries


def _check_torch_has(kind: Counterpart, opt: Any) -> None:
    """Refuse an option that torch has not."""
    for name, value in kind.beyond(opt).items():
        does = kind.lacks[name]
        raise ValueError(
            f"{type(opt).__name__}({name}={value!r}): torch.optim's has no such option. Hand over "
            f"dataclasses.replace(opt, {name}={does!r}), if that is what is meant."
        )
    if opt.differentiable is True and not kind.records:
        raise ValueError(
            f"differentiable=True: torch.optim.{type(opt).__name__} records no step. Hand over "
            f"dataclasses.replace(opt, differentiable=None), if that is what is meant."
        )
    rounding = getattr(opt, "rounding", "nearest")
    if rounding != "nearest":
        raise ValueError(
            f"rounding={rounding!r}: torch.optim rounds to the nearest number alone. Hand over "
            f"the optimizer with rounding='nearest', and its state without the key: "
            f"state._replace(key=())."
        )


def _check_torch_takes(kind: Counterpart, leaves: list[Tensor], names: list[str]) -> None:
    """Refuse a leaf that torch's class refuses."""
    for name, leaf in zip(names, leaves, strict=True):
        why = kind.refuses(leaf)
        if why is not None:
            raise ValueError(
                f"the leaf {name!r} has shape {tuple(leaf.shape)}, and {why}. Hand over the other "
                f"leaves with their state, and go on with this one here."
            )


def _flags(kind: Counterpart, opt: Any, leaves: list[Tensor], count: float) -> dict[str, bool]:
    """What torch calls the kernel."""
    refusals = {"differentiable is True": opt.differentiable is True}
    if opt.kernel != "foreach":
        refusals["a leaf is complex"] = any(map(Tensor.is_complex, leaves))
        refusals["a leaf is of 16 bits on the CPU"] = any(map(kind.fused_is_wrong, leaves))
        far = kind.counts and count >= _FLOAT32_STOPS
        refusals[f"a count is {count:.0f}, at least 2**24"] = far
    refused = next((reason for reason, holds in refusals.items() if holds), None)
    if opt.kernel in ("foreach", "fused") and refused is not None:
        raise ValueError(
            f"{refused}, which torch's {opt.kernel} kernel does not serve. Hand over "
            f"dataclasses.replace(opt, kernel='plain'), whose results differ by rounding."
        )
    fused = opt.kernel in ("auto", "native", "triton", "fused") and refused is None
    fused = fused and "fused" in kind.rule.kernels
    found = {"foreach": opt.kernel == "foreach", "fused": fused}
    return {name: found[name] for name in kind.flags}


def _given(name: str, given: Any) -> Any:
    """Return what torch has in a param group for what an optimizer was given."""
    if isinstance(given, (dict, list)):
        raise ValueError(
            f"{name} has a number for each leaf, and a state dict has one for each group. Hand "
            f"over a Partition, with an optimizer for each number."
        )
    if isinstance(given, tuple):
        return tuple(_given(f"{name}[{index}]", own) for index, own in enumerate(given))
    if given is None or isinstance(given, bool | int | str):
        return given
    if not isinstance(given, float | Tensor):
        raise ValueError(
            f"{name} is a schedule, which a state dict cannot hold. Hand over "
            f"dataclasses.replace(opt, {name.partition('[')[0]}=...) with its value at this count, "
            f"and go on with a torch.optim.lr_scheduler."
        )
    check_zero_dim(name, given)
    return float(given.detach().item()) if isinstance(given, Tensor) else given


def _copy_like(leaf: Tensor, moment: Tensor) -> Tensor:
    """A copy of a moment in the strides of its parameter, which torch's fused kernel counts on."""
    if moment.shape != leaf.shape:
        return moment.detach().clone()
    made = torch.empty_like(leaf, dtype=moment.dtype, requires_grad=False)
    return made.copy_(moment.detach())


def _step(count: float) -> Tensor:
    """A count as torch keeps it; where float32 stops, in float64, in which it can go on."""
    dtype = torch.float32 if count < _FLOAT32_STOPS else torch.float64
    return torch.tensor(count, dtype=dtype, device="cpu")
