"""Other libraries' optimizers on the kit: `python -m tests.peers` writes the page `tests/PEERS.md`.

They are outside subjects, no dependency. `tests/peers-requirements.txt` has their versions, and
nothing is run with others. Each runs in a process of its own, so that one that crashes or hangs
does not end the run. An adapter only turns a library's calls into `init` and `update`. What crashes
is named on the page, and no input that does.
"""

import copy
import dataclasses
import importlib
import importlib.metadata
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, optim

from funcopt.testing import check_optimizer, from_optax, laws, strategies
from funcopt.testing._adapters import subject_of

from .peers_of_adamw import OptaxAdamW

Tree = Any


class Whole:
    """A state that is an optimizer itself; nothing is compared of it."""

    def __init__(self, made: optim.Optimizer) -> None:
        self.made = made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Whole)

    __hash__ = None


@dataclasses.dataclass(frozen=True)
class Copied:
    """A class of optimizers, a copy of which makes each step, whatever it keeps and wherever."""

    make: Callable[[list[Tensor]], optim.Optimizer]
    lr: float | None = None

    def init(self, params: Tree) -> Whole:
        made = self.make([torch.nn.Parameter(leaf.clone()) for leaf in optree.tree_leaves(params)])
        for group in made.param_groups if self.lr is not None else ():
            group["lr"] = self.lr
        if callable(getattr(made, "train", None)):  # of schedule-free ones
            made.train()
        return Whole(made)

    def update(self, grads: Tree, state: Whole, params: Tree) -> tuple[Tree, Whole]:
        made = object.__new__(type(state.made))  # by itself, torch would copy its state alone
        vars(made).update(copy.deepcopy(vars(state.made)))
        own = [parameter for group in made.param_groups for parameter in group["params"]]
        leaves, structure = optree.tree_flatten(params)
        for parameter, leaf, grad in zip(own, leaves, optree.tree_leaves(grads), strict=True):
            parameter.data.copy_(leaf)
            parameter.grad = grad.clone(memory_format=torch.contiguous_format)
        made.step()
        moved = [parameter.detach().clone() for parameter in own]
        return optree.tree_unflatten(structure, moved), Whole(made)


# Of what is run on copies: what its parameters do.
_OF_PARAMETERS = (
    laws.deterministic,
    laws.survives_zero_gradients,
    laws.names_do_not_matter,
    laws.goes_downhill,
    laws.zero_lr_moves_nothing,
)
# Of what computes on tensors or arrays that no transform of torch reaches.
_OF_NUMBERS = (
    laws.never_mutates,
    *_OF_PARAMETERS,
    laws.keeps_structure,
    laws.agrees_with_itself_in_float64,
    laws.leaves_are_independent,
    laws.elements_are_independent,
    laws.maximize_is_minimize_negated,
)
_OF_TENSORS = (*_OF_NUMBERS, laws.vmap_is_loop, laws.gradient_is_finite)


class Peer(NamedTuple):
    package: str  # on PyPI
    module: str
    make: Callable[[Any], Any]
    laws: tuple[laws.Law, ...]


def _of_class(package: str, module: str, name: str, **options: Any) -> Peer:
    def make(library: Any) -> Any:
        def factory(params: list[Tensor]) -> optim.Optimizer:
            return getattr(library, name)(params, **options)

        try:
            subject = subject_of(factory)
            leaf = torch.ones(2, 3)
            subject.update([leaf], subject.init([leaf]), [leaf])
        except (TypeError, RuntimeError):  # it keeps more than what `pure` could hand on
            return Copied(factory, options.get("lr"))
        return subject

    return Peer(package, module, make, _OF_TENSORS)


