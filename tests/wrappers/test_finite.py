"""The question of finiteness: every bad element is found, and no good one is taken for bad."""

import math
import warnings

import pytest
import torch
from torch.func import grad, vmap

from funcopt.wrappers._finite import all_finite, decide, device_for_state, zeros_unless

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]
INF, NAN = math.inf, math.nan
LIKE = torch.zeros(())


def leaves_of(dtype):
    """Leaves of sizes on either side of what is put together, in several layouts."""
    return [
        torch.ones((), dtype=dtype),
        torch.ones(0, dtype=dtype),
        torch.ones(3, 5, dtype=dtype).mT,
        torch.ones(1024, dtype=dtype),
        torch.ones(40, 50, dtype=dtype)[:, ::2],
        torch.ones(1, dtype=dtype).expand(2000),
        torch.ones(2500, dtype=dtype),
    ]


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bad_element_is_found_wherever_it_is(dtype, bad):
    assert all_finite(leaves_of(dtype), LIKE)
    for place in range(7):
        for element in (0, -1):
            tensors = [leaf.clone(memory_format=torch.preserve_format) for leaf in leaves_of(dtype)]
            if tensors[place].numel() == 0:
                continue
            tensors[place] = tensors[place].contiguous()
            tensors[place].view(-1)[element] = bad
            assert not all_finite(tensors, LIKE), (place, element)


@pytest.mark.parametrize("part", ["real", "imag"])
def test_either_part_of_a_complex_number_counts(part):
    leaf = torch.ones(3, dtype=torch.complex64)
    getattr(leaf, part)[1] = NAN
    assert not all_finite([leaf], LIKE)
    assert not all_finite([leaf.conj()], LIKE)


def test_infinities_that_cancel_are_found():
    assert not all_finite([torch.tensor([INF, -INF])], LIKE)
    assert not all_finite([torch.tensor([INF]), torch.tensor([-INF])], LIKE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2, 5000])
def test_finite_numbers_whose_sum_or_norm_overflows_are_finite(dtype, size):
    most = torch.finfo(dtype).max
    largest = torch.full((size,), most, dtype=dtype)
    if dtype.is_complex:  # whose absolute values overflow, too
        largest = torch.complex(largest.real, largest.real)
    for watched in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = (
                vmap(lambda x: all_finite([x, -x], LIKE))(largest[None])[0]
                if watched
                else all_finite([largest, -largest], LIKE)
            )
        assert found


def test_there_may_be_nothing_to_look_at():
    for tensors in ([], [torch.ones(0)]):
        found = all_finite(tensors, LIKE)
        assert found.dtype is torch.bool
        assert found.shape == ()
        assert found


def test_each_member_of_a_vmap_has_its_own_answer():
    members = torch.tensor([[1.0, 2.0], [NAN, 1.0], [INF, -INF], [3e38, 3e38]])
    found = vmap(lambda x: all_finite([x, torch.ones(2)], LIKE))(members)
    assert found.tolist() == [True, False, False, True]


def test_no_derivative_goes_through_the_answer():
    def count(x):
        return all_finite([x], LIKE) * x.sum()

    assert grad(count)(torch.ones(2)).tolist() == [1.0, 1.0]
    assert not all_finite([torch.ones(2, requires_grad=True)], LIKE).requires_grad


def test_what_can_be_read_is_decided():
    assert decide(torch.tensor(True)) is True
    assert decide(torch.tensor(False)) is False
    undecided = []
    vmap(lambda x: undecided.append(isinstance(decide(x > 0), torch.Tensor)) or x)(torch.ones(2))
    assert undecided == [True]


def test_zeros_take_the_place_of_what_is_not_to_be_used():
    tensors = [torch.tensor([NAN, 1.0])]
    assert zeros_unless(True, tensors) is tensors
    assert zeros_unless(torch.tensor(False), tensors)[0].tolist() == [0.0, 0.0]


def test_what_is_learnt_from_gradients_is_kept_beside_the_first_that_are_waited_for():
    assert device_for_state([torch.ones(1)]).type == "cpu"
    assert device_for_state([]).type == "cpu"
    assert device_for_state([torch.ones(1), torch.ones(1, device="meta")]).type == "meta"
