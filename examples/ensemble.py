"""Train 64 classifiers at once: four seeds, four learning rates, four weight decays, one vmap.

Every member of the ensemble is a small network that learns to read handwritten digits. It has its
own initial weights, learning rate and weight decay; all see the same minibatches in the same order.
The training step (loss, gradient, update) is written for one member and mapped over all of them.
That works because `funcopt.AdamW` is a pytree of its hyperparameters and its update is pure. With
`--compile`, Inductor makes one graph of that step for all members.

The script prints the best members and what averaging their predictions gains, and it draws the
learning curve of every member and the accuracy of every setting. Then it trains some members again,
one by one with `torch.optim.AdamW`: to see how much longer that takes, and that it makes no other
difference.

    pip install "funcopt[examples]"
    python examples/ensemble.py
    python examples/ensemble.py --seeds 2 --lrs 1e-3 1e-2 --decays 0 0.1 --steps 20 --compare 2
    python examples/ensemble.py --compile
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import funcopt

Params = dict[str, Tensor]
Value = TypeVar("Value", int, float)

# Of the 1797 images, so many are to train on and so many to choose by. The other 600 are the test.
TRAINING, VALIDATION = 897, 300

# After so many steps, members trained together and alone are compared; `drift` says why so early.
EARLY = 5


# ----------------------------------------------------------------------------------- the training


class Member(NamedTuple):
    """What sets a member apart from the others."""

    seed: int
    lr: float
    decay: float


class Trained(NamedTuple):
    """What training leaves; of many at once, the members are the first dimension of a tensor."""

    params: Params
    early: Params  # the parameters after EARLY steps
    seconds: list[float]  # for each step


class Record(NamedTuple):
    """How the members do at some step: the log-probability of the truth, by validation image."""

    step: int
    log_truth: Tensor


def train_together(
    members: Sequence[Member], data: Data, options: Options
) -> tuple[Trained, list[Record]]:
    """Train all members at once, and record how they do along the way."""
    network = build(0, options)  # for its structure: the weights are always handed in

    def loss(params: Params, images: Images) -> Tensor:
        return cross_entropy(functional_call(network, params, (images.pixels,)), images.digits)

    def train_step(
        opt: funcopt.AdamW, params: Params, state: funcopt.AdamWState, images: Images
    ) -> tuple[Params, funcopt.AdamWState]:
        grads = grad(loss)(params, images)
        return opt.update(grads, state, params)

    # Each member has its own optimizer, parameters and state; the images are the same for all.
    train_all = vmap(train_step, in_dims=(0, 0, 0, None))
    if options.compile:
        train_all = torch.compile(train_all, fullgraph=True)

    opt = stacked_optimizer(members)
    params = early = stacked_weights(members, options)
    state = vmap(opt.init)(params)
    records, seconds = [record(0, network, params, data)], []
    every = math.ceil(options.steps / 50)
    for step, batch in enumerate(tqdm(data.batches, f"{len(members)} at once", unit="step"), 1):
        start = now(options)
        params, state = train_all(opt, params, state, data.training.pick(batch))
        seconds.append(now(options) - start)
        if step <= EARLY:
            early = params
        if step % every == 0 or step == options.steps:
            records.append(record(step, network, params, data))
    return Trained(params, early, seconds), records


def stacked_optimizer(members: Sequence[Member]) -> funcopt.AdamW:
    # In float64 each number is exactly the one that a member trained alone is given.
    lrs = torch.tensor([member.lr for member in members], dtype=torch.float64)
    decays = torch.tensor([member.decay for member in members], dtype=torch.float64)
    return funcopt.AdamW(lr=lrs, weight_decay=decays)


def stacked_weights(members: Sequence[Member], options: Options) -> Params:
    own = [weights(build(member.seed, options)) for member in members]
    return {name: torch.stack([params[name] for params in own]) for name in own[0]}


def train_alone(member: Member, data: Data, options: Options) -> Trained:
    """Train one member as one usually would."""
    network = build(member.seed, options)
    opt = torch.optim.AdamW(network.parameters(), lr=member.lr, weight_decay=member.decay)
    early, seconds = weights(network), []
    for step, batch in enumerate(data.batches, 1):
        start = now(options)
        images = data.training.pick(batch)
        opt.zero_grad()
        cross_entropy(network(images.pixels), images.digits).backward()
        opt.step()
        seconds.append(now(options) - start)
        if step <= EARLY:
            early = weights(network)
    return Trained(weights(network), early, seconds)


def now(options: Options) -> float:
    """Return the time once the device has done all that it was told to do."""
    if options.device.type != "cpu":
        torch.accelerator.synchronize(options.device)
    return time.perf_counter()


# --------------------------------------------------------------------------- members and their data


class Images(NamedTuple):
    """Pictures of digits, a row of 64 pixels each, and the digits they show."""

    pixels: Tensor
    digits: Tensor

    def pick(self, which: Tensor) -> Images:
        """Return the images with these numbers."""
        return Images(self.pixels[which], self.digits[which])


class Data(NamedTuple):
    """The images by what they are for, and which training images make up each minibatch."""

    training: Images
    validation: Images
    test: Images
    batches: Tensor


def all_members(options: Options) -> list[Member]:
    """Return every combination, the seeds outermost, so that results reshape into a grid."""
    combinations = itertools.product(range(options.seeds), options.lrs, options.decays)
    return [Member(*combination) for combination in combinations]


def build(seed: int, options: Options) -> nn.Module:
    """Return a new network; its initial weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inner, outer = nn.Linear(64, options.hidden), nn.Linear(options.hidden, 10)
    return nn.Sequential(inner, nn.Tanh(), outer).to(options.device)


