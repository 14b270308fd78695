"""Share a training run out among processes in three ways: the losses stay, the memory does not.

The transformer of `char_lm.py` is trained by several processes, each on minibatches of its own,
by AdamW with clipping by the norm of the mean gradient:

- replicated: every process has everything, and all average their gradients;
- with `Zero1`: every process has all parameters, and its share of the optimizer's state;
- with FSDP2: it has its share of everything, DTensors, which funcopt takes as they are.

The loop is the same function for all three. Halfway the run with Zero1 is saved, and goes on from
the file in two other layouts: under FSDP2, and in one process that has it whole. The script exits
with a message unless all losses are the replicated run's, but for rounding. It prints and draws
how many bytes each process holds and sends.

    pip install "funcopt[examples]"
    torchrun --standalone --nproc-per-node 2 examples/zero1.py
    python examples/zero1.py  # starts two processes by itself
    python examples/zero1.py --steps 6 --layers 1 --width 32 --context 32
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import char_lm
import matplotlib as mpl
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.func import functional_call, grad_and_value
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import funcopt
from funcopt import interop
from funcopt.distributed import Zero1, gather_state

Params = dict[str, Tensor]

# The most by which a loss may differ in another layout: training magnifies rounding.
ALLOWED = 1e-3

# By each collective, how many times a process sends all but its share of the whole: once to sum
# up to shares, once to put shares together, and twice to do both. A backend may send more.
SENDS = {
    "all_reduce": 2,
    "all_to_all_single": 1,
    "all_gather": 1,
    "all_gather_single": 1,
    "all_gather_into_tensor": 1,  # the older names of what is above and below
    "reduce_scatter_single": 1,
    "reduce_scatter_tensor": 1,
}

IN_FSDP2, IN_ONE = "Zero1, resumed in FSDP2", "Zero1, resumed in one process"
STYLES: dict[str, dict[str, Any]] = {
    "replicated": {"color": "0.82", "linewidth": 5},
    "Zero1": {"color": "#d55e00", "linewidth": 2.4},
    "FSDP2": {"color": "#56b4e9", "linewidth": 1.2},
    IN_FSDP2: {"color": "#009e73", "linewidth": 1.2, "linestyle": "--"},
    IN_ONE: {"color": "black", "linewidth": 1.2, "linestyle": ":"},
}
SHADES = {"parameters": "#56b4e9", "gradients": "#b3dcf5", "state": "#e69f00"}


# -------------------------------------------------------------------------------------- the layouts


class Layout(NamedTuple):
    """How a run is shared out: the optimizer, the parameters, and where gradients come from."""

    opt: funcopt.Optimizer[Any]
    params: Params
    # Of the parameters and this process's windows: the gradients that `opt` takes, and the loss.
    gradients: Callable[[Params, Tensor], tuple[Params, Tensor]]


def in_one_process(data: char_lm.Data, options: char_lm.Options) -> Layout:
    network = char_lm.build(data, options)
    adamw = funcopt.AdamW(lr=char_lm.learning_rate(options), weight_decay=char_lm.DECAY)

    def loss_of(params: Params, windows: Tensor) -> Tensor:
        return char_lm.loss_in(partial(functional_call, network, params), windows, options)

    opt = funcopt.Clip(adamw, max_norm=char_lm.MAX_NORM)
    return Layout(opt, char_lm.weights(network), grad_and_value(loss_of))


def replicated(data: char_lm.Data, options: char_lm.Options, mesh: DeviceMesh) -> Layout:
    alone = in_one_process(data, options)

    def gradients(params: Params, windows: Tensor) -> tuple[Params, Tensor]:
        grads, loss = alone.gradients(params, windows)
        flat = torch.cat([grad.flatten() for grad in grads.values()])
        dist.all_reduce(flat)
        parts = (flat / mesh.size()).split([grad.numel() for grad in grads.values()])
        return {n: part.view_as(grads[n]) for n, part in zip(grads, parts, strict=True)}, loss

    return alone._replace(gradients=gradients)


def zero1(data: char_lm.Data, options: char_lm.Options, mesh: DeviceMesh) -> Layout:
    alone = in_one_process(data, options)
    return alone._replace(opt=Zero1(alone.opt, mesh))  # which averages the gradients itself


def fsdp2(data: char_lm.Data, options: char_lm.Options, mesh: DeviceMesh) -> Layout:
    network = char_lm.build(data, options)
    # A linear layer returns a view, of which FSDP2 warns: it must not be written in place.
    network.register_forward_hook(lambda _, __, logits: logits.clone())
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)

    def gradients(params: Params, windows: Tensor) -> tuple[Params, Tensor]:
        loss = char_lm.loss_in(network, windows, options)
        loss.backward()
        grads: dict[str, Any] = {name: param.grad for name, param in params.items()}
        network.zero_grad()
        return grads, loss.detach()

    opt = in_one_process(data, options).opt
    return Layout(opt, dict(network.named_parameters()), gradients)


LAYOUTS = {"replicated": replicated, "Zero1": zero1, "FSDP2": fsdp2}


# ------------------------------------------------------------------------------------- the training


class Run(NamedTuple):
    """A run at some point, and what its last update took. What it holds is written over.

    Not counted as held is what there is only for a while, as the parameters that FSDP2 gathers.
    """

    params: Params
    state: Any
    losses: list[float]  # of each update since its start, the mean over all processes
    held: dict[str, int]  # how many bytes this process holds, of what
    sent: list[int]  # how many bytes it sends, by each collective


def train(layout: Layout, run: Run, batches: Iterable[Tensor]) -> Run:
    """Make an update for each minibatch, of which there must be one."""
    params, state, losses = run.params, run.state, []
    grads: Params = {}
    sent: list[int] = []
    for windows in batches:
        with counting() as counted:
            grads, loss = layout.gradients(params, windows)
            params, state = layout.opt.update_(grads, state, params)
        losses.append(loss)
        sent = counted
    means = torch.stack(losses)
    dist.all_reduce(means)
    trees = {"parameters": params, "gradients": grads, "state": state}
    held = {name: nbytes(tree) for name, tree in trees.items()}
    return Run(params, state, run.losses + (means / dist.get_world_size()).tolist(), held, sent)


def start(layout: Layout) -> Run:
    return Run(layout.params, layout.opt.init(layout.params), [], {}, [])


def nbytes(tree: Any) -> int:
    """Return the bytes of a tree's tensors; of a DTensor those of its part in this process."""
    leaves = tree_leaves(tree)
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in leaves)


