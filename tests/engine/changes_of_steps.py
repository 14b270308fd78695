"""What may be different about one step of a loop, or from one step on; and all changes by name."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import functionalize, grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import funcopt

from ..cases import tree_map
from .changes_of_tensors import OF_A_TENSOR, PLACES, in_inference, of_a_tensor
from .changes_of_trees import OF_A_LOOP, change, change_for_a_step, detached
from .loops import Change, Loop, Update, look, normals

# Who watches.


def step_within(name: str, wrap: Callable[[Update], Update]) -> None:
    """Add a step that is made within something."""

    @contextmanager
    def around(loop: Loop) -> Iterator[None]:
        loop.within = wrap
        yield
        loop.within = lambda update: update

    OF_A_LOOP[f"a step within {name}"] = around


def _mapped(update: Update) -> Update:
    def step(*trees: Any) -> Any:
        stacked = tree_map(lambda leaf: torch.stack([leaf, leaf]), trees)
        return tree_map(lambda leaf: leaf[0], vmap(update)(*stacked))

    return step


def _differentiated(update: Update) -> Update:
    def step(grads: Any, state: Any, params: Any) -> Any:
        def loss(params: Any) -> tuple[Tensor, Any]:
            made = update(grads, state, params)
            return sum(leaf.abs().sum() for leaf in made[0].values()), made

        return grad(loss, has_aux=True)(params)[1]

    return step


def _pushed(update: Update) -> Update:
    def step(*trees: Any) -> Any:
        return jvp(update, trees, tree_map(torch.ones_like, trees))[0]

    return step


def _in(context: Callable[[], Any]) -> Callable[[Update], Update]:
    def wrap(update: Update) -> Update:
        def step(*trees: Any) -> Any:
            with context():
                return update(*trees)

        return step

    return wrap


class Onlooker(TorchDispatchMode):
    """Sees each operator, and lets it be."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


step_within("vmap", _mapped)
step_within("grad", _differentiated)
step_within("jvp", _pushed)
step_within("functionalize", functionalize)
step_within("no_grad", _in(torch.no_grad))
step_within("inference mode", _in(torch.inference_mode))
step_within("autocast", _in(lambda: torch.autocast("cpu", torch.bfloat16)))
step_within("a dispatch mode", _in(Onlooker))
step_within("a device context", _in(lambda: torch.device("meta")))


def _in_two_threads(update: Update) -> Update:
    def step(*trees: Any) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            return update(*trees)
        finally:
            torch.set_num_threads(before)

    return step


step_within("two threads", _in_two_threads)


@change
def a_step_aside_on_fake_tensors(loop: Loop) -> None:
    mode = FakeTensorMode()
    real = normals(loop.like, 7), detached(loop.state), detached(loop.params)
    trees = tree_map(mode.from_tensor, real)
    opt = loop.afresh()
    with mode:
        try:
            made = opt.update(*trees)
        except Exception as error:  # as where a number is no fake tensor
            made = type(error).__name__, str(error)
    loop.seen.append(look(made))


@change
def another_thread_that_trains_trees_of_this_look(loop: Loop) -> None:
    others = [loop.another(loop.opt), loop.another(loop.opt, "update_")]

    def train() -> None:
        for other in others:
            for _ in range(3):
                other.step()

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(60)
    loop.seen.append([other.seen for other in others])


@change_for_a_step
def a_step_in_another_thread(loop: Loop) -> Iterator[None]:
    def wrap(update: Update) -> Update:
        def step(*trees: Any) -> Any:
            made: list[Any] = []

            def work() -> None:
                try:
                    made.append(update(*trees))
                except Exception as error:
                    made.append(error)

            thread = threading.Thread(target=work)
            thread.start()
            thread.join(60)
            if isinstance(made[0], Exception):
                raise made[0]
            return made[0]

        return step

    loop.within = wrap
    yield
    loop.within = lambda update: update


# Optimizers and numbers.


def innermost(opt: Any) -> Any:
    return innermost(opt.inner) if hasattr(opt, "inner") else opt


def with_innermost(opt: Any, **fields: Any) -> Any:
    """Return the optimizer with fields of the innermost one replaced."""
    if hasattr(opt, "inner"):
        return dataclasses.replace(opt, inner=with_innermost(opt.inner, **fields))
    return dataclasses.replace(opt, **fields)


