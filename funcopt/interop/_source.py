"""What an optimizer of torch or its state dict holds, and for which parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import pytree
from ..wrappers.labels import name_leaves
from ._counterparts import COUNTERPARTS, SERVED, Counterpart, counterpart_of_group
from ._getter import unflattened
from ._peers import advice_on

# The most names in a message.
_MOST = 5


class Source(NamedTuple):
    """Param groups and their state; parameters in the order of torch, one group after the other."""

    groups: Mapping[str, Mapping[str, Any]]  # by label
    kinds: Mapping[str, Counterpart]  # whose groups they are
    owners: list[str]  # for each parameter, the label of its group
    entries: list[Mapping[str, Any]]  # for each parameter; empty if it never had a gradient
    names: list[str] | None  # of the parameters, if they were given with names
    tensors: list[Tensor] | None  # the parameters themselves, of an optimizer


def read(source: Any, group_names: Sequence[str] | None) -> Source:
    """Read an optimizer or its state dict, and make sure that it is one of those we know."""
    source = unflattened(source) or source
    if isinstance(source, torch.optim.Optimizer):
        listed, state = source.param_groups, source.state
    elif _is_state_dict(source):
        listed, state = source["param_groups"], source["state"]
    else:
        ours = isinstance(source, Mapping) and "funcopt.format" in source
        raise TypeError(
            f"the source is of type {type(source).__name__}: it must be a {SERVED} or its "
            f"state_dict(), with a dict under 'state' and a list of dicts under 'param_groups'."
            + " What to_state_dict() made is read by from_state_dict()."
            * ours
        )
    groups = dict(zip(_label(listed, group_names), listed, strict=True))
    kinds = {label: counterpart_of_group(group) for label, group in groups.items()}
    for label, group in groups.items():
        with within(f"param group {label!r}" if len(groups) > 1 else None):
            _check_kind(kinds[label], group, state)
            _check_lists_params(group)
            if len(groups) > 1 and not len(group["params"]):
                raise ValueError("it has no parameters. Take it out of 'param_groups'.")
    served = tuple(kind.torch for kind in COUNTERPARTS)
    if isinstance(source, torch.optim.Optimizer) and not isinstance(source, served):
        # One around another, as ZeroRedundancyOptimizer is, shows its groups and not its state.
        raise ValueError(
            f"the source is a {type(source).__name__}, which may keep its state elsewhere. Give "
            f"the {SERVED} itself, or the (consolidated) state_dict()."
        )
    known = [own for group in groups.values() for own in group["params"]]
    _check_listed(known, state, "group does" if len(groups) == 1 else "groups do")
    return Source(
        groups,
        kinds,
        [label for label, group in groups.items() for _ in group["params"]],
        [state.get(own, {}) for own in known],
        _names(groups),
        known if isinstance(source, torch.optim.Optimizer) else None,
    )


@contextmanager
def within(owner: str | None) -> Iterator[None]:
    """Begin the messages of errors with what they are about, unless it goes without saying."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if owner is None:
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{owner}: {error}") from error


def _is_state_dict(source: Any) -> bool:
    return (
        isinstance(source, Mapping)
        and isinstance(source.get("state"), Mapping)
        and isinstance(source.get("param_groups"), list | tuple)
        and all(isinstance(group, Mapping) for group in source["param_groups"])
    )


def _label(groups: Sequence[Mapping[str, Any]], group_names: Sequence[str] | None) -> list[str]:
    """Return a label for each group: as given, else its own name, else its number."""
    if not groups:
        raise ValueError("the source has no param groups: there is nothing to take over.")
    own = [group.get("name") for group in groups]
    labels = [name if isinstance(name, str) else str(place) for place, name in enumerate(own)]
    if group_names is not None:
        if not (
            isinstance(group_names, list | tuple)
            and all(isinstance(name, str) for name in group_names)
        ):
            raise TypeError(
                f"group_names={group_names!r}: must be a list of strings, one for each param group."
            )
        labels = list(group_names)
        if len(labels) != len(groups):
            raise ValueError(
                f"group_names={group_names!r}: the source has {len(groups)} param groups, so there "
                f"must be as many names."
            )
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise ValueError(
            f"{twice.count(twice[0])} param groups have the name {twice[0]!r}: give each one its "
            f"own, such as group_names={[str(place) for place in range(len(groups))]}."
        )
    return labels


def _check_kind(kind: Counterpart, group: Mapping[str, Any], state: Mapping[Any, Any]) -> None:
    # Others of a family lack some options: Adamax knows no amsgrad. What is there beside them
    # belongs to a scheduler, or to the user.
    lacking = [name for name in kind.options if name not in group]
    entries = [entry for entry in state.values() if isinstance(entry, Mapping) and entry]
    vector, matrix = torch.empty(1, device="meta"), torch.empty(1, 1, device="meta")
    always = {
        slot.name
        for slot in kind.rule.slots
        if not slot.option and kind.keeps(slot.name, vector) and kind.keeps(slot.name, matrix)
    }
    if lacking or not all(entry.keys() >= always for entry in entries):
        advice = advice_on(group, entries)
        if advice is not None:
            raise ValueError(f"the source is not that of a {SERVED}, but of {advice}")
    if lacking:
        raise ValueError(
            f"the source has no {_some(lacking)} in its param group: it is not that of a "
            f"{SERVED}. If an old torch wrote it, load it into that optimizer of a new one first, "
            f"and take over that."
        )
    wanted = kind.constants.get("decoupled_weight_decay")
    if wanted is not None and group.get("decoupled_weight_decay") is not wanted:
        raise ValueError(
            "whether its weight decay is decoupled, the source does not say. If it is an AdamW, "
            "or its weight decay is 0, where the two are the same, set "
            "['decoupled_weight_decay'] = True in its param group; if it is an Adam, set False."
        )


