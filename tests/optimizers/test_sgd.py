"""SGD: torch's bits, its first step, and what it refuses."""

import pytest
import torch
from torch.func import grad, jacrev, jvp, vmap

from funcopt import SGD, SGDState
from funcopt.schedules import Linear
from funcopt.testing import oracles

from ..cases import KERNELS, TORCH_FLAGS, assert_close, assert_same_bits, random_like, tree_map
from .common import (
    assert_torchs_bits,
    assert_vmap_is_loop,
    crossed,
    number,
    run,
    unrolled,
)

OPTIONS = [
    options
    for options in crossed(
        momentum=(0.0, 0.9),
        dampening=(0.0, 0.3),
        weight_decay=(0.0, 0.1),
        nesterov=(False, True),
        maximize=(False, True),
        lr=(1e-3, 0.3),
    )
    if not options["nesterov"] or (options["momentum"] > 0 and options["dampening"] == 0)
]


@pytest.mark.by_day(60)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_are_torchs_over_100_steps(options, kernel, dtype):
    state, theirs = assert_torchs_bits(SGD, torch.optim.SGD, options, kernel, dtype)
    if options["momentum"] == 0:
        assert state.momentum_buffer == ()
    else:
        assert_same_bits(state.momentum_buffer, [own["momentum_buffer"] for own in theirs])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_with_a_count_of_each_leaf_the_first_gradient_is_the_first_as_in_torch(
    dampening, kernel, in_place
):
    params = [torch.randn(3), torch.randn(2), torch.randn(4)]
    gradients = [
        [None if (i + j) % 3 == 0 or j == 2 else torch.randn_like(p) for j, p in enumerate(params)]
        for i in range(10)
    ]
    options = {"lr": 0.1, "momentum": 0.9, "dampening": dampening}
    theirs = [torch.nn.Parameter(param.clone()) for param in params]
    # One of torch's for each leaf: its fused kernel fails where some have had no gradient yet.
    torchs = [torch.optim.SGD([param], **options, **TORCH_FLAGS[kernel]) for param in theirs]
    for grads in gradients:
        for own, param, gradient in zip(torchs, theirs, grads, strict=True):
            param.grad = None if gradient is None else gradient.clone()
            own.step()
    opt = SGD(**options, kernel=kernel, step_per_leaf=True)
    ours, state = run(
        opt, tree_map(torch.clone, params), gradients, ["update", "update_"][in_place]
    )
    assert_same_bits(ours, [param.detach() for param in theirs])
    assert [int(step) for step in state.step] == [6, 7, 0]


def test_with_one_count_a_leaf_that_comes_later_is_dampened():
    opt = SGD(lr=1.0, momentum=0.5, dampening=0.25)
    params = [torch.zeros(1), torch.zeros(1)]
    gradients = [[torch.ones(1), None], [torch.ones(1), torch.ones(1)]]
    moved, state = run(opt, params, gradients)
    assert_close(state.momentum_buffer, [torch.tensor([1.25]), torch.tensor([0.75])])
    assert_close(moved, [torch.tensor([-2.25]), torch.tensor([-0.75])])


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3}, {}])
def test_16_bit_leaves_of_every_size_are_computed_in_float32(options, dtype, kernel):
    """From 16 elements on, torch 2.13's fused kernel gives other numbers on the CPU."""
    for size in (1, 15, 16, 17, 33, 70):
        param = torch.randn(size).to(dtype)
        opt = SGD(lr=0.1, weight_decay=0.1, kernel=kernel, **options)
        state = opt.init(param)
        for _ in range(3):
            gradient = torch.randn(size).to(dtype)
            wide = tree_map(lambda leaf: leaf.double(), state)
            expected = oracles.sgd(opt, gradient.double(), wide, param.double())
            param, state = opt.update(gradient, state, param)
            ulp = torch.finfo(dtype).eps
            assert_close((param.double(), tree_map(torch.Tensor.double, state)), expected, rtol=ulp)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_complex_leaves_are_pairs_of_real_ones(momentum, kernel):
    params = [torch.randn(3, 2, dtype=torch.complex128), torch.randn((), dtype=torch.complex128)]
    gradients = [random_like(params) for _ in range(5)]
    opt = SGD(lr=0.1, momentum=momentum, weight_decay=0.1, kernel=kernel)
    ours, _ = run(opt, params, gradients)
    as_real = torch.view_as_real
    pairs, _ = run(opt, tree_map(as_real, params), [tree_map(as_real, own) for own in gradients])
    assert_same_bits(tree_map(as_real, ours), pairs)


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
@pytest.mark.parametrize(
    "momentum", [number(0.0), lambda step: 0.0 * step], ids=["tensor", "schedule"]
)
def test_momentum_that_may_change_keeps_a_buffer_where_it_is_0(momentum, kernel):
    """Torch's fused kernel would leave the buffer alone."""
    opt = SGD(lr=0.1, momentum=momentum, dampening=0.25, kernel=kernel)
    params, gradients = torch.zeros(3), [torch.ones(3), 2 * torch.ones(3)]
    moved, state = run(opt, params, gradients)
    assert_close(state.momentum_buffer, torch.full((3,), 1.5))
    assert_close(moved, torch.full((3,), -0.25))


