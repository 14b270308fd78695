"""MAML: initial weights, and learning rates of each leaf, from which a few steps learn a new sine.

A task is a sine wave of its own amplitude and phase, of which ten points are known. From shared
initial weights, a small network makes a few steps of AdamW on these, and is judged by other points
of the same wave (Finn et al. 2017, arXiv:1703.03400). What is learned is where to begin, and how
far to go, leaf by leaf (Li et al. 2017, arXiv:1707.09835): by the gradient through all steps, which
is of second order, since each step has a gradient of its own. All tasks are adapted at once, by one
`vmap` over the training of one.

With `--compare`, where TorchOpt is installed, the gradient through 50 steps is also taken through
`torchopt.MetaAdamW`, and through a step that is compiled: the time, the memory, and how far each is
from the same in float64.

    pip install "funcopt[examples]"
    python examples/maml.py
    python examples/maml.py --updates 5 --tasks 4
    pip install torchopt
    python examples/maml.py --compare
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import grad, grad_and_value, vmap
from torch.nn.functional import linear, mse_loss
from tqdm import tqdm

import funcopt

Params = dict[str, Tensor]
Keep = Literal["all", "sqrt", "log"] | int  # of the states of a training

POINTS, WIDTH = 10, 40

# Where the learning rate of each leaf begins, and how fast all is learned.
LR, META_LR = 1e-2, 3e-3

# The comparison: so many steps; so many where memory is to be little; so often timed.
STEPS, MANY_STEPS, TIMES = 50, 1000, 5

# The picture shows the mean loss of so many updates in a row.
WINDOW = 20


# -------------------------------------------------------------------------------------- the network


class Learned(NamedTuple):
    """What all tasks share, and what is learned."""

    params: Params
    log_lr: Params  # the logarithm of a learning rate for each leaf


class Task(NamedTuple):
    """Points of a sine wave to learn from, and others to be judged by; of many, stacked."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def first_guess(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Learned:
    params = {}
    for name, (fan_in, fan_out) in {
        "first": (1, WIDTH),
        "second": (WIDTH, WIDTH),
        "third": (WIDTH, 1),
    }.items():
        bound = 1 / math.sqrt(fan_in)
        weight = torch.empty(fan_out, fan_in).uniform_(-bound, bound, generator=generator)
        params[f"{name}.weight"] = weight.to(dtype)
        params[f"{name}.bias"] = torch.empty(fan_out).uniform_(-bound, bound, generator=generator)
        params[f"{name}.bias"] = params[f"{name}.bias"].to(dtype)
    return Learned(params, {name: torch.tensor(math.log(LR), dtype=dtype) for name in params})


def network(params: Params, x: Tensor) -> Tensor:
    hidden = linear(x, params["first.weight"], params["first.bias"]).tanh()
    hidden = linear(hidden, params["second.weight"], params["second.bias"]).tanh()
    return linear(hidden, params["third.weight"], params["third.bias"])


def loss_of(params: Params, x: Tensor, y: Tensor) -> Tensor:
    return mse_loss(network(params, x), y)


def draw_tasks(count: int, generator: torch.Generator) -> Task:
    """Draw waves with amplitudes from 0.1 to 5 and phases from 0 to pi."""
    amplitude = 0.1 + 4.9 * torch.rand(count, 1, 1, generator=generator)
    phase = math.pi * torch.rand(count, 1, 1, generator=generator)
    x, test_x = (10 * torch.rand(2, count, POINTS, 1, generator=generator) - 5).unbind()

    def wave(x: Tensor) -> Tensor:
        return amplitude * torch.sin(x + phase)

    return Task(x, wave(x), test_x, wave(test_x))


# ------------------------------------------------------------------------------------- the learning


def adapt(learned: Learned, task: Task, steps: int, keep: Keep = "all") -> Params:
    """Return the parameters after so many steps on one task."""
    opt = funcopt.AdamW(lr={name: lr.exp() for name, lr in learned.log_lr.items()})

    def step(carry: tuple[Params, funcopt.AdamWState], _: int) -> tuple[Any, None]:
        params, state = carry
        return opt.update(grad(loss_of)(params, task.x, task.y), state, params), None

    start = learned.params, opt.init(learned.params)
    (params, _), _ = funcopt.unroll(step, start, steps, keep=keep)
    return params


