"""Population-based training: 64 networks that copy the best of them and search on from there.

Every member of the population is a small network that learns to read handwritten digits. It has
weights of its own, and hyperparameters of its own: learning rate, weight decay, and how much noise
is added to the images. All are trained at once, by one step that is mapped over the members. Every
50 steps, by the loss on the validation images (Jaderberg et al. 2017, arXiv:1711.09846):

- exploit: the worst fifth is replaced by copies of members of the best fifth. A member is a tuple
  of its optimizer, weights, moments and noise, so that one `members.take` copies all of it;
- explore: the copies change each of their hyperparameters by a fifth, up or down, which is one
  `funcopt.replace` for each, and one `members.select` so that all others keep theirs.

So the learning rate can change along a lineage: a member, the one that it was copied from, and so
on back to the start. In the end the lineage of the best member is trained once more, alone. It is
an ordinary run with a schedule, and must come to the same weights but for rounding.

The same members are trained for as many steps without exploit and explore, too. That is random
search with constant hyperparameters, at the same number of gradients. Of either, one member is
chosen by its validation loss, and judged by its accuracy on the test images. In a terminal, the
members that are best at the moment are shown while it trains.

    pip install "funcopt[examples]"
    python examples/population.py
    python examples/population.py --members 8 --steps 30 --every 5
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import funcopt
from funcopt import members

Params = dict[str, Tensor]

# Of the 1797 images, so many are to train on and so many to choose by. The other 600 are the test.
TRAINING, VALIDATION = 897, 300

BATCH, HIDDEN = 32, 32

# Exploit: so large a part of the population is replaced. Explore: by one of these factors.
PART = 1 / 5
FACTORS = 0.8, 1.2
HYPERPARAMETERS = "lr", "weight_decay", "noise"

# So many members are on the board while it trains, in a terminal.
PLACES = 5

# Colours: of the population's lineages by what becomes of them, and of random search.
LOST, KEPT, POPULATION, SEARCH = "0.82", "0.35", "#d55e00", "#0072b2"
KINDS = {LOST: "died out", KEPT: "has copies at the end", POPULATION: "lineage of the best"}
WIDTHS = {LOST: 0.7, KEPT: 0.8, POPULATION: 2.2}


# -------------------------------------------------------------------------------------- the members


class Member(NamedTuple):
    """One network and what trains it; of many at once, each tensor has the members in front."""

    opt: funcopt.AdamW  # with a learning rate and a weight decay of its own
    noise: Tensor  # the standard deviation of what is added to its training images
    params: Params
    state: funcopt.AdamWState


class Batch(NamedTuple):
    """Images to train on, and a standard normal number for each of their pixels."""

    pixels: Tensor
    digits: Tensor
    normal: Tensor


def new_member(generator: torch.Generator) -> Member:
    """Draw hyperparameters, those of the optimizer evenly on a log scale, and initial weights."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    opt = funcopt.AdamW(lr=10 ** between(-4, 0), weight_decay=10 ** between(-3, 1))
    params = {
        "inner": torch.randn(64, HIDDEN, generator=generator) / math.sqrt(64),
        "inner_bias": torch.zeros(HIDDEN),
        "outer": torch.randn(HIDDEN, 10, generator=generator) / math.sqrt(HIDDEN),
        "outer_bias": torch.zeros(10),
    }
    return Member(opt, torch.tensor(between(0, 1)), params, opt.init(params))


def network(params: Params, pixels: Tensor) -> Tensor:
    hidden = torch.tanh(pixels @ params["inner"] + params["inner_bias"])
    return hidden @ params["outer"] + params["outer_bias"]


def train_step(member: Member, batch: Batch) -> Member:
    """Make one step of one member."""

    def loss(params: Params) -> Tensor:
        return cross_entropy(
            network(params, batch.pixels + member.noise * batch.normal), batch.digits
        )

    grads = grad(loss)(member.params)
    params, state = member.opt.update(grads, member.state, member.params)
    return member._replace(params=params, state=state)


# ----------------------------------------------------------------------------------- the population


class Generation(NamedTuple):
    """What happened from one exploitation to the next."""

    stop: int  # the step at which it ended
    opt: funcopt.AdamW  # the hyperparameters of all members
    noise: Tensor
    losses: Tensor  # the validation loss of each member at the end; infinite where it is none
    parents: Tensor  # the member of the generation before that each is a copy of, or itself


