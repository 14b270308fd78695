"""Steps unrolled in segments give what the loop gives: its bits, and its derivatives."""

import contextlib
import functools
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    vjp,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import funcopt
from funcopt import unroll

DIVIDED = ["sqrt", "log", 1, 3, 100]
STEPS = 13
GLOBAL = torch.tensor(1.5, dtype=torch.float64)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def params():
    return {"w": double(3, 4), "b": double(4), "v": double(4, 1)}


@pytest.fixture
def loss():
    inputs, wanted = double(20, 3), double(20, 1)

    def mean_square(params):
        hidden = torch.tanh(inputs @ params["w"] + params["b"])
        return (hidden @ params["v"] - wanted).square().mean()

    return mean_square


def train(opt, loss, params, **options):
    """Unroll an optimizer that is closed over, and return what can be differentiated."""

    def step(carry, i):
        params, state = carry
        grads, before = grad_and_value(loss)(params)
        return opt.update(grads, state, params), before

    (params, _), losses = unroll(step, (params, opt.init(params)), STEPS, **options)
    return loss(params) + losses.square().sum()


def loop(step, carry, steps):
    """What `unroll` is to give, without it."""
    outs = []
    for i in range(steps):
        carry, out = step(carry, i)
        outs.append(out)
    return carry, torch.stack(outs)


RATE = torch.tensor(0.05, dtype=torch.float64)
OPTIMIZERS = {
    "adamw": lambda lr: funcopt.AdamW(lr=lr),
    "amsgrad": lambda lr: funcopt.AdamW(lr=lr, amsgrad=True),
    "sgd": lambda lr: funcopt.SGD(lr=lr),
    "momentum": lambda lr: funcopt.SGD(lr=lr, momentum=0.9, nesterov=True),
    "clipped": lambda lr: funcopt.Ema(funcopt.Clip(funcopt.Adam(lr=lr), max_norm=0.5), decay=0.9),
    "schedule": lambda lr: funcopt.AdamW(lr=funcopt.schedules.Cosine(peak=lr, steps=STEPS)),
    "function": lambda lr: funcopt.AdamW(lr=lambda count: lr / (1 + count)),
}


# ------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", ["all", *DIVIDED])
def test_results_have_the_bits_of_the_loop(keep, dtype, loss):
    data, start = torch.randn(9, 5, dtype=dtype), torch.randn(5, dtype=dtype)

    def after(start, unroll):
        opt = funcopt.AdamW(lr=0.1)

        def step(carry, i):
            params, state = carry
            grads, loss = grad_and_value(lambda p: (data[i % 9] @ p - 1).square())(params)
            return opt.update(grads, state, params), loss

        return unroll(step, (start, opt.init(start)), STEPS)

    own = functools.partial(unroll, keep=keep)
    (params, state), losses = after(start, loop)
    for made in (after(start, own), vjp(lambda s: after(s, own), start)[0]):
        assert torch.equal(made[0][0], params)
        assert torch.equal(made[0][1].exp_avg_sq, state.exp_avg_sq)
        assert torch.equal(made[1], losses)
    needing = after(start.clone().requires_grad_(), own)
    assert torch.equal(needing[0][0], params)
    assert torch.equal(needing[1], losses)


@pytest.mark.parametrize("keep", ["all", "sqrt", "log"])
def test_what_is_no_tensor_and_integers_are_carried_along(keep):
    class Carry(NamedTuple):
        x: torch.Tensor
        count: int
        none: None
        whole: torch.Tensor
        name: str

    def step(carry, i):
        assert carry.count == i
        next_one = Carry(carry.x * 1.1, carry.count + 1, None, carry.whole + i, f"step {i}")
        return next_one, {"x": carry.x, "whole": carry.whole, "none": None}

    def after(x):
        carry, out = unroll(step, Carry(x, 0, None, torch.tensor(0), ""), 30, keep=keep)
        assert carry.count == 30
        assert carry.name == "step 29"
        assert carry.whole == sum(range(30))
        assert carry.whole.dtype == out["whole"].dtype == torch.int64
        assert out["none"] is None
        assert out["whole"].tolist() == [sum(range(i)) for i in range(30)]
        return carry.x + 0 * out["x"].sum()

    assert_close(grad(after)(torch.tensor(1.0)), torch.tensor(1.1**30))


