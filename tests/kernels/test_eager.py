"""Which kernel serves which tensors, and that every one serves them right."""

import pytest
import torch

from funcopt import AdamW
from funcopt._kernels import _eager

from ..cases import (
    KERNELS,
    assert_close,
    assert_same_bits,
    clone,
    layouts,
    leaves,
    random_like,
    run,
)


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
@pytest.mark.parametrize("param_layout", layouts())
@pytest.mark.parametrize("grad_layout", layouts())
def test_layouts_change_no_number(param_layout, grad_layout, kernel):
    opt = AdamW(lr=0.1, amsgrad=True, kernel=kernel)
    param, grads = layouts()[param_layout], [layouts()[grad_layout] for _ in range(3)]
    moved, state = run(opt, param, grads)
    expected = run(opt, param.contiguous(), [g.contiguous() for g in grads])
    assert_close((moved, state), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_dense_layouts_are_kept(layout, kernel):
    param = layouts()[layout]
    moved, state = run(AdamW(kernel=kernel), param, [layouts()["contiguous"]] * 2)
    for tensor in (moved, state.exp_avg, state.exp_avg_sq):
        assert tensor.stride() == param.stride()


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
def test_a_state_in_another_layout_is_served(kernel):
    param = layouts()["channels_last"]
    opt = AdamW(lr=0.1, kernel=kernel)
    _, state = run(opt, param, [random_like(param)])
    grad = random_like(param)
    expected = opt.update(grad, state, param)
    turned = state._replace(exp_avg_sq=state.exp_avg_sq.contiguous())
    assert_close(opt.update(grad, turned, param), expected, rtol=1e-6)
    opt.update_(grad, turned, param)
    assert_close((param, turned), expected, rtol=1e-6)


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
def test_mixed_dtypes_in_one_tree_are_each_served_in_their_own(kernel):
    dtypes = (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    )
    params = {str(dtype): torch.randn(3).to(dtype) for dtype in dtypes}
    grads = random_like(params)
    opt = AdamW(lr=0.1, kernel=kernel)
    moved, state = opt.update(grads, opt.init(params), params)
    for name, param in params.items():
        alone, own = opt.update(grads[name], opt.init(param), param)
        assert torch.equal(moved[name], alone)
        assert torch.equal(state.exp_avg_sq[name], own.exp_avg_sq)


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
@pytest.mark.parametrize("threads", [1, 2])
def test_large_leaves_are_right_with_threads(kernel, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        param, grads = torch.randn(300_001), [torch.randn(300_001) for _ in range(2)]
        opt = AdamW(lr=0.1, kernel=kernel)
        whole, _ = run(opt, param, grads)
        cut = slice(149_990, 150_010)
        part, _ = run(opt, param[cut].clone(), [g[cut].clone() for g in grads])
    finally:
        torch.set_num_threads(before)
    assert_close(whole[cut], part, rtol=1e-6)


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_update_changes_no_input_by_a_bit_and_shares_no_memory(kernel, amsgrad, maximize):
    params = {**layouts(), "complex": torch.randn(3, dtype=torch.complex64), "none": torch.ones(2)}
    opt = AdamW(amsgrad=amsgrad, maximize=maximize, kernel=kernel)
    grads = {**random_like(params), "none": None}
    _, state = opt.update(grads, opt.init(params), params)
    before = clone((params, state, grads))
    result = opt.update(grads, state, params)
    assert_same_bits((params, state, grads), before)
    inputs = {t.untyped_storage().data_ptr() for t in leaves((params, state, grads))}
    outputs = [t.untyped_storage().data_ptr() for t in leaves(result)]
    assert not inputs & set(outputs)
    assert len(set(outputs)) == len(outputs)


def test_auto_takes_the_fused_kernel_and_falls_back_where_it_cannot_serve(monkeypatch):
    params = torch.randn(3)
    opt = AdamW()
    fused = run(opt, params, [params])
    assert_same_bits(fused, run(AdamW(kernel="fused"), params, [params]))
    for kernel in ("foreach", "plain"):
        gone = "fused" if kernel == "foreach" else "foreach"
        monkeypatch.setattr(
            _eager._BY_NAME[gone], "refusal", lambda device, scalars: "it is not there"
        )
        assert_same_bits(run(opt, params, [params]), run(AdamW(kernel=kernel), params, [params]))


def test_tensor_hyperparameters_give_the_bits_of_their_numbers():
    params, grads = torch.randn(5), [torch.randn(5) for _ in range(3)]
    numbers = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    tensors = {
        name: tuple(torch.tensor(v, dtype=torch.float64) for v in value)
        if isinstance(value, tuple)
        else torch.tensor(value, dtype=torch.float64)
        for name, value in numbers.items()
    }
    assert_same_bits(run(AdamW(**tensors), params, grads), run(AdamW(**numbers), params, grads))


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
def test_update_and_update_in_place_on_every_device(device, kernel):
    params = {"w": torch.randn(4, 3, device=device), "b": torch.randn((), device=device)}
    gradients = [random_like(params) for _ in range(3)]
    opt = AdamW(lr=0.1, kernel=kernel)
    moved, state = run(opt, params, gradients)
    on_cpu = {name: p.cpu() for name, p in params.items()}
    expected, _ = run(opt, on_cpu, [{n: g.cpu() for n, g in grads.items()} for grads in gradients])
    for name, leaf in moved.items():
        assert_close(leaf.cpu(), expected[name], rtol=1e-5, atol=1e-6)
    in_place = opt.init(params)
    for grads in gradients:
        opt.update_(grads, in_place, params)
    assert_same_bits((params, in_place), (moved, state))


def test_a_count_on_the_device_itself_is_never_read(device):
    params = torch.randn(3, device=device)
    opt = AdamW(lr=torch.tensor(0.1, device=device))
    state = opt.init(params)
    state = state._replace(step=state.step.to(device))
    moved, after = opt.update(params, state, params)
    expected, _ = AdamW(lr=float(opt.lr)).update(params, opt.init(params), params)
    assert after.step.device.type == device
    assert_close(moved, expected, rtol=1e-5)
