"""From `torch.optim.AdamW` to a value and its state, and back to a state dict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _tree
from .._adamw import AdamW, AdamWState
from .._hyperparameters import check_zero_dim
from .._labels import name_leaves
from .._types import Number, Schedule, Tree
from .._work import flatten_params, gather
from ._source import places, read

__all__ = ["from_torch", "to_torch"]

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

# From here on float32, in which torch counts, no longer holds every count.
_FLOAT32_STOPS = 2**24


def from_torch(
    source: torch.optim.Optimizer | Mapping[str, Any],
    params: Tree,
    *,
    step_per_leaf: bool | None = None,
) -> tuple[AdamW, AdamWState]:
    """Take over a run of `torch.optim.AdamW`: return the optimizer and its state.

    Going on with them gives the bits that torch would have, in float32 and float64, and for complex
    leaves, unless the source is capturable (and not fused) or differentiable or has a tensor for a
    hyperparameter: it then computes some of its numbers in another order or in float32, funcopt in
    float64.

    Parameters and state are matched by identity if `params` has the tensors of the optimizer
    itself; else by name, if the source was built from `named_parameters()`, where the name of a
    leaf in a nested tree is its keys joined by dots; else by order, if `params` is flat, where the
    order is that in which a dict was filled, as `dict(model.named_parameters())` is. (torch itself
    always goes by order, whatever the names.) Each moment must have its parameter's shape and
    dtype, and is moved to its device.

    The kernel is the one that the source used: fused, foreach, or plain for neither. Where both
    flags are None, torch takes foreach if all parameters are on CUDA, and lr is no tensor, and
    plain elsewhere; so does this. Tensors among the hyperparameters stay tensors, and
    `differentiable=False` becomes None, the default. A scheduler is no part of the optimizer: lr is
    what it is at the moment. A parameter without an entry in the source's state is one that never
    had a gradient: torch writes none for it.

    Args:
        source: The optimizer, or what its `state_dict()` gave. It is not changed, and nothing that
            is returned shares its memory.
        params: The parameters: `dict(model.named_parameters())`, or any tree of them.
        step_per_leaf: Whether each leaf is to have its own count, as in torch. None: if counts
            differ, or only some parameters ever had a gradient. Where all counts are the same, but
            gradients may be None later on, say True to go on exactly as torch would.

    Raises:
        TypeError: If the source is neither, or a hyperparameter or leaf is of the wrong type.
        ValueError: If the source is no AdamW (Adam, say), or has several param groups; if a
            parameter is missing, extra, on the meta device, or of another shape or dtype, or the
            order is not certain;
            if its state is incomplete; or if counts differ and `step_per_leaf` is False.

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
    """
    leaves, structure = flatten_params(params)
    theirs = read(source)
    entries = [theirs.entries[place] for place in places(theirs, leaves, structure)]
    amsgrad = theirs.options["amsgrad"]
    path = partial(_tree.path, structure, "params")
    for index, (leaf, entry) in enumerate(zip(leaves, entries, strict=True)):
        if leaf.is_meta:
            raise ValueError(
                f"{path(index)} is on the meta device, where its moments would hold no values. "
                f"Give the parameters where they are to be trained."
            )
        _check_entry(entry, leaf, amsgrad, path, index)
    counts = [_count(entry, path, index) for index, entry in enumerate(entries)]
    uneven = len(set(counts)) > 1
    if uneven and step_per_leaf is False:
        raise ValueError(
            f"step_per_leaf=False: the source made {min(counts):g} updates of one parameter and "
            f"{max(counts):g} of another. Leave step_per_leaf out, or say True."
        )
    opt = _optimizer(theirs.options, leaves, uneven if step_per_leaf is None else step_per_leaf)
    state = opt.init(params)
    for step, count in zip(_tree.flatten(state.step)[0], counts, strict=False):
        step.fill_(count)
    with torch.no_grad():
        for name in _MOMENTS[: 3 if amsgrad else 2]:
            moments = _tree.flatten(getattr(state, name))[0]
            for moment, entry in zip(moments, entries, strict=True):
                if entry:
                    moment.copy_(entry[name])
    return opt, state


def _check_entry(
    entry: Mapping[str, Any], leaf: Tensor, amsgrad: bool, path: Callable[[int], str], index: int
) -> None:
    """Refuse the state of a parameter that is not all there, or not of this parameter."""
    wanted = {"step", *_MOMENTS[: 3 if amsgrad else 2]}
    if entry and entry.keys() != wanted:
        lacks, extra = sorted(wanted - entry.keys()), sorted(entry.keys() - wanted)
        found = [f"lacks {', '.join(lacks)}"] * bool(lacks)
        found += [f"has {', '.join(map(str, extra))} beyond it"] * bool(extra)
        raise ValueError(
            f"the state for {path(index)} {' and '.join(found)}: with amsgrad={amsgrad} it is "
            f"{', '.join(sorted(wanted))}."
        )
    for name in wanted.intersection(entry) - {"step"}:
        moment = entry[name]
        if not isinstance(moment, Tensor):
            raise TypeError(
                f"{name} for {path(index)} is of type {type(moment).__name__}, not a tensor."
            )
        for what in ("shape", "dtype", "layout"):
            has, needed = getattr(moment, what), getattr(leaf, what)
            if has != needed:
                raise ValueError(
                    f"{name} for {path(index)}: {what} {_show(has)}, the parameter has "
                    f"{_show(needed)}. Is it that of another parameter, or another model?"
                )


def _count(entry: Mapping[str, Any], path: Callable[[int], str], index: int) -> float:
    step = entry.get("step", 0.0)
    count = float(step.item()) if isinstance(step, Tensor) and step.numel() == 1 else step
    if not isinstance(count, float | int) or not (count >= 0 and count == count // 1):
        raise ValueError(
            f"step for {path(index)} is {step!r}: a count of updates is a whole number, at least 0."
        )
    return float(count)


def _optimizer(options: Mapping[str, Any], leaves: list[Tensor], step_per_leaf: bool) -> AdamW:
    betas = options["betas"]
    return AdamW(
        lr=_own(options["lr"]),
        betas=tuple(map(_own, betas)) if isinstance(betas, tuple | list) else betas,
        eps=_own(options["eps"]),
        weight_decay=_own(options["weight_decay"]),
        amsgrad=options["amsgrad"],
        maximize=options["maximize"],
        step_per_leaf=step_per_leaf,
        kernel=_kernel(options, leaves),
        differentiable=True if options["differentiable"] else None,
    )


def _own(number: Any) -> Any:
    """Return a copy of a tensor, which in torch may have one dimension; and a number as it is."""
    if not isinstance(number, Tensor):
        return number
    return number.detach().clone().reshape(() if number.numel() == 1 else number.shape)


def _kernel(options: Mapping[str, Any], leaves: list[Tensor]) -> str:
    """The kernel that torch takes, by its own rule."""
    foreach, fused = options["foreach"], options["fused"]
    if foreach is None and fused is None:
        foreach = (
            all(leaf.is_cuda for leaf in leaves)
            and not options["differentiable"]
            and (options["capturable"] or not isinstance(options["lr"], Tensor))
        )
    return "fused" if fused else "foreach" if foreach else "plain"


def to_torch(opt: AdamW, state: AdamWState, params: Tree) -> dict[str, Any]:
    """Hand a run over to torch: return a state dict that `torch.optim.AdamW` loads.

    Going on there gives the bits that `update` would have, in float32 and float64, for the same
    kernel and unless `differentiable` is True; but without `step_per_leaf` only while every leaf
    has a gradient, since torch counts the updates of each parameter. `load_state_dict` takes the
    options from the dict too, the kernel among them. `"auto"` and `"triton"` are handed over as
    `fused=True`, which is what `"auto"` runs on the CPU. Where torch's fused kernel refuses, they
    become both flags False, and the results of all leaves differ by rounding: if a leaf is complex,
    `differentiable` is True, or a count is 2**24 or more.

    A scheduler that keeps numbers of its own in the param group, as OneCycleLR does, loses them
    when the dict is loaded, since they are no part of an AdamW. Keep them by adding what lacks:
    `d["param_groups"][0] = {**theirs.param_groups[0], **d["param_groups"][0]}` before.

    torch loads by order, not by name: the parameters of its optimizer must come in the order of
    `params`, where that of a dict is the order in which it was filled, `model.parameters()`'s own
    for `dict(model.named_parameters())`. Tensors among the hyperparameters are handed over as
    numbers. A parameter that was never updated has no entry, as in torch.

    Args:
        opt: The optimizer.
        state: Its state. Nothing that is returned shares its memory.
        params: The parameters.

    Raises:
        TypeError: If `opt` or `state` is not AdamW's.
        ValueError: If a hyperparameter is a schedule or stacked, if state and parameters do not
            match, if two leaves have one name, or if torch's kernel of the name that was asked for
            cannot go on: fused refuses complex leaves and counts to 2**24, and neither it nor
            foreach serves `differentiable`.

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
    """
    if not isinstance(opt, AdamW) or not isinstance(state, AdamWState):
        raise TypeError(
            f"got {type(opt).__name__} and {type(state).__name__}: torch.optim.AdamW can go on "
            f"from an AdamW and its AdamWState. The order is to_torch(opt, state, params)."
        )
    leaves, structure = flatten_params(params)
    none = _tree.unflatten(structure, [None] * len(leaves))
    work = gather(none, state, params, amsgrad=opt.amsgrad, step_per_leaf=opt.step_per_leaf)
    counts = [float(count.item()) for count in work.counts.tensors]
    flags = _flags(opt, leaves, max(counts, default=0.0))
    names, order = name_leaves(structure), _tree.insertion_order(structure)
    entries: dict[int, dict[str, Tensor]] = {}
    for place, index in enumerate(order):
        count = counts[index if opt.step_per_leaf else 0]
        moments = [_laid_out_as(leaves[index], paired.leaves[index]) for paired in work.moments]
        if count > 0 or any(bool(moment.any()) for moment in moments):
            entries[place] = {"step": _step(count), **dict(zip(_MOMENTS, moments, strict=False))}
    group = {
        "lr": _number("lr", opt.lr),
        "betas": (_number("betas[0]", opt.betas[0]), _number("betas[1]", opt.betas[1])),
        "eps": _number("eps", opt.eps),
        "weight_decay": _number("weight_decay", opt.weight_decay),
        "amsgrad": opt.amsgrad,
        "maximize": opt.maximize,
        **flags,
        "capturable": False,
        "differentiable": opt.differentiable is True,
        "decoupled_weight_decay": True,
        "params": list(range(len(order))),
    }
    if not all(name.isdigit() or not name for name in names):  # of a list, or a tensor alone
        group["param_names"] = [names[index] for index in order]
    return {"state": entries, "param_groups": [group]}


def _flags(opt: AdamW, leaves: list[Tensor], count: float) -> dict[str, bool]:
    """What torch calls the kernel."""
    refusals = {
        "a leaf is complex": any(map(Tensor.is_complex, leaves)),
        "differentiable is True": opt.differentiable is True,
        "a count is 2**24 or more": count >= _FLOAT32_STOPS,
    }
    refused = next((reason for reason, holds in refusals.items() if holds), None)
    of_foreach = opt.kernel == "foreach" and opt.differentiable is True
    if of_foreach or (opt.kernel == "fused" and refused is not None):
        raise ValueError(
            f"{refused}, which torch's {opt.kernel} kernel does not serve. Hand over "
            f"dataclasses.replace(opt, kernel='plain'), whose results differ by rounding."
        )
    fused = opt.kernel in ("auto", "triton", "fused") and refused is None
    return {"foreach": opt.kernel == "foreach", "fused": fused}


def _number(name: str, given: Number | Schedule) -> float:
    if not isinstance(given, float | Tensor):
        raise ValueError(
            f"{name} is a schedule, which a state dict cannot hold. Hand over "
            f"dataclasses.replace(opt, {name}=...) with its value at this count, and go on with a "
            f"torch.optim.lr_scheduler."
        )
    check_zero_dim(name, given)
    return float(given.detach().item()) if isinstance(given, Tensor) else given


def _laid_out_as(leaf: Tensor, moment: Tensor) -> Tensor:
    """A copy of a moment in the strides of its parameter, which torch's fused kernel counts on."""
    return torch.empty_like(leaf, requires_grad=False).copy_(moment.detach())


def _step(count: float) -> Tensor:
    """A count as torch keeps it; where float32 stops, in float64, in which it can go on."""
    return torch.tensor(count, dtype=torch.float32 if count < _FLOAT32_STOPS else torch.float64)


def _show(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)
