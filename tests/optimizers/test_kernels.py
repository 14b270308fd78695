"""The kernels of optimizers with numbers that stay tensors, as counts on a GPU do."""

from typing import get_args, get_type_hints

import pytest
import torch

from funcopt import SGD, Adagrad, Adam, AdamW, Lion, NAdam, RAdam, RMSprop
from funcopt._engine import dispatch
from funcopt._engine.rule import StepInputs

from ..cases import assert_close, clone
from .common import crossed, number

OPTIMIZERS = [
    *(
        SGD(momentum=momentum, dampening=dampening, weight_decay=0.1, maximize=maximize)
        for momentum, dampening, maximize in ((0.0, 0.0, False), (0.9, 0.0, True), (0.9, 0.3, True))
    ),
    SGD(momentum=0.9, nesterov=True),
    Adam(weight_decay=0.1, maximize=True),
    Adam(weight_decay=0.1, maximize=True, nesterov=True),
    Adam(amsgrad=True, nesterov=True),
    Lion(weight_decay=0.1, maximize=True),
    RMSprop(weight_decay=0.1, maximize=True),
    NAdam(weight_decay=0.1, maximize=True),
    NAdam(weight_decay=0.1, decoupled_weight_decay=True),
    RAdam(weight_decay=0.1, maximize=True),
    RAdam(weight_decay=0.1, decoupled_weight_decay=True),
    Adagrad(lr_decay=0.5, weight_decay=0.1, maximize=True),
    RMSprop(momentum=0.9, centered=True),
]
CASES = [(case["opt"], case["step"]) for case in crossed(opt=OPTIMIZERS, step=(1.0, 2.0, 7.0))]


def inputs_for(opt, step):
    """Two leaves and their slots, which are zeros at the first step."""
    shapes = (3, 4), ()
    columns = [[torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(2)]
    for _ in opt.rule.kept_slots(opt):
        columns.append([torch.rand(shape, dtype=torch.float64) * (step - 1) for shape in shapes])
    return StepInputs.of(columns)


@pytest.mark.parametrize("lr", [0.1, number(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize(("opt", "step"), CASES, ids=str)
def test_foreach_takes_a_count_and_a_learning_rate_that_are_not_read(opt, step, lr):
    rule, options = opt.rule, opt.rule.set_up(opt).options
    others = rule.hyperparams_of(opt)[1:]
    inputs = inputs_for(opt, step)
    expected = dispatch.plain_step(rule, inputs, rule.numbers(step, 0.1, *others), options)
    moved = StepInputs.of(clone(list(inputs.columns)))
    rule.kernel("foreach").step_(moved, rule.numbers(number(step), lr, *others), options)
    assert_close(list(moved.targets.columns), list(expected.columns), rtol=1e-12, atol=1e-14)
    plain = dispatch.plain_step(rule, inputs, rule.numbers(number(step), lr, *others), options)
    assert_close(list(plain.columns), list(expected.columns), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("step", [1.0, 2.0])
def test_fused_sgd_without_dampening_takes_a_count_that_is_not_read(step):
    opt = SGD(momentum=0.9, weight_decay=0.1)
    rule, options, inputs = opt.rule, opt.rule.set_up(opt).options, inputs_for(opt, step)
    expected = dispatch.plain_step(rule, inputs, rule.numbers(step, 0.1, 0.9, 0.0, 0.1), options)
    moved = StepInputs.of(clone(list(inputs.columns)))
    rule.kernel("fused").step_(moved, rule.numbers(number(step), 0.1, 0.9, 0.0, 0.1), options)
    assert_close(list(moved.targets.columns), list(expected.columns), rtol=1e-12)


@pytest.mark.parametrize("optimizer", [SGD, Adam, AdamW, Lion])
def test_type_checkers_know_the_kernels_that_the_rule_has(optimizer):
    known = get_args(get_type_hints(optimizer)["kernel"])
    assert known == optimizer.rule.kernel_names
