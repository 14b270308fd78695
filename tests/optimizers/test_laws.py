"""Each optimizer beside AdamW under every law, in every wrapper, and sharded."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis.stateful import run_state_machine_as_test

from funcopt import (
    SGD,
    Accumulate,
    Adafactor,
    Adagrad,
    Adam,
    Best,
    Cautious,
    Clip,
    ClipAdaptive,
    ClipValue,
    Compensated,
    Ema,
    Frozen,
    Lion,
    Lookahead,
    LossScale,
    MasterWeights,
    NAdam,
    Partition,
    Plateau,
    RAdam,
    RMSprop,
    ScheduleFree,
    SkipNonfinite,
    find,
    replace,
)
from funcopt.distributed import LocalUpdates, Zero1
from funcopt.interop import from_state_dict, to_state_dict
from funcopt.testing import OptimizerMachine, laws, strategies
from funcopt.testing._check import check_law

from ..cases import assert_same_bits, clone, faded, random_like
from ..testing.test_machine import settings
from .common import number, run

SUBJECTS = {
    "SGD": SGD(lr=0.1, weight_decay=0.1),
    "SGD, momentum": SGD(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1, maximize=True),
    "SGD, nesterov": SGD(lr=0.1, momentum=0.9, nesterov=True, step_per_leaf=True),
    "SGD, tensors": SGD(number(0.1), number(0.9), number(0.3), number(0.1)),
    "SGD, schedules": SGD(lambda n: 0.1 / (1 + n), lambda n: n / (n + 1), 0.5, kernel="foreach"),
    "Adam": Adam(lr=0.1, weight_decay=0.1),
    "Adam, nesterov": Adam(lr=0.1, weight_decay=0.1, nesterov=True, step_per_leaf=True),
    "Adam, nesterov, tensors": Adam(number(0.1), (0.5, number(0.75)), amsgrad=True, nesterov=True),
    "Adam, amsgrad": Adam(lr=number(0.1), eps=1e-3, amsgrad=True, maximize=True),
    "Adam, counts": Adam(betas=(0.5, 0.75), step_per_leaf=True, kernel="plain"),
    "Lion": Lion(lr=0.1, weight_decay=0.1),
    "Lion, tensors": Lion(number(0.1), (0.5, number(0.75)), maximize=True, step_per_leaf=True),
    "RMSprop": RMSprop(lr=0.1, weight_decay=0.1),
    "NAdam": NAdam(lr=0.1, weight_decay=0.1),
    "NAdam, tensors": NAdam(
        number(0.1), (0.5, number(0.75)), 1e-3, 0.1, number(0.5), True, True, step_per_leaf=True
    ),
    "RAdam": RAdam(lr=0.1, weight_decay=0.1),
    "RAdam, tensors": RAdam(
        number(0.1), (number(0.5), number(0.75)), 1e-3, 0.1, True, True, step_per_leaf=True
    ),
    "Adagrad": Adagrad(lr=0.1, weight_decay=0.1),
    "Adagrad, tensors": Adagrad(
        number(0.1), number(0.5), 0.0, number(0.1), number(1e-3), maximize=True, step_per_leaf=True
    ),
    "Adafactor": Adafactor(lr=0.1, weight_decay=0.1),
    "Adafactor, tensors": Adafactor(
        number(0.1), number(-0.5), (number(1e-30), 1e-2), 2.0, number(0.1), step_per_leaf=True
    ),
    "Adafactor, stochastic": Adafactor(moments=None, rounding="stochastic", maximize=True),
    "RMSprop, centered": RMSprop(
        lr=number(0.1), alpha=0.5, momentum=number(0.5), centered=True, step_per_leaf=True
    ),
}


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_law_holds_or_does_not_apply(name, law, examples):
    verdict = check_law(law, SUBJECTS[name], max_examples=examples(law, by_night=200))
    assert verdict.status in ("holds", "not applicable"), verdict


PLAIN = {
    "SGD": SGD(lr=0.1),
    "SGD, momentum": SGD(momentum=0.9),
    "Adam": Adam(),
    "Lion": Lion(),
    "RMSprop": RMSprop(),
    "NAdam": NAdam(),
    "RAdam": RAdam(),
    "Adagrad": Adagrad(),
    "Adafactor": Adafactor(),
}
OTHERS_OWN = {
    "SGD": {"decay_is_decoupled", "scale_invariant", "first_step_is_sign"},
    "Adam": {"decay_is_decoupled", "scale_invariant"},
    "Lion": {"matches_torch", "scale_invariant", "first_step_is_sign"},
    "Adafactor": {
        "matches_torch",
        "elements_are_independent",
        "decay_is_decoupled",
        "scale_invariant",
        "first_step_is_sign",
    },
    "Adagrad": {"decay_is_decoupled", "scale_invariant", "first_step_is_sign"},
    "NAdam": {"matches_torch", "decay_is_decoupled", "scale_invariant", "first_step_is_sign"},
    "RAdam": {"decay_is_decoupled", "scale_invariant", "first_step_is_sign"},
    "RMSprop": {"decay_is_decoupled", "scale_invariant", "first_step_is_sign"},
}


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", PLAIN)
def test_every_law_applies_but_those_of_others(name, law, examples):
    verdict = check_law(law, PLAIN[name], max_examples=examples(law))
    applies = law.__name__ not in OTHERS_OWN[name.partition(",")[0]]
    applies = applies and law not in (laws.small_steps_add_up, laws.random_bits_go_by_key)
    applies = applies and law is not laws.matches_reference  # of which there is none here
    if name == "SGD":  # without momentum, it keeps nothing
        applies = applies and law not in (laws.moments_follow_gradients, laws.moments_have_room)
    assert (verdict.status == "holds") is applies, verdict


def keeps_digits(opt):
    """Whether a rounding of a parameter stays a rounding.

    With weight decay in the gradient, and a second moment of the last gradient alone, a step
    divides by a parameter, which may be next to nothing.
    """
    if not isinstance(opt, (Adam, NAdam, RAdam)) or getattr(opt, "decoupled_weight_decay", False):
        return True
    return float(opt.betas[1]) > 0 or float(opt.weight_decay) == 0


@pytest.mark.parametrize(
    "kind", ["sgds", "adams", "lions", "rmsprops", "adagrads", "nadams", "radams"]
)
def test_whatever_is_done_with_one_its_oracle_agrees(kind, examples):
    strategy = getattr(strategies, kind)(tensor=True).filter(keeps_digits)
    machine = type("Machine", (OptimizerMachine,), {"optimizers": strategy})
    run_state_machine_as_test(machine, settings=settings(examples(by_night=600)))


def test_whatever_is_done_with_an_adafactor_its_oracle_agrees(examples):
    members = {
        "optimizers": strategies.adafactors(tensor=True),
        "params_strategy": strategies.params(dtype=torch.float64),
    }
    machine = type("Machine", (OptimizerMachine,), members)
    run_state_machine_as_test(machine, settings=settings(examples(by_night=600)))


WRAPPERS = {
    "Accumulate": lambda opt: Accumulate(opt, every=2),
    "Clip": lambda opt: Clip(opt, 1.0),
    "Clip, skipping": lambda opt: Clip(opt, 1.0, norm_type=math.inf, nonfinite="skip"),
    "ClipAdaptive": lambda opt: ClipAdaptive(opt, 0.1),
    "ClipValue": lambda opt: ClipValue(opt, 0.5),
    "Ema": lambda opt: Ema(opt, 0.9),
    "Lookahead": lambda opt: Lookahead(opt, every=2, reset_state=True),
    "LossScale": lambda opt: LossScale(opt, init_scale=4.0),
    "Best": lambda opt: Best(opt, patience=2),
    "Plateau": lambda opt: Plateau(opt, patience=0),
    "MasterWeights": MasterWeights,
    "Compensated": Compensated,
    "Transform": faded,
    "ScheduleFree": ScheduleFree,
    "Cautious": Cautious,
    "Cautious, with decay": lambda opt: Cautious(opt, rescale=False, weight_decay=0.5),
    "Partition": lambda opt: Partition({"a": opt, "f": Frozen()}, {"w": "a", "h": "a", "z": "f"}),
    "SkipNonfinite": SkipNonfinite,
    "Zero1": lambda opt: Zero1(opt, mesh=None),
    "Zero1, all at once": lambda opt: Zero1(Clip(opt, 1.0), mesh=None),
    "LocalUpdates": lambda opt: LocalUpdates(
        opt, every=2, mesh=None, outer_lr=0.7, outer_momentum=0.9
    ),
}
INNER = {
    "SGD": SGD(lr=0.1, momentum=0.9, dampening=0.25, weight_decay=0.1),
    "SGD, no momentum": SGD(lr=0.1),
    "Adam": Adam(lr=0.1, weight_decay=0.1),
    "Lion": Lion(lr=0.1),
    "RMSprop": RMSprop(lr=0.1, momentum=0.9, centered=True),
    "NAdam": NAdam(lr=0.1, weight_decay=0.1),
    "RAdam": RAdam(lr=0.1, betas=(0.5, 0.9)),
    "Adagrad": Adagrad(lr=0.1, lr_decay=0.1, initial_accumulator_value=0.5),
    "Adafactor": Adafactor(lr=0.1, weight_decay=0.1),
}


def tree():
    return {
        "w": torch.randn(3, 40),
        "h": torch.randn(33).bfloat16(),
        "z": torch.randn(2, dtype=torch.complex64),
    }


def pairs(wrappers):
    """Every wrapper with every optimizer within, but those that refuse it."""
    refused = {(name, "Adafactor") for name in wrappers if name.startswith("Zero1")}
    return [pair for pair in itertools.product(wrappers, INNER) if pair not in refused]


@pytest.mark.parametrize(("wrapper", "inner"), pairs(WRAPPERS))
def test_in_a_wrapper_update_is_update_in_place_and_checkpoints_return(wrapper, inner):
    opt = WRAPPERS[wrapper](INNER[inner])
    params = tree()
    if INNER[inner].rule.real_only and wrapper != "Partition":
        del params["z"]
    gradients = [random_like(params) for _ in range(5)]
    pure, state = run(opt, params, gradients)
    in_place, state_in_place = run(opt, clone(params), gradients, "update_")
    assert_same_bits((pure, state), (in_place, state_in_place))
    assert not torch.equal(pure["w"], params["w"])
    if wrapper != "LocalUpdates":
        again = from_state_dict(opt.init(params), to_state_dict(state))
        assert_same_bits(again, state)


@pytest.mark.parametrize("wrapper", ["Zero1", "Zero1, all at once"])
def test_an_optimizer_whose_state_has_shapes_of_its_own_is_refused_where_leaves_are_shared(wrapper):
    with pytest.raises(ValueError, match="whose state has other shapes than the leaves"):
        WRAPPERS[wrapper](INNER["Adafactor"])


@pytest.mark.parametrize(("wrapper", "inner"), pairs(["Zero1", "Partition"]))
def test_sharded_or_in_groups_of_one_the_bits_are_those_of_the_optimizer_itself(wrapper, inner):
    params = {name: leaf for name, leaf in tree().items() if name != "z"}
    gradients = [random_like(params) for _ in range(5)]
    wrapped = {
        "Zero1": lambda opt: Zero1(opt, mesh=None),
        "Partition": lambda opt: Partition({"a": opt}, {"w": "a", "h": "a"}),
    }[wrapper](INNER[inner])
    assert_same_bits(run(wrapped, params, gradients)[0], run(INNER[inner], params, gradients)[0])


@pytest.mark.parametrize("in_place", ["update", "update_"])
@pytest.mark.parametrize("inner", INNER)
def test_leaves_of_no_element_or_no_dimension_or_no_gradient_are_served(inner, in_place):
    params = {"empty": torch.ones(0, 3), "scalar": torch.ones(()), "still": torch.ones(2)}
    gradients = [{"empty": torch.ones(0, 3), "scalar": torch.ones(()), "still": None}] * 3
    moved, state = run(INNER[inner], clone(params), gradients, in_place)
    assert moved["scalar"] < 1
    assert torch.equal(moved["still"], params["still"])
    assert state.step == 3


@pytest.mark.parametrize("inner", INNER)
def test_a_hyperparameter_is_found_and_replaced_by_its_name(inner):
    opt = Clip(INNER[inner], 1.0)
    assert find(opt, "lr") == {"inner.lr": 0.1}
    assert replace(opt, "lr", 0.2).inner.lr == 0.2


@pytest.mark.parametrize(
    "kind",
    [SGD(momentum=0.9), SGD(), Lion(), Adam(), RMSprop(), Adagrad(), NAdam(), RAdam(), Adafactor()],
    ids=repr,
)
def test_one_count_in_a_checkpoint_becomes_that_of_each_leaf_and_back(kind):
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    _, state = run(kind, params, [random_like(params)] * 2)
    each = dataclasses.replace(kind, step_per_leaf=True)
    of_each = from_state_dict(each.init(params), to_state_dict(state), strict=False)
    assert of_each.step == {"a": 2, "b": 2}
    assert_same_bits(list(of_each[1:]), list(state[1:]))
    if len(kind.rule.kept_slots(kind)):
        of_all = from_state_dict(kind.init(params), to_state_dict(of_each), strict=False)
        assert_same_bits(of_all, state)
