"""Whatever changes between two steps, a loop goes on as one whose code remembers nothing."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import funcopt
from funcopt import (
    SGD,
    Accumulate,
    Adam,
    AdamW,
    Best,
    Clip,
    Compensated,
    Ema,
    Lion,
    Lookahead,
    LossScale,
    MasterWeights,
    Plateau,
    SkipNonfinite,
)
from funcopt._core import pytree
from funcopt._engine import memory, results
from funcopt._engine import update as engine

from ..distributed import harness
from .changes_of_steps import every_change, nothing
from .changes_of_tensors import OF_A_TENSOR, PLACES, of_a_tensor
from .changes_of_trees import OF_A_LOOP
from .loops import HALF_WRITTEN, TREES, Elsewhere, Forgetful, Loop, forget, seen_of


def float64(value):
    return torch.tensor(value, dtype=torch.float64)


# Each is built anew for each loop, since a loop may fill its tensors.
OPTIMIZERS = {
    "AdamW": lambda: AdamW(lr=0.1),
    "AdamW of tensors and a schedule": lambda: AdamW(
        lr=float64(0.1), weight_decay=lambda step: 0.1 / (1 + step), amsgrad=True
    ),
    "SGD": lambda: SGD(lr=0.1, momentum=0.9, weight_decay=0.1),
    "Lion": lambda: Lion(lr=0.1),
    "Clip": lambda: Clip(AdamW(lr=0.1), 0.5),
    "Ema": lambda: Ema(AdamW(lr=0.1), 0.9),
    "Accumulate": lambda: Accumulate(AdamW(lr=0.1), 2),
}
MORE = {
    "AdamW, a count for each leaf": lambda: AdamW(lr=0.1, step_per_leaf=True),
    "AdamW, fused": lambda: AdamW(lr=0.1, kernel="fused"),
    "AdamW, foreach": lambda: AdamW(lr=0.1, kernel="foreach"),
    "Adam": lambda: Adam(lr=0.1, weight_decay=0.1, maximize=True),
    "SGD without momentum": lambda: SGD(lr=0.1),
    "Clip that skips": lambda: Clip(SGD(lr=0.1, momentum=0.9), 0.5, nonfinite="skip"),
    "SkipNonfinite": lambda: SkipNonfinite(AdamW(lr=0.1)),
    "LossScale": lambda: LossScale(AdamW(lr=0.1), 4.0, growth_interval=2),
    "Lookahead": lambda: Lookahead(AdamW(lr=0.1), 2),
    "Best": lambda: Best(AdamW(lr=0.1), patience=2),
    "Plateau": lambda: Plateau(AdamW(lr=0.1), patience=0),
    "MasterWeights": lambda: MasterWeights(AdamW(lr=0.1)),
    "Compensated": lambda: Compensated(AdamW(lr=0.1)),
    "several": lambda: Ema(Accumulate(SkipNonfinite(Clip(Lion(lr=0.1), 0.5)), 2), 0.9),
}
METHODS = ["update", "update_"]
CHANGES = every_change()


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(results, "_WORTH_KEEPING", {})  # so that results of small leaves are kept
    forget()
    yield
    funcopt.memory.reuse("cpu", True)
    forget()


def assert_goes_on_alike(build, method, changes, tree="few"):
    """The same steps, once by code that remembers and once by code that does not."""
    expected = seen_of(Forgetful(build(), method, tree), changes)
    forget()
    seen = seen_of(Loop(build(), method, tree), changes)
    assert len(seen) == len(expected)
    for number, (one, other) in enumerate(zip(seen, expected, strict=True)):
        assert one == other, f"what was seen at {number} differs"
    return seen


def every_case():
    """All single changes; by day, those of AdamW and of one other optimizer each come first."""
    rows = []
    for number, (name, method) in enumerate(itertools.product(CHANGES, METHODS)):
        first, *others = OPTIMIZERS
        turn = number % len(others)
        ordered = [first, *others[turn:], *others[:turn]]
        rows.append([(name, opt, method) for opt in ordered])
    return [_case(*case) for column in zip(*rows, strict=True) for case in column]


def _case(*case):
    return pytest.param(*case, id="-".join(case))


@pytest.mark.by_day(2 * len(METHODS) * len(CHANGES))
@pytest.mark.parametrize(("name", "opt", "method"), every_case())
def test_after_one_change_between_steps(name, opt, method):
    changes = [nothing] * 3 + [CHANGES[name]] + [nothing] * 3
    seen = assert_goes_on_alike(OPTIMIZERS[opt], method, changes)
    assert HALF_WRITTEN not in [entry[-1] for entry in seen]


@st.composite
def programs(draw):
    """Changes of a loop with steps between them."""
    leaf_changes = st.builds(
        lambda how, place, name: (f"{place}[{name!r}]: {how}", how, place, name),
        st.sampled_from(list(OF_A_TENSOR)),
        st.sampled_from(PLACES),
        st.sampled_from(["w", "u", "b"]),
    )
    loop_changes = st.sampled_from(list(OF_A_LOOP)).map(lambda name: (name,))
    steps = draw(st.lists(st.just(()) | loop_changes | leaf_changes, min_size=3, max_size=9))
    return [(), (), *steps, ()]


def change_of(step):
    if not step:
        return nothing
    if len(step) == 1:
        return OF_A_LOOP[step[0]]
    _, how, place, name = step
    return of_a_tensor(OF_A_TENSOR[how], place, name)


def test_after_any_changes_in_any_order(examples):
    @settings(
        max_examples=examples(by_night=4000),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.sampled_from([*OPTIMIZERS, *MORE]),
        st.sampled_from(METHODS),
        st.sampled_from(list(TREES)),
        programs(),
    )
    def hold(opt, method, tree, program):
        build = {**OPTIMIZERS, **MORE}[opt]
        assert_goes_on_alike(build, method, [change_of(step) for step in program], tree)

    hold()


# Faults are planted: the test has to find them.


def careless_guard(tensors, sizes=None):
    return lambda *others: True


def careless_columns(trees):
    keys = tuple(trees[0])
    found = pytree._structures.get(keys)
    return found and ([list(tree.values()) for tree in trees], found[1])


PLANTED = {
    "a guard that lets everything pass": (
        memory,
        "guard",
        careless_guard,
        "grads: with a history",
    ),
    "results that count as free": (
        results,
        "_held",
        lambda base, *_: (0, 0, base.data_ptr()),
        "old results held",
    ),
    "keys that are not compared": (
        pytree,
        "columns_of_dicts",
        careless_columns,
        "gradients in another order",
    ),
    "leaves that may lie anywhere": (engine, "all_differ", lambda _: True, "tied parameters"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_what_forgets_to_ask_is_found(fault, monkeypatch):
    owner, name, careless, change = PLANTED[fault]
    monkeypatch.setattr(owner, name, careless)
    with pytest.raises(AssertionError):
        test_after_one_change_between_steps(change, "AdamW", "update")


# Against a process that never made a step before.

AGAINST_A_PROCESS = [
    "params: told to require a gradient",
    "grads: transposed",
    "grads: None",
    "grads: in float64",
    "slot: of one more dimension",
    "gradients in another order",
    "a step by a rate that is a tensor",
    "a count of another value",
    "what is kept given back",
]


@pytest.fixture(scope="module")
def new_process():
    """What calls a function in a process that did nothing before."""
    with harness._CONTEXT.Pool(1, maxtasksperchild=1) as pool:
        yield pool.apply


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", AGAINST_A_PROCESS)
def test_each_step_is_that_of_a_process_which_made_none_before(name, method, new_process):
    loop = Elsewhere(AdamW(lr=0.1), method)
    loop.apply = new_process
    seen_of(loop, [nothing, nothing, CHANGES[name], nothing])