def test_no_step_returns_the_carry_and_no_output():
    carry = {"x": torch.ones(2)}
    assert unroll(lambda c, i: 1 / 0, carry, 0, keep="sqrt") == (carry, None)


def test_one_tensor_in_two_places_is_differentiated_in_both():
    def after(x, keep):
        (a, b), out = unroll(lambda c, i: ((c[0] * 2, c[0] * 2), c[1]), (x, x), 4, keep=keep)
        return (a * b).sum() + out.sum()

    x = double(3)
    assert_close(grad(after)(x, "sqrt"), grad(after)(x, "all"))


# --------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("keep", DIVIDED)
def test_gradients_are_those_of_the_loop(name, keep, loss, params):
    def after(lr, params, keep):
        return train(OPTIMIZERS[name](lr), loss, params, keep=keep)

    whole = grad(after, (0, 1))(RATE, params, "all")
    assert_close(grad(after, (0, 1))(RATE, params, keep), whole)
    assert whole[0] != 0
    leaves = [RATE.clone().requires_grad_(), *(p.clone().requires_grad_() for p in params.values())]
    after(leaves[0], dict(zip(params, leaves[1:], strict=True)), keep).backward()
    assert_close([leaf.grad for leaf in leaves], [whole[0], *whole[1].values()])


@pytest.mark.parametrize("kind", [funcopt.AdamW, funcopt.Adam])
def test_segments_within_segments_are_differentiated(kind, loss, params):
    """Of 150 steps there are parts of parts of parts, with what is left of transforms between."""

    def after(lr, keep):
        def step(carry, i):
            params, state = carry
            opt = kind(lr=dict.fromkeys(params, lr * (1 + i / 150)))
            return opt.update(grad(loss)(params), state, params), None

        return loss(unroll(step, (params, kind().init(params)), 150, keep=keep)[0][0])

    assert_close(grad(after)(RATE / 50, "log"), grad(after)(RATE / 50, "all"))
    own, whole = (grad(grad(lambda lr, k=k: after(lr, k)))(RATE / 50) for k in ("log", "all"))
    assert_close(own, whole, rtol=1e-6, atol=0)
    assert_close(
        *(vmap(grad(lambda lr, k=k: after(lr, k)))(RATE[None] / 50) for k in ("log", "all"))
    )
    leaves = [(RATE / 50).requires_grad_() for _ in range(2)]
    for leaf, keep in zip(leaves, ("log", "all"), strict=True):
        after(leaf, keep).backward()
    assert_close(leaves[0].grad, leaves[1].grad)


def test_what_a_step_was_like_within_segments_is_no_other_steps_look():
    """A step is remembered by its look, and what a transform has left would have one of its own."""
    start = {"w": torch.randn(8, 4), "b": torch.zeros(4)}
    inputs = torch.randn(16, 8)

    def after(lr, steps, keep):
        def step(carry, i):
            params, state = carry
            opt = funcopt.AdamW(lr=dict.fromkeys(params, lr * 1.0))
            loss = lambda p: (inputs @ p["w"] + p["b"]).tanh().square().mean()  # noqa: E731
            return opt.update(grad(loss)(params), state, params), None

        carry = start, funcopt.AdamW().init(start)
        return unroll(step, carry, steps, keep=keep)[0][0]["w"].square().sum()

    lr = torch.tensor(1e-3)
    for steps in (50, 100, 60):
        own, whole = (grad(after)(lr, steps, keep) for keep in ("log", "all"))
        assert_close(own, whole)


def test_gradients_are_those_of_differences(loss, params):
    def after(lr):
        return train(funcopt.AdamW(lr=lr), loss, params, keep="sqrt")

    step = 1e-6
    difference = (after(RATE + step) - after(RATE - step)) / (2 * step)
    assert_close(grad(after)(RATE), difference, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("keep", DIVIDED)
def test_second_and_third_derivatives_are_those_of_the_loop(keep):
    def after(lr, start, keep):
        opt = funcopt.Adam(lr=lr)

        def step(carry, i):
            params, state = carry
            return opt.update(grad(lambda p: p.pow(4).sum())(params), state, params), None

        return unroll(step, (start, opt.init(start)), 9, keep=keep)[0][0].square().sum()

    start = double(3)
    for compose in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacrev(f))):
        own, whole = (compose(lambda lr, k=k: after(lr, start, k))(RATE) for k in (keep, "all"))
        assert_close(own, whole)
    third = [grad(grad(grad(lambda lr, k=k: after(lr, start, k))))(RATE) for k in (keep, "all")]
    assert_close(*third)
    seconds = []
    for k in (keep, "all"):
        leaf, lr = start.clone().requires_grad_(), RATE.clone().requires_grad_()
        first = torch.autograd.grad(after(lr, leaf, k), (leaf, lr), create_graph=True)
        seconds.append(torch.autograd.grad(first[0].sum() + first[1].square(), (leaf, lr)))
    assert_close(*seconds)