@pytest.mark.parametrize("kernel", KERNELS)
def test_tensors_and_schedules_give_the_bits_of_the_numbers(kernel):
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}
    params = [torch.randn(3, 4), torch.randn(())]
    gradients = [random_like(params) for _ in range(5)]
    expected = run(SGD(**options, kernel=kernel), params, gradients)
    tensors = SGD(**{name: number(value) for name, value in options.items()}, kernel=kernel)
    constant = {name: lambda step, v=value: v for name, value in options.items()}
    assert_same_bits(run(tensors, params, gradients), expected)
    assert_same_bits(run(SGD(**constant, kernel=kernel), params, gradients), expected)


def test_a_schedule_of_momentum_is_called_with_the_count_before_the_update():
    opt = SGD(lr=1.0, momentum=Linear(0.0, 1.0, steps=2))
    _, state = run(opt, torch.zeros(1), [torch.ones(1)] * 3)
    assert state.momentum_buffer.item() == 1.0 * (0.5 * 1.0 + 1.0) + 1.0


# Transforms.


@pytest.mark.parametrize(
    "opt",
    [
        SGD(lr=0.1),
        SGD(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1, maximize=True),
        SGD(lr=torch.tensor([0.1, 0.2, 0.3]), momentum=0.9, nesterov=True),
        SGD(
            lr=torch.tensor([0.1, 0.2, 0.3]),
            momentum=torch.tensor([0.0, 0.5, 0.9]),
            dampening=torch.tensor([0.3, 0.0, 1.0]),
            weight_decay=torch.tensor([0.0, 0.1, 0.2]),
        ),
    ],
    ids=str,
)
def test_a_vmap_is_a_loop(opt):
    assert_vmap_is_loop(opt, rtol=1e-2, atol=1e-2)


def test_members_whose_first_steps_differ_each_have_their_own():
    opt = SGD(lr=1.0, momentum=0.5, dampening=0.25)
    state = SGDState(number([0.0, 1.0]), torch.tensor([[0.0], [2.0]]))
    _, state = vmap(opt.update)(torch.ones(2, 1), state, torch.zeros(2, 1))
    assert state.momentum_buffer.tolist() == [[1.0], [1.75]]


BUILDERS = {
    "plain": lambda lr, _, decay, __: SGD(lr, weight_decay=decay),
    "momentum": lambda lr, momentum, decay, damp: SGD(lr, momentum, damp, decay),
    "nesterov": lambda lr, momentum, decay, _: SGD(lr, momentum, 0, decay, nesterov=True),
    "maximize": lambda lr, momentum, decay, damp: SGD(lr, momentum, damp, decay, maximize=True),
}
HYPERPARAMETERS = number([0.1, 0.9, 0.05, 0.3])


