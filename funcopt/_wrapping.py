"""What wrappers share: an inner update that is made if a condition holds, and what they check."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _kernels, _transforms, _tree
from ._checks import check_alike, check_leaves, kind_of
from ._inplace import check_unwatched
from ._kernels import write
from ._kernels._pages import copies_of
from ._scaled import update_scaled, update_scaled_
from ._types import Number, Optimizer, Tree
from ._walk import walk
from ._work import keep_requiring

__all__ = [
    "Gradients",
    "check_inplace",
    "check_overflow_is_seen",
    "check_scalar",
    "copies",
    "gather_gradients",
    "read",
    "records",
    "settled",
    "update_if",
    "update_if_",
]


class Gradients(NamedTuple):
    """Gradients beside their parameters, checked."""

    params: list[Tensor]
    structure: _tree.Structure  # of the parameters
    paired: _tree.Paired

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
        """The gradients as they were given, in a tree."""
        return self.paired.rebuild(self.paired.leaves)

    def replace(self, tensors: Iterable[Tensor]) -> Gradients:
        """Return the gradients with others in place of those that there are."""
        others = iter(tensors)
        leaves = [None if leaf is None else next(others) for leaf in self.paired.leaves]
        return self._replace(paired=self.paired._replace(leaves=leaves))


def gather_gradients(grads: Tree, params: Tree) -> Gradients:
    """Pair gradients with their parameters.

    Raises:
        TypeError: If a leaf is not a dense floating-point or complex tensor.
        ValueError: If the trees, or a gradient and its parameter, do not match.
    """
    leaves, structure = _tree.flatten(params)
    check_leaves(leaves, partial(_tree.path, structure, "params"))
    paired = _tree.pair(grads, "grads", structure)
    given = [index for index, grad in enumerate(paired.leaves) if grad is not None]
    check_alike(
        [paired.leaves[index] for index in given],
        [leaves[index] for index in given],
        lambda position: _tree.path(structure, "grads", given[position]),
        "a gradient",
    )
    return Gradients(leaves, structure, paired)


def check_overflow_is_seen(wrapper: str, inner: Optimizer[Any]) -> None:
    """Refuse a loss scale within what skips overflows: it would never see one, nor be lowered."""
    if any(place.matches("init_scale") for place in walk(inner, ())):
        raise ValueError(
            f"inner={inner!r} has a LossScale, which must see an overflow to lower its scale, and "
            f"from which {wrapper} would hide it: no step would be made again. Let it be outside; "
            f"it skips such steps itself."
        )


def check_scalar(name: str, value: object) -> None:
    """Refuse what is no single floating-point number in a state."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != 0:
        raise ValueError(
            f"{name} is {kind_of(value)}: it must be a floating-point tensor of shape (), as "
            f"init() makes it. A state that vmap(init) made belongs to vmap(update)."
        )


def check_inplace(
    numbers: Mapping[str, object],
    own: Sequence[Tensor],
    path: Callable[[int], str],
    gradients: Gradients,
) -> None:
    """Refuse to write a wrapper's own tensors where that would lose a derivative or memory.

    Args:
        numbers: Its hyperparameters, by name.
        own: The tensors that it writes itself.
        path: Names tensor i of those.
        gradients: What it reads.

    Raises:
        RuntimeError: Under a transform of `torch.func` or forward mode, or if anything here has a
            history.
        ValueError: If two of its tensors, or one and a gradient, start at the same place.
    """
    check_unwatched(numbers.values(), own, gradients.leaves, gradients.params)
    for name, tensor in _historic(numbers, own, path, gradients):
        raise RuntimeError(
            f"{name} {'has a history' if tensor.grad_fn else 'requires a gradient'}, which writing "
            f"in place would lose. Use update(), or detach it if no derivative is wanted."
        )
    if _transforms.tracing() or not _transforms.all_plain([*own, *gradients.tensors]):
        return  # there is no memory to share
    taken = {grad.data_ptr() for grad in gradients.tensors}
    for index, tensor in enumerate(own):
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
            yield _tree.path(gradients.structure, "grads", index), grad


