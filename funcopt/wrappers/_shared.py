"""What the wrappers share: gradients paired with parameters, checks, and the fields of a state.

An update of a wrapper goes the same way in every one of them. It checks its state, finds its
numbers (`numbers_of`), pairs the gradients with the parameters (`gather_gradients`), decides what
the inner optimizer is given and whether it makes its update, calls it, and returns its own new
state. In place, `check_wrapper_inplace` stands before the call, and `write_fields_and_count` after
it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.tensors import write
from .._core.types import Number, Optimizer, Schedule, Tree, at_rest, is_dense, kind_of, traits_of
from .._engine.checks import (
    are_apart,
    check_alike,
    check_distinct,
    check_leaves,
    check_no_history,
    check_not_among,
    check_unwatched,
    check_writable,
)
from .._engine.counts import device_for_count, first_count, next_count
from .._engine.hyperparameters import has_schedule
from .._engine.memory import layout_of
from .._engine.prepare import check_untied, may_recall, recall
from .._engine.recorded import is_recorded
from .._engine.rule import StepInputs


class Gradients(NamedTuple):
    """Gradients beside their parameters, checked: what `gather_gradients` returns.

    `params` and `leaves` go together, leaf by leaf. `tensors` are the gradients that there are,
    which may be fewer: `replace` takes as many, and `tree` of what it returns is what an inner
    optimizer is given.

    Leaves at rest are those that the optimizer leaves as they are, as `Frozen` does. A wrapper that
    moves a tree of its own leaves them out by `moving`, and puts them back by `with_resting`.

    Attributes:
        params: The parameters in the order of their tree, also those at rest.
        structure: The structure of that tree.
        paired: The gradients and how they are put into a tree again.
        resting: The indices of the leaves at rest, which have no gradient here.

    Example:
        >>> import torch, funcopt
        >>> from funcopt import extend
        >>> params = {"a": torch.ones(1), "b": torch.ones(2)}
        >>> grads = {"a": None, "b": torch.ones(2)}
        >>> gradients = extend.gather_gradients(funcopt.SGD(lr=0.1), grads, params)
        >>> gradients.leaves, gradients.tensors
        ([None, tensor([1., 1.])], [tensor([1., 1.])])
        >>> gradients.replace(2 * grad for grad in gradients.tensors).tree
        {'a': None, 'b': tensor([2., 2.])}
    """

    params: list[Tensor]
    structure: pytree.Structure
    paired: pytree.Paired
    resting: Collection[int] = ()

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
        """The gradients as a tree: like the one that was given, if no leaf is at rest."""
        return self.paired.rebuild(self.paired.leaves)

    def moving(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Return those of these leaves, in the order of the parameters, that are not at rest."""
        if not self.resting:
            return list(leaves)
        return [leaf for index, leaf in enumerate(leaves) if index not in self.resting]

    def with_resting(
        self, moving: Sequence[Tensor], leaves: Sequence[Tensor] | Mapping[int, Tensor]
    ) -> list[Tensor]:
        """Undo `moving`: return its leaves with those at rest, taken from `leaves`, in between."""
        if not self.resting:
            return list(moving)
        others = iter(moving)
        count = len(self.params)
        return [leaves[i] if i in self.resting else next(others) for i in range(count)]

    def replace(self, tensors: Iterable[Tensor]) -> Gradients:
        """Return the gradients with these tensors in place of those that there are."""
        others = iter(tensors)
        leaves = [None if leaf is None else next(others) for leaf in self.paired.leaves]
        return self._replace(paired=self.paired._replace(leaves=leaves))


def gather_gradients(opt: Optimizer[Any], grads: Tree, params: Tree) -> Gradients:
    """Pair gradients with their parameters, as the wrapper `opt` is given them.

    Gradients of leaves at rest may be missing, and are not looked at.

    Raises:
        TypeError: If a leaf is not a dense floating-point or complex tensor, unless it is at rest.
        ValueError: If the trees, or a gradient and its parameter, do not match.
    """
    known = _recalled(opt, grads, params)
    if known is not None:
        return known
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
    if type(params) is dict and len(given) == len(leaves) and may_recall():
        layout_of(StepInputs(leaves, paired.leaves, ()))  # by which they are known next time
    return Gradients(leaves, structure, paired, resting)


