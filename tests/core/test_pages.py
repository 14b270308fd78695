"""Copies of large tensors, in whatever pages the system gives."""

import pytest
import torch

from funcopt import AdamW
from funcopt._core import tensors

from ..cases import assert_same_bits


@pytest.fixture(params=["advised", "not advised"])
def _system(request, monkeypatch):
    if request.param == "not advised":
        monkeypatch.setattr(tensors, "_advise", lambda: None)


@pytest.mark.usefixtures("_system")
@pytest.mark.parametrize("columns", [1000, 1001])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_copy_of_a_large_tensor_is_a_copy(columns, transposed):
    large = torch.randn(10_000, columns)
    large = large.T if transposed else large
    assert tensors.is_mapped(large)
    copy = tensors.copy_of(large)
    assert_same_bits(copy, large)
    assert copy.stride() == large.stride()
    assert copy.data_ptr() != large.data_ptr()


@pytest.mark.usefixtures("_system")
def test_an_update_of_a_large_leaf_beside_small_ones_has_the_bits_of_the_small():
    params = {"large": torch.randn(10_000, 1000), "small": torch.randn(7)}
    opt = AdamW()
    moved, state = opt.update(params, opt.init(params), params)
    rows = {"large": params["large"][:10].clone(), "small": params["small"]}
    expected, _ = opt.update(rows, opt.init(rows), rows)
    assert_same_bits(moved["large"][:10].clone(), expected["large"])
    assert_same_bits(moved["small"], expected["small"])
    assert not state.exp_avg["large"].is_set_to(moved["large"])
