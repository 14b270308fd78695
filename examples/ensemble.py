"""Train 64 classifiers at once: four seeds, four learning rates, four weight decays, one vmap.

Every member of the ensemble is a small network that learns to read handwritten digits. It has its
own initial weights, learning rate and weight decay, running means of its own in its batch norm, and
its own dropout; all see the same minibatches in the same order. The training step (loss, gradient,
update) is written for one member and mapped over all of them. That works because `funcopt.Best` of
`funcopt.AdamW` is a pytree of its hyperparameters and its update is pure. It keeps the weights that
had the best validation loss, and says which members should stop, as they get no better: these are
frozen, to the bit, while the others go on. With `--compile`, Inductor makes one graph of the step.

The script prints the best members and what averaging their predictions gains, and it draws the
learning curve of every member and the accuracy of every setting. Then it trains some members again,
one by one with `torch.optim.AdamW`, to see that it makes no other difference than rounding; and it
measures by turns a step of all members at once and one by one.

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
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import funcopt

Tensors = dict[str, Tensor]

# Of the 1797 images, so many are to train on and so many to choose by. The other 600 are the test.
TRAINING, VALIDATION = 897, 300

BATCH, HIDDEN, DROPOUT = 32, 32, 0.1

# After so many steps, members trained together and alone are compared; `drift` says why so early;
# and so often a step is measured in each way.
EARLY, TURNS = 5, 43


# ----------------------------------------------------------------------------------- the training


class Member(NamedTuple):
    """What sets a member apart from the others."""

    seed: int
    lr: float
    decay: float


class Members(NamedTuple):
    """Many members at once: the members are the first dimension of every tensor."""

    state: funcopt.BestState
    params: Tensors
    buffers: Tensors  # the running means of the batch norm


StepOfAll = Callable[..., Members]


class Trained(NamedTuple):
    """What training leaves; of many at once, the members are the first dimension of a tensor."""

    best: Tensors  # the parameters and buffers that had the best validation loss
    losses: Tensor  # this loss
    early: Tensors  # the parameters after EARLY steps
    final: Tensors
    steps: Tensor  # how many updates each member made until it was stopped


class Record(NamedTuple):
    """How the members do at some step: the log-probability of the truth, by validation image."""

    step: int
    log_truth: Tensor


def step_of_all(options: Options) -> StepOfAll:
    """Return the training step of all members: the step of one, mapped over them."""
    network = build(0, options).train()  # for its structure: the weights are always handed in

    def loss(params: Tensors, buffers: Tensors, images: Images, kept: Tensor) -> Any:
        own = {name: leaf.clone() for name, leaf in buffers.items()}  # the batch norm writes them
        outputs = functional_call(network, params | own, (images.pixels, kept))
        return cross_entropy(outputs, images.digits), own

    def train_step(
        opt: funcopt.Best, member: Members, images: Images, kept: Tensor, told: Tensors
    ) -> Members:
        state, params, buffers = member
        active = ~state.stopped
        grads, moved = grad(loss, has_aux=True)(params, buffers, images, kept)
        params, state = opt.update(grads, state, params, active=active, **told)
        buffers = {name: torch.where(active, moved[name], buffers[name]) for name in buffers}
        return Members(state, params, buffers)

    # Each member has its own weights, state and dropout; the images are the same for all.
    train_all = vmap(train_step, in_dims=(0, 0, None, 0, 0))
    return torch.compile(train_all, fullgraph=True) if options.compile else train_all


def train_together(
    train_all: StepOfAll, who: Sequence[Member], data: Data, options: Options
) -> tuple[Trained, list[Record]]:
    """Train all members at once, and record how they do along the way."""
    opt, all_of_them = stacked(who, options)
    early, best_buffers, records = all_of_them.params, all_of_them.buffers, []
    every, step = math.ceil(options.steps / 50), 0
    for step, batch in enumerate(tqdm(data.batches, f"{len(who)} at once", unit="step")):
        told = {}
        if step % every == 0:
            records.append(record(step, all_of_them, data, options))
            told = {"value": -records[-1].log_truth.mean(1).to(options.device)}
        before = all_of_them
        all_of_them = train_all(opt, before, data.training.pick(batch), kept(step, options), told)
        # The score is that of the weights before the step; the buffers beside them are as good.
        better = all_of_them.state.best_step > before.state.best_step
        best_buffers = funcopt.members.select(better, before.buffers, best_buffers)
        if step < EARLY:
            early = all_of_them.params
        if all_of_them.state.stopped.all():
            break
    records.append(record(step + 1, all_of_them, data, options))
    state = all_of_them.state
    best = state.best_params | best_buffers
    return Trained(best, state.best_value, early, all_of_them.params, state.step), records


def stacked(who: Sequence[Member], options: Options) -> tuple[funcopt.Best, Members]:
    """Return all members as they are at first."""
    opts = [funcopt.AdamW(lr=member.lr, weight_decay=member.decay) for member in who]
    opt = funcopt.members.stack([funcopt.Best(own, patience=options.patience) for own in opts])
    networks = [build(member.seed, options) for member in who]
    params = funcopt.members.stack([weights(network) for network in networks])
    buffers = funcopt.members.stack([dict(network.named_buffers()) for network in networks])
    return opt, Members(vmap(opt.init)(params), params, buffers)


def kept(step: int, options: Options) -> Tensor:
    """Draw what dropout keeps in a step: by member, image and hidden unit."""
    total = options.seeds * len(options.lrs) * len(options.decays)
    generator = torch.Generator().manual_seed(step)
    drawn = torch.rand(total, BATCH, HIDDEN, generator=generator)
    return ((drawn >= DROPOUT) / (1 - DROPOUT)).to(options.device)


def train_alone(
    steps: dict[int, int], who: Sequence[Member], data: Data, options: Options
) -> tuple[dict[int, Tensors], dict[int, Tensors]]:
    """Train some members as one usually would, each for so many steps: early and final weights."""
    networks = {index: build(who[index].seed, options).train() for index in steps}
    opts = {index: adamw(networks[index], who[index]) for index in steps}
    early: dict[int, Tensors] = {}
    for step in tqdm(range(max(steps.values())), f"{len(steps)} alone", unit="step"):
        images, own = data.training.pick(data.batches[step]), kept(step, options)
        for index, own_steps in steps.items():
            if step < own_steps:
                step_alone(networks[index], opts[index], images, own[index])
        if step < EARLY:
            early = {index: weights(network) for index, network in networks.items()}
    return early, {index: weights(network) for index, network in networks.items()}


def adamw(network: nn.Module, member: Member) -> torch.optim.AdamW:
    return torch.optim.AdamW(network.parameters(), lr=member.lr, weight_decay=member.decay)


def step_alone(network: nn.Module, opt: torch.optim.AdamW, images: Images, own: Tensor) -> None:
    opt.zero_grad()
    cross_entropy(network(images.pixels, own), images.digits).backward()
    opt.step()


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


class Network(nn.Module):
    """Reads a digit: a hidden layer with batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, HIDDEN, bias=False)  # the batch norm has one
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.outer = nn.Linear(HIDDEN, 10)

    def forward(self, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return a number for each digit. Dropout is by what is given to be kept."""
        hidden = torch.tanh(self.norm(self.inner(pixels)))
        outputs: Tensor = self.outer(hidden if kept is None else hidden * kept)
        return outputs


def build(seed: int, options: Options) -> nn.Module:
    """Return a new network; its initial weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network().to(options.device)


def weights(network: nn.Module) -> Tensors:
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

    total, drawn = len(images.digits), options.steps * BATCH
    sizes = [TRAINING, VALIDATION, total - TRAINING - VALIDATION]
    training, validation, test = map(images.pick, shuffled(total).split(sizes))
    epochs = [shuffled(TRAINING) for _ in range(math.ceil(drawn / TRAINING))]
    batches = torch.cat(epochs)[:drawn].view(options.steps, BATCH)
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


def evaluate(together: Trained, data: Data, options: Options) -> Results:
    """Choose members by validation alone, so that the test can tell what the choice is worth."""
    on_test = predict(together.best, data.test, options)
    validation = accuracy(predict(together.best, data.validation, options), data.validation)
    scores = validation.nan_to_num(nan=-1.0).tolist()
    losses = together.losses.nan_to_num(nan=math.inf).tolist()
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


def predict(tensors: Tensors, images: Images, options: Options) -> Tensor:
    """Return log-probabilities by member, image and digit."""
    network = build(0, options).eval()
    outputs: Tensor = vmap(lambda own: functional_call(network, own, (images.pixels,)))(tensors)
    return outputs.log_softmax(-1)


def accuracy(predictions: Tensor, images: Images) -> Tensor:
    right = (predictions.argmax(-1) == images.digits).float().mean(-1)
    return right.masked_fill(predictions.isnan().flatten(-2).any(-1), math.nan).cpu()


def record(step: int, trained: Members, data: Data, options: Options) -> Record:
    predictions = predict(trained.params | trained.buffers, data.validation, options)
    images = torch.arange(len(data.validation.digits), device=predictions.device)
    return Record(step, predictions[:, images, data.validation.digits].cpu())


def print_results(who: Sequence[Member], results: Results) -> None:
    print("\nThe best members, by validation accuracy and then loss:\n")
    print("  rank  seed  learning rate  weight decay  validation    test")
    for rank, index in enumerate(results.ranking[:8], 1):
        seed, lr, decay = who[index]
        validation, test = results.validation[index], results.test[index]
        print(f"  {rank:4}{seed:6}{lr:15g}{decay:14g}{validation:12.1%}{test:8.1%}")
    some = len(results.chosen)
    print(f"\nAccuracy on the test ({len(who)} members in all):\n")
    print(f"  the best member                {results.test[results.ranking[0]]:8.1%}")
    print(f"  {f'the best {some}, mean prediction':31}{results.mean_of_chosen:8.1%}")
    print(f"  {f'all {len(who)}, mean prediction':31}{results.mean_of_all:8.1%}")


def measure(train_all: StepOfAll, who: list[Member], data: Data, options: Options) -> None:
    """Say how long a step of all members takes, at once and one by one, measured by turns."""
    networks = [build(member.seed, options).train() for member in who]
    alone_opts = [adamw(*pair) for pair in zip(networks, who, strict=True)]
    opt, all_of_them = stacked(who, options)
    at_once, one_by_one = [], []
    for turn in range(TURNS):
        images, own = data.training.pick(data.batches[turn % len(data.batches)]), kept(0, options)
        start = now(options)
        all_of_them = train_all(opt, all_of_them, images, own, {})
        at_once.append(now(options) - start)
        start = now(options)
        for index, (network, own_opt) in enumerate(zip(networks, alone_opts, strict=True)):
            step_alone(network, own_opt, images, own[index])
        one_by_one.append(now(options) - start)
    # The first turns compile, or warm up. The median, as others may be at work on the machine.
    once, alone = (1e3 * statistics.median(own[3:]) for own in (at_once, one_by_one))
    print(f"\nThe median step of {len(who)} members, by turns:\n")
    print(f"  at once, funcopt under vmap  {once:9.2f} ms")
    print(f"  one by one, torch.optim.AdamW{alone:9.2f} ms")
    print(f"\nAt once is {alone / once:.1f} times as fast.")


def in_turn(total: int, options: Options) -> list[int]:
    """Return the members to train alone: first each setting once, with the seeds in turn."""
    settings = total // options.seeds
    turns = (divmod(n, settings) for n in range(min(options.compare, total)))
    return [(turn + setting) % options.seeds * settings + setting for turn, setting in turns]


def check(who: Sequence[Member], together: Trained, data: Data, options: Options) -> None:
    """Train some members alone, for as many steps, and exit if one does not become the same."""
    total = together.steps.int().tolist()
    early, final = train_alone(
        {index: total[index] for index in in_turn(len(who), options)}, who, data, options
    )
    drifts = {
        index: drift(index, who[index], together, (early[index], own), options)
        for index, own in final.items()
    }
    steps = min(EARLY, options.steps)
    print("\nLargest difference between a member's weights trained at once and alone:\n")
    print(f"  learning rate  at step {steps}  (allowed)  at the end")
    for rate in options.lrs:
        same = [found for index, found in drifts.items() if who[index].lr == rate]
        if same:
            near, allowed, _ = max(same, key=lambda found: found[0] / found[1])
            far = max(own for _, _, own in same)
            print(f"  {rate:13g}{near:11.1e}{allowed:11.1e}{far:11.1e}")
    print("\nOnly the first is checked: where training is chaotic, rounding grows without bound.")
    for index, (near, allowed, _) in drifts.items():
        if near > allowed:
            sys.exit(
                f"\n{who[index]} is not the same alone: at step {steps} its weights differ by up "
                f"to {near:.1e}, where rounding explains {allowed:.1e}."
            )


def drift(
    index: int, member: Member, together: Trained, alone: tuple[Tensors, Tensors], options: Options
) -> tuple[float, float, float]:
    """Return how far a member is from itself trained alone: early, as allowed, and at the end.

    Both ways compute the same in float32, but in another order, so they differ by rounding. Allowed
    early is a thousandth of the way that the member has moved by then, since a wrong gradient or
    number shows as a good part of that, and ten roundings of its largest weight. Above a learning
    rate of 1, or of 0.1 if the step is compiled, the first steps can be chaotic: all is allowed.
    """

    def flat(params: Tensors) -> Tensor:
        # What overflowed becomes a large number, so that it can be compared.
        return torch.cat([leaf.flatten() for leaf in params.values()]).nan_to_num().cpu().double()

    def largest(values: Tensor) -> float:
        return values.abs().max().item()

    early = {name: stacked[index] for name, stacked in together.early.items()}
    final = {name: stacked[index] for name, stacked in together.final.items()}
    start, reached = flat(weights(build(member.seed, options))), flat(alone[0])
    allowed = 1e-3 * largest(reached - start) + 1e-6 * largest(reached)
    if member.lr > (0.1 if options.compile else 1):
        allowed = math.inf
    return largest(flat(early) - reached), allowed, largest(flat(final) - flat(alone[1]))


# ------------------------------------------------------------------------------------ the picture


def draw(who: list[Member], records: list[Record], results: Results, options: Options) -> None:
    with mpl.rc_context({"font.size": 9.5, "axes.titlesize": 11}):
        figure = Figure(figsize=(10, 4.375), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
        draw_curves(left, who, records, results)
        draw_grid(right, results, options)
        legend, columns = left.get_legend_handles_labels(), 2 + len(options.lrs)
        figure.legend(*legend, loc="outside lower center", ncols=columns, frameon=False)
        figure.savefig(options.output, dpi=160)


def draw_curves(axes: Axes, who: Sequence[Member], records: list[Record], results: Results) -> None:
    """Draw the validation loss of every member, and of the best ones' mean prediction."""
    steps = [record.step for record in records]
    losses = torch.stack([-record.log_truth.mean(1) for record in records]).numpy()
    rates = sorted({member.lr for member in who})
    colors = mpl.colormaps["plasma"](torch.linspace(0.05, 0.85, len(rates)).numpy())
    for rate, color in reversed(list(zip(rates, colors, strict=True))):
        same = [index for index, member in enumerate(who) if member.lr == rate]
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
    title = f"{len(who)} networks trained at once by one vmapped step"
    axes.set(xlabel="step", ylabel="validation loss", title=title)


def draw_grid(axes: Axes, results: Results, options: Options) -> None:
    """Draw the mean test accuracy of every setting."""
    shape = options.seeds, len(options.lrs), len(options.decays)
    means = results.test.view(shape).mean(0)
    # Coloured by the error on a log scale, or beside the worst all good settings would look alike.
    errors = (1 - means).nan_to_num(nan=1.0).clamp(min=1e-3).numpy()
    norm = LogNorm(min(errors.min(), 0.3), 0.9, clip=True)
    axes.imshow(errors, cmap="YlGnBu_r", norm=norm, aspect="auto", origin="lower")
    for (row, column), error in np.ndenumerate(errors):
        text = "diverged" if means[row, column].isnan() else f"{means[row, column]:.1%}"
        color = "white" if norm(error) < 0.6 else "black"
        axes.text(column, row, text, color=color, ha="center", va="center")
    axes.set_xticks(range(shape[2]), [f"{decay:g}" for decay in options.decays])
    axes.set_yticks(range(shape[1]), [f"{rate:g}" for rate in options.lrs])
    title = f"Test accuracy, mean over {options.seeds} seeds"
    axes.set(xlabel="weight decay", ylabel="learning rate", title=title)
    axes.spines[:].set_visible(False)


# -------------------------------------------------------------------------------------- the flags


class Options(argparse.Namespace):
    """The flags, once they are known to make sense."""

    seeds: int
    lrs: list[float]
    decays: list[float]
    steps: int
    device: torch.device
    compile: bool
    compare: int
    patience: int
    output: Path


def parse_options() -> Options:
    parser = argparse.ArgumentParser(
        description=str(__doc__).partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    rates, decays = [3e-4, 3e-3, 3e-2, 3e-1], [0.0, 0.1, 1.0, 10.0]
    add = parser.add_argument
    add("--seeds", type=int, default=4, help="how many initial weights to start from")
    add("--lrs", type=float, nargs="+", default=rates, help="learning rates")
    add("--decays", type=float, nargs="+", default=decays, help="weight decays")
    add("--steps", type=int, default=400, help="minibatches to train on")
    add("--patience", type=int, default=10, help="validations without a new best until it stops")
    add("--device", type=torch.device, default="cpu", help="where to train")
    add("--compile", action="store_true", help="compile the step of all members")
    add("--compare", type=int, default=16, help="members to train alone too; at most all are")
    add("--output", type=Path, default="out/ensemble.png", help="the picture, a PNG")
    options = parser.parse_args(namespace=Options())
    for name in ("seeds", "steps", "compare", "patience"):
        least = 0 if name in ("compare", "patience") else 1
        if (value := getattr(options, name)) < least:
            parser.error(f"argument --{name}: {value} is less than {least}")
    for name in ("lrs", "decays"):
        values = sorted(set(getattr(options, name)))
        if not all(0 <= value < math.inf for value in values):
            parser.error(f"argument --{name}: must be finite and at least 0")
        setattr(options, name, values)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    return options


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)  # the networks are so small that more only wait for one another
    who, data = all_members(options), load(options)
    train_all = step_of_all(options)
    together, records = train_together(train_all, who, data, options)
    stopped = int((together.steps < options.steps).sum())
    results = evaluate(together, data, options)
    print(f"\n{stopped} of {len(who)} members stopped early, as they got no better.")
    print_results(who, results)
    draw(who, records, results, options)
    print(f"\nThe learning curves and the accuracy of every setting are in {options.output}.")
    if options.compare:
        check(who, together, data, options)
        measure(train_all, who, data, options)


if __name__ == "__main__":
    main()
