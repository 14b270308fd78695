"""The Triton kernel: its tensors, in Triton's interpreter, and its machine code, without a GPU.

The interpreter must be chosen before Triton is imported. So this file runs itself once in a process
of its own that has chosen it, and the tests that take place on the CPU report what they did there.
"""

import contextlib
import decimal
import functools
import inspect
import itertools
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import types
from xml.etree import ElementTree

import pytest
import torch

from funcopt import AdamW, Clip, LossScale, SkipNonfinite
from funcopt._core import tensors, transforms
from funcopt._engine import dispatch
from funcopt._engine.counts import PerLeaf
from funcopt._engine.rounding import random_bits, round_stochastically
from funcopt._engine.rule import StepInputs, StepOutputs
from funcopt.optimizers._adam import triton as kernel
from funcopt.optimizers._adam import (
    triton_arguments,
    triton_launch,
    triton_numbers,
    triton_round,
)
from funcopt.optimizers._adam.triton_launch import Launch

from .. import oracle
from ..cases import assert_same_bits, tree_map
from ..cases import leaves as leaves_of
from .common import fresh_step, same_memory

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from funcopt.optimizers._adam import triton_source as source  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# A few units in the last place; in bfloat16 just one, by which the interpreter truncates.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6, torch.float64: 1e-13}
RULE, TRITON = AdamW.rule, kernel.ADAMW_TRITON
NUMBERS = RULE.numbers(step=3, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
PLAIN = RULE.set_up(AdamW(kernel="triton")).options
AMSGRAD = RULE.set_up(AdamW(amsgrad=True, kernel="triton")).options


@functools.cache
def outcomes() -> dict[str, tuple[str, str]]:
    """Return what became of each test under the interpreter ("" if it passed), and why."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", __file__, f"--junitxml={report}", "-q"]
        process = subprocess.run(
            [*command, "-p", "no:cacheprovider"],
            env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert report.exists(), process.stdout + process.stderr
        results = {}
        for case in ElementTree.parse(report).iter("testcase"):
            problem = next(iter(case), None)
            results[case.get("name")] = (
                ("", "") if problem is None else (problem.tag, problem.text or "")
            )
        return results


compiled = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under the interpreter")

ON_ANY_DEVICE = {}


def on_any_device(test):
    """Let a test take place where the fixture `where` says, which on the CPU is the interpreter."""
    if INTERPRETED:
        return test

    @functools.wraps(test)
    def reported(request, where, **arguments):
        if where != "cpu":
            test(where=where, **arguments)
            return
        outcome, reason = outcomes()[request.node.name]
        if outcome == "skipped":
            pytest.skip(reason)
        assert not outcome, reason

    own = inspect.signature(test)
    request = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    reported.__signature__ = own.replace(parameters=[request, *own.parameters.values()])
    ON_ANY_DEVICE[test.__name__] = reported
    return reported


@pytest.fixture
def where() -> str:
    return "cpu"


def make_leaves(shapes, where, dtype=torch.float32, amsgrad=False, make=torch.empty) -> StepInputs:
    """Random leaves. `make` makes the memory."""

    def column(random):
        return [make(shape, dtype=dtype, device=where).copy_(random(shape)) for shape in shapes]

    def positive(shape):
        return torch.rand(shape) + 0.1

    columns = [column(random) for random in (torch.randn, torch.randn, torch.randn, positive)]
    return StepInputs.of([*columns, *([column(positive)] if amsgrad else [])])


def flat(own) -> list[torch.Tensor]:
    """The tensors of `StepInputs` or `StepOutputs`."""
    return [tensor for column in own.columns for tensor in column]


def copy(leaves: StepInputs) -> StepInputs:
    return StepInputs.of([tensor.clone() for tensor in column] for column in leaves.columns)


def assert_agrees(moved, leaves: StepInputs, numbers, options) -> None:
    """Compare with the plain kernel."""
    expected = dispatch.plain_step(RULE, leaves, numbers, options)
    for one, other in zip(flat(moved), flat(expected), strict=True):
        assert one.stride() == other.stride()
        bound = TOLERANCE[one.dtype]
        torch.testing.assert_close(one, other, rtol=bound, atol=bound, equal_nan=True)


def check(leaves: StepInputs, numbers, options=PLAIN) -> None:
    assert_agrees(fresh_step(TRITON, leaves, numbers, options), leaves, numbers, options)


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    """How many programs each launch had."""
    real, counts = Launch.go, []

    def counting(self, programs, *arguments):
        counts.append(programs)
        real(self, programs, *arguments)

    monkeypatch.setattr(Launch, "go", counting)
    return counts


@pytest.mark.by_day(6)
@on_any_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_it_computes_what_the_plain_kernel_does(where, dtype, amsgrad, maximize):
    options = RULE.set_up(AdamW(amsgrad=amsgrad, maximize=maximize)).options
    for step in (1, 2, 1000, 2**25):
        leaves = make_leaves([(5, 3), (1030,)], where, dtype, amsgrad)
        check(leaves, NUMBERS._replace(step=step), options)


ROUNDED = [
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
]


@on_any_device
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("dtype", "slot_dtype"), ROUNDED)
def test_moments_in_another_dtype_and_rounding_by_chance_are_those_of_the_plain_kernel(
    where, dtype, slot_dtype, rounding
):
    options = RULE.set_up(AdamW(rounding=rounding, moments=slot_dtype)).options
    leaves = make_leaves([(5, 3), (1030,), (2100,)], where, dtype)
    slots = tuple([slot.to(slot_dtype) for slot in column] for column in leaves.slots)
    leaves = leaves._replace(slots=slots, ids=[0, 3, 4])
    numbers = NUMBERS._replace(key=2.0**40 + 5)
    outputs = StepOutputs.of(
        [torch.empty_like(old) for old in column] for column in leaves.targets.columns
    )
    TRITON.step_to(leaves, outputs, numbers, options)
    expected = dispatch.plain_step(RULE, leaves, numbers, options)
    for one, other in zip(flat(outputs), flat(expected), strict=True):
        assert one.dtype is other.dtype
        if one.dtype is torch.float32:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
            continue
        torch.testing.assert_close(one, other, rtol=torch.finfo(one.dtype).eps * 2, atol=1e-6)
        # Triton's interpreter cuts off what it casts to bfloat16, where a GPU rounds.
        if rounding == "stochastic" or where != "cpu":
            # A digit beyond those of the dtype may be another one, and some numbers for it.
            assert (one != other).sum() <= one.numel() // 500


@on_any_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_value_is_rounded_by_chance_to_the_bits_of_the_plain_operators(where, dtype):
    @triton.jit
    def round_all(values, results, words, DTYPE: source.tl.constexpr):  # noqa: N803
        lanes = source.tl.arange(0, 1024)
        wide = source.tl.load(values + lanes)
        chance = (
            source.tl.load(words),
            source.tl.load(words + 1),
            source.tl.load(words + 2),
            source.tl.load(words + 3),
        )
        found = triton_round.rounded(wide, chance, lanes, 2, DTYPE, True)
        source.tl.store(results + lanes, found)

    key, leaf, step = 2**40 + 5, 7, 2**33 + 1
    exponents = torch.randint(-30, 17, (2048,))
    values = (torch.randn(2048) * 2.0**exponents).to(where)
    values[:4] = torch.tensor([math.inf, -math.inf, math.nan, 1e38])
    random = random_bits(float(key), float(step), leaf, 2, values.shape, values.device)
    expected = round_stochastically(values, random, dtype)
    for begin in (0, 1024):
        results = torch.empty(1024, dtype=dtype, device=where)
        own = values[begin : begin + 1024].contiguous()
        own_dtype = getattr(source.tl, str(dtype).removeprefix("torch."))
        words = torch.tensor([key, leaf, step, begin], dtype=torch.int64, device=where)
        round_all[(1,)](own, results, words, own_dtype)
        one, other = (t.cpu().nan_to_num(7.0) for t in (results, expected[begin:][:1024]))
        assert same_memory(one, other)


ODD_NUMBERS = {
    "no momentum": {"beta1": 0.0},
    "no memory of squares": {"beta2": 0.0},
    "little momentum": {"beta1": 0.3},
    "nearly endless memory": {"beta1": 1 - 1e-9, "beta2": 1 - 1e-12},
    "no step size": {"lr": 0.0},
    "a count that float32 cannot hold": {"step": 2**24 + 1, "beta2": 1 - 1e-8},
    "a large eps": {"eps": 1.0, "weight_decay": 10.0},
}


@on_any_device
@pytest.mark.parametrize("name", ODD_NUMBERS)
def test_odd_numbers_are_served(where, name):
    for dtype in (torch.float32, torch.float64):
        leaves = make_leaves([(7,)], where, dtype)
        numbers = NUMBERS._replace(**ODD_NUMBERS[name])
        moved = fresh_step(TRITON, leaves, numbers, PLAIN)
        if name == "nearly endless memory":
            # The plain kernel's own digits are lost there; those of the moments are not.
            moved = moved._replace(params=dispatch.plain_step(RULE, leaves, numbers, PLAIN).params)
        assert_agrees(moved, leaves, numbers, PLAIN)


@on_any_device
def test_bias_corrections_have_all_digits(where):
    @triton.jit
    def differences(betas, steps, results):
        i = source.tl.program_id(0)
        beta, step = source.tl.load(betas + i), source.tl.load(steps + i)
        source.tl.store(results + i, triton_numbers.one_minus_power(beta, step))

    cases = list(
        itertools.product(
            (0.0, 1e-300, 0.3, 0.5, 0.9, 0.999, 1 - 1e-7, 1 - 1e-12), (1, 2, 3, 10, 1000, 2**25)
        )
    )
    betas, steps = torch.tensor(cases, dtype=torch.float64, device=where).T.contiguous()
    results = torch.empty_like(betas)
    differences[(len(cases),)](betas, steps, results)
    with decimal.localcontext(prec=400):
        exact = [float(1 - decimal.Decimal(beta) ** step) for beta, step in cases]
    for case, result, right in zip(cases, results.tolist(), exact, strict=True):
        assert math.isclose(result, right, rel_tol=2e-15), case


@on_any_device
def test_a_first_step_has_all_digits(where):
    """Where nothing is remembered yet, the moments are what 1 - beta makes of the gradient."""
    leaves = make_leaves([(7,)], where)
    leaves.slots[0][0].zero_()
    leaves.slots[1][0].zero_()
    numbers = NUMBERS._replace(step=1, beta1=1 - 1e-6, beta2=1 - 1e-6)
    moved, expected = (
        fresh_step(TRITON, leaves, numbers, PLAIN),
        dispatch.plain_step(RULE, leaves, numbers, PLAIN),
    )
    torch.testing.assert_close(moved.slots, expected.slots, rtol=5e-7, atol=0)


def errors(step_, where, lr, weight_decay, steps, count):
    """How far this many float32 parameters are from the oracle after these steps.

    Returns:
        The part of the error that goes along with the parameters, and the root mean square of all.
    """
    leaves = make_leaves([(count,)], where)
    leaves.slots[0][0].zero_()
    leaves.slots[1][0].zero_()
    start = leaves.params[0].double()
    expected, state = start, oracle.init(leaves.params[0])
    for step in range(1, steps + 1):
        leaves.grads[0].normal_()
        numbers = NUMBERS._replace(step=float(step), lr=lr, weight_decay=weight_decay)
        step_(leaves, numbers, PLAIN)
        grad = leaves.grads[0].double()
        expected, state = oracle.update(grad, state, expected, lr=lr, weight_decay=weight_decay)
    error = leaves.params[0].double() - expected
    return float(error @ start / (start @ start)), float(error.square().mean().sqrt())


@on_any_device
@pytest.mark.parametrize("weight_decay", [1e-2, 1e-4, 3e-5])
def test_weight_decay_is_not_off_the_same_way_at_each_step(where, weight_decay):
    """A factor of 1 - lr * weight_decay would be, by 1e-8 of a parameter at each, and more."""
    bias, spread = errors(TRITON.step_, where, 1e-3, weight_decay, steps=20, count=2048)
    assert abs(bias) < 2e-8
    assert spread < 4e-7


def fused_on_cuda_(leaves: StepInputs, numbers, _options) -> None:
    """What torch's fused kernel computes on CUDA: in float64, rounded whenever it is kept.

    That is `adam_math` of `fused_adam_utils.cuh`, in which the hyperparameters are doubles.
    """
    (param,), (grad,), ((exp_avg,), (exp_avg_sq,)), _ = leaves

    def kept(value):
        return value.float().double()

    p, g, m, v = (tensor.double() for tensor in (param, grad, exp_avg, exp_avg_sq))
    p = kept(p - numbers.lr * numbers.weight_decay * p)
    m = kept(numbers.beta1 * m + (1 - numbers.beta1) * g)
    v = kept(numbers.beta2 * v + (1 - numbers.beta2) * g * g)
    step_size = torch.tensor(numbers.lr / (1 - numbers.beta1**numbers.step)).float().double()
    root = torch.tensor(math.sqrt(1 - numbers.beta2**numbers.step)).float().double()
    denominator = kept(kept(kept(v.sqrt()) / root) + numbers.eps)
    p = kept(p - kept(kept(step_size * m) / denominator))
    for tensor, new in zip((param, exp_avg, exp_avg_sq), (p, m, v), strict=True):
        tensor.copy_(new)


@on_any_device
def test_after_many_steps_it_is_as_close_to_the_oracle_as_what_the_fused_kernel_computes(where):
    """A factor of 1 - lr * weight_decay, rounded to float32, is off by 5e-6 by then."""
    found = []
    for step_ in (TRITON.step_, fused_on_cuda_):
        torch.manual_seed(0)
        found.append(errors(step_, where, 1e-3, 1e-2, steps=400, count=1024))
    (bias, spread), (_, fused_spread) = found
    assert abs(bias) < 1e-7
    assert spread <= fused_spread


@on_any_device
@pytest.mark.parametrize("weight_decay", [0.0, 0.5, 4.9, 5.0, 10.0, 20.0])
def test_a_step_keeps_its_digits_whatever_the_weight_decay(where, weight_decay):
    leaves = make_leaves([(7,)], where)
    leaves.params[0].mul_(1e6)
    param, grad, exp_avg, exp_avg_sq = (column[0].double() for column in leaves.columns)
    before = oracle.OracleState(NUMBERS.step - 1, exp_avg, exp_avg_sq, exp_avg_sq)
    expected, _ = oracle.update(grad, before, param, lr=0.1, weight_decay=weight_decay)
    moved = fresh_step(TRITON, leaves, NUMBERS._replace(weight_decay=weight_decay), PLAIN)
    torch.testing.assert_close(moved.params[0].double(), expected, rtol=3e-7, atol=0)


@on_any_device
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_an_infinite_parameter_stays_infinite(where, weight_decay):
    leaves = make_leaves([(3,)], where)
    leaves.params[0].copy_(torch.tensor([math.inf, -math.inf, math.nan]))
    check(leaves, NUMBERS._replace(weight_decay=weight_decay))


@on_any_device
def test_no_momentum_forgets_the_largest_past(where):
    leaves = make_leaves([(7,)], where)
    leaves.slots[0][0].fill_(1e30)
    moved = fresh_step(TRITON, leaves, NUMBERS._replace(beta1=0.0), PLAIN)
    assert_same_bits(moved.slots[0], leaves.grads)


@on_any_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("told", ["as a number", "as a tensor"])
def test_gradients_are_multiplied_on_the_way_and_left_as_they_are(where, dtype, told):
    leaves = make_leaves([(5, 3), (1030,)], where, dtype)
    factor = 0.3 if told == "as a number" else torch.tensor(0.3, dtype=torch.float64, device=where)
    before = [grad.clone() for grad in leaves.grads]
    moved = fresh_step(TRITON, leaves, NUMBERS._replace(grad_scale=factor), PLAIN)
    assert_same_bits(leaves.grads, before)
    multiplied = leaves._replace(grads=tensors.scaled(leaves.grads, 0.3))
    assert_agrees(moved, multiplied, NUMBERS, PLAIN)


MANY = [(), (0,), (1,), (1023,), (1024,), (3, 0), (1025,), (5000,), (2, 3, 4), (20, 500), (0,)]


@on_any_device
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("enough", [4096, 4])
def test_many_leaves_take_one_launch(where, amsgrad, enough, launches, monkeypatch):
    monkeypatch.setattr(kernel, "_ENOUGH_PROGRAMS", enough)
    monkeypatch.setattr(kernel, "_launchers", {})  # those there are may be made for another number
    leaves = make_leaves(MANY, where, amsgrad=amsgrad)
    check(leaves, NUMBERS, AMSGRAD if amsgrad else PLAIN)
    # One block to a program, or runs of five.
    assert launches == [22 if enough == 4096 else 9]


@on_any_device
def test_nothing_to_move_takes_no_launch(where, launches):
    check(make_leaves([(0,), (3, 0)], where), NUMBERS)
    check(make_leaves([(0, 4)], where), NUMBERS._replace(lr=torch.ones(0, device=where)))
    assert launches == []


def spread(shape, low, high, **options):
    return torch.linspace(low, high, math.prod(shape), **options).reshape(shape)


# The shapes of the numbers that are tensors, under one vmap or two, of 3 or of 2 and 3 members.
PER_MEMBER = {
    "a learning rate each": {"lr": (3,)},
    "a count each": {"step": (3,)},
    "all of their own": dict.fromkeys(RULE.numbers._fields[:6], (3,)),
    "some shared": {"lr": (3,), "eps": (), "beta2": (1,)},
    "nested": {"lr": (2, 3), "weight_decay": (2, 3)},
    "by the outer alone": {"lr": (2, 1)},
    "by the inner alone": {"step": (1, 3), "beta1": (1, 3)},
    "crossed": {"lr": (2, 1), "weight_decay": (1, 3), "beta2": (), "eps": (1, 1)},
    "one shared by all": {"lr": (1, 1)},
}
RANGES = RULE.numbers(
    step=(1, 9), lr=(0.01, 1), beta1=(0.5, 0.95), beta2=(0.9, 0.99), eps=(1e-8, 1e-3),
    weight_decay=(0, 0.5),
)  # fmt: skip


def check_per_member(where, name, dtype) -> None:
    shapes = PER_MEMBER[name]
    numbers = {
        field: spread(shape, *getattr(RANGES, field), dtype=dtype, device=where)
        for field, shape in shapes.items()
    }
    lead = (2, 3) if max(map(len, shapes.values())) == 2 else (3,)
    leaves = make_leaves([lead, (*lead, 7), (*lead, 1500), (*lead, 0), (*lead, 4, 8)], where)
    check(leaves, NUMBERS._replace(**numbers))


@on_any_device
@pytest.mark.parametrize("name", PER_MEMBER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_may_differ_between_members(where, name, dtype, launches):
    check_per_member(where, name, dtype)
    assert len(launches) == 1


@on_any_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_leaf_may_have_numbers_of_its_own(where, dtype, launches):
    leaves = make_leaves([(3,), (2000,), (4, 5)], where, dtype)
    rates, decays = [0.1, 0.02, 0.3], [0.0, 0.1, 0.2]
    numbers = NUMBERS._replace(lr=PerLeaf(rates), weight_decay=PerLeaf(decays))
    moved = fresh_step(TRITON, leaves, numbers, PLAIN)
    assert len(launches) == 1
    for index, (lr, weight_decay) in enumerate(zip(rates, decays, strict=True)):
        alone = leaves.take([index])
        expected = fresh_step(
            TRITON, alone, NUMBERS._replace(lr=lr, weight_decay=weight_decay), PLAIN
        )
        for column, own in zip(moved.columns, expected.columns, strict=True):
            assert_same_bits(column[index], own[0])


@on_any_device
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_member_that_is_not_active_keeps_every_bit(where, dtype, in_place):
    leaves = make_leaves([(3,), (3, 7), (3, 1500)], where, dtype)
    active = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64, device=where)
    before = [[leaf.clone() for leaf in column] for column in leaves.targets.columns]
    expected = fresh_step(TRITON, leaves, NUMBERS, PLAIN)
    moved = (
        leaves.targets
        if in_place
        else fresh_step(TRITON, leaves, NUMBERS._replace(active=active), PLAIN)
    )
    if in_place:
        TRITON.step_(leaves, NUMBERS._replace(active=active), PLAIN)
    for news, alls, olds in zip(moved.columns, expected.columns, before, strict=True):
        for new, all_moved, old in zip(news, alls, olds, strict=True):
            assert_same_bits(new[1], old[1])
            assert_same_bits(new[::2], all_moved[::2])


@on_any_device
@pytest.mark.parametrize("name", ["all of their own", "crossed"])
def test_numbers_from_elsewhere_are_told_by_value(where, name, monkeypatch):
    real, sent = triton_arguments._value, triton_arguments.sent

    def from_elsewhere(number, lead, device):
        # Whatever has to be sent, is sent to where the leaves are.
        monkeypatch.setattr(triton_arguments, "sent", lambda words, _: sent(words, device))
        return real(number, lead, torch.device("meta"))

    monkeypatch.setattr(triton_arguments, "_value", from_elsewhere)
    check_per_member(where, name, torch.float64)


NUMBER_TENSORS = {
    "of int64": {"step": torch.tensor(4)},
    "of float32": {"lr": torch.tensor(0.1)},
    "strided": {"lr": torch.rand(6, dtype=torch.float64)[::2]},
    "expanded": {"lr": torch.rand(1, dtype=torch.float64).expand(3)},
    "with a history": {"lr": torch.tensor(0.1, requires_grad=True)},
}


@on_any_device
@pytest.mark.parametrize("name", NUMBER_TENSORS)
def test_tensors_of_any_kind_are_numbers(where, name):
    numbers = {field: number.to(where) for field, number in NUMBER_TENSORS[name].items()}
    with torch.no_grad():
        check(make_leaves([(3, 5)], where), NUMBERS._replace(**numbers))


@on_any_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_keep_their_bits_and_outputs_their_own_memory(where, dtype):
    leaves = make_leaves([(3,), (1030,)], where, dtype, amsgrad=True)
    before = copy(leaves)
    moved = fresh_step(TRITON, leaves, NUMBERS, AMSGRAD)
    assert_same_bits(flat(leaves), flat(before))
    places = [t.untyped_storage().data_ptr() for t in (*flat(leaves), *flat(moved))]
    assert len(set(places)) == len(places)


@on_any_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_in_place_gives_the_same_bits(where, dtype, amsgrad):
    options = AMSGRAD if amsgrad else PLAIN
    leaves = make_leaves([(), (2, 1030)], where, dtype, amsgrad)
    moved = fresh_step(TRITON, leaves, NUMBERS, options)
    grads = [grad.clone() for grad in leaves.grads]
    TRITON.step_(leaves, NUMBERS, options)
    assert_same_bits(flat(leaves.targets), flat(moved))
    assert_same_bits(leaves.grads, grads)


@on_any_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_gradient_moves_nothing_but_by_weight_decay(where, dtype):
    params = [torch.randn(3, device=where).to(dtype)]
    zeros = [torch.zeros_like(params[0])]
    leaves = StepInputs(params, zeros, (zeros, zeros, zeros))
    moved = fresh_step(TRITON, leaves, NUMBERS, AMSGRAD)
    assert_agrees(moved, leaves, NUMBERS, AMSGRAD)
    assert all(not tensor.any() for column in moved.slots for tensor in column)


@on_any_device
def test_what_is_not_finite_stays_so(where):
    leaves = make_leaves([(5,)], where, amsgrad=True)
    leaves.grads[0][0] = math.nan
    leaves.slots[2][0][1] = math.nan
    leaves.slots[2][0][2] = math.inf
    moved = fresh_step(TRITON, leaves, NUMBERS, AMSGRAD)
    assert moved.slots[2][0][:3].isfinite().tolist() == [False, False, False]
    assert_agrees(moved, leaves, NUMBERS, AMSGRAD)


@on_any_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_nothing_beside_the_leaves_is_written(where, dtype, shift):
    """Not in aligned memory, where whole vectors are moved, and not elsewhere."""
    guard, around = 16, []

    def guarded(shape, **options):
        buffer = torch.full((2 * guard + math.prod(shape),), 7.0, **options)
        around.append(buffer)
        return buffer[guard + shift :][: math.prod(shape)].view(shape)

    leaves = make_leaves([(1,), (1023,), (1024,), (2049,)], where, dtype, True, make=guarded)
    before = copy(leaves)
    TRITON.step_(leaves, NUMBERS, AMSGRAD)
    assert_agrees(leaves.targets, before, NUMBERS, AMSGRAD)
    for buffer in around:
        assert (buffer[: guard + shift] == 7).all()
        assert (buffer[buffer.numel() - guard + shift :] == 7).all()


def count_of(value, where) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, device=where)


@on_any_device
@pytest.mark.parametrize("in_place", [False, True])
def test_the_count_is_advanced_when_every_program_has_read_it(where, in_place):
    """In place, too, where it is written where it is read."""
    leaves = make_leaves(MANY, where)
    count = count_of(2.0, where)
    new_count = count if in_place else torch.empty_like(count)
    own = kernel.launcher(leaves, PLAIN)
    expected = copy(leaves)
    for step in (3, 4):
        outputs = leaves.targets
        own.step(leaves, outputs, NUMBERS._replace(step=count), new_count=new_count)
        TRITON.step_(expected, NUMBERS._replace(step=step), PLAIN)
        assert_same_bits(flat(leaves.targets), flat(expected.targets))
        assert new_count.item() == step
        assert count.item() == (step if in_place else step - 1)
        count, new_count = new_count, (new_count if in_place else torch.empty_like(count))


@on_any_device
@pytest.mark.parametrize("told", [None, True, False])
def test_the_count_is_advanced_where_there_is_nothing_to_move(where, told):
    leaves = make_leaves([(0,), (3, 0)], where)
    applies = None if told is None else torch.tensor(told, device=where)
    count = count_of(2.0, where)
    numbers = NUMBERS._replace(step=count)
    kernel.launcher(leaves, PLAIN).step(leaves, leaves.targets, numbers, count, applies)
    assert count.item() == (2 if told is False else 3)


def copies_with_payloads(leaves: StepInputs) -> StepInputs:
    """Put into each tensor a NaN whose bits say more than that it is one."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for tensor in flat(leaves.targets):
        nan = torch.tensor(math.nan, dtype=tensor.dtype).view(bits[tensor.dtype.itemsize]) + 5
        tensor.view(bits[tensor.dtype.itemsize]).view(-1)[:1] = nan.to(tensor.device)
    return copy(leaves)


def bits_of(tensors) -> list:
    return [tensor.contiguous().view(torch.uint8).tolist() for tensor in tensors]


@on_any_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_step_that_does_not_apply_leaves_all_bits_as_they_were(where, dtype, amsgrad):
    options = AMSGRAD if amsgrad else PLAIN
    leaves = make_leaves([(3,), (2, 1030), (0,)], where, dtype, amsgrad)
    before = copies_with_payloads(leaves)
    count, applies = count_of(2.0, where), torch.tensor(False, device=where)
    numbers = NUMBERS._replace(step=count)
    own = kernel.launcher(leaves, options)
    moved = copy(leaves).targets
    for tensor in flat(moved):
        tensor.fill_(7)
    new_count = torch.zeros_like(count)
    own.step(leaves, moved, numbers, new_count, applies)
    assert bits_of(flat(moved)) == bits_of(flat(before.targets))
    assert new_count.item() == 2
    own.step(leaves, leaves.targets, numbers, count, applies)
    assert bits_of(flat(leaves)) == bits_of(flat(before))
    assert count.item() == 2


@on_any_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_that_applies_is_the_same_as_any_other(where, dtype):
    leaves = make_leaves([(3,), (2, 1030)], where, dtype)
    expected = fresh_step(TRITON, leaves, NUMBERS, PLAIN)
    count, applies = count_of(2.0, where), torch.tensor(True, device=where)
    numbers = NUMBERS._replace(step=count)
    kernel.launcher(leaves, PLAIN).step(leaves, leaves.targets, numbers, count, applies)
    assert_same_bits(flat(leaves.targets), flat(expected))
    assert count.item() == 3


@pytest.fixture
def sent(monkeypatch) -> list[int]:
    """How many words were sent to the device, for each time that any were."""
    real, lengths = kernel.sent, []

    def sending(words, device):
        lengths.append(len(words))
        return real(words, device)

    for module in (kernel, triton_arguments):
        monkeypatch.setattr(module, "sent", sending)
    monkeypatch.setattr(kernel, "_launchers", {})
    return lengths


@on_any_device
def test_a_table_is_sent_once_for_each_set_of_addresses(where, sent):
    one, other = (make_leaves([(3,), (1030,)], where) for _ in range(2))
    for step in range(1, 4):
        for leaves in (one, other):
            expected = copy(leaves)
            numbers = NUMBERS._replace(step=float(step), lr=0.1 * step)
            TRITON.step_(leaves, numbers, PLAIN)
            assert_agrees(leaves.targets, expected, numbers, PLAIN)
    assert len(sent) == 2
    one.grads[1] = one.grads[1].clone()
    expected = copy(one)
    TRITON.step_(one, NUMBERS, PLAIN)
    assert_agrees(one.targets, expected, NUMBERS, PLAIN)
    assert len(sent) == 3


@on_any_device
def test_tables_that_are_kept_are_few(where, sent):
    many = [make_leaves([(3,)], where) for _ in range(kernel.Launcher._MOST_TABLES + 1)]
    for leaves in many:
        TRITON.step_(leaves, NUMBERS, PLAIN)
    own = kernel.launcher(many[0], PLAIN)
    assert len(own._tables) == kernel.Launcher._MOST_TABLES
    TRITON.step_(many[-1], NUMBERS, PLAIN)
    assert len(sent) == len(many)
    TRITON.step_(many[0], NUMBERS, PLAIN)  # whose table was the oldest
    assert len(sent) == len(many) + 1


@on_any_device
def test_launchers_that_are_kept_are_few(where, monkeypatch):
    monkeypatch.setattr(kernel, "_launchers", {})
    for size in range(1, kernel._MOST_LAUNCHERS + 3):
        check(make_leaves([(size,)], where), NUMBERS)
        assert len(kernel._launchers) <= kernel._MOST_LAUNCHERS


@on_any_device
def test_each_stream_has_tables_of_its_own(where, sent, monkeypatch):
    """One that another stream has sent may not have arrived yet."""
    leaves = make_leaves([(3,)], where)
    streams = iter([1, 2, 1, 2])
    monkeypatch.setattr(source, "stream_of", lambda index: next(streams))
    for _ in range(4):
        TRITON.step_(leaves, NUMBERS, PLAIN)
    assert len(sent) == 2


@on_any_device
def test_dense_layouts_are_kept(where):
    def permuted(shape, **options):
        return torch.empty(shape[::-1], **options).permute(*range(len(shape))[::-1])

    check(make_leaves([(2, 3, 4), (5, 6)], where, make=permuted), NUMBERS)


@on_any_device
def test_it_serves_what_lies_where_its_numbers_do(where):
    device = torch.empty(0, device=where).device
    assert TRITON.unsupported_reason(device, None) is None
    assert (
        TRITON.unsupported_reason(device, NUMBERS._replace(lr=torch.ones((), device=where))) is None
    )
    beside = NUMBERS._replace(lr=torch.ones((), device="meta"))
    assert "lr is on meta" in TRITON.unsupported_reason(device, beside)
    assert "not meta" in TRITON.unsupported_reason(torch.device("meta"), None)


# What follows asks about the real compiler.

FAILS = types.SimpleNamespace(get_current_target=lambda: 1 / 0)
OLD = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 75, 32))
AMD = types.SimpleNamespace(get_current_target=lambda: GPUTarget("hip", "gfx942", 64))
NEW = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))


