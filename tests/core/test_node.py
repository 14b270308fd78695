"""Optimizers and schedules as values: equal if all they hold is, and then with one hash."""

import copy
import dataclasses
import pickle
import re
from typing import Any

import pytest
import torch
from torch.func import vmap

import funcopt
from funcopt import (
    SGD,
    Accumulate,
    Adafactor,
    Adagrad,
    Adam,
    AdamW,
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
    Members,
    Muon,
    NAdam,
    Partition,
    Plateau,
    RAdam,
    RMSprop,
    ScheduleFree,
    SkipNonfinite,
    Transform,
    decay_label,
    schedules,
)
from funcopt._engine.registration import register_optimizer
from funcopt.distributed import LocalUpdates, Zero1

from ..cases import fade


def rates(*values):
    return torch.tensor(values or (1e-3, 1e-2))


def inner():
    return AdamW(lr=rates(), betas=(0.9, torch.tensor(0.99)))


def pattern(text):
    return re.compile(text)


# Each makes the same value anew.
VALUES = {
    "numbers": AdamW,
    "a stacked tensor": lambda: AdamW(lr=rates()),
    "tensors": inner,
    "a schedule of tensors": lambda: AdamW(lr=schedules.Cosine(peak=rates(), steps=10)),
    "Clip": lambda: Clip(inner(), rates(), nonfinite="skip"),
    "ClipValue": lambda: ClipValue(inner(), rates()),
    "ClipAdaptive": lambda: ClipAdaptive(inner(), rates()),
    "Accumulate": lambda: Accumulate(inner(), rates(2.0, 3.0)),
    "SkipNonfinite": lambda: SkipNonfinite(inner(), rates(2.0, 3.0)),
    "LossScale": lambda: LossScale(inner(), rates(2.0, 4.0)),
    "Ema": lambda: Ema(inner(), rates()),
    "Lookahead": lambda: Lookahead(inner(), 2, rates()),
    "Members": lambda: Members(inner()),
    "Best": lambda: Best(inner(), patience=rates(2.0, 3.0)),
    "Plateau": lambda: Plateau(inner(), patience=rates(2.0, 3.0)),
    "MasterWeights": lambda: MasterWeights(inner()),
    "Compensated": lambda: Compensated(inner()),
    "Cautious": lambda: Cautious(inner(), weight_decay=rates()),
    "ScheduleFree": lambda: ScheduleFree(inner(), rates()),
    "Transform": lambda: Transform(inner(), fade, {"step": rates()}),
    "Partition by tree": lambda: Partition({"a": inner(), "b": Frozen()}, {"w": "a", "v": "b"}),
    "Partition by function": lambda: Partition(
        {"decay": inner(), "no_decay": AdamW()}, decay_label
    ),
    "Partition by pattern": lambda: Partition(
        {"a": inner(), "b": Frozen()}, {pattern("w"): "a", pattern(".*"): "b"}
    ),
    "Muon": lambda: Muon(rates(), ns_coefficients=(3.4, -4.8, torch.tensor(2.0))),
    "SGD": lambda: SGD(rates(), momentum=0.9),
    "Adam": lambda: Adam(rates()),
    "Lion": lambda: Lion(rates()),
    "RAdam": lambda: RAdam(rates()),
    "NAdam": lambda: NAdam(rates()),
    "Adagrad": lambda: Adagrad(rates()),
    "RMSprop": lambda: RMSprop(rates()),
    "pure": lambda: funcopt.pure(torch.optim.Adam, lr=rates(), betas=(0.5, 0.9)),
    "Adafactor": lambda: Adafactor(rates()),
    "Adafactor, tensors": lambda: Adafactor(rates(), eps=(rates(), torch.tensor(0.1))),
    "Zero1": lambda: Zero1(Clip(inner(), rates()), None),
    "LocalUpdates": lambda: LocalUpdates(inner(), 2, None),
    "Constant": lambda: schedules.Constant(rates()),
    "Piecewise": lambda: schedules.Piecewise((rates(), 0.1), (5,)),
    "Linear": lambda: schedules.Linear(rates(), 0.0, 5),
    "OneCycle": lambda: schedules.OneCycle(rates(), 100),
    "Join": lambda: schedules.Join(
        (schedules.Constant(rates()), schedules.Linear(rates(), 0.0, 5)), (5,)
    ),
    "Decoupled": lambda: schedules.Decoupled(rates(), schedules.Cosine(peak=rates(), steps=10)),
}
COPIES = {
    "made again": lambda make: make(),
    "copied": lambda make: copy.copy(make()),
    "copied deep": lambda make: copy.deepcopy(make()),
    "replaced": lambda make: dataclasses.replace(make()),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_equal_to_a_copy_and_has_its_hash(name, how):
    one, other = VALUES[name](), COPIES[how](VALUES[name])
    assert one == other
    assert (one != other) is False
    assert hash(one) == hash(other)
    assert len({one, other}) == 1


def test_a_value_that_was_pickled_is_equal():
    for make in VALUES.values():
        assert pickle.loads(pickle.dumps(make())) == make()


def test_each_value_is_unlike_the_others():
    values = [make() for make in VALUES.values()]
    for index, one in enumerate(values):
        assert [other == one for other in values].count(True) == 1, index
        assert one != "another kind"


OTHERS = {
    "another value": rates(1e-3, 1e-1),
    "another dtype": rates().double(),
    "another shape": rates()[:1],
    "one more dimension": rates()[None],
    "a number": 1e-3,
    "a schedule": schedules.Constant(rates()),
}


WRAPS = (
    lambda opt: opt,
    lambda opt: Ema(Clip(opt, 1.0)),
    lambda opt: Partition({"a": opt}, {"w": "a"}),
)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("wrap", WRAPS)
def test_what_differs_in_a_tensor_is_unequal(name, wrap):
    one, other = wrap(AdamW(lr=rates())), wrap(AdamW(lr=OTHERS[name]))
    assert one != other
    assert other != one


def test_what_differs_elsewhere_is_unequal():
    assert AdamW(lr=rates()) != AdamW(lr=rates(), amsgrad=True)
    assert AdamW(lr=rates()) != AdamW(eps=rates())
    assert Clip(inner(), 1.0) != ClipValue(inner(), 1.0)
    assert Partition({"a": inner()}, {"w": "a"}) != Partition({"a": inner()}, {"v": "a"})


def test_a_tensor_that_requires_a_gradient_or_lies_otherwise_is_equal():
    one = AdamW(lr=torch.ones(2, 3) / 10)
    assert one == AdamW(lr=(torch.ones(2, 3) / 10).requires_grad_())
    assert one == AdamW(lr=(torch.ones(3, 2) / 10).t())


def test_a_hash_stays_when_a_tensor_is_filled():
    rate = torch.tensor(0.1)
    opt, number = AdamW(lr=rate), hash(AdamW(lr=rate))
    rate.fill_(0.2)
    assert hash(opt) == number
    assert opt == AdamW(lr=torch.tensor(0.2))


def test_a_value_is_equal_to_itself_whatever_it_holds():
    rate = torch.tensor(0.1)
    nan = AdamW(lr=rate)
    rate.fill_(float("nan"))
    assert nan == copy.copy(nan)
    assert nan != copy.deepcopy(nan)
    meta = AdamW(lr=torch.ones((), device="meta"))
    assert meta == copy.copy(meta)
    assert hash(meta) == hash(AdamW(lr=torch.ones((), device="meta")))


def test_values_that_cannot_be_read_are_not_guessed():
    with pytest.raises(RuntimeError, match="values cannot be read here"):
        vmap(lambda a, b: (AdamW(lr=a) == AdamW(lr=b)) * a)(rates(), rates())
    one, other = (AdamW(lr=torch.ones((), device="meta")) for _ in range(2))
    with pytest.raises(RuntimeError, match="on the meta device"):
        _ = one == other
    assert one != AdamW(lr=torch.ones(1, device="meta"))


def test_nodes_that_a_transform_rebuilds_around_anything_compare():
    one, other = (torch.utils._pytree.tree_map(lambda _: 7, inner()) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != torch.utils._pytree.tree_map(lambda _: 8, inner())


def test_any_dataclass_that_is_registered_compares_by_its_tensors():
    @register_optimizer
    @dataclasses.dataclass(frozen=True)
    class Sign:
        lr: Any

        def init(self, params):
            return ()

        def update(self, grads, state, params):
            return params, state

        update_ = update

    assert Sign(rates()) == Sign(rates())
    assert Ema(Sign(rates())) == Ema(Sign(rates()))
    assert Sign(rates()) != Sign(rates(1.0, 2.0))
    assert hash(Ema(Sign(rates()))) == hash(Ema(Sign(rates(1.0, 2.0))))


def test_every_optimizer_and_schedule_is_among_these():
    made = {type(make()).__name__ for make in VALUES.values()}
    listed = {name for name in funcopt.__all__ if dataclasses.is_dataclass(getattr(funcopt, name))}
    assert listed - {"Frozen"} <= made