def _recalled(opt: Optimizer[Any], grads: Tree, params: Tree) -> Gradients | None:
    """Pair without checking anything, if these leaves look as some did that were checked."""
    recalled = recall([params, grads]) if may_recall() else None
    if recalled is None or at_rest(opt, recalled.inputs.params, recalled.structure):
        return None
    inputs, structure, *_ = recalled
    return Gradients(inputs.params, structure, pytree.Paired(inputs.grads, structure, None))


def _check_moving(
    opt: Optimizer[Any], leaves: list[Any], structure: pytree.Structure
) -> Collection[int]:
    """Refuse leaves that no optimizer can move, unless they are at rest; return those that are."""
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
    """Lay out flat the parameters for the `init` of a wrapper.

    Raises:
        TypeError: If a leaf is not a dense floating-point or complex tensor, unless it is at rest.
        ValueError: If two leaves share their memory.
    """
    leaves, structure = pytree.flatten(params)
    resting = _check_moving(opt, leaves, structure)
    check_untied(leaves, structure)
    return Params(leaves, structure, resting)


def check_overflow_is_seen(wrapper: str, inner: Optimizer[Any]) -> None:
    """Refuse a loss scale inside a wrapper that skips overflows: its scale would never fall."""
    if traits_of(inner).sees_overflow:
        raise ValueError(
            f"inner={inner!r} has a LossScale, which must see an overflow to lower its scale, and "
            f"from which {wrapper} would hide it: no step would be made again. Let it be outside; "
            f"it skips such steps itself."
        )


def check_scalar(name: str, value: object, dtype: torch.dtype | None = None) -> None:
    """Refuse what is no single number in a state: of a dtype, or of any floating-point one."""
    if (
        not isinstance(value, Tensor)
        or not is_dense(value)
        or not (value.is_floating_point() if dtype is None else value.dtype is dtype)
        or value.ndim != 0
    ):
        kind = "floating-point" if dtype is None else str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} is {kind_of(value)}: it must be a {kind} tensor of shape (), as init() makes "
            f"it. A state that vmap(init) made belongs to vmap(update)."
        )


def first_count_if_scheduled(opt: Any, place: torch.device) -> Tree:
    """Return the first count of updates of a wrapper: `()` if none of its numbers is a schedule."""
    return first_count(place) if has_schedule(opt) else ()


def device_of_tensors(params: Tree) -> torch.device:
    """Return the device for a count beside those leaves that are tensors."""
    return device_for_count([x for x in pytree.flatten(params)[0] if isinstance(x, Tensor)])


def own_tensors(state: Any, *names: str) -> dict[str, Tensor]:
    """Return these fields of a wrapper's state by their paths, and its count if it has one."""
    counts = ["step"] if isinstance(state.step, Tensor) else []
    return {f"state.{name}": getattr(state, name) for name in (*names, *counts)}


def write_fields_and_count(state: Any, updated: bool | Tensor = True, **values: Tensor) -> None:
    """Write new values into fields of a wrapper's state, and its count if it has one.

    The count goes up if the inner update was made.
    """
    for name, value in values.items():
        write(getattr(state, name), value)
    if isinstance(state.step, Tensor):
        write(state.step, next_count(state.step, updated))


def check_wrapper_inplace(
    numbers: Mapping[str, object],
    own: Mapping[str, Tensor],
    gradients: Gradients,
    tree: tuple[str, Sequence[Tensor]] = ("", ()),
) -> None:
    """Refuse to write a wrapper's own tensors where that would lose a derivative or memory.

    They are given by their paths, with the name and the leaves of a tree like the parameters that
    it writes besides.

    Raises:
        RuntimeError: Under a transform of `torch.func` or forward mode, or if anything here has a
            history, or a tensor of inference mode would be written outside of it.
        ValueError: If two of its tensors, or one and a gradient, start at the same place, or the
            elements of one do.
    """
    root, leaves = tree
    written = [*leaves, *own.values()]
    check_unwatched(numbers.values(), written, gradients.leaves, gradients.params)

    def path(index: int) -> str:
        if index < len(leaves):
            return pytree.path(gradients.structure, root, index)
        return list(own)[index - len(leaves)]

    check_no_history(_history(numbers, written, path, gradients))
    if not transforms.tracing():
        check_writable(written, path)
    tensors = [*written, *gradients.tensors]
    if transforms.tracing() or not transforms.all_plain(tensors) or are_apart(tensors):
        return  # where operators are recorded there is no memory yet
    check_distinct(written, path, "one would be written over the other (update() writes neither)")
    check_not_among(written, gradients.tensors, path, "a gradient")