@pytest.mark.parametrize("keep", DIVIDED)
def test_vmap_and_derivatives_compose_in_any_order(keep, loss, params):
    rates = torch.tensor([0.01, 0.05, 0.1], dtype=torch.float64)

    def after(lr, keep=keep):
        return train(funcopt.AdamW(lr=lr), loss, params, keep=keep)

    whole = torch.stack([grad(functools.partial(after, keep="all"))(rate) for rate in rates])
    assert_close(vmap(grad(after))(rates), whole)
    assert_close(grad(lambda own: vmap(after)(own).sum())(rates), whole)
    assert_close(vmap(vmap(grad(after)))(rates[None]), whole[None])
    leaf = rates.clone().requires_grad_()
    vmap(after)(leaf).sum().backward()
    assert_close(leaf.grad, whole)
    values, pull_back = vjp(vmap(after), rates)  # and called where no transform is left
    assert_close(pull_back(torch.ones_like(values))[0], whole)
    assert_close(values, vmap(functools.partial(after, keep="all"))(rates))


def test_forward_mode_goes_through(loss, params):
    def after(lr, keep):
        return train(funcopt.AdamW(lr=lr), loss, params, keep=keep)

    slope = grad(after)(RATE, "all")
    one, own = torch.ones_like(RATE), functools.partial(after, keep="sqrt")
    assert_close(jvp(own, (RATE,), (one,))[1], slope)
    assert_close(jvp(grad(own), (RATE,), (one,))[1], grad(grad(own))(RATE))
    assert_close(grad(lambda lr: jvp(own, (lr,), (one,))[1])(RATE), grad(grad(own))(RATE))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(own(forward_ad.make_dual(RATE, one))).tangent
    assert_close(tangent, slope)


def test_what_is_traced_is_the_loop(loss, params):
    def after(lr):
        return train(funcopt.SGD(lr=lr), loss, params, keep="sqrt")

    assert_close(make_fx(grad(after))(RATE)(RATE + 0.01), grad(after)(RATE + 0.01))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_whole_compiles(backend):
    def after(lr, start):
        def step(params, i):
            return params - lr * (i + 1) * params.pow(3), params.sum()

        params, sums = unroll(step, start, 5, keep="sqrt")
        return params.square().sum() + sums.sum()

    compiled = torch.compile(grad(after), backend=backend, fullgraph=True)
    start = double(3)
    assert_close(compiled(RATE, start), grad(after)(RATE, start))


torch_reads_grad_of_inputs = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)


@torch_reads_grad_of_inputs
def test_a_compiled_step_is_unrolled(loss, params):
    torch._dynamo.reset()

    @functools.partial(torch.compile, backend="aot_eager")
    def move(params, lr):
        return params - lr * params.pow(3)

    def after(lr, start):
        return unroll(lambda p, i: (move(p, lr), None), start, 9, keep="sqrt")[0].sum()

    start, lr = double(3).requires_grad_(), RATE.clone().requires_grad_()
    own = torch.autograd.grad(after(lr, start), (lr, start))
    lr, start = lr.detach(), start.detach()

    def plain(lr, start):
        for _ in range(9):
            start = start - lr * start.pow(3)
        return start.sum()

    assert_close(own, grad(plain, (0, 1))(lr, start))


def compiled(opt, loss, compiles):
    """Return a compiled step; what it is compiled for is added to the set."""

    def backend(graph, inputs):
        requiring = (tensor.requires_grad for tensor in inputs)
        compiles.add((torch.is_grad_enabled(), *requiring))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    @functools.partial(torch.compile, backend=backend, fullgraph=True)
    def move(params, state):
        grads, before = grad_and_value(loss)(params)
        return opt.update(grads, state, params), before

    return lambda carry, i: move(*carry)


