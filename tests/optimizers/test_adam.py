"""Adam: torch's bits, where it is AdamW, and its derivatives."""

import dataclasses

import pytest
import torch
from torch.func import grad, jacrev, jvp

from funcopt import Adam, AdamState, AdamW
from funcopt.testing import oracles

from ..cases import KERNELS, TORCH_FLAGS, assert_close, assert_same_bits, random_like, tree_map
from .common import assert_torchs_bits, assert_vmap_is_loop, crossed, number, run, unrolled

OPTIONS = crossed(
    amsgrad=(False, True), maximize=(False, True), weight_decay=(0.0, 0.1), lr=(1e-3, 0.3)
)


@pytest.mark.by_day(40)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_are_torchs_over_100_steps(options, kernel, dtype):
    state, theirs = assert_torchs_bits(Adam, torch.optim.Adam, options, kernel, dtype)
    for name in theirs[0].keys() - {"step"}:
        assert_same_bits(getattr(state, name), [own[name] for own in theirs])
    assert isinstance(state, AdamState)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_step_per_leaf_counts_skipped_leaves_as_torch_does(kernel, in_place):
    params = [torch.randn(3), torch.randn(2), torch.randn(4)]
    gradients = [
        [None if (i + j) % 3 == 0 or j == 2 else torch.randn_like(p) for j, p in enumerate(params)]
        for i in range(10)
    ]
    theirs = [torch.nn.Parameter(param.clone()) for param in params]
    torchs = torch.optim.Adam(theirs, lr=0.1, weight_decay=0.1, **TORCH_FLAGS[kernel])
    for grads in gradients:
        for param, own in zip(theirs, grads, strict=True):
            param.grad = None if own is None else own.clone()
        torchs.step()
    opt = Adam(lr=0.1, weight_decay=0.1, kernel=kernel, step_per_leaf=True)
    update = ["update", "update_"][in_place]
    ours, state = run(opt, tree_map(torch.clone, params), gradients, update)
    assert_same_bits(ours, [param.detach() for param in theirs])
    assert [int(step) for step in state.step] == [6, 7, 0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_weight_decay_it_is_adamw_to_the_bit(kernel):
    params = [torch.randn(3, 4), torch.randn(())]
    gradients = [random_like(params) for _ in range(10)]
    ours, state = run(Adam(lr=0.1, kernel=kernel), params, gradients)
    expected, other = run(AdamW(lr=0.1, weight_decay=0.0, kernel=kernel), params, gradients)
    assert_same_bits(ours, expected)
    assert_same_bits(list(state), list(other))


def test_weight_decay_goes_by_way_of_the_moments():
    param = number([2.0])
    _, state = Adam(weight_decay=0.5).update(torch.zeros_like(param), Adam().init(param), param)
    assert_close(state.exp_avg, number([0.1]), rtol=1e-12)
    assert_close(state.exp_avg_sq, number([0.001]), rtol=1e-12)


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_leaves_are_computed_in_float32(dtype, kernel):
    for size in (1, 16, 33, 70):
        param = torch.randn(size).to(dtype)
        opt = Adam(lr=0.1, weight_decay=0.1, kernel=kernel)
        state = opt.init(param)
        for _ in range(3):
            gradient = torch.randn(size).to(dtype)
            wide = tree_map(torch.Tensor.double, state)
            expected = oracles.adam(opt, gradient.double(), wide, param.double())
            param, state = opt.update(gradient, state, param)
            found = param.double(), tree_map(torch.Tensor.double, state)
            assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize(
    "opt",
    [
        Adam(lr=0.1, weight_decay=0.1, amsgrad=True),
        Adam(
            lr=torch.tensor([0.1, 0.2, 0.3]),
            betas=(torch.tensor([0.0, 0.5, 0.9]), 0.9),
            eps=1e-3,
            weight_decay=torch.tensor([0.0, 0.1, 0.2]),
        ),
    ],
    ids=str,
)
def test_a_vmap_is_a_loop(opt):
    assert_vmap_is_loop(opt, rtol=1e-2, atol=1e-2)


BUILDERS = {
    "decay": lambda lr, beta1, beta2, decay: Adam(lr, (beta1, beta2), 1e-3, decay),
    "amsgrad": lambda lr, beta1, beta2, decay: Adam(
        lr, (beta1, beta2), decay, 0.1, amsgrad=True, maximize=True
    ),
}
HYPERPARAMETERS = number([0.1, 0.8, 0.9, 0.05])


@pytest.mark.parametrize("name", BUILDERS)
def test_derivatives_to_the_second_order_are_those_of_differences(name):
    loss, param, grads = unrolled(BUILDERS[name])
    given = (HYPERPARAMETERS.clone(), param, grads)
    for tensor in given:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(loss, given, eps=1e-7, atol=1e-4)
    assert torch.autograd.gradgradcheck(loss, given, eps=1e-7, atol=1e-3)


@pytest.mark.parametrize("name", BUILDERS)
def test_forward_mode_and_both_together_agree_with_reverse_mode(name):
    loss, param, grads = unrolled(BUILDERS[name])

    def of(hyperparams):
        return loss(hyperparams, param, grads)

    direction = torch.randn(4, dtype=torch.float64)
    expected = grad(of)(HYPERPARAMETERS)
    assert_close(jvp(of, (HYPERPARAMETERS,), (direction,))[1], expected @ direction, rtol=1e-9)
    hessian = jacrev(grad(of))(HYPERPARAMETERS)
    forward = jvp(grad(of), (HYPERPARAMETERS,), (direction,))[1]
    assert_close(forward, hessian @ direction, rtol=1e-8, atol=1e-10)


def test_one_derivative_is_that_of_adamw_where_they_are_the_same():
    """AdamW has a derivative that is written by hand, Adam that of its equations."""
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(5, generator=generator, dtype=torch.float64)
    grads = torch.randn(3, 5, generator=generator, dtype=torch.float64)

    def of(kind):
        def loss(lr, param):
            opt = kind(lr=lr, eps=1e-3, weight_decay=0.0)
            return run(opt, param, list(grads))[0].square().sum()

        return grad(loss, argnums=(0, 1))(number(0.1), param)

    assert_close(of(Adam), of(AdamW), rtol=1e-10, atol=1e-12)


def test_one_compiled_graph_serves_every_step():
    opt = Adam(lr=0.1, weight_decay=0.1)
    params = {"w": torch.randn(3, 4), "b": torch.randn(())}
    gradients = [random_like(params) for _ in range(4)]
    expected = run(opt, params, gradients)
    torch.compiler.reset()
    step = torch.compile(opt.update, backend="aot_eager", fullgraph=True)
    state = opt.init(params)
    try:
        for grads in gradients:
            params, state = step(grads, state, params)
            torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")
    assert_close((params, state), expected)


def test_bad_options_are_refused_with_their_value():
    with pytest.raises(
        ValueError, match=r"betas\[0\]=1.0: betas\[0\] must be at least 0 and below"
    ):
        Adam(betas=(1.0, 0.9))
    with pytest.raises(TypeError, match="must be a pair"):
        Adam(betas=0.9)
    with pytest.raises(ValueError, match="must be one of auto, native, fused, foreach, plain"):
        Adam(kernel="triton")
    assert dataclasses.replace(Adam(), lr=0.1) == Adam(lr=0.1)


def test_the_state_of_an_adamw_is_refused():
    param = torch.ones(2)
    with pytest.raises(TypeError, match="AdamState"):
        Adam().update(param, AdamW().init(param), param)
