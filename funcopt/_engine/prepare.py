"""One update laid out flat: trees checked, paired with the parameters, and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain, compress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.tensors import scaled, write
from .._core.types import Number, Tree
from .checks import check_alike, check_distinct, check_leaves, check_state, sharding
from .hyperparameters import check_count
from .memory import Layout, known, known_flat, layout_of
from .rule import Slot, StepInputs, StepOutputs, UpdateRule

T = TypeVar("T")


def flatten_params(params: Tree) -> tuple[list[Tensor], pytree.Structure]:
    """Return the leaves of the parameters and their structure, checked.

    Raises:
        TypeError: If a leaf is not a dense floating-point or complex tensor.
        ValueError: If two leaves share their memory.
    """
    leaves, structure = pytree.flatten(params)
    check_leaves(leaves, partial(pytree.path, structure, "params"))
    check_untied(leaves, structure)
    return leaves, structure


def check_untied(leaves: list[Tensor], structure: pytree.Structure) -> None:
    """Refuse parameters that share their memory, as far as that can be told."""
    if not transforms.tracing() and not transforms.transformed():
        check_distinct(
            leaves,
            lambda index: pytree.path(structure, "params", index),
            "the update of one would be lost or made twice",
        )


class Prepared(NamedTuple):
    """One update, leaf by leaf, in the order of the parameters."""

    params: pytree.Paired
    slots: list[pytree.Paired]  # those that are kept
    roots: list[str]  # what messages call them
    counts: Counts
    active: list[int]  # the leaves that have a gradient
    inputs: StepInputs  # those leaves, for a kernel
    all_active: bool  # every leaf has a gradient
    layout: Layout | None  # what is known of them; None while operators are traced
    watched: bool  # by a tracer or another mode, or by what follows derivatives or members

    def historic(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the gradients and all slots, or nothing if none is known to have a history."""
        if self.all_active and self.layout is not None and not self.layout.others_require_grad:
            return (), ()
        return self.inputs.grads, [tensor for paired in self.slots for tensor in paired.leaves]

    def written(self) -> dict[str, list[Tensor]]:
        """Return the tensors that an update in place writes, by the name of their tree."""
        columns = dict(zip(["params", *self.roots], self.inputs.targets.columns, strict=True))
        columns["state.step"] = self.counts.tensors
        return columns

    def path(self, root: str, index: int) -> str:
        """Return the path of a leaf of `written`, or of a gradient, for a message."""
        if root == "state.step":
            return pytree.path(self.counts.paired.structure, root, index)
        return pytree.path(self.params.structure, root, self.active[index])

    def rebuild(self, outputs: StepOutputs) -> list[Tree]:
        """Return the trees of parameters and slots, with copies of the leaves left alone."""
        pairs, columns = [self.params, *self.slots], list(outputs.columns)
        if not self.all_active:
            columns = [
                self._filled(paired.leaves, tensors)
                for paired, tensors in zip(pairs, columns, strict=True)
            ]
        if not (self.all_active and self.layout and not self.layout.params_require_grad):
            keep_requiring(columns[0], self.params.leaves)
        return [paired.rebuild(own) for paired, own in zip(pairs, columns, strict=True)]

    def _filled(self, olds: list[Tensor], news: list[Tensor]) -> list[Tensor]:
        by_index = dict(zip(self.active, news, strict=True))
        return [by_index[i] if i in by_index else old.clone() for i, old in enumerate(olds)]


def keep_requiring(news: Sequence[Tensor], olds: Sequence[Tensor]) -> None:
    """Let new parameters require a gradient where the old did.

    Under a transform they do not: it follows them anyway. Nor do they while operators are recorded:
    a compiled graph cannot return a tensor that was told so inside it.
    """
    if transforms.transformed() or transforms.tracing():
        return
    for new, old in zip(news, olds, strict=True):
        if old.requires_grad and not new.requires_grad:
            new.requires_grad_()


def prepare(opt: Any, rule: UpdateRule, grads: Tree, state: Any, params: Tree) -> Prepared:
    """Lay out an update flat, checked.

    Raises:
        NotKnownError: If of the trees there are the leaves alone.
        TypeError: If a leaf is not a dense floating-point or complex tensor.
        ValueError: If a tree does not match the parameters.
    """
    if type(params) is pytree.FlatTree:  # which has no paths to name in a message
        raise pytree.NotKnownError
    check_state(state, rule.state)
    setup = rule.setup_of(opt)
    slots, per_leaf = list(compress(rule.slots, setup.kept)), setup.options.step_per_leaf
    trees = trees_of(opt, rule, setup.kept, grads, state, params)
    tracing = transforms.tracing()
    prepared = None if tracing else _prepare_known(slots, trees, state.step, per_leaf)
    if prepared is not None:
        return prepared
    leaves, structure = pytree.flatten(params)
    if len(leaves) == 1:  # as a module is, which is refused here, before its gradients are blamed
        check_leaves(leaves, partial(pytree.path, structure, "params"))
    roots = _roots(slots)
    own = pytree.Paired(leaves, structure, None)
    gradients, *kept = pytree.pair_all(trees[1:], ("grads", *roots), params, leaves, structure)
    counts = gather_counts(state.step, structure if per_leaf else None)
    active = [index for index, grad in enumerate(gradients.leaves) if grad is not None]
    inputs = StepInputs.of([_take(paired.leaves, active) for paired in (own, gradients, *kept)])
    all_active = len(active) == len(leaves)
    layout = known(inputs) if all_active and not tracing and _agree(inputs) else None
    if layout is None:
        _check(own, gradients, kept, roots, active)
        layout = None if tracing else layout_of(inputs)
    watched = _is_watched(inputs, counts)
    return Prepared(own, kept, roots, counts, active, inputs, all_active, layout, watched)


