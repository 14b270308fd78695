"""One update laid out flat: trees checked, paired with the parameters, and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain, compress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._core import pytree, transforms
from .._core.tensors import scaled
from .._core.types import Number, Tree
from .checks import check_alike, check_distinct, check_leaves, check_state, sharding
from .counts import (
    Counts,
    PerLeaf,
    check_key,
    device_for_count,
    first_count,
    first_key,
    gather_counts,
    key_of,
)
from .memory import Layout, known, known_flat, layout_of
from .rule import Setup, Slot, StepInputs, StepOutputs, UpdateRule, is_read, slot_dtype

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


def init(opt: Any, params: Tree) -> Any:
    """Return the state before the first update: a count of 0, and zeros."""
    rule: UpdateRule = opt.rule
    setup = rule.setup_of(opt)
    leaves, structure = flatten_params(params)
    if rule.real_only:
        _check_real(leaves, structure, opt)
    if setup.trees:
        from . import per_leaf  # noqa: PLC0415  # which few optimizers need

        per_leaf.check_fit(rule, opt, setup, structure)
    slots = [_zeros(slot, setup.options.moments, leaves, structure) for slot in setup.slots]
    place = device_for_count(leaves)
    step: Tree = first_count(place)
    if setup.options.step_per_leaf:
        step = pytree.unflatten(structure, [first_count(place) for _ in leaves])
    return rule.state_of(setup, [step, *slots], first_key(opt, place))


def _zeros(
    slot: Slot, moments: torch.dtype | str | None, params: list[Tensor], own: pytree.Structure
) -> Tree:
    """Return a slot of parameters before the first update."""
    made = []
    for param in params:
        dtype = slot_dtype(slot, moments, param.dtype)
        shape = torch.Size(slot.shape_of(param.shape))
        if shape == param.shape:
            made.append(torch.zeros_like(param, dtype=dtype))
        else:
            made.append(param.new_zeros(shape, dtype=dtype))
    return pytree.unflatten(own, made)


def _check_real(leaves: list[Tensor], structure: pytree.Structure, opt: object) -> None:
    """Refuse complex parameters, which the rule of this optimizer does not serve."""
    for index, leaf in enumerate(leaves):
        if leaf.is_complex():
            name, path = type(opt).__name__, pytree.path(structure, "params", index)
            raise TypeError(
                f"{path} has dtype {leaf.dtype}: {name} moves real leaves alone. Leave the complex "
                f"ones to another optimizer, by a Partition; or make leaves of real and imaginary "
                f"parts, by torch.view_as_real."
            )


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
    key: Number  # of random bits; 0 if there are none
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
    check_key(setup, state)
    per_leaf = setup.options.step_per_leaf
    trees = trees_of(opt, rule, setup.kept, grads, state, params)
    tracing = transforms.tracing()
    prepared = None if tracing else _prepare_known(rule, setup, trees, state, per_leaf)
    if prepared is not None:
        return prepared
    leaves, structure = pytree.flatten(params)
    if len(leaves) == 1:  # as a module is, which is refused here, before its gradients are blamed
        check_leaves(leaves, partial(pytree.path, structure, "params"))
    roots = _roots(setup.slots)
    own = pytree.Paired(leaves, structure, None)
    gradients, *kept = pytree.pair_all(trees[1:], ("grads", *roots), params, leaves, structure)
    counts = gather_counts(state.step, structure if per_leaf else None)
    active = [index for index, grad in enumerate(gradients.leaves) if grad is not None]
    all_active = len(active) == len(leaves)
    columns = [_take(paired.leaves, active) for paired in (own, gradients, *kept)]
    inputs = StepInputs.of(columns, None if all_active else active)
    layout = known(inputs) if all_active and not tracing and _agree(inputs) else None
    if layout is None or not _is_served(rule, setup, layout):
        _check(own, gradients, kept, setup, active)
        if rule.real_only:
            _check_real(leaves, structure, opt)
        layout = None if tracing else layout_of(inputs)
    watched = _is_watched(inputs, counts)
    key = key_of(state, watched=watched)
    return Prepared(own, kept, roots, counts, active, inputs, all_active, layout, key, watched)


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


def is_kept(setup: Setup, layout: Layout) -> bool:
    """Whether slots are as an optimizer keeps them, beside the parameters of a layout.

    The layout remembers for which one it was so, since that is asked at each step.
    """
    if layout.plans.get("kept") is setup:
        return True
    if not setup.keeps(layout.dtypes):
        return False
    layout.plans["kept"] = setup
    return True


def are_shards() -> bool:
    """Whether the leaves are the local parts of sharded ones."""
    shards = sharding()
    return shards is not None and shards.current_parts() is not None


def may_recall() -> bool:
    """Whether leaves may be known by their looks: nobody follows what is done with them."""
    return not transforms.transformed() and not transforms.observed()


def _is_served(rule: UpdateRule, setup: Setup, layout: Layout) -> bool:
    """Whether an optimizer takes leaves of this layout, which another one may have checked."""
    return is_kept(setup, layout) and (layout.real or not rule.real_only)


def _prepare_known(
    rule: UpdateRule, setup: Setup, trees: list[Tree], state: Any, per_leaf: bool
) -> Prepared | None:
    recalled = recall(trees)
    if recalled is None:
        return None
    inputs, structure, layout, _ = recalled
    if not _is_served(rule, setup, layout):
        return None
    params, *kept = [pytree.Paired(c, structure, None) for c in inputs.targets.columns]
    counts = gather_counts(state.step, structure if per_leaf else None)
    active = list(range(len(inputs.params)))
    watched = _is_watched(inputs, counts)
    roots = _roots(setup.slots)
    key = key_of(state, watched=watched)
    return Prepared(params, kept, roots, counts, active, inputs, True, layout, key, watched)


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
    kept: list[pytree.Paired],
    setup: Setup,
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
    for slot, paired in zip(setup.slots, kept, strict=True):
        path = partial(pytree.path, structure, f"state.{slot.name}")
        dtype_of = partial(slot_dtype, slot, setup.options.moments)
        check_alike(paired.leaves, params.leaves, path, "a moment", dtype_of, slot.shape_of)


def is_followed(prepared: Prepared, options: Any, numbers: list[Any]) -> bool:
    """Whether more than the results may be asked of a step, so that kernels scale nothing."""
    return (
        prepared.watched
        or options.differentiable is True
        or prepared.layout is None
        or not prepared.layout.fast_path_ok
        or any(map(have_history, numbers))
    )


def have_history(numbers: Any) -> bool:
    """Whether a derivative of the step may be asked for by way of its numbers."""
    return not is_read(numbers) and any(
        transforms.has_derivative(number)
        if isinstance(number, Tensor)
        else not isinstance(number, (float, PerLeaf))  # a tree that was not read
        for number in numbers
    )


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
