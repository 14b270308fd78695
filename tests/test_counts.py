"""The counts of updates, in every form in which a state may bring them."""

import pytest
import torch

from funcopt import AdamW

DTYPES = (torch.float64, torch.float32, torch.int64, torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_leaf", [False, True])
def test_a_count_keeps_its_dtype_and_both_updates_agree_on_it(dtype, per_leaf):
    opt = AdamW(step_per_leaf=per_leaf)
    params = [torch.ones(2), torch.ones(3)]
    grads = [torch.ones(2), None]
    state = opt.init(params)
    step = [s.to(dtype) for s in state.step] if per_leaf else state.step.to(dtype)
    state = state._replace(step=step)
    for _ in range(2):
        moved, after = opt.update(grads, state, params)
        opt.update_(grads, state, params)
        for new, old in zip(*(_listed(s.step) for s in (after, state)), strict=True):
            assert new.dtype == old.dtype == dtype
            assert new.item() == old.item()
            assert new.data_ptr() != old.data_ptr()
        torch.testing.assert_close(moved, params, rtol=0, atol=0)
    assert [count.item() for count in _listed(state.step)] == ([2, 0] if per_leaf else [2])


def _listed(step):
    return step if isinstance(step, list) else [step]


def test_a_count_in_float64_goes_on_where_float32_stops():
    opt, params = AdamW(), torch.ones(1)
    state = opt.init(params)._replace(step=torch.tensor(2.0**25, dtype=torch.float64))
    _, after = opt.update(params, state, params)
    assert after.step.item() == 2**25 + 1


@pytest.mark.parametrize("count", [-5.0, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_count_that_counts_nothing_is_refused_before_anything_is_written(count, dtype):
    opt, params = AdamW(), torch.ones(1)
    state = opt.init(params)._replace(step=torch.tensor(count, dtype=dtype))
    for update in (opt.update, opt.update_):
        with pytest.raises(ValueError, match="step"):
            update(torch.ones(1), state, params)
    assert params.item() == 1
    assert not state.exp_avg.any()


@pytest.mark.parametrize("devices", [["cuda"], ["cuda", "cpu"], ["cpu"], ["meta"]])
def test_a_new_count_is_on_the_gpu_if_all_parameters_are_on_one(devices):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        params = [torch.empty(2, device=device) for device in devices]
        step = AdamW().init(params).step
    assert step.device.type == ("cuda" if devices == ["cuda"] else "cpu")
    assert step.dtype == torch.float64


def test_a_count_stays_where_it_is_whatever_the_default_device():
    opt, params = AdamW(), {"a": torch.zeros(3)}
    state = opt.init(params)
    with torch.device("meta"):
        _, after = opt.update(params, state, params)
    assert after.step.device.type == "cpu"
    assert after.step.item() == 1
