"""Meta-gradients through long training, by `funcopt.unroll` and by TorchOpt's MetaAdamW.

What is differentiated is the loss of a small network after some steps of AdamW with respect to the
weights before them, by `torch.autograd.grad`. The step is eager, with either kind of gradient in
it, or compiled. Of 1,000 steps, all is kept or the square root, one after the other.

Run as a module of its own, it prints the peak of memory: what torch's allocator has handed out at
once, and what the process has resident, which counts Python's objects, too.
"""

from __future__ import annotations

import ctypes
import gc
import json
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.func import grad
from torch.nn.functional import linear

import funcopt

from .measure import Absent, Candidate, Measured, Settings, Step, compare
from .processes import ask
from .results import Figure, Row, Section, at_most
from .workloads import Tensors, describe, mlp, random_like

__all__ = ["sections"]

_STEPS, _MANY = 50, 1000
_WIDTHS = (1, 40, 40, 1)
_RATE = 1e-2
_TURNS = 3

_TORCHOPT = "TorchOpt MetaAdamW"
_FUNC = "funcopt, torch.func.grad inside"
_AUTOGRAD = "funcopt, torch.autograd.grad inside"
_COMPILED = "funcopt, compiled step"
_ALL, _SQRT = 'keep="all"', 'keep="sqrt"'


def _task() -> tuple[Tensor, Tensor]:
    inputs = torch.rand(10, 1, generator=torch.Generator().manual_seed(1)) * 10 - 5
    return inputs, inputs.sin()


def _loss(params: Tensors, inputs: Tensor, wanted: Tensor) -> Tensor:
    hidden = inputs
    for layer in range(3):
        hidden = linear(hidden, params[f"{layer}.weight"], params[f"{layer}.bias"])
        hidden = hidden.tanh() if layer < 2 else hidden
    return (hidden - wanted).square().mean()


def _start() -> Tensors:
    return random_like(mlp(*_WIDTHS), seed=0, device=torch.device("cpu"))


def _by_func(params: Tensors, *task: Tensor) -> Tensors:
    grads: Tensors = grad(_loss)(params, *task)
    return grads


def _by_autograd(params: Tensors, *task: Tensor) -> Tensors:
    grads = torch.autograd.grad(_loss(params, *task), list(params.values()), create_graph=True)
    return dict(zip(params, grads, strict=True))


def _funcopt(
    gradient: Callable[..., Tensors], *, compiled: bool = False, keep: str = "all"
) -> Callable[[int], tuple[Tensor, ...]]:
    """Return a function of the number of steps."""
    opt, task, start = funcopt.AdamW(lr=_RATE, differentiable=True), _task(), _start()

    def move(params: Tensors, state: Any) -> tuple[Tensors, Any]:
        return opt.update(gradient(params, *task), state, params)

    made: Any = torch.compile(move, fullgraph=True) if compiled else move

    def meta_gradient(steps: int) -> tuple[Tensor, ...]:
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in start.items()}
        (params, _), _ = funcopt.unroll(
            lambda carry, _: (made(*carry), None),
            (leaves, opt.init(leaves)),
            steps,
            keep=keep,  # type: ignore[arg-type]  # which is one of the words
        )
        return torch.autograd.grad(_loss(params, *task), list(leaves.values()))

    return meta_gradient


def _torchopt() -> Callable[[int], tuple[Tensor, ...]]:
    try:
        import torchopt
    except ImportError:
        raise Absent("is not installed") from None
    task, start = _task(), _start()

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, leaf in start.items():
                self.register_parameter(name.replace(".", "_"), torch.nn.Parameter(leaf.clone()))

        def forward(self) -> Tensor:
            # TorchOpt puts tensors in place of the parameters, as attributes.
            return _loss({name: getattr(self, name.replace(".", "_")) for name in start}, *task)

    def meta_gradient(steps: int) -> tuple[Tensor, ...]:
        net = Net()
        leaves = list(net.parameters())
        opt = torchopt.MetaAdamW(net, lr=_RATE)
        for _ in range(steps):
            opt.step(net())
        return torch.autograd.grad(net(), leaves)

    return meta_gradient


