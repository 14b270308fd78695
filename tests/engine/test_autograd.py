"""The step under every transform, held to the oracle under the same transform.

The oracle is plain operators throughout: no rule of the library is used on that side.
"""

import pytest
import torch
from torch.func import (
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)

import funcopt
from funcopt import Adam, AdamW, AdamWState

from .. import oracle
from ..cases import KERNELS, assert_close, random_like, tree_map

# What goes into a step, by position: param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step, then
# lr, beta1, beta2, eps, weight_decay. All but the count can be differentiated.
STEP = 5
DIFFERENTIABLE = tuple(i for i in range(11) if i != STEP)
TENSORS, NUMBERS = (0,) * 5, (None,) * 6
VARIANTS = [(False, False), (True, False), (False, True), (True, True)]


def operands(*batch, numbers=(), shape=(3, 2)):
    """Random operands whose tensors are stacked to `batch`, and numbers to `numbers`."""

    def tensor():
        return torch.randn(*batch, *shape, dtype=torch.float64)

    def number(value):
        return value * (1 + 0.1 * torch.rand(numbers, dtype=torch.float64))

    step = torch.randint(0, 9, numbers).double()
    squares = [tensor().abs() + 0.1, tensor().abs() + 0.1]
    given = [number(value) for value in (0.01, 0.8, 0.9, 1e-3, 0.1)]
    return (tensor(), tensor(), tensor(), *squares, step, *given)


def steps(amsgrad=False, maximize=False, kernel="auto"):
    """The step of the library, and that of the oracle, as functions of the operands."""

    def ours(p, g, m, v, largest, step, lr, beta1, beta2, eps, weight_decay):
        opt = AdamW(
            lr=lr,
            betas=(beta1, beta2),
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            kernel=kernel,
        )
        state = AdamWState(step, {"w": m}, {"w": v}, {"w": largest} if amsgrad else ())
        params, state = opt.update({"w": g}, state, {"w": p})
        maximum = state.max_exp_avg_sq["w"] if amsgrad else largest.clone()
        return params["w"], state.exp_avg["w"], state.exp_avg_sq["w"], maximum

    def theirs(p, g, m, v, largest, step, lr, beta1, beta2, eps, weight_decay):
        state = oracle.OracleState(step, m, v, largest)
        numbers = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
        p, state = oracle.update(g, state, p, amsgrad=amsgrad, maximize=maximize, **numbers)
        maximum = state.max_exp_avg_sq if amsgrad else largest.clone()
        return p, state.exp_avg, state.exp_avg_sq, maximum

    return ours, theirs


def scalar(step):
    """A scalar function of the operands that depends on every result in a way of its own."""
    return lambda *args: sum((i + 1) * out.sin().sum() for i, out in enumerate(step(*args)))


def shared(step):
    return vmap(step, (*TENSORS, *NUMBERS))


def tangents(args):
    return tuple(
        torch.zeros_like(arg) if i == STEP else torch.randn_like(arg) for i, arg in enumerate(args)
    )


def along(step, directions):
    return lambda *args: jvp(step, args, directions)[1]


def sums(f):
    return lambda *args: sum(out.sin().sum() for out in f(*args))


torch.manual_seed(0)  # or the numbers would depend on what was imported before
ONE = operands(shape=(2,))
DIRECTION = tangents(ONE)
STACK = operands(4)
OWN = operands(4, numbers=(4,))
SMALL = operands(3, numbers=(3,), shape=(2,))
SQUARE = operands(4, 5, numbers=(4, 5))
N = DIFFERENTIABLE