@torch_reads_grad_of_inputs
@pytest.mark.parametrize("keep", ["all", "sqrt", 3])
def test_a_compiled_update_is_unrolled_under_plain_autograd(keep, loss, params):
    """With a state, of which fewer leaves have a derivative in the first step than later."""
    torch._dynamo.reset()
    opt, compiles = funcopt.AdamW(lr=0.05, differentiable=True), set()
    step = compiled(opt, loss, compiles)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    (last, _), losses = unroll(step, (leaves, opt.init(leaves)), STEPS, keep=keep)
    after = loss(last) + losses.square().sum()
    own = torch.autograd.grad(after, list(leaves.values()))
    whole = grad(lambda p: train(opt, loss, p))(params)
    assert_close(own, tuple(whole.values()))
    assert len(compiles) == 2  # one with a derivative, and another or the same without


@torch_reads_grad_of_inputs
def test_a_transform_around_a_compiled_step_is_refused_with_what_to_do(loss, params):
    torch._dynamo.reset()
    opt = funcopt.SGD(lr=0.05)
    step = compiled(opt, loss, set())

    def after(params, keep):
        return loss(unroll(step, (params, opt.init(params)), STEPS, keep=keep)[0][0])

    for keep in ("all", "sqrt"):
        with pytest.raises(RuntimeError, match=r"step\(0\) is compiled.*Compile the whole"):
            grad(after)(params, keep)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    with pytest.raises(RuntimeError, match=r"second derivative.*Compile the whole"):
        torch.autograd.grad(after(leaves, "sqrt"), leaves["w"], create_graph=True)


def test_only_what_depends_on_it_gets_a_derivative():
    def after(x, y):
        return unroll(lambda c, i: ((c[0] * 2, c[1] + i), None), (x, y), 9, keep="sqrt")[0]

    x, y = double(2).requires_grad_(), torch.arange(3)
    first, second = after(x, y)
    assert not second.requires_grad
    assert_close(torch.autograd.grad(first.sum(), x)[0], torch.full_like(x, 2.0**9))
    plain = after(x.detach(), y)
    assert not plain[0].requires_grad


def test_an_update_at_leaves_of_autograd_is_differentiated(loss, params):
    """A loop under plain autograd would not record it, unless told `differentiable=True`."""
    whole = grad(lambda p: train(funcopt.AdamW(lr=0.05), loss, p))(params)
    for keep in ("all", *DIVIDED):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        after = train(funcopt.AdamW(lr=0.05), loss, leaves, keep=keep)
        own = torch.autograd.grad(after, list(leaves.values()))
        assert_close(own, tuple(whole.values()))


def test_an_update_by_gradients_without_a_history_keeps_that_of_the_parameters():
    def after(start):
        opt = funcopt.SGD(lr=0.1)

        def step(carry, i):
            params, state = carry
            return opt.update(grad(torch.sum)(params).detach(), state, params), None

        return unroll(step, (start, opt.init(start)), 9, keep="sqrt")[0][0].sum()

    start = double(3).requires_grad_()
    assert_close(torch.autograd.grad(after(start), start)[0], torch.ones_like(start))


# ---------------------------------------------------------------------------------- closed over


