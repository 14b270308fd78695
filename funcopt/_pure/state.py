"""The state of a class leaf by leaf: as the class keeps it, and as trees of tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, optim

from .._core import pytree, transforms
from .._core.types import Tree, kind_of
from .source import Kind, build, explained, is_of_torch, name_of, sentence


class LeafState(NamedTuple):
    """The state of one leaf, by the names that the class has for what is in it.

    Attributes:
        slots: The tensors.
        numbers: The Python numbers, as tensors of shape ().
        made: For each of the slots that the first step makes of the gradient, whether it did.
    """

    slots: dict[str, Tensor]
    numbers: dict[str, Tensor]
    made: dict[str, Tensor]

    def as_kept(self) -> dict[str, Any]:
        """Return what the class finds in its `state[param]`, which are these very tensors."""
        there = {n: own for n, own in self.slots.items() if n not in self.made or is_made(self)}
        return there | {name: _as_number(number) for name, number in self.numbers.items()}

    def after(self, kept: Mapping[str, Any], owner: str) -> LeafState:
        """Return the state that a class left in `state[param]` after a step.

        Raises:
            RuntimeError: If it is not like the one before, so that it would be another tree.
        """
        tensors = {name: own for name, own in kept.items() if isinstance(own, Tensor)}
        others = {name: own for name, own in kept.items() if name not in tensors}
        # What a first step is to make, and did not, as of SGD while its momentum is 0.
        waiting = self.made.keys() - tensors.keys()
        tensors |= {name: self.slots[name] for name in waiting}
        if tensors.keys() != self.slots.keys() or others.keys() != self.numbers.keys():
            names = sorted(kept.keys() ^ (self.slots.keys() | self.numbers.keys()))
            raise RuntimeError(
                f"{owner} changed what it keeps for a parameter in this step: "
                f"{pytree.some(names) or 'a number became a tensor'}. Here a state is one tree, "
                f"from init() on. Use the class itself."
            )
        for name, own in tensors.items():
            old = self.slots[name]
            if own.shape != old.shape or own.dtype != old.dtype:
                raise RuntimeError(
                    f"{owner} made of state.slots[{name!r}], {kind_of(old)}, one {kind_of(own)}. "
                    f"Make the state with init() of this optimizer from these parameters."
                )
            if own.stride() != old.stride() and not transforms.transformed():
                tensors[name] = torch.empty_like(old).copy_(own)  # not as the gradient lies
        numbers = {name: _as_tensor(name, own) for name, own in others.items()}
        made = {n: own if n in waiting else torch.ones_like(own) for n, own in self.made.items()}
        return LeafState(tensors, numbers, made)


def check_has_state(kind: Kind, values: Mapping[str, Any], states: Sequence[LeafState]) -> None:
    """Refuse states to which one of torch's classes would add something during its step.

    They would be found out when the step was made, and in place it would be half-written then.

    Raises:
        RuntimeError: If a leaf has no state, or SGD with momentum no buffer.
    """
    if not is_of_torch(kind):
        return
    is_sgd = issubclass(kind, optim.SGD)
    if is_sgd and _is_zero(values.get("momentum", 0)):
        return
    for own in states:
        if "momentum_buffer" not in own.slots if is_sgd else not own.slots:
            missing = "momentum_buffer" if is_sgd else "what it goes by"
            raise RuntimeError(
                f"{name_of(kind)} looks for {missing} in the state of a parameter, which has none. "
                f"Make the state with init() of this optimizer."
            )


def _is_zero(number: object) -> bool:
    return isinstance(number, int | float) and number == 0


def is_made(state: LeafState) -> bool:
    """Whether the first step of a leaf was made; the members of a vmap must agree on it.

    Raises:
        RuntimeError: If it cannot be read.
    """
    for flag in state.made.values():
        values = transforms.values_at_hand(flag)
        if values is None and transforms.readable():
            values = [float(flag.item())]
        if not values or len(set(values)) > 1:
            raise RuntimeError(
                "state.made cannot be read here, and says whether a step is the first of its leaf: "
                "operators are being recorded, or members of a vmap differ in it. Make the first "
                "update outside."
            )
        if not values[0]:
            return False
    return True


def _as_number(number: Tensor) -> Any:
    """Return a Python number; the tensor, in float64, if it cannot be read or members differ."""
    values = transforms.values_at_hand(number)
    if values is None and transforms.readable():
        values = [number.item()]
    if not values or len(set(values)) > 1:
        return number.double()
    if number.dtype is torch.bool:
        return bool(values[0])
    return float(values[0]) if number.is_floating_point() else int(values[0])


def _as_tensor(name: str, value: Any) -> Tensor:
    for kind, dtype in ((bool, torch.bool), (int, torch.int64), (float, torch.float64)):
        if isinstance(value, kind):
            return torch.tensor(value, dtype=dtype, device="cpu")
    raise TypeError(
        f"state[param][{name!r}] is {kind_of(value)}: what a class keeps for a parameter must be "
        f"tensors and numbers, which can be mapped over and saved. Use the class itself."
    )


def initial(
    kind: Kind,
    params: Sequence[Tensor],
    values: Mapping[str, Any],
    path: Callable[[int], str],
) -> list[LeafState]:
    """Return what a class keeps for each parameter before its first step.

    Torch's own classes make it in `_init_group`, which computes nothing. Of any other class one
    step is made with copies, and what it first puts under each name is its state before.

    Raises:
        TypeError: If it keeps what is no tensor and no number, or keeps it elsewhere.
        ValueError: If the class refuses a parameter.
    """
    own = [param.detach() for param in params]
    if is_of_torch(kind):
        return [_of_torch(kind, param, values, path(i)) for i, param in enumerate(own)]
    return _watched(kind, own, values) if own else []


def _of_torch(kind: Kind, param: Tensor, values: Mapping[str, Any], path: str) -> LeafState:
    """Return what a class of torch makes for a parameter.

    Of the gradient it looks at the kind alone, in place of which there is the parameter itself. A
    momentum that is a tensor may be filled with another, and differ between members: what there
    is for it is there if it is 0, too.
    """
    param.grad = param.detach()
    if isinstance(values.get("momentum"), Tensor):
        values = {**values, "momentum": _SOME_MOMENTUM}
    try:
        opt = build(kind, [param], values)
        initialize: Any = opt._init_group  # type: ignore[attr-defined]
        lists: list[list[Any]] = [[] for _ in inspect.signature(initialize).parameters][1:]
        initialize(opt.param_groups[0], *lists)
    except Exception as error:
        if transforms.transformed():
            raise RuntimeError(explained(kind, error)) from error
        raise ValueError(
            f"{name_of(kind)} refuses {path}: {sentence(error)} Let another optimizer move what it "
            f"does not take: Partition({{'some': pure(...), 'others': ...}}, labels)."
        ) from error
    param.grad = None
    slots, made = {name: own.clone() for name, own in opt.state[param].items()}, {}
    if issubclass(kind, optim.SGD) and values.get("momentum", 0) != 0:  # which copies the gradient
        slots["momentum_buffer"] = torch.zeros_like(param)
        made["momentum_buffer"] = _not_yet()
    return LeafState(slots, {}, made)


_SOME_MOMENTUM = 0.5


def _not_yet() -> Tensor:
    return torch.zeros((), dtype=torch.bool, device="cpu")


class _FirstValues(dict[str, Any]):
    """A dict that remembers what was first put under each name, as it was then."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self.first and value is not None:
            copied = value.detach().clone() if isinstance(value, Tensor) else value
            self.first[name] = copied
        super().__setitem__(name, value)

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value


