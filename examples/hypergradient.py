"""Hyperparameters learned by the gradient through a whole training: schedule, decay, leaf by leaf.

A small network learns to read handwritten digits in 1,000 steps of AdamW. The loss on the
validation images at the end is a function of the hyperparameters, and is differentiated like any
other (Maclaurin et al. 2015, arXiv:1502.03492): of the learning rate at ten points of the schedule,
of the weight decay, and of a factor on the learning rate of each weight matrix and bias. A few
updates by these gradients, and the schedule is learned.

In reverse mode such a gradient would keep what each of the 1,000 steps has left behind.
`funcopt.unroll(..., keep="sqrt")` keeps 32 states instead, and makes the steps between two of them
once more. Forward mode, `torch.func.jvp`, keeps nothing, and gives the derivative along one
direction: for a few numbers, that is another way. Here both are held to each other, and to
differences in float64; the script fails if they do not agree. The picture shows the schedule, the
training before and after, and the memory of each way.

    pip install "funcopt[examples]"
    python examples/hypergradient.py
    python examples/hypergradient.py --steps 40 --updates 2
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import grad, grad_and_value, jvp
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import funcopt

Params = dict[str, Tensor]
Keep = Literal["all", "sqrt", "log"] | int  # of the states of a training

# Of the 1797 images, so many are to train on and so many to choose by. The other 600 are the test.
TRAINING, VALIDATION = 897, 300

BATCH, HIDDEN, POINTS = 32, 32, 10

# Where the hyperparameters begin, and how far one update of them goes.
LR, DECAY, META_LR = 1e-3, 1e-2, 0.2

# The derivatives are checked over so many steps at the most, in float64.
CHECKED_STEPS = 200

# The longest training of which the memory is measured.
MEASURED_STEPS = 250

BEFORE, AFTER = "#0072b2", "#d55e00"
Way = Literal["all", "sqrt", "log", "forward mode"]
WAYS: dict[Way, str] = {
    "all": "#d55e00",
    "sqrt": "#0072b2",
    "log": "#009e73",
    "forward mode": "0.4",
}


# ----------------------------------------------------------------------------- the hyperparameters


class Hyper(NamedTuple):
    """What is learned, each as a logarithm: so it stays positive, and moves by factors."""

    schedule: Tensor  # the learning rate at the points, evenly spread over the steps
    decay: Tensor  # the weight decay
    factors: dict[str, Tensor]  # of the learning rate of each leaf


def first_guess(params: Params) -> Hyper:
    """A constant learning rate, the same for all leaves, and torch's weight decay."""
    dtype = params["inner"].dtype
    schedule = torch.full((POINTS,), math.log(LR), dtype=dtype)
    factors = {name: torch.zeros((), dtype=dtype) for name in params}
    return Hyper(schedule, torch.tensor(math.log(DECAY), dtype=dtype), factors)


def rate_at(hyper: Hyper, step: int, steps: int) -> Tensor:
    """Return the learning rate in a step, on straight lines between the points."""
    place = step / max(1, steps - 1) * (POINTS - 1)
    left = min(int(place), POINTS - 2)
    return torch.lerp(hyper.schedule[left], hyper.schedule[left + 1], place - left).exp()


# ------------------------------------------------------------------------------------ the training


class Images(NamedTuple):
    """Pictures of digits, a row of 64 pixels each, and the digits they show."""

    pixels: Tensor
    digits: Tensor


class Data(NamedTuple):
    """The images by what they are for, and which of them go into each minibatch."""

    training: Images
    validation: Images
    test: Images
    drawn: Tensor


def loss_of(params: Params, images: Images) -> Tensor:
    return cross_entropy(outputs_of(params, images), images.digits)


def outputs_of(params: Params, images: Images) -> Tensor:
    hidden = torch.tanh(images.pixels @ params["inner"] + params["inner_bias"])
    return hidden @ params["outer"] + params["outer_bias"]


