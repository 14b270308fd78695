"""Lion: optax's numbers, its first step by hand, and its derivatives."""

import numpy as np
import pytest
import torch
from torch.func import grad, jvp

from funcopt import Lion

from ..cases import assert_close, assert_same_bits, clone, random_like, tree_map
from .common import SHAPES, assert_vmap_is_loop, crossed, number, run

KERNELS = ("auto", "foreach", "plain")
OPTIONS = crossed(
    lr=(1e-4, 0.1),
    betas=((0.9, 0.99), (0.5, 0.75)),
    weight_decay=(0.0, 0.3),
    maximize=(False, True),
)


def optax_lion(param, gradients, *, lr, betas, weight_decay, maximize):
    """`optax.lion` in NumPy, in the order of its operations and in the dtype of the parameter."""
    dtype = param.dtype
    b1, b2, decay, rate = (dtype.type(value) for value in (*betas, weight_decay, lr))
    rest1, rest2 = dtype.type(1.0 - betas[0]), dtype.type(1.0 - betas[1])
    mean = np.zeros_like(param)
    for gradient in gradients:
        g = -gradient if maximize else gradient
        update = np.sign(rest1 * g + b1 * mean) + decay * param
        mean = rest2 * g + b2 * mean
        param = param + -rate * update
    return param, mean


@pytest.mark.by_day(40)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_are_optaxs_over_100_steps(options, kernel, dtype):
    params = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    gradients = [random_like(params) for _ in range(100)]
    opt = Lion(**options, kernel=kernel)
    ours, state = run(opt, params, gradients)
    in_place, state_in_place = run(opt, clone(params), gradients, "update_")
    assert_same_bits((in_place, state_in_place), (ours, state))
    for index, param in enumerate(params):
        own = [grads[index].numpy() for grads in gradients]
        expected, mean = optax_lion(param.numpy(), own, **options)
        assert np.array_equal(ours[index].numpy(), expected)
        assert np.array_equal(state.exp_avg[index].numpy(), mean)


def test_the_first_steps_are_as_by_hand():
    opt = Lion(lr=0.5, betas=(0.5, 0.75), weight_decay=0.25)
    param = number([4.0, -4.0, 0.0])
    param, state = opt.update(number([3.0, -0.1, 0.0]), opt.init(param), param)
    assert param.tolist() == [4 - 0.5 * (1 + 1), -4 + 0.5 * (1 + 1), 0.0]
    assert_close(state.exp_avg, number([0.75, -0.025, 0.0]))
    # The mean of before outweighs the gradient in the first element alone.
    param, state = opt.update(number([-0.5, 0.5, 0.0]), state, param)
    assert param.tolist() == [3 - 0.5 * (1 + 0.75), -3 - 0.5 * (1 - 0.75), 0.0]


def test_every_element_moves_by_the_learning_rate():
    params = [torch.zeros(3, 4), torch.zeros(())]
    moved, _ = run(Lion(lr=0.125), params, [random_like(params)])
    assert all(bool((leaf.abs() == 0.125).all()) for leaf in moved)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_leaves_are_computed_in_float32(dtype, kernel):
    for size in (1, 16, 33):
        param, mean = torch.randn(size).to(dtype), torch.zeros(size, dtype=dtype)
        opt = Lion(lr=0.1, weight_decay=0.1, kernel=kernel, moments=None)
        state = opt.init(param)
        for _ in range(3):
            gradient = torch.randn(size).to(dtype)
            p, g, m = param.float(), gradient.float(), mean.float()
            expected = p - 0.1 * ((0.1 * g + 0.9 * m).sign() + 0.1 * p)
            mean = (0.01 * g + 0.99 * m).to(dtype)
            param, state = opt.update(gradient, state, param)
            assert_close(param, expected.to(dtype), rtol=torch.finfo(dtype).eps)
            assert_close(state.exp_avg, mean, rtol=torch.finfo(dtype).eps)
            mean = state.exp_avg