# Such that nothing that is computed of them is the same, nor anything divided by 0.
_ONE_GRADIENT, _ANOTHER = 1.0, -2.0


def _watched(kind: Kind, params: list[Tensor], values: Mapping[str, Any]) -> list[LeafState]:
    """Return what is first put into the state; zeros, not made yet, for what is a gradient's."""
    stand_ins = [torch.ones(p.shape, dtype=p.dtype, device=p.device) for p in params]
    one = _first_values(kind, stand_ins, values, _ONE_GRADIENT)
    other = _first_values(kind, stand_ins, values, _ANOTHER)
    found = _first_values(kind, params, values, _ONE_GRADIENT)
    return [_first(*own) for own in zip(found, one, other, strict=True)]


def _first(found: Mapping[str, Any], one: Mapping[str, Any], other: Mapping[str, Any]) -> LeafState:
    slots, numbers, made = {}, {}, {}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            numbers[name] = _as_tensor(name, value)
            continue
        slots[name] = value
        if name not in one or name not in other or not _are_alike(one[name], other[name]):
            slots[name], made[name] = torch.zeros_like(value), _not_yet()
    return LeafState(slots, numbers, made)


def _are_alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _first_values(
    kind: Kind, params: list[Tensor], values: Mapping[str, Any], gradient: float
) -> list[dict[str, Any]]:
    """Return what a class first puts into the state of each parameter, in a step of copies."""
    own = [param.clone() for param in params]
    opt = build(kind, own, values)
    watched = {param: _FirstValues() for param in own}
    for param in own:
        watched[param].update(opt.state.get(param, {}))
        param.grad = torch.full_like(param, gradient)
    opt.state.update(watched)
    before = outside_of_state(opt)
    try:
        opt.step()
    except Exception as error:
        raise RuntimeError(explained(kind, error)) from error
    check_keeps_nothing_else(opt, before)
    return [watched[param].first for param in own]


def outside_of_state(opt: optim.Optimizer) -> dict[str, Any]:
    """Return the numbers of an instance that are in no `state[param]`, by where they are."""
    found = {f"self.{name}": value for name, value in vars(opt).items()}
    for group in opt.param_groups:
        found |= {f"param_groups[0][{name!r}]": own for name, own in group.items()}
    return {name: own for name, own in found.items() if isinstance(own, int | float | Tensor)}


def check_keeps_nothing_else(opt: optim.Optimizer, before: Mapping[str, Any]) -> None:
    """Refuse a class that keeps what it goes by outside of `state[param]`.

    Raises:
        TypeError: If a step changed a number or a tensor elsewhere.
    """
    after = outside_of_state(opt)
    changed = [name for name in after if name not in before or _differ(before[name], after[name])]
    if changed:
        raise TypeError(
            f"{name_of(type(opt))} keeps {pytree.some(changed)} from step to step: what is not in "
            f"state[param] would be lost between updates. Use the class itself."
        )


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is not other
    return bool(one != other)


Fields: TypeAlias = tuple[dict[str, Tree], dict[str, Tree], dict[str, Tree]]
"""Slots, numbers and flags as trees, by name."""


def as_trees(states: Sequence[LeafState], build_tree: Callable[[list[Any]], Tree]) -> Fields:
    """Return the states of leaves as trees; `()` stands where a leaf has none."""

    def trees(field: list[dict[str, Tensor]]) -> dict[str, Tree]:
        names = dict.fromkeys(name for own in field for name in own)
        return {name: build_tree([own.get(name, ()) for own in field]) for name in names}

    slots, numbers, made = ([own[index] for own in states] for index in range(3))
    return trees(slots), trees(numbers), trees(made)
