"""What it means to be a pure function of trees."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from ..._core import pytree
from ..._core.types import Tree
from .._compare import MOVED, ROUNDING, LawBroken, NotApplicable, compare, compare_moved, unlike
from .._subject import Step, cast, clone, finite, leaves_of, run, saved_and_loaded, tree_map


def never_mutates(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """`init` and `update` change no bit of what they are given."""
    before = clone(params)
    state = opt.init(params)
    compare("never_mutates", 0, "params", params, before)
    for number, grads in enumerate(gradient_sequence, 1):
        copies = [clone(tree) for tree in (grads, state, params)]
        new_params, new_state = opt.update(grads, state, params)
        for root, tree, copy in zip(_ROOTS, (grads, state, params), copies, strict=True):
            compare("never_mutates", number, root, tree, copy)
            if any(leaf.requires_grad for leaf in leaves_of(tree)):
                raise LawBroken(
                    f"never_mutates: step {number}, {root}: was made to require a gradient"
                )
        params, state = new_params, new_state


_ROOTS = ("grads", "state", "params")


def outputs_share_no_memory(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """No tensor that `init` or `update` returns shares memory with another or with an input."""
    _check_memory(0, {"state": opt.init(params)}, {"params": params})
    for step in run(opt, params, gradient_sequence):
        given = dict(zip(_ROOTS, step.given, strict=True))
        _check_memory(step.number, dict(zip(MOVED, step.moved, strict=True)), given)


def _check_memory(number: int, results: dict[str, Tree], given: dict[str, Tree]) -> None:
    taken = [place for root, tree in given.items() for place in _places(tree, root)]
    for root, tree in results.items():
        for start, end, path in _places(tree, f"new_{root}"):
            owner = next((own for first, last, own in taken if first < end and start < last), None)
            if owner is not None:
                raise LawBroken(
                    f"outputs_share_no_memory: step {number}, {path}: got the memory of {owner}, "
                    f"expected its own"
                )
            taken.append((start, end, path))


def _places(tree: Tree, root: str) -> list[tuple[int, int, str]]:
    """Where the elements of each leaf lie: those of several may share one storage."""
    leaves, structure = pytree.flatten(tree)
    places = []
    for path, leaf in zip(pytree.paths(structure, root), leaves, strict=True):
        if isinstance(leaf, Tensor) and leaf.numel() > 0:
            last = sum(s * (n - 1) for s, n in zip(leaf.stride(), leaf.shape, strict=True))
            start = leaf.data_ptr()
            places.append((start, start + (last + 1) * leaf.element_size(), path))
    return places


def state_keeps_no_history(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Beside parameters that require a gradient, as `nn.Parameter`s do, the state has no history.

    A state that keeps one holds the graph of every step before it, which grows as long as training
    goes on. Parameters are leaves of autograd here, and gradients have no history.
    """

    def as_leaves(tree: Tree) -> Tree:
        return tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), tree)

    params = as_leaves(params)
    state = opt.init(params)
    _has_no_history(0, state)
    for number, grads in enumerate(gradient_sequence, 1):
        new_params, state = opt.update(grads, state, params)
        _has_no_history(number, state)
        params = as_leaves(new_params)


def _has_no_history(number: int, state: Tree) -> None:
    leaves, structure = pytree.flatten(state)
    for path, leaf in zip(pytree.paths(structure, "state"), leaves, strict=True):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            of = "none" if leaf.grad_fn is None else type(leaf.grad_fn).__name__
            raise LawBroken(
                f"state_keeps_no_history: step {number}, {path}: got a tensor that requires a "
                f"gradient (grad_fn {of}), expected none: at nn.Parameters the graph would grow "
                f"with each update. Compute it of param.detach(), or within torch.no_grad()"
            )