@pytest.mark.parametrize("kernel", KERNELS)
def test_complex_leaves_are_pairs_of_real_ones(kernel):
    params = [torch.randn(3, 2, dtype=torch.complex128), torch.randn((), dtype=torch.complex128)]
    gradients = [random_like(params) for _ in range(5)]
    ours, _ = run(Lion(lr=0.1, kernel=kernel), params, gradients)
    as_real = torch.view_as_real
    pairs, _ = run(
        Lion(lr=0.1, kernel=kernel),
        tree_map(as_real, params),
        [tree_map(as_real, own) for own in gradients],
    )
    assert_same_bits(tree_map(as_real, ours), pairs)


def test_a_leaf_without_a_gradient_is_left_alone():
    params = [torch.ones(2), torch.ones(2)]
    moved, state = run(Lion(lr=0.1, weight_decay=0.5), params, [[torch.ones(2), None]] * 2)
    assert torch.equal(moved[1], params[1])
    assert not state.exp_avg[1].any()
    assert state.step == 2


def test_tensors_and_schedules_give_the_bits_of_the_numbers():
    params = [torch.randn(3, 4), torch.randn(())]
    gradients = [random_like(params) for _ in range(5)]
    expected = run(Lion(0.1, (0.8, 0.9), 0.1), params, gradients)
    tensors = Lion(number(0.1), (number(0.8), number(0.9)), number(0.1))
    schedules = Lion(lambda step: 0.1, (lambda step: 0.8, lambda step: 0.9), lambda step: 0.1)
    assert_same_bits(run(tensors, params, gradients), expected)
    assert_same_bits(run(schedules, params, gradients), expected)


@pytest.mark.parametrize(
    "opt",
    [
        Lion(lr=0.1, weight_decay=0.1, maximize=True),
        Lion(lr=torch.tensor([0.1, 0.2, 0.3]), betas=(0.9, torch.tensor([0.0, 0.5, 0.9]))),
    ],
    ids=str,
)
def test_a_vmap_is_a_loop(opt):
    assert_vmap_is_loop(opt, rtol=1e-2, atol=1e-2)


def test_derivatives_are_those_of_all_but_the_sign():
    param, gradient = number([1.0, -2.0]), number([3.0, 5.0])

    def moved(lr, decay, param, gradient):
        opt = Lion(lr=lr, weight_decay=decay)
        return opt.update(gradient, opt.init(param), param)[0].sum()

    given = number(0.1), number(0.2), param, gradient
    by_lr, by_decay, by_param, by_gradient = grad(moved, argnums=(0, 1, 2, 3))(*given)
    assert_close(by_lr, -(2.0 + 0.2 * param.sum()))
    assert_close(by_decay, -0.1 * param.sum())
    assert_close(by_param, torch.full_like(param, 1 - 0.1 * 0.2))
    assert not by_gradient.any()
    for tensor in given:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(moved, given)
    assert torch.autograd.gradgradcheck(moved, given)


def test_forward_mode_agrees_with_reverse_mode():
    param, grads = torch.randn(4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def loss(hyperparams):
        lr, beta1, beta2, decay = hyperparams.unbind()
        moved, state = run(Lion(lr, (beta1, beta2), decay), param, list(grads))
        return moved.square().sum() + state.exp_avg.square().sum()

    given, direction = number([0.1, 0.8, 0.9, 0.2]), torch.randn(4, dtype=torch.float64)
    assert_close(jvp(loss, (given,), (direction,))[1], grad(loss)(given) @ direction, rtol=1e-10)
    second = jvp(grad(loss), (given,), (direction,))[1]
    difference = (
        grad(loss)(given + 1e-6 * direction) - grad(loss)(given - 1e-6 * direction)
    ) / 2e-6
    assert_close(second, difference, rtol=1e-6, atol=1e-8)


def test_bad_options_are_refused_with_their_value():
    with pytest.raises(
        ValueError, match=r"betas\[1\]=1.0: betas\[1\] must be at least 0 and below"
    ):
        Lion(betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="must be one of auto, native, foreach, plain"):
        Lion(kernel="fused")