def train(
    hyper: Hyper, params: Params, data: Data, steps: int, keep: Keep = "sqrt"
) -> tuple[Params, Tensor]:
    """Return the trained parameters, and the loss of each minibatch."""

    def step(carry: tuple[Params, funcopt.AdamWState], i: int) -> tuple[Any, Tensor]:
        params, state = carry
        rate = rate_at(hyper, i, steps)
        rates = {name: rate * factor.exp() for name, factor in hyper.factors.items()}
        opt = funcopt.AdamW(lr=rates, weight_decay=hyper.decay.exp())
        images = Images(*(part[data.drawn[i]] for part in data.training))
        grads, loss = grad_and_value(loss_of)(params, images)
        return opt.update(grads, state, params), loss

    start = params, funcopt.AdamW().init(params)
    (params, _), losses = funcopt.unroll(step, start, steps, keep=keep)
    return params, losses


def loss_after(
    hyper: Hyper, params: Params, data: Data, steps: int, keep: Keep = "sqrt"
) -> tuple[Tensor, tuple[Params, Tensor]]:
    """Return the validation loss at the end, and with it what it is of."""
    params, losses = train(hyper, params, data, steps, keep)
    return loss_of(params, data.validation), (params, losses.detach())


# ------------------------------------------------------------------------------------- the learning


class Learned(NamedTuple):
    """The hyperparameters before each update and after the last, and what came of them."""

    hypers: list[Hyper]
    validation: list[float]
    accuracy: list[float]  # on the test images
    training: list[Tensor]  # the losses of all minibatches


def learn(params: Params, data: Data, options: Options) -> Learned:
    """Learn hyperparameters, by the gradient of the validation loss after a whole training."""
    hyper, meta = first_guess(params), funcopt.Clip(funcopt.Adam(lr=META_LR), max_norm=1.0)
    state, learned = meta.init(hyper), Learned([], [], [], [])
    differentiate = grad_and_value(loss_after, has_aux=True)
    with tqdm(total=options.updates + 1, unit="training", leave=False, disable=None) as bar:
        for _ in range(options.updates + 1):
            slopes, (loss, (trained, losses)) = differentiate(hyper, params, data, options.steps)
            right = outputs_of(trained, data.test).argmax(-1) == data.test.digits
            learned.hypers.append(hyper)
            learned.validation.append(float(loss))
            learned.accuracy.append(float(right.float().mean()))
            learned.training.append(losses)
            bar.update()
            bar.set_postfix_str(f"validation loss {loss:.4f}")
            hyper, state = meta.update(slopes, state, hyper)
    return learned


# --------------------------------------------------------------------------------------- the checks


class Slopes(NamedTuple):
    """The derivative along a direction, found in three ways."""

    name: str
    reverse: float
    forward: float
    difference: float


def directions(hyper: Hyper) -> dict[str, Hyper]:
    """Return a few numbers that could be learned, as directions in all of them."""
    zero = Hyper(
        torch.zeros_like(hyper.schedule),
        torch.zeros_like(hyper.decay),
        {name: torch.zeros_like(own) for name, own in hyper.factors.items()},
    )
    first = torch.zeros_like(hyper.schedule)
    first[0] = 1.0
    one = torch.ones_like(hyper.decay)
    return {
        "learning rate": zero._replace(schedule=torch.ones_like(hyper.schedule)),
        "initial learning rate": zero._replace(schedule=first),
        "weight decay": zero._replace(decay=one),
        "rate of inner": zero._replace(factors={**zero.factors, "inner": one}),
    }


def compare(hyper: Hyper, params: Params, data: Data, steps: int) -> list[Slopes]:
    """Differentiate in reverse mode, in forward mode, and by differences."""

    def loss(hyper: Hyper) -> Tensor:
        return loss_after(hyper, params, data, steps)[0]

    slopes, found = grad(loss)(hyper), []
    for name, direction in directions(hyper).items():
        products = zip(leaves_of(slopes), leaves_of(direction), strict=True)
        reverse = sum(float((slope * along).sum()) for slope, along in products)
        forward = jvp(loss, (hyper,), (direction,))[1]
        high, low = (float(loss(moved(hyper, direction, by))) for by in (1e-5, -1e-5))
        found.append(Slopes(name, reverse, float(forward), (high - low) / 2e-5))
    return found


def leaves_of(hyper: Hyper) -> list[Tensor]:
    return [hyper.schedule, hyper.decay, *hyper.factors.values()]