def deterministic(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """The same inputs give the same bits, with whatever memory held before."""
    first = list(run(opt, params, gradient_sequence))
    again = list(run(opt, clone(params), clone(gradient_sequence)))
    for step, wanted in zip(again, first, strict=True):
        compare_moved("deterministic", step.number, step.moved, wanted.moved)


def keeps_structure(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Trees, shapes, dtypes, devices and dense strides stay as they are from step to step."""
    for step in run(opt, params, gradient_sequence):
        _keeps(step, "params", step.new_params, step.params)
        _keeps(step, "state", step.new_state, step.state)


def _keeps(step: Step, root: str, new: Tree, old: Tree) -> None:
    news, structure = pytree.flatten(new)
    olds, expected = pytree.flatten(old)
    law = f"keeps_structure: step {step.number}"
    if structure != expected:
        raise LawBroken(f"{law}, {root}: got a tree {structure}, expected {expected}")
    for path, one, other in zip(pytree.paths(structure, root), news, olds, strict=True):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            continue
        reason = unlike(one, other)
        if reason is not None:
            raise LawBroken(f"{law}, {path}: {reason}")
        dense = _strides(other) == _strides(torch.empty_like(other))
        if dense and _strides(one) != _strides(other):
            raise LawBroken(f"{law}, {path}: got strides {one.stride()}, expected {other.stride()}")


def _strides(tensor: Tensor) -> list[int]:
    """The strides that matter: along a dimension of size 1, or in an empty tensor, none does."""
    if tensor.numel() == 0:
        return []
    return [s for s, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def inplace_is_pure(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """`update_` writes the bits that `update` returns into the trees it was given."""
    if not callable(getattr(opt, "update_", None)):
        raise NotApplicable("it has no update_")
    own, state = clone(params), opt.init(params)
    memory = _places((own, state), "")
    for step in run(opt, params, gradient_sequence):
        result = opt.update_(step.grads, state, own)
        compare_moved("inplace_is_pure", step.number, (own, state), step.moved)
        compare("inplace_is_pure", step.number, "result", result, (own, state))
    if _places((own, state), "") != memory:
        raise LawBroken("inplace_is_pure: the tensors were moved in memory instead of written")


def round_trips(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """A state that was saved and loaded goes on to the bit."""
    state = opt.init(params)
    for number, grads in enumerate(gradient_sequence, 1):
        loaded = saved_and_loaded(state)
        compare("round_trips", number, "state", loaded, state)
        expected = opt.update(grads, state, params)
        compare("round_trips", number, "result", opt.update(grads, loaded, params), expected)
        params, state = expected


def survives_zero_gradients(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
    """Gradients of exactly zero, at first and after others, leave every number finite.

    What `init` makes infinite, as the best score before there is one, may stay so.
    """
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        own = cast(tree_map(torch.real, params), dtype)
        zeros = tree_map(torch.zeros_like, own)
        sequence = [zeros, zeros]
        if dtype in (torch.float32, torch.float64):
            # In 16 bits a second moment can vanish where the first does not: that is their range.
            given = [cast(tree_map(torch.real, grads), dtype) for grads in gradient_sequence]
            sequence += [*given, zeros, zeros]
        begun = opt.init(own)
        for step in run(opt, own, sequence):
            law = f"survives_zero_gradients ({dtype})"
            new_params, state = step.moved
            expected = finite(new_params), _finite_but_for(begun, state)
            compare_moved(law, step.number, step.moved, expected)


def _finite_but_for(begun: Tree, state: Tree) -> Tree:
    """Return a state with zeros for what is not finite, unless it was infinite at first."""
    first = leaves_of(begun)
    if list(map(Tensor.size, first)) != list(map(Tensor.size, leaves_of(state))):
        return finite(state)
    spared = (leaf.isinf() for leaf in first)
    return tree_map(
        lambda leaf: torch.where(leaf.isinf() & next(spared), leaf, finite(leaf)), state
    )


def bad_trees_raise(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:  # noqa: ARG001
    """A gradient of a wrong structure or shape raises; keys in another order pair or raise."""
    leaves = [leaf for leaf in leaves_of(params) if leaf.ndim > 0 and leaf.numel() > 1]
    device = leaves[0].device if leaves else "cpu"

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.float32, device=device)

    given = {"a": leaves[0] if leaves else ones(2), "b": ones(2, 3), "c": ones(2, 3)}
    grads = {name: torch.full_like(leaf, i + 1.0) for i, (name, leaf) in enumerate(given.items())}
    state = opt.init(given)
    _check_takes(opt, clone(grads), clone(given))
    bad = {
        "a missing key": {name: grads[name] for name in ("a", "b")},
        "an extra key": {**grads, "d": ones(2)},
        "a renamed key": {"a": grads["a"], "b": grads["b"], "d": grads["c"]},
        "a transposed gradient": {**grads, "b": grads["b"].mT},
        "a gradient to broadcast": {**grads, "b": grads["b"][:1]},
        "a list for a dict": list(grads.values()),
    }
    silent = []
    for what, wrong in bad.items():
        try:
            opt.update(wrong, opt.init(given), clone(given))
        except Exception:  # which error it is, is the optimizer's choice
            continue
        silent.append(what)
    if silent:
        raise LawBroken(
            f"bad_trees_raise: step 1, grads: got no error for {', '.join(silent)}, expected one"
        )
    turned = OrderedDict(reversed(grads.items()))
    try:
        moved = opt.update(turned, state, given)[0]
    except Exception:  # to be that strict is to be right, too
        return
    compare("bad_trees_raise", 1, "params", moved, opt.update(grads, state, given)[0], ROUNDING)


def _check_takes(opt: Any, grads: Tree, params: Tree) -> None:
    """Tell apart an optimizer that raises whatever it is given."""
    try:
        opt.update(grads, opt.init(params), params)
    except Exception as error:
        raise NotApplicable(
            f"it raises for right gradients, too: {type(error).__name__}: {error}"
        ) from error