def of_optimizer(name: str, **fields: Any) -> None:
    """Add a step by the optimizer with other fields, if it has these."""

    @contextmanager
    def around(loop: Loop) -> Iterator[None]:
        before, own = loop.opt, innermost(loop.opt)
        is_known = fields.get("kernel", "auto") in own.rule.kernel_names
        if is_known and all(hasattr(own, field) for field in fields):
            loop.opt = with_innermost(loop.opt, **fields)
        yield
        loop.opt = before

    OF_A_LOOP[f"a step by {name}"] = around


class Raising:
    """A schedule that raises."""

    def __call__(self, step: Tensor) -> float:
        raise ArithmeticError("a schedule that raises")


of_optimizer("another rate", lr=0.3)
of_optimizer("a rate that is a tensor", lr=torch.tensor(0.3, dtype=torch.float64))
of_optimizer("a rate that requires a gradient", lr=torch.tensor(0.3, requires_grad=True))
of_optimizer("a schedule", lr=lambda step: 0.5 / (1 + step))
of_optimizer("a schedule that raises", lr=Raising())
of_optimizer("a schedule that is out of range", lr=lambda step: -1.0)
of_optimizer("the plain kernel", kernel="plain")
of_optimizer("the foreach kernel", kernel="foreach")
of_optimizer("the fused kernel", kernel="fused")
of_optimizer("a kernel that cannot serve", kernel="triton")
of_optimizer("maximize", maximize=True)
of_optimizer("an optimizer that records", differentiable=True)
of_optimizer("an optimizer that does not record", differentiable=False)
of_optimizer("one that keeps more slots", amsgrad=True)
of_optimizer("one with a count for each leaf", step_per_leaf=True)


@change
def the_same_optimizer_built_anew(loop: Loop) -> None:
    loop.opt = with_innermost(loop.opt)


@change
def the_other_method_from_now_on(loop: Loop) -> None:
    loop.method = "update_" if loop.method == "update" else "update"
    loop.held.clear()


@change
def steps_by_another_optimizer_on_these_parameters(loop: Loop) -> None:
    other = loop.another(funcopt.SGD(lr=0.1, momentum=0.9))
    other.params = loop.params
    for _ in range(3):
        other.step()
    loop.seen.append(other.seen)


@change
def a_hyperparameter_filled_with_another_value(loop: Loop) -> None:
    rate = innermost(loop.opt).lr
    if isinstance(rate, Tensor):
        rate.fill_(0.01)


# Counts.


def of_count(name: str, how: Callable[[Tensor], Any]) -> None:
    """Add a change of the innermost count."""

    def counted(state: Any) -> Any:
        if hasattr(state, "inner"):
            return state._replace(inner=counted(state.inner))
        return state._replace(step=how(state.step))

    @contextmanager
    def around(loop: Loop) -> Iterator[None]:
        loop.state = counted(loop.state)
        yield

    OF_A_LOOP[f"a count {name}"] = around


of_count("of another value", lambda step: tree_map(lambda own: own.detach() + 10, step))
of_count("in float32", lambda step: tree_map(lambda own: own.detach().float(), step))
of_count("in int64", lambda step: tree_map(lambda own: own.detach().long(), step))
of_count("below zero", lambda step: tree_map(lambda own: own.detach() - 100, step))
of_count("of shape (1,)", lambda step: tree_map(lambda own: own.detach()[None], step))
of_count(
    "that requires a gradient",
    lambda step: tree_map(lambda own: own.detach().requires_grad_(), step),
)
of_count("of inference mode", lambda step: tree_map(in_inference, step))
of_count("that is a number", lambda step: 3.0)


# What funcopt keeps.


@change
def what_is_kept_given_back(loop: Loop) -> None:
    funcopt.memory.release()


@change_for_a_step
def a_step_without_reuse(loop: Loop) -> Iterator[None]:
    funcopt.memory.reuse("cpu", False)
    yield
    funcopt.memory.reuse("cpu", True)


def every_change() -> dict[str, Change]:
    """Return all changes by name: those of a tensor in each tree, and those of the loop."""
    found = dict(OF_A_LOOP)
    for place in PLACES:
        for name, how in OF_A_TENSOR.items():
            found[f"{place}: {name}"] = of_a_tensor(how, place)
    return found


def nothing(_: Loop) -> Any:
    """The change that is none."""
    return nullcontext()