def moved(hyper: Hyper, direction: Hyper, by: float) -> Hyper:
    factors = {name: own + by * direction.factors[name] for name, own in hyper.factors.items()}
    return Hyper(
        hyper.schedule + by * direction.schedule, hyper.decay + by * direction.decay, factors
    )


def check(params: Params, data: Data, options: Options) -> None:
    """Exit with a message if the ways to a derivative do not agree."""
    steps = min(CHECKED_STEPS, options.steps)
    wide = {name: leaf.double() for name, leaf in params.items()}
    parts = (Images(part.pixels.double(), part.digits) for part in data[:3])
    training, validation, test = parts
    doubled = Data(training, validation, test, data.drawn)
    found = compare(first_guess(wide), wide, doubled, steps)
    narrow = compare(first_guess(params), params, data, steps)
    print(f"\nDerivatives of the validation loss after {steps} steps, in float64:\n")
    print("                           reverse      forward  differences   reverse in float32")
    for slopes, own in zip(found, narrow, strict=True):
        numbers = "".join(f"{number:13.6f}" for number in slopes[1:])
        print(f"  {slopes.name:22}{numbers}{own.reverse:21.6f}")
        size = abs(slopes.reverse)
        if not (
            abs(slopes.forward - slopes.reverse) <= 1e-9 * size + 1e-12
            and abs(slopes.difference - slopes.reverse) <= 1e-5 * size + 1e-8
        ):
            sys.exit("\nThat is more than rounding explains.")


# --------------------------------------------------------------------------------------- the memory


