"""Normal numbers by a key: their moments, what they depend on, and that they are the same again."""

import math

import pytest
import torch
from torch.func import vmap

from funcopt._engine.rounding import philox
from funcopt.extend import normal_like

MANY = 200_000


def test_moments_are_those_of_the_normal_distribution():
    noise = normal_like(torch.zeros(MANY, dtype=torch.float64), key=1, step=2)
    # Each bound is five standard errors of the mean of that power.
    assert abs(noise.mean()) < 5 / math.sqrt(MANY)
    assert abs(noise.square().mean() - 1) < 5 * math.sqrt(2 / MANY)
    assert abs((noise**3).mean()) < 5 * math.sqrt(15 / MANY)
    assert abs((noise**4).mean() - 3) < 5 * math.sqrt(96 / MANY)
    share = (noise.abs() < 1).double().mean()
    assert abs(share - 0.6826895) < 5 * math.sqrt(0.6827 * 0.3173 / MANY)


def test_neighbours_are_independent():
    noise = normal_like(torch.zeros(MANY, dtype=torch.float64), key=1, step=2)
    for lag in (1, 2, 3, 4, 5):
        assert abs((noise[lag:] * noise[:-lag]).mean()) < 5 / math.sqrt(MANY)


def test_complex_numbers_have_a_variance_of_one_in_all():
    noise = normal_like(torch.zeros(MANY, dtype=torch.complex128), key=1, step=2)
    assert abs(noise.real.square().mean() - 0.5) < 5 * math.sqrt(0.5 / MANY)
    assert abs(noise.abs().square().mean() - 1) < 5 / math.sqrt(MANY)


def test_they_are_those_of_philox_by_hand():
    words = philox(
        tuple(torch.tensor([word]) for word in (0, 7 | 3 << 3, 5, 0)),
        (torch.tensor(11), torch.tensor(0)),
    )
    one, two, three, four = ((word.item() + 0.5) / 2**32 for word in words)
    radius, other = math.sqrt(-2 * math.log(one)), math.sqrt(-2 * math.log(three))
    expected = [
        radius * math.cos(2 * math.pi * two),
        radius * math.sin(2 * math.pi * two),
        other * math.cos(2 * math.pi * four),
    ]
    noise = normal_like(torch.zeros(3, dtype=torch.float64), key=11, step=5, leaf=3)
    torch.testing.assert_close(noise, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("other", [{"key": 2}, {"step": 1}, {"leaf": 1}, {"key": 2.0**40}])
def test_each_argument_makes_a_difference(other):
    given = {"key": 1, "step": 0, "leaf": 0}
    like = torch.zeros(64)
    assert (normal_like(like, **given) != normal_like(like, **{**given, **other})).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5)])
def test_they_look_like_the_tensor(shape, dtype):
    like = torch.zeros(shape, dtype=dtype, requires_grad=True)
    noise = normal_like(like, torch.tensor(1.0), torch.tensor(2.0))
    assert (noise.shape, noise.dtype, noise.requires_grad) == (like.shape, dtype, False)
    assert noise.isfinite().all()


def test_members_of_a_vmap_have_the_numbers_of_their_key():
    keys = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    found = vmap(lambda key: normal_like(torch.zeros(9), key, 4))(keys)
    alone = torch.stack([normal_like(torch.zeros(9), key, 4) for key in keys])
    assert torch.equal(found, alone)
