"""Train 32 low-rank adapters over one frozen network at once, while others come and go.

The network learned to read handwritten digits, and is frozen then. Each adapter is to teach it a
code of its own, in which every digit is called by the name of another: it adds a product of two
narrow matrices to each of the two weights (LoRA, Hu et al. 2021, arXiv:2106.09685). An adapter has
its own learning rate, its own count of steps, and its own pace: some make a step with every
minibatch, others with every second or fourth. It stays for some time; then its slot is given to a
new one, with another code.

The gradient is written for one adapter and mapped over all, and `funcopt.Members` makes one update
of all, where `active=` says who is due: the others keep every bit. An adapter is a tuple of its
optimizer, its matrices, its moments and what else it has, so that `members.take` takes out the one
that leaves and `members.put` gives its slot to another. At the end every adapter is trained again,
alone: whoever came and went beside it, it must be the same but for rounding.

It prints how well they learned their codes, and how long a step takes at once, one by one, and with
`torch.optim.AdamW` that has a group of parameters for each adapter. These two leave out who is not
due; the first computes the gradients of all.

    pip install "funcopt[examples]"
    python examples/adapters.py
    python examples/adapters.py --slots 4 --steps 24 --timed 4
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import funcopt
from funcopt import members

Params = dict[str, Tensor]

# Of the 1797 images, so many are to train on.
TRAINING = 897

BATCH, HIDDEN, RANK = 32, 64, 4

# Steps from one gradient of an adapter to its next, and their colours.
PACES = {1: "#0072b2", 2: "#009e73", 4: "#e69f00"}
OFTEN = {1: "every step", 2: "every 2nd", 4: "every 4th"}


# ------------------------------------------------------------------------------------- the adapters


class Adapter(NamedTuple):
    """One adapter and what trains it; of many at once, each tensor has the slots in front."""

    opt: funcopt.AdamW  # with a learning rate of its own
    code: Tensor  # what each of the ten digits is called
    pace: Tensor  # steps from one gradient to the next
    age: Tensor  # steps since it came
    params: Params
    state: funcopt.AdamWState


class Images(NamedTuple):
    """Pictures of digits, a row of 64 pixels each, and the digits they show."""

    pixels: Tensor
    digits: Tensor


def new_adapter(generator: torch.Generator) -> Adapter:
    """Draw a code, a learning rate, a pace, and matrices whose products are zero."""
    drawn = float(torch.rand((), generator=generator))
    opt = funcopt.AdamW(lr=10 ** (drawn - 2.2), weight_decay=0.0)
    pace = list(PACES)[int(torch.randint(len(PACES), (), generator=generator))]
    params = {
        "inner_down": torch.randn(64, RANK, generator=generator) / math.sqrt(64),
        "inner_up": torch.zeros(RANK, HIDDEN),
        "outer_down": torch.randn(HIDDEN, RANK, generator=generator) / math.sqrt(HIDDEN),
        "outer_up": torch.zeros(RANK, 10),
    }
    return Adapter(
        opt=opt,
        code=torch.randperm(10, generator=generator),
        pace=torch.tensor(pace),
        age=torch.tensor(0),
        params=params,
        state=opt.init(params),
    )


def network(frozen: Params, params: Params, pixels: Tensor) -> Tensor:
    """Return a number for each digit; without adapters if `params` is empty."""

    def layer(name: str, inputs: Tensor) -> Tensor:
        outputs = inputs @ frozen[name] + frozen[f"{name}_bias"]
        if not params:
            return outputs
        return outputs + inputs @ params[f"{name}_down"] @ params[f"{name}_up"]

    return layer("outer", torch.tanh(layer("inner", pixels)))


def gradient(adapter: Adapter, frozen: Params, images: Images) -> Params:
    """Return the gradient of one adapter."""

    def loss(params: Params) -> Tensor:
        return cross_entropy(network(frozen, params, images.pixels), adapter.code[images.digits])

    slopes: Params = grad(loss)(adapter.params)
    return slopes


gradients_of_all = vmap(gradient, in_dims=(0, None, None))


def step_all(adapters: Adapter, frozen: Params, images: Images) -> Adapter:
    """Make a step of all adapters that are due."""
    grads = gradients_of_all(adapters, frozen, images)
    due = adapters.age % adapters.pace == 0
    params, state = funcopt.Members(adapters.opt).update(
        grads, adapters.state, adapters.params, active=due
    )
    return adapters._replace(params=params, state=state, age=adapters.age + 1)


def step_alone(adapter: Adapter, frozen: Params, images: Images) -> Adapter:
    """Make a step of one adapter."""
    grads = gradient(adapter, frozen, images)
    params, state = adapter.opt.update(grads, adapter.state, adapter.params)
    return adapter._replace(params=params, state=state)


def accuracy(adapter: Adapter, frozen: Params, images: Images) -> Tensor:
    outputs = network(frozen, adapter.params, images.pixels)
    return (outputs.argmax(-1) == adapter.code[images.digits]).float().mean()


# ------------------------------------------------------------------------------------- the training


class Stay(NamedTuple):
    """Which slot an adapter has, from which step to which, and how it is when it comes."""

    slot: int
    start: int
    stop: int
    adapter: Adapter


class Trained(NamedTuple):
    """The adapters as they left, in the order of their stays, and how well they were doing."""

    adapters: list[Adapter]
    steps: list[int]
    accuracies: list[Tensor]  # on the test, by slot, at each of these steps


def plan(options: Options) -> list[Stay]:
    """Draw who comes and goes when: a stay lasts for a quarter of the steps or more."""
    generator = generator_of("plan", options)
    stays = []
    for slot in range(options.slots):
        start = 0
        while start < options.steps:
            part = 0.25 + 0.5 * float(torch.rand((), generator=generator))
            stop = start + math.ceil(part * options.steps)
            if stop > 7 / 8 * options.steps:
                stop = options.steps
            stays.append(Stay(slot, start, stop, new_adapter(generator)))
            start = stop
    return stays


def train_together(stays: Sequence[Stay], data: Data, options: Options) -> Trained:
    """Train in every slot at once, whoever is in it."""
    accuracy_of_all = vmap(accuracy, in_dims=(0, None, None))
    adapters = members.stack([stay.adapter for stay in stays if stay.start == 0])
    left: dict[int, Adapter] = {}
    steps, accuracies = [], []
    every = math.ceil(options.steps / 100)
    for step, images in enumerate(bar(data.batches, f"{options.slots} at once")):
        for stay in stays:
            if stay.start == step > 0:
                adapters = members.put(adapters, stay.slot, stay.adapter)
        adapters = step_all(adapters, data.frozen, images)
        if step % every == 0:
            steps.append(step)
            accuracies.append(accuracy_of_all(adapters, data.frozen, data.test))
        for index, stay in enumerate(stays):
            if stay.stop == step + 1:
                left[index] = members.take(adapters, stay.slot)
    return Trained([left[index] for index in range(len(stays))], steps, accuracies)


def train_alone(stay: Stay, data: Data) -> Adapter:
    """Train one adapter by itself, on the minibatches of its stay for which it is due."""
    adapter = stay.adapter
    for images in data.batches[stay.start : stay.stop : int(adapter.pace)]:
        adapter = step_alone(adapter, data.frozen, images)
    return adapter


def bar(items: Sequence[Any], name: str) -> Iterable[Any]:
    shown: Iterable[Any] = tqdm(items, name, leave=False, disable=None)
    return shown


# ----------------------------------------------------------------------------------------- the data


class Data(NamedTuple):
    """The network that all share, and the images."""

    frozen: Params
    batches: list[Images]  # the same for all adapters
    test: Images


def load(options: Options) -> Data:
    """Load the digits, in a random order that is always the same, and train the network on them."""
    digits = load_digits()
    pixels = torch.tensor(digits.data / 16, dtype=torch.float32)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    training, test = (
        Images(pixels[part], torch.tensor(digits.target)[part])
        for part in order.split([TRAINING, len(order) - TRAINING])
    )
    drawn = torch.randint(
        TRAINING, (300 + options.steps, BATCH), generator=generator_of("minibatches", options)
    )
    batches = [Images(training.pixels[own], training.digits[own]) for own in drawn]
    return Data(frozen(batches[:300], generator_of("network", options)), batches[300:], test)


def generator_of(what: str, options: Options) -> torch.Generator:
    """Return a generator of its own for each thing that is drawn."""
    drawn = "plan", "minibatches", "network"
    return torch.Generator().manual_seed(len(drawn) * options.seed + drawn.index(what))


def frozen(batches: Sequence[Images], generator: torch.Generator) -> Params:
    """Return the weights of a network that reads digits."""
    params = {
        "inner": torch.randn(64, HIDDEN, generator=generator) / math.sqrt(64),
        "inner_bias": torch.zeros(HIDDEN),
        "outer": torch.randn(HIDDEN, 10, generator=generator) / math.sqrt(HIDDEN),
        "outer_bias": torch.zeros(10),
    }
    opt = funcopt.AdamW(lr=3e-3)
    state = opt.init(params)
    for images in batches:

        def loss(params: Params, images: Images = images) -> Tensor:
            return cross_entropy(network(params, {}, images.pixels), images.digits)

        params, state = opt.update(grad(loss)(params), state, params)
    return params


# -------------------------------------------------------------------------------------- the results


def check(stays: Sequence[Stay], trained: Trained, data: Data) -> None:
    """Train all alone, and exit with a message if one is not the same."""
    largest = part = 0.0
    for stay, together in zip(bar(stays, "alone"), trained.adapters, strict=True):
        alone = train_alone(stay, data)
        gap = difference(together.params, alone.params)
        moved = difference(stay.adapter.params, alone.params)
        largest, part = max(largest, gap), max(part, gap / moved)
        if not gap <= 1e-2 * moved:
            sys.exit(
                f"The adapter in slot {stay.slot} from step {stay.start} on is not the same alone: "
                f"its weights differ by up to {gap:.1g}, and moved by {moved:.1g} in all."
            )
    print(
        f"Trained alone, the weights of the {len(stays)} adapters differ by at most {largest:.1g},"
    )
    print(f"which is at most {part:.1g} of how far those of the adapter moved.")


def difference(one: Params, other: Params) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def print_accuracies(stays: Sequence[Stay], trained: Trained, data: Data) -> None:
    print("\nAccuracy on the test as they left:\n")
    print("  pace  adapters   worst  median    best")
    for pace in PACES:
        same = [
            float(accuracy(own, data.frozen, data.test))
            for stay, own in zip(stays, trained.adapters, strict=True)
            if stay.adapter.pace == pace
        ]
        if same:
            low, middle, high = min(same), statistics.median(same), max(same)
            print(f"  {pace:4}{len(same):10}{low:8.1%}{middle:8.1%}{high:8.1%}")


# ----------------------------------------------------------------------------------------- the time


def at_once(adapters: Sequence[Adapter], data: Data, options: Options) -> list[Params]:
    stacked = members.stack(adapters)
    for images in data.batches[: options.timed]:
        stacked = step_all(stacked, data.frozen, images)
    return members.unstack(stacked.params)


def one_by_one(adapters: Sequence[Adapter], data: Data, options: Options) -> list[Params]:
    adapters, paces = list(adapters), [int(own.pace) for own in adapters]
    for step, images in enumerate(data.batches[: options.timed]):
        for slot, pace in enumerate(paces):
            if step % pace == 0:
                adapters[slot] = step_alone(adapters[slot], data.frozen, images)
    return [own.params for own in adapters]


def with_groups(adapters: Sequence[Adapter], data: Data, options: Options) -> list[Params]:
    paces = [int(own.pace) for own in adapters]
    weights = [
        {name: leaf.clone().requires_grad_() for name, leaf in own.params.items()}
        for own in adapters
    ]
    groups = [
        {"params": list(params.values()), "lr": own.opt.lr}
        for params, own in zip(weights, adapters, strict=True)
    ]
    opt = torch.optim.AdamW(groups, weight_decay=0.0)
    for step, images in enumerate(data.batches[: options.timed]):
        opt.zero_grad()  # whoever is not due has no gradient, and is left alone
        losses = [
            cross_entropy(network(data.frozen, params, images.pixels), own.code[images.digits])
            for params, own, pace in zip(weights, adapters, paces, strict=True)
            if step % pace == 0
        ]
        torch.stack(losses).sum().backward()
        opt.step()
    return [{name: leaf.detach() for name, leaf in params.items()} for params in weights]


WAYS = {
    "at once, funcopt.Members": at_once,
    "one by one": one_by_one,
    "torch.optim.AdamW, with groups": with_groups,
}


class Times(NamedTuple):
    """The milliseconds of a step of all slots, by what computes it."""

    paced: dict[str, float]
    all_due: dict[str, float]  # were every adapter due at every step


def measure(stays: Sequence[Stay], data: Data, options: Options) -> Times:
    adapters = [stay.adapter for stay in stays if stay.start == 0]
    hurried = [own._replace(pace=torch.tensor(1)) for own in adapters]
    times = Times(dict.fromkeys(WAYS, math.inf), dict.fromkeys(WAYS, math.inf))
    ends: dict[str, list[Params]] = {}
    for _ in bar(range(40), "time"):  # in turns, and the best counts
        for name, way in WAYS.items():
            for own, best in ((adapters, times.paced), (hurried, times.all_due)):
                start = time.perf_counter()
                ends[name] = way(own, data, options)
                passed = 1e3 * (time.perf_counter() - start) / options.timed
                best[name] = min(best[name], passed)
    print(f"\nMilliseconds for a step of {options.slots} adapters:\n")
    print("                                 each at its pace  all due  difference")
    first = next(iter(ends.values()))
    for name, end in ends.items():
        gap = max(map(difference, first, end))  # of the weights, when all were due
        print(f"  {name:31}{times.paced[name]:16.2f}{times.all_due[name]:9.2f}{gap:12.1g}")
    return times


# -------------------------------------------------------------------------------------- the picture


def draw(stays: Sequence[Stay], trained: Trained, times: Times, options: Options) -> None:
    with mpl.rc_context({"font.size": 9.5, "axes.titlesize": 11}):
        figure = Figure(figsize=(10, 6.5), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1), height_ratios=(1.4, 1))
        left, above, below = map(figure.add_subplot, (grid[:, 0], grid[0, 1], grid[1, 1]))
        draw_slots(left, stays, trained, options)
        draw_curves(above, stays, trained)
        draw_times(below, times)
        for axes in (left, above, below):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(options.output, dpi=160)


def draw_slots(axes: Axes, stays: Sequence[Stay], trained: Trained, options: Options) -> None:
    """Draw how well the adapter in each slot does, and where another one comes."""
    edges = [*trained.steps, options.steps]
    values = torch.stack(trained.accuracies, 1).numpy()
    slots = [slot + 0.5 for slot in range(options.slots + 1)]
    image = axes.pcolormesh(edges, slots, values, cmap="YlGnBu", vmin=0, vmax=1)
    for stay in stays:
        if stay.start > 0:
            low, high = slots[stay.slot : stay.slot + 2]
            axes.vlines(stay.start, low, high, color="#d55e00", linewidth=2)
    axes.figure.colorbar(image, ax=axes, format=PercentFormatter(1, 0), aspect=40, pad=0.02)
    title = "Accuracy on the test in each slot; orange: a new adapter"
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.set(xlabel="step", ylabel="slot", title=title)


def draw_curves(axes: Axes, stays: Sequence[Stay], trained: Trained) -> None:
    """Draw how each adapter learned, from the step at which it came."""
    for stay in stays:
        points = [
            (step - stay.start, float(values[stay.slot]))
            for step, values in zip(trained.steps, trained.accuracies, strict=True)
            if stay.start <= step < stay.stop
        ]
        color = PACES[int(stay.adapter.pace)]
        axes.plot(*zip(*points, strict=True), color=color, linewidth=0.7, alpha=0.8)
    for pace, color in PACES.items():
        axes.plot([], [], color=color, label=OFTEN[pace])
    axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
    axes.set(
        xlim=(0, None), ylim=(0, 1), xlabel="steps since it came", ylabel="accuracy on the test"
    )
    axes.set_title(f"{len(stays)} adapters, by how often they are due")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False)


def draw_times(axes: Axes, times: Times) -> None:
    for offset, label, color, values in (
        (-0.2, "each at its pace", "#0072b2", times.paced),
        (0.2, "all due", "0.7", times.all_due),
    ):
        places = [place + offset for place in range(len(values))]
        bars = axes.barh(places, list(values.values()), height=0.36, color=color, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_yticks(range(len(WAYS)), [name.replace(", ", "\n") for name in WAYS])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="milliseconds", title="A step of all slots")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=2, frameon=False)


# ---------------------------------------------------------------------------------------- the flags


class Options(argparse.Namespace):
    """The flags, once they are known to make sense."""

    slots: int
    steps: int
    timed: int
    seed: int
    output: Path


def parse_options() -> Options:
    parser = argparse.ArgumentParser(
        description=str(__doc__).partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--slots", type=int, default=32, help="adapters at the same time")
    add("--steps", type=int, default=400, help="minibatches to train on")
    add("--timed", type=int, default=8, help="steps to measure, forty times in each way")
    add("--seed", type=int, default=0, help="of all that is drawn but the split of the images")
    add("--output", type=Path, default="out/adapters.png", help="the picture, a PNG")
    options = parser.parse_args(namespace=Options())
    for name in ("slots", "steps", "timed"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"argument --{name}: {value} is less than 1")
    if options.seed < 0:
        parser.error(f"argument --seed: {options.seed} is less than 0")
    if options.output.suffix.lower() != ".png":
        parser.error(f"argument --output: {options.output} does not end in .png")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    return options


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)  # on several, torch can round differently from run to run
    data, stays = load(options), plan(options)
    trained = train_together(stays, data, options)
    check(stays, trained, data)
    print_accuracies(stays, trained, data)
    times = measure(stays, data, options)
    draw(stays, trained, times, options)
    print(f"\nHow each slot did, how each adapter learned and the time are in {options.output}.")


if __name__ == "__main__":
    main()