class Scaler(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = torch.nn.Parameter(scale.clone())

    def forward(self, x):
        return x * self.scale


@dataclass
class Config:
    scale: torch.Tensor


class Trainer:
    def __init__(self, scale):
        self.scales = {"first": [scale]}

    def step(self, carry, i):
        return carry * self.scales["first"][0], None


def _by_helper(scale):
    def helper(x):
        return x * scale

    return lambda carry, i: (helper(carry), None)


def _by_recursion(scale):
    def power(x, n):
        return x if n == 0 else power(x * scale, n - 1)

    return lambda carry, i: (power(carry, 1), None)


def _by_default(scale):
    return lambda carry, i, *, own=scale: (carry * own, None)


def _by_list(scale):
    scales = [scale * 1 for _ in range(100)]
    return lambda carry, i: (carry * scales[i], None)


def _by_config(scale):
    config = Config(scale)
    return lambda carry, i: (carry * config.scale, None)


def _by_distribution(scale):
    normal = torch.distributions.Normal(scale, 1.0)
    return lambda carry, i: (carry * normal.mean, None)


def _by_partial(scale):
    return functools.partial(lambda own, carry, i: (carry * own["scale"], None), {"scale": scale})


def _by_inner_gradient(scale):
    return lambda carry, i: (grad(lambda x: (x * x * scale / 2).sum())(carry), None)


CLOSURES = {
    "variable": lambda scale: lambda carry, i: (carry * scale, None),
    "helper": _by_helper,
    "recursion": _by_recursion,
    "default": _by_default,
    "list": _by_list,
    "partial": _by_partial,
    "config": _by_config,
    "distribution": _by_distribution,
    "method": lambda scale: Trainer(scale).step,
    "inner gradient": _by_inner_gradient,
}


@pytest.mark.parametrize("keep", ["sqrt", "log", 1])
@pytest.mark.parametrize("name", CLOSURES)
def test_tensors_that_are_closed_over_get_their_derivative(name, keep):
    def after(scale, x):
        return unroll(CLOSURES[name](scale), x, STEPS, keep=keep)[0].sum()

    x, scale = double(3), torch.tensor(1.1, dtype=torch.float64)
    slope, second = STEPS * 1.1**12 * x.sum(), STEPS * 12 * 1.1**11 * x.sum()
    assert_close(grad(after)(scale, x), slope)
    assert_close(grad(grad(after))(scale, x), second)
    assert_close(vmap(grad(after), (0, None))(scale[None], x), slope[None])
    assert_close(vmap(after, (0, None))(scale[None], x), after(scale, x)[None])
    leaf = scale.clone().requires_grad_()
    assert_close(torch.autograd.grad(after(leaf, x), leaf)[0], slope)


def test_parameters_of_a_module_that_is_closed_over_get_their_derivative():
    module, x = Scaler(torch.tensor(1.1, dtype=torch.float64)), double(3)
    unroll(lambda c, i: (module(c), None), x, STEPS, keep="sqrt")[0].sum().backward()
    assert_close(module.scale.grad, STEPS * 1.1**12 * x.sum())
    swapped = unroll(
        lambda c, i: (functional_call(module, {"scale": RATE}, c), None), x, 3, keep="sqrt"
    )
    assert_close(swapped[0], x * RATE**3)


def test_a_global_gets_its_derivative(monkeypatch):
    x = double(3)

    def helper(x):
        return x * GLOBAL

    def after():
        return unroll(lambda c, i: (helper(c), None), x, 9, keep="sqrt")[0].sum()

    def through_global(value):
        monkeypatch.setitem(globals(), "GLOBAL", value)
        return after()

    assert_close(grad(through_global)(RATE + 1), 9 * (RATE + 1) ** 8 * x.sum())


def test_who_closes_over_nothing_to_differentiate_is_called_as_it_is():
    calls = []

    def step(carry, i):
        calls.append(i)
        return carry * 2, None

    step.__dict__["seen"] = calls
    grad(lambda x: unroll(step, x, 4, keep="sqrt")[0])(torch.tensor(1.0))
    assert calls == [0, 0, 1, 2, 3, 2, 3, 0, 1]  # one by itself, all, and each segment again


class Hidden:
    """Something that has a tensor, and no attribute."""

    __slots__ = ("tensor",)

    def __init__(self, tensor):
        self.tensor = tensor

    def get(self):
        return self.tensor


@pytest.mark.parametrize("plain", [False, True])
def test_a_tensor_that_is_not_found_is_refused(plain):
    def after(scale):
        hidden = Hidden(scale)
        step = lambda c, i: ((c[0] * hidden.get(), c[1]), None)  # noqa: E731
        start = torch.ones(2, requires_grad=plain)
        (x, _), _ = unroll(step, (start, start), 4, keep="sqrt")
        return x.sum()

    scale = torch.tensor(2.0, requires_grad=plain)
    with pytest.raises(ValueError, match=r"carry\[0\] depends on a tensor that requires"):
        after(scale) if plain else grad(after)(scale)


def test_an_iterator_is_refused():
    batches = iter([torch.ones(())] * 9)

    def after(x):
        return unroll(lambda c, i: (c * next(batches), None), x, 4, keep="sqrt")[0]

    with pytest.raises(ValueError, match="step: batches is list_iterator, an iterator"):
        grad(after)(torch.tensor(1.0))
    assert grad(lambda x: unroll(lambda c, i: (c * next(batches), None), x, 4)[0])(torch.ones(()))


# ------------------------------------------------------------------------------------ randomness


@pytest.mark.parametrize("keep", DIVIDED)
def test_what_is_drawn_is_drawn_again(keep):
    def after(x, keep):
        def step(c, i):
            return c * torch.nn.functional.dropout(torch.ones(50).double(), 0.1), torch.rand(())

        made, drawn = unroll(step, x, STEPS, keep=keep)
        return (made * made).sum(), drawn

    found = []
    for own in ("all", keep):
        torch.manual_seed(3)
        slope, drawn = grad(lambda x, own=own: after(x, own), has_aux=True)(double(50))
        found.append((slope, drawn, torch.rand(())))  # and the next number is what it was
    assert_close(*found, rtol=1e-12, atol=0)


@pytest.mark.parametrize("place", ["closure", "carry"])
def test_a_generator_draws_again(place):
    def after(x, keep):
        generator = torch.Generator().manual_seed(5)

        def step(carry, i):
            x, own = carry
            number = torch.rand((), generator=own or generator, dtype=torch.float64)
            return (x * number, own), None

        start = (x, generator if place == "carry" else None)
        (x, _), _ = unroll(step, start, 9, keep=keep)
        return x.sum()

    x = double(2)
    assert_close(grad(after)(x, "sqrt"), grad(after)(x, "all"))
    assert_close(after(x, "sqrt"), after(x, "all"))


def test_members_draw_as_vmap_was_told():
    def after(x):
        return unroll(lambda c, i: (c * torch.rand((), dtype=c.dtype), None), x, 4, keep="sqrt")[0]

    x = torch.ones(3, dtype=torch.float64)
    for randomness in ("same", "different"):
        own, again = (
            torch.manual_seed(1) and vmap(f, randomness=randomness)(x) for f in (after, grad(after))
        )
        assert_close(own, again)  # linear in x
        assert len(set(own.tolist())) == (1 if randomness == "same" else 3)


def test_autocast_is_what_it_was():
    weights = torch.randn(4, 4)

    def after(x, keep):
        with torch.autocast("cpu", torch.bfloat16):
            return unroll(lambda c, i: ((c @ weights).float(), None), x, 4, keep=keep)[0].sum()

    x = torch.randn(4)
    slopes = [grad(after)(x, keep) for keep in ("all", "sqrt")]
    assert_close(*slopes, rtol=0, atol=0)
    leaf = x.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(after(leaf, "sqrt"), leaf)[0], slopes[0])


