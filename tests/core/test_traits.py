"""What an optimizer says of itself, with all that it wraps."""

import dataclasses

import pytest
import torch

from funcopt import (
    Accumulate,
    AdamW,
    Clip,
    ClipAdaptive,
    Ema,
    Frozen,
    Lookahead,
    LossScale,
    Partition,
    SkipNonfinite,
)
from funcopt._core.types import ELEMENTWISE, Traits, own_traits, traits_of

from ..testing import test_check
from ..testing.test_check import Halved


class Descent(test_check.Descent):
    """One that can be wrapped."""

    def update_(self, grads, state, params):
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ByLeaf(Descent):
    traits = Traits(leafwise=True)


class Heir(ByLeaf):
    """May do otherwise than what it is made from, and says nothing of it."""


class FromField(Descent):
    """What holds of it depends on how it was built."""

    def __init__(self, traits):
        self.own = traits

    @property
    def traits(self):
        return self.own


def groups(**inner):
    return Partition(inner, lambda name, leaf: name)


SAYS = {
    "an elementwise one": (AdamW(), True, True),
    "nothing": (Descent(), False, False),
    "a leafwise one": (ByLeaf(), True, False),
    "heir of a leafwise one": (Heir(), False, False),
    "by a property": (FromField(ELEMENTWISE), True, True),
    "by a property that says little": (FromField(Traits(leafwise=True)), True, False),
    "around elementwise ones": (Ema(Lookahead(Accumulate(AdamW(), 2))), True, True),
    "by units": (ClipAdaptive(AdamW()), True, False),
    "around one by units": (Ema(ClipAdaptive(AdamW())), True, False),
    "by a norm": (Accumulate(Clip(AdamW(), 1.0), 2), False, False),
    "around one that says nothing": (Ema(SkipNonfinite(AdamW())), False, False),
    "within one that says nothing": (Halved(Clip(AdamW(), 1.0)), False, False),
    "what skips": (SkipNonfinite(AdamW()), False, False),
    "what scales": (LossScale(AdamW()), False, False),
    "groups": (groups(a=AdamW(), b=Frozen()), True, True),
    "groups, one of them by a norm": (groups(a=AdamW(), b=Clip(AdamW(), 1.0)), False, False),
    "groups, one of which says nothing": (groups(a=AdamW(), b=Descent()), False, False),
}


@pytest.mark.parametrize("name", SAYS)
def test_what_is_not_said_by_all_within_does_not_hold(name):
    opt, leafwise, elementwise = SAYS[name]
    assert traits_of(opt).leafwise is leafwise
    assert traits_of(opt).elementwise is elementwise


def test_what_is_elementwise_is_all_that_follows_from_it():
    traits = Traits(elementwise=True)
    assert traits.leafwise
    assert traits.shardable
    assert traits.packable
    assert traits.complex_as_pairs


def test_what_holds_of_one_within_may_hold_of_all():
    counting = groups(a=AdamW(), b=AdamW(step_per_leaf=True))
    assert traits_of(Ema(counting)).tells_leaves_apart
    assert traits_of(Ema(LossScale(AdamW()))).sees_overflow
    assert not traits_of(Ema(AdamW())).sees_overflow
    assert own_traits(AdamW(step_per_leaf=True)).tells_leaves_apart
    assert not own_traits(AdamW()).tells_leaves_apart


def test_a_compiler_follows_what_is_said_by_a_property():
    opt = Clip(AdamW(), 1.0)
    compiled = torch.compile(
        lambda x: x if own_traits(opt).packable else x + 1, backend="eager", fullgraph=True
    )
    assert compiled(torch.zeros(())) == 0
