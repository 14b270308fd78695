"""Move a training run from torch.optim to funcopt and back again, without a trace.

A small network learns to read handwritten digits. A third of the way, the checkpoint that
torch.optim wrote is taken over by funcopt; after another third it is handed back. Each time the run
goes through a file, and on in new objects, as it would in another process. Beside it runs the same
training with torch.optim alone, and the script exits with a message unless every loss, weight and
moment is the same to the bit. It draws both loss curves, and their difference.

    pip install "funcopt[examples]"
    python examples/migrate.py
    python examples/migrate.py --steps 12
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import funcopt
from funcopt import interop

BATCH = 64


# ----------------------------------------------------------------------------------- the training


class Images(NamedTuple):
    """Pictures of digits, a row of 64 pixels each, and the digits they show."""

    pixels: Tensor
    digits: Tensor


def train_with_torch(
    network: nn.Module, opt: torch.optim.Optimizer, batches: Iterable[Images]
) -> list[float]:
    """Train as one usually would, and return the losses."""
    losses = []
    for images in batches:
        opt.zero_grad()
        loss = cross_entropy(network(images.pixels), images.digits)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def train_with_funcopt(
    network: nn.Module,
    opt: funcopt.AdamW,
    state: funcopt.AdamWState,
    params: dict[str, Tensor],
    batches: Iterable[Images],
) -> tuple[dict[str, Tensor], funcopt.AdamWState, list[float]]:
    """Train as a pure function, and return the parameters, the state and the losses."""

    def loss_of(params: dict[str, Tensor], images: Images) -> Tensor:
        return cross_entropy(functional_call(network, params, (images.pixels,)), images.digits)

    losses = []
    for images in batches:
        grads, loss = grad_and_value(loss_of)(params, images)
        params, state = opt.update(grads, state, params)
        losses.append(loss.item())
    return params, state, losses


def new_run() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a new network, always the same, and what trains it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    # By its names, so that a checkpoint says which moments belong to which parameter.
    return network, torch.optim.AdamW(network.named_parameters(), lr=3e-3, weight_decay=0.1)


# ---------------------------------------------------------------------------------- the migration


class Trained(NamedTuple):
    """What training leaves."""

    losses: list[float]  # for each step
    checkpoint: dict[str, Any]  # the network's state dict, and the optimizer's


def train_unbroken(thirds: list[list[Images]]) -> Trained:
    network, opt = new_run()
    losses = [loss for third in thirds for loss in train_with_torch(network, opt, bar(third))]
    return Trained(losses, {"network": network.state_dict(), "optimizer": opt.state_dict()})


def train_migrating(thirds: list[list[Images]], file: Path) -> Trained:
    first, second, third = thirds

    network, theirs = new_run()
    losses = train_with_torch(network, theirs, bar(first))
    torch.save({"network": network.state_dict(), "optimizer": theirs.state_dict()}, file)

    # Here funcopt takes over, from nothing but the file.
    network, _ = new_run()
    found = torch.load(file, weights_only=True)
    params = found["network"]
    opt, state = interop.from_torch(found["optimizer"], params)
    params, state, more = train_with_funcopt(network, opt, state, params, bar(second))
    losses += more
    torch.save({"network": params, "optimizer": interop.to_torch(opt, state, params)}, file)

    # And here torch.optim does again.
    network, theirs = new_run()
    found = torch.load(file, weights_only=True)
    network.load_state_dict(found["network"])
    theirs.load_state_dict(found["optimizer"])
    losses += train_with_torch(network, theirs, bar(third))
    return Trained(losses, {"network": network.state_dict(), "optimizer": theirs.state_dict()})


def load(steps: int) -> list[list[Images]]:
    """Return the minibatches of each third, in a random order that is always the same."""
    digits = load_digits()
    pixels = torch.tensor(digits.data / 16, dtype=torch.float32)
    truth = torch.tensor(digits.target, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randint(len(truth), (BATCH,), generator=generator) for _ in range(steps)]
    batches = [Images(pixels[which], truth[which]) for which in chosen]
    first, second = handovers(steps)
    return [batches[:first], batches[first:second], batches[second:]]


def handovers(steps: int) -> tuple[int, int]:
    return steps // 3, 2 * steps // 3


def bar(batches: list[Images]) -> Iterable[Images]:
    shown: Iterable[Images] = tqdm(batches, unit="step", leave=False)
    return shown


# ------------------------------------------------------------------------------------ the results


def check(unbroken: Trained, migrated: Trained) -> None:
    """Exit with a message if anything differs by so much as a bit."""
    for step, (one, other) in enumerate(zip(unbroken.losses, migrated.losses, strict=True), 1):
        if one != other:
            sys.exit(f"The loss at step {step} is {other!r} after migrating, and {one!r} without.")
    final, others = dict(tensors(unbroken.checkpoint)), dict(tensors(migrated.checkpoint))
    for path, tensor in final.items():
        if not torch.equal(tensor, others[path]):
            largest = (tensor - others[path]).abs().max().item()
            sys.exit(f"{path} differs by up to {largest:.1e} after migrating.")
    print(f"All {len(unbroken.losses)} losses are the same to the bit, and so are all {len(final)}")
    print("tensors of the final checkpoint: weights, moments and step counts.")


def tensors(tree: Any, path: str = "") -> Iterable[tuple[str, Tensor]]:
    """Yield the tensors in a nest of dicts, by path."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from tensors(value, f"{path}[{key!r}]")


