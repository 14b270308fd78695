"""Point by point the numbers of torch.optim.lr_scheduler and of optax."""

import pytest
import torch
from torch.optim import lr_scheduler

from funcopt import AdamW
from funcopt.schedules import (
    Constant,
    Cosine,
    Exponential,
    Join,
    Linear,
    OneCycle,
    Piecewise,
    Polynomial,
)

from ..cases import TORCH_FLAGS, assert_close, assert_same_bits, run

LR = 0.4

# Ours, torch's on an optimizer with that learning rate, and how many steps torch's is good for.
TORCH = {
    "ConstantLR": (
        Piecewise((LR / 4, LR), (5,)),
        lambda opt: lr_scheduler.ConstantLR(opt, factor=1 / 4, total_iters=5),
        30,
    ),
    "LinearLR": (
        Linear(LR / 3, LR, steps=7),
        lambda opt: lr_scheduler.LinearLR(opt, start_factor=1 / 3, total_iters=7),
        30,
    ),
    "LinearLR down": (
        Linear(LR, 0.0, steps=7),
        lambda opt: lr_scheduler.LinearLR(opt, start_factor=1.0, end_factor=0.0, total_iters=7),
        8,
    ),
    "ExponentialLR": (
        Exponential(LR, rate=0.9),
        lambda opt: lr_scheduler.ExponentialLR(opt, gamma=0.9),
        50,
    ),
    "StepLR": (
        Exponential(LR, rate=0.5, steps=4, staircase=True),
        lambda opt: lr_scheduler.StepLR(opt, step_size=4, gamma=0.5),
        50,
    ),
    "MultiStepLR": (
        Piecewise(tuple(LR * 0.3**i for i in range(4)), (3, 4, 11)),
        lambda opt: lr_scheduler.MultiStepLR(opt, milestones=[3, 4, 11], gamma=0.3),
        30,
    ),
    "PolynomialLR": (
        Polynomial(LR, 0.0, steps=20, power=1.5),
        lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=20, power=1.5),
        30,
    ),
    "CosineAnnealingLR": (
        Cosine(LR, steps=25, end=0.05),
        lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=25, eta_min=0.05),
        26,  # beyond its end, torch's rises again
    ),
    "CosineAnnealingWarmRestarts": (
        Join((Cosine(LR, steps=5), Cosine(LR, steps=10), Cosine(LR, steps=20)), (5, 15)),
        lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=5, T_mult=2),
        35,
    ),
    "OneCycleLR": (
        OneCycle(LR, steps=40),
        lambda opt: lr_scheduler.OneCycleLR(opt, LR, total_steps=40),
        40,
    ),
    "OneCycleLR, linear": (
        OneCycle(LR, steps=37, pct_start=0.2, div_factor=10, final_div_factor=5, shape="linear"),
        lambda opt: lr_scheduler.OneCycleLR(
            opt,
            LR,
            total_steps=37,
            pct_start=0.2,
            div_factor=10,
            final_div_factor=5,
            anneal_strategy="linear",
        ),
        37,
    ),
    "OneCycleLR in three phases": (
        OneCycle(LR, steps=37, pct_start=0.4, three_phase=True),
        lambda opt: lr_scheduler.OneCycleLR(
            opt, LR, total_steps=37, pct_start=0.4, three_phase=True
        ),
        37,
    ),
    "SequentialLR": (
        Join((Constant(LR / 2), Exponential(LR, rate=0.9)), (6,)),
        lambda opt: lr_scheduler.SequentialLR(
            opt,
            [
                lr_scheduler.ConstantLR(opt, factor=0.5, total_iters=100),
                lr_scheduler.ExponentialLR(opt, gamma=0.9),
            ],
            milestones=[6],
        ),
        40,
    ),
    "SequentialLR, a warmup and a cosine": (
        Cosine(LR, steps=30, warmup_steps=10, start=LR / 100),
        lambda opt: lr_scheduler.SequentialLR(
            opt,
            [
                lr_scheduler.LinearLR(opt, start_factor=0.01, total_iters=10),
                lr_scheduler.CosineAnnealingLR(opt, T_max=20),
            ],
            milestones=[10],
        ),
        31,
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_values_are_those_of_torchs_scheduler(name):
    ours, make, count = TORCH[name]
    weight = torch.nn.Parameter(torch.zeros(1))
    opt = torch.optim.AdamW([weight], lr=LR)
    theirs = make(opt)
    for step in range(count):
        lr = opt.param_groups[0]["lr"]
        # Torch multiplies its way along, and so gathers rounding.
        assert ours(step) == pytest.approx(lr, rel=1e-12, abs=1e-15), step
        opt.step()
        theirs.step()


# The same for the momentum that torch's OneCycleLR cycles along, which is the first beta here.
CYCLES = {
    "as it comes": ({}, {}, {}),
    "linear": (
        {"pct_start": 0.2, "shape": "linear"},
        {"base_momentum": 0.7, "max_momentum": 0.8},
        {"pct_start": 0.2, "anneal_strategy": "linear", "base_momentum": 0.7, "max_momentum": 0.8},
    ),
    "in three phases": (
        {"pct_start": 0.4, "three_phase": True},
        {},
        {"pct_start": 0.4, "three_phase": True},
    ),
    "linear in three phases": (
        {"pct_start": 0.3, "three_phase": True, "shape": "linear"},
        {"max_momentum": 0.9},
        {"three_phase": True, "anneal_strategy": "linear", "max_momentum": 0.9},
    ),
    "all of it rises": ({"pct_start": 1.0}, {}, {"pct_start": 1.0}),
}


@pytest.mark.parametrize("name", CYCLES)
def test_the_momentum_of_one_cycle_is_that_of_torchs_scheduler(name):
    options, momenta, theirs = CYCLES[name]
    cycle = OneCycle(LR, steps=37, **options)
    momentum = cycle.momentum(**momenta)
    opt = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = lr_scheduler.OneCycleLR(opt, LR, total_steps=37, **theirs)
    for step in range(37):
        (group,) = opt.param_groups
        assert cycle(step) == pytest.approx(group["lr"], rel=1e-12, abs=1e-15), step
        assert momentum(step) == pytest.approx(group["betas"][0], rel=1e-12), step
        opt.step()
        if step < 36:  # beyond its last step, torch's fails where all of it rises
            scheduler.step()


@pytest.mark.parametrize("kernel", ["plain", "foreach", "fused"])
@pytest.mark.parametrize("name", CYCLES)
def test_a_run_with_both_is_that_of_torch_with_its_scheduler(name, kernel):
    options, momenta, theirs = CYCLES[name]
    cycle = OneCycle(0.1, steps=37, **options)
    opt = AdamW(lr=cycle, betas=(cycle.momentum(**momenta), 0.99), kernel=kernel)
    start = torch.randn(5, dtype=torch.float64)
    gradients = [torch.randn_like(start) for _ in range(37)]
    param = torch.nn.Parameter(start.clone())
    torchs = torch.optim.AdamW([param], betas=(0.9, 0.99), **TORCH_FLAGS[kernel])
    scheduler = lr_scheduler.OneCycleLR(torchs, 0.1, total_steps=37, **theirs)
    for step, grad in enumerate(gradients):
        param.grad = grad
        torchs.step()
        if step < 36:
            scheduler.step()
    ours, state = run(opt, start, gradients)
    expected = torchs.state[param]
    assert_close(ours, param.detach(), rtol=1e-12)
    assert_close([state.exp_avg, state.exp_avg_sq], [expected["exp_avg"], expected["exp_avg_sq"]])
    in_place, own = start.clone(), opt.init(start)
    for grad in gradients:
        opt.update_(grad, own, in_place)
    assert_same_bits(in_place, ours)


def optax_cases(optax):
    return {
        "constant_schedule": (Constant(LR), optax.constant_schedule(LR)),
        "linear_schedule": (Linear(0.1, LR, steps=9), optax.linear_schedule(0.1, LR, 9)),
        "linear_schedule, begun later": (
            Join((Constant(0.1), Linear(0.1, LR, steps=9)), (4,)),
            optax.linear_schedule(0.1, LR, 9, transition_begin=4),
        ),
        "polynomial_schedule": (
            Polynomial(LR, 0.1, steps=9, power=2.5),
            optax.polynomial_schedule(LR, 0.1, 2.5, 9),
        ),
        "exponential_decay": (
            Exponential(LR, 0.7, steps=4, end=0.05),
            optax.exponential_decay(LR, 4, 0.7, end_value=0.05),
        ),
        "exponential_decay by steps": (
            Exponential(LR, 0.7, steps=4, staircase=True),
            optax.exponential_decay(LR, 4, 0.7, staircase=True),
        ),
        "cosine_decay_schedule": (
            Cosine(LR, steps=21, end=0.1 * LR, power=2.0),
            optax.cosine_decay_schedule(LR, 21, alpha=0.1, exponent=2.0),
        ),
        "warmup_cosine_decay_schedule": (
            Cosine(LR, steps=21, warmup_steps=6, start=0.01, end=0.02),
            optax.warmup_cosine_decay_schedule(0.01, LR, 6, 21, 0.02),
        ),
        "warmup_constant_schedule": (
            Linear(0.01, LR, steps=6),
            optax.warmup_constant_schedule(0.01, LR, 6),
        ),
        "warmup_exponential_decay_schedule": (
            Join((Linear(0.01, LR, steps=6), Exponential(LR, 0.7, steps=4)), (6,)),
            optax.warmup_exponential_decay_schedule(0.01, LR, 6, 4, 0.7),
        ),
        "piecewise_constant_schedule": (
            Piecewise((LR, LR * 0.5, LR * 0.05), (5, 12)),
            optax.piecewise_constant_schedule(LR, {5: 0.5, 12: 0.1}),
        ),
        **{
            f"piecewise_interpolate_schedule, {shape}": (
                Piecewise((LR, LR * 0.5, LR * 0.05), (5, 12), shape=shape),
                optax.piecewise_interpolate_schedule(shape, LR, {5: 0.5, 12: 0.1}),
            )
            for shape in ("linear", "cosine")
        },
        "cosine_onecycle_schedule": (
            Piecewise((LR / 25, LR, LR / 25 / 1e4), (9, 30), shape="cosine"),
            optax.cosine_onecycle_schedule(30, LR),
        ),
        "linear_onecycle_schedule": (
            Piecewise((LR / 25, LR, LR / 25, LR / 25 / 1e4), (9, 25, 30), shape="linear"),
            optax.linear_onecycle_schedule(30, LR),
        ),
        "join_schedules": (
            Join((Linear(0.1, LR, 5), Cosine(LR, 9), Constant(0.3)), (5, 14)),
            optax.join_schedules(
                [
                    optax.linear_schedule(0.1, LR, 5),
                    optax.cosine_decay_schedule(LR, 9),
                    optax.constant_schedule(0.3),
                ],
                [5, 14],
            ),
        ),
        "sgdr_schedule": (
            Join((Cosine(LR, 8, 2), Cosine(LR / 2, 12, 3)), (8,)),
            optax.sgdr_schedule(
                [
                    {"init_value": 0.0, "peak_value": p, "warmup_steps": w, "decay_steps": d}
                    for p, w, d in ((LR, 2, 8), (LR / 2, 3, 12))
                ]
            ),
        ),
    }


OPTAX = [
    "constant_schedule",
    "linear_schedule",
    "linear_schedule, begun later",
    "polynomial_schedule",
    "exponential_decay",
    "exponential_decay by steps",
    "cosine_decay_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_constant_schedule",
    "warmup_exponential_decay_schedule",
    "piecewise_constant_schedule",
    "piecewise_interpolate_schedule, linear",
    "piecewise_interpolate_schedule, cosine",
    "cosine_onecycle_schedule",
    "linear_onecycle_schedule",
    "join_schedules",
    "sgdr_schedule",
]


@pytest.mark.parametrize("name", OPTAX)
def test_values_are_those_of_optax(name):
    reason = "optax comes with the extra `benchmark`; test_values.py has the same by hand"
    optax = pytest.importorskip("optax", reason=reason)
    jax = pytest.importorskip("jax", reason=reason)
    with jax.enable_x64(True):
        table = optax_cases(optax)
        assert set(table) == set(OPTAX)
        ours, theirs = table[name]
        for step in range(40):
            assert ours(step) == pytest.approx(float(theirs(step)), rel=1e-12, abs=1e-15), step
