"""What may change between two steps of a loop: one thing each."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functionalize, grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import funcopt

from ..cases import tree_map
from .loops import Change, Loop, Trees, Update, look, normals

PLACES = ("params", "grads", "slot", "own")


class Named(Tensor):
    """A subclass that overrides nothing."""


def _cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    # torch warns of an imaginary part that is lost.
    return lambda t: (t.detach().real if t.is_complex() else t.detach()).to(dtype)


def _in_inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.detach().clone()


def _with_data(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        if tensor.is_inference():  # with data from elsewhere torch itself cannot use it
            return tensor
        tensor.data = make(tensor.detach())
        return tensor

    return change


def _offset(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return torch.cat([flat[:1], flat])[flat.numel() > 0 :].view(tensor.shape)


def _transposed(tensor: Tensor) -> Tensor:
    order = list(reversed(range(tensor.ndim)))
    return tensor.detach().permute(order).contiguous().permute(order)


def _sliced(tensor: Tensor) -> Tensor:
    return torch.stack([tensor.detach(), tensor.detach()], -1)[..., 0]


def _set(tensor: Tensor) -> Tensor:
    other = tensor.detach() + 1
    with torch.no_grad():
        return tensor.set_(other.untyped_storage(), 0, tensor.shape, tensor.stride())


def _resized(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.resize_((tensor.numel() + 6,)).fill_(1.0)  # what is new in it is anything


def _grown(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(2 * tensor.untyped_storage().nbytes() + 64)
    return tensor


def _swapped(tensor: Tensor) -> Tensor:
    torch.utils.swap_tensors(tensor, _cast(torch.float64)(tensor))
    return tensor


# What one tensor is replaced by, or what is done to it.
OF_A_TENSOR: dict[str, Callable[[Tensor], Any]] = {
    "cloned": lambda t: t.detach().clone(),
    "detached": Tensor.detach,
    "a view": lambda t: t.view(t.shape),
    "an alias": torch.ops.aten.alias,
    "a lazy clone": lambda t: torch._lazy_clone(t.detach()),
    "told to require a gradient": Tensor.requires_grad_,
    "told to require none": lambda t: t.requires_grad_(False) if t.is_leaf else t.detach(),
    "with a history": lambda t: t.detach().clone().requires_grad_() * 1,
    "a parameter of a module": lambda t: nn.Parameter(t.detach().clone()),
    "of a subclass": lambda t: t.detach().clone().as_subclass(Named),
    "given other data": _with_data(lambda t: t + 1),
    "given data of another dtype": _with_data(_cast(torch.bfloat16)),
    "given data of another shape": _with_data(lambda t: t[None]),
    "given transposed data": _with_data(_transposed),
    "set to another storage": _set,
    "resized": _resized,
    "in a storage that was resized": _grown,
    "swapped for another": _swapped,
    "not aligned": _offset,
    "transposed": _transposed,
    "sliced": _sliced,
    "expanded": lambda t: t.detach().sum().expand(t.shape),
    "negative when read": lambda t: torch.complex(t.detach(), -t.detach()).conj().imag,
    "in float64": _cast(torch.float64),
    "in float16": _cast(torch.float16),
    "in complex64": _cast(torch.complex64),
    "in int64": _cast(torch.int64),
    "without values": lambda t: t.detach().to("meta"),
    "sparse": lambda t: t.detach().to_sparse(),
    "of inference mode": _in_inference,
    "from NumPy": lambda t: torch.from_numpy(t.detach().numpy().copy()),
    "in shared memory": lambda t: t.detach().clone().share_memory_(),
    "not a number": lambda t: t.detach() * float("nan"),
    "of one more dimension": lambda t: t.detach()[None],
    "empty": lambda t: t.detach().reshape(-1)[:0],
    "None": lambda t: None,
    "a number": lambda t: 1.0,
}


def of_a_tensor(how: Callable[[Tensor], Any], place: str, name: str = "w") -> Change:
    """Return the change of one leaf of one tree."""

    @contextmanager
    def change(loop: Loop) -> Iterator[None]:
        before = loop.change_grads
        if place == "params":
            loop.params = _changed(loop.params, name, how)
        elif place == "grads":
            loop.change_grads = lambda grads: _changed(before(grads), name, how)
        else:
            loop.state = _in_state(loop.state, place, lambda tree: _changed(tree, name, how))
        loop.look_again()  # at what is held, which the change may have written
        yield
        loop.change_grads = before

    return change


def _changed(tree: Any, name: str, how: Callable[[Tensor], Any]) -> Any:
    return {key: how(leaf) if key == name else leaf for key, leaf in tree.items()}


def _in_state(state: Any, place: str, how: Callable[[Trees], Any]) -> Any:
    """Change a tree of a state: a slot of the innermost one, or the wrapper's own if it has one."""
    if place == "slot" and hasattr(state, "inner"):
        return state._replace(inner=_in_state(state.inner, place, how))
    for field, value in zip(state._fields, state, strict=True):
        if isinstance(value, dict) and field != "step":
            return state._replace(**{field: how(value)})
    return state


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
    loop.state = _in_state(loop.state, "slot", _reordered)


@change
def a_wrappers_tree_in_another_order(loop: Loop) -> None:
    loop.state = _in_state(loop.state, "own", _reordered)


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
    loop.state = _in_state(loop.state, "slot", lambda tree: {**tree, "w": loop.params["w"]})


@change
def a_slot_that_is_another_slot(loop: Loop) -> None:
    loop.state = _in_state(loop.state, "slot", lambda tree: {**tree, "w": tree["u"]})


@change
def everything_in_float64(loop: Loop) -> None:
    loop.like = {name: (shape, torch.float64) for name, (shape, _) in loop.like.items()}
    widen = functools.partial(tree_map, _cast(torch.float64))
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
    _in_state(loop.state, "slot", lambda tree: seen.append(tree) or tree)
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
        if isinstance(loop.params, dict):
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
of_count("of inference mode", lambda step: tree_map(_in_inference, step))
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
