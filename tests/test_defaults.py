"""What the process has for a default device and dtype is its own: no bit depends on it."""

import contextlib

import pytest
import torch

from funcopt import AdamW
from funcopt.distributed import LocalUpdates, Zero1
from funcopt.interop import to_torch
from funcopt.testing import strategies

from .cases import assert_same_bits
from .testing.test_laws import SUBJECTS

OPTIMIZERS = {
    **SUBJECTS,
    **{f"AdamW, {kernel}": AdamW(kernel=kernel) for kernel in ("plain", "foreach", "fused")},
    "AdamW, fused, of a tensor": AdamW(torch.tensor(0.1, dtype=torch.float64), kernel="fused"),
    "Zero1": Zero1(AdamW(), mesh=None),
    "LocalUpdates": LocalUpdates(AdamW(), 2, mesh=None, outer_lr=0.7, outer_momentum=0.9),
}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "the meta device": lambda: torch.device("meta"),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
}


def tree(seed, moments="auto"):
    """Leaves of every kind of dtype that may be beside these moments."""
    build = strategies.build
    leaves = {
        "w": build((3, 4), torch.float32, "normal", "contiguous", seed),
        "h": build((3,), torch.bfloat16, "normal", "contiguous", seed),
        "z": build((2,), torch.complex64, "normal", "contiguous", seed),
        "s": build((), torch.float64, "normal", "contiguous", seed),
    }
    if moments in (torch.bfloat16, torch.float16):  # of which there are no complex ones
        del leaves["z"]
    return leaves


def run(opt, *, in_place):
    """Parameters and state after three updates, of which one leaves a leaf alone."""
    moments = getattr(opt, "moments", "auto")
    params = tree(0, moments)
    state = opt.init(params)
    for number in (1, 2, 3):
        grads = tree(number, moments)
        if number == 2 and not isinstance(opt, Zero1):
            grads["h"] = None
        params, state = (opt.update_ if in_place else opt.update)(grads, state, params)
    return params, state


@pytest.mark.parametrize("in_place", [False, True], ids=["update", "update_"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_the_process_has_for_defaults_changes_no_bit(name, in_place):
    opt = OPTIMIZERS[name]
    expected = run(opt, in_place=in_place)
    for default in DEFAULTS.values():
        with default():
            found = run(opt, in_place=in_place)
        assert_same_bits(found, expected)


def test_what_torch_is_given_is_on_the_cpu_where_it_keeps_its_counts():
    params, state = run(AdamW(kernel="plain", step_per_leaf=True), in_place=False)
    expected = to_torch(AdamW(kernel="plain", step_per_leaf=True), state, params)["state"]
    with torch.device("meta"):
        found = to_torch(AdamW(kernel="plain", step_per_leaf=True), state, params)["state"]
    assert_same_bits(found, expected)


@pytest.mark.parametrize("values", strategies.VALUES)
def test_the_kit_draws_the_same_tensors_on_the_cpu(values):
    expected = strategies.build((3, 2), torch.complex64, values, "contiguous", 0)
    for default in DEFAULTS.values():
        with default():
            found = strategies.build((3, 2), torch.complex64, values, "contiguous", 0)
        assert_same_bits(found, expected)
