"""The optimizer under test: what it has, what can be replaced in it, and how it is run."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import pytree
from .._core.tensors import compute_dtype
from .._core.types import Tree, optimizers_in
from .._engine.dispatch import unserved
from .._engine.rule import UpdateRule, slot_dtype
from ._compare import NotApplicable


class Step(NamedTuple):
    """One update of a run: what went in, and what came out."""

    number: int  # from 1
    grads: Tree
    state: Tree
    params: Tree
    new_params: Tree
    new_state: Tree

    @property
    def given(self) -> tuple[Tree, Tree, Tree]:
        """What the update took."""
        return self.grads, self.state, self.params

    @property
    def moved(self) -> tuple[Tree, Tree]:
        """What it returned."""
        return self.new_params, self.new_state


def run(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> Iterator[Step]:
    """Yield the updates of a run, one after the other."""
    state = opt.init(params)
    for number, grads in enumerate(gradient_sequence, 1):
        new_params, new_state = opt.update(grads, state, params)
        yield Step(number, grads, state, params, new_params, new_state)
        params, state = new_params, new_state


def last(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> Step:
    """Return the last update of a run."""
    *_, final = run(opt, params, gradient_sequence)
    return final


def field(opt: Any, name: str) -> Any:
    """Return a hyperparameter of an optimizer, or of the first one it wraps that has it."""
    found = fields(opt, name)
    if not found:
        raise NotApplicable(_lacks(opt, name))
    return found[0]


def _lacks(opt: Any, name: str) -> str:
    """Say why no copy of an optimizer can be given another value for a hyperparameter."""
    if hasattr(opt, name):
        return f"{name} is no field of a dataclass, so that no other value can be given to it"
    return f"it has no {name}"


def other_than(opt: Any, kinds: Iterable[type]) -> str:
    """Say what an optimizer is that is none of these classes of funcopt's."""
    name = type(opt).__name__
    if name in [kind.__name__ for kind in kinds]:
        return "this is a class of that name, but none of funcopt's"
    return f"this is of class {name}"


def fixed_lr(opt: Any) -> float:
    """Return the learning rate of an optimizer for which it is a number."""
    lr = field(opt, "lr")
    if callable(lr):
        raise NotApplicable("its lr is a schedule")
    return float(lr)


def fields(opt: Any, name: str) -> list[Any]:
    """Return a hyperparameter of an optimizer and of each one it wraps, of those that have it."""
    own = [getattr(opt, name)] if name in _fields(opt) else []
    return own + [value for inner in _wrapped(opt).values() for value in fields(inner, name)]


def kernels(opt: Any, params: Tree) -> list[str]:
    """Return the names of those kernels of an optimizer that serve these parameters."""
    field(opt, "kernel")
    known = [part for part in optimizers_in(opt) if isinstance(_rule(part), UpdateRule)]
    if not known:
        raise NotApplicable("its kernels are of its own")
    leaves = leaves_of(params)
    return [
        name
        for name in _rule(known[0]).kernel_names
        if all(name in _rule(part).kernel_names for part in known)
        and all(_serves(part, name, leaf) for part in known for leaf in leaves)
    ]


def _rule(opt: Any) -> Any:
    return getattr(opt, "rule", None)


def _serves(opt: Any, name: str, leaf: Tensor) -> bool:
    """Whether a kernel serves a leaf, in its dtype, or in float32, as wrappers may hand it on."""
    rule, options = opt.rule, opt.rule.setup_of(opt).options
    if unserved(rule, name, leaf.device) is not None:
        return False
    if name in ("auto", "plain"):
        return True
    for dtype in {leaf.dtype, compute_dtype(leaf.dtype)}:
        kept = [slot_dtype(slot, options.moments, dtype) for slot in rule.kept_slots(opt)]
        own, *slots = dtypes = [each.to_real() for each in (dtype, *kept)]
        by_chance = options.rounding == "stochastic" and any(each.itemsize == 2 for each in dtypes)
        if not rule.kernel(name).serves_dtypes(own, slots):
            return False
        if by_chance and not rule.kernel(name).rounds_stochastically:
            return False
    return True