def _roots(slots: Sequence[Slot]) -> list[str]:
    return [f"state.{slot.name}" for slot in slots]


def trees_of(
    opt: Any, rule: UpdateRule, kept: Sequence[bool], grads: Tree, state: Any, params: Tree
) -> list[Tree]:
    """Return all trees of an update that are like the parameters, those first.

    The state must have those slots that the optimizer keeps, and no others.
    """
    trees = state[1:]
    for index in rule.optional:
        tree, wanted = trees[index], kept[index]
        if wanted == (type(tree) is tuple and len(tree) == 0):
            _check_kept(opt, rule.slots[index], tree, params, wanted)
    return [params, grads, *compress(trees, kept)]


def _check_kept(opt: Any, slot: Slot, tree: Tree, params: Tree, wanted: bool) -> None:
    kept = not (isinstance(tree, tuple) and tree == ())
    if kept != wanted and (kept or not isinstance(params, tuple) or params):  # () is that of ()
        raise ValueError(
            f"state.{slot.name} {'holds a tree' if kept else 'is empty'}, but this optimizer has "
            f"{slot.option}={getattr(opt, slot.option)}. Make the state with init() of this "
            f"optimizer."
        )


class Recalled(NamedTuple):
    """Trees whose leaves look as leaves looked that were checked before."""

    inputs: StepInputs
    structure: pytree.Structure  # of every one of them
    layout: Layout
    flat: list[Tensor]  # the columns of the inputs, one after another


def recall(trees: list[Tree]) -> Recalled | None:
    """Lay out trees flat without checking anything, if all that is to be checked is known."""
    found = pytree.columns_of_dicts(trees)
    if found is None:
        return None
    columns, structure = found
    params, grads, *slots = columns
    inputs, flat = StepInputs(params, grads, tuple(slots)), list(chain.from_iterable(columns))
    layout = known_flat(flat, (len(params),) * len(columns)) if _agree(inputs) else None
    return None if layout is None else Recalled(inputs, structure, layout, flat)


def _prepare_known(
    slots: Sequence[Slot], trees: list[Tree], step: Tree, per_leaf: bool
) -> Prepared | None:
    recalled = recall(trees)
    if recalled is None:
        return None
    inputs, structure, layout, _ = recalled
    params, *kept = [pytree.Paired(c, structure, None) for c in inputs.targets.columns]
    counts = gather_counts(step, structure if per_leaf else None)
    active = list(range(len(inputs.params)))
    watched = _is_watched(inputs, counts)
    roots = _roots(slots)
    return Prepared(params, kept, roots, counts, active, inputs, True, layout, watched)


def _is_watched(inputs: StepInputs, counts: Counts) -> bool:
    return transforms.observed() or transforms.watched(*inputs.columns, counts.tensors)


def _agree(inputs: StepInputs) -> bool:
    shards = sharding()
    if shards is None or shards.current_parts() is None:
        return True
    return bool(shards.agree(inputs.params, inputs.columns[1:]))


def _take(values: list[T], indices: list[int]) -> list[T]:
    """Return the values at these indices, which are in order."""
    return values if len(indices) == len(values) else [values[index] for index in indices]


def _check(
    params: pytree.Paired,
    grads: pytree.Paired,
    slots: list[pytree.Paired],
    roots: list[str],
    active: list[int],
) -> None:
    """Check leaf by leaf, to name the one that is wrong."""
    structure = params.structure
    check_leaves(params.leaves, partial(pytree.path, structure, "params"))
    check_alike(
        _take(grads.leaves, active),
        _take(params.leaves, active),
        lambda position: pytree.path(structure, "grads", active[position]),
        "a gradient",
    )
    for root, paired in zip(roots, slots, strict=True):
        path = partial(pytree.path, structure, root)
        check_alike(paired.leaves, params.leaves, path, "a moment")


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
        """Return of one value for each of those counts one for all leaves, or one for each leaf."""
        return values[0] if not self.per_leaf or len(set(map(id, values))) == 1 else values

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


def multiplied(grads: Tree, grad_scale: Tensor) -> Tree:
    """Return gradients times a number, in the dtypes of the gradients and in fresh memory."""
    leaves, structure = pytree.flatten(grads)
    products = iter(scaled([leaf for leaf in leaves if leaf is not None], grad_scale))
    return pytree.unflatten(
        structure, [None if leaf is None else next(products) for leaf in leaves]
    )


def outside_unless_plain(grads: Tree, grad_scale: Tensor) -> tuple[Tree, Tensor | None]:
    """Return gradients and a number to multiply them by, done already if it has a history."""
    if not transforms.has_derivative(grad_scale) and transforms.all_plain([grad_scale]):
        return grads, grad_scale
    return multiplied(grads, grad_scale), None
