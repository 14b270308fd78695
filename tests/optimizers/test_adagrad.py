"""Adagrad: torch's bits, its first steps by hand, what its sums begin with, and its derivatives."""

import pytest
import torch
from torch.func import grad, vmap

from funcopt import Adagrad, Clip
from funcopt.testing import oracles

from ..cases import assert_close, assert_same_bits, random_like, tree_map
from .common import (
    assert_16_bit_steps_match,
    assert_derivatives_are_those_of_differences,
    assert_torchs_bits,
    assert_vmap_is_loop,
    crossed,
    number,
    run,
)

KERNELS = ("plain", "foreach")
OPTIONS = crossed(
    lr_decay=(0.0, 0.1),
    initial_accumulator_value=(0.0, 0.1),
    maximize=(False, True),
    weight_decay=(0.0, 0.1),
)


@pytest.mark.by_day(20)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_are_torchs_over_100_steps(options, kernel, dtype):
    state, theirs = assert_torchs_bits(Adagrad, torch.optim.Adagrad, options, kernel, dtype)
    assert_same_bits(state.sum, [own["sum"] for own in theirs])


@pytest.mark.parametrize("kernel", KERNELS)
def test_bits_are_torchs_for_other_numbers(kernel):
    options = {"lr": 0.3, "eps": 1e-3, "lr_decay": 1.0}
    assert_torchs_bits(Adagrad, torch.optim.Adagrad, options, kernel, torch.float64)


def test_the_first_steps_are_as_by_hand():
    opt = Adagrad(lr=1.0, lr_decay=0.5, eps=1.0, weight_decay=0.5, initial_accumulator_value=9.0)
    param = number([2.0, 0.0])
    param, state = opt.update(number([3.0, 0.0]), opt.init(param), param)
    assert state.sum.tolist() == [9 + 16, 9]  # the square of 3 + 0.5 * 2
    assert_close(param, number([2 - 4 / (5 + 1), 0.0]))
    before = param
    param, state = opt.update(number([0.0, 4.0]) - 0.5 * param, state, param)
    assert_close(state.sum, number([25.0, 25.0]))
    assert_close(param - before, number([0.0, -4 / (5 + 1) / 1.5]))


def test_the_sums_begin_with_the_given_value():
    params = [torch.ones(2, 3).t(), torch.ones(2, dtype=torch.complex64), torch.ones(2).bfloat16()]
    state = Adagrad(initial_accumulator_value=0.5).init(params)
    assert_same_bits(state.sum[0], torch.full((2, 3), 0.5).t())
    assert state.sum[0].stride() == params[0].stride()
    assert state.sum[1].tolist() == [0.5 + 0.5j] * 2
    assert_same_bits(state.sum[2], torch.full((2,), 0.5))
    assert_same_bits(Clip(Adagrad(initial_accumulator_value=0.5), 1.0).init(params).inner, state)
    values = torch.tensor([0.0, 0.5])
    each = vmap(lambda value: Adagrad(initial_accumulator_value=value).init(params))(values)
    assert_same_bits(tree_map(lambda leaf: leaf[1], each.sum), state.sum)


def test_what_the_sums_begin_with_has_a_derivative():
    def moved(value):
        opt = Adagrad(lr=1.0, eps=0.0, initial_accumulator_value=value)
        param = number([0.0])
        return opt.update(number([3.0]), opt.init(param), param)[0].sum()

    assert_close(grad(moved)(number(16.0)), number(0.5 * 3 / 25**1.5))


def test_step_per_leaf_decays_as_torch_does():
    params = [torch.randn(3), torch.randn(2)]
    gradients = [[torch.randn(3), None if i % 2 else torch.randn(2)] for i in range(6)]
    theirs = [torch.nn.Parameter(param.clone()) for param in params]
    torchs = torch.optim.Adagrad(theirs, lr=0.1, lr_decay=0.5, foreach=False)
    for grads in gradients:
        for param, own in zip(theirs, grads, strict=True):
            param.grad = None if own is None else own.clone()
        torchs.step()
    opt = Adagrad(lr=0.1, lr_decay=0.5, step_per_leaf=True)
    assert_same_bits(run(opt, params, gradients)[0], [param.detach() for param in theirs])


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_leaves_are_computed_in_float32(dtype, kernel):
    opt = Adagrad(lr=0.1, weight_decay=0.1, lr_decay=0.1, kernel=kernel)
    assert_16_bit_steps_match(opt, oracles.adagrad, dtype, 3)


def test_tensors_and_schedules_give_the_bits_of_the_numbers():
    params = [torch.randn(3, 4), torch.randn(())]
    gradients = [random_like(params) for _ in range(5)]
    expected = run(Adagrad(0.1, 0.5, 0.1, 0.2, 1e-3), params, gradients)
    assert_same_bits(
        run(Adagrad(*map(number, (0.1, 0.5, 0.1, 0.2, 1e-3))), params, gradients), expected
    )
    schedules = Adagrad(
        lambda step: 0.1, lambda step: 0.5, lambda step: 0.1, 0.2, lambda step: 1e-3
    )
    assert_same_bits(run(schedules, params, gradients), expected)


@pytest.mark.parametrize(
    "opt",
    [
        Adagrad(lr=0.1, weight_decay=0.1, maximize=True),
        Adagrad(
            lr=torch.tensor([0.1, 0.2, 0.3]),
            lr_decay=torch.tensor([0.0, 0.5, 0.9]),
            initial_accumulator_value=torch.tensor([0.0, 0.5, 1.0]),
        ),
    ],
    ids=str,
)
def test_a_vmap_is_a_loop(opt):
    assert_vmap_is_loop(opt, rtol=1e-2, atol=1e-2)


def test_derivatives_are_those_of_differences_in_every_mode():
    assert_derivatives_are_those_of_differences(
        lambda lr, lr_decay, decay, first: Adagrad(lr, lr_decay, decay, first, eps=1e-2),
        number([0.1, 0.8, 0.6, 0.5]),
    )


def test_a_derivative_where_all_is_zero_is_finite():
    def moved(gradient):
        opt = Adagrad(lr=0.1, eps=0.5)
        param = torch.zeros_like(gradient)
        return opt.update(gradient, opt.init(param), param)[0].sum()

    assert_close(grad(moved)(number([0.0, 0.0])), number([-0.2, -0.2]))


def test_bad_options_are_refused_with_their_value():
    with pytest.raises(ValueError, match=r"initial_accumulator_value=-1.0: .* at least 0"):
        Adagrad(initial_accumulator_value=-1.0)
    with pytest.raises(TypeError, match="must be a number or a 0-dim tensor, not function"):
        Adagrad(initial_accumulator_value=lambda step: 0.1)
    with pytest.raises(ValueError, match="must be one of auto, foreach, plain"):
        Adagrad(kernel="fused")
