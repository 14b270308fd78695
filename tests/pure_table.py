"""What `pure` makes of every optimizer of torch, with the options that torch's own tests give it.

`python -m tests.pure_table` writes the table `tests/PURE.md`.
"""

import functools
import inspect
import pathlib
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.func import grad, jvp, vmap

import funcopt

from .cases import assert_same_bits, clone, random_like, tree_map

TABLE = pathlib.Path(__file__).with_name("PURE.md")

# Torch's tests are imported in a process of their own: they change settings of the whole process.
_INPUTS = """
import pickle, sys
from torch.testing._internal.common_optimizers import optim_db
found = {}
for info in optim_db:
    inputs = info.optim_inputs_func(device="cpu")
    found[info.optim_cls.__name__] = [dict(each.kwargs) for each in inputs]
sys.stdout.buffer.write(pickle.dumps(found))
"""


@functools.cache
def inputs() -> dict[str, list[dict[str, Any]]]:
    """What torch tests each of its optimizers with, by the name of the class."""
    run = subprocess.run([sys.executable, "-c", _INPUTS], capture_output=True, check=True)
    found: dict[str, list[dict[str, Any]]] = pickle.loads(run.stdout)
    for name, tried in found.items():
        paths = {"foreach", "differentiable", "fused"} & set(_signature(name).parameters)
        tried += [{path: True} for path in sorted(paths) if name != "LBFGS"]
    return found


def _signature(name: str) -> inspect.Signature:
    return inspect.signature(kind_of(name))


def kind_of(name: str) -> Any:
    return getattr(torch.optim, name)


def params_for(name: str) -> dict[str, Any]:
    """Leaves of two dtypes, of every number of dimensions that a class takes."""
    params = {"w": torch.randn(4, 3), "v": torch.randn(3, 5, dtype=torch.float64)}
    if name != "Muon":
        params |= {"b": torch.randn(7), "s": torch.randn(())}
    if name not in ("Muon", "Adafactor"):  # which divides by the number of elements
        params["e"] = torch.randn(0, 2)
    return params


def gradients_for(params: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Gradients, of which some are None: the first one of a leaf, and a later one."""
    gradients = [random_like(params) for _ in range(count)]
    for index in (0, 3):
        gradients[index]["w"] = None
    return gradients


def steps_of_torch(
    name: str, options: dict[str, Any], params: Any, gradients: list[Any]
) -> tuple[Any, Any]:
    """The parameters and the state that the class itself makes, the state by slot and leaf."""
    own = clone(params)
    opt = kind_of(name)(own.values(), **options)
    for grads in gradients:
        for key, leaf in own.items():
            leaf.grad = None if grads[key] is None else grads[key].clone()
        opt.step()
    slots: dict[str, Any] = {}
    for key, leaf in own.items():
        for slot, value in opt.state[leaf].items():
            slots.setdefault(slot, dict.fromkeys(own, ()))[key] = value
    return own, slots


def has_bits(name: str, options: dict[str, Any]) -> bool:
    """Whether 20 steps have the bits of the class, out of place and in place."""
    opt, params = funcopt.pure(kind_of(name), **options), params_for(name)
    gradients = gradients_for(params, 20)
    expected = steps_of_torch(name, options, params, gradients)
    inplace, inplace_state = clone(params), opt.init(params)
    state = opt.init(params)
    for grads in gradients:
        before = clone((grads, state, params))
        new_params, new_state = opt.update(grads, state, params)
        assert_same_bits((grads, state, params), before)
        params, state = new_params, new_state
        opt.update_(grads, inplace_state, inplace)
    assert_same_bits((params, state.slots), expected)
    assert_same_bits((inplace, inplace_state.slots), expected)
    return True


def is_mapped(name: str, options: dict[str, Any]) -> bool:
    """Whether members of a vmap have the bits that they have alone."""
    opt = funcopt.pure(kind_of(name), **options)
    members = [params_for(name) for _ in range(2)]
    gradients = [[random_like(own) for own in members] for _ in range(3)]
    params, state = _stacked(members), vmap(opt.init)(_stacked(members))
    for grads in gradients:
        params, state = vmap(opt.update)(_stacked(grads), state, params)
    alone = []
    for index, start in enumerate(members):
        own, own_state = start, opt.init(start)
        for grads in gradients:
            own, own_state = opt.update(grads[index], own_state, own)
        alone.append((own, own_state))
    assert_same_bits((params, state), _stacked(alone))
    return True


def is_compiled(name: str, options: dict[str, Any]) -> bool:
    """Whether a compiled loop, whose graph the update is left out of, keeps the bits."""
    opt, params = funcopt.pure(kind_of(name), **options), params_for(name)
    gradients = [random_like(params) for _ in range(2)]

    def loop(state: Any, params: Any) -> Any:
        for grads in gradients:
            doubled = tree_map(lambda grad: grad * 2, grads)
            params, state = opt.update(doubled, state, params)
        return params, state

    torch.compiler.reset()
    state = opt.init(params)
    assert_same_bits(torch.compile(loop, backend="eager")(state, params), loop(state, params))
    return True


def _stacked(trees: list[Any]) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)


_POINT = torch.tensor(0.0, dtype=torch.float64)
_SMALL = 1e-6


def _losses(name: str, options: dict[str, Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The loss to differentiate, and the same to take differences of.

    With `differentiable=True` torch computes what comes of counts in float32, which is too coarse
    for differences.
    """
    params = {key: torch.randn(3, 2, dtype=torch.float64) for key in "wb"}
    gradients = random_like(params)
    plain = {key: value for key, value in options.items() if key != "differentiable"}
    return _loss(name, options, params, gradients), _loss(name, plain, params, gradients)


def _check_derivative(found: Any, loss: Callable[[Any], Any], at: Any, options: Any) -> None:
    expected = (loss(at + _SMALL) - loss(at - _SMALL)) / (2 * _SMALL)
    rtol = 1e-3 if "differentiable" in options else 1e-4
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-6)