class Run(NamedTuple):
    """The members at the end, and their history."""

    population: Member
    generations: list[Generation]


def train(population: Member, data: Data, options: Options, evolving: bool) -> Run:
    """Train all members at once; let them evolve, or keep their hyperparameters."""
    train_all = vmap(train_step, in_dims=(0, None))
    generator = generator_of("evolution", options)
    generations, parents = [], torch.arange(options.members)
    with Board("population" if evolving else "random search", options) as board:
        for step, batch in enumerate(minibatches(data, options), 1):
            population = train_all(population, batch)
            board.bar.update()
            if step % options.every and step < options.steps:
                continue
            losses, _ = judge(population, data.validation)
            generations.append(Generation(step, population.opt, population.noise, losses, parents))
            board.show(population, losses)
            if evolving and step < options.steps:
                population, parents = exploit(population, losses, generator)
                copied = parents != torch.arange(options.members)
                population = explore(population, copied, generator)
    return Run(population, generations)


def exploit(
    population: Member, losses: Tensor, generator: torch.Generator
) -> tuple[Member, Tensor]:
    """Put copies of the best in the place of the worst, and say which member each is now."""
    parents = torch.arange(members.size(population))
    ranking = losses.argsort(stable=True)
    count = math.ceil(PART * len(ranking))
    some_of_best = torch.randint(count, (count,), generator=generator)
    parents[ranking[-count:]] = ranking[some_of_best]
    return members.take(population, parents), parents


def explore(population: Member, copied: Tensor, generator: torch.Generator) -> Member:
    """Change the hyperparameters of the copies."""

    def changed(numbers: Tensor) -> Tensor:
        drawn = torch.randint(len(FACTORS), numbers.shape, generator=generator)
        return numbers * torch.tensor(FACTORS, dtype=numbers.dtype)[drawn]

    new = population
    for name in HYPERPARAMETERS:
        new = funcopt.replace(new, name, changed)
    return members.select(copied, new, population)


def judge(population: Member, images: Images) -> tuple[Tensor, Tensor]:
    """Return the loss and the accuracy of each member."""

    def judge_one(params: Params) -> tuple[Tensor, Tensor]:
        outputs = network(params, images.pixels)
        right = outputs.argmax(-1) == images.digits
        return cross_entropy(outputs, images.digits), right.float().mean()

    losses, accuracies = vmap(judge_one)(population.params)
    return losses.nan_to_num(nan=math.inf), accuracies  # the loss is NaN where weights overflowed


# ----------------------------------------------------------------------------------------- the data


class Images(NamedTuple):
    """Pictures of digits, a row of 64 pixels each, and the digits they show."""

    pixels: Tensor
    digits: Tensor


class Data(NamedTuple):
    """The images by what they are for."""

    training: Images
    validation: Images
    test: Images


def load() -> Data:
    """Load the digits, in a random order that is always the same."""
    digits = load_digits()
    pixels = torch.tensor(digits.data / 16, dtype=torch.float32)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    parts = order.split([TRAINING, VALIDATION, len(order) - TRAINING - VALIDATION])
    return Data(*(Images(pixels[part], torch.tensor(digits.target)[part]) for part in parts))


def minibatches(data: Data, options: Options) -> Iterator[Batch]:
    """Draw the minibatches, which are the same for all members and in every run."""
    generator = generator_of("minibatches", options)
    for _ in range(options.steps):
        drawn = torch.randint(TRAINING, (BATCH,), generator=generator)
        normal = torch.randn(BATCH, 64, generator=generator)
        yield Batch(data.training.pixels[drawn], data.training.digits[drawn], normal)


def generator_of(what: str, options: Options) -> torch.Generator:
    """Return a generator of its own for each thing that is drawn."""
    drawn = "members", "minibatches", "evolution"
    return torch.Generator().manual_seed(len(drawn) * options.seed + drawn.index(what))


# ---------------------------------------------------------------------------------------- the board


class Board:
    """The best members of the moment, beneath a bar; nothing where no terminal would show it."""

    def __init__(self, name: str, options: Options) -> None:
        self.bar = tqdm(total=options.steps, desc=name, unit="step", leave=False, disable=None)
        self.lines = [
            tqdm(bar_format="{desc}", position=place, leave=False, disable=None)
            for place in range(1, PLACES + 1)
        ]

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        for line in (*reversed(self.lines), self.bar):
            line.close()

    def show(self, population: Member, losses: Tensor) -> None:
        ranking = losses.argsort(stable=True)
        for line, index in zip(self.lines, ranking.tolist(), strict=False):
            best = members.take(population, index)
            line.set_description_str(f"  member {index:3}: loss {losses[index]:.4f}, {said(best)}")


