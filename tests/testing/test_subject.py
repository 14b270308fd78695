"""The fields of an optimizer under test, and of all that it wraps."""

from funcopt import AdamW, Clip, Frozen, Partition
from funcopt.testing._subject import fields


def groups(**inner):
    return Partition(inner, lambda name, leaf: name)


def test_a_field_is_found_in_all_that_have_it():
    opt = groups(a=Clip(AdamW(maximize=True), 1.0), b=AdamW(), c=Frozen())
    assert fields(opt, "maximize") == [True, False]
    assert fields(opt, "momentum") == []