def _history(
    numbers: Mapping[str, object],
    written: Sequence[Tensor],
    path: Callable[[int], str],
    gradients: Gradients,
) -> Iterator[tuple[str, Tensor]]:
    """Yield what would have its derivative lost, by name."""
    for name, number in numbers.items():
        if isinstance(number, Tensor) and number.requires_grad:
            yield name, number
    for index, tensor in enumerate(written):
        if tensor.requires_grad:
            yield path(index), tensor
    for index, grad in enumerate(gradients.leaves):
        if grad is not None and grad.requires_grad:
            yield pytree.path(gradients.structure, "grads", index), grad


def device_of_counts(every: Number | Schedule) -> torch.device:
    """Return the device for a count of calls up to a number: that of the number if a tensor."""
    return every.device if isinstance(every, Tensor) else torch.device("cpu")


def is_due(count: Tensor, every: Number) -> bool | Tensor:
    """Whether the call after so many is the last of `every`; a tensor if that cannot be read."""
    before = read(count)
    known = read(every) if isinstance(every, Tensor) else every
    if before is None or known is None:
        return count.detach() + 1 >= every
    return before + 1 >= known


def zero_if(condition: bool | Tensor, tensor: Tensor) -> Tensor:
    """Return zeros where a condition holds, else the tensor itself."""
    if isinstance(condition, Tensor):
        return tensor.masked_fill(condition.to(tensor.device), 0)
    return torch.zeros_like(tensor) if condition else tensor


def read(number: Tensor) -> float | None:
    """Return the value of a 0-dim tensor, or None: if to read it would wait, or lose a derivative.

    It is not read for members, of a vmap or a stack, nor while operators are recorded.
    """
    if number.ndim > 0 or not transforms.readable() or not transforms.all_plain([number]):
        return None
    if not transforms.on_host(number) or transforms.has_derivative(number):
        return None
    return float(number.item())


def known_value(number: Number) -> float | None:
    """Return the value of a number, or None under every transform and wherever `read` does."""
    if isinstance(number, float):
        return number
    return None if transforms.transformed() else read(number)


def records(
    opt: Optimizer[Any],
    gradients: Gradients,
    state: Tree,
    numbers: Mapping[str, object] | None = None,
) -> bool:
    """Whether plain autograd is to record what a wrapper does to its tensors in an update.

    It is to record if a number or a tensor of the state requires a gradient, or if the gradients
    depend on something that does, besides the parameters. Parameters that merely require a
    gradient, as `nn.Parameter`s do, leave no history, which would grow with each update. Under the
    transforms of `torch.func` it always records.

    Args:
        opt: The wrapper, whose field `differentiable`, or that of an optimizer within it, decides
            if it is given.
        gradients: The gradients beside their parameters.
        state: The state before the update.
        numbers: What the hyperparameters are at this update, as `numbers_of` gives them.

    Returns:
        What to give to `torch.set_grad_enabled`.

    Example:
        >>> import torch, funcopt
        >>> from funcopt import extend
        >>> opt, w = funcopt.SGD(lr=0.1), torch.nn.Parameter(torch.ones(2))
        >>> extend.records(opt, extend.gather_gradients(opt, torch.ones(2), w), ())
        False
        >>> weight = torch.ones(2, requires_grad=True)
        >>> extend.records(opt, extend.gather_gradients(opt, 2 * weight, w), ())
        True
    """
    values = [*pytree.flatten(state)[0], *(numbers or {}).values()]
    others = [value for value in values if isinstance(value, Tensor)]
    return is_recorded(opt, gradients.params, gradients.tensors, others)
