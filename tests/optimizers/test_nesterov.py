"""Adam with Nesterov's momentum: optax's numbers, the kernels that serve, derivatives."""

import pytest
import torch

from funcopt import Adam, Clip, Members
from funcopt.testing import oracles

from ..cases import assert_close, assert_same_bits, random_like, tree_map
from .common import (
    assert_derivatives_are_those_of_differences,
    assert_vmap_is_loop,
    crossed,
    number,
    run,
)

KERNELS = ("plain", "foreach")
OPTIONS = crossed(amsgrad=(False, True), maximize=(False, True), weight_decay=(0.0, 0.1))


def optax_adam(param, gradients, *, lr, betas, eps):
    """`optax.adam(nesterov=True)` as it is defined, in float64."""
    b1, b2 = betas
    mu, nu = torch.zeros_like(param), torch.zeros_like(param)
    for count, gradient in enumerate(gradients, 1):
        mu = (1 - b1) * gradient + b1 * mu
        nu = (1 - b2) * gradient**2 + b2 * nu
        mean_hat, grad_hat = mu / (1 - b1 ** (count + 1)), gradient / (1 - b1**count)
        mu_hat = b1 * mean_hat + (1 - b1) * grad_hat
        param = param - lr * mu_hat / ((nu / (1 - b2**count)).sqrt() + eps)
    return param, mu, nu


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.75)])
def test_numbers_are_optaxs_over_100_steps(betas, kernel):
    options = {"lr": 0.1, "betas": betas, "eps": 1e-3}
    opt = Adam(**options, nesterov=True, kernel=kernel)
    param = torch.randn(5, 3, dtype=torch.float64)
    gradients = [torch.randn_like(param) for _ in range(100)]
    found, state = run(opt, param, gradients)
    expected = optax_adam(param, gradients, **options)
    assert_close((found, state.exp_avg, state.exp_avg_sq), expected, rtol=1e-11, atol=1e-13)


# What optax 0.2.8 gives in float32, with lr=0.1 and the default betas, from 1 and -2.
GRADIENTS = [[0.5, -1.0], [0.25, 2.0], [-1.0, 0.125]]
EXPECTED = [[0.8526326, -1.8526325], [0.7605212, -1.9422969], [0.8309283, -1.9684341]]


def test_numbers_are_those_that_optax_gave():
    gradients = [torch.tensor(own) for own in GRADIENTS]
    param = torch.tensor([1.0, -2.0])
    for count, expected in enumerate(EXPECTED, 1):
        found, _ = run(Adam(lr=0.1, nesterov=True), param, gradients[:count])
        assert_close(found, torch.tensor(expected), rtol=3e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_option_is_that_of_the_oracle(options, kernel):
    opt = Adam(
        0.1, nesterov=True, kernel=kernel, **{k: v for k, v in options.items() if k != "kind"}
    )
    params = [torch.randn(3, 4, dtype=torch.float64), torch.randn((), dtype=torch.float64)]
    state = opt.init(params)
    for _ in range(10):
        grads = random_like(params)
        expected = oracles.oracle_of(opt)(opt, grads, state, params)
        params, state = opt.update(grads, state, params)
        assert_close((params, state), expected, rtol=1e-12, atol=1e-14)


def test_no_kernel_is_chosen_that_does_not_look_ahead():
    opt = Adam(nesterov=True)
    assert opt.rule.kernel_names == ("auto", "foreach", "plain")
    assert "native" in Adam().rule.kernel_names
    for kernel in ("native", "fused"):
        with pytest.raises(ValueError, match="must be one of auto, foreach, plain"):
            Adam(nesterov=True, kernel=kernel)
    with pytest.raises(TypeError, match="nesterov=1: must be True or False"):
        Adam(nesterov=1)
    # Nor where a transform has built the value anew, or a wrapper makes the call.
    again = tree_map(lambda leaf: leaf, Adam(lr=number(0.1), nesterov=True))
    assert again.rule is opt.rule
    params = {"w": torch.randn(2, 3)}
    grads = random_like(params)
    expected = run(Adam(0.1, nesterov=True), params, [grads])[0]
    assert_close(run(again, params, [grads])[0], expected)
    assert_close(run(Clip(again, 1e9), params, [grads])[0], expected)
    assert_close(run(Members(again), params, [grads])[0], expected)


def test_a_vmap_is_a_loop():
    assert_vmap_is_loop(Adam(lr=torch.tensor([0.1, 0.2, 0.3]), nesterov=True), rtol=1e-2, atol=1e-2)


def test_derivatives_are_those_of_differences_in_every_mode():
    assert_derivatives_are_those_of_differences(
        lambda lr, beta1, beta2, decay: Adam(lr, (beta1, beta2), 1e-2, decay, nesterov=True),
        number([0.1, 0.8, 0.9, 0.05]),
    )


def test_tensors_give_the_bits_of_the_numbers():
    params = [torch.randn(3, 4), torch.randn(())]
    gradients = [random_like(params) for _ in range(5)]
    expected = run(Adam(0.1, (0.8, 0.9), 1e-3, 0.1, nesterov=True), params, gradients)
    tensors = (number(0.1), (number(0.8), number(0.9)), number(1e-3), number(0.1))
    assert_same_bits(run(Adam(*tensors, nesterov=True), params, gradients), expected)