COMPOSITIONS = {
    "no transform": (lambda f: f, ONE),
    "vmap, shared numbers": (shared, STACK),
    "vmap, own numbers": (vmap, OWN),
    "vmap of the gradient alone": (
        lambda f: lambda p, g, *rest: vmap(lambda g: f(p[0], g, *(r[0] for r in rest)))(g),
        OWN,
    ),
    "vmap of everything but the gradient": (
        lambda f: vmap(f, (0, None, 0, 0, 0, 0, 0, 0, 0, 0, 0)),
        (OWN[0], OWN[1][0], *OWN[2:]),
    ),
    "vmap of one number": (
        lambda f: (
            lambda *args: vmap(lambda lr: f(*args[:6], lr, *args[7:]))(
                torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            )
        ),
        ONE,
    ),
    "vmap along other dimensions": (
        lambda f: vmap(f, (1, 0, 2, 0, 1, *NUMBERS), out_dims=(1, 2, 0, -1)),
        tuple(
            a.movedim(0, dim) if dim else a
            for a, dim in zip(STACK, (1, 0, 2, 0, 1, *NUMBERS), strict=True)
        ),
    ),
    "vmap of vmap, own numbers": (lambda f: vmap(vmap(f)), SQUARE),
    "vmap of vmap, shared numbers": (lambda f: shared(shared(f)), operands(4, 5)),
    "vmap of vmap, numbers of the outer": (lambda f: vmap(shared(f)), operands(4, 5, numbers=(4,))),
    "vmap of vmap, numbers of the inner": (lambda f: shared(vmap(f)), operands(4, 5, numbers=(5,))),
    "vmap of vmap, some of each": (
        lambda f: vmap(
            vmap(f, (0, 0, 0, 0, 0, None, None, 0, None, 0, None)),
            (0, None, 0, 0, 0, None, 0, None, None, 0, None),
        ),
        (
            *(SQUARE[0], SQUARE[1][0], *SQUARE[2:5], ONE[5]),
            *(OWN[6], operands(numbers=(5,))[7], ONE[8], SQUARE[9], ONE[10]),
        ),
    ),
    "grad": (lambda f: grad(scalar(f), N), ONE),
    "vjp": (lambda f: lambda *args: [vjp(f, *args)[1](f(*args))[i] for i in N], ONE),
    "jvp": (lambda f: along(f, DIRECTION), ONE),
    "jvp of jvp": (lambda f: along(along(f, DIRECTION), DIRECTION), ONE),
    "jacrev": (lambda f: jacrev(f, N), ONE),
    "jacfwd": (lambda f: jacfwd(f, N), ONE),
    "jacfwd of jacrev": (lambda f: jacfwd(jacrev(scalar(f), N), N), ONE),
    "jacrev of jacrev": (lambda f: jacrev(jacrev(scalar(f), N), N), ONE),
    "jacrev of jacfwd": (lambda f: jacrev(jacfwd(scalar(f), N), N), ONE),
    "hessian": (lambda f: hessian(scalar(f), N), ONE),
    "linearize": (lambda f: lambda *args: linearize(f, *args)[1](*DIRECTION), ONE),
    "functionalize": (functionalize, ONE),
    "functionalize of grad": (lambda f: functionalize(grad(scalar(f), N)), ONE),
    "vmap of grad": (lambda f: vmap(grad(scalar(f), N)), OWN),
    "vmap of grad, shared numbers": (lambda f: shared(grad(scalar(f), N)), STACK),
    "grad of vmap": (lambda f: grad(scalar(vmap(f)), N), OWN),
    "grad of vmap, shared numbers": (lambda f: grad(scalar(shared(f)), N), STACK),
    "grad of vmap of vmap": (lambda f: grad(scalar(vmap(vmap(f))), N), SQUARE),
    "grad of vmap of vmap, numbers of the inner": (
        lambda f: grad(scalar(shared(vmap(f))), N),
        operands(4, 5, numbers=(5,)),
    ),
    "vmap of vmap of grad": (lambda f: vmap(vmap(grad(scalar(f), N))), SQUARE),
    "vmap of vmap of grad, numbers of the inner": (
        lambda f: shared(vmap(grad(scalar(f), N))),
        operands(4, 5, numbers=(5,)),
    ),
    "vmap of grad of vmap": (lambda f: vmap(grad(scalar(vmap(f)), N)), SQUARE),
    "vmap of grad of vmap, numbers of the outer": (
        lambda f: vmap(grad(scalar(shared(f)), N)),
        operands(4, 5, numbers=(4,)),
    ),
    "grad of vmap of grad of vmap": (
        lambda f: grad(sums(vmap(grad(scalar(vmap(f)), N))), N),
        operands(2, 3, numbers=(2, 3), shape=(2,)),
    ),
    "jacfwd of vmap": (lambda f: jacfwd(vmap(f), (0, 1, 6)), SMALL),
    "jacrev of vmap": (lambda f: jacrev(vmap(f), (0, 1, 6)), SMALL),
    "vmap of jacfwd": (lambda f: vmap(jacfwd(f, N)), SMALL),
    "vmap of hessian": (lambda f: vmap(hessian(scalar(f), (0, 1, 6))), SMALL),
    "grad of jvp": (lambda f: grad(sums(along(f, DIRECTION)), N), ONE),
    "third order": (lambda f: grad(sums(grad(sums(grad(scalar(f), N)), N)), N), ONE),
}


