"""What may be done to whole trees of a loop, and who may hold them."""

from __future__ import annotations

import functools
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from ..cases import tree_map
from .changes_of_tensors import cast, in_state
from .loops import Change, Loop, Trees

OF_A_LOOP: dict[str, Change] = {}


def change(function: Callable[[Loop], Any]) -> Callable[[Loop], Any]:
    """Add a change that lasts, named after its function."""

    @contextmanager
    def around(loop: Loop) -> Iterator[None]:
        function(loop)
        yield

    OF_A_LOOP[_words(function)] = around
    return function


def change_for_a_step(function: Callable[[Loop], Iterator[None]]) -> None:
    """Add one that is undone after the step, if the function does so."""
    OF_A_LOOP[_words(function)] = contextmanager(function)


def _words(function: Any) -> str:
    return function.__name__.replace("_", " ")


# Trees.


def _reordered(tree: Any) -> Any:
    """Let the first two keys change places: their leaves may look alike."""
    one, other, *rest = tree.items()
    return dict([other, one, *rest])


@change
def parameters_in_another_order(loop: Loop) -> None:
    loop.params = _reordered(loop.params)


@change
def a_slot_in_another_order(loop: Loop) -> None:
    loop.state = in_state(loop.state, "slot", _reordered)


@change
def a_wrappers_tree_in_another_order(loop: Loop) -> None:
    loop.state = in_state(loop.state, "own", _reordered)


@change
def parameters_in_another_kind_of_dict(loop: Loop) -> None:
    loop.params = OrderedDict(loop.params)


@change
def a_key_renamed_in_all_trees_but_the_gradients(loop: Loop) -> None:
    loop.params = {f"{name}'": leaf for name, leaf in loop.params.items()}


@change
def two_parameters_that_change_places(loop: Loop) -> None:
    loop.params = {**loop.params, "w": loop.params["u"], "u": loop.params["w"]}


@change
def tied_parameters(loop: Loop) -> None:
    loop.params = {**loop.params, "u": loop.params["w"].view(loop.params["w"].shape)}


@change
def a_slot_that_is_a_parameter(loop: Loop) -> None:
    loop.state = in_state(loop.state, "slot", lambda tree: {**tree, "w": loop.params["w"]})


@change
def a_slot_that_is_another_slot(loop: Loop) -> None:
    loop.state = in_state(loop.state, "slot", lambda tree: {**tree, "w": tree["u"]})


@change
def everything_in_float64(loop: Loop) -> None:
    loop.like = {name: (shape, torch.float64) for name, (shape, _) in loop.like.items()}
    widen = functools.partial(tree_map, cast(torch.float64))
    loop.params, loop.state = widen(loop.params), widen(loop.state)


@change
def everything_copied(loop: Loop) -> None:
    loop.params, loop.state = deepcopy((detached(loop.params), detached(loop.state)))


@change
def everything_pickled(loop: Loop) -> None:
    loop.params, loop.state = pickle.loads(pickle.dumps((loop.params, loop.state)))


@change
def everything_loaded_in_place(loop: Loop) -> None:
    with torch.no_grad():
        for leaf in loop.params.values():
            leaf.copy_(leaf + 1)
    loop.look_again()


def detached(tree: Any) -> Any:
    return tree_map(Tensor.detach, tree)


# Gradients.


def of_gradients(function: Callable[[Loop, Trees], Any]) -> None:
    """Add a change of the gradients of one step."""

    def around(loop: Loop) -> Iterator[None]:
        before = loop.change_grads
        loop.change_grads = lambda grads: function(loop, before(grads))
        yield
        loop.change_grads = before

    around.__name__ = function.__name__
    change_for_a_step(around)


@of_gradients
def gradients_in_another_order(_: Loop, grads: Trees) -> Any:
    return _reordered(grads)


@of_gradients
def gradients_in_another_kind_of_dict(_: Loop, grads: Trees) -> Any:
    return OrderedDict(grads)


@of_gradients
def no_gradient_at_all(_: Loop, grads: Trees) -> Any:
    return dict.fromkeys(grads)


@of_gradients
def a_gradient_left_out(_: Loop, grads: Trees) -> Any:
    return {name: leaf for name, leaf in grads.items() if name != "w"}


@of_gradients
def a_gradient_of_no_parameter(_: Loop, grads: Trees) -> Any:
    return {**grads, "z": grads["w"]}


@of_gradients
def a_gradient_that_is_a_parameter(loop: Loop, grads: Trees) -> Any:
    return {**grads, "w": loop.params["w"]}


@of_gradients
def a_gradient_that_is_a_view_of_a_parameter(loop: Loop, grads: Trees) -> Any:
    return {**grads, "w": loop.params["w"].detach()}


@of_gradients
def a_gradient_that_is_of_a_state(loop: Loop, grads: Trees) -> Any:
    seen: list[Trees] = []
    in_state(loop.state, "slot", lambda tree: seen.append(tree) or tree)
    return {**grads, "w": seen[0]["w"]} if seen else grads


@of_gradients
def a_gradient_that_comes_twice(_: Loop, grads: Trees) -> Any:
    return {**grads, "u": grads["w"]}


# Who holds what.


@change
def old_results_held(loop: Loop) -> None:
    loop.hold((loop.params, loop.state) if loop.method == "update" else ())


@change
def old_results_held_by_views(loop: Loop) -> None:
    if loop.method == "update":
        loop.hold([leaf.detach().reshape(-1)[1:] for leaf in loop.params.values()])


@change
def old_results_held_by_numpy(loop: Loop) -> None:
    if loop.method == "update":
        arrays = [
            leaf.detach().numpy()
            for leaf in loop.params.values()
            if leaf.dtype is not torch.bfloat16
        ]
        loop.hold([torch.from_numpy(array) for array in arrays])