def measure(params: Params, data: Data, options: Options) -> dict[Way, list[tuple[int, float]]]:
    """Return for each way the peak memory in megabytes, over numbers of steps; needs Linux."""
    most = min(MEASURED_STEPS, options.steps)
    counts = sorted({max(1, most // divisor) for divisor in (16, 8, 4, 2, 1)})
    hyper = first_guess(params)
    along = directions(hyper)["learning rate"]

    def derivative(steps: int, way: Way) -> object:
        if way == "forward mode":
            return jvp(lambda own: loss_after(own, params, data, steps)[0], (hyper,), (along,))
        return grad(lambda own: loss_after(own, params, data, steps, way)[0])(hyper)

    found: dict[Way, list[tuple[int, float]]] = {}
    with tqdm(total=len(WAYS) * len(counts), desc="memory", leave=False, disable=None) as bar:
        for way in WAYS:
            found[way] = []
            for count in counts:
                taken = memory_of(partial(derivative, count, way))
                if taken is None:
                    return {}
                found[way].append((count, taken))
                bar.update()
    return found


def memory_of(function: Callable[[], object]) -> float | None:
    """Return how much more memory than before a call has in use at its peak, in megabytes."""
    try:
        gc.collect()
        funcopt.memory.release()
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
        before = resident("VmRSS")
        function()
        return resident("VmHWM") - before
    except OSError:
        return None


def resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


# ----------------------------------------------------------------------------------------- the data


def load(options: Options) -> tuple[Params, Data]:
    """Load the digits, and draw weights and minibatches."""
    digits = load_digits()
    pixels = torch.tensor(digits.data / 16, dtype=torch.float32)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    parts = order.split([TRAINING, VALIDATION, len(order) - TRAINING - VALIDATION])
    images = (Images(pixels[part], torch.tensor(digits.target)[part]) for part in parts)
    training, validation, test = images
    generator = torch.Generator().manual_seed(options.seed)
    drawn = torch.randint(TRAINING, (options.steps, BATCH), generator=generator)
    params = {
        "inner": torch.randn(64, HIDDEN, generator=generator) / math.sqrt(64),
        "inner_bias": torch.zeros(HIDDEN),
        "outer": torch.randn(HIDDEN, 10, generator=generator) / math.sqrt(HIDDEN),
        "outer_bias": torch.zeros(10),
    }
    return params, Data(training, validation, test, drawn)


# -------------------------------------------------------------------------------------- the results


def print_results(learned: Learned) -> None:
    print("  trainings  validation loss  test accuracy")
    for index in range(len(learned.hypers)):
        line = f"{learned.validation[index]:17.4f}{learned.accuracy[index]:15.1%}"
        print(f"  {index + 1:9}{line}")
    hyper = learned.hypers[-1]
    rates = hyper.schedule.exp().tolist()
    print("\nThe learning rate, at its points:", ", ".join(f"{rate:.2g}" for rate in rates))
    factors = (f"{name} {float(own.exp()):.2g}" for name, own in hyper.factors.items())
    print("times, for each leaf:", ", ".join(factors))
    print(f"weight decay: {float(hyper.decay.exp()):.2g}")


def draw(
    learned: Learned, memory: dict[Way, list[tuple[int, float]]], steps: int, output: Path
) -> None:
    with mpl.rc_context({"font.size": 9.5, "axes.titlesize": 11}):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        schedule, training, taken = figure.subplots(1, 3)
        draw_schedules(schedule, learned, steps)
        draw_training(training, learned)
        draw_memory(taken, memory)
        for axes in (schedule, training, taken):
            axes.spines[["top", "right"]].set_visible(False)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        figure.savefig(output, dpi=160)


def draw_schedules(axes: Axes, learned: Learned, steps: int) -> None:
    places = [index * (steps - 1) / (POINTS - 1) for index in range(POINTS)]
    last = len(learned.hypers) - 1
    named = {0: ("before", BEFORE), 1: ("between", "0.8"), last: ("after", AFTER)}
    for index, hyper in enumerate(learned.hypers):
        label, color = named.get(index, (None, "0.8"))
        axes.plot(places, hyper.schedule.exp(), color=color, label=label)
    axes.set_yscale("log")
    axes.margins(y=0.2)  # the legend stands above the curves
    axes.legend(frameon=False, loc="upper left", ncols=3, columnspacing=1.2)
    axes.set(xlabel="step", ylabel="learning rate", title="The schedule, update by update")


def draw_training(axes: Axes, learned: Learned) -> None:
    for index, name, color in ((0, "before", BEFORE), (-1, "after", AFTER)):
        losses = learned.training[index]
        window = max(1, len(losses) // 25)
        smooth = losses[: len(losses) // window * window].reshape(-1, window).mean(1)
        places = [(place + 0.5) * window for place in range(len(smooth))]
        label = f"{name}: validation {learned.validation[index]:.3f}"
        axes.plot(places, smooth, color=color, label=label)
    axes.set_yscale("log")
    axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="training loss", title="The training, before and after")


def draw_memory(axes: Axes, memory: dict[Way, list[tuple[int, float]]]) -> None:
    for way, points in memory.items():
        counts, sizes = zip(*points, strict=True)
        name = way if way not in {"all", "sqrt", "log"} else f'reverse, keep="{way}"'
        axes.plot(counts, sizes, color=WAYS[way], marker=".", label=name)
    axes.set(xlabel="steps", ylabel="megabytes", title="Peak memory of a derivative")
    if memory:
        axes.set_yscale("log")
        axes.legend(frameon=False)


# ---------------------------------------------------------------------------------------- the flags


class Options(argparse.Namespace):
    """The flags, once they are known to make sense."""

    steps: int
    updates: int
    seed: int
    output: Path


def parse_options() -> Options:
    parser = argparse.ArgumentParser(
        description=str(__doc__).partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=1000, help="steps of one training")
    add("--updates", type=int, default=8, help="of the hyperparameters")
    add("--seed", type=int, default=0, help="of weights and minibatches")
    add("--output", type=Path, default="out/hypergradient.png", help="the picture, a PNG")
    options = parser.parse_args(namespace=Options())
    for name, least in {"steps": 2, "updates": 1, "seed": 0}.items():
        if (value := getattr(options, name)) < least:
            parser.error(f"argument --{name}: {value} is less than {least}")
    if options.output.suffix.lower() != ".png":
        parser.error(f"argument --output: {options.output} does not end in .png")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    return options


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    params, data = load(options)
    learned = learn(params, data, options)
    print_results(learned)
    check(params, data, options)
    memory = measure(params, data, options)
    for way, points in memory.items():
        count, size = points[-1]
        print(f"{way:>14}: {size:7.1f} MB at the peak of {count} steps")
    draw(learned, memory, options.steps, options.output)
    print(f"\nThe schedule, the training and the memory are in {options.output}.")


if __name__ == "__main__":
    main()