# ------------------------------------------------------------------------------------ truncation


@pytest.mark.parametrize("keep", ["all", "sqrt"])
def test_truncated_derivatives_go_back_so_far(keep):
    def after(rate, x, truncate):
        (x, last), out = unroll(
            lambda c, i: ((c[0] * rate, c[1] + rate), c[0]), (x, x), 7, keep=keep, truncate=truncate
        )
        return (x + last).sum(), out

    rate, x = torch.tensor(1.1, dtype=torch.float64), double(2)
    (by_rate, by_x), out = grad(after, (0, 1), has_aux=True)(rate, x, 3)
    assert_close(by_rate, (3 * 1.1**6 * x).sum() + 6)  # x 1.1^4 r^3, and twice 3 r
    assert_close(by_x, torch.zeros(2, dtype=torch.float64))
    assert_close(out, torch.stack([x * 1.1**i for i in range(7)]))
    assert_close(grad(after, has_aux=True)(rate, x, 9)[0], (7 * 1.1**6 * x).sum() + 14)
    leaf = rate.clone().requires_grad_()
    assert_close(torch.autograd.grad(after(leaf, x, 3)[0], leaf)[0], by_rate)


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"steps": 2.0}, TypeError, "steps=2.0: must be an integer of at least 0"),
        ({"steps": True}, TypeError, "steps=True"),
        ({"steps": -1}, ValueError, "steps=-1"),
        ({"keep": "cube"}, ValueError, "keep='cube': must be 'all', 'sqrt', 'log', or"),
        ({"keep": 0}, ValueError, "keep=0"),
        ({"keep": True}, ValueError, "keep=True"),
        ({"keep": 2.0}, ValueError, "keep=2.0"),
        ({"truncate": 0}, ValueError, "truncate=0: must be an integer of at least 1"),
        ({"truncate": 1.5}, TypeError, "truncate=1.5"),
    ],
)
def test_wrong_options_are_refused_before_any_step(options, error, said):
    options = {"steps": 3, "keep": "sqrt", **options}
    with pytest.raises(error, match=said):
        unroll(lambda carry, i: 1 / 0, torch.ones(2), **options)