@contextmanager
def counting() -> Generator[list[int], None, None]:
    """Collect the bytes that this process sends, collective by collective.

    All that is used here, FSDP2 too, calls the functions of `torch.distributed`, which are wrapped
    meanwhile. The whole of what is shared out or put together is the largest that they are given.
    """
    sent: list[int] = []

    def counted(times: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values()]
            tensors = [[t for t in tree_leaves(one) if isinstance(t, Tensor)] for one in given]
            size = dist.get_world_size()
            sent.append(times * max(map(nbytes, tensors)) * (size - 1) // size)
            return function(*args, **kwargs)

        return call

    functions: dict[str, Any] = {
        name: counted(times, getattr(dist, name))
        for name, times in SENDS.items()
        if hasattr(dist, name)
    }
    with patch.multiple(dist, **functions):
        yield sent


def minibatches(
    data: char_lm.Data, updates: range, name: str, *, of_all: bool = False
) -> Iterator[Tensor]:
    """Yield for each update this process's windows, or those of all; the same for all layouts."""
    rank = dist.get_rank()
    for update in tqdm(updates, name, unit="update", leave=False, disable=rank > 0):
        starts = data.starts[update]
        yield data.windows(starts.flatten() if of_all else starts[rank])


# ----------------------------------------------------------------------------------- the checkpoint


def save(run: Run, directory: Path) -> None:
    """Let each process write the shares that it has."""
    entries = interop.to_state_dict({"params": run.params, "state": run.state})
    # torch does not export `save` and `load` by the rules of type checkers.
    dcp.save(entries, checkpoint_id=directory)  # type: ignore[attr-defined]


def load_whole(directory: Path, layout: Layout, mesh: DeviceMesh | None) -> dict[str, Any]:
    """Return parameters and state from a run with `Zero1`, as if there had been no `Zero1`.

    Args:
        directory: Where it was saved, by however many processes.
        layout: One of plain tensors and of the optimizer that was within the `Zero1`.
        mesh: The processes that load it together; None for this process alone.
    """
    opt = Zero1(layout.opt, mesh)
    template = {"params": layout.params, "state": opt.init(layout.params)}
    entries = interop.to_state_dict(template)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as no_dist says
        dcp.load(entries, checkpoint_id=directory, no_dist=mesh is None)  # type: ignore[attr-defined]
    found: dict[str, Any] = interop.from_state_dict(template, entries)
    return found | {"state": gather_state(opt, found["state"], found["params"])}


def shared_out(whole: dict[str, Any], layout: Layout, mesh: DeviceMesh) -> dict[str, Any]:
    """Return parameters and state that lie as those of a layout do, the parameters in its memory.

    The paths are the same in every layout: only how each leaf lies is not.
    """
    entries = interop.to_state_dict(whole)
    template = {"params": layout.params, "state": layout.opt.init(layout.params)}
    for path, leaf in interop.to_state_dict(template).items():
        if isinstance(leaf, DTensor):
            entries[path] = distribute_tensor(entries[path], mesh, leaf.placements)
    found = interop.from_state_dict(template, entries)
    with torch.no_grad():
        for name, param in layout.params.items():
            param.copy_(found["params"][name])
    return found | {"params": layout.params}


# ------------------------------------------------------------------------------------- the results


class Results(NamedTuple):
    """What came of it all."""

    runs: dict[str, Run]
    losses: dict[str, list[float]]  # of these, and of what was resumed from `done` updates on
    done: int

    def differences(self, name: str) -> list[float]:
        pairs = zip(self.losses[name], self.losses["replicated"], strict=True)
        return [one - other for one, other in pairs]

    def largest(self, name: str) -> float:
        return max(map(abs, self.differences(name)))


def train_all(data: char_lm.Data, options: char_lm.Options, mesh: DeviceMesh) -> Results:
    done = options.steps // 2
    rest = range(done, options.steps)
    runs = {}
    with shared_directory() as directory:
        for name, lay_out in LAYOUTS.items():
            layout = lay_out(data, options, mesh)
            run = train(layout, start(layout), minibatches(data, range(done), name))
            if name == "Zero1":
                save(run, directory)
            runs[name] = train(layout, run, minibatches(data, rest, name))
        losses = {name: run.losses for name, run in runs.items()}
        before = losses["Zero1"][:done]

        layout, alone = fsdp2(data, options, mesh), in_one_process(data, options)
        found = shared_out(load_whole(directory, alone, mesh), layout, mesh)
        run = Run(**found, losses=before, held={}, sent=[])
        losses[IN_FSDP2] = train(layout, run, minibatches(data, rest, IN_FSDP2)).losses

        # As each of these processes could do by itself.
        run = Run(**load_whole(directory, alone, mesh=None), losses=before, held={}, sent=[])
        batches = minibatches(data, rest, IN_ONE, of_all=True)
        losses[IN_ONE] = train(alone, run, batches).losses
    return Results(runs, losses, done)


@contextmanager
def shared_directory() -> Generator[Path, None, None]:
    """Make a directory that all processes know, of one machine or of a shared disk."""
    with tempfile.TemporaryDirectory() as own:
        names = [own]
        dist.broadcast_object_list(names, src=0)
        yield Path(names[0])
        dist.barrier()


def check(results: Results) -> None:
    """Exit with a message if any run is another one than the replicated."""
    for name in results.losses:
        if not (largest := results.largest(name)) <= ALLOWED:
            sys.exit(f"{name}: losses differ by up to {largest:.1e}, which is more than rounding.")


def print_results(results: Results) -> None:
    print(f"Each of {dist.get_world_size()} processes holds, and sends in an update, in kB:\n")
    heads = [*SHADES, "in all", "sent", "collectives"]
    print(f"  {'':10}" + "".join(f"{head:>12}" for head in heads))
    for name, run in results.runs.items():
        numbers = [*run.held.values(), sum(run.held.values()), sum(run.sent)]
        columns = [*(f"{number / 1e3:.0f}" for number in numbers), str(len(run.sent))]
        print(f"  {name:10}" + "".join(f"{column:>12}" for column in columns))
    print("\nLargest difference from the losses of the replicated run:\n")
    for name in results.losses:
        if name != "replicated":
            print(f"  {name:32}{results.largest(name):8.1e}")
    first, *_, last = results.losses["replicated"]
    print(f"\nThat one's fall from {first:.3f} to {last:.3f} nats for each character.")


# ------------------------------------------------------------------------------------- the picture


def draw(results: Results, output: Path) -> None:
    with mpl.rc_context({"font.size": 9.5, "axes.titlesize": 11}):
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        parts = figure.subplot_mosaic(
            [["losses", "held", "sent"], ["differences", "held", "sent"]],
            width_ratios=(2.2, 1, 1),
            height_ratios=(3, 1),
        )
        draw_losses(parts["losses"], parts["differences"], results)
        draw_held(parts["held"], results)
        draw_sent(parts["sent"], results)
        for axes in parts.values():
            axes.spines[["top", "right"]].set_visible(False)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=130)


