"""Train a small transformer to write like Python's documentation, character by character.

The text is what `help()` says of the language, and comes with Python. The optimizer is all that
such a run needs, one wrapper in another: the gradients of several minibatches are summed up, their
mean is clipped, matrices decay and biases, norms and embeddings do not, the learning rate warms up
and falls, and the weights are averaged. The loop around it is four lines long.

After each tenth of the run a checkpoint is written, from which a stopped run goes on. The last
tenth is trained once more from there, in new objects, and the script exits with a message unless
that gives the same weights and losses to the bit. (On several threads torch's own forward pass was
seen to round differently once in a hundred runs: OMP_NUM_THREADS=1 keeps it from that.) Then the
same training runs with torch.optim: the script prints by how much losses and weights differ, and
draws both curves and the learning rate. With --muon it trains once more, with Muon for the matrices
of the blocks, at the same learning rate, and prints both losses side by side.

    pip install "funcopt[examples]"
    python examples/char_lm.py
    python examples/char_lm.py --muon
    python examples/char_lm.py --checkpoint out/char_lm.pt  # again, after a stop, to go on
    python examples/char_lm.py --steps 6 --layers 1 --width 32 --context 32
"""

from __future__ import annotations

import argparse
import builtins
import math
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm import tqdm

import funcopt
from funcopt import interop, schedules

Params = dict[str, Tensor]
Options = argparse.Namespace  # the flags, by name

# Of weights, of a gradient, of an average; and the least of the learning rate, of its peak.
DECAY, MAX_NORM, AVERAGE, LOWEST = 0.1, 1.0, 0.98, 0.1

# Of what is written at the end. A lower temperature keeps more to what is likely.
LENGTH, TEMPERATURE = 500, 0.6

# So many first losses must be those of torch.optim, but for so much.
EARLY, ALLOWED = 5, 1e-3

# Flags that change nothing of a run.
FILES = ("checkpoint", "output", "muon")

# A run is trained in so many legs; at the end of each it is judged and saved.
LEGS = 10


# ----------------------------------------------------------------------------------- the training


class Judged(NamedTuple):
    """The validation loss after so many updates, of the weights and of their average."""

    step: int
    raw: float
    averaged: float


class Run(NamedTuple):
    """A training run at some point: all that it takes to go on from there."""

    params: Params
    state: Any
    losses: list[float]  # of each update, the mean over its minibatches
    judged: list[Judged]


def optimizer(options: Options, *, muon: bool = False) -> funcopt.Accumulate:
    lr = learning_rate(options)
    groups: dict[str, funcopt.Optimizer[Any]] = {
        "decay": funcopt.AdamW(lr=lr, weight_decay=DECAY),
        "no_decay": funcopt.AdamW(lr=lr, weight_decay=0.0),
    }
    if muon:  # whose steps are as large as AdamW's at the same learning rate
        groups["muon"] = funcopt.Muon(lr, DECAY, adjust_lr_fn="match_rms_adamw")
    in_groups = funcopt.Partition(groups, labels=label_with_muon if muon else funcopt.decay_label)
    averaging = funcopt.Ema(funcopt.Clip(in_groups, max_norm=MAX_NORM), decay=AVERAGE)
    # Outermost, so that all else happens once for each mean: when the weights really move.
    return funcopt.Accumulate(averaging, every=options.every)


def label_with_muon(name: str, leaf: Tensor) -> str:
    """Label the matrices of the blocks `"muon"`; the last layer is one more that is none."""
    last = name.startswith("read.")
    by_muon = not last and funcopt.muon_label(name, leaf) == "muon"
    return "muon" if by_muon else funcopt.decay_label(name, leaf)


def learning_rate(options: Options) -> schedules.Cosine:
    low = LOWEST * options.lr
    return schedules.Cosine(options.lr, options.steps, warmup(options), start=low, end=low)