@pytest.mark.parametrize(("amsgrad", "maximize"), VARIANTS)
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_composition_gives_what_plain_operators_give(name, amsgrad, maximize):
    transform, args = COMPOSITIONS[name]
    ours, theirs = steps(amsgrad, maximize)
    assert_close(transform(ours)(*args), transform(theirs)(*args), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "name", ["vmap, shared numbers", "vmap, own numbers", "vmap of vmap, some of each", "grad"]
)
def test_every_kernel_can_be_asked_for_under_a_transform(name, kernel):
    transform, args = COMPOSITIONS[name]
    ours, theirs = steps(kernel=kernel)
    assert_close(transform(ours)(*args), transform(theirs)(*args), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("amsgrad", "maximize"), VARIANTS)
def test_plain_autograd_gives_first_and_second_derivatives(amsgrad, maximize):
    ours, _ = steps(amsgrad, maximize)
    args = [arg.clone().requires_grad_(i != STEP) for i, arg in enumerate(operands(shape=(2,)))]
    tracked = [args[i] for i in DIFFERENTIABLE]

    def step(*values):
        return ours(*values[:STEP], args[STEP], *values[STEP:])

    assert torch.autograd.gradcheck(step, tracked)
    assert torch.autograd.gradgradcheck(step, tracked)


def test_backward_fills_the_gradients_of_leaves():
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    params = torch.randn(3, dtype=torch.float64)
    grads = torch.randn(3, dtype=torch.float64, requires_grad=True)
    opt = AdamW(lr=lr)
    moved, _ = opt.update(grads, opt.init(params), params)
    moved.square().sum().backward()
    expected = torch.autograd.grad(
        oracle.update(grads, oracle.init(params), params, lr=lr)[0].square().sum(), [lr, grads]
    )
    assert_close([lr.grad, grads.grad], list(expected), rtol=1e-12)