def draw_losses(above: Axes, below: Axes, results: Results) -> None:
    for name, losses in results.losses.items():
        first = 0 if name in results.runs else results.done
        updates = range(first + 1, len(losses) + 1)
        above.plot(updates, losses[first:], label=name, **STYLES[name])
        if name != "replicated":
            below.plot(updates, results.differences(name)[first:], **STYLES[name])
    for axes, lowest in ((above, 0.4), (below, 0)):  # the legend is below it
        axes.axvline(results.done + 0.5, lowest, color="0.3", linewidth=0.8, linestyle=":")
        axes.set_xlim(0, None)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    above.set(ylabel="loss, nats per character", ylim=(0, None))
    above.set_title("The loss, and by how much it differs from the replicated run's")
    above.legend(frameon=False, loc="lower left", ncols=2)
    below.set(xlabel="update", ylabel="difference")


def draw_held(axes: Axes, results: Results) -> None:
    bottoms = dict.fromkeys(results.runs, 0.0)
    for what, color in SHADES.items():
        sizes = [run.held[what] / 1e6 for run in results.runs.values()]
        bars = axes.bar([*bottoms], sizes, 0.7, [*bottoms.values()], color=color, label=what)
        axes.bar_label(bars, fmt="%.2f", label_type="center")
        for name, size in zip(bottoms, sizes, strict=True):
            bottoms[name] += size
    axes.legend(frameon=False, loc="upper right", reverse=True)
    axes.set(ylabel="MB", title="Each process holds")