def said(member: Member) -> str:
    lr, decay = (float(torch.as_tensor(n)) for n in (member.opt.lr, member.opt.weight_decay))
    return f"learning rate {lr:.2g}, weight decay {decay:.2g}, noise {member.noise:.2g}"


# -------------------------------------------------------------------------------------- the results


def best_of(run: Run) -> int:
    return int(run.generations[-1].losses.argmin())


def lineage(run: Run, member: int) -> list[int]:
    """Return where a member of the last generation was in each, from the first on."""
    places = [member]
    for generation in reversed(run.generations[1:]):
        places.append(int(generation.parents[places[-1]]))
    return places[::-1]


def print_results(evolved: Run, fixed: Run, data: Data) -> None:
    print("                   validation loss  validation accuracy      test")
    print("                    best   median      best   median    accuracy")
    for name, run in (("population", evolved), ("random search", fixed)):
        best = best_of(run)
        losses, accuracies = judge(run.population, data.validation)
        _, on_test = judge(run.population, data.test)
        numbers = f"{losses[best]:8.4f}{losses.median():9.4f}"
        numbers += f"{accuracies[best]:10.1%}{accuracies.median():9.1%}"
        print(f"  {name:14}{numbers}{on_test[best]:12.1%}")
    print("\nThe best member ends with, and that of random search had all along:\n")
    for run in (evolved, fixed):
        print(f"  {said(members.take(run.population, best_of(run)))}")


def train_alone(start: Member, run: Run, places: list[int], data: Data, options: Options) -> Member:
    """Train one lineage, with the hyperparameters that it had in each generation."""
    member, done = members.take(start, places[0]), 0
    batches = minibatches(data, options)
    for generation, place in zip(run.generations, places, strict=True):
        opt, noise = members.take((generation.opt, generation.noise), place)
        member = member._replace(opt=opt, noise=noise)
        for batch in itertools.islice(batches, generation.stop - done):
            member = train_step(member, batch)
        done = generation.stop
    return member


def check(start: Member, run: Run, data: Data, options: Options) -> None:
    """Exit with a message if the best member is not what its lineage becomes alone."""
    best = best_of(run)
    alone = train_alone(start, run, lineage(run, best), data, options)
    params = members.take(run.population, best).params
    gap = max(float((params[name] - alone.params[name]).abs().max()) for name in params)
    largest = max(float(leaf.abs().max()) for leaf in params.values())
    print(
        "\nTrained alone, the lineage of the best member comes to weights that differ from its own"
    )
    print(f"by at most {gap:.1g}. The largest of them is {largest:.2f}.")
    if not gap <= 1e-2 * largest:
        sys.exit("\nThat is more than rounding explains.")


# -------------------------------------------------------------------------------------- the picture


def draw(evolved: Run, fixed: Run, data: Data, output: Path) -> None:
    with mpl.rc_context({"font.size": 9.5, "axes.titlesize": 11}):
        figure = Figure(figsize=(10, 6), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(1.1, 1))
        left, above, below = (
            figure.add_subplot(part) for part in (grid[:, 0], grid[0, 1], grid[1, 1])
        )
        draw_lineages(left, evolved)
        draw_rates(above, evolved, fixed)
        draw_losses(below, evolved, fixed, data)
        for axes in (left, above, below):
            axes.spines[["top", "right"]].set_visible(False)
            axes.set(xlabel="step", xlim=(0, evolved.generations[-1].stop))
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        figure.legend(loc="outside lower center", ncols=4, columnspacing=1.6, frameon=False)
        figure.savefig(output, dpi=160)


def draw_lineages(axes: Axes, run: Run) -> None:
    draw_tree(axes, run, heights(run), slope=0.3)
    for color, label in KINDS.items():
        axes.plot([], [], color=color, linewidth=WIDTHS[color], label=label)
    axes.set_ylabel("members; at step 0 by learning rate, the highest above")
    axes.set_yticks([])
    axes.set_title("Which member is a copy of which")


