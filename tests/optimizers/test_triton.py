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

from funcopt import AdamW
from funcopt._core import tensors
from funcopt._engine import dispatch
from funcopt._engine.rule import StepInputs
from funcopt.optimizers._adam import triton as kernel

from .. import oracle
from ..cases import assert_same_bits
from ..cases import leaves as leaves_of

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
    expected = dispatch.step(RULE, leaves, numbers, options)
    for one, other in zip(flat(moved), flat(expected), strict=True):
        assert one.stride() == other.stride()
        bound = TOLERANCE[one.dtype]
        torch.testing.assert_close(one, other, rtol=bound, atol=bound, equal_nan=True)


def check(leaves: StepInputs, numbers, options=PLAIN) -> None:
    assert_agrees(TRITON.step(leaves, numbers, options), leaves, numbers, options)


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    """How many programs each launch had."""
    real, grids = source.step_kernel, []

    class Counting:
        def __getitem__(self, grid):
            grids.append(*grid)
            return real[grid]

    monkeypatch.setattr(source, "step_kernel", Counting())
    return grids


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
        moved = TRITON.step(leaves, numbers, PLAIN)
        if name == "nearly endless memory":
            # The plain kernel's own digits are lost there; those of the moments are not.
            moved = moved._replace(params=dispatch.step(RULE, leaves, numbers, PLAIN).params)
        assert_agrees(moved, leaves, numbers, PLAIN)


@on_any_device
def test_bias_corrections_have_all_digits(where):
    @triton.jit
    def differences(betas, steps, results):
        i = source.tl.program_id(0)
        beta, step = source.tl.load(betas + i), source.tl.load(steps + i)
        source.tl.store(results + i, source._one_minus_power(beta, step))

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
        TRITON.step(leaves, numbers, PLAIN),
        dispatch.step(RULE, leaves, numbers, PLAIN),
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


@on_any_device
@pytest.mark.parametrize("weight_decay", [0.0, 0.5, 4.9, 5.0, 10.0, 20.0])
def test_a_step_keeps_its_digits_whatever_the_weight_decay(where, weight_decay):
    leaves = make_leaves([(7,)], where)
    leaves.params[0].mul_(1e6)
    param, grad, exp_avg, exp_avg_sq = (column[0].double() for column in leaves.columns)
    before = oracle.OracleState(NUMBERS.step - 1, exp_avg, exp_avg_sq, exp_avg_sq)
    expected, _ = oracle.update(grad, before, param, lr=0.1, weight_decay=weight_decay)
    moved = TRITON.step(leaves, NUMBERS._replace(weight_decay=weight_decay), PLAIN)
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
    moved = TRITON.step(leaves, NUMBERS._replace(beta1=0.0), PLAIN)
    assert_same_bits(moved.slots[0], leaves.grads)


@on_any_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("told", ["as a number", "as a tensor"])
def test_gradients_are_multiplied_on_the_way_and_left_as_they_are(where, dtype, told):
    leaves = make_leaves([(5, 3), (1030,)], where, dtype)
    factor = 0.3 if told == "as a number" else torch.tensor(0.3, dtype=torch.float64, device=where)
    before = [grad.clone() for grad in leaves.grads]
    moved = TRITON.step(leaves, NUMBERS._replace(grad_scale=factor), PLAIN)
    assert_same_bits(leaves.grads, before)
    multiplied = leaves._replace(grads=tensors.scaled(leaves.grads, 0.3))
    assert_agrees(moved, multiplied, NUMBERS, PLAIN)


MANY = [(), (0,), (1,), (1023,), (1024,), (3, 0), (1025,), (5000,), (2, 3, 4), (20, 500), (0,)]


@on_any_device
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("enough", [4096, 4])
def test_many_leaves_take_one_launch(where, amsgrad, enough, launches, monkeypatch):
    monkeypatch.setattr(kernel, "_ENOUGH_PROGRAMS", enough)
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
@pytest.mark.parametrize("name", ["all of their own", "crossed"])
def test_numbers_from_elsewhere_are_told_by_value(where, name, monkeypatch):
    real, elsewhere = kernel._values, torch.device("meta")
    monkeypatch.setattr(kernel, "_values", lambda number, lead, _: real(number, lead, elsewhere))
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
    moved = TRITON.step(leaves, NUMBERS, AMSGRAD)
    assert_same_bits(flat(leaves), flat(before))
    places = [t.untyped_storage().data_ptr() for t in (*flat(leaves), *flat(moved))]
    assert len(set(places)) == len(places)


@on_any_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_in_place_gives_the_same_bits(where, dtype, amsgrad):
    options = AMSGRAD if amsgrad else PLAIN
    leaves = make_leaves([(), (2, 1030)], where, dtype, amsgrad)
    moved = TRITON.step(leaves, NUMBERS, options)
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
    moved = TRITON.step(leaves, NUMBERS, AMSGRAD)
    assert_agrees(moved, leaves, NUMBERS, AMSGRAD)
    assert all(not tensor.any() for column in moved.slots for tensor in column)


@on_any_device
def test_what_is_not_finite_stays_so(where):
    leaves = make_leaves([(5,)], where, amsgrad=True)
    leaves.grads[0][0] = math.nan
    leaves.slots[2][0][1] = math.nan
    leaves.slots[2][0][2] = math.inf
    moved = TRITON.step(leaves, NUMBERS, AMSGRAD)
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
compiled = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under the interpreter")

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


@pytest.mark.by_day(1)
@compiled
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_compiles_and_moves_16_bytes_at_a_time(dtype, amsgrad, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fixed = {
        "DTYPE": getattr(source.tl, str(dtype).removeprefix("torch.")),
        "AMSGRAD": amsgrad,
        "MAXIMIZE": False,
        "BLOCK": kernel._BLOCK,
    }
    given = {"table": "*i64", "leaves": "i32", "run": "i32"}
    program = triton.compile(
        ASTSource(source.step_kernel, given | dict.fromkeys(fixed, "constexpr"), fixed),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": kernel._WARPS, "enable_fp_fusion": False},
    )
    assert program.asm["cubin"]
    wide = re.findall(r"(ld|st)\.global\S*\.(?:v4\.b32|v2\.b64)", program.asm["ptx"])
    # A thread's elements of a block, in vectors of 16 bytes.
    vectors = kernel._BLOCK * dtype.itemsize // (32 * kernel._WARPS * 16)
    assert wide.count("ld") == (5 if amsgrad else 4) * vectors
    assert wide.count("st") == (4 if amsgrad else 3) * vectors
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


def updated(opt, grads, params):
    return opt.update(grads, opt.init(params), params)


def assert_trees_agree(results, expected):
    for one, other in zip(leaves_of(results), leaves_of(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