def loss_after(learned: Learned, task: Task, steps: int, keep: Keep = "all") -> Tensor:
    return loss_of(adapt(learned, task, steps, keep), task.test_x, task.test_y)


def mean_loss(learned: Learned, tasks: Task, steps: int) -> Tensor:
    """Adapt to all tasks at once."""
    after = vmap(lambda task: loss_after(learned, task, steps))
    return after(tasks).mean()


def learn(options: Options) -> tuple[list[Learned], list[float]]:
    """Learn from new tasks at each update; return what was learned, first and last, and losses."""
    generator = torch.Generator().manual_seed(options.seed)
    learned = first_guess(generator)
    meta = funcopt.Clip(funcopt.Adam(lr=META_LR), max_norm=10.0)
    state, start, losses = meta.init(learned), learned, []
    differentiate = grad_and_value(mean_loss)
    for _ in tqdm(range(options.updates), unit="update", leave=False, disable=None):
        tasks = draw_tasks(options.tasks, generator)
        slopes, loss = differentiate(learned, tasks, options.steps)
        learned, state = meta.update(slopes, state, learned)
        losses.append(float(loss))
    return [start, learned], losses


def judge(learned: list[Learned], options: Options) -> None:
    """Print the losses on new tasks, before any step and after some."""
    tasks = draw_tasks(200, torch.Generator().manual_seed(options.seed + 1))
    print("mean square error on 200 new waves after    0 steps    1 step", end="")
    print(f"{options.steps:5} steps{10 * options.steps:5} steps")
    for name, own in zip(("at first", "learned"), learned, strict=True):
        counts = 0, 1, options.steps, 10 * options.steps
        found = [float(mean_loss(own, tasks, count)) for count in counts]
        print(f"  {name:38}" + "".join(f"{loss:11.3f}" for loss in found))
    rates = (f"{name} {float(lr.exp()):.2g}" for name, lr in learned[1].log_lr.items())
    print("learning rates:", ", ".join(rates))


def check(options: Options) -> None:
    """Exit with a message if a slope is not that of differences in float64."""
    generator = torch.Generator().manual_seed(options.seed)
    learned = first_guess(generator, torch.float64)
    tasks = Task(*(part.double() for part in draw_tasks(3, generator)))
    slopes, by = grad(mean_loss)(learned, tasks, options.steps), 1e-8
    name = "second.weight"
    along = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator)

    def after(by: float) -> float:
        params = {**learned.params, name: learned.params[name] + by * along}
        return float(mean_loss(learned._replace(params=params), tasks, options.steps))

    difference, own = (
        (after(by) - after(-by)) / (2 * by),
        float((slopes.params[name] * along).sum()),
    )
    print(f"\nA slope in float64: {own:.9f}, by differences {difference:.9f}")
    if not abs(own - difference) <= 1e-5 * abs(own) + 1e-7:
        sys.exit("That is more than rounding explains.")


# ----------------------------------------------------------------------------------- the comparison


class Way(NamedTuple):
    """A way to the gradient of the loss after some steps with respect to where they began."""

    name: str
    gradient: Callable[[int], list[Tensor]]  # of so many steps


# One learning rate for all, as MetaAdamW has. A compiled step has to be told that it is recorded.
PLAIN = funcopt.AdamW(lr=LR, differentiable=True)


def plain_step(params: Params, state: funcopt.AdamWState, x: Tensor, y: Tensor) -> tuple[Any, Any]:
    return PLAIN.update(grad(loss_of)(params, x, y), state, params)


