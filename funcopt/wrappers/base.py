"""What wrappers share: gradients beside their parameters, and what they check."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.tensors import recording, write
from .._core.types import Number, Optimizer, Schedule, Tree, is_dense, traits_of
from .._engine.checks import check_alike, check_leaves, check_unwatched, kind_of
from .._engine.hyperparameters import has_schedule
from .._engine.prepare import check_untied, first_count, next_step, place_for_count
from .._engine.registration import at_rest

__all__ = [
    "Gradients",
    "check_inplace",
    "check_overflow_is_seen",
    "check_scalar",
    "first_step",
    "gather_gradients",
    "gather_params",
    "place_of_counts",
    "read",
    "records",
    "settled",
    "with_step",
    "write_step",
]


class Gradients(NamedTuple):
    """Gradients beside their parameters, checked."""

    params: list[Tensor]
    structure: pytree.Structure  # of the parameters
    paired: pytree.Paired
    resting: Collection[int] = ()  # leaves without a gradient, since the optimizer leaves them so

    @property
    def leaves(self) -> list[Tensor | None]:
        """The gradients in the order of the parameters, None where a leaf has none."""
        return self.paired.leaves

    @property
    def tensors(self) -> list[Tensor]:
        """The gradients that there are."""
        return [leaf for leaf in self.paired.leaves if leaf is not None]

    @property
    def tree(self) -> Tree:
        """The gradients in a tree: that in which they were given, if no leaf is at rest."""
        return self.paired.rebuild(self.paired.leaves)

    def moving(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Return of leaves in the order of the parameters those that are not at rest."""
        if not self.resting:
            return list(leaves)
        return [leaf for index, leaf in enumerate(leaves) if index not in self.resting]

    def but_resting(self, moving: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
        """Return these leaves in the order of the parameters, with others for those not at rest."""
        if not self.resting:
            return list(moving)
        others = iter(moving)
        return [leaf if i in self.resting else next(others) for i, leaf in enumerate(leaves)]

    def replace(self, tensors: Iterable[Tensor]) -> Gradients:
        """Return the gradients with others in place of those that there are."""
        others = iter(tensors)
        leaves = [None if leaf is None else next(others) for leaf in self.paired.leaves]
        return self._replace(paired=self.paired._replace(leaves=leaves))


def gather_gradients(opt: Optimizer[Any], grads: Tree, params: Tree) -> Gradients:
    """Pair gradients with their parameters. Those of leaves at rest are None, whatever was given.

    Args:
        opt: The wrapper, which says what is at rest.
        grads: The gradients. Those of leaves at rest may be missing.
        params: The parameters.

    Raises:
        TypeError: If a leaf is not a dense floating-point or complex tensor, unless it is at rest.
        ValueError: If the trees, or a gradient and its parameter, do not match.
    """
    leaves, structure = pytree.flatten(params)
    resting = _check_moving(opt, leaves, structure)
    paired = pytree.pair(grads, "grads", structure, resting)
    if resting:
        own = [None if index in resting else grad for index, grad in enumerate(paired.leaves)]
        paired = pytree.Paired(own, structure, None)
    given = [index for index, grad in enumerate(paired.leaves) if grad is not None]
    check_alike(
        [paired.leaves[index] for index in given],
        [leaves[index] for index in given],
        lambda position: pytree.path(structure, "grads", given[position]),
        "a gradient",
    )
    return Gradients(leaves, structure, paired, resting)


def _check_moving(
    opt: Optimizer[Any], leaves: list[Any], structure: pytree.Structure
) -> Collection[int]:
    """Refuse leaves that cannot be moved, if they are to be; return those that are at rest."""
    resting = at_rest(opt, leaves, structure)
    if not resting:
        check_leaves(leaves, partial(pytree.path, structure, "params"))
        return resting
    moving = [index for index in range(len(leaves)) if index not in resting]
    check_leaves(
        [leaves[index] for index in moving],
        lambda position: pytree.path(structure, "params", moving[position]),
    )
    return resting


class Params(NamedTuple):
    """Parameters laid out flat, checked."""

    leaves: list[Any]
    structure: pytree.Structure
    resting: Collection[int]

    @property
    def moving(self) -> list[Tensor]:
        """The leaves that are not at rest."""
        return [leaf for index, leaf in enumerate(self.leaves) if index not in self.resting]


def gather_params(opt: Optimizer[Any], params: Tree) -> Params:
    """Lay out the parameters, of which a wrapper says what is at rest.

    Raises:
        TypeError: If a leaf is not a dense floating-point or complex tensor, unless it is at rest.
        ValueError: If two leaves share their memory.
    """
    leaves, structure = pytree.flatten(params)
    resting = _check_moving(opt, leaves, structure)
    check_untied(leaves, structure)
    return Params(leaves, structure, resting)


def check_overflow_is_seen(wrapper: str, inner: Optimizer[Any]) -> None:
    """Refuse a loss scale within what skips overflows: it would never see one, nor be lowered."""
    if traits_of(inner).sees_overflow:
        raise ValueError(
            f"inner={inner!r} has a LossScale, which must see an overflow to lower its scale, and "
            f"from which {wrapper} would hide it: no step would be made again. Let it be outside; "
            f"it skips such steps itself."
        )


def check_scalar(name: str, value: object) -> None:
    """Refuse what is no single floating-point number in a state."""
    if (
        not isinstance(value, Tensor)
        or not is_dense(value)
        or not value.is_floating_point()
        or value.ndim != 0
    ):
        raise ValueError(
            f"{name} is {kind_of(value)}: it must be a floating-point tensor of shape (), as "
            f"init() makes it. A state that vmap(init) made belongs to vmap(update)."
        )


def first_step(opt: object, params: Tree) -> Tree:
    """Return a count of updates, if one of these hyperparameters is a schedule; else `()`."""
    if not has_schedule(opt):
        return ()
    tensors = [leaf for leaf in pytree.flatten(params)[0] if isinstance(leaf, Tensor)]
    return first_count(place_for_count(tensors))


def with_step(own: dict[str, Tensor], state: Any) -> dict[str, Tensor]:
    """Return these tensors of a wrapper's state by their paths, and its count if it has one."""
    return {**own, "state.step": state.step} if isinstance(state.step, Tensor) else own


def write_step(state: Any, moves: bool | Tensor = True) -> None:
    """Write into a wrapper's state, if it counts updates, how many there are after one."""
    if isinstance(state.step, Tensor):
        write(state.step, next_step(state.step, moves))


def check_inplace(
    numbers: Mapping[str, object],
    own: Mapping[str, Tensor],
    gradients: Gradients,
    tree: tuple[str, Sequence[Tensor]] = ("", ()),
) -> None:
    """Refuse to write a wrapper's own tensors where that would lose a derivative or memory.

    Args:
        numbers: Its hyperparameters, by name.
        own: The tensors that it writes itself, by their paths.
        gradients: What it reads.
        tree: More of those: a tree like the parameters, by its name and leaves.

    Raises:
        RuntimeError: Under a transform of `torch.func` or forward mode, or if anything here has a
            history.
        ValueError: If two of its tensors, or one and a gradient, start at the same place.
    """
    root, leaves = tree
    written = [*leaves, *own.values()]
    check_unwatched(numbers.values(), written, gradients.leaves, gradients.params)

    def path(index: int) -> str:
        if index < len(leaves):
            return pytree.path(gradients.structure, root, index)
        return list(own)[index - len(leaves)]

    for name, tensor in _historic(numbers, written, path, gradients):
        raise RuntimeError(
            f"{name} {'has a history' if tensor.grad_fn else 'requires a gradient'}, which writing "
            f"in place would lose. Use update(), or detach it if no derivative is wanted."
        )
    if transforms.tracing() or not transforms.all_plain([*written, *gradients.tensors]):
        return  # there is no memory to share
    taken = {grad.data_ptr() for grad in gradients.tensors}
    for index, tensor in enumerate(written):
        if tensor.numel() > 0 and tensor.data_ptr() in taken and not tensor.is_meta:
            raise ValueError(
                f"{path(index)} shares its memory with a gradient or with other state. Clone it, "
                f"or use update()."
            )
        taken.add(tensor.data_ptr())


def _historic(
    numbers: Mapping[str, object],
    own: Sequence[Tensor],
    path: Callable[[int], str],
    gradients: Gradients,
) -> Iterator[tuple[str, Tensor]]:
    """Yield what would have its derivative lost, by name."""
    for name, number in numbers.items():
        if isinstance(number, Tensor) and number.requires_grad:
            yield name, number
    for index, tensor in enumerate(own):
        if tensor.requires_grad:
            yield path(index), tensor
    for index, grad in enumerate(gradients.leaves):
        if grad is not None and grad.requires_grad:
            yield pytree.path(gradients.structure, "grads", index), grad


def place_of_counts(every: Number | Schedule) -> torch.device:
    """Return the device for a count of the calls up to a number: that of the number, if any."""
    return every.device if isinstance(every, Tensor) else torch.device("cpu")


def read(number: Tensor) -> float | None:
    """Return the value of a 0-dim tensor, if it can be read at no price and nobody follows it."""
    if not transforms.readable() or not transforms.all_plain([number]):
        return None
    if not transforms.on_host(number) or transforms.has_derivative(number):
        return None
    return float(number.item())


def settled(number: Number) -> float | None:
    """Return the value of a number, if it can be read at no price and has no derivative to lose."""
    if isinstance(number, float):
        return number
    return None if transforms.transformed() else read(number)


def records(
    opt: Optimizer[Any],
    gradients: Gradients,
    state: Tree,
    numbers: Mapping[str, object] | None = None,
) -> bool:
    """Whether plain autograd is to record what a wrapper does to its tensors: by `recording`.

    It is asked of the tensors beneath a vmap, too, where parameters that merely require a gradient
    would otherwise leave a history in whatever is chosen from them.

    Args:
        opt: The wrapper.
        gradients: The gradients, with the parameters.
        state: Its state.
        numbers: What its hyperparameters are at this update, where schedules may give them.
    """
    own = [*pytree.flatten(state)[0], *(numbers or {}).values()]
    others = [leaf for leaf in own if isinstance(leaf, Tensor)]
    asked: set[object] = set()
    for name, value in _fields(opt):
        if isinstance(value, Tensor):
            others.append(value)
        elif name == "differentiable":
            asked.add(value)
    said = True if True in asked else (False if asked == {False} else None)
    return _records(gradients.params, gradients.tensors, others, said)


def _records(
    params: list[Tensor], grads: list[Tensor], others: list[Tensor], said: bool | None
) -> bool:
    if not transforms.tracing() and transforms.in_vmaps_alone():

        def beneath(members: transforms.Members) -> bool:
            one, two, three = (
                [members.unwrap(t)[0] for t in column] for column in (params, grads, others)
            )
            return _records(one, two, three, said)

        return transforms.beneath_vmap(beneath)
    with recording(params, grads, others, said):
        return torch.is_grad_enabled()


def _fields(opt: object) -> Iterator[tuple[str, object]]:
    """Yield the fields of an optimizer and of those within it, by name."""
    if not dataclasses.is_dataclass(opt):
        return
    for field in dataclasses.fields(opt):
        value = getattr(opt, field.name)
        parts = value.values() if isinstance(value, Mapping) else value
        for part in parts if isinstance(parts, Iterable) and not _is_one(parts) else [parts]:
            if dataclasses.is_dataclass(part):
                yield from _fields(part)
            else:
                yield field.name, part


def _is_one(value: object) -> bool:
    return isinstance(value, (str, Tensor))
