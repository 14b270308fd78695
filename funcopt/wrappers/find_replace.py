"""Reading and editing nested states and optimizers, without knowing how they are nested."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._core import pytree
from .._core.inner import OptimizerLike
from .._core.types import Optimizer, Tree
from .._core.walk import Change, Place, Step, children, edited, text, walk
from .._engine.hyperparameters import call_schedule

TreeT = TypeVar("TreeT")

# What a state calls the count at which its optimizer calls a schedule.
_COUNTS = ("step", "n_averaged")


def find(
    tree: Tree, what: str | type, opt: OptimizerLike[Any] | None = None, *, within: str = ""
) -> dict[str, Any]:
    """Return what is called so, or is of that class, wherever it is in a state or an optimizer.

    The walk goes through every NamedTuple, dataclass, mapping, list and tuple, so that it knows
    whatever optimizers and wrappers there are. It reads no value: it works under `torch.func`'s
    transforms, in a compiled function, and without waiting for a GPU.

    Args:
        tree: A state or an optimizer.
        what: The name of a field, such as `"momentum_buffer"`, `"norm"` or `"lr"`, or a class, such
            as `SGDState` or `Clip`.
        opt: The optimizer to which the state belongs. With it the names of hyperparameters are
            found too, as what they are at the next update: a schedule is called with the count in
            its optimizer's own state, and gives a tree of numbers where each leaf has its count.
        within: Where to look: the path of a part, such as `"inner.inner['decay']"`, or the label of
            a group, such as `"decay"`.

    Returns:
        What was found, by its path: the Python expression that reaches it, as in messages and in
        checkpoints, without the root. The path of the whole is `""`. That of a hyperparameter is
        its path in the optimizer.

    Raises:
        KeyError: If there is no such thing. The message says what there is.
        TypeError: If `what` is neither a name nor a class, or `opt` is no optimizer.
        ValueError: If the state is not that of `opt`.

    Example:
        >>> import torch, funcopt
        >>> from funcopt.schedules import Linear
        >>> body = funcopt.SGD(lr=Linear(start=0.0, end=1.0, steps=10))
        >>> groups = {"body": body, "head": funcopt.SGD(lr=0.1, momentum=0.9)}
        >>> opt = funcopt.Clip(funcopt.Partition(groups, ["body", "head"]), max_norm=1.0)
        >>> params = [torch.zeros(2), torch.zeros(1)]
        >>> params, state = opt.update(params, opt.init(params), params)
        >>> for path, lr in funcopt.find(state, "lr", opt).items():
        ...     print(f"{path}: {float(lr):.2f}")
        inner.inner['body'].lr: 0.10
        inner.inner['head'].lr: 0.10
        >>> funcopt.find(state, "momentum_buffer", within="head")
        {"inner.inner['head'].momentum_buffer": {'1': tensor([0.])}}
        >>> [norm] = funcopt.find(state, "norm").values()
        >>> norm
        tensor(0.)
    """
    _check_what(what)
    places = list(walk(tree, ()))
    if opt is not None:
        if not isinstance(opt, Optimizer) or isinstance(opt, type):
            raise TypeError(
                f"opt={opt!r}: must be the optimizer to which the state belongs. The order is "
                f"find(state, what, opt)."
            )
        places.extend(_hyperparameters(opt, tree, (), what))
    found: dict[str, Any] = {}
    for place in places:
        if place.matches(what) and place.is_within(within):
            found.setdefault(text(place.steps), place.value)
    if not found:
        raise KeyError(_nothing(what, within, tree, places, editing=False))
    return found


def replace(tree: TreeT, what: str | type, new: Any, within: str = "") -> TreeT:
    """Return a copy of a state or an optimizer in which what `find` finds is replaced.

    A tuple or a mapping that holds both is a tree as well, such as a NamedTuple of an optimizer,
    its state and parameters: what is in the optimizer is replaced as in an optimizer, all else as
    in a state.

    Nothing of what was given is changed. What is not replaced is not copied: the two states share
    it, so that `update_` of one writes into the other as well.

    Of things within one another, the inner ones come first. Optimizers check what they are given,
    as always. In a state, whatever is put there must be like what was there.

    Args:
        tree: A state or an optimizer, or what holds them.
        what: The name of a field, or a class.
        new: What to put there, in a state a copy of it at each place; or a function from what was
            there to that. A number, in a state, fills every tensor. An object that can be called,
            such as one of `funcopt.schedules`, is put there; a schedule that is a mere function
            would be taken for a function from old to new, so give `lambda old: schedule`.
        within: Where, as for `find`: a path or a label.

    Returns:
        The copy, of the same types.

    Raises:
        KeyError: If there is no such thing.
        TypeError: If `what` is neither a name nor a class; if `new` puts something else in the
            place of an optimizer, or no tensor in that of one; or if an optimizer refuses it.
        ValueError: If in a state `new` has another structure, shape, dtype or device than what it
            replaces, or if an optimizer refuses it.

    Example:
        Of one group, begin again, or change the learning rate:

        >>> import torch, funcopt
        >>> from funcopt import SGD, SGDState
        >>> opt = funcopt.Partition({"body": SGD(), "head": SGD()}, ["body", "head"])
        >>> params = [torch.ones(2), torch.ones(1)]
        >>> params, state = opt.update(params, opt.init(params), params)
        >>> state = funcopt.replace(state, SGDState, 0, within="head")
        >>> funcopt.find(state, "step")  # doctest: +NORMALIZE_WHITESPACE
        {"inner['body'].step": tensor(1., dtype=torch.float64),
         "inner['head'].step": tensor(0., dtype=torch.float64)}
        >>> opt = funcopt.replace(opt, "lr", 1e-4, within="head")
        >>> opt = funcopt.replace(opt, "lr", lambda lr: lr / 2)
        >>> funcopt.find(opt, "lr")
        {"inner['body'].lr": 0.0005, "inner['head'].lr": 5e-05}

        Of all that belongs to a member of a population, halve its learning rate:

        >>> from typing import Any, NamedTuple
        >>> class Member(NamedTuple):
        ...     opt: SGD
        ...     state: Any
        >>> member = Member(SGD(lr=0.5), SGD(lr=0.5).init(params))
        >>> funcopt.replace(member, "lr", lambda lr: lr / 2).opt.lr
        0.25
    """
    _check_what(what)

    def change(place: Place, in_optimizer: bool) -> Change | None:
        if not (place.matches(what) and place.is_within(within)):
            return None
        return Change(_changed(place, new, in_optimizer))

    result = edited(Place((), tree), isinstance(tree, Optimizer), change)
    if result is None:
        raise KeyError(_nothing(what, within, tree, list(walk(tree, ())), editing=True))
    changed: TreeT = result.value
    return changed


def _hyperparameters(
    opt: Any, state: Any, steps: tuple[Step, ...], what: str | type
) -> Iterator[Place]:
    """Walk an optimizer beside its state, with the hyperparameter asked for as it is now."""
    for step, value in children(opt):
        place = (*steps, step)
        if step.key == what and _is_scheduled(value):
            yield Place(place, _at_count(value, state, text(place)))
        elif _holds_optimizers(value):
            # Where a wrapper adds nothing of its own, its state may be that of what it wraps.
            inner = _member(state, step, state)
            if isinstance(value, Optimizer):
                yield from _hyperparameters(value, inner, place, what)
            else:
                for label, one in children(value):
                    own = _member(inner, label, _MISSING)
                    if own is _MISSING:
                        raise ValueError(
                            f"the state has nothing for {text((*place, label))}: it is that of "
                            f"another optimizer. Give the one whose init() made it."
                        )
                    yield from _hyperparameters(one, own, (*place, label), what)
        else:
            yield from walk(value, place)


_MISSING = object()


def _holds_optimizers(value: Any) -> bool:
    if isinstance(value, Optimizer):
        return not isinstance(value, type)
    if not isinstance(value, (Mapping, list, tuple)):
        return False
    return len(value) > 0 and all(isinstance(child, Optimizer) for _, child in children(value))


def _member(node: Any, step: Step, default: Any) -> Any:
    """Return what one step from a node leads to; a state may have items for fields."""
    for own, child in children(node):
        if own.key == step.key:
            return child
    return default


def _is_scheduled(value: Any) -> bool:
    """Whether a hyperparameter is a schedule, or a tuple of numbers in which there is one."""
    return callable(value) or (isinstance(value, tuple) and any(map(callable, value)))


def _at_count(given: Any, state: Any, path: str) -> Any:
    """Return what a hyperparameter is after as many updates as were made."""
    if isinstance(given, tuple):
        named = enumerate(given)
        return tuple(_at_count(part, state, f"{path}[{i}]") for i, part in named)
    if not callable(given):
        return given
    schedule: Callable[[Tensor], Any] = given
    for name in _COUNTS:
        count = _member(state, Step(name, True), None)
        if count is not None:
            counts, structure = pytree.flatten(count)
            return pytree.unflatten(structure, [call_schedule(path, schedule, c) for c in counts])
    raise ValueError(
        f"{path} is a function, and its state, of type {type(state).__name__}, has no count "
        f"({' or '.join(_COUNTS)}) to call it with. Give the optimizer whose init() made the "
        f"state, or read the function itself with find(opt, ...)."
    )


def _changed(place: Place, new: Any, in_optimizer: bool) -> Any:
    """Return what is put in a place."""
    path, old = text(place.steps), place.value
    if in_optimizer:
        # What an object gives when it is called is its own affair: it is a schedule.
        is_function = inspect.isroutine(new) or isinstance(new, (type, functools.partial))
        value = new(old) if is_function else new
        if isinstance(old, Optimizer) and (
            isinstance(value, type) or not isinstance(value, Optimizer)
        ):
            raise TypeError(
                f"{path or 'the whole'} is an optimizer, and {value!r} is none: give one, which "
                f"has init, update and update_."
            )
        return value
    if callable(new):
        value = new(old)
    else:
        leaves, structure = pytree.flatten(old if isinstance(new, (int, float)) else new)
        value = pytree.unflatten(structure, [_copied(leaf, new) for leaf in leaves])
    _check_alike(path, value, old)
    return value


def _copied(leaf: Any, new: Any) -> Any:
    """Return a copy of a leaf, filled with a number if that is what is new."""
    if isinstance(new, (int, float)):
        return torch.full_like(leaf, new) if isinstance(leaf, Tensor) else new
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _check_alike(path: str, new: Any, old: Any) -> None:
    """Refuse what is not like that which it replaces in a state."""
    remedy = (
        "What is put into a state must be like what was there: give a number, or a function from "
        "old to new, or make it with init() of the same optimizer from the same parameters."
    )
    olds, structure = pytree.flatten(old)
    news, own = pytree.flatten(new)
    if not pytree.same(own, structure):
        there, needed = (
            [name.removeprefix(".") for name in pytree.paths(one, path)] for one in (own, structure)
        )
        missing = [name for name in needed if name not in there]
        extra = [name for name in there if name not in needed]
        kinds = f"a {type(new).__name__} in place of a {type(old).__name__}"
        parts = [f"no {_some(missing)}"] * bool(missing) + [f"a new {_some(extra)}"] * bool(extra)
        raise ValueError(f"{path or 'the whole'}: {' and '.join(parts) or kinds}. {remedy}")
    for name, one, other in zip(pytree.paths(structure, path), news, olds, strict=True):
        for attribute in ("shape", "dtype", "device"):
            wanted, found = (getattr(leaf, attribute, type(leaf)) for leaf in (other, one))
            if found != wanted:
                raise ValueError(
                    f"{name.removeprefix('.')}: {attribute} {found}, it was {wanted}. {remedy}"
                )


def _check_what(what: object) -> None:
    if not isinstance(what, (str, type)):
        raise TypeError(
            f"what={what!r}: must be the name of a field, such as 'momentum_buffer' or 'lr', or a "
            f"class, such as SGDState."
        )


def _nothing(
    what: str | type, within: str, tree: Any, places: Sequence[Place], editing: bool
) -> str:
    """Say that nothing was found, and what there is."""
    elsewhere = [text(place.steps) for place in places if place.matches(what)]
    hint = ""
    if elsewhere:
        there = f"It is at {_some(elsewhere)}."
    elif isinstance(what, str):
        there = f"There are {_some([p.steps[-1].key for p in places if p.is_field])}."
        if not any(isinstance(place.value, Optimizer) for place in places):
            call = f"replace(opt, {what!r}, ...)" if editing else f"find(state, {what!r}, opt)"
            hint = f" A state holds no hyperparameters: for those, give its optimizer, {call}."
    else:
        there = f"There are {_some([type(p.value).__name__ for p in places if p.has_fields])}."
    name = repr(what) if isinstance(what, str) else what.__name__
    where = f"within {within!r}" if within else f"in this {type(tree).__name__}"
    return f"no {name} {where}. {there}{hint}"


def _some(names: Sequence[str]) -> str:
    return pytree.some(list(dict.fromkeys(names)), most=20) or "nothing"
