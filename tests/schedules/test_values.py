"""What each schedule is worth at each step: as a number, as a tensor, compiled, mapped, derived."""

import dataclasses
import fractions
import itertools

import numpy as np
import pytest
import torch
from torch.func import grad, jvp, vmap

from funcopt import AdamW
from funcopt.schedules import Constant, Cosine, Decoupled, Exponential, Join, Linear, Piecewise

from ..cases import KERNELS, leaves, tree_map
from .cases import CASES, in_tensors

STEPS = [0, 1, 2, 2.5, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 40, 2**25]
FAR = 2.0**25


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_a_number_gives_a_number_the_one_worked_out_by_hand(name):
    schedule, expected, _ = CASES[name]
    for step in STEPS:
        assert type(schedule(step)) is float
        assert schedule(step) == pytest.approx(expected(step), rel=1e-13, abs=1e-15), step


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_a_tensor_gives_a_float64_tensor_of_the_same_value(name, dtype):
    schedule = CASES[name].schedule
    for step in STEPS:
        given = torch.tensor(step).to(dtype)
        got = schedule(given)
        assert (got.dtype, got.shape) == (torch.float64, ())
        assert got.item() == pytest.approx(schedule(given.item()), rel=1e-14, abs=1e-16), step


@pytest.mark.parametrize("in_tensor", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_row_of_steps_gives_a_row_of_values(name, in_tensor):
    schedule = CASES[name].schedule
    of_tensors = in_tensors(schedule) if in_tensor else schedule
    curve = of_tensors(torch.tensor(STEPS).reshape(4, 4))
    assert curve.shape == (4, 4)
    expected = f64([schedule(step) for step in STEPS]).reshape(4, 4)
    torch.testing.assert_close(curve, expected, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("name", CASES)
def test_numbers_that_are_tensors_give_the_same_values(name):
    schedule = CASES[name].schedule
    for step in STEPS:
        for given in (step, f64(float(step))):
            value = in_tensors(schedule)(given)
            assert (value.dtype, value.shape) == (torch.float64, ())
            assert value.item() == pytest.approx(schedule(step), rel=1e-14, abs=1e-16)


@pytest.mark.parametrize("name", CASES)
def test_the_step_is_left_as_it_is_and_the_value_is_in_memory_of_its_own(name):
    for schedule in (CASES[name].schedule, in_tensors(CASES[name].schedule)):
        step = f64(3.0)
        value = schedule(step)
        assert step == 3.0
        owners = {step.data_ptr(), *(leaf.data_ptr() for leaf in leaves(schedule))}
        assert value.data_ptr() not in owners


@pytest.mark.by_day(6)
@pytest.mark.parametrize("in_tensor", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_one_graph_serves_every_step(name, in_tensor):
    torch._dynamo.reset()
    schedule = CASES[name].schedule
    schedule = in_tensors(schedule) if in_tensor else schedule
    compiled = torch.compile(schedule.__call__, fullgraph=True, backend="aot_eager")
    try:
        for step in (0.0, 3.0, 40.0, FAR):
            value = compiled(f64(step))
            torch.compiler.set_stance("fail_on_recompile")
            torch.testing.assert_close(value, schedule(f64(step)), rtol=1e-14, atol=1e-16)
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.parametrize("name", CASES)
def test_a_vmap_over_numbers_and_steps_is_a_loop(name):
    schedule = CASES[name].schedule
    stacked = in_tensors(schedule, lambda value: value * f64([1.0, 0.95, 0.9]))
    steps = f64([0.0, 6.0, FAR])
    members = [tree_map(lambda t, i=i: t[i], stacked) for i in range(3)]
    for mapped, own in [
        (
            vmap(lambda s, t: s(t))(stacked, steps),
            [m(t) for m, t in zip(members, steps, strict=True)],
        ),
        (vmap(lambda s: s(steps[1]))(stacked), [m(steps[1]) for m in members]),
        (vmap(lambda s: s(6))(stacked), [m(6) for m in members]),
        (vmap(members[1])(steps), [members[1](t) for t in steps]),
        (vmap(schedule)(steps), [schedule(t) for t in steps]),
    ]:
        torch.testing.assert_close(mapped, torch.stack(own), rtol=1e-14, atol=1e-16)


def between(boundaries):
    """Steps at which a schedule is smooth: half a step, and most of one, away from the knots."""
    steps = [0.5, 2.2, 5.3, 7.7, 8.6, 11.5, 14.5, 31.0]
    return [s for s in steps if all(abs(s - knot) > 0.05 for knot in boundaries)]


@pytest.mark.parametrize("name", CASES)
def test_the_derivative_in_step_and_numbers_is_that_of_finite_differences(name):
    schedule, _, boundaries = CASES[name]
    parameters = in_tensors(schedule)
    inputs = tuple(leaf.clone().requires_grad_() for leaf in leaves(parameters))

    def value(step, *numbers):
        rest = iter(numbers)
        return tree_map(lambda _: next(rest), parameters)(step)

    for step in between(boundaries):
        operands = (f64(step).requires_grad_(), *inputs)
        torch.autograd.gradcheck(value, operands, check_forward_ad=True)


@pytest.mark.parametrize("name", CASES)
def test_the_derivative_is_finite_at_every_knot_and_beyond_the_end(name):
    schedule, _, boundaries = CASES[name]
    for step in {0.0, *boundaries, 8.0, 12.0, 40.0, FAR}:
        slope = grad(lambda s, t: s(t), argnums=(0, 1))(in_tensors(schedule), f64(float(step)))
        assert all(leaf.isfinite() for leaf in leaves(slope)), step
        assert grad(schedule)(f64(float(step))).isfinite(), step
        value, tangent = jvp(schedule, (f64(float(step)),), (f64(1.0),))
        assert value.isfinite()
        assert tangent.isfinite()


def test_at_a_boundary_the_derivative_is_that_of_what_follows():
    rise = Linear(0.0, 1.0, steps=4)
    assert [grad(rise)(f64(step)).item() for step in (0.0, 3.9, 4.0)] == [0.25, 0.25, 0.0]
    there_and_back = Piecewise((0.0, 1.0, 0.0), (4, 12), shape="linear")
    assert grad(there_and_back)(f64(4.0)) == -0.125


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "sqrt"])
def test_values_at_boundaries_are_exactly_those_given_and_flat_is_flat(shape):
    schedule = Piecewise((0.1, 0.7, 0.7, 0.3), (3, 7, 11), shape=shape)
    assert [schedule(step) for step in (0, 3, 7, 11, 12, 2**25)] == [0.1, 0.7, 0.7, 0.3, 0.3, 0.3]
    assert {schedule(step) for step in (3, 4, 5, 6)} == {0.7}


@pytest.mark.parametrize("name", CASES)
def test_no_value_is_below_zero(name):
    for step in itertools.chain(range(60), (v / 7 for v in range(100))):
        assert CASES[name].schedule(step) >= 0


def test_a_tensor_below_zero_that_is_not_read_is_taken_for_zero():
    for case in CASES.values():
        first = pytest.approx(case.schedule(0))
        assert case.schedule(f64([-3.0])) == first
        assert vmap(case.schedule)(f64([-3.0])) == first


def test_without_a_warmup_the_first_value_is_the_peak():
    assert Cosine(peak=0.3, steps=10)(0) == 0.3
    assert Cosine(peak=0.3, steps=10)(f64(0.0)) == 0.3
    warmup = f64(0.0)
    assert grad(lambda w: Cosine(0.3, 10, warmup_steps=w)(f64(2.0)))(warmup).isfinite()


def test_each_joined_schedule_counts_from_its_own_boundary_and_is_asked_for_nothing_else():
    asked = [[], []]

    def noted(index):
        def schedule(step):
            asked[index].append(step.item())
            return 1 / (5 - step) if index == 0 else 1 / (1 + step)

        return schedule

    joined = Join((noted(0), noted(1)), boundaries=(5,))
    values = [joined(f64(step)).item() for step in (0.0, 4.0, 5.0, 7.0)]
    assert values == [1 / 5, 1.0, 1.0, 1 / 3]
    assert asked == [[0.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]]
    assert grad(joined)(f64(5.0)) == -1.0


def test_a_joined_function_may_return_a_number_or_a_tensor_of_any_dtype():
    joined = Join((lambda step: 0.1, lambda step: torch.tensor(0.5)), boundaries=(5,))
    for step, expected in ((0.0, 0.1), (5.0, 0.5)):
        for value in (joined(f64(step)), joined(f64([step]))):
            assert (value.dtype, value.item()) == (torch.float64, expected)


@pytest.mark.parametrize("in_tensor", [False, True])
def test_decoupled_is_finite_and_falls_with_the_learning_rate_where_the_quotient_overflows(
    in_tensor,
):
    lr = Exponential(1e-3, 0.5)
    schedule = Decoupled(0.1, lr)
    schedule = in_tensors(schedule) if in_tensor else schedule
    steps = [1000, 1013, 1018, 1040, 1064, 1065]
    values = [float(schedule(step)) for step in steps]
    taken = [value * lr(step) for value, step in zip(values, steps, strict=True)]
    # 1e-3 * 2**-1013 is 1.1e-308, of which 0.1 is 9e306 times as much, and float64 holds it.
    assert taken[:2] == pytest.approx([0.1, 0.1], rel=1e-12)
    assert values[2:] == [2.0**1023] * 4
    assert taken[1] > taken[2] > taken[3] > taken[4] > 0
    assert lr(1066) == 0
    assert schedule(1066) == 0
    curve = schedule(torch.tensor([*steps, 1066]))
    torch.testing.assert_close(curve, f64([*values, 0.0]), rtol=1e-12, atol=0)
    assert vmap(schedule)(f64([float(s) for s in steps])).isfinite().all()
    slope = grad(lambda s: s(f64(1064.0)))(in_tensors(Decoupled(0.1, lr)))
    assert all(leaf == 0 for leaf in leaves(slope))


def test_decoupled_takes_nothing_beyond_the_largest_number_whatever_it_divides():
    assert Decoupled(1e300, 1e-300)(0) == 2.0**1023
    assert Decoupled(0.0, Exponential(1e-3, 0.5))(1064) == 0.0
    opt = AdamW(lr=Exponential(1e-3, 0.5), weight_decay=Decoupled(0.1, Exponential(1e-3, 0.5)))
    params = torch.ones(3)
    state = opt.init(params)._replace(step=f64(1064.0))
    for kernel in KERNELS:
        moved, _ = dataclasses.replace(opt, kernel=kernel).update(params, state, params)
        assert torch.equal(moved, params)


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_number_is_refused_with_what_to_give_instead(name):
    schedule = CASES[name].schedule
    for steps in (np.arange(10), [0, 1, 2], range(3), "3", None):
        with pytest.raises(TypeError, match=r"step is of type .* such as torch.arange\(10\)"):
            schedule(steps)
    for step in (np.int64(3), np.float32(3), fractions.Fraction(3)):
        assert schedule(step) == pytest.approx(schedule(3), rel=1e-6)


def test_decoupled_is_the_quotient_and_nothing_where_the_learning_rate_is_zero():
    schedule = Decoupled(Constant(0.02), Linear(0.0, 0.1, steps=4))
    assert schedule(0) == 0.0
    assert schedule(2) == 0.02 / 0.05
    assert schedule(f64(0.0)) == 0.0
    slope = grad(lambda s: s(f64(0.0)))(in_tensors(schedule))
    assert all(leaf.isfinite() for leaf in leaves(slope))
    assert Decoupled(0.02, 0.1)(3) == 0.02 / 0.1