_WAYS: dict[str, Callable[[], Callable[[int], tuple[Tensor, ...]]]] = {
    _TORCHOPT: _torchopt,
    _FUNC: partial(_funcopt, _by_func),
    _AUTOGRAD: partial(_funcopt, _by_autograd),
    _COMPILED: partial(_funcopt, _by_func, compiled=True),
}
_KEPT: dict[str, Callable[[], Callable[[int], tuple[Tensor, ...]]]] = {
    _ALL: partial(_funcopt, _by_func),
    _SQRT: partial(_funcopt, _by_func, keep="sqrt"),
}


def sections(settings: Settings) -> list[Section]:
    """Measure time and memory through 50 and through 1,000 steps."""
    few = _measured(settings)
    found = ask("unroll_long", limit=600, environment={"OMP_NUM_THREADS": "1"})
    size = describe(mlp(*_WIDTHS))
    about = f"Through {_STEPS} steps of AdamW. {few.caution()}".strip()
    times = [
        few.row(name, _TORCHOPT, target=at_most(0.5) if name == _COMPILED else None)
        for name in _WAYS
    ]
    peaks = [Row(label, Figure(peak)) for label, peak in found["peaks"].items()]
    kept = (
        f"At the peak: what torch's allocator has handed out, and what the process has resident, "
        f"with Python's objects. {_MANY} steps took {found['ratio']:.2f} times as long with "
        f"{_SQRT} as with {_ALL}, uncompiled."
    )
    return [
        Section("meta-gradient", size, about, f"time / {_TORCHOPT}", times, drawn=False),
        Section("meta-gradient, memory", size, kept, "megabytes", peaks, drawn=False),
    ]


def _measured(settings: Settings) -> Measured:
    def build(make: Callable[[], Callable[[int], tuple[Tensor, ...]]]) -> Step:
        return partial(make(), _STEPS)

    everyone = [
        Candidate(name, partial(build, make), required=name != _TORCHOPT)
        for name, make in _WAYS.items()
    ]
    return compare(everyone, settings)


# -------------------------------------------------------------------------- a process of its own


def _found() -> dict[str, Any]:
    """Return the peaks of each way in megabytes, and how much longer the root takes than all."""
    peaks: dict[str, float] = {}
    for name, make in _WAYS.items():
        try:
            call = make()
        except Absent:
            continue
        call(3)  # compiles, and fills caches
        label = f"{name}, {_STEPS} steps"
        peaks[label] = _allocated(partial(call, _STEPS))
        peaks[f"{label}, resident"] = _resident(partial(call, _STEPS))
    seconds: dict[str, list[float]] = {name: [] for name in _KEPT}
    for _ in range(_TURNS):
        for name, make in _KEPT.items():
            label = f"funcopt, {name}, {_MANY} steps, resident"
            before = time.process_time()
            peaks[label] = max(peaks.get(label, 0.0), _resident(partial(make(), _MANY)))
            seconds[name].append(time.process_time() - before)
    ratio = median(own / other for own, other in zip(seconds[_SQRT], seconds[_ALL], strict=True))
    return {"peaks": peaks, "ratio": ratio}


def _allocated(function: Callable[[], object]) -> float:
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=False) as profile:
        function()
    events = [own for own in profile.kineto_results.events() if own.name() == "[memory]"]
    events.sort(key=lambda own: own.start_ns())
    return max(accumulate(own.nbytes() for own in events)) / 1e6


def _resident(function: Callable[[], object]) -> float:
    gc.collect()
    funcopt.memory.release()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    own = next(line for line in lines if line.startswith(field + ":"))
    return int(own.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(_found()))
