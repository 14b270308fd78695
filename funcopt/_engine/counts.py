"""Single numbers beside the trees: counts of updates, keys of random bits, and what they hold."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.tensors import write
from .._core.types import Number, Tree
from .hyperparameters import check_count
from .rule import Setup, is_read

T = TypeVar("T")


class Counts(NamedTuple):
    """The counts of a state."""

    paired: pytree.Paired
    per_leaf: bool

    @property
    def tensors(self) -> list[Tensor]:
        """The counts: one, or those of the leaves in the order of the parameters."""
        return self.paired.leaves

    def around(self, moving: list[int], after: list[Number]) -> tuple[list[Tensor], list[Number]]:
        """Return the counts that an update goes by, before it and after it.

        A leaf without a gradient has no part in it: where each leaf has a count of its own, that of
        such a leaf counts nothing yet, perhaps, and no number is asked for it.
        """
        if not self.per_leaf:
            return self.tensors, after
        return [self.tensors[index] for index in moving], [after[index] for index in moving]

    def of_leaves(self, values: list[T]) -> T | list[T]:
        """Return of one value for all, or one for each leaf, one if they are the same."""
        return values[0] if len(set(map(id, values))) == 1 else values

    def after(self, moving: list[int], watched: bool) -> list[Number]:
        """Return the counts after an update of these leaves; those of other leaves stand still.

        A count whose value is at hand is returned as a float: all that is done with it then takes
        a fraction of the time. Where somebody watches the operators, no value is read.
        """
        counts: list[Number] = list(self.tensors) if watched else list(map(value_of, self.tensors))
        advancing = set(moving) if self.per_leaf else {0}
        return [count + 1 if index in advancing else count for index, count in enumerate(counts)]

    def rebuild(self, counts: list[Number]) -> Tree:
        """Return the tree of counts with these values, in fresh memory."""
        tensors = [fresh(new, old) for old, new in zip(self.tensors, counts, strict=True)]
        return self.paired.rebuild(tensors)

    def write(self, counts: list[Number]) -> None:
        """Write these values into the counts."""
        for old, new in zip(self.tensors, counts, strict=True):
            if isinstance(new, Tensor):
                write(old, new)
            else:
                old.fill_(new)


def device_for_count(leaves: Sequence[Tensor]) -> torch.device:
    """Return the device for a count: the GPU if all leaves are on one, else the CPU.

    There, a captured CUDA graph counts on at each replay.
    """
    devices = {leaf.device for leaf in leaves}
    on_gpu = len(devices) == 1 and next(iter(devices)).type == "cuda"
    return devices.pop() if on_gpu else torch.device("cpu")


def first_count(place: torch.device) -> Tensor:
    """Return a new count of 0. In float64 it counts on where float32 stops, at 2**24."""
    return torch.zeros((), dtype=torch.float64, device=place)


def next_count(step: Tree, moves: bool | Tensor = True) -> Tree:
    """Return a wrapper's count, one more if it moves; `()`, where it has none, stays `()`."""
    if not isinstance(step, Tensor):
        return step
    made = moves.to(step.device) if isinstance(moves, Tensor) else int(moves)
    return step.detach() + made


def value_of(count: Tensor) -> Number:
    """Return the value of a count, if it can be read at no price; else the count itself."""
    readable = (
        type(count) is Tensor
        and count.dtype is torch.float64
        and transforms.on_host(count)
        and not count.requires_grad
    )
    return float(count.item()) if readable else count


class PerLeaf:
    """A number for each leaf, all of them read: among the numbers of a step in place of one."""

    def __init__(self, values: Iterable[float]) -> None:
        """Keep the values where a kernel can read them."""
        self.values = array("d", values)
        self.address, _ = self.values.buffer_info()


def each_leaf(numbers: Any, count: int) -> list[Any]:
    """Return the numbers of each of so many leaves."""
    rows = [[n.values[i] if isinstance(n, PerLeaf) else n for n in numbers] for i in range(count)]
    return [numbers._make(row) for row in rows]


def is_plain_count(count: Any) -> bool:
    """Whether a count is one tensor as `init` makes it, about which nothing has to be asked."""
    return (
        type(count) is Tensor
        and count.ndim == 0
        and count.dtype is torch.float64
        and not count.requires_grad
        and not count.is_inference()
    )


def fresh(new: Number, old: Tensor) -> Tensor:
    """Return a new count of this value, like the old one."""
    if not isinstance(new, Tensor):
        return torch.scalar_tensor(new, dtype=old.dtype, device=old.device)
    return new.clone() if new is old else new