def warmup(options: Options) -> int:
    return max(1, int(options.steps) // 16)


def train(run: Run, stop: int, data: Data, options: Options, *, muon: bool = False) -> Run:
    """Train until so many updates are made in all. What the run holds is written over."""
    opt, network = optimizer(options, muon=muon), build(data, options)
    params, state, losses = run.params, run.state, list(run.losses)

    def loss_of(params: Params, windows: Tensor) -> Tensor:
        return loss_in(partial(functional_call, network, params), windows, options)

    name = "with Muon" if muon else "funcopt"
    for starts in bar(data.starts[len(losses) : stop], name, len(losses)):
        total = 0.0
        for windows in data.windows(starts):
            grads, loss = grad_and_value(loss_of)(params, windows)
            params, state = opt.update_(grads, state, params)
            total += loss.item()
        losses.append(total / options.every)
    return run._replace(params=params, state=state, losses=losses)


def train_with_torch(data: Data, options: Options) -> tuple[list[float], Params]:
    """Train as one usually would, and return the losses of each update, and the weights."""
    network = build(data, options)
    decaying, others = (
        [p for name, p in network.named_parameters() if funcopt.decay_label(name, p) == label]
        for label in ("decay", "no_decay")
    )
    groups = [{"params": decaying, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=options.lr, fused=True)  # as funcopt does on the CPU
    start = warmup(options)
    rise = LinearLR(opt, LOWEST, total_iters=start)
    fall = CosineAnnealingLR(opt, options.steps - start, LOWEST * options.lr)
    scheduler = SequentialLR(opt, [rise, fall], [start])
    losses = []
    for starts in bar(data.starts, "torch.optim"):
        total = 0.0
        for windows in data.windows(starts):
            loss = loss_in(network, windows, options)
            (loss / options.every).backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)
        opt.step()
        opt.zero_grad()
        scheduler.step()
        losses.append(total / options.every)
    return losses, weights(network)


def loss_in(network: Callable[[Tensor], Tensor], windows: Tensor, options: Options) -> Tensor:
    """Return the mean loss in nats for each character of these windows but the first."""
    with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
        logits = network(windows[:, :-1])
    return cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


# --------------------------------------------------------------------------------------- the text


class Data(NamedTuple):
    """The text as numbers, and where in it each minibatch is."""

    characters: str  # which has which number
    training: Tensor
    validation: Tensor  # windows that nothing is trained on
    starts: Tensor  # by update, minibatch and window
    context: int

    def windows(self, starts: Tensor) -> Tensor:
        """Return the windows of the training text that start there."""
        return self.training[starts[..., None] + torch.arange(self.context + 1)]


def load(options: Options) -> Data:
    """Split the text, and draw the minibatches, the same for the same flags."""
    text = documentation()
    characters = "".join(sorted(set(text)))
    numbers = {character: number for number, character in enumerate(characters)}
    tokens = torch.tensor([numbers[character] for character in text])
    training, rest = tokens.tensor_split([len(tokens) * 9 // 10])
    windows = rest.unfold(0, options.context + 1, options.context + 1)
    starts = torch.randint(
        len(training) - options.context,
        (options.steps, options.every, options.batch_size),
        generator=torch.Generator().manual_seed(0),
    )
    return Data(characters, training, windows, starts, options.context)


def documentation() -> str:
    """Return the text of Python's language reference, each paragraph once."""
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415

        parts = [topics[name] for name in sorted(topics)]
    except ImportError:
        print("This Python comes without pydoc_data: its docstrings serve instead.")
        kinds = [kind for kind in vars(builtins).values() if isinstance(kind, type)]
        members = [member for kind in kinds for member in (kind, *vars(kind).values())]
        parts = [member.__doc__ for member in members if isinstance(member.__doc__, str)]
    # Topics quote each other. What is quoted must not be trained on and judged by as well.
    return "\n\n".join(dict.fromkeys("\n\n".join(parts).split("\n\n")))


# ------------------------------------------------------------------------------------ the network


class Block(nn.Module):
    """Attention to what came before, and a perceptron at each place."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        wide, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.think = nn.Sequential(wide, nn.GELU(), narrow)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.attend(self.norm_1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.movedim(-3, 0).transpose(-3, -2)
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed: Tensor = x + self.mix(seen.transpose(-3, -2).flatten(-2))
        thought: Tensor = self.think(self.norm_2(mixed))
        return mixed + thought


class Transformer(nn.Module):
    """From characters to the logits of the next, at each place."""

    def __init__(self, characters: int, options: Options) -> None:
        super().__init__()
        width = options.width
        self.embedding = nn.Embedding(characters, width)
        self.place_embedding = nn.Embedding(options.context, width)
        for embedding in (self.embedding, self.place_embedding):
            nn.init.normal_(embedding.weight, std=0.1)
        blocks = [Block(width, options.heads) for _ in range(options.layers)]
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.read = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.place_embedding.weight[: tokens.shape[-1]]
        logits: Tensor = self.read(self.norm(self.blocks(self.embedding(tokens) + places)))
        return logits


def build(data: Data, options: Options) -> Transformer:
    """Return a new network, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Transformer(len(data.characters), options)


def weights(network: nn.Module) -> Params:
    """Return a copy of the parameters, as plain tensors."""
    return {name: param.detach().clone() for name, param in network.named_parameters()}


# ------------------------------------------------------------------------- checkpoints and results


def train_in_legs(data: Data, options: Options, file: Path) -> Run:
    """Train from where the file has a run, or from the start, and judge and save it on the way."""
    if not file.exists():
        save(judge(new_run(data, options), data, options), options, file)
    run = resume(data, options, file)
    for leg in range(1, LEGS + 1):
        stop = options.steps * leg // LEGS
        if stop > len(run.losses):
            run = judge(train(run, stop, data, options), data, options)
            if stop == options.steps:
                check_resumed(run, train(resume(data, options, file), stop, data, options))
            save(run, options, file)
    return run


def train_with_muon(data: Data, options: Options) -> Run:
    """Train once more, with Muon, judged as often."""
    run = judge(new_run(data, options, muon=True), data, options)
    for leg in range(1, LEGS + 1):
        stop = options.steps * leg // LEGS
        if stop > len(run.losses):
            run = judge(train(run, stop, data, options, muon=True), data, options)
    return run


def new_run(data: Data, options: Options, *, muon: bool = False) -> Run:
    params = weights(build(data, options))
    return Run(params, optimizer(options, muon=muon).init(params), [], [])


def tensors(run: Run) -> Params:
    return interop.to_state_dict({"params": run.params, "state": run.state})


def save(run: Run, options: Options, file: Path) -> None:
    judged = [tuple(one) for one in run.judged]
    content = {"run": tensors(run), "losses": run.losses, "judged": judged, "flags": flags(options)}
    unfinished = file.with_name(f"{file.name}.unfinished")
    torch.save(content, unfinished)
    unfinished.replace(file)  # at once, so that there is a whole one whenever this is stopped


def resume(data: Data, options: Options, file: Path) -> Run:
    content = torch.load(file, weights_only=True)
    if content["flags"] != flags(options):
        sys.exit(f"{file} is of a run with other flags: {content['flags']}. Repeat them.")
    start = new_run(data, options)
    template = {"params": start.params, "state": start.state}
    found = interop.from_state_dict(template, content["run"])
    judged = [Judged(*one) for one in content["judged"]]
    return Run(found["params"], found["state"], content["losses"], judged)


def flags(options: Options) -> dict[str, float]:
    """Return the flags that make a run what it is."""
    return {name: value for name, value in vars(options).items() if name not in FILES}


def check_resumed(run: Run, resumed: Run) -> None:
    """Exit with a message if a run that went through a file differs by so much as a bit."""
    one, other = tensors(run), tensors(resumed)
    differ = [path for path in one if not torch.equal(one[path], other[path])]
    if run.losses != resumed.losses or differ:
        sys.exit(f"The run that was resumed is not the same: {', '.join(differ) or 'its losses'}.")
    print("Resumed from the last checkpoint, the last tenth of the run is the same to the bit: all")
    print(f"its losses, and all {len(one) - 1} tensors of parameters and state.")


def judge(run: Run, data: Data, options: Options) -> Run:
    """Add the validation loss, of the weights and of their average."""

    @torch.no_grad()
    def loss_of(params: Params) -> float:
        network = partial(functional_call, build(data, options), params)
        losses = [loss_in(network, windows, options) for windows in data.validation.split(16)]
        return torch.stack(losses).mean().item()

    losses = loss_of(run.params), loss_of(funcopt.averaged(run.state, run.params))
    return run._replace(judged=[*run.judged, Judged(len(run.losses), *losses)])


@torch.no_grad()
def written(params: Params, data: Data, options: Options, prompt: str = "The ") -> str:
    """Return what a network writes after a prompt, a character at a time."""
    network, generator = build(data, options), torch.Generator().manual_seed(0)
    tokens = [data.characters.index(character) for character in prompt]
    for _ in range(LENGTH):
        seen = torch.tensor([tokens[-options.context :]])
        logits = functional_call(network, params, (seen,))[0, -1]
        chances = (logits / TEMPERATURE).softmax(-1)
        tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
    return "".join(data.characters[token] for token in tokens)


def bar(items: Tensor, name: str, done: int = 0) -> Iterable[Tensor]:
    total = done + len(items)
    shown: Iterable[Tensor] = tqdm(
        items, name, unit="update", leave=False, initial=done, total=total
    )
    return shown


# ------------------------------------------------------------------------------------ the results


def compare(run: Run, losses: list[float], params: Params) -> None:
    """Say by how much torch.optim's run differs, and exit with a message if it is another run.

    Both compute the same, in the same order. Only the mean of the gradients does not round alike:
    funcopt divides their sum, torch.optim's loop each loss. That is the same if it is by a power of
    two, so that all bits are equal; otherwise the difference grows from rounding on.
    """
    pairs = [abs(one - other) for one, other in zip(run.losses, losses, strict=True)]
    furthest = max((params[name] - own).abs().max().item() for name, own in run.params.items())
    print("\nLargest difference from the run with torch.optim:\n")
    print(f"  losses                       {max(pairs):8.1e}")
    print(f"  weights at the end           {furthest:8.1e}")
    if max(pairs[:EARLY]) > ALLOWED:
        sys.exit(f"In the first {EARLY} updates, {ALLOWED} at most could be explained by rounding.")


def print_results(run: Run, data: Data, options: Options) -> None:
    first, last = run.judged[0], run.judged[-1]
    print("\nLoss in nats for each character of text that it was not trained on:\n")
    print(f"  at first                     {first.raw:8.3f}")
    print(f"  by how often each occurs     {by_frequency(data):8.3f}")
    print(f"  trained, the weights         {last.raw:8.3f}")
    print(f"  trained, their average       {last.averaged:8.3f}")
    print("\nWhat it writes, by the averaged weights:\n")
    print(textwrap.indent(written(funcopt.averaged(run.state, run.params), data, options), "  | "))


def print_beside(run: Run, with_muon: Run) -> None:
    print("\nLoss of the averaged weights after so many updates, with AdamW alone and with Muon:\n")
    for alone, other in zip(run.judged, with_muon.judged, strict=True):
        print(f"  {alone.step:6}  {alone.averaged:8.3f}  {other.averaged:8.3f}")


def by_frequency(data: Data) -> float:
    """Return the loss of who knows nothing but how often each character occurs."""
    counts = torch.bincount(data.training, minlength=len(data.characters)) + 1
    return -(counts / counts.sum()).log()[data.validation[:, 1:]].mean().item()


# ------------------------------------------------------------------------------------ the picture


def draw(run: Run, losses: list[float], data: Data, options: Options) -> None:
    with mpl.rc_context({"font.size": 9.5, "axes.titlesize": 11}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        draw_losses(above, run, losses, by_frequency(data))
        updates = torch.arange(options.steps)
        below.plot(updates + 1, learning_rate(options)(updates), color="black", linewidth=1.2)
        limits = {"xlim": (0, options.steps), "ylim": (0, 1.1 * options.lr)}
        below.set(xlabel="update", ylabel="learning rate", **limits)
        below.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
        figure.align_ylabels()
        figure.savefig(options.output, dpi=160)


def draw_losses(axes: Axes, run: Run, losses: list[float], frequency: float) -> None:
    updates = range(1, len(losses) + 1)
    axes.plot(updates, losses, color="0.82", linewidth=5, label="torch.optim, minibatches")
    axes.plot(updates, run.losses, color="#d55e00", linewidth=0.8, label="funcopt, minibatches")
    judged = [one.step for one in run.judged]
    for name, color, marker in (("raw", "#0072b2", "o"), ("averaged", "#009e73", "s")):
        values = [getattr(one, name) for one in run.judged]
        label = f"validation, {name} weights: {values[-1]:.3f}"
        axes.plot(judged, values, color, marker=marker, markersize=4, linewidth=1.2, label=label)
    axes.axhline(frequency, color="0.3", linewidth=0.8, linestyle=":")
    text, place = f"by how often each character occurs: {frequency:.2f}", (1, frequency)
    frame = axes.get_yaxis_transform()  # across from 0 to 1, upwards in nats
    axes.text(*place, text, transform=frame, ha="right", va="bottom")
    largest = max(abs(one - other) for one, other in zip(run.losses, losses, strict=True))
    axes.set_title(
        f"A transformer's loss, and torch.optim's: the largest difference is {largest:.2g}"
    )
    axes.set(ylim=(0, None), ylabel="loss, nats per character")
    axes.legend(frameon=False, loc="lower left", ncols=2)


# -------------------------------------------------------------------------------------- the flags


def parse_options() -> Options:
    parser = argparse.ArgumentParser(
        description=str(__doc__).partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=600, help="updates to make")
    add("--every", type=int, default=2, help="minibatches for one update")
    add("--batch-size", type=int, default=16, help="windows of text in a minibatch")
    add_flags_of_the_network(parser)
    add("--bf16", action="store_true", help="compute losses and gradients by autocast to bfloat16")
    add("--muon", action="store_true", help="train once more with Muon, and print both losses")
    add("--checkpoint", type=Path, help="a file to go on from if it exists, and to write to")
    add("--output", type=Path, default="out/char_lm.png", help="the picture, a PNG")
    options = parser.parse_args()
    check_flags(
        parser, options, {"steps": 2, "every": 1, "batch_size": 1, "context": 1, "layers": 1}
    )
    for file in (options.output, options.checkpoint):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    return options


def add_flags_of_the_network(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--context", type=int, default=128, help="characters in a window")
    add("--width", type=int, default=96, help="numbers for each character")
    add("--layers", type=int, default=3, help="blocks of the transformer")
    add("--heads", type=int, default=4, help="heads of attention in each")
    add("--lr", type=float, default=3e-3, help="the learning rate at its peak")


def check_flags(
    parser: argparse.ArgumentParser, options: argparse.Namespace, leasts: dict[str, int]
) -> None:
    """Exit with a message if a flag is out of range."""
    for name, least in leasts.items():
        if (value := getattr(options, name)) < least:
            parser.error(f"argument --{name.replace('_', '-')}: {value} is less than {least}")
    if min(options.width, options.heads) < 1 or options.width % options.heads:
        parser.error(f"argument --width: {options.width} is no multiple of {options.heads} heads")
    if not 0 < options.lr < math.inf:
        parser.error(f"argument --lr: {options.lr} is not a finite number above 0")
    if options.output.suffix.lower() != ".png":
        parser.error(f"argument --output: {options.output} does not end in .png")


def main() -> None:
    options = parse_options()
    data = load(options)
    with tempfile.TemporaryDirectory() as directory:
        file = options.checkpoint or Path(directory) / "char_lm.pt"
        run = train_in_legs(data, options, file)
    losses, params = train_with_torch(data, options)
    compare(run, losses, params)
    print_results(run, data, options)
    draw(run, losses, data, options)
    if options.muon:
        print_beside(run, train_with_muon(data, options))
    print(f"\nThe losses and the learning rate are in {options.output}.")


if __name__ == "__main__":
    main()
