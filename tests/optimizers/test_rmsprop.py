"""RMSprop: torch's bits, its first step by hand, and its derivatives."""

import pytest
import torch

from funcopt import RMSprop
from funcopt.testing import oracles

from ..cases import assert_close, assert_same_bits, random_like
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
    momentum=(0.0, 0.9), centered=(False, True), maximize=(False, True), weight_decay=(0.0, 0.1)
)


def torchs(params, fused=False, **options):
    """It has no fused kernel, nor an argument for one."""
    return torch.optim.RMSprop(params, **options)


@pytest.mark.by_day(20)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_are_torchs_over_100_steps(options, kernel, dtype):
    state, theirs = assert_torchs_bits(RMSprop, torchs, options, kernel, dtype)
    for name in theirs[0].keys() - {"step"}:
        assert_same_bits(getattr(state, name), [own[name] for own in theirs])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", [{"alpha": 0.5, "eps": 1e-3}, {"alpha": 1.0}], ids=str)
def test_bits_are_torchs_for_other_numbers(options, kernel):
    assert_torchs_bits(RMSprop, torchs, options, kernel, torch.float64)


def test_the_first_step_is_as_by_hand():
    opt = RMSprop(lr=0.5, alpha=0.75, eps=1.0, weight_decay=0.25, momentum=0.5)
    param = number([4.0, 0.0])
    param, state = opt.update(number([3.0, 0.0]), opt.init(param), param)
    assert state.square_avg.tolist() == [4.0, 0.0]  # a quarter of (3 + 0.25 * 4)**2
    assert_close(state.momentum_buffer, number([4 / 3, 0.0]))
    assert_close(param, number([4 - 0.5 * 4 / 3, 0.0]))
    assert state.grad_avg == ()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_variance_below_zero_by_rounding_is_zero(kernel):
    """Torch gives NaN here: mean of squares minus square of mean is -1.5e-8 in float32."""
    opt = RMSprop(lr=0.1, alpha=0.5, eps=1e-3, centered=True, kernel=kernel)
    param = torch.zeros(1000)
    grads = torch.linspace(0.1, 10.0, 1000)
    theirs = torch.nn.Parameter(param.clone())
    torchs_opt = torchs([theirs], lr=0.1, alpha=0.5, eps=1e-3, centered=True)
    state = opt.init(param)
    for _ in range(40):
        theirs.grad = grads
        torchs_opt.step()
        param, state = opt.update(grads, state, param)
    assert theirs.isnan().any()
    assert param.isfinite().all()


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_leaves_are_computed_in_float32(dtype, kernel):
    opt = RMSprop(lr=0.1, weight_decay=0.1, momentum=0.9, kernel=kernel)
    assert_16_bit_steps_match(opt, oracles.rmsprop, dtype, 3)


def test_tensors_and_schedules_give_the_bits_of_the_numbers():
    params = [torch.randn(3, 4), torch.randn(())]
    gradients = [random_like(params) for _ in range(5)]
    given = (0.1, 0.9, 1e-3, 0.1, 0.5)
    expected = run(RMSprop(*given), params, gradients)
    assert_same_bits(run(RMSprop(*map(number, given)), params, gradients), expected)
    schedules = [lambda step, value=value: value for value in given]
    assert_same_bits(run(RMSprop(*schedules), params, gradients), expected)


@pytest.mark.parametrize(
    "opt",
    [
        RMSprop(lr=0.1, weight_decay=0.1, maximize=True),
        RMSprop(
            lr=torch.tensor([0.1, 0.2, 0.3]),
            alpha=torch.tensor([0.5, 0.9, 0.99]),
            eps=1e-2,
            momentum=torch.tensor([0.0, 0.5, 0.9]),
        ),
    ],
    ids=str,
)
def test_a_vmap_is_a_loop(opt):
    assert_vmap_is_loop(opt, rtol=1e-2, atol=1e-2)


BUILDERS = {
    "momentum": lambda lr, alpha, momentum, decay: RMSprop(lr, alpha, 1e-2, decay, momentum),
    "centered": lambda lr, alpha, eps, decay: RMSprop(
        lr, alpha, eps, decay, centered=True, maximize=True
    ),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_derivatives_are_those_of_differences_in_every_mode(name):
    assert_derivatives_are_those_of_differences(BUILDERS[name], number([0.1, 0.8, 0.6, 0.05]))


@pytest.mark.parametrize("centered", [False, True])
def test_a_derivative_where_all_is_zero_is_finite(centered):
    def moved(gradient):
        opt = RMSprop(lr=0.1, eps=0.5, centered=centered)
        param = torch.zeros_like(gradient)
        return opt.update(gradient, opt.init(param), param)[0].sum()

    # The step is g / (sqrt(v) + eps), and v is of the second order in g.
    assert_close(torch.func.grad(moved)(number([0.0, 0.0])), number([-0.2, -0.2]))


def test_bad_options_are_refused_with_their_value():
    with pytest.raises(ValueError, match=r"alpha=1.5: alpha must be at least 0 and at most 1"):
        RMSprop(alpha=1.5)
    with pytest.raises(TypeError, match="centered=1: must be True or False"):
        RMSprop(centered=1)
    with pytest.raises(ValueError, match="must be one of auto, foreach, plain"):
        RMSprop(kernel="fused")
