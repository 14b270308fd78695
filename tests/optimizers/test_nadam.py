"""NAdam: torch's numbers, the product of its momenta, and its derivatives."""

from functools import partial

import pytest
import torch
from torch.func import grad

from funcopt import NAdam
from funcopt.optimizers.nadam import mu_product
from funcopt.testing import oracles

from ..cases import assert_close, assert_same_bits, random_like
from .common import (
    SHAPES,
    assert_16_bit_steps_match,
    assert_derivatives_are_those_of_differences,
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


def beside_torch(options, kernel, dtype):
    """Return our leaves and torch's after each of 100 steps, and the states after the last."""
    params = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    theirs = [torch.nn.Parameter(param.clone()) for param in params]
    torchs = torch.optim.NAdam(theirs, foreach=False, **options)
    opt = NAdam(kernel=kernel, **options)
    state, pairs = opt.init(params), []
    for _ in range(100):
        grads = random_like(params)
        for param, own in zip(theirs, grads, strict=True):
            param.grad = own.clone()
        torchs.step()
        params, state = opt.update(grads, state, params)
        pairs.append((params, [their.detach().clone() for their in theirs]))
    return pairs, state, [torchs.state[their] for their in theirs]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_numbers_are_torchs_over_100_steps_to_two_units_in_the_last_place(options, kernel):
    """Torch rounds the product of the momenta to float32, as our leaves are here."""
    pairs, state, theirs = beside_torch(options | {"lr": 0.1}, kernel, torch.float32)
    ulp = torch.finfo(torch.float32).eps
    for ours, expected in pairs:
        for one, other in zip(ours, expected, strict=True):
            assert_close(one, other, rtol=2 * ulp, atol=2 * ulp * 0.1)
    if options["decoupled_weight_decay"] or options["weight_decay"] == 0:
        assert_same_bits(state.exp_avg, [own["exp_avg"] for own in theirs])
        assert_same_bits(state.exp_avg_sq, [own["exp_avg_sq"] for own in theirs])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("momentum_decay", [0.0, 4e-3, 0.5])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_in_float64_numbers_are_torchs_if_it_keeps_its_product_in_float64(
    options, momentum_decay, kernel
):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        options = options | {"lr": 0.1, "momentum_decay": momentum_decay}
        pairs, _, _ = beside_torch(options, kernel, torch.float64)
    finally:
        torch.set_default_dtype(before)
    for ours, expected in pairs:
        for one, other in zip(ours, expected, strict=True):
            assert_close(one, other, rtol=1e-13, atol=1e-14)


PRODUCTS = crossed(beta1=(0.0, 0.5, 0.9, 0.9999), momentum_decay=(0.0, 1e-9, 4e-3, 0.5, 50.0))


@pytest.mark.parametrize("own", PRODUCTS, ids=str)
def test_the_product_of_the_momenta_is_that_of_all_of_them(own):
    beta1, decay = own["beta1"], own["momentum_decay"]
    expected = 1.0
    for count in range(1, 300):
        expected *= beta1 * (1 - 0.5 * 0.96 ** (count * decay))
        assert mu_product(float(count), beta1, decay) == pytest.approx(expected, abs=1e-15)
    tensors = mu_product(number(299.0), number([beta1, beta1]), number(decay))
    assert_close(tensors, number([expected, expected]), rtol=0, atol=1e-15)


@pytest.mark.parametrize("decay", [0.0, 1e-9, 3e-4, 4e-3, 0.5])
def test_the_product_has_the_derivative_of_the_product(decay):
    def one_by_one(decay):
        product = number(1.0)
        for count in range(1, 8):
            product = product * 0.9 * (1 - 0.5 * 0.96 ** (count * decay))
        return product

    def at_once(decay):
        return mu_product(7.0, 0.9, decay)

    assert_close(grad(at_once)(number(decay)), grad(one_by_one)(number(decay)), rtol=1e-9)
    second = grad(grad(at_once))(number(decay)), grad(grad(one_by_one))(number(decay))
    assert_close(*second, rtol=1e-5)


def test_the_first_step_is_as_by_hand():
    opt = NAdam(lr=1.0, betas=(0.5, 0.75), eps=1.0, weight_decay=0.5, momentum_decay=0.0)
    param = number([2.0, 0.0])
    param, state = opt.update(number([3.0, 0.0]), opt.init(param), param)
    assert state.exp_avg.tolist() == [2.0, 0.0]  # half of 3 + 0.5 * 2
    assert state.exp_avg_sq.tolist() == [4.0, 0.0]
    # Each momentum is a quarter, and the root of the corrected second moment is 4.
    mean = 0.25 * 2 / (1 - 1 / 16) + 0.75 * 4 / (1 - 1 / 4)
    assert_close(param, number([2 - mean / (4 + 1), 0.0]))


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_leaves_are_computed_in_float32(dtype, kernel):
    opt = NAdam(lr=0.1, weight_decay=0.1, kernel=kernel)
    assert_16_bit_steps_match(opt, oracles.nadam, dtype, 3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_step_per_leaf_counts_skipped_leaves_as_torch_does(kernel):
    torchs = partial(torch.optim.NAdam, lr=0.1, weight_decay=0.1, foreach=False)
    opt = NAdam(lr=0.1, weight_decay=0.1, kernel=kernel, step_per_leaf=True)
    theirs, ours, state = run_with_skipped_leaves(torchs, opt)
    torch.testing.assert_close(ours, theirs)
    assert [int(step) for step in state.step] == [8, 8, 0]


def test_tensors_and_schedules_give_the_bits_of_the_numbers():
    params = [torch.randn(3, 4), torch.randn(())]
    gradients = [random_like(params) for _ in range(9)]
    expected = run(NAdam(0.1, (0.8, 0.9), 1e-3, 0.1), params, gradients)
    tensors = NAdam(number(0.1), (number(0.8), number(0.9)), number(1e-3), number(0.1))
    assert_same_bits(run(tensors, params, gradients), expected)
    betas = (lambda step: 0.8, lambda step: 0.9)
    schedules = NAdam(lambda step: 0.1, betas, lambda step: 1e-3, lambda step: 0.1)
    assert_same_bits(run(schedules, params, gradients), expected)


@pytest.mark.parametrize(
    "opt",
    [
        NAdam(lr=0.1, weight_decay=0.1, maximize=True),
        NAdam(
            lr=torch.tensor([0.1, 0.2, 0.3]),
            betas=(torch.tensor([0.0, 0.5, 0.9]), torch.tensor([0.5, 0.8, 0.9])),
            eps=1e-3,
            weight_decay=torch.tensor([0.0, 0.1, 0.2]),
            decoupled_weight_decay=True,
        ),
    ],
    ids=str,
)
def test_a_vmap_is_a_loop(opt):
    assert_vmap_is_loop(opt, steps=3, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("decoupled", [False, True])
def test_derivatives_are_those_of_differences_in_every_mode(decoupled):
    assert_derivatives_are_those_of_differences(
        lambda lr, beta1, beta2, decay: NAdam(
            lr, (beta1, beta2), 1e-2, decay, decay, decoupled_weight_decay=decoupled
        ),
        number([0.1, 0.8, 0.6, 0.05]),
    )


def test_a_derivative_where_all_is_zero_is_finite():
    def moved(gradient):
        opt = NAdam(lr=0.1, eps=0.5, betas=(0.0, 0.9))
        param = torch.zeros_like(gradient)
        return opt.update(gradient, opt.init(param), param)[0].sum()

    assert_close(grad(moved)(number([0.0, 0.0])), number([-0.2, -0.2]))


def test_bad_options_are_refused_with_their_value():
    with pytest.raises(ValueError, match=r"momentum_decay=-1.0: .* at least 0"):
        NAdam(momentum_decay=-1.0)
    with pytest.raises(TypeError, match="decoupled_weight_decay=1: must be True or False"):
        NAdam(decoupled_weight_decay=1)
    with pytest.raises(ValueError, match="must be one of auto, foreach, plain"):
        NAdam(kernel="fused")