@pytest.mark.parametrize("name", BUILDERS)
def test_derivatives_to_the_second_order_are_those_of_differences(name):
    loss, param, grads = unrolled(BUILDERS[name])
    given = (HYPERPARAMETERS.clone(), param, grads)
    for tensor in given:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(loss, given)
    assert torch.autograd.gradgradcheck(loss, given)


@pytest.mark.parametrize("name", BUILDERS)
def test_forward_mode_and_both_together_agree_with_reverse_mode(name):
    loss, param, grads = unrolled(BUILDERS[name])

    def of(hyperparams):
        return loss(hyperparams, param, grads)

    direction = torch.randn(4, dtype=torch.float64)
    expected = grad(of)(HYPERPARAMETERS)
    assert_close(jvp(of, (HYPERPARAMETERS,), (direction,))[1], expected @ direction, rtol=1e-10)
    hessian = jacrev(grad(of))(HYPERPARAMETERS)
    forward = jvp(grad(of), (HYPERPARAMETERS,), (direction,))[1]
    assert_close(forward, hessian @ direction, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kernel", ["auto", "plain"])
def test_one_compiled_graph_serves_the_first_step_and_all_others(kernel):
    opt = SGD(lr=0.1, momentum=0.9, dampening=0.3, kernel=kernel)
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


# What is refused.

REFUSED = {
    "lr=-1.0: lr must be finite and at least 0": {"lr": -1},
    "momentum=-0.1: momentum must be finite and at least 0": {"momentum": -0.1},
    "dampening=nan: dampening must be finite": {"dampening": float("nan")},
    "weight_decay=inf: weight_decay must be finite": {"weight_decay": float("inf")},
    "nesterov=True with momentum=0.0 and dampening=0.0: it needs momentum": {"nesterov": True},
    "and dampening=0.1: it needs momentum, and no dampening": {
        "nesterov": True,
        "momentum": 0.9,
        "dampening": 0.1,
    },
    "kernel='triton': must be one of auto, native, fused, foreach, plain": {"kernel": "triton"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_options_are_refused_with_their_value(message):
    with pytest.raises(ValueError, match=message):
        SGD(**REFUSED[message])
    with pytest.raises(TypeError, match="nesterov=1: must be True or False"):
        SGD(nesterov=1)


def test_a_state_without_the_buffer_is_refused():
    params = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match=r"momentum_buffer is empty, .* has momentum=0\.9"):
        SGD(momentum=0.9).update(params, SGD().init(params), params)
    with pytest.raises(ValueError, match="momentum_buffer holds a tree"):
        SGD().update(params, SGD(momentum=0.9).init(params), params)


@pytest.mark.parametrize(("dampening", "refused"), [(0.0, False), (0.3, True)])
def test_the_fused_kernel_asks_for_the_value_of_the_count_with_dampening_alone(dampening, refused):
    unread = number(1.0)  # a count that can be read comes as a float
    numbers = SGD.rule.numbers(unread, 0.1, 0.9, dampening, 0.0)
    reason = SGD.rule.kernel("fused").unsupported_reason(torch.device("cpu"), numbers)
    assert (reason is not None) is refused


def test_the_fused_kernel_reads_the_counts_of_members_one_by_one():
    opt = SGD(lr=0.1, momentum=0.9, dampening=0.3, kernel="fused")
    params = {"w": torch.randn(2, 3)}
    grads, state = {"w": torch.randn(2, 3)}, torch.func.vmap(opt.init)(params)
    state = state._replace(step=torch.tensor([0.0, 5.0], dtype=torch.float64))
    moved, _ = torch.func.vmap(opt.update)(grads, state, params)
    for i in range(2):
        own = state._replace(step=state.step[i], momentum_buffer={"w": torch.zeros(3)})
        expected, _ = opt.update({"w": grads["w"][i]}, own, {"w": params["w"][i]})
        assert torch.equal(moved["w"][i], expected["w"])
