"""What the getters of `torch.distributed.checkpoint.state_dict` make of an optimizer."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .._core import pytree
from .._dtensor.shards import dtensor, local_part
from ._counterparts import COUNTERPARTS

_SECTIONS = ("state", "param_groups")


def unflattened(source: Any) -> dict[str, Any] | None:
    """Return the nested state dict that `flatten_optimizer_state_dict=True` laid out flat.

    There, each parameter has its options to itself. Those that have the same ones are a group here,
    in the order in which the first of them comes. Of what is no such dict, None is returned.
    """
    if not isinstance(source, Mapping) or len(source) == 0:
        return None
    sections: dict[str, dict[str, dict[str, Any]]] = {section: {} for section in _SECTIONS}
    for key, value in source.items():
        section, _, path = key.partition(".") if isinstance(key, str) else ("", "", "")
        name, dot, field = path.rpartition(".")
        if section not in sections or not dot:
            return None
        sections[section].setdefault(name, {})[field] = value
    groups: list[dict[str, Any]] = []
    for name, options in sections["param_groups"].items():
        for group in groups:
            if _are_same({**group, "params": None}, {**options, "params": None}):
                group["params"].append(name)
                break
        else:
            groups.append({**options, "params": [name]})
    return {"state": sections["state"], "param_groups": groups}


def _are_same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_are_same(one[key], other[key]) for key in one)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (
            one.dtype is other.dtype and one.device == other.device and torch.equal(one, other)
        )
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_are_same, one, other))
    return type(one) is type(other) and bool(one == other)


def _here(moment: Tensor) -> Tensor:
    """Return what of a moment lies in this process."""
    kind = dtensor()
    return local_part(moment) if kind is not None and isinstance(moment, kind) else moment


def warn_if_made_up(states: Iterable[Any]) -> None:
    """Warn if states have counts and no moments, as torch's getters make of an optimizer at rest.

    Of one that has made no step yet they make a step with gradients of zero, so that there is a
    state to load into. Each group of the source has a state of its own.
    """
    counting = tuple(kind.rule.state for kind in COUNTERPARTS if kind.counts)
    own: list[Any] = [state for state in states if isinstance(state, counting)]
    moments = [moment for state in own for moment in pytree.flatten(tuple(state[1:]))[0]]
    parts = [part for part in map(_here, moments) if part.numel() > 0]
    if not parts or any(bool(part.any()) for part in parts):
        return
    most = max(float(count.item()) for state in own for count in pytree.flatten(state.step)[0])
    if most < 1:
        return
    warnings.warn(
        f"the source counts {most:.0f} update{'s' if most > 1 else ''}, and all its moments are 0. "
        f"The getters of torch.distributed.checkpoint.state_dict make such a state of an optimizer "
        f"that has made no step. The next update would then not have the size of a first one (with "
        f"the default betas 0.744 of it, after a count of 1): if so, begin with opt.init(params) "
        f"in place of this state. If all gradients were 0, it is as it should be.",
        stacklevel=_levels_to_caller(),
    )


def _levels_to_caller() -> int:
    """Return how many frames lie between a warning of `warn_if_made_up` and who called funcopt."""
    frame: FrameType | None = sys._getframe(1)
    levels = 1
    package = __name__.partition(".")[0]
    while frame and str(frame.f_globals.get("__name__")).partition(".")[0] == package:
        frame, levels = frame.f_back, levels + 1
    return levels