@compiled
@pytest.mark.parametrize(
    ("driver", "reason"), [(FAILS, "zero"), (OLD, "cuda 75"), (AMD, "hip gfx942"), (NEW, None)]
)
def test_it_refuses_what_triton_cannot_compile_for(driver, reason, monkeypatch):
    runtime = types.SimpleNamespace(driver=types.SimpleNamespace(active=driver))
    fake = types.SimpleNamespace(triton=types.SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(kernel, "_source", lambda: fake)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    given = kernel._unfit.__wrapped__(torch.device("cuda", 0))
    assert given is None if reason is None else reason in given


@compiled
def test_it_refuses_without_triton_and_away_from_cuda(monkeypatch):
    monkeypatch.setattr(kernel, "_source", lambda: types.SimpleNamespace(triton=None))
    unfit = kernel._unfit.__wrapped__
    assert unfit(torch.device("cuda", 0)) == "Triton cannot be imported"
    assert unfit(torch.device("cpu")) == "it serves cuda, not cpu"


COMPILED = [
    *((dtype, dtype, False) for dtype in DTYPES),
    (torch.bfloat16, torch.float32, False),
    (torch.float32, torch.bfloat16, False),
    (torch.bfloat16, torch.float32, True),
    (torch.float16, torch.float16, True),
]


@pytest.mark.by_day(1)
@compiled
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("dtype", "slot_dtype", "stochastic"), COMPILED)
def test_it_compiles_and_moves_16_bytes_at_a_time(
    dtype, slot_dtype, stochastic, amsgrad, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fixed = {
        "DTYPE": getattr(source.tl, str(dtype).removeprefix("torch.")),
        "SLOT_DTYPE": getattr(source.tl, str(slot_dtype).removeprefix("torch.")),
        "AMSGRAD": amsgrad,
        "MAXIMIZE": False,
        "STOCHASTIC": stochastic,
        "CONDITIONAL": False,
        "BLOCK": kernel._BLOCK,
    }
    given = {"table": "*i64", "leaves": "i32", "run": "i32"}
    given |= dict.fromkeys(source.step_kernel.arg_names[3 : -len(fixed)], "i64")
    program = triton.compile(
        ASTSource(source.step_kernel, given | dict.fromkeys(fixed, "constexpr"), fixed),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": triton_launch._WARPS, "enable_fp_fusion": False},
    )
    assert program.asm["cubin"]
    # What a launch by the driver goes by: each argument in its place, then two of Triton's own.
    entry = program.asm["ptx"].partition(".entry")[2].partition(")")[0]
    assert re.findall(r"\.param \.(\w+)", entry) == ["u64", "u32", "u32", *["u64"] * 14]
    wide = re.findall(r"(ld|st)\.global\S*\.(?:v4\.b32|v2\.b64)", program.asm["ptx"])
    # A thread's elements of a block, in vectors of 16 bytes.
    vectors = kernel._BLOCK * dtype.itemsize // (32 * triton_launch._WARPS * 16)
    slot_vectors = kernel._BLOCK * slot_dtype.itemsize // (32 * triton_launch._WARPS * 16)
    assert wide.count("ld") == 2 * vectors + (3 if amsgrad else 2) * slot_vectors
    assert wide.count("st") == vectors + (3 if amsgrad else 2) * slot_vectors
    assert "fma.rn.f32" not in program.asm["ptx"]


@on_any_device
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gradient transposed"])
def test_an_update_is_one_launch(where, launches, layout):
    params = {"a": torch.randn(5, device=where), "b": torch.randn(3, 2, device=where)}
    grads = {"a": torch.randn(5, device=where), "b": torch.randn(3, 2, device=where)}
    if layout == "transposed":
        params["b"], grads["b"] = torch.randn(2, 3).T.to(where), torch.randn(2, 3).T.to(where)
    if layout == "gradient transposed":
        grads["b"] = torch.randn(2, 3).to(where).T
    expected = updated(AdamW(lr=0.1, kernel="plain"), grads, params)
    results = updated(AdamW(lr=0.1, kernel="triton"), grads, params)
    assert len(launches) == 1
    assert_trees_agree(results, expected)


@on_any_device
def test_a_sweep_is_one_launch(where, launches):
    rates = torch.tensor([0.1, 0.2, 0.3], device=where)
    params = {"a": torch.randn(3, 5, device=where), "b": torch.randn(3, 2, 2, device=where)}
    sweep = torch.func.vmap(updated)
    expected = sweep(AdamW(lr=rates, kernel="plain"), params, params)
    results = sweep(AdamW(lr=rates, kernel="triton"), params, params)
    assert len(launches) == 1
    assert_trees_agree(results, expected)


DECIDING = {
    "LossScale": lambda inner: LossScale(inner, init_scale=4.0),
    "SkipNonfinite": SkipNonfinite,
    "Clip": lambda inner: Clip(inner, 0.5, nonfinite="skip"),
    "LossScale, Clip": lambda inner: LossScale(Clip(inner, 0.5), init_scale=4.0),
}


@on_any_device
@pytest.mark.parametrize("name", DECIDING)
def test_a_wrapper_that_decides_is_one_launch(where, launches, name, monkeypatch):
    params = {"a": torch.randn(5, device=where), "b": torch.randn(3, 700, device=where)}
    right_params = {key: leaf.cpu() for key, leaf in params.items()}
    right, opt = (DECIDING[name](AdamW(lr=0.1, kernel=k)) for k in ("plain", "triton"))
    right_state = right.init(right_params)
    calls = []
    for bad in (None, math.nan, None):
        calls.append({key: torch.randn(leaf.shape) for key, leaf in right_params.items()})
        if bad is not None:
            calls[-1]["b"][0, 1] = bad
    expected = [(right_params, right_state)]
    for grads in calls:
        expected.append(right.update(grads, expected[-1][1], expected[-1][0]))
    monkeypatch.setattr(transforms, "on_host", lambda _: False)  # as it is on a GPU
    state = opt.init(params)
    mine = (copy_of(params), copy_of(state))
    for grads, trees in zip(calls, expected[1:], strict=True):
        own = {key: grad.to(where) for key, grad in grads.items()}
        before = params
        params, state = opt.update(own, state, params)
        assert_trees_agree((params, state), trees)
        opt.update_(own, mine[1], mine[0])
        assert_same_bits(mine, (params, state))
        if not own["b"].isfinite().all():
            assert_same_bits(params, before)
    assert len(launches) == 2 * len(calls)


def copy_of(tree):
    return tree_map(torch.clone, tree)


def updated(opt, grads, params):
    return opt.update(grads, opt.init(params), params)


def assert_trees_agree(results, expected):
    for one, other in zip(leaves_of(results), leaves_of(expected), strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=1e-6, atol=1e-6, equal_nan=True)