def plain_loss(
    params: Params,
    task: Task,
    steps: int,
    keep: Keep = "all",
    move: Callable[..., tuple[Any, Any]] = plain_step,
) -> Tensor:
    def step(carry: tuple[Params, funcopt.AdamWState], _: int) -> tuple[Any, None]:
        return move(*carry, task.x, task.y), None

    (params, _), _ = funcopt.unroll(step, (params, PLAIN.init(params)), steps, keep=keep)
    return loss_of(params, task.test_x, task.test_y)


def by_funcopt(
    params: Params,
    task: Task,
    keep: Keep,
    steps: int,
    move: Callable[..., tuple[Any, Any]] = plain_step,
) -> list[Tensor]:
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    loss = plain_loss(leaves, task, steps, keep, move)
    return list(torch.autograd.grad(loss, list(leaves.values())))


def by_torchopt(params: Params, task: Task, name: str, steps: int) -> list[Tensor]:
    import torchopt  # noqa: PLC0415  # which only the comparison needs

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(1, WIDTH)
            self.second = torch.nn.Linear(WIDTH, WIDTH)
            self.third = torch.nn.Linear(WIDTH, 1)

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.third(self.second(self.first(x).tanh()).tanh())
            return outputs

    net = Net().to(task.x.dtype)
    net.load_state_dict(params)
    start = list(net.parameters())
    opt = getattr(torchopt, name)(net, lr=LR)
    for _ in range(steps):
        opt.step(mse_loss(net(task.x), task.y))
    return list(torch.autograd.grad(mse_loss(net(task.test_x), task.test_y), start))


def compare(options: Options) -> None:
    """Print what each way takes, and how far its gradient is from the one in float64."""
    generator = torch.Generator().manual_seed(options.seed)
    params = first_guess(generator).params
    tasks = draw_tasks(options.tasks, generator)
    task = Task(*(part[0] for part in tasks))
    wide = {name: leaf.double() for name, leaf in params.items()}
    exact = by_funcopt(wide, Task(*(part.double() for part in task)), "all", STEPS)
    compiled: Any = torch.compile(plain_step, fullgraph=True)
    before = time.perf_counter()
    by_funcopt(params, task, "all", 2, compiled)
    print(f"\nTo compile a step with its gradient took {time.perf_counter() - before:.0f} s.")
    ways = [
        Way("funcopt, keep='all'", partial(by_funcopt, params, task, "all")),
        Way("funcopt, keep='sqrt'", partial(by_funcopt, params, task, "sqrt")),
        Way("TorchOpt, MetaAdamW", partial(by_torchopt, params, task, "MetaAdamW")),
        Way("funcopt, compiled step", partial(by_funcopt, params, task, "all", move=compiled)),
    ]
    print(f"\nThe gradient through {STEPS} steps on one task, and on {options.tasks}:\n")
    print("                             time   error     peak memory")
    seconds = time_of([partial(way.gradient, STEPS) for way in ways])
    for way, taken in zip(ways, seconds, strict=True):
        own = way.gradient(STEPS)
        off = math.dist(flat(own), flat(exact)) / math.hypot(*flat(exact))
        megabytes = memory_of(partial(way.gradient, STEPS))
        print(f"  {way.name:22}{1000 * taken:7.0f} ms{off:8.0e}{megabytes:13.2f} MB")
    all_at_once = vmap(grad(partial(plain_loss, steps=STEPS)), in_dims=(None, 0))
    one_by_one = [Task(*parts) for parts in zip(*tasks, strict=True)]

    def by_turns() -> None:
        for own in one_by_one:
            by_torchopt(params, own, "MetaAdamW", STEPS)

    ours, theirs = time_of([lambda: all_at_once(params, tasks), by_turns])
    print(f"\n{options.tasks} tasks: funcopt, under one vmap, {1000 * ours:.0f} ms;", end=" ")
    print(f"TorchOpt, one after another, {1000 * theirs:.0f} ms")
    for way, steps in ((ways[1], MANY_STEPS), (ways[2], STEPS), (ways[2], 2 * STEPS)):
        megabytes = memory_of(partial(way.gradient, steps))
        print(f"  {way.name:22}{steps:5} steps{megabytes:9.2f} MB")


