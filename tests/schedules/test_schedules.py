"""A schedule as a value, what it refuses, and what it does in an optimizer."""

import copy
import dataclasses
import math
import pickle

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch.func import grad, jvp, vmap

import funcopt
from funcopt import AdamW, schedules
from funcopt.schedules import (
    Constant,
    Cosine,
    Decoupled,
    Exponential,
    InverseSquareRoot,
    Join,
    Linear,
    OneCycle,
    OneCycleMomentum,
    Piecewise,
    Polynomial,
    WarmupStableDecay,
)

from ..cases import (
    KERNELS,
    assert_close,
    assert_same_bits,
    clone,
    leaves,
    random_like,
    run,
    tree_map,
)
from .cases import CASES, in_tensors


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


# A value.


@pytest.mark.parametrize("name", CASES)
def test_the_repr_shows_every_number_and_rebuilds_the_value(name):
    schedule = CASES[name].schedule
    assert eval(repr(schedule), vars(schedules)) == schedule
    assert all(field.name in repr(schedule) for field in dataclasses.fields(schedule))
    opt = AdamW(lr=schedule, weight_decay=schedule)
    assert eval(repr(opt), {"AdamW": AdamW, **vars(schedules)}) == opt


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, dataclasses.replace], ids=["copy", "deepcopy", "replace"]
)
@pytest.mark.parametrize("name", CASES)
def test_copies_are_equal_alone_and_in_an_optimizer(name, copied):
    schedule = CASES[name].schedule
    for value in (schedule, AdamW(lr=schedule)):
        assert copied(value) == value
        assert hash(copied(value)) == hash(value)
    assert AdamW(lr=schedule) != AdamW(lr=Constant(0.5))
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.steps = 3


def test_counts_stay_the_integers_they_were():
    assert repr(Cosine(peak=1, steps=10, warmup_steps=2)) == (
        "Cosine(peak=1.0, steps=10, warmup_steps=2, start=0.0, end=0.0, power=1.0)"
    )
    assert repr(Piecewise([1, 2], [3])) == (
        "Piecewise(values=(1.0, 2.0), boundaries=(3,), shape='constant')"
    )


@pytest.mark.parametrize(
    "tree_map", [torch_pytree.tree_map, optree.tree_map], ids=["torch", "optree"]
)
@pytest.mark.parametrize("name", CASES)
def test_its_tensors_are_leaves_and_the_rest_is_structure(name, tree_map):
    schedule = CASES[name].schedule
    assert leaves(schedule) == []
    assert tree_map(lambda t: t * 2, schedule) == schedule
    of_tensors = in_tensors(schedule)
    doubled = tree_map(lambda t: t * 2, AdamW(lr=of_tensors)).lr
    assert type(doubled) is type(schedule)
    numbers = [leaf.item() for leaf in leaves(of_tensors)]
    assert [leaf.item() for leaf in leaves(doubled)] == [2 * number for number in numbers]
    assert leaves(of_tensors)


def test_its_leaves_have_names_in_an_optimizer():
    opt = AdamW(
        lr=Join((Constant(f64(0.1)), Piecewise((f64(0.1), 0.2), (5,))), (f64(3.0),)),
        weight_decay=Linear(0.0, f64(0.1), 10),
    )
    found, _ = torch_pytree.tree_flatten_with_path(opt)
    assert sorted(torch_pytree.keystr(path) for path, _ in found) == [
        ".lr.boundaries[0]",
        ".lr.schedules[0].value",
        ".lr.schedules[1].values[0]",
        ".weight_decay.end",
    ]


def test_every_schedule_is_public_documented_and_in_the_table():
    for name in schedules.__all__:
        assert ">>>" in getattr(schedules, name).__doc__, name
    assert {type(case.schedule).__name__ for case in CASES.values()} == set(schedules.__all__)
    assert funcopt.schedules is schedules


# What is refused.

