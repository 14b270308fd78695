"""A state machine: everything one may do with an optimizer, in any order, against a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor
from torch.func import vmap

from .._core import pytree
from .._core.types import Tree
from ..interop import from_state_dict, to_state_dict
from . import strategies
from ._compare import compare, compare_moved
from ._subject import clone, saved_and_loaded, tree_map, variants, with_moments_of_params
from .oracles import oracle_of

# The machine runs in float64 against a model in float64, so that many updates drift by rounding
# alone, and what is wrong stands out. The drift is some ulp an update, amplified by division.
_DRIFT = {torch.float64: 2.0**20, torch.complex128: 2.0**20}


class OptimizerMachine(RuleBasedStateMachine):
    """Updates, in place or not, mapped or not, of whole or split trees, interleaved at random.

    Beside the optimizer runs its oracle; after each rule both agree. To test an optimizer of your
    own, subclass and set `optimizers`, whose moments are in float64 here, whatever dtype is drawn;
    another thing to do with an optimizer is one more method, a `hypothesis.stateful.rule` that
    leaves `params` and `state` as the optimizer would.

    Example:
        >>> from funcopt.testing import OptimizerMachine, strategies
        >>> class AMSGradMachine(OptimizerMachine):
        ...     optimizers = strategies.adamws(amsgrad=True)
        >>> TestAMSGrad = AMSGradMachine.TestCase  # which pytest and unittest collect
    """

    optimizers: ClassVar[st.SearchStrategy[Any]] = strategies.optimizers()
    params_strategy: ClassVar[st.SearchStrategy[Tree]] = strategies.params(
        dtype=st.sampled_from([torch.float64, torch.complex128])
    )

    opt: Any
    params: Tree
    state: Tree

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        """Draw an optimizer and its parameters."""
        self.opt = with_moments_of_params(data.draw(self.optimizers))
        self.params = clone(data.draw(self.params_strategy))
        self.state = self.opt.init(self.params)
        self.model = clone(self.params), clone(self.state)
        self.largest = _larger(self.model, self.model)
        self.updates = 0

    def gradients(self, data: st.DataObject, *, none: bool = False) -> Tree:
        """Draw gradients, and let the model take a step with them."""
        grads = data.draw(strategies.gradients(self.params, none=none, layouts=["contiguous"]))
        model_params, model_state = self.model
        self.model = oracle_of(self.opt)(self.opt, grads, model_state, model_params)
        self.largest = _larger(self.largest, self.model)
        self.updates += 1
        return grads

    @rule(data=st.data())
    def update(self, data: st.DataObject) -> None:
        """Take a pure update."""
        self.params, self.state = self.opt.update(
            self.gradients(data, none=True), self.state, self.params
        )

    @precondition(lambda self: hasattr(self.opt, "update_"))
    @rule(data=st.data())
    def update_in_place(self, data: st.DataObject) -> None:
        """Take an update in place."""
        self.opt.update_(self.gradients(data, none=True), self.state, self.params)

    @rule(data=st.data())
    def change_kernel(self, data: st.DataObject) -> None:
        """Go on with another kernel, if there is a choice."""
        self.opt = data.draw(st.sampled_from(variants(self.opt, self.params)))

    @rule(data=st.data(), dim=st.sampled_from([0, -1]))
    def update_as_a_member(self, data: st.DataObject, dim: int) -> None:
        """Stack the run beside another, take a mapped update, and go on as one of the members."""
        trees = (self.gradients(data), self.state, self.params)
        beside = tree_map(lambda t: torch.stack([_another(t), t], dim), trees)
        mapped = vmap(self.opt.update, dim)(*beside)
        self.params, self.state = tree_map(lambda t: t[1].clone(), mapped)

    @rule(data=st.data())
    def update_in_two_halves(self, data: st.DataObject) -> None:
        """Split the tree, update each half as a tree of its own, and join them again."""
        trees = self.gradients(data, none=True), self.state, self.params
        structure = pytree.flatten(self.params)[1]
        count = structure.num_leaves
        if count < 2:
            self.params, self.state = self.opt.update(*trees)
            return
        results = [
            self.opt.update(*(_part(tree, structure, half) for tree in trees))
            for half in (range(count // 2), range(count // 2, count))
        ]
        self.params = _join(self.params, structure, [params for params, _ in results])
        self.state = _join(self.state, structure, [state for _, state in results])

    @rule()
    def save_and_load(self) -> None:
        """Write the run to a file, and go on from there."""
        self.params, self.state = saved_and_loaded((self.params, self.state))

    @precondition(lambda self: self.only_tensors())
    @rule()
    def checkpoint(self) -> None:
        """Make the state a flat dict, write that to a file, and read it into a new state."""
        entries = saved_and_loaded(to_state_dict(self.state))
        state = from_state_dict(self.opt.init(self.params), entries)
        compare("the checkpoint", self.updates, "state", state, self.state)
        self.state = state

    def only_tensors(self) -> bool:
        """Whether the state is tensors alone, as a checkpoint must be."""
        return hasattr(self, "state") and all(
            isinstance(leaf, Tensor) for leaf in pytree.flatten(self.state)[0]
        )

    @invariant()
    def agrees_with_the_model(self) -> None:
        """Parameters and state are the oracle's."""
        if hasattr(self, "model"):
            ours = self.params, self.state
            compare_moved("the model", self.updates, ours, self.model, _DRIFT, self.largest)


def _larger(one: Tree, other: Tree) -> Tree:
    """Return the larger magnitudes of two trees: what is small now has the rounding of those."""
    (ones, structure), (others, _) = pytree.flatten(one), pytree.flatten(other)
    pairs = zip(ones, others, strict=True)
    return pytree.unflatten(
        structure,
        [b if b.dtype is torch.bool else torch.maximum(a.abs(), b.abs()) for a, b in pairs],
    )


def _another(tensor: Tensor) -> Tensor:
    """A tensor like another one with other values, unless it counts or answers something."""
    return tensor * 2 if tensor.is_floating_point() or tensor.is_complex() else tensor


def _like(structure: pytree.Structure) -> Callable[[Any], bool]:
    """Whether a subtree is one of the parameters' structure: a tree of moments, say."""
    return lambda tree: pytree.flatten(tree)[1] == structure


def _part(tree: Tree, structure: pytree.Structure, half: range) -> Tree:
    """Take some leaves of each subtree of the parameters' structure, as a list."""
    subtrees, outside = pytree.flatten_above(tree, _like(structure))
    parts = [
        [pytree.flatten(each)[0][i] for i in half] if _like(structure)(each) else each
        for each in subtrees
    ]
    return pytree.unflatten(outside, parts)


def _join(tree: Tree, structure: pytree.Structure, halves: list[Tree]) -> Tree:
    """Put the parts of each subtree together again; what is not split is that of the first."""
    subtrees, outside = pytree.flatten_above(tree, _like(structure))
    parts = [outside.flatten_up_to(half) for half in halves]
    joined = [
        pytree.unflatten(structure, [leaf for half in own for leaf in half])
        if _like(structure)(each)
        else own[0]
        for each, *own in zip(subtrees, *parts, strict=True)
    ]
    return pytree.unflatten(outside, joined)