def weights(network: nn.Module) -> Params:
    """Return a copy of the parameters, as plain tensors."""
    return {name: param.detach().clone() for name, param in network.named_parameters()}


def load(options: Options) -> Data:
    """Load the digits, in a random order that is always the same, and draw the minibatches."""
    digits = load_digits()
    images = Images(
        torch.tensor(digits.data / 16, dtype=torch.float32, device=options.device),
        torch.tensor(digits.target, dtype=torch.int64, device=options.device),
    )
    generator = torch.Generator().manual_seed(0)

    def shuffled(size: int) -> Tensor:
        return torch.randperm(size, generator=generator).to(options.device)

    total, drawn = len(images.digits), options.steps * options.batch_size
    sizes = [TRAINING, VALIDATION, total - TRAINING - VALIDATION]
    training, validation, test = map(images.pick, shuffled(total).split(sizes))
    epochs = [shuffled(TRAINING) for _ in range(math.ceil(drawn / TRAINING))]
    batches = torch.cat(epochs)[:drawn].view(options.steps, options.batch_size)
    return Data(training, validation, test, batches)


# ------------------------------------------------------------------------------------ the results


class Results(NamedTuple):
    """What the members and their mean predictions are worth, on images that none was trained on."""

    ranking: list[int]  # the members from best to worst, by validation
    chosen: list[int]  # the best eighth of them, but at least two
    validation: Tensor  # the accuracy of each member; NaN if its weights overflowed
    test: Tensor
    mean_of_chosen: float  # the test accuracy of their mean prediction
    mean_of_all: float