def read(number: Tensor) -> float | None:
    """Return the value of a 0-dim tensor, if it can be read at no price and nobody follows it."""
    if not _transforms.readable() or not _transforms.all_plain([number]):
        return None
    if not number.is_cpu or _transforms.has_derivative(number):
        return None
    return float(number.item())


def settled(number: Number) -> float | None:
    """Return the value of a number, if it can be read at no price and has no derivative to lose."""
    if isinstance(number, float):
        return number
    return None if _transforms.transformed() else read(number)


def records(opt: Optimizer[Any], gradients: Gradients, state: Tree) -> bool:
    """Whether plain autograd is to record what a wrapper does to its tensors: the rule of `AdamW`.

    It is asked of the tensors beneath a vmap, too, where parameters that merely require a gradient
    would otherwise leave a history in whatever is chosen from them.
    """
    others = [leaf for leaf in _tree.flatten(state)[0] if isinstance(leaf, Tensor)]
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
    if not _transforms.tracing() and _transforms.in_vmaps_alone():

        def beneath(members: _transforms.Members) -> bool:
            one, two, three = (
                [members.unwrap(t)[0] for t in column] for column in (params, grads, others)
            )
            return _records(one, two, three, said)

        return _transforms.beneath_vmap(beneath)
    with _kernels.recording(params, grads, others, said):
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


def update_if(
    condition: bool | Tensor,
    opt: Optimizer[Any],
    grads: Tree,
    state: Tree,
    params: Tree,
    recorded: bool,
    factor: Tensor | None = None,
) -> tuple[Tree, Tree]:
    """Return what an update makes of parameters and state if a condition holds, else copies.

    Args:
        condition: True or False where that is known: then only one thing is done. Where it is not
            (a tensor of shape (), for each member of a vmap its own, or on a device that is not to
            be waited for), both are, and one is chosen.
        opt: The optimizer.
        grads: The gradients.
        state: Its state.
        params: The parameters.
        recorded: Whether plain autograd records a copy and a choice, as `records` says.
        factor: What the gradients are multiplied by, of shape (); None for 1.
    """
    if condition is True:
        return update_scaled(opt, grads, factor, state, params)
    olds, structure = _tree.flatten((params, state))
    if condition is False:
        with torch.set_grad_enabled(recorded):
            chosen = copies(olds)
    else:
        moved = update_scaled(opt, grads, factor, state, params)
        news, structure = _tree.flatten(moved)
        with torch.set_grad_enabled(recorded):
            chosen = _choose(condition, news, olds)
    new_params, new_state = _tree.unflatten(structure, chosen)
    _keep_requiring(new_params, params)
    return new_params, new_state


def update_if_(
    condition: bool | Tensor,
    opt: Optimizer[Any],
    grads: Tree,
    state: Tree,
    params: Tree,
    factor: Tensor | None = None,
) -> None:
    """Do the same in place. What is to be checked of the tensors, the optimizer checks."""
    if condition is True:
        update_scaled_(opt, grads, factor, state, params)
    elif isinstance(condition, Tensor):
        leaves = _tree.flatten((params, state))[0]
        with torch.no_grad():
            olds = copies(leaves)
        update_scaled_(opt, grads, factor, state, params)
        with torch.no_grad():
            for leaf, chosen in zip(leaves, _choose(condition, leaves, olds), strict=True):
                write(leaf, chosen)


def _choose(condition: Tensor, news: Sequence[Tensor], olds: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.where(condition.to(old.device), new, old) for new, old in zip(news, olds, strict=True)
    ]


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of tensors, in the same layout."""
    if _transforms.tracing() or _transforms.transformed() or not _transforms.all_plain(tensors):
        return [tensor.clone() for tensor in tensors]
    return copies_of(tensors)


def _keep_requiring(new_params: Tree, params: Tree) -> None:
    """Let copies of parameters require a gradient where the old did, but for a transform's sake."""
    if not _transforms.transformed() and not _transforms.tracing():
        keep_requiring(_tree.flatten(new_params)[0], _tree.flatten(params)[0])