@pytest.mark.parametrize("order", ["reverse", "forward", "autograd"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_meta_gradients_at_a_zero_gradient_are_finite_and_right(dtype, amsgrad, order):
    """At g = m = v = 0 the step is -lr * g / eps to first order, as the limit of differences."""
    zero = torch.zeros(3, dtype=dtype)
    opt = AdamW(lr=0.5, eps=0.25, betas=(0.9, 0.99), weight_decay=0.0, amsgrad=amsgrad)

    def moved(g):
        return opt.update(g, opt.init(zero), zero)[0]

    if order == "autograd":
        g = zero.clone().requires_grad_()
        slope = torch.autograd.grad(moved(g).sum(), g)[0]
    else:
        slope = (jacrev if order == "reverse" else jacfwd)(lambda g: moved(g).sum())(zero)
    assert_close(slope, torch.full_like(zero, -2.0), rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_meta_gradients_through_steps_with_zeros_in_between_match_differences(amsgrad):
    data = torch.randn(4, 3, dtype=torch.float64)
    data[1] = 0.0
    data[2, 0] = 0.0

    def after_training(lr, scale):
        opt = AdamW(lr=lr, amsgrad=amsgrad, eps=1e-3)
        params = torch.ones(3, dtype=torch.float64)
        state = opt.init(params)
        for row in data:
            params, state = opt.update(row * scale, state, params)
        return params.square().sum()

    lr, scale = torch.tensor([0.1, 1.5], dtype=torch.float64)
    slopes = grad(after_training, (0, 1))(lr, scale)
    h = 1e-6
    differences = (
        (after_training(lr + h, scale) - after_training(lr - h, scale)) / (2 * h),
        (after_training(lr, scale + h) - after_training(lr, scale - h)) / (2 * h),
    )
    assert_close(slopes, differences, rtol=1e-6)


def test_the_gradient_of_a_tie_in_amsgrads_maximum_is_shared_as_torch_shares_it():
    squares = torch.ones(2, dtype=torch.float64)
    ours, theirs = steps(amsgrad=True)
    args = (squares, squares, ONE[2], squares, squares, *ONE[5:])
    assert_close(grad(scalar(ours), N)(*args), grad(scalar(theirs), N)(*args), rtol=1e-11)


def count_calls(monkeypatch, name):
    calls = []
    kernel = getattr(torch, name)

    def counted(*args, **kwargs):
        calls.append(args)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch, name, counted)
    return calls


@pytest.mark.parametrize("init", [AdamW().init, vmap(AdamW().init)], ids=["one step", "steps"])
@pytest.mark.parametrize("levels", [1, 2])
def test_vmap_with_shared_numbers_makes_one_fused_call(monkeypatch, init, levels):
    calls = count_calls(monkeypatch, "_fused_adamw_")
    params = {"a": torch.randn(6, 4, 3), "b": torch.randn(6, 4)}
    state = init(params)
    update = AdamW(kernel="fused").update
    dims = (0, AdamWState(None if state.step.ndim == 0 else 0, 0, 0, None), 0)
    if levels == 2:
        update = vmap(update, (0, AdamWState(None, 0, 0, None), 0))
    vmap(update, dims)(params, state, params)
    assert len(calls) == 1
    assert [leaf.shape[0] for leaf in calls[0][0]] == [6, 6]


def test_randomness_modes_do_not_matter():
    params = torch.randn(3, 2)
    opt = AdamW()
    for randomness in ("error", "same", "different"):
        vmap(lambda g: opt.update(g, opt.init(g), g)[0], randomness=randomness)(params)


def test_a_batch_of_nobody_is_an_empty_result():
    params = torch.randn(0, 3)
    moved, state = vmap(lambda g: AdamW().update(g, AdamW().init(g), g))(params)
    assert moved.shape == (0, 3)
    assert state.step.shape == (0,)


@pytest.mark.parametrize("step_per_leaf", [False, True])
def test_leaves_without_a_gradient_stay_put_under_vmap(step_per_leaf):
    params = {"a": torch.randn(4, 3), "b": torch.randn(4, 2)}
    opt = AdamW(lr=0.1, step_per_leaf=step_per_leaf)
    state = vmap(opt.init)(params)
    moved, after = vmap(lambda g, s, p: opt.update({"a": None, "b": g}, s, p))(
        torch.ones(4, 2), state, params
    )
    assert torch.equal(moved["a"], params["a"])
    assert not torch.equal(moved["b"], params["b"])
    if step_per_leaf:
        assert after.step["a"].tolist() == [0] * 4
        assert after.step["b"].tolist() == [1] * 4


def test_an_optimizer_built_inside_a_mapped_function_works():
    lrs, params = torch.rand(4), torch.randn(4, 3)

    def step(lr, p):
        opt = funcopt.AdamW(lr=lr)
        return opt.update(p, opt.init(p), p)[0]

    expected = torch.stack([step(lr, p) for lr, p in zip(lrs, params, strict=True)])
    assert_close(vmap(step)(lrs, params), expected)


def test_a_hypergradient_is_a_gradient_with_respect_to_the_optimizer():
    opt = AdamW(lr=torch.tensor(0.1).double(), betas=(0.9, torch.tensor(0.99).double()))
    params = torch.randn(3, dtype=torch.float64)

    def loss_after_training(opt):
        moved, state = params, opt.init(params)
        for _ in range(3):
            moved, state = opt.update(grad(lambda p: p.pow(4).sum())(moved), state, moved)
        return moved.square().sum()

    slope = grad(loss_after_training)(opt)
    h = 1e-6
    nudged = [loss_after_training(AdamW(lr=opt.lr + sign * h, betas=opt.betas)) for sign in (1, -1)]
    assert isinstance(slope, AdamW)
    assert_close(slope.lr, (nudged[0] - nudged[1]) / (2 * h), rtol=1e-6)
    assert slope.betas[1].isfinite()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_leaves_map_and_differentiate(dtype):
    params, grads = torch.randn(4, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    opt = AdamW(lr=0.1)

    def loss(g, p):
        return opt.update(g, opt.init(p), p)[0].abs().square().sum()

    mapped = vmap(grad(loss))(grads, params)
    for i in range(4):
        assert_close(mapped[i], grad(loss)(grads[i], params[i]), rtol=1e-4, atol=1e-5)


def test_large_members_with_numbers_of_their_own_take_a_kernel_call_each(monkeypatch):
    calls = count_calls(monkeypatch, "_fused_adamw_")
    params = {"w": torch.randn(3, 200, 200)}
    opt = AdamW(lr=torch.tensor([0.1, 0.2, 0.3]), kernel="fused")
    mapped, _ = vmap(lambda o, p: o.update(p, o.init(p), p))(opt, params)
    assert len(calls) == 3
    for i in range(3):
        own, p = tree_map(lambda t, i=i: t[i], opt), params["w"][i]
        assert torch.equal(mapped["w"][i], own.update(p, own.init(p), p)[0])


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reverse_and_forward_mode_agree_in_16_bits(dtype, size, amsgrad):
    """What is stored between the two was rounded, down to zero; what is differentiated was not."""
    p, g = torch.ones(3, dtype=dtype), torch.full((3,), size, dtype=dtype)
    m, v = torch.full((3,), 0.5, dtype=dtype), torch.full((3,), size**2, dtype=dtype)
    state = AdamWState(torch.tensor(1000.0).double(), m, v, v.clone() if amsgrad else ())

    def moved(lr, beta2, g, m, v):
        opt = AdamW(lr=lr, betas=(0.9, beta2), amsgrad=amsgrad, moments=None)
        own = state._replace(exp_avg=m, exp_avg_sq=v)
        return opt.update(g, own, p)[0].float().sum()

    args = (torch.tensor(0.1), torch.tensor(0.999), g, m, v)
    directions = tuple(map(torch.ones_like, args))
    slopes = grad(moved, tuple(range(5)))(*args)
    along = sum((s.float() * d.float()).sum() for s, d in zip(slopes, directions, strict=True))
    assert_close(along, jvp(moved, args, directions)[1], rtol=0.02)


@pytest.mark.parametrize("lr", [0.05, torch.linspace(0.01, 0.1, 5)], ids=["shared", "each its own"])
@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_a_member_alone_in_the_last_chunk_agrees_with_the_others_to_the_rounding(chunk_size, lr):
    params = {"w": torch.randn(5, 4, 3), "b": torch.randn(5, 7)}
    grads, opt = random_like(params), AdamW(lr=lr)
    state = vmap(AdamW().init)(params)
    dims = (0 if isinstance(lr, torch.Tensor) else None, 0, 0, 0)

    def update(opt, grads, state, params):
        return opt.update(grads, state, params)

    whole = vmap(update, in_dims=dims)(opt, grads, state, params)
    chunked = vmap(update, in_dims=dims, chunk_size=chunk_size)(opt, grads, state, params)
    assert_close(chunked, whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [AdamW, Adam])
def test_what_vjp_has_returned_is_differentiated_again(kind):
    """By then what the step has kept is wrapped for a transform that is over."""
    start = torch.randn(3, dtype=torch.float64)

    def after(lr):
        opt = kind(lr=lr)
        params, state = start, opt.init(start)
        for _ in range(3):
            params, state = opt.update(grad(lambda p: p.pow(4).sum())(params), state, params)
        return params.square().sum()

    def slope(lr):
        value, pull_back = vjp(after, lr)
        return pull_back(torch.ones_like(value))[0]

    lr = torch.tensor(0.05, dtype=torch.float64)
    assert_close(grad(slope)(lr), grad(grad(after))(lr))
