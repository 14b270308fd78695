"""The Triton kernel on a GPU: all that holds in the interpreter, and what only a GPU can show."""

import pytest
import torch

from funcopt._engine import dispatch
from funcopt._engine.rule import StepInputs, StepOutputs

from ..cases import no_synchronization
from . import test_triton
from .common import fresh_step
from .test_triton import (
    AMSGRAD,
    NUMBERS,
    PLAIN,
    RULE,
    TRITON,
    assert_agrees,
    check,
    copy,
    errors,
    flat,
    make_leaves,
)

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@pytest.fixture
def where() -> str:
    return "cuda"


launches, sent = test_triton.launches, test_triton.sent
globals().update(test_triton.ON_ANY_DEVICE)


# Numbers by where they are; a learning rate for each of 3 members among them.
PLACES = {
    "numbers": {},
    "on the device": {"step": torch.tensor(3), "lr": torch.tensor(0.1)},
    "on the device, for each member": {"lr": torch.tensor([0.1, 0.2, 0.3])},
}


@pytest.mark.parametrize("name", PLACES)
def test_nothing_waits_for_the_device(name):
    numbers = NUMBERS._replace(**{n: number.cuda() for n, number in PLACES[name].items()})
    leaves = make_leaves([(3,), (3, 2000)], "cuda")
    fresh_step(TRITON, leaves, numbers, PLAIN)  # which compiles
    with no_synchronization():
        moved = fresh_step(TRITON, leaves, numbers, PLAIN)
    assert_agrees(moved, leaves, numbers, PLAIN)


def test_numbers_for_each_member_may_be_on_the_cpu():
    numbers = NUMBERS._replace(lr=torch.tensor([0.1, 0.2, 0.3]))
    leaves = make_leaves([(3,), (3, 2000)], "cuda")
    fresh_step(TRITON, leaves, numbers, PLAIN)
    with no_synchronization():
        moved = fresh_step(TRITON, leaves, numbers, PLAIN)
    assert_agrees(moved, leaves, numbers, PLAIN)


def test_runs_of_blocks_are_right():
    check(make_leaves([(20_000_003,), (5,), (3000, 4000)], "cuda"), NUMBERS)


def test_consecutive_calls_do_not_disturb_each_other():
    """Their tables pass through the same pinned memory, one after the other."""
    all_leaves = [make_leaves([(1000, 1000), (n,)], "cuda") for n in range(1, 30)]
    results = [fresh_step(TRITON, leaves, NUMBERS, PLAIN) for leaves in all_leaves]
    for leaves, moved in zip(all_leaves, results, strict=True):
        assert_agrees(moved, leaves, NUMBERS, PLAIN)


def test_a_graph_replays_with_the_numbers_of_the_day():
    count = torch.ones((), dtype=torch.float64, device="cuda")
    lr = torch.tensor(0.1, device="cuda")
    numbers = NUMBERS._replace(step=count, lr=lr)
    leaves = make_leaves([(3,), (70, 1000)], "cuda", amsgrad=True)
    fresh_step(TRITON, leaves, numbers, AMSGRAD)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moved = fresh_step(TRITON, leaves, numbers, AMSGRAD)
        count += 1
    # Other tables come and go between capture and replay.
    for size in range(1, 20):
        fresh_step(TRITON, make_leaves([(size,), (size,)], "cuda"), NUMBERS, PLAIN)
    for step, rate in ((1, 0.1), (2, 0.7), (3, 0.01)):
        lr.fill_(rate)
        for grad in leaves.grads:
            grad.normal_()
        graph.replay()
        assert_agrees(moved, leaves, NUMBERS._replace(step=step, lr=float(lr)), AMSGRAD)


def test_a_graph_moves_in_place():
    count = torch.zeros((), dtype=torch.float64, device="cuda")
    leaves = make_leaves([(3,), (70, 1000)], "cuda")
    expected = copy(leaves)
    TRITON.step_(copy(leaves), NUMBERS, PLAIN)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        count += 1
        TRITON.step_(leaves, NUMBERS._replace(step=count), PLAIN)
    for step in range(1, 4):
        graph.replay()
        dispatch.plain_step_(RULE, expected, NUMBERS._replace(step=step), PLAIN)
    for one, other in zip(flat(leaves.targets), flat(expected.targets), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight_decay", [1e-2, 1e-4, 3e-5])
def test_after_2000_steps_it_is_as_close_to_the_oracle_as_the_fused_kernel(weight_decay):
    sizes = {"lr": 1e-3, "weight_decay": weight_decay, "steps": 2000, "count": 100_000}
    found = {}
    for name, step_ in (("triton", TRITON.step_), ("fused", RULE.kernel("fused").step_)):
        torch.manual_seed(0)
        found[name] = errors(step_, "cuda", **sizes)
    (bias, spread), (_, fused_spread) = found["triton"], found["fused"]
    assert abs(bias) < 5e-8
    assert spread <= fused_spread


def test_another_stream_is_served():
    leaves = make_leaves([(1000, 1000)], "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        moved = fresh_step(TRITON, leaves, NUMBERS, PLAIN)
    torch.cuda.current_stream().wait_stream(stream)
    assert_agrees(moved, leaves, NUMBERS, PLAIN)


def test_a_leaf_may_have_more_elements_than_fit_into_32_bits():
    count = 2**31 + 5000
    if torch.cuda.mem_get_info()[0] < 9 * 2 * count:
        pytest.skip("the device has too little memory")
    columns = [[torch.ones(count, dtype=torch.bfloat16, device="cuda")] for _ in range(4)]
    leaves = StepInputs.of(columns)
    moved = fresh_step(TRITON, leaves, NUMBERS, PLAIN)
    for end in (slice(0, 3000), slice(2**31 - 3000, count)):
        part = StepInputs.of([tensor[end] for tensor in column] for column in leaves.columns)
        result = StepOutputs.of([tensor[end] for tensor in column] for column in moved.columns)
        assert_agrees(result, part, NUMBERS, PLAIN)