def gather_counts(step: Tree, structure: pytree.Structure | None) -> Counts:
    """Return the counts, checked: one, or a tree of them with the structure of the parameters.

    Raises:
        TypeError: If a count is not a tensor of a dtype that can count.
        ValueError: If it is not of shape (), or the tree does not match the parameters.
    """
    if structure is None:
        paired = pytree.Paired(*pytree.flatten(step), None)
        if len(paired.leaves) != 1 or paired.leaves[0] is not step:
            raise ValueError(
                f"state.step is a {type(step).__name__}: with step_per_leaf=False it is one "
                f"tensor. Make the state with init() of this optimizer."
            )
    else:
        paired = pytree.pair(step, "state.step", structure)
    for index, count in enumerate(paired.leaves):
        check_count(count, partial(pytree.path, paired.structure, "state.step", index))
    return Counts(paired, structure is not None)


def first_key(opt: Any, place: torch.device) -> Tree:
    """Return the key of an optimizer that rounds by chance: its seed; () for any other one."""
    if getattr(opt, "rounding", "nearest") != "stochastic":
        return ()
    if isinstance(opt.seed, Tensor):
        return opt.seed.detach().to(place, torch.float64, copy=True)
    return torch.full((), opt.seed, dtype=torch.float64, device=place)


def next_key(state: Any) -> Tree:
    """Return the key of the state after an update: the same, in fresh memory."""
    key = getattr(state, "key", ())
    return key.clone() if isinstance(key, Tensor) else key


def key_of(state: Any, *, watched: bool = False) -> Number:
    """Return the key of a state, read if that is free and nobody watches; 0 if there is none."""
    key = getattr(state, "key", ())
    if not isinstance(key, Tensor):
        return 0.0
    return key.detach() if watched else value_of(key)


def is_plain_key(state: Any) -> bool:
    """Whether the key is one tensor as `init` makes it."""
    return is_plain_count(getattr(state, "key", ()))


def check_key(setup: Setup, state: Any) -> None:
    """Refuse a state without a key where the optimizer rounds by chance, and one with a key else.

    Raises:
        TypeError: If the key is not a tensor of a dtype that can count.
        ValueError: If it is missing, not wanted, or not of shape ().
    """
    key, wanted = getattr(state, "key", ()), setup.options.rounding == "stochastic"
    if wanted and isinstance(key, Tensor):
        check_count(key, lambda: "state.key")
    elif wanted or not (isinstance(key, tuple) and key == ()):
        raise ValueError(
            f"state.key is {'empty' if wanted else 'there'}, but this optimizer has "
            f"rounding={setup.options.rounding!r}. Make the state with init() of this optimizer, "
            f"or replace the key: state._replace(key="
            f"{'torch.tensor(0.0, dtype=torch.float64)' if wanted else '()'})."
        )


def kind_of_number(number: Number) -> Any:
    """Return what of a number may decide who serves."""
    if not isinstance(number, Tensor):
        return type(number)
    return type(number), number.dtype, number.device, number.shape


def is_stacked(number: Number) -> bool:
    """Whether a number differs between the members of stacked leaves."""
    return isinstance(number, Tensor) and number.ndim > 0


def grouped_by_numbers(numbers: list[Any]) -> Iterable[tuple[list[int], Any]]:
    """Group leaves by the values of their numbers."""
    read: dict[int, Any] = {}
    groups: dict[object, tuple[list[int], Any]] = {}
    for index, own in enumerate(numbers):
        if id(own) not in read:
            read[id(own)] = own if is_read(own) else own._make(map(read_if_same, own))
        values = read[id(own)]
        key = tuple(number if isinstance(number, float) else id(number) for number in values)
        groups.setdefault(key, ([], values))[0].append(index)
    return groups.values()


def read_if_same(number: Number) -> Number:
    """Return a number's value, where reading it is free and the members agree; else the tensor."""
    if not isinstance(number, Tensor):
        return number
    if not transforms.on_host(number) or not transforms.all_plain([number]):
        return number.detach()
    if number.numel() > MANY:
        number = number.detach()
        lowest, highest = map(Tensor.item, number.aminmax())  # NaN is not the same as NaN
        return float(lowest) if lowest == highest else number
    values: list[float] = (number if number.ndim == 1 else number.reshape(-1)).tolist()
    if values and values.count(values[0]) == len(values):
        return float(values[0])
    return number.detach()


# To read more numbers takes longer than to compare them by operators.
MANY = 256