STEPS_THAT_CHANGE = {
    "shape": (lambda c, i: ({"a": {"b": c["a"]["b"].repeat(2)}}, None), r"carry\['a'\]\['b'\]"),
    "dtype": (lambda c, i: ({"a": {"b": c["a"]["b"].double()}}, None), "float32.*to.*float64"),
    "number": (lambda c, i: ({"a": {"b": 1.0}}, None), r"to 1.0 \(float\)"),
    "structure": (
        lambda c, i: ({"a": {"c": c["a"]["b"]}}, None),
        r"\['c'\] came and.*\['b'\] went",
    ),
}


@pytest.mark.parametrize("keep", ["all", "sqrt"])
@pytest.mark.parametrize("name", STEPS_THAT_CHANGE)
def test_a_carry_that_changes_its_look_is_refused_by_its_path(name, keep):
    step, said = STEPS_THAT_CHANGE[name]

    def after(x):
        return unroll(
            lambda c, i: step(c, i) if i == 2 else (c, None), {"a": {"b": x}}, 4, keep=keep
        )

    for run in (after, lambda x: vjp(after, x)):
        with pytest.raises(ValueError, match=f"(?s)step 2.*{said}|{said}.*step 2"):
            run(torch.ones(3))


@pytest.mark.parametrize(
    ("out", "error", "said"),
    [
        (lambda i: 1.0, TypeError, "out is 1.0"),
        (torch.ones, ValueError, "out changed in step 1"),
        (lambda i: {str(i): torch.ones(2)}, ValueError, "out changed its structure in step 1"),
    ],
)
def test_outputs_that_cannot_be_stacked_are_refused(out, error, said):
    with pytest.raises(error, match=said):
        unroll(lambda carry, i: (carry, out(i)), torch.ones(2), 3)


def test_a_step_that_returns_no_pair_is_refused():
    with pytest.raises(TypeError, match=r"step\(0\) returned a tensor of shape \(2,\)"):
        unroll(lambda carry, i: carry, torch.ones(2), 3)


@pytest.mark.parametrize("transform", [contextlib.nullcontext, None])
def test_a_step_that_writes_into_the_carry_is_refused(transform):
    def after(x):
        def step(carry, i):
            carry["n"].add_(1)
            return {"x": carry["x"] * 2, "n": carry["n"]}, None

        return unroll(step, {"x": x, "n": torch.zeros(())}, 4, keep="sqrt")[0]["x"].sum()

    with pytest.raises(ValueError, match=r"carry\['n'\] was written in step 0"):
        grad(after)(torch.ones(2)) if transform else after(torch.ones(2, requires_grad=True))


# ---------------------------------------------------------------------------------------- memory


def kept_while(make):
    """How many bytes torch's allocator has handed out for a result and its history."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=False) as profile:
        result = make()
    events = profile.kineto_results.events()
    del result
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize(("keep", "most"), [("sqrt", 0.08), ("log", 0.05), (10, 0.05)])
def test_little_is_kept_for_the_derivative(keep, most):
    """A step of this kind leaves 8 sizes of the parameters, and a carry has 3 of them."""
    start = {"w": torch.randn(64, 64) / 8, "v": torch.randn(64, 64) / 8}
    inputs = torch.randn(32, 64)

    def after(start, keep):
        opt = funcopt.AdamW(lr=1e-3)

        def step(carry, i):
            params, state = carry
            loss = lambda p: ((inputs @ p["w"]).tanh() @ p["v"]).square().mean()  # noqa: E731
            return opt.update(grad(loss)(params), state, params), None

        return unroll(step, (start, opt.init(start)), 200, keep=keep)[0]

    leaves = {name: p.clone().requires_grad_() for name, p in start.items()}
    funcopt.memory.release()
    own, whole = (kept_while(lambda k=k: after(leaves, k)) for k in (keep, "all"))
    assert own <= most * whole