def _loss(name: str, options: Any, params: Any, gradients: Any) -> Callable[..., Any]:
    """The loss after three steps, of a number that moves parameters and gradients; and of lr."""

    def loss(shift: Any, lr: Any = None) -> Any:
        opt = funcopt.pure(kind_of(name), **options | ({} if lr is None else {"lr": lr}))
        own = {key: leaf + shift * 0.5 * leaf.cos() for key, leaf in params.items()}
        state = opt.init(params)
        for count in range(3):
            grads = {
                key: gradients[key] * (1 + shift * (count + 1)) + 0.1 * count * own[key].sin()
                for key in own
            }
            own, state = opt.update(grads, state, own)
        return sum((leaf**2).sum() for leaf in own.values())

    return loss


def _derivative(how: Callable[[Callable[..., Any]], Any]) -> Callable[[str, dict[str, Any]], bool]:
    def is_right(name: str, options: dict[str, Any]) -> bool:
        loss, plain = _losses(name, options)
        try:
            found = how(loss)
        except (RuntimeError, ValueError):
            return False
        _check_derivative(found, plain, _POINT, options)
        return True

    return is_right


def _in_reverse(loss: Callable[..., Any]) -> Any:
    point = _POINT.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(point), point)
    torch.testing.assert_close(found, grad(loss)(_POINT))
    return found


def keeps_derivative_of_lr(name: str, options: dict[str, Any]) -> bool:
    """Whether the derivative with respect to the learning rate is that of differences."""
    loss, plain = _losses(name, options)
    at = 0.01
    try:
        found = grad(lambda lr: loss(_POINT, lr))(torch.tensor(at, dtype=torch.float64))
    except (RuntimeError, ValueError):
        return False
    _check_derivative(found, lambda lr: plain(_POINT, lr), at, options)
    return True


COLUMNS: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    "bits": has_bits,
    "vmap": is_mapped,
    "compiled": is_compiled,
    "reverse mode": _derivative(_in_reverse),
    "forward mode": _derivative(lambda loss: jvp(loss, (_POINT,), (_POINT + 1,))[1]),
    "vmap of it": _derivative(lambda loss: vmap(grad(loss))(_POINT.expand(2))[1]),
    "of a vmap": _derivative(lambda loss: grad(lambda x: vmap(loss)(x.expand(2))[1])(_POINT)),
    "of lr": keeps_derivative_of_lr,
}


def version() -> str:
    return torch.__version__.partition("+")[0]


def shown(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "defaults"


def row(name: str, options: dict[str, Any]) -> str:
    """The row of the table of a class and its options; raises if anything is wrong."""
    try:
        funcopt.pure(kind_of(name), **options)
    except TypeError:
        return f"| {name} | {shown(options)} |" + " refused |" * len(COLUMNS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # of vmap's, not of pure's
        cells = ["•" if holds(name, options) else " " for holds in COLUMNS.values()]
    return f"| {name} | {shown(options)} | " + " | ".join(cells) + " |"


def table() -> str:
    torch.manual_seed(0)
    rows = [row(name, options) for name, tried in inputs().items() for options in tried]
    lines = [
        "# What pure() makes of torch's optimizers",
        "",
        f"Written by `python -m tests.pure_table` with torch {version()}, "
        "on the CPU, with the options that torch's own tests give each class. A dot: it is right. "
        "Nothing: it is refused, with an error that says why. Bits are those of 20 steps of the "
        "class, out of place and in place; those of a member of a vmap are those that it has "
        "alone. A compiled loop leaves an update out of its graph. Derivatives are held to "
        "differences.",
        "",
        f"| Class | Options | {' | '.join(COLUMNS)} |",
        "|---|---" + "|---" * len(COLUMNS) + "|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table())