def _check_lists_params(group: Mapping[str, Any]) -> None:
    if "params" not in group:
        raise ValueError(
            "the source has no 'params' in its param group, which says whose state is whose. Give "
            "the whole state_dict() of the optimizer."
        )
    if not isinstance(group["params"], list | tuple):
        raise TypeError(
            f"'params' in the param group is of type {type(group['params']).__name__}: it must be "
            f"a list of the parameters' numbers or names, as state_dict() makes it."
        )


def _check_listed(known: Sequence[Any], state: Mapping[Any, Any], they: str) -> None:
    """Refuse state that belongs to no parameter, or to two."""
    listed = set(known)  # tensors among them are told apart by identity
    extra = [key for key in state if key not in listed]
    if extra:
        raise ValueError(
            f"the source has state for {_some(extra)}, which its param {they} not list: it is "
            f"no whole state dict of an optimizer of torch."
        )
    if len(listed) < len(known):
        twice = [own for own, times in Counter(known).items() if times > 1]
        raise ValueError(
            f"the source lists {_some(twice)} twice in its param groups: list each parameter once."
        )


def _names(groups: Mapping[str, Mapping[str, Any]]) -> list[str] | None:
    """Return the names of all parameters, if they have any."""
    found: dict[str, Sequence[str]] = {}
    for label, group in groups.items():
        known, names = list(group["params"]), group.get("param_names")
        if names is None and all(isinstance(own, str) for own in known):
            names = known  # as torch.distributed.checkpoint.state_dict writes it
        if names is None:
            continue
        if len(names) != len(known):
            with within(f"param group {label!r}" if len(groups) > 1 else None):
                raise ValueError(
                    f"the source has {len(known)} parameters and {len(names)} names for them in "
                    f"'param_names'. Leave that entry out, or give each one a name."
                )
        found[label] = names
    nameless = [label for label in groups if label not in found]
    if found and nameless:
        raise ValueError(
            f"param group {next(iter(found))!r} has 'param_names' and param group {nameless[0]!r} "
            f"has not. Leave that entry out of all groups, or give it to each."
        )
    return [name for names in found.values() for name in names] if found else None


def places(
    source: Source, leaves: list[Any], structure: pytree.Structure, *, partial: bool
) -> list[int | None]:
    """Return for each leaf where its parameter stands in the source.

    If a leaf is a parameter of the optimizer, all are matched by identity; else, if the source has
    names, by name; else by order, if the tree is flat. If `partial`, leaves may be missing in the
    source: their place is None.
    """
    own = {id(tensor): place for place, tensor in enumerate(source.tensors or [])}
    if any(id(leaf) in own for leaf in leaves):
        theirs = source.names or [f"parameter {place}" for place in range(len(source.entries))]
        ours, found = pytree.paths(structure, "params"), [own.get(id(leaf)) for leaf in leaves]
    elif source.names is not None:
        by_name = {name: place for place, name in enumerate(source.names)}
        if len(by_name) < len(source.names):
            raise ValueError("the source gives two parameters one name in 'param_names'.")
        theirs, ours = source.names, name_leaves(structure)
        found = [by_name.get(name) for name in ours]
    else:
        return [*_in_order(len(source.entries), structure)]
    _check_complete(found, theirs, ours, partial)
    return found


def _check_complete(
    found: list[int | None], theirs: list[str], ours: list[str], partial: bool
) -> None:
    lost = [label for place, label in zip(found, ours, strict=True) if place is None]
    taken = set(found)
    left = [label for place, label in enumerate(theirs) if place not in taken]
    parts = []
    if lost and not partial:
        parts.append(f"params has {_some(lost)}, which the source lacks")
    if left:
        parts.append(f"the source has {_some(left)}, which params lacks")
    if parts:
        remedy = " Of what torch does not train, say frozen='frozen'." if lost else ""
        raise ValueError(
            f"{', and '.join(parts)}. Give params the parameters that the source has, under the "
            f"same names, as dict(model.named_parameters()) does.{remedy}"
        )


def _in_order(count: int, structure: pytree.Structure) -> list[int]:
    if structure.num_nodes - structure.num_leaves > 1:  # not one node and its leaves
        raise ValueError(
            "the source has no names for its parameters, and params is a nested tree, whose order "
            "is not certain to be theirs. Build the optimizer from model.named_parameters(), or "
            "give params as dict(model.named_parameters())."
        )
    if structure.num_leaves != count:
        raise ValueError(
            f"the source has {count} parameters, params has {structure.num_leaves}: without names "
            f"they are matched by order, so there must be as many. Give params as "
            f"dict(model.named_parameters())."
        )
    order = [0] * count
    for place, index in enumerate(pytree.insertion_order(structure)):
        order[index] = place
    return order


def _some(found: Sequence[Any]) -> str:
    shown = ", ".join(
        repr(each) if isinstance(each, str | int) else "a tensor" for each in found[:_MOST]
    )
    return shown if len(found) <= _MOST else f"{shown}, ... ({len(found)} in all)"