_TORCHS = (
    *("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD"),
    *("Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
)

PEERS: dict[str, Peer] = {
    **{f"torch.optim.{name}": _of_class("torch", "torch.optim", name) for name in _TORCHS},
    "torchopt.adamw, as it comes": Peer(
        "torchopt", "torchopt", lambda own: from_optax(own.adamw(1e-3)), _OF_TENSORS
    ),
    "torchopt.adamw, inplace=False": Peer(
        "torchopt", "torchopt", lambda own: from_optax(own.adamw(1e-3), inplace=False), _OF_TENSORS
    ),
    "optax.adamw": Peer("optax", "optax", lambda own: OptaxAdamW(), _OF_NUMBERS),
    "lion_pytorch.Lion": _of_class("lion-pytorch", "lion_pytorch", "Lion", lr=1e-2),
    "adabelief_pytorch.AdaBelief": _of_class(
        "adabelief-pytorch", "adabelief_pytorch", "AdaBelief", lr=1e-2, print_change_log=False
    ),
    "adan_pytorch.Adan": _of_class("adan-pytorch", "adan_pytorch", "Adan", lr=1e-2),
    "apollo_torch.APOLLOAdamW": _of_class("apollo-torch", "apollo_torch", "APOLLOAdamW", lr=1e-2),
    "optimi.AdamW": _of_class("torch-optimi", "optimi", "AdamW", lr=1e-2),
    "optimi.StableAdamW": _of_class("torch-optimi", "optimi", "StableAdamW", lr=1e-2),
    "pytorch_optimizer.AdaBelief": _of_class(
        "pytorch_optimizer", "pytorch_optimizer", "AdaBelief", lr=1e-2
    ),
    "pytorch_optimizer.Lion": _of_class("pytorch_optimizer", "pytorch_optimizer", "Lion", lr=1e-2),
    "schedulefree.AdamWScheduleFree": _of_class(
        "schedulefree", "schedulefree", "AdamWScheduleFree", lr=1e-2
    ),
    "prodigyopt.Prodigy": _of_class("prodigyopt", "prodigyopt", "Prodigy", lr=1.0),
    "dadaptation.DAdaptAdam": _of_class("dadaptation", "dadaptation", "DAdaptAdam", lr=1.0),
    "bitsandbytes.optim.AdamW": _of_class("bitsandbytes", "bitsandbytes.optim", "AdamW", lr=1e-2),
    "heavyball.AdamW": _of_class("heavyball", "heavyball", "AdamW", lr=1e-2),
}

# What differs by design, and is no fault: by a part of the peer's name, and the law.
BY_DESIGN = {
    ("", "survives_zero_gradients", "float16"): "its eps is 0 in float16, which it is not made for",
    ("Rprop", "zero_lr_moves_nothing", ""): "steps have a least size of their own, whatever lr is",
    ("lion_pytorch", "zero_lr_moves_nothing", ""): "it refuses an lr of 0",
    ("schedulefree", "", ""): "what it is given to evaluate is an average, beside the parameters",
    ("Prodigy", "names_do_not_matter", ""): "one rate for all leaves, by a sum over them",
    ("", "gradient_is_finite", ""): "no library promises a derivative through its root at zero",
    ("as it comes", "never_mutates", ""): "it writes in place unless told not to",
}

_PLAIN = {"dtype": strategies.dtypes(half=False, complex=False), "nodes": ("dict",)}


def found(name: str) -> dict[str, Any]:
    """Hold a peer to its laws, in this process; parameters are plain ones that all are made for."""
    peer = PEERS[name]
    opt = peer.make(importlib.import_module(peer.module))
    held_to = _OF_PARAMETERS if isinstance(opt, Copied) else peer.laws
    matrix = {"min_dims": 2, "max_dims": 2} if "Muon" in name else {"max_dims": 2}
    params = strategies.params(
        shape=strategies.shapes(min_side=1, **matrix), layouts=("contiguous",), **_PLAIN
    )
    report = check_optimizer(opt, laws=held_to, params=params, max_examples=10, progress=False)
    shown = []
    for verdict in report.verdicts:
        example = ""
        if verdict.status == "fails":
            example = " ".join(repr(verdict.example).split())
        detail = verdict.detail if verdict.status != "error" else verdict.detail.partition(":")[0]
        shown.append((verdict.law, verdict.status, detail, example))
    how = "copies" if isinstance(opt, Copied) else "pure" if hasattr(opt, "kind") else "its own"
    return {"how": how, "verdicts": shown}


def version_of(package: str) -> str:
    """Return the version of a package that is installed, without what says where it was built."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "none"


def other_versions(requirements: str) -> list[str]:
    """Return what is installed otherwise than `NAME==VERSION` in the lines of a file says."""
    pins = [line.split("==") for line in requirements.splitlines() if "==" in line]
    return [
        f"{name} {version_of(name)}, not {version}"
        for name, version in pins
        if version_of(name) != version
    ]


def in_a_process(name: str, seconds: int = 900) -> dict[str, Any]:
    """Hold a peer to its laws in a process of its own; say so if that does not end well."""
    said = {"version": version_of(PEERS[name].package)}
    command = [sys.executable, "-m", "tests.peers", name]
    try:
        run = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return {**said, "what": f"not done after {seconds} seconds"}
    lines = run.stdout.splitlines()
    if run.returncode != 0 or not lines:
        last = (run.stderr.strip().splitlines() or ["no word"])[-1].partition(":")[0]
        return {**said, "what": f"the process ended with {run.returncode}: {last}"}
    return {**said, **json.loads(lines[-1])}


def by_design(name: str, law: str, detail: str) -> str:
    """Return why a law is not meant to hold of a peer; nothing if that is a fault."""
    for (part, own, word), reason in BY_DESIGN.items():
        if part in name and own in law and word in detail:
            return reason
    return ""


def page(results: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown page: a row for each peer, and the smallest example of what breaks."""
    rows, notes = [], []
    for name, own in results.items():
        version = own.get("version", "")
        if "what" in own:
            rows.append(f"| `{name}` | {version} |  |  |  | {own['what']} |")
            continue
        held, broken, meant = [], [], []
        for law, status, detail, example in own["verdicts"]:
            if status == "holds":
                held.append(law)
            elif status in ("fails", "error"):
                reason = by_design(name, law, detail)
                (meant if reason else broken).append(
                    f"`{law}`" + (f" ({reason})" if reason else "")
                )
                if status == "fails":
                    notes.append(f"- `{name}`, `{law}`: `{detail}`\n  `{example}`")
                else:
                    notes.append(f"- `{name}`, `{law}`: it raises `{detail}`")
        cells = [f"`{name}`", version, own["how"], str(len(held)), ", ".join(broken)]
        rows.append("| " + " | ".join([*cells, ", ".join(meant)]) + " |")
    head = [
        "# Other libraries' optimizers, held to the laws",
        "",
        f"Written by `python -m tests.peers` with torch {version_of('torch')}, on the CPU, with 10",
        "problems for each law: dicts of contiguous parameters in float32 and float64, none empty.",
        "The command takes no other versions than those of `tests/peers-requirements.txt`:",
        "`pip install -r tests/peers-requirements.txt`.",
        "`survives_zero_gradients` alone also tries float16 and bfloat16. An optimizer is run by",
        "`funcopt.pure`, or, where it keeps more than that can hand on, by a copy of it for each",
        "step, and is then held to fewer laws; a pair of functions is run as it is. A law that",
        "does not apply is not counted. What differs by design is told apart: it is no fault.",
        "",
        "| Optimizer | Version | Run by | Laws that hold | Broken | By design, or not promised |",
        "|---|---|---|---|---|---|",
    ]
    foot = ["", "## The smallest example found of each that breaks", "", *notes, ""]
    return "\n".join([*head, *rows, *foot])


PAGE = pathlib.Path(__file__).with_name("PEERS.md")
REQUIREMENTS = pathlib.Path(__file__).with_name("peers-requirements.txt")

if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        print("\n" + json.dumps(found(sys.argv[1])))
        sys.exit()
    if others := other_versions(REQUIREMENTS.read_text()):
        sys.exit(
            f"{', '.join(others)}. The page is about the versions of {REQUIREMENTS.name}: install "
            f"those, by `pip install -r tests/{REQUIREMENTS.name}`."
        )
    results = {}
    for name in PEERS:
        results[name] = in_a_process(name)
        print(name, results[name].get("what", "done"), flush=True)
        PAGE.write_text(page(results))