REFUSED = [
    (lambda: Constant(-0.1), "value=-0.1: value must be finite and at least 0"),
    (lambda: Constant(f64([0.1, math.nan])), r"value=nan in a tensor of shape \(2,\)"),
    (lambda: Linear(0.0, math.inf, 3), "end=inf: end must be finite and at least 0"),
    (lambda: Linear(0.0, 1.0, -5), "steps=-5.0: steps must be finite and above 0"),
    (lambda: Linear(0.0, 1.0, 0), "steps=0.0: steps must be finite and above 0"),
    (lambda: Polynomial(1.0, 0.0, 5, power=0), "power=0.0: power must be finite and above 0"),
    (lambda: Exponential(1.0, rate=1.1), "rate=1.1: rate must be above 0 and at most 1"),
    (lambda: Exponential(1.0, rate=f64(0.0)), "rate=0.0 in a tensor"),
    (lambda: InverseSquareRoot(1.0, 0), "warmup_steps=0: must be above 0. Give it 1"),
    (lambda: Cosine(1.0, steps=5, warmup_steps=-1), "warmup_steps=-1.0: .* at least 0"),
    (
        lambda: Cosine(1.0, steps=5, warmup_steps=8),
        "warmup_steps=8: must be below steps=5, which counts the warmup too. Shorten",
    ),
    (lambda: Cosine(1.0, steps=5, warmup_steps=5), "warmup_steps=5: must be below steps=5"),
    (lambda: Cosine(1.0, f64([5.0, 9.0]), warmup_steps=7), r"warmup_steps=7: must be below steps="),
    (
        lambda: WarmupStableDecay(1.0, steps=9, warmup_steps=4, decay_steps=6),
        "warmup_steps=4 and decay_steps=6: together at most steps=9, .* Shorten",
    ),
    (
        lambda: WarmupStableDecay(1.0, 9, 1, 1, shape="square"),
        "shape='square': must be one of constant, linear, cosine, sqrt",
    ),
    (lambda: Piecewise((1.0, -0.5), (3,)), r"values\[1\]=-0.5: values\[1\] must be finite"),
    (lambda: Piecewise((1.0, 0.5), (0,)), r"boundaries\[0\]=0.0: boundaries\[0\] must be finite"),
    (
        lambda: Piecewise((1.0, 0.5, 0.1), (7, 3)),
        r"boundaries\[1\]=3: must be above boundaries\[0\]=7. Sort them, with their values",
    ),
    (lambda: Piecewise((1.0, 0.5, 0.1), (7, f64(7.0))), r"boundaries\[1\]=7.*must be above"),
    (
        lambda: Piecewise((1.0, 0.5), (3, 7)),
        "2 values for 2 boundaries: there must be one more than boundaries",
    ),
    (lambda: Join((Constant(1.0),), (3,)), "1 schedules for 1 boundaries: there must be one more"),
    (lambda: Join((), ()), "0 schedules for 0 boundaries"),
    (
        lambda: Join((Constant(1.0),) * 3, (7, 7)),
        r"boundaries\[1\]=7: must be above boundaries\[0\]=7. Sort them, with their schedules",
    ),
    (
        lambda: OneCycle(1.0, steps=2),
        "pct_start=0.3, steps=2: their product must be at least 1. Raise",
    ),
    (lambda: OneCycle(1.0, steps=20, pct_start=1.5), "pct_start=1.5: .* at most 1"),
    (
        lambda: OneCycle(1.0, steps=20, pct_start=0.6, three_phase=True),
        "pct_start=0.6, steps=20: rise and fall, .* must end before the whole. Lower",
    ),
    (lambda: OneCycle(1.0, 9).momentum(1.0), "base_momentum=1.0: .* at least 0 and below 1"),
    (lambda: OneCycle(1.0, 9).momentum(0.5, -0.1), "max_momentum=-0.1: .* at least 0 and below 1"),
    (lambda: OneCycleMomentum(steps=2), "pct_start=0.3, steps=2: their product must be at least 1"),
    (lambda: Decoupled(-0.1, 0.1), "weight_decay=-0.1: weight_decay must be finite"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_number_out_of_range_is_refused_with_value_rule_and_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant("0.1"), "value='0.1': must be a number or a 0-dim tensor, not str"),
        (lambda: Constant(Constant(0.1)), "must be a number or a 0-dim tensor, not Constant"),
        (lambda: Linear(0.0, 1.0, True), "steps=True: must be a number"),
        (lambda: Linear(0.0, 1.0, torch.tensor(3)), "steps is a tensor of torch.int64: give it a"),
        (lambda: Exponential(1.0, 0.5, staircase=1), "staircase=1: must be True or False"),
        (lambda: OneCycle(1.0, 10, three_phase="no"), "three_phase='no': must be True or False"),
        (lambda: Piecewise(1.0, (3,)), "values=1.0: must be a tuple"),
        (lambda: Piecewise((1.0, 0.5), 3), "boundaries=3: must be a tuple"),
        (lambda: Piecewise((1.0, "x"), (3,)), r"values\[1\]='x': must be a number"),
        (lambda: Join((Constant(1.0), 0.5), (3,)), r"schedules\[1\]=0.5: .* give Constant"),
        (lambda: Decoupled(None, 0.1), "weight_decay=None: must be a number"),
    ],
)
def test_a_wrong_type_is_refused_with_what_is_wanted(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("step", [-1, math.nan, math.inf, f64(-1.0)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_step_that_counts_nothing_is_refused(name, step):
    with pytest.raises(ValueError, match=r"step=.*: must be finite and at least 0"):
        CASES[name].schedule(step)


def test_numbers_stacked_for_two_vmaps_are_not_held_against_each_other():
    schedule = Cosine(f64(1.0), steps=f64([5.0, 9.0]), warmup_steps=f64([1.0, 2.0, 3.0]))
    values = vmap(
        lambda warmup: vmap(lambda steps: Cosine(1.0, steps, warmup)(f64(1.0)))(schedule.steps)
    )(schedule.warmup_steps)
    expected = [[Cosine(1.0, steps, warmup)(1) for steps in (5, 9)] for warmup in (1, 2, 3)]
    assert_close(values, f64(expected), rtol=1e-14)


def test_it_can_be_built_within_a_transform_and_within_a_graph():
    def built(peak, warmup):
        schedule = Cosine(peak, steps=9, warmup_steps=warmup)
        return Join((schedule, OneCycle(peak, 8 * warmup)), (warmup + 1,))(3 * warmup)

    peaks, warmups = f64([0.1, 0.2]), f64([2.0, 3.0])
    expected = torch.stack([built(p, w) for p, w in zip(peaks, warmups, strict=True)])
    assert_close(vmap(built)(peaks, warmups), expected, rtol=1e-14)
    torch._dynamo.reset()
    alone, stacked = (peaks[0], warmups[0]), (peaks, warmups)
    for function, operands in ((built, alone), (grad(built), alone), (vmap(built), stacked)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_close(compiled(*operands), function(*operands), rtol=1e-14)


# In an optimizer.


def torch_run(param, gradients, make, **options):
    """Run torch.optim.AdamW with a scheduler of torch's."""
    param = torch.nn.Parameter(param.clone())
    opt = torch.optim.AdamW([param], fused=True, **options)
    scheduler = make(opt)
    for gradient in gradients:
        param.grad = gradient
        opt.step()
        scheduler.step()
    return param.detach()


def test_a_run_is_that_of_torch_with_its_scheduler():
    param = torch.randn(5, dtype=torch.float64)
    gradients = [torch.randn_like(param) for _ in range(20)]
    theirs = torch_run(
        param,
        gradients,
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, 20, cycle_momentum=False),
        weight_decay=0.1,
    )
    ours, _ = run(AdamW(lr=OneCycle(0.1, 20), weight_decay=0.1), param, gradients)
    assert_close(ours, theirs, rtol=1e-13)


SCHEDULED = AdamW(
    lr=Cosine(0.1, steps=12, warmup_steps=3),
    betas=(OneCycle(0.1, steps=10).momentum(), Linear(0.9, 0.999, steps=8)),
    eps=Exponential(1e-2, rate=0.5),
    weight_decay=Linear(0.2, 0.0, steps=6),
)


def at(opt, step):
    """The optimizer whose numbers are what the schedules of this one are at a step."""
    return AdamW(
        lr=opt.lr(step),
        betas=tuple(beta(step) for beta in opt.betas),
        eps=opt.eps(step),
        weight_decay=opt.weight_decay(step),
        kernel=opt.kernel,
    )


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
@pytest.mark.parametrize("in_place", [False, True])
def test_every_number_follows_its_schedule(in_place, kernel):
    opt = dataclasses.replace(SCHEDULED, kernel=kernel)
    params = {"w": torch.randn(3), "b": torch.randn(2, dtype=torch.float64)}
    gradients = [random_like(params) for _ in range(15)]
    expected, state = params, opt.init(params)
    ours, own = clone(params), opt.init(params)
    for step, grads in enumerate(gradients):
        expected, state = at(opt, step).update(grads, state, expected)
        ours, own = (opt.update_ if in_place else opt.update)(grads, own, ours)
    assert_same_bits((ours, own), (expected, state))
    assert own.step == 15


def test_every_number_follows_its_schedule_at_the_count_of_each_member_and_leaf():
    for per_leaf in (False, True):
        opt = dataclasses.replace(SCHEDULED, step_per_leaf=per_leaf)
        params = {"w": torch.randn(2, 3), "b": torch.randn(2, 2)}
        grads = random_like(params)
        counts = [[1.0, 7.0], [3.0, 5.0]] if per_leaf else [[1.0, 7.0]] * 2
        steps = dict(zip(params, map(f64, counts), strict=True))
        state = vmap(opt.init)(params)._replace(step=steps if per_leaf else steps["w"])
        moved, _ = vmap(opt.update)(grads, state, params)
        for i in range(2):
            for name, step in steps.items():
                own = [tree[name][i] for tree in (grads, params)]
                alone = AdamW().init(own[1])._replace(step=step[i])
                expected, _ = at(opt, step[i].item()).update(own[0], alone, own[1])
                assert_close(moved[name][i], expected, rtol=1e-6)


def test_derivatives_with_respect_to_schedules_of_every_number_are_those_of_differences():
    params = f64([1.0, -2.0])
    gradients = [f64([0.5, -1.0]), f64([1.0, 0.25]), f64([-0.5, 2.0])]

    def after(*numbers):
        lr, beta1, beta2, eps, decay = (Linear(n, 0.9 * n, steps=4) for n in numbers)
        opt = AdamW(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
        return run(opt, params, gradients)[0]

    numbers = [f64(n).requires_grad_() for n in (0.1, 0.8, 0.9, 0.01, 0.2)]
    assert torch.autograd.gradcheck(after, numbers, check_forward_ad=True)
    values = tuple(number.detach() for number in numbers)
    slopes = torch.func.jacrev(after, argnums=tuple(range(5)))(*values)
    assert all(slope.all() for slope in slopes)
    assert_close(slopes, torch.autograd.functional.jacobian(after, tuple(numbers)), rtol=1e-9)


def decayed(opt, steps):
    """What zero gradients leave of ones: weight decay alone."""
    params, zeros = f64([1.0, 1.0]), f64([0.0, 0.0])
    factors, state = [], opt.init(params)
    for _ in range(steps):
        moved, state = opt.update(zeros, state, params)
        factors.append((moved / params)[0].item())
        params = moved
    return factors


LR = Cosine(1e-2, steps=8, warmup_steps=3)


def test_weight_decay_is_times_the_learning_rate_as_in_torch():
    expected = [1 - 0.1 * LR(step) for step in range(10)]
    assert decayed(AdamW(lr=LR, weight_decay=0.1), 10) == pytest.approx(expected, rel=1e-15)


def test_the_papers_weight_decay_is_scheduled_along_but_independent_of_the_peak():
    for peak in (1e-2, 1e-4):
        lr = Cosine(peak, steps=8, warmup_steps=3)
        multiplier = Cosine(1.0, steps=8, warmup_steps=3)
        expected = [1 - 0.05 * multiplier(step) for step in range(10)]
        opt = AdamW(lr=lr, weight_decay=0.05 / peak)
        assert decayed(opt, 10) == pytest.approx(expected, rel=1e-14)


def test_a_decoupled_weight_decay_is_the_same_at_every_step_but_those_that_move_nothing():
    expected = [1.0 if LR(step) == 0 else 1 - 0.05 for step in range(10)]
    assert expected.count(1.0) == 3
    opt = AdamW(lr=LR, weight_decay=Decoupled(0.05, LR))
    assert decayed(opt, 10) == pytest.approx(expected, rel=1e-15)
    scheduled = AdamW(lr=0.3, weight_decay=Decoupled(Linear(0.0, 0.1, steps=4), 0.3))
    assert decayed(scheduled, 4) == pytest.approx([1.0, 0.975, 0.95, 0.925], rel=1e-15)


def test_a_sweep_over_the_numbers_of_a_schedule_is_a_loop():
    opt = AdamW(
        lr=Cosine(f64([1e-3, 1e-2, 1e-1]), steps=8, warmup_steps=f64([1.0, 2.0, 3.0])),
        weight_decay=Linear(0.0, f64([0.1, 0.2, 0.3]), steps=4),
    )
    params = {"w": torch.randn(3, 4), "b": torch.randn(3, dtype=torch.float64)}
    gradients = [random_like(params) for _ in range(6)]
    moved, state = params, vmap(AdamW().init)(params)
    for grads in gradients:
        moved, state = vmap(lambda o, g, s, p: o.update(g, s, p))(opt, grads, state, moved)
    for i in range(3):
        member = tree_map(lambda t, i=i: t[i], (opt, params, gradients))
        alone, own = run(*member)
        assert_close(tree_map(lambda t, i=i: t[i], (moved, state)), (alone, own), rtol=1e-6)


def loss_after_training(opt):
    params = f64([1.0, -2.0])
    state = opt.init(params)
    for _ in range(5):
        params, state = opt.update(grad(lambda p: p.pow(4).sum())(params), state, params)
    return params.square().sum()


def test_the_derivative_of_training_with_respect_to_a_schedule_is_right():
    opt = AdamW(
        lr=Cosine(f64(0.1), steps=f64(8.0), warmup_steps=f64(2.5), power=f64(1.5)),
        weight_decay=Decoupled(Linear(f64(0.05), 0.0, f64(4.5)), f64(0.1)),
    )
    numbers = tuple(leaf.clone().requires_grad_() for leaf in leaves(opt))

    def loss(*numbers):
        rest = iter(numbers)
        return loss_after_training(tree_map(lambda _: next(rest), opt))

    assert len(numbers) == 7
    torch.autograd.gradcheck(loss, numbers)
    slopes = leaves(grad(loss_after_training)(opt))
    assert all(slope != 0 for slope in slopes)
    for index, slope in enumerate(slopes):
        tangents = [f64(float(i == index)) for i in range(len(numbers))]
        _, tangent = jvp(loss, tuple(n.detach() for n in numbers), tuple(tangents))
        assert_close(tangent, slope, rtol=1e-9)


@pytest.mark.by_day(2)
@pytest.mark.parametrize("in_tensor", [False, True])
@pytest.mark.parametrize("name", ["cosine with warmup", "piecewise", "join", "decoupled"])
def test_one_compiled_graph_serves_a_run_with_it(name, in_tensor):
    torch._dynamo.reset()
    schedule = in_tensors(CASES[name].schedule) if in_tensor else CASES[name].schedule
    beta = OneCycle(0.1, steps=8).momentum()
    opt = AdamW(lr=schedule, betas=(beta, beta), eps=schedule, weight_decay=schedule)
    step = torch.compile(lambda o, *a: o.update(*a), fullgraph=True, backend="aot_eager")
    params = {"w": torch.randn(3)}
    state = opt.init(params)
    try:
        for _ in range(4):
            grads = random_like(params)
            expected = opt.update(grads, state, params)
            assert_close(step(opt, grads, state, params), expected, rtol=2e-6)
            torch.compiler.set_stance("fail_on_recompile")
            params, state = expected
    finally:
        torch.compiler.set_stance("default")


def test_update_in_place_is_update_bit_for_bit_with_any_schedule():
    for case in CASES.values():
        opt = AdamW(lr=case.schedule, weight_decay=case.schedule)
        params = {"w": torch.randn(3)}
        gradients = [random_like(params) for _ in range(5)]
        in_place, state = clone(params), opt.init(params)
        for grads in gradients:
            opt.update_(grads, state, in_place)
        assert_same_bits((in_place, state), run(opt, params, gradients))


def test_each_leafs_own_count_leads_each_leafs_own_schedule():
    opt = AdamW(lr=Linear(0.1, 0.0, steps=4), weight_decay=0.0, step_per_leaf=True)
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    ones = torch.ones(2)
    gradients = [{"a": ones, "b": ones if i % 2 else None} for i in range(4)]
    moved, _ = run(opt, params, gradients)
    # Equal gradients: each update moves by the learning rate.
    assert_close(moved, {"a": 1 - 0.25 * ones, "b": 1 - 0.175 * ones}, rtol=1e-6)


def test_a_stacked_schedule_outside_vmap_is_refused_with_the_remedy():
    opt = AdamW(lr=Linear(f64([0.1, 0.2]), 0.0, steps=4))
    params = torch.ones(2)
    with pytest.raises(ValueError, match=r"lr has shape \(2,\): one update takes one number.*vmap"):
        opt.update(params, opt.init(params), params)
