"""RAdam: torch's bits, its first steps by hand, and its derivatives."""

from functools import partial

import pytest
import torch
from torch.func import grad

from funcopt import RAdam
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
    run_with_skipped_leaves,
)

KERNELS = ("plain", "foreach")
OPTIONS = crossed(
    decoupled_weight_decay=(False, True), maximize=(False, True), weight_decay=(0.0, 0.1)
)


def torchs(params, foreach=False, fused=False, **options):
    """The plain one, whatever the kernel: from its bits those of torch's foreach one differ."""
    return torch.optim.RAdam(params, foreach=False, **options)


@pytest.mark.by_day(20)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_are_torchs_over_100_steps(options, kernel, dtype):
    state, theirs = assert_torchs_bits(RAdam, torchs, options, kernel, dtype)
    for name in ("exp_avg", "exp_avg_sq"):
        assert_same_bits(getattr(state, name), [own[name] for own in theirs])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("beta2", [0.0, 0.5, 2 / 3, 0.8, 0.99999])
def test_bits_are_torchs_for_other_numbers(beta2, kernel):
    options = {"lr": 0.3, "eps": 1e-3, "betas": (0.5, beta2)}
    assert_torchs_bits(RAdam, torchs, options, kernel, torch.float64)


def test_the_first_steps_are_as_by_hand():
    opt = RAdam(lr=0.5, betas=(0.5, 0.999), eps=1.0, weight_decay=0.5)
    param = number([2.0, 0.0])
    param, state = opt.update(number([3.0, 0.0]), opt.init(param), param)
    assert state.exp_avg.tolist() == [2.0, 0.0]  # half of 3 + 0.5 * 2
    assert_close(state.exp_avg_sq, number([0.016, 0.0]))
    assert param.tolist() == [2 - 0.5 * 4, 0.0]
    # From the sixth step on it is divided: rho of 5 is 4.996, that of 6 is 5.994.
    opt = RAdam(lr=1.0, eps=1e-30)
    param, state, moved = number([0.0]), opt.init(number([0.0])), []
    for _ in range(6):
        new, state = opt.update(number([100.0]), state, param)
        moved.append(float(param - new))
        param = new
    assert moved[:5] == pytest.approx([100.0] * 5)
    rho_inf = 2 / 0.001 - 1
    rho = rho_inf - 12 * 0.999**6 / (1 - 0.999**6)
    squared = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    assert moved[5] == pytest.approx(squared**0.5)


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_leaves_are_computed_in_float32(dtype, kernel):
    opt = RAdam(lr=0.1, weight_decay=0.1, kernel=kernel)
    assert_16_bit_steps_match(opt, oracles.radam, dtype, 9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_step_per_leaf_counts_skipped_leaves_as_torch_does(kernel):
    torchs = partial(torch.optim.RAdam, lr=0.1, weight_decay=0.1, foreach=False)
    opt = RAdam(lr=0.1, weight_decay=0.1, kernel=kernel, step_per_leaf=True)
    theirs, ours, state = run_with_skipped_leaves(torchs, opt)
    assert_same_bits(ours, theirs)
    assert [int(step) for step in state.step] == [8, 8, 0]


def test_tensors_and_schedules_give_the_bits_of_the_numbers():
    params = [torch.randn(3, 4), torch.randn(())]
    gradients = [random_like(params) for _ in range(9)]
    expected = run(RAdam(0.1, (0.8, 0.9), 1e-3, 0.1), params, gradients)
    tensors = RAdam(number(0.1), (number(0.8), number(0.9)), number(1e-3), number(0.1))
    assert_same_bits(run(tensors, params, gradients), expected)
    betas = (lambda step: 0.8, lambda step: 0.9)
    schedules = RAdam(lambda step: 0.1, betas, lambda step: 1e-3, lambda step: 0.1)
    assert_same_bits(run(schedules, params, gradients), expected)


@pytest.mark.parametrize(
    "opt",
    [
        RAdam(lr=0.1, weight_decay=0.1, maximize=True),
        RAdam(
            lr=torch.tensor([0.1, 0.2, 0.3]),
            betas=(torch.tensor([0.0, 0.5, 0.9]), torch.tensor([0.5, 0.8, 0.99])),
            eps=1e-3,
            weight_decay=torch.tensor([0.0, 0.1, 0.2]),
            decoupled_weight_decay=True,
        ),
    ],
    ids=str,
)
def test_a_vmap_is_a_loop(opt):
    assert_vmap_is_loop(opt, steps=8, rtol=1e-2, atol=1e-2)


def test_a_count_that_is_not_read_divides_from_the_same_step_on():
    """Where operators are traced, the count is a tensor."""
    opt, param, state = RAdam(lr=0.1), torch.randn(5), RAdam().init(torch.randn(5))
    step = torch.compile(opt.update, backend="eager", fullgraph=True)
    traced, traced_state = param, state
    for _ in range(8):
        gradient = torch.randn(5)
        param, state = opt.update(gradient, state, param)
        traced, traced_state = step(gradient, traced_state, traced)
        torch.testing.assert_close(traced, param)


BETAS = {"never divided": number([0.1, 0.8, 0.6, 0.05]), "divided": number([0.1, 0.8, 0.99, 0.05])}


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("name", BETAS)
def test_derivatives_are_those_of_differences_in_every_mode(name, decoupled):
    assert_derivatives_are_those_of_differences(
        lambda lr, beta1, beta2, decay: RAdam(
            lr, (beta1, beta2), 1e-1, decay, decoupled_weight_decay=decoupled
        ),
        BETAS[name],
        steps=3 if name == "never divided" else 8,
    )


@pytest.mark.parametrize("steps", [1, 7])
def test_a_derivative_where_all_is_zero_is_finite(steps):
    def moved(gradient):
        opt, param = RAdam(lr=0.1, eps=0.5), torch.zeros_like(gradient)
        return run(opt, param, [gradient] * steps)[0].sum()

    found = grad(moved)(number([0.0, 0.0]))
    assert found.isfinite().all()
    assert (found < 0).all()


def test_bad_options_are_refused_with_their_value():
    with pytest.raises(
        ValueError, match=r"betas\[1\]=1.0: betas\[1\] must be at least 0 and below"
    ):
        RAdam(betas=(0.9, 1.0))
    with pytest.raises(TypeError, match="decoupled_weight_decay=1: must be True or False"):
        RAdam(decoupled_weight_decay=1)
    with pytest.raises(ValueError, match="must be one of auto, foreach, plain"):
        RAdam(kernel="fused")