# ------------------------------------------------------------------------------------ the picture


def draw(unbroken: Trained, migrated: Trained, output: Path) -> None:
    with mpl.rc_context({"font.size": 9.5, "axes.titlesize": 11}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        draw_losses(above, unbroken, migrated)
        draw_difference(below, unbroken, migrated)
        figure.align_ylabels()
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=160)


def draw_losses(axes: Axes, unbroken: Trained, migrated: Trained) -> None:
    steps = range(1, len(unbroken.losses) + 1)
    axes.plot(steps, unbroken.losses, color="0.82", linewidth=5, label="torch.optim, unbroken")
    stretches = [
        ("torch.optim", "#0072b2"),
        ("funcopt", "#d55e00"),
        ("torch.optim again", "#009e73"),
    ]
    edges = (0, *handovers(len(steps)), len(steps))
    for (name, color), start, stop in zip(stretches, edges, edges[1:], strict=False):
        # A stretch begins where the last one ended, so that the line has no gap.
        part = slice(max(start - 1, 0), stop)
        axes.plot(steps[part], migrated.losses[part], color=color, linewidth=1.2, label=name)
    for step, text in zip(edges[1:3], ("taken over", "handed back"), strict=True):
        axes.axvline(step, color="0.3", linewidth=0.8, linestyle=":")
        axes.annotate(
            text,
            (step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -4),
            textcoords="offset points",
            va="top",
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("minibatch loss")
    axes.set_title("A run that moves to funcopt and back, over one that never does")
    axes.legend(frameon=False, loc="lower left")


def draw_difference(axes: Axes, unbroken: Trained, migrated: Trained) -> None:
    pairs = zip(unbroken.losses, migrated.losses, strict=True)
    differences = [other - one for one, other in pairs]
    largest = max(map(abs, differences))
    axes.plot(range(1, len(differences) + 1), differences, color="black", linewidth=1.2)
    for step in handovers(len(differences)):
        axes.axvline(step, color="0.3", linewidth=0.8, linestyle=":")
    axes.annotate(
        f"largest difference: {largest}",
        (1, 1),
        xycoords="axes fraction",
        ha="right",
        va="top",
    )
    axes.set_ylim(-1e-7, 1e-7)  # a rounding of a loss of 1
    axes.set_yticks([-1e-7, 0, 1e-7], ["-1e-7", "0", "1e-7"])
    axes.set_xlim(0, len(differences))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("step")
    axes.set_ylabel("difference")


# -------------------------------------------------------------------------------------- the flags


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=str(__doc__).partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=300, help="minibatches to train on")
    parser.add_argument("--output", type=Path, default="out/migrate.png", help="the picture, a PNG")
    options = parser.parse_args()
    if options.steps < 3:
        parser.error(f"argument --steps: {options.steps} is less than 3, one for each stretch")
    if options.output.suffix.lower() != ".png":
        parser.error(f"argument --output: {options.output} does not end in .png")
    return options


def main() -> None:
    options = parse_options()
    # On several threads the same forward pass of torch rounds differently once in a hundred runs.
    torch.set_num_threads(1)
    thirds = load(options.steps)
    unbroken = train_unbroken(thirds)
    with tempfile.TemporaryDirectory() as directory:
        migrated = train_migrating(thirds, Path(directory) / "checkpoint.pt")
    check(unbroken, migrated)
    draw(unbroken, migrated, options.output)
    print(f"Both loss curves are in {options.output}.")


if __name__ == "__main__":
    main()
