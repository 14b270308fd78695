"""The process that `host` measures: steps as on a GPU, on tensors of the CPU, without a launch.

It runs by itself, with whichever funcopt is found first, in Triton's interpreter. It reads lines of
a name of a step and how often to make it, and answers each with the seconds that one took.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import funcopt
from funcopt._core import transforms
from funcopt._engine import memory
from funcopt.optimizers._adam import triton_source

Step = Callable[[], object]


def stand_in() -> None:
    """Let tensors on the CPU be served as those on a GPU are, but for the launch itself."""
    transforms.on_host = lambda _: False  # no value is read
    for name in ("_batches", "_batches_in_place"):  # all leaves of a dtype go together
        if hasattr(memory, name):
            setattr(memory, name, lambda group, *_, **__: [memory.Batch(group)])

    try:
        from funcopt._engine import results  # which an older checkout may lack
    except ImportError:
        pass
    else:
        results._WORTH_KEEPING = {}  # so that addresses come again, as from torch's own allocator

    class Nothing:
        def __getitem__(self, _: object) -> Callable[..., None]:
            return lambda *_, **__: None

    triton_source.step_kernel = Nothing()
    kernels = {"triton": funcopt.AdamW.rule.kernels["triton"]}
    object.__setattr__(funcopt.AdamW.rule, "kernels", kernels)  # for "auto" to choose from
    # What torch launches in its place, and what it counts the steps with.
    for name in ("_fused_adamw_", "_foreach_add_"):
        setattr(torch, name, lambda *_, **__: None)


def steps(leaves: int) -> dict[str, Step]:
    """Return steps of so many small leaves, by name."""
    params = {f"leaf {index}": torch.randn(4, index % 7 + 1) for index in range(leaves)}
    grads = {name: torch.randn_like(leaf) for name, leaf in params.items()}
    inner = funcopt.AdamW()
    found = {
        "update_": _updating(inner, grads, params, in_place=True),
        "update": _updating(inner, grads, params, in_place=False),
        "torch": _of_torch(params, grads),
    }
    wrappers = {
        "Clip": funcopt.Clip(inner, 1.0),
        "LossScale": funcopt.LossScale(inner),
        "SkipNonfinite": funcopt.SkipNonfinite(inner),
        "Ema": funcopt.Ema(inner, 0.99),
    }
    for name, opt in wrappers.items():
        found[name] = _updating(opt, grads, params, in_place=True)
    return found


def _updating(opt: Any, grads: Any, params: Any, *, in_place: bool) -> Step:
    own = [{name: leaf.clone() for name, leaf in params.items()}]
    own.append(opt.init(own[0]))
    update = opt.update_ if in_place else opt.update

    def step() -> None:
        own[:] = update(grads, own[1], own[0])

    return step


def _of_torch(params: Any, grads: Any) -> Step:
    parameters = [torch.nn.Parameter(leaf.clone()) for leaf in params.values()]
    for parameter, grad in zip(parameters, grads.values(), strict=True):
        parameter.grad = grad
    step: Step = torch.optim.AdamW(parameters, fused=True).step
    return step


def operators(step: Step) -> int:
    """Return how many operators of torch a step calls, those that others call not counted."""
    step()
    with torch.autograd.profiler.profile() as profile:
        step()
    events = [event for event in profile.function_events if event.name.startswith("aten::")]
    return sum(event.cpu_parent is None for event in events)


def main() -> None:
    """Answer what is asked."""
    torch.set_num_threads(1)
    stand_in()
    everyone = steps(int(sys.argv[1]))
    for step in everyone.values():
        for _ in range(3):
            step()
    print(json.dumps(list(everyone)), flush=True)
    for line in sys.stdin:
        name, count = line.split()
        if count == "operators":
            print(operators(everyone[name]), flush=True)
            continue
        start = time.perf_counter()
        for _ in range(int(count)):
            everyone[name]()
        print((time.perf_counter() - start) / int(count), flush=True)


if __name__ == "__main__":
    main()
