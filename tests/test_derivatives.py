"""What is returned where a step has no derivative, and how far float32 is from differences."""

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

from funcopt import SGD, AdamW, Clip, ClipValue, unroll

PARAM = torch.ones((), dtype=torch.float64)


def number(value):
    return torch.tensor(float(value), dtype=torch.float64)


def both_modes(function, *args):
    """Return the derivatives by each argument in reverse mode, which forward mode must share."""
    slopes = grad(function, tuple(range(len(args))))(*args)
    for index, (arg, slope) in enumerate(zip(args, slopes, strict=True)):

        def alone(own, index=index):
            return function(*args[:index], own, *args[index + 1 :])

        assert_close(jvp(alone, (arg,), (torch.ones_like(arg),))[1], slope)
    return [slope.item() for slope in slopes]


def moved_by(opt, grad, exp_avg, exp_avg_sq, largest=()):
    state = opt.init(PARAM)._replace(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    state = state._replace(max_exp_avg_sq=largest) if opt.amsgrad else state
    return opt.update(grad, state, PARAM)[0]


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_where_the_second_moment_is_zero_its_root_counts_as_a_constant(momentum):
    """The step is -lr m / bc1 / (sqrt(v / bc2) + eps): at v = 0 the root has an infinite slope."""
    opt = AdamW(lr=0.1, eps=1e-3, weight_decay=0.0)
    by_grad, by_exp_avg, by_exp_avg_sq = both_modes(
        lambda *own: moved_by(opt, *own), number(0), number(momentum), number(0)
    )
    assert by_grad == pytest.approx(-0.1 * (1 - 0.9) / (1 - 0.9) / 1e-3)
    assert by_exp_avg == pytest.approx(-0.1 * 0.9 / (1 - 0.9) / 1e-3)
    assert by_exp_avg_sq == 0.0


def test_at_the_first_zero_gradient_that_is_the_derivative_itself():
    """From zero moments the step is -lr g / (|g| + eps), which has the slope -lr / eps at 0."""
    opt = AdamW(lr=0.1, eps=1e-3, weight_decay=0.0)

    def after(grad):
        return opt.update(grad, opt.init(PARAM), PARAM)[0]

    difference = (after(number(1e-9)) - after(number(-1e-9))) / 2e-9
    assert grad(after)(number(0)).item() == pytest.approx(difference.item(), rel=1e-5)


def test_a_tie_in_amsgrads_maximum_is_shared_by_both():
    opt = AdamW(lr=0.1, weight_decay=0.0, amsgrad=True)
    args = number(2), number(1), number(3)
    state = opt.init(PARAM)._replace(exp_avg=args[1], exp_avg_sq=args[2])
    tie = opt.update(args[0], state, PARAM)[1].exp_avg_sq

    def slopes(largest):
        return both_modes(lambda *own: moved_by(opt, *own), *args, largest)

    at, above, below = slopes(tie), slopes(tie + 1e-9), slopes(tie - 1e-9)
    for own, one, other in zip(at, above, below, strict=True):
        assert own == pytest.approx((one + other) / 2, rel=1e-6)
    assert above[2] == below[3] == 0.0


def test_a_norm_at_its_bound_is_clipped_as_one_beyond():
    """It is multiplied by max_norm / (norm + 1e-6), if that is less than 1."""

    def after(grad):
        opt = Clip(SGD(lr=1.0), max_norm=1.0)
        return opt.update(grad, opt.init(PARAM), PARAM)[0]

    assert grad(after)(number(1 - 1e-3)) == -1
    for size in (1.0, 1 + 1e-3):  # -g / (g + 1e-6), with nearly no slope
        assert grad(after)(number(size)).item() == pytest.approx(-1e-6, rel=1e-2)
        assert jvp(after, (number(size),), (number(1),))[1] == grad(after)(number(size))


def test_a_value_at_its_bound_has_the_derivative_of_one_within():
    def after(grad):
        opt = ClipValue(SGD(lr=1.0), max_value=1.0)
        return opt.update(grad, opt.init(PARAM), PARAM)[0]

    sizes, slopes = [0.999, 1.0, -1.0, 1.001], [-1, -1, -1, 0]
    for size, slope in zip(sizes, slopes, strict=True):
        assert both_modes(after, number(size)) == [slope]
    of_members = grad(lambda own: vmap(after)(own).sum())(torch.tensor(sizes, dtype=torch.float64))
    assert of_members.tolist() == slopes


STEPS = 200


def after_training(dtype):
    """Return a loss of the learning rate and the weights, after training by AdamW."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs, wanted = draw(32, 8).to(dtype), draw(32, 1).to(dtype)
    start = {"w": draw(8, 16) / 8**0.5, "b": draw(16), "v": draw(16, 1) / 4}

    def loss(params):
        return ((inputs @ params["w"] + params["b"]).tanh() @ params["v"] - wanted).square().mean()

    def after(lr, params):
        opt = AdamW(lr=lr)

        def step(carry, i):
            params, state = carry
            return opt.update(grad(loss)(params), state, params), None

        return loss(unroll(step, (params, opt.init(params)), STEPS, keep="sqrt")[0][0])

    lr = torch.tensor(3e-3, dtype=dtype)
    return after, lr, {name: leaf.to(dtype) for name, leaf in start.items()}


def test_derivatives_through_200_steps_are_those_of_differences():
    """In float64 but for rounding; in float32 to 1e-4 of themselves (2e-5 was seen)."""
    after, lr, start = after_training(torch.float64)
    by_lr, by_start = grad(after, (0, 1))(lr, start)
    step = 1e-8
    difference = (after(lr + step, start) - after(lr - step, start)) / (2 * step)
    assert_close(by_lr, difference, rtol=1e-6, atol=0)
    along = {name: slope / slope.norm() for name, slope in by_start.items()}
    ends = [
        after(lr, {name: leaf + sign * step * along[name] for name, leaf in start.items()})
        for sign in (1, -1)
    ]
    own = sum(slope.norm() for slope in by_start.values())
    assert_close(own, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=0)

    narrow, lr, start = after_training(torch.float32)
    for found, exact in zip(
        leaves_of(grad(narrow, (0, 1))(lr, start)),
        leaves_of((by_lr, by_start)),
        strict=True,
    ):
        assert (found.double() - exact).norm() <= 1e-4 * exact.norm()


def leaves_of(slopes):
    return [slopes[0], *slopes[1].values()]


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate_is_learned", [False, True])
def test_small_leaves_have_the_derivatives_that_each_has_by_itself(options, dtype, rate_is_learned):
    """Under plain autograd they are joined to one; of one leaf there is nothing to join."""
    torch.manual_seed(0)
    shapes = {"w": (3, 4), "b": (4,), "s": (), "none": (0,), "unused": (2, 3)}
    params = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=rate_is_learned)
    opt = AdamW(lr=rate, differentiable=True, **options)

    def after(leaves):
        moved, state = leaves, opt.init(leaves)
        for _ in range(2):
            moved, state = opt.update({n: p.sin() for n, p in moved.items()}, state, moved)
        return moved

    def slopes(names):
        leaves = {name: params[name].clone().requires_grad_() for name in names}
        moved = after(leaves)
        total = sum(moved[name].square().sum() for name in names if name != "unused")
        wanted = [*leaves.values(), *([rate] if rate_is_learned else [])]
        found = torch.autograd.grad(total, wanted, allow_unused=True)
        return dict(zip(names, found, strict=False)), found[len(names) :]

    together, by_rate = slopes(list(shapes))
    total = torch.zeros(1)
    for name in shapes:
        if name == "unused":
            assert together[name] is None
            continue
        alone, own_rate = slopes([name])
        assert_close(together[name], alone[name], rtol=0, atol=0)
        total = total + sum(map(float, own_rate))
    if rate_is_learned:
        assert_close(
            by_rate[0].float(), total[0], rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=0
        )
