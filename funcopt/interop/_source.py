"""What a `torch.optim.AdamW` or its state dict holds, and for which parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._labels import name_leaves

__all__ = ["Source", "places", "read"]

# What a param group of AdamW has. Others of the family lack some of it: RAdam and NAdam know no
# amsgrad. What is there beside it belongs to a scheduler.
_OPTIONS = (
    *("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"),
    *("foreach", "fused", "capturable", "differentiable"),
)

# The most names in a message.
_MOST = 5


class Source(NamedTuple):
    """One param group and its state."""

    options: Mapping[str, Any]
    entries: list[Mapping[str, Any]]  # for each parameter; empty if it never had a gradient
    names: list[str] | None  # of the parameters, if they were given with names
    tensors: list[Tensor] | None  # the parameters themselves, of an optimizer


def read(source: Any) -> Source:
    """Read an optimizer or its state dict, and make sure that it is an AdamW.

    Raises:
        TypeError: If it is neither.
        ValueError: If it is that of another optimizer, or has several param groups, or state that
            belongs to no parameter.
    """
    if isinstance(source, torch.optim.Optimizer):
        group, state = _only(source.param_groups), source.state
        tensors = list(group["params"])
    elif _is_state_dict(source):
        group, state, tensors = _only(source["param_groups"]), source["state"], None
    else:
        raise TypeError(
            f"the source is of type {type(source).__name__}: it must be a torch.optim.AdamW or its "
            f"state_dict(), with a dict under 'state' and a list of dicts under 'param_groups'."
        )
    _check_is_adamw(group)
    if tensors is not None and not isinstance(source, torch.optim.Adam | torch.optim.AdamW):
        # One around an AdamW, as ZeroRedundancyOptimizer is, shows its groups and not its state.
        raise ValueError(
            f"the source is a {type(source).__name__}, which may keep its state elsewhere. Give "
            f"the torch.optim.AdamW itself, or the (consolidated) state_dict()."
        )
    known = list(group["params"])
    listed = set(known)  # tensors among them are told apart by identity
    extra = [key for key in state if key not in listed]
    if extra:
        raise ValueError(
            f"the source has state for {_some(extra)}, which its param group does not list: it is "
            f"no whole state dict of torch.optim.AdamW."
        )
    names = group.get("param_names")
    if names is None and known and all(isinstance(own, str) for own in known):
        names = known  # as torch.distributed.checkpoint.state_dict writes it
    if names is not None and len(names) != len(known):
        raise ValueError(
            f"the source has {len(known)} parameters and {len(names)} names for them in "
            f"'param_names'. Leave that entry out, or give each one a name."
        )
    entries = [state.get(own, {}) for own in known]
    return Source(group, entries, None if names is None else list(names), tensors)


def _is_state_dict(source: Any) -> bool:
    return (
        isinstance(source, Mapping)
        and isinstance(source.get("state"), Mapping)
        and isinstance(source.get("param_groups"), list | tuple)
        and all(isinstance(group, Mapping) for group in source["param_groups"])
    )


def _only(groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    if len(groups) == 1:
        return groups[0]
    shared = set.intersection(*(set(group) for group in groups)) if groups else set()
    differ = sorted(
        key
        for key in shared.difference(("params", "param_names"))
        if any(str(group[key]) != str(groups[0][key]) for group in groups)
    )
    how = f"which differ in {', '.join(differ)}" if differ else "which agree in every option"
    raise ValueError(
        f"the source has {len(groups)} param groups{f', {how}' if groups else ''}: only a source "
        f"with one can be taken over. Groups with options of their own are not served yet."
    )


def _check_is_adamw(group: Mapping[str, Any]) -> None:
    lacking = [name for name in _OPTIONS if name not in group]
    if lacking:
        raise ValueError(
            f"the source has no {_some(lacking)} in its param group: it is not that of a "
            f"torch.optim.AdamW. If an old torch wrote it, load it into torch.optim.AdamW of a new "
            f"one first, and take over that."
        )
    decoupled = group.get("decoupled_weight_decay")
    if decoupled is not True:
        has = "does not say" if decoupled is None else f"says {decoupled}, as torch.optim.Adam does"
        raise ValueError(
            f"whether its weight decay is decoupled, the source {has}: only AdamW's is served. If "
            f"it is an AdamW, or its weight decay is 0, where the two are the same, set "
            f"['decoupled_weight_decay'] = True in its param group."
        )


def places(source: Source, leaves: list[Tensor], structure: _tree.Structure) -> list[int]:
    """Return for each leaf where its parameter stands in the source.

    If a leaf is a parameter of the optimizer, all are matched by identity; else, if the source has
    names, by name; else by order, if the tree is flat.

    Raises:
        ValueError: If a leaf or a parameter has no counterpart, or there is no sound order.
    """
    own = {id(tensor): place for place, tensor in enumerate(source.tensors or [])}
    if any(id(leaf) in own for leaf in leaves):
        labels = source.names or [f"parameter {place}" for place in range(len(source.entries))]
        found = [own.get(id(leaf)) for leaf in leaves]
        return _complete(found, labels, _tree.paths(structure, "params"))
    if source.names is not None:
        own_names = {name: place for place, name in enumerate(source.names)}
        if len(own_names) < len(source.names):
            raise ValueError("the source gives two parameters one name in 'param_names'.")
        labels = name_leaves(structure)
        return _complete([own_names.get(name) for name in labels], source.names, labels)
    return _in_order(len(source.entries), structure)


def _complete(found: list[int | None], theirs: list[str], ours: list[str]) -> list[int]:
    lost = [label for place, label in zip(found, ours, strict=True) if place is None]
    taken = set(found)
    left = [label for place, label in enumerate(theirs) if place not in taken]
    if lost or left:
        parts = []
        if lost:
            parts.append(f"params has {_some(lost)}, which the source lacks")
        if left:
            parts.append(f"the source has {_some(left)}, which params lacks")
        raise ValueError(
            f"{', and '.join(parts)}. Give params the parameters that the source has, under the "
            f"same names, as dict(model.named_parameters()) does."
        )
    return [place for place in found if place is not None]


def _in_order(count: int, structure: _tree.Structure) -> list[int]:
    if not _tree.is_flat(structure):
        raise ValueError(
            "the source has no names for its parameters, and params is a nested tree, whose order "
            "is not certain to be theirs. Build the optimizer from model.named_parameters(), or "
            "give params as dict(model.named_parameters())."
        )
    if structure.num_leaves != count:
        raise ValueError(
            f"the source has {count} parameters, params has {structure.num_leaves}: without names "
            f"they are matched by order, so there must be as many."
        )
    order = [0] * count
    for place, index in enumerate(_tree.insertion_order(structure)):
        order[index] = place
    return order


def _some(found: Sequence[Any]) -> str:
    shown = ", ".join(
        repr(each) if isinstance(each, str | int) else "a tensor" for each in found[:_MOST]
    )
    return shown if len(found) <= _MOST else f"{shown}, ... ({len(found)} in all)"
