"""Train in bfloat16, in seven ways, and see which of them learn what float32 does.

A bfloat16 number has 8 binary digits. Where parameters are kept in it, a step of less than half a
unit in the last place is rounded away, and so is what changes a second moment by less than a part
in 512. The small transformer of `char_lm.py` is trained with AdamW in float32, and in bfloat16:

- parameters and moments rounded to the nearest number, as by `torch.optim.AdamW(fused=True)`:
  `AdamW(moments=None)`;
- the same with moments in float32, as they are unless told otherwise: `AdamW()`;
- rounded by chance, up or down so that the mean is right: `AdamW(rounding="stochastic")`, with
  moments in either dtype;
- with what rounding lost kept beside the parameters: `Compensated(AdamW())`, with moments in
  either dtype (those in bfloat16 rounded by chance);
- with copies of the parameters in float32: `MasterWeights(AdamW())`.

All start at the same weights and see the same minibatches. Those in bfloat16 start at the weights
rounded to it, and have forward and backward pass in it, so that only their optimizers differ. Each
is judged by its parameters as they would be shipped, without what the state holds beside them. That
takes place in float32, which has every bfloat16 number: the losses are to tell apart what was
learned, and not how it is evaluated.

It prints how many bytes a parameter takes with the optimizer's state, but without its gradient,
and by how much the loss on other text is above that of float32 at the same step. `--seed` repeats
it all with other weights and minibatches.

    pip install "funcopt[examples]"
    python examples/sixteen_bits.py
    python examples/sixteen_bits.py --steps 6 --layers 1 --width 32 --context 32
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import char_lm
import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.func import functional_call, grad_and_value
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import funcopt

Params = dict[str, Tensor]

# A run is judged so many times, evenly over its steps.
TIMES = 10

# So many nats from float32 is near, for the picture.
CLOSE = 0.01

REFERENCE = "float32"

# Of the curve of each way.
STYLES: dict[str, dict[str, Any]] = {
    REFERENCE: {"color": "0.82", "linewidth": 5},
    "nearest": {"color": "#d55e00"},
    "nearest, moments in float32": {"color": "#e69f00"},
    "by chance": {"color": "#56b4e9", "linestyle": "--"},
    "by chance, moments in float32": {"color": "#0072b2"},
    "compensated, moments by chance": {"color": "#009e73", "linestyle": "--"},
    "compensated, moments in float32": {"color": "#009e73"},
    "master weights": {"color": "#cc79a7"},
}

# Bytes of a parameter and of its state in other libraries, none of which is run here.
OTHERS = {
    # Two moments like the parameter, by `torch.zeros_like`, in torch/optim/adam.py.
    "torch.optim.AdamW, float32": 4 + 4 + 4,
    "torch.optim.AdamW, bfloat16": 2 + 2 + 2,
    # Its docs/kahan_summation.md, less the gradients there: weight, two moments, compensation.
    "optimi, bfloat16 with kahan_sum": 2 + 2 + 2 + 2,
    # `_AdamW(bf16_stochastic_round=True)` in torchao/optim/adam.py: moments like the parameter.
    "torchao, bfloat16 by chance": 2 + 2 + 2,
    # `AdamW8bit`: for each moment a byte, and a float32 scale for each block of 256.
    "torchao, 8-bit moments": 2 + 2 * (1 + 4 / 256),
    # The abstract of arXiv:2602.23349: 7 bytes, or 5 once a gradient of 2 bytes is released.
    "FlashOptim, 8-bit moments": 5,
}


# ---------------------------------------------------------------------------------------- the ways


def all_ways(options: char_lm.Options) -> dict[str, funcopt.Optimizer[Any]]:
    """Return the optimizer of each way."""
    adamw = partial(funcopt.AdamW, lr=char_lm.learning_rate(options), weight_decay=char_lm.DECAY)
    by_chance = partial(adamw, rounding="stochastic", seed=options.seed)
    narrow = torch.bfloat16  # which must be said where the inner optimizer is given float32
    opts: list[funcopt.Optimizer[Any]] = [
        adamw(),
        adamw(moments=None),
        adamw(),
        by_chance(moments=None),
        by_chance(),
        funcopt.Compensated(by_chance(moments=narrow)),
        funcopt.Compensated(adamw()),
        funcopt.MasterWeights(adamw()),
    ]
    return dict(zip(STYLES, opts, strict=True))


# ------------------------------------------------------------------------------------ the training


class Run(NamedTuple):
    """What came of one way."""

    size: float  # bytes a parameter takes, and its state
    steps: list[int]  # after which it was judged
    losses: list[float]  # on text that it was not trained on


def train(name: str, start: Params, data: char_lm.Data, options: char_lm.Options) -> Run:
    """Train in one way, from these weights."""
    opt = all_ways(options)[name]
    dtype = torch.float32 if name == REFERENCE else torch.bfloat16
    network = char_lm.build(data, options)  # for its structure: the weights are always handed in
    params = {path: weight.to(dtype, copy=True) for path, weight in start.items()}
    state = opt.init(params)

    def loss_of(params: Params, windows: Tensor) -> Tensor:
        return char_lm.loss_in(partial(functional_call, network, params), windows, options)

    judged = {0, *(options.steps * time // TIMES for time in range(1, TIMES + 1))}
    losses = {0: judge(params, data, options)}
    for step, starts in enumerate(tqdm(data.starts, name, unit="step", leave=False), 1):
        grads, _ = grad_and_value(loss_of)(params, data.windows(starts[0]))
        params, state = opt.update_(grads, state, params)
        if step in judged:
            losses[step] = judge(params, data, options)
    held, elements = tree_leaves((params, state)), sum(map(torch.numel, start.values()))
    return Run(sum(leaf.nbytes for leaf in held) / elements, [*losses], [*losses.values()])


@torch.no_grad()
def judge(params: Params, data: char_lm.Data, options: char_lm.Options) -> float:
    """Return the validation loss of the parameters, computed in float32."""
    wide = {path: weight.float() for path, weight in params.items()}
    network = partial(functional_call, char_lm.build(data, options), wide)
    parts = torch.tensor_split(data.validation, 8)
    losses = [char_lm.loss_in(network, windows, options) * len(windows) for windows in parts]
    return torch.stack(losses).sum().item() / len(data.validation)


def load(options: char_lm.Options) -> tuple[char_lm.Data, Params]:
    """Return the data and the weights to start from, the same for the same seed."""
    data = char_lm.load(options)
    generator = torch.Generator().manual_seed(options.seed)
    most = len(data.training) - options.context
    starts = torch.randint(most, data.starts.shape, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        network = char_lm.Transformer(len(data.characters), options)
    return data._replace(starts=starts), char_lm.weights(network)


# ------------------------------------------------------------------------------------- the results


def gaps(runs: dict[str, Run], name: str) -> list[float]:
    """Return by how much the loss of a way is above that of float32, at each step."""
    pairs = zip(runs[name].losses, runs[REFERENCE].losses, strict=True)
    return [one - other for one, other in pairs]


def print_results(runs: dict[str, Run]) -> None:
    print(
        "\nBytes a parameter and its state take, without its gradient; the loss in nats a character"
    )
    print(
        f"after {runs[REFERENCE].steps[-1]} steps; how far above float32 that is, and the furthest"
    )
    print("from float32 at any step at which they were judged:\n")
    print(f"  {'way':34}{'bytes':>7}{'loss':>10}{'above':>10}{'furthest':>10}")
    for name, run in runs.items():
        line = f"  {name:34}{run.size:7.2f}{run.losses[-1]:10.4f}"
        if name != REFERENCE:
            above = gaps(runs, name)
            line += f"{above[-1]:+10.4f}{max(above, key=abs):+10.4f}"
        print(line)
    print("\nBytes that other libraries take for the same, by their code and papers:\n")
    for name, size in OTHERS.items():
        print(f"  {name:34}{size:7.2f}")


def check(runs: dict[str, Run]) -> None:
    """Exit with a message if a way learned nothing."""
    for name, run in runs.items():
        if not run.losses[-1] < run.losses[0]:
            sys.exit(f"{name}: the loss went from {run.losses[0]:.4f} to {run.losses[-1]:.4f}.")


# ------------------------------------------------------------------------------------- the picture


def draw(runs: dict[str, Run], output: Path) -> None:
    with mpl.rc_context({"font.size": 9.5, "axes.titlesize": 11, "lines.linewidth": 1.3}):
        figure = Figure(figsize=(10, 5), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
        draw_losses(left, runs)
        draw_gaps(right, runs)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.set(xlabel="step", xlim=(0, runs[REFERENCE].steps[-1]))
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(output, dpi=130)


def draw_losses(axes: Axes, runs: dict[str, Run]) -> None:
    for name, run in runs.items():
        gap = "" if name == REFERENCE else f" ({gaps(runs, name)[-1]:+.4f})"
        label = f"{name}: {run.size:.0f} bytes, {run.losses[-1]:.3f}{gap}"
        axes.plot(run.steps, run.losses, label=label, **STYLES[name])
    axes.set(ylabel="validation loss, nats a character", title="The loss, on other text")


def draw_gaps(axes: Axes, runs: dict[str, Run]) -> None:
    axes.axhspan(-CLOSE, CLOSE, color="0.92", linewidth=0)
    axes.axhline(0, color="0.3", linewidth=0.8, linestyle=":")
    for name, run in runs.items():
        if name != REFERENCE:
            axes.plot(run.steps, gaps(runs, name), **STYLES[name])
    axes.set(ylabel="nats above float32", title=f"The gap to float32, and ±{CLOSE} nats (grey)")


# --------------------------------------------------------------------------------------- the flags


def parse_options() -> char_lm.Options:
    parser = argparse.ArgumentParser(
        description=str(__doc__).partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=500, help="updates to make, in each way")
    add("--batch-size", type=int, default=16, help="windows of text in a minibatch")
    char_lm.add_flags_of_the_network(parser)
    parser.set_defaults(context=64, width=64, layers=2)
    add("--seed", type=int, default=0, help="of the weights, the minibatches and the rounding")
    add("--output", type=Path, default="out/sixteen_bits.png", help="the picture, a PNG")
    options = parser.parse_args()
    leasts = {"steps": 2, "batch_size": 1, "context": 1, "layers": 1, "seed": 0}
    char_lm.check_flags(parser, options, leasts)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.every, options.bf16 = 1, False  # no autocast: all is in the dtype of the weights
    return options


def main() -> None:
    options = parse_options()
    data, start = load(options)
    runs = {name: train(name, start, data, options) for name in STYLES}
    print_results(runs)
    check(runs)
    draw(runs, options.output)
    print(f"\nThe losses and the gaps are in {options.output}.")


if __name__ == "__main__":
    main()