def draw_sent(axes: Axes, results: Results) -> None:
    sizes = [sum(run.sent) / 1e6 for run in results.runs.values()]
    axes.bar_label(axes.bar([*results.runs], sizes, 0.7, color="#009e73"), fmt="%.2f")
    axes.set(ylabel="MB per update", title="Each process sends")


# --------------------------------------------------------------------------------------- the flags


def parse_options() -> char_lm.Options:
    parser = argparse.ArgumentParser(
        description=str(__doc__).partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=200, help="updates to make")
    add("--batch-size", type=int, default=16, help="windows of text for each process")
    char_lm.add_flags_of_the_network(parser)
    add("--output", type=Path, default="out/zero1.png", help="the picture, a PNG")
    options = parser.parse_args()
    char_lm.check_flags(parser, options, {"steps": 2, "batch_size": 1, "context": 1, "layers": 1})
    options.bf16 = False
    return options


def start_processes() -> int:
    """Start this script again, in two processes, as one would by torchrun."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONWARNINGS"] = ",".join(sys.warnoptions)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.call([*torchrun, "--nproc-per-node", "2", *sys.argv])


def main() -> None:
    options = parse_options()
    if not dist.is_torchelastic_launched():
        sys.exit(start_processes())
    dist.init_process_group("gloo")
    options.every = dist.get_world_size()  # a minibatch for each process
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    results = train_all(char_lm.load(options), options, mesh)
    check(results)
    if dist.get_rank() == 0:
        print_results(results)
        draw(results, options.output)
        print(f"All of it is in {options.output}.")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