def evaluate(params: Params, last: Record, data: Data, options: Options) -> Results:
    """Choose members by validation alone, so that the test can tell what the choice is worth."""
    network = build(0, options)
    on_test = predict(network, params, data.test)
    validation = accuracy(predict(network, params, data.validation), data.validation)
    scores = validation.nan_to_num(nan=-1.0).tolist()
    losses = losses_of(last).nan_to_num(nan=math.inf).tolist()
    ranking = sorted(range(len(scores)), key=lambda index: (-scores[index], losses[index]))
    chosen = ranking[: max(2, len(ranking) // 8)]
    return Results(
        ranking=ranking,
        chosen=chosen,
        validation=validation,
        test=accuracy(on_test, data.test),
        # Where weights overflowed, a prediction is NaN, and has no vote.
        mean_of_chosen=accuracy(on_test[chosen].exp().nanmean(0), data.test).item(),
        mean_of_all=accuracy(on_test.exp().nanmean(0), data.test).item(),
    )


def predict(network: nn.Module, params: Params, images: Images) -> Tensor:
    """Return log-probabilities by member, image and digit."""
    outputs = vmap(lambda own: functional_call(network, own, (images.pixels,)))(params)
    return outputs.log_softmax(-1)


def accuracy(predictions: Tensor, images: Images) -> Tensor:
    right = (predictions.argmax(-1) == images.digits).float().mean(-1)
    return right.masked_fill(predictions.isnan().flatten(-2).any(-1), math.nan).cpu()


def record(step: int, network: nn.Module, params: Params, data: Data) -> Record:
    predictions = predict(network, params, data.validation)
    images = torch.arange(len(data.validation.digits), device=predictions.device)
    return Record(step, predictions[:, images, data.validation.digits].cpu())


def losses_of(record: Record) -> Tensor:
    return -record.log_truth.mean(1)


def print_results(members: Sequence[Member], results: Results) -> None:
    print("\nThe best members, by validation accuracy and then loss:\n")
    print("  rank  seed  learning rate  weight decay  validation    test")
    for rank, index in enumerate(results.ranking[:8], 1):
        seed, lr, decay = members[index]
        validation, test = results.validation[index], results.test[index]
        print(f"  {rank:4}{seed:6}{lr:15g}{decay:14g}{validation:12.1%}{test:8.1%}")
    some, own = len(results.chosen), results.test[results.chosen].mean()
    print(f"\nAccuracy on the test ({len(members)} members in all):\n")
    print(f"  the best member                {results.test[results.ranking[0]]:8.1%}")
    print(f"  {f'the best {some}, on average':31}{own:8.1%}")
    print(f"  {f'the best {some}, mean prediction':31}{results.mean_of_chosen:8.1%}")
    print(f"  {f'all {len(members)}, mean prediction':31}{results.mean_of_all:8.1%}")


# --------------------------------------------------------------------------------- the comparison


def compare(
    members: Sequence[Member], together: Trained, data: Data, options: Options
) -> dict[int, Trained]:
    """Train some members alone, and say how long it takes."""
    some = in_turn(len(members), options)
    bar = tqdm(some, f"{len(some)} alone", unit="member")
    alone = {index: train_alone(members[index], data, options) for index in bar}

    # By the median step, so that other work on the machine hardly counts.
    at_once = statistics.median(together.seconds)
    steps = [seconds for own in alone.values() for seconds in own.seconds]
    by_one = statistics.median(steps) * len(members)
    total = statistics.mean(steps) * len(members) * options.steps
    scaled = f"  (scaled up from {len(some)} members)" if len(some) < len(members) else ""
    print(f"\nTime for {len(members)} members: the median step, and all {options.steps} steps:\n")
    print(
        f"  at once, funcopt.AdamW under vmap{1e3 * at_once:9.2f} ms{sum(together.seconds):8.1f} s"
    )
    print(f"  one by one, torch.optim.AdamW    {1e3 * by_one:9.2f} ms{total:8.1f} s{scaled}")
    print(f"\nBy the median step, at once is {by_one / at_once:.1f} times as fast.")
    return alone


def in_turn(total: int, options: Options) -> list[int]:
    """Return the members to train alone: first each setting once, with the seeds in turn."""
    settings = total // options.seeds
    turns = (divmod(n, settings) for n in range(min(options.compare, total)))
    return [(turn + setting) % options.seeds * settings + setting for turn, setting in turns]


class Drift(NamedTuple):
    """The largest difference between a member's weights trained at once and alone."""

    early: float
    allowed: float
    final: float


def check(
    members: Sequence[Member], together: Trained, alone: dict[int, Trained], options: Options
) -> None:
    """Exit with a message if a member is not what it becomes when it is trained alone."""
    steps = min(EARLY, options.steps)
    drifts = {
        index: drift(index, members[index], together, own, options) for index, own in alone.items()
    }
    print("\nLargest difference between a member's weights trained at once and alone:\n")
    print(f"  learning rate  at step {steps}  (allowed)  at step {options.steps}")
    for rate in options.lrs:
        same = [found for index, found in drifts.items() if members[index].lr == rate]
        if same:
            early, allowed, _ = max(same, key=lambda found: found.early / found.allowed)
            final = max(found.final for found in same)
            print(f"  {rate:13g}{early:11.1e}{allowed:11.1e}{final:11.1e}")
    print("\nOnly the first is checked: where training is chaotic, rounding grows without bound.")
    for index, found in drifts.items():
        if found.early > found.allowed:
            sys.exit(
                f"\n{members[index]} is not the same alone: at step {steps} its weights differ "
                f"by up to {found.early:.1e}, where rounding explains {found.allowed:.1e}."
            )


def drift(index: int, member: Member, together: Trained, alone: Trained, options: Options) -> Drift:
    """Compare a member with itself trained alone.

    Both ways compute the same in float32, but in another order, so they differ by rounding. At too
    large a learning rate, training is chaotic: a difference doubles every few steps, until two runs
    that are both right have nothing in common. So what counts is the difference after a few steps.
    Allowed is a thousandth of the way that the member has moved by then, since a wrong gradient,
    count or hyperparameter shows as a good part of that; and ten roundings of its largest weight.
    Above a learning rate of 1, the very first steps can be chaotic, so anything is allowed; from
    0.1 on if the step is compiled, since then gradients are rounded in another way than by torch's
    own kernels, and the first differences are ten times as large.
    """

    def flat(params: Params) -> Tensor:
        # What overflowed becomes a large number, so that it can be compared.
        return torch.cat([leaf.flatten() for leaf in params.values()]).nan_to_num().cpu().double()

    def largest(values: Tensor) -> float:
        return values.abs().max().item()

    early = {name: stacked[index] for name, stacked in together.early.items()}
    final = {name: stacked[index] for name, stacked in together.params.items()}
    start, reached = flat(weights(build(member.seed, options))), flat(alone.early)
    allowed = 1e-3 * largest(reached - start) + 1e-6 * largest(reached)
    return Drift(
        early=largest(flat(early) - reached),
        allowed=allowed if member.lr <= (0.1 if options.compile else 1) else math.inf,
        final=largest(flat(final) - flat(alone.params)),
    )


# ------------------------------------------------------------------------------------ the picture


def draw(
    members: Sequence[Member], records: Sequence[Record], results: Results, options: Options
) -> None:
    with mpl.rc_context({"font.size": 9.5, "axes.titlesize": 11}):
        figure = Figure(figsize=(10, 4.375), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
        draw_curves(left, members, records, results)
        draw_grid(right, results, options)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=2 + len(options.lrs), frameon=False
        )
        figure.savefig(options.output, dpi=160)


def draw_curves(
    axes: Axes, members: Sequence[Member], records: Sequence[Record], results: Results
) -> None:
    """Draw the validation loss of every member, and of the best ones' mean prediction."""
    steps = [record.step for record in records]
    losses = torch.stack([losses_of(record) for record in records]).numpy()
    rates = sorted({member.lr for member in members})
    colors = mpl.colormaps["plasma"](torch.linspace(0.05, 0.85, len(rates)).numpy())
    for rate, color in reversed(list(zip(rates, colors, strict=True))):
        same = [index for index, member in enumerate(members) if member.lr == rate]
        axes.plot(steps, losses[:, same], color=color, linewidth=0.7, alpha=0.8)
    axes.plot([], [], " ", label="learning rate:")
    for rate, color in zip(rates, colors, strict=True):
        axes.plot([], [], color=color, label=f"{rate:g}")

    # The loss of a mean of probabilities, out of their logarithms.
    chosen = torch.stack([record.log_truth[results.chosen] for record in records])
    mixed = (math.log(len(results.chosen)) - chosen.logsumexp(1)).mean(1).numpy()
    score = f"{results.mean_of_chosen:.1%} on the test"
    label = f"mean prediction of the best {len(results.chosen)}: {score}"
    axes.plot(steps, mixed, color="black", linewidth=2, label=label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    lowest = min(np.nanmin(losses), mixed.min())
    axes.set_ylim(0.8 * lowest, 2 * losses[0].max())  # who diverges leaves the picture
    axes.set_xlim(0, steps[-1])
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss")
    axes.set_title(f"{len(members)} networks trained at once by one vmapped step")


def draw_grid(axes: Axes, results: Results, options: Options) -> None:
    """Draw the mean test accuracy of every setting."""
    shape = options.seeds, len(options.lrs), len(options.decays)
    means = results.test.view(shape).mean(0)
    # Coloured by the error on a log scale, or beside the worst all good settings would look alike.
    errors = (1 - means).nan_to_num(nan=1.0).clamp(min=1e-3).numpy()
    norm = LogNorm(min(errors.min(), 0.3), 0.9, clip=True)
    image = axes.imshow(errors, cmap="YlGnBu_r", norm=norm, aspect="auto", origin="lower")
    for (row, column), error in np.ndenumerate(errors):
        mean = means[row, column]
        text = "diverged" if mean.isnan() else f"{mean:.1%}"
        brightness = np.dot(image.to_rgba(error)[:3], (0.3, 0.6, 0.1))
        color = "white" if brightness < 0.5 else "black"
        axes.text(column, row, text, color=color, ha="center", va="center")
    axes.set_xticks(range(shape[2]), [f"{decay:g}" for decay in options.decays])
    axes.set_yticks(range(shape[1]), [f"{rate:g}" for rate in options.lrs])
    axes.set_xlabel("weight decay")
    axes.set_ylabel("learning rate")
    axes.set_title(f"Test accuracy, mean over {options.seeds} seeds")
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, label="test accuracy")
    bar.ax.yaxis.set_major_locator(FixedLocator([0.9, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01]))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{1 - error:.0%}"))
    bar.ax.invert_yaxis()
    bar.outline.set_visible(False)


# -------------------------------------------------------------------------------------- the flags


class Options(argparse.Namespace):
    """The flags, once they are known to make sense."""

    seeds: int
    lrs: list[float]
    decays: list[float]
    steps: int
    batch_size: int
    hidden: int
    device: torch.device
    compile: bool
    compare: int
    output: Path


def parse_options() -> Options:
    parser = argparse.ArgumentParser(
        description=str(__doc__).partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    count = checked(int, "a whole number of at least 1", lambda n: n >= 1)
    batch = checked(int, f"a whole number from 1 to {TRAINING}", lambda n: 1 <= n <= TRAINING)
    alone = checked(int, "a whole number of at least 0", lambda n: n >= 0)
    rate = checked(float, "a finite number above 0", lambda x: 0 < x < math.inf)
    decay = checked(float, "a finite number of at least 0", lambda x: 0 <= x < math.inf)
    rates, decays = [3e-4, 3e-3, 3e-2, 3e-1], [0.0, 0.1, 1.0, 10.0]

    add = parser.add_argument
    add("--seeds", type=count, default=4, help="how many initial weights to start from")
    add("--lrs", type=rate, nargs="+", default=rates, help="learning rates")
    add("--decays", type=decay, nargs="+", default=decays, help="weight decays")
    add("--steps", type=count, default=400, help="minibatches to train on")
    add("--batch-size", type=batch, default=32, help="images in a minibatch")
    add("--hidden", type=count, default=32, help="hidden units of each network")
    add("--device", type=usable_device, default="cpu", help="where to train")
    add("--compile", action="store_true", help="compile the step of all members")
    add("--compare", type=alone, default=16, help="members to train alone too; at most all are")
    add("--output", type=Path, default="out/ensemble.png", help="the picture, a PNG")
    options = parser.parse_args(namespace=Options())
    for flag, values in (("--lrs", options.lrs), ("--decays", options.decays)):
        if len(set(values)) < len(values):
            parser.error(f"argument {flag}: the same number is given twice")
        values.sort()
    if options.output.suffix.lower() != ".png":
        parser.error(f"argument --output: {options.output} does not end in .png")
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.open("ab").close()
    except OSError as error:
        parser.error(f"argument --output: {options.output} cannot be written: {error.strerror}")
    return options


def checked(kind: type[Value], rule: str, holds: Callable[[Value], bool]) -> Callable[[str], Value]:
    """Return what turns the text of a flag into a number, or into an error that quotes the rule."""

    def convert(text: str) -> Value:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"{text} is not {rule}")
        return value

    return convert


def usable_device(name: str) -> torch.device:
    """Return a device on which a number can really be put and read back."""
    try:
        torch.zeros((), device=name).item()
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        reason = textwrap.shorten(str(error), 100)
        raise argparse.ArgumentTypeError(f"{name} cannot be used: {reason}") from None
    return torch.device(name)


def main() -> None:
    options = parse_options()
    members, data = all_members(options), load(options)
    together, records = train_together(members, data, options)
    results = evaluate(together.params, records[-1], data, options)
    print_results(members, results)
    draw(members, records, results, options)
    print(f"\nThe learning curves and the accuracy of every setting are in {options.output}.")
    if options.compare:
        alone = compare(members, together, data, options)
        check(members, together, alone, options)


if __name__ == "__main__":
    main()
