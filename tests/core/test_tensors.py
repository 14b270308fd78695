"""Calls for whole lists of tensors that are on a device, where no value is read."""

import math

import pytest
import torch

from funcopt import AdamW, Clip, Ema, Lookahead
from funcopt._core import tensors, transforms
from funcopt.wrappers._finite import all_finite

from ..cases import assert_same_bits, clone


@pytest.fixture
def device(monkeypatch):
    """Let nothing be read, as on a device."""
    monkeypatch.setattr(transforms, "on_host", lambda _: False)


def operators_of(function, *args):
    """The names of the operators that a call dispatches, and what it returns."""
    with torch.autograd.profiler.profile() as profile:
        result = function(*args)
    return [event.name for event in profile.function_events], result


def many(dtype=torch.float32, count=20):
    return [torch.randn(3, index % 4 + 1).to(dtype) for index in range(count)]


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def test_what_is_narrow_is_computed_in_float32_and_nothing_else():
    narrow = [dtype for dtype in DTYPES if tensors.is_narrow(dtype)]
    assert narrow == [torch.float16, torch.bfloat16]
    for dtype in [*DTYPES, torch.complex64, torch.complex128, torch.int64, torch.bool]:
        expected = torch.float32 if tensors.is_narrow(dtype) else dtype
        assert tensors.compute_dtype(dtype) is expected


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_take_one_call_and_are_in_float32_at_least(dtype, order, device):
    given = many(dtype)
    names, found = operators_of(tensors.norms, given, order)
    assert names.count("aten::_foreach_norm") == 1
    for one, norm in zip(given, found, strict=True):
        assert norm.dtype is tensors.compute_dtype(dtype)
        expected = torch.linalg.vector_norm(one.to(norm.dtype), order)
        torch.testing.assert_close(norm, expected)


def test_norms_of_two_dtypes_are_right(device):
    given = [*many(torch.float64, 3), *many(torch.float32, 3), *many(torch.bfloat16, 3)]
    for one, norm in zip(given, tensors.norms(given, 2.0), strict=True):
        expected = torch.linalg.vector_norm(one.to(tensors.compute_dtype(one.dtype)))
        assert_same_bits(norm, expected)


@pytest.mark.parametrize("bad", [None, math.inf, -math.inf, math.nan])
def test_whether_all_are_finite_takes_one_call_of_each_dtype(bad, device):
    given = [*many(), *many(torch.bfloat16), torch.ones(0)]
    if bad is not None:
        given[7][1, -1] = bad
    names, found = operators_of(all_finite, given, torch.zeros(()))
    assert bool(found) == (bad is None)
    assert names.count("aten::_foreach_norm") == 2
    assert names.count("aten::detach") == 0


@pytest.mark.parametrize("part", ["real", "imag"])
def test_a_large_complex_number_is_finite(part, device):
    """Its absolute value is not."""
    largest = torch.finfo(torch.float32).max
    leaf = torch.tensor([complex(largest, largest)])
    assert all_finite([leaf], torch.zeros(()))
    getattr(leaf, part)[0] = math.inf
    assert not all_finite([leaf], torch.zeros(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight", [0.0, 0.25, 0.9, 1.0])
def test_a_weight_on_the_device_takes_one_call(dtype, weight, device):
    starts, ends = many(dtype), many(dtype)
    own = torch.tensor(weight, dtype=torch.float64)
    expected = [torch.lerp(*pair, own.to(dtype)) for pair in zip(starts, ends, strict=True)]
    names, found = operators_of(tensors.lerp, starts, ends, own)
    assert names.count("aten::_foreach_lerp") == 1
    assert_same_bits(found, expected)
    names, _ = operators_of(tensors.lerp_, starts, ends, own)
    assert names.count("aten::_foreach_lerp_") == 1
    assert names.count("aten::copy_") <= 1  # of the weight
    assert_same_bits(starts, expected)


def test_16_bit_starts_are_moved_in_float32(device):
    starts, ends, weight = many(torch.bfloat16), many(torch.bfloat16), torch.tensor(0.3)
    expected = [
        torch.lerp(start.float(), end.float(), weight).to(torch.bfloat16)
        for start, end in zip(starts, ends, strict=True)
    ]
    assert_same_bits(tensors.lerp(starts, ends, weight), expected)
    tensors.lerp_(starts, ends, weight)
    assert_same_bits(starts, expected)


WRAPPERS = {
    "Clip": lambda inner: Clip(inner, 0.5),
    "Ema": lambda inner: Ema(inner, 0.9),
    "Lookahead": lambda inner: Lookahead(inner, 2, torch.tensor(0.5)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_have_the_same_results_as_where_values_are_read(name, request):
    params = {str(index): leaf for index, leaf in enumerate(many())}
    opt = WRAPPERS[name](AdamW(lr=0.1, kernel="plain"))
    calls = [{key: torch.randn_like(leaf) for key, leaf in params.items()} for _ in range(4)]
    right_params, right_state = clone(params), opt.init(params)
    for grads in calls:
        right_params, right_state = opt.update(grads, right_state, right_params)
    request.getfixturevalue("device")
    state = opt.init(params)
    for grads in calls:
        opt.update_(grads, state, params)
    torch.testing.assert_close((params, state), (right_params, right_state))