def draw_tree(axes: Axes, run: Run, values: list[Tensor], slope: float) -> None:
    """Draw a line for every member, which begins at what it is a copy of.

    Args:
        axes: Where to draw.
        run: Whose members.
        values: How high a member is in each generation.
        slope: Which part of a generation it takes to come there from what it is a copy of.
    """
    best, start = lineage(run, best_of(run)), 0
    everyone = [lineage(run, member) for member in range(len(values[0]))]
    lines: dict[str, list[list[tuple[float, float]]]] = {color: [] for color in KINDS}
    before = values[0]
    for index, (generation, after) in enumerate(zip(run.generations, values, strict=True)):
        there = start + slope * (generation.stop - start)
        kept = {places[index] for places in everyone}
        for own, parent in enumerate(generation.parents.tolist()):
            begin, end = before[parent].item(), after[own].item()
            color = POPULATION if own == best[index] else KEPT if own in kept else LOST
            lines[color].append([(start, begin), (there, end), (generation.stop, end)])
        before, start = after, generation.stop
    for color, points in lines.items():
        axes.add_collection(LineCollection(points, colors=color, linewidths=WIDTHS[color]))
    axes.autoscale_view()


def rates_of(population: funcopt.AdamW) -> Tensor:
    return torch.as_tensor(population.lr)  # which may be a number or a schedule, too


def heights(run: Run) -> list[Tensor]:
    """Return how high to draw the members of each generation, so that no line crosses another.

    The first are sorted by learning rate, all others as that which they are copies of; and copies
    of the same one by learning rate again.
    """
    found: list[Tensor] = []
    for generation in run.generations:
        order = rates_of(generation.opt).argsort(stable=True)
        if found:
            order = order[found[-1][generation.parents[order]].argsort(stable=True)]
        found.append(order.argsort())
    return found


def draw_rates(axes: Axes, evolved: Run, fixed: Run) -> None:
    axes.set_yscale("log")
    draw_tree(axes, evolved, [rates_of(one.opt) for one in evolved.generations], slope=0)
    rate = float(rates_of(fixed.population.opt)[best_of(fixed)])
    axes.axhline(rate, color=SEARCH, linestyle="--", label="best of random search")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(ylabel="learning rate", title="Learning rates, changed in every copy")


def draw_losses(axes: Axes, evolved: Run, fixed: Run, data: Data) -> None:
    for name, run, color in (("population", evolved, POPULATION), ("random search", fixed, SEARCH)):
        _, on_test = judge(run.population, data.test)
        steps = [generation.stop for generation in run.generations]
        best = [float(generation.losses.min()) for generation in run.generations]
        median = [float(generation.losses.median()) for generation in run.generations]
        label = f"{name}: best, test {on_test[best_of(run)]:.1%}"
        axes.plot(steps, best, color=color, linewidth=2.2, label=label)
        axes.plot(steps, median, color=color, linestyle=":", label=f"{name}: median")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(ylabel="validation loss", title="As many gradients, with and without evolution")


# ---------------------------------------------------------------------------------------- the flags


class Options(argparse.Namespace):
    """The flags, once they are known to make sense."""

    members: int
    steps: int
    every: int
    seed: int
    output: Path


def parse_options() -> Options:
    parser = argparse.ArgumentParser(
        description=str(__doc__).partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--members", type=int, default=64, help="networks in the population")
    add("--steps", type=int, default=1000, help="minibatches to train on")
    add("--every", type=int, default=50, help="steps from one exploitation to the next")
    add("--seed", type=int, default=0, help="of all that is drawn but the split of the images")
    add("--output", type=Path, default="out/population.png", help="the picture, a PNG")
    options = parser.parse_args(namespace=Options())
    for name, least in {"members": 2, "steps": 1, "every": 1, "seed": 0}.items():
        if (value := getattr(options, name)) < least:
            parser.error(f"argument --{name}: {value} is less than {least}")
    if options.output.suffix.lower() != ".png":
        parser.error(f"argument --output: {options.output} does not end in .png")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    return options


def main() -> None:
    options = parse_options()
    # On several threads torch can round differently from run to run, and a ranking turn on that.
    torch.set_num_threads(1)
    data, generator = load(), generator_of("members", options)
    start = members.stack([new_member(generator) for _ in range(options.members)])
    evolved = train(start, data, options, evolving=True)
    fixed = train(start, data, options, evolving=False)
    print_results(evolved, fixed, data)
    check(start, evolved, data, options)
    draw(evolved, fixed, data, options.output)
    print(f"\nThe lineages, the learning rates and the losses are in {options.output}.")


if __name__ == "__main__":
    main()
