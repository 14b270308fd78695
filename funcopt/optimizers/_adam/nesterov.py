"""Adam's step with Nesterov's momentum: the running mean looks one gradient ahead.

It is another rule, not a flag of the one without: its equations take the gradient twice, which
torch's fused kernel and the native one do not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._core.tensors import double, fit
from ..._core.types import Number
from ..._engine import kernels
from ..._engine.dispatch import safe_sqrt
from ..._engine.rule import StepInputs, UpdateRule
from .._terms import (
    add_decay,
    add_product,
    add_quotient,
    foreach_add_quotients_,
    foreach_decayed_grads,
    foreach_moments_,
)


class RuleByOption:
    """What an optimizer has as `rule`: one if its option `nesterov` is on, another if it is off.

    Of the class itself, it is the one without.
    """

    def __init__(self, without: UpdateRule, ahead: UpdateRule) -> None:
        """Keep both, which have the same state and the same traits."""
        self.without, self.ahead = without, ahead
        self.traits = without.traits

    def __get__(self, opt: Any, owner: type) -> UpdateRule:
        """Return the rule of an optimizer, or of its class."""
        return self.ahead if opt is not None and opt.nesterov else self.without


class Coefficients(NamedTuple):
    """What the numbers of a step come to."""

    beta2: Number
    gain1: Number  # 1 - beta1
    gain2: Number  # 1 - beta2
    weight_decay: Number
    share_of_mean: Number  # in the direction; its bias is corrected as that of the next update
    share_of_grad: Number
    descent: Number  # minus the learning rate
    correction2_root: Number
    eps: Number


def coefficients(numbers: Any, _options: Any) -> Coefficients:
    """Return what the numbers of a step come to, in float64."""
    step, lr, beta1, beta2, eps, weight_decay, *_ = numbers
    return Coefficients(
        beta2,
        1 - beta1,
        1 - beta2,
        weight_decay,
        beta1 / (1 - beta1 ** (step + 1)),
        (1 - beta1) / (1 - beta1**step),
        -lr,
        (1 - beta2**step) ** 0.5,
        eps,
    )


def equations(
    param: Tensor, grad: Tensor, slots: tuple[Tensor, ...], own: Coefficients, options: Any
) -> list[Tensor]:
    """One step of one leaf."""
    grad = add_decay(-grad if options.maximize else grad, param, own.weight_decay)
    exp_avg = torch.lerp(slots[0], grad, own.gain1)
    exp_avg_sq = add_product(slots[1] * own.beta2, grad, grad, own.gain2)
    maxima = [torch.maximum(largest, exp_avg_sq) for largest in slots[2:]]
    denominator = safe_sqrt(maxima[0] if maxima else exp_avg_sq) / own.correction2_root + own.eps
    direction = exp_avg * own.share_of_mean + grad * own.share_of_grad
    moved = add_quotient(param, direction, denominator, own.descent)
    return [moved, exp_avg, exp_avg_sq, *maxima]


def _foreach_(inputs: StepInputs, numbers: Any, options: Any) -> None:
    params, grads, (exp_avgs, exp_avg_sqs, *maxima), _ = inputs
    unfitted = coefficients(numbers._make(map(double, numbers)), options)
    own = Coefficients(*(fit(number, params[0]) for number in unfitted))
    grads = foreach_decayed_grads(grads, params, numbers.weight_decay, maximize=options.maximize)
    foreach_moments_(exp_avgs, exp_avg_sqs, grads, numbers)
    if maxima:
        torch._foreach_maximum_(maxima[0], exp_avg_sqs)
    denominators = list(torch._foreach_sqrt(maxima[0] if maxima else exp_avg_sqs))
    torch._foreach_div_(denominators, own.correction2_root)
    torch._foreach_add_(denominators, numbers.eps)
    directions = list(torch._foreach_mul(exp_avgs, own.share_of_mean))
    torch._foreach_add_(directions, torch._foreach_mul(grads, own.share_of_grad))
    foreach_add_quotients_(params, directions, denominators, own.descent)


_NEEDED = (
    "add",
    "add_",
    "addcdiv_",
    "addcmul_",
    "div_",
    "lerp_",
    "maximum_",
    "mul",
    "mul_",
    "neg",
    "sqrt",
)


def looking_ahead(rule: UpdateRule) -> UpdateRule:
    """Return the rule with Nesterov's momentum beside one without."""
    paths = {own.name: own.path for own in rule.hyperparams}
    return UpdateRule(
        state=rule.state,
        slots=rule.slots,
        hyperparams=rule.hyperparams,
        options=(*rule.options, "nesterov"),
        coefficients=coefficients,
        equations=equations,
        kernels={"foreach": kernels.foreach(_foreach_, _NEEDED, paths)},
        traits=rule.traits,
    )
