"""What an optimizer says of itself, with all that it wraps."""

import dataclasses

import pytest

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
from funcopt.testing._subject import fields, says

from . import test_check
from .test_check import Halved


class Descent(test_check.Descent):
    """One that can be wrapped."""

    def update_(self, grads, state, params):
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ByLeaf(Descent):
    leafwise = True


@dataclasses.dataclass(frozen=True)
class Together(Descent):
    leafwise = False


def groups(**inner):
    return Partition(inner, lambda name, leaf: name)


SAYS = {
    "an elementwise one": (AdamW(), True, True),
    "nothing": (Descent(), None, None),
    "a leafwise one": (ByLeaf(), True, None),
    "one that is not": (Together(), False, False),
    "around elementwise ones": (Ema(Lookahead(Accumulate(AdamW(), 2))), True, True),
    "by units": (ClipAdaptive(AdamW()), True, None),
    "around one by units": (Ema(ClipAdaptive(AdamW())), True, None),
    "by a norm": (Accumulate(Clip(AdamW(), 1.0), 2), False, False),
    "around one that says nothing": (Ema(SkipNonfinite(AdamW())), None, None),
    "within one that says nothing": (Halved(Clip(AdamW(), 1.0)), False, False),
    "what skips": (SkipNonfinite(AdamW()), None, None),
    "what scales": (LossScale(AdamW()), None, None),
    "groups": (groups(a=AdamW(), b=Frozen()), True, True),
    "groups, one of them by a norm": (groups(a=AdamW(), b=Clip(AdamW(), 1.0)), False, False),
    "groups, one of which says nothing": (groups(a=AdamW(), b=Descent()), None, None),
}


@pytest.mark.parametrize("name", SAYS)
def test_an_optimizer_says_what_all_within_it_say(name):
    opt, leafwise, elementwise = SAYS[name]
    assert says(opt, "leafwise") is leafwise
    assert says(opt, "elementwise") is elementwise


def test_a_field_is_found_in_all_that_have_it():
    opt = groups(a=Clip(AdamW(maximize=True), 1.0), b=AdamW(), c=Frozen())
    assert fields(opt, "maximize") == [True, False]
    assert fields(opt, "momentum") == []