def variants(opt: Any, params: Tree) -> list[Any]:
    """Return the optimizer with each kernel that serves these parameters, if it has a choice."""
    try:
        return [replace(opt, kernel=name) for name in kernels(opt, params)]
    except NotApplicable:
        return [opt]


def with_moments_of_params(opt: Any) -> Any:
    """Return the optimizer with moments in the dtype of parameters in float32 and wider.

    In another dtype they are rounded to it, by which a comparison in float64 would be blurred.
    """
    return replace(opt, moments="auto") if fields(opt, "moments") else opt


def _wrapped(opt: Any) -> dict[Any, Any]:
    """The optimizers that an optimizer wraps: one, or several by their labels."""
    if "inner" not in _fields(opt):
        return {}
    return opt.inner if isinstance(opt.inner, dict) else {None: opt.inner}


def _fields(opt: Any) -> set[str]:
    """The names that a copy of an optimizer can be given other values for."""
    if not dataclasses.is_dataclass(opt):
        return set()
    return {each.name for each in dataclasses.fields(opt) if each.init}


def replace(opt: Any, **values: Any) -> Any:
    """Return the optimizer with some hyperparameters replaced, its own or those of what it wraps.

    Of several that it wraps, those are replaced in all that have them.
    """
    if not dataclasses.is_dataclass(opt) or isinstance(opt, type):
        raise NotApplicable(f"{type(opt).__name__} is not a dataclass, so nothing can be replaced")
    own = {name: value for name, value in values.items() if name in _fields(opt)}
    others = {name: value for name, value in values.items() if name not in own}
    if others:
        wrapped, replaced = _wrapped(opt), {}
        for label, inner in wrapped.items():
            with contextlib.suppress(NotApplicable):
                replaced[label] = replace(inner, **others)
        if not replaced:
            raise NotApplicable("; ".join(_lacks(opt, name) for name in others))
        own["inner"] = replaced[None] if None in wrapped else {**wrapped, **replaced}
    return dataclasses.replace(opt, **own)


def tree_map(function: Any, tree: Tree) -> Tree:
    """Map a function over the tensors of a tree; what is none, such as None, stays as it is."""
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def leaves_of(tree: Tree) -> list[Tensor]:
    """Return the tensors of a tree."""
    return [leaf for leaf in pytree.flatten(tree)[0] if isinstance(leaf, Tensor)]


def saved_and_loaded(tree: Tree) -> Tree:
    """Write the leaves of a tree to a file, and return a tree of what is read from there."""
    leaves, structure = pytree.flatten(tree)
    file = io.BytesIO()
    torch.save(leaves, file)
    file.seek(0)
    return pytree.unflatten(structure, torch.load(file, weights_only=True))


def clone(tree: Tree) -> Tree:
    """Copy the tensors of a tree, layout and all."""
    return tree_map(_clone, tree)


def _clone(tensor: Tensor) -> Tensor:
    copy = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    overlapping = any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.clone() if overlapping else copy.copy_(tensor)


def cast(tree: Tree, dtype: torch.dtype) -> Tree:
    """Cast the tensors of a tree; complex ones to the complex dtype of that precision.

    Counts and other integers stay what they are.
    """

    def convert(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(dtype.to_complex())
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return tree_map(convert, tree)


def rounded(exact: Tree, like: Tree) -> Tree:
    """Cast the tensors of a tree to the dtypes of those of another."""
    dtypes = iter([leaf.dtype for leaf in leaves_of(like)])
    return tree_map(lambda tensor: tensor.to(next(dtypes)), exact)


def finite(tree: Tree) -> Tree:
    """Put zeros in place of what is not finite."""
    return tree_map(lambda t: torch.where(t.isfinite(), t, torch.zeros_like(t)), tree)