def flat(tensors: list[Tensor]) -> list[float]:
    return torch.cat([tensor.reshape(-1).double() for tensor in tensors]).tolist()


def time_of(functions: list[Callable[[], object]]) -> list[float]:
    """Return the least processor time of each, called by turns."""
    best = [math.inf] * len(functions)
    for _ in range(TIMES):
        for index, function in enumerate(functions):
            before = time.process_time()
            function()
            best[index] = min(best[index], time.process_time() - before)
    return best


def memory_of(function: Callable[[], object]) -> float:
    """Return how many megabytes more than before are resident at the peak; NaN if not on Linux."""
    try:
        gc.collect()
        funcopt.memory.release()
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
        before = resident("VmRSS")
        function()
        return resident("VmHWM") - before
    except OSError:
        return math.nan


def resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


# -------------------------------------------------------------------------------------- the picture


def running_mean(losses: list[float]) -> tuple[list[float], list[float]]:
    """Return the middles of windows of updates, and the mean loss within each."""
    window = min(WINDOW, len(losses))
    means = torch.tensor(losses).unfold(0, window, 1).mean(1).tolist()
    return [start + (window - 1) / 2 for start in range(len(means))], means


def draw(learned: list[Learned], losses: list[float], options: Options) -> None:
    generator = torch.Generator().manual_seed(options.seed + 2)
    task = Task(*(part[0] for part in draw_tasks(1, generator)))
    line = torch.linspace(-5, 5, 200)[:, None]
    with mpl.rc_context({"font.size": 9.5, "axes.titlesize": 11}):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        curve, wave = figure.subplots(1, 2)
        curve.plot(losses, color="#0072b2", alpha=0.3, linewidth=1, label="of the tasks drawn")
        places, means = running_mean(losses)
        curve.plot(places, means, color="#0072b2", label=f"mean of {WINDOW} updates")
        curve.legend(frameon=False)
        curve.set_yscale("log")
        curve.set(xlabel="update", ylabel="loss after adaptation", title="New tasks at each update")
        wave.scatter(task.x, task.y, color="0.2", s=18, label="known points", zorder=3)
        for name, own, color in zip(
            ("at first", "learned"), learned, ("0.6", "#d55e00"), strict=True
        ):
            made = network(adapt(own, task, options.steps), line).detach()
            label = f"{name}, after {options.steps} steps"
            wave.plot(line[:, 0], made[:, 0], color=color, label=label)
        # Below the axes: the points may lie anywhere within them.
        figure.legend(
            *wave.get_legend_handles_labels(), loc="outside lower right", frameon=False, ncols=3
        )
        wave.set(xlabel="x", title="A new wave")
        for axes in (curve, wave):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(options.output, dpi=160)


# ---------------------------------------------------------------------------------------- the flags


class Options(argparse.Namespace):
    """The flags, once they are known to make sense."""

    updates: int
    tasks: int
    steps: int
    seed: int
    compare: bool
    output: Path


def parse_options() -> Options:
    parser = argparse.ArgumentParser(
        description=str(__doc__).partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--updates", type=int, default=300, help="of what all tasks share")
    add("--tasks", type=int, default=25, help="in each update")
    add("--steps", type=int, default=5, help="on a task")
    add("--seed", type=int, default=0, help="of weights and tasks")
    add("--compare", action="store_true", help="measure TorchOpt's MetaAdamW, too")
    add("--output", type=Path, default="out/maml.png", help="the picture, a PNG")
    options = parser.parse_args(namespace=Options())
    for name, least in {"updates": 1, "tasks": 1, "steps": 1, "seed": 0}.items():
        if (value := getattr(options, name)) < least:
            parser.error(f"argument --{name}: {value} is less than {least}")
    if options.output.suffix.lower() != ".png":
        parser.error(f"argument --output: {options.output} does not end in .png")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    return options


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    learned, losses = learn(options)
    judge(learned, options)
    check(options)
    if options.compare:
        compare(options)
    draw(learned, losses, options)
    print(f"\nThe losses and a new wave are in {options.output}.")


if __name__ == "__main__":
    main()
