"""Which kernel serves which tensors, and that every one serves them right."""

import itertools

import pytest
import torch

from funcopt import AdamW
from funcopt._engine import memory
from funcopt._engine.rule import StepInputs

from .. import oracle
from ..cases import (
    KERNELS,
    TORCH_FLAGS,
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
    assert not inputs & {t.untyped_storage().data_ptr() for t in leaves(result)}
    places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in leaves(result))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))


def test_auto_takes_the_fused_kernel_and_falls_back_where_it_cannot_serve(monkeypatch):
    params = torch.randn(3)
    opt = AdamW()
    fused = run(opt, params, [params])
    assert_same_bits(fused, run(AdamW(kernel="fused"), params, [params]))
    for kernel in ("foreach", "plain"):
        gone = "fused" if kernel == "foreach" else "foreach"
        lacking = AdamW.rule.kernel(gone)._replace(
            unsupported_reason=lambda device, numbers: "it is not there"
        )
        monkeypatch.setitem(AdamW.rule._loaded, gone, lacking)
        monkeypatch.setattr(memory, "_recent", ())  # nor is it known who served such leaves
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


def farthest(params, expected):
    """How far the farthest element is from where it should be."""
    return max((params[name].double().cpu() - expected[name]).abs().max() for name in expected)


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
def test_update_and_update_in_place_on_every_device(device, kernel):
    params = {"w": torch.randn(4, 3, device=device), "b": torch.randn((), device=device)}
    gradients = [random_like(params) for _ in range(3)]
    theirs = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    fused = torch.optim.AdamW(theirs.values(), lr=0.1, fused=True)
    expected = {name: p.double().cpu() for name, p in params.items()}
    states = {name: oracle.init(p) for name, p in expected.items()}
    for grads in gradients:
        for name, grad in grads.items():
            theirs[name].grad = grad
            expected[name], states[name] = oracle.update(
                grad.double().cpu(), states[name], expected[name], lr=0.1
            )
        fused.step()
    opt = AdamW(lr=0.1, kernel=kernel)
    moved, state = run(opt, params, gradients)
    in_place = opt.init(params)
    for grads in gradients:
        opt.update_(grads, in_place, params)
    # No farther than torch's fused kernel, but for a unit in the last place of each step.
    most = farthest(theirs, expected) + 3 * 2**-23
    assert farthest(moved, expected) <= most
    assert farthest(params, expected) <= most
    if kernel == "auto" and device == "cuda":  # which takes another kernel in place
        assert_close(in_place, state, rtol=1e-6, atol=1e-7)
    else:
        assert_same_bits((params, in_place), (moved, state))


def test_a_count_on_the_device_itself_is_never_read(device):
    params = torch.randn(3, device=device)
    opt = AdamW(lr=torch.tensor(0.1, device=device))
    state = opt.init(params)
    assert state.step.device.type == device
    moved, after = opt.update(params, state, params)
    expected, _ = AdamW(lr=float(opt.lr)).update(params, opt.init(params), params)
    assert after.step.device.type == device
    assert_close(moved, expected, rtol=1e-5)


# Enough small leaves to be packed, and some beside them that cannot be.
MANY = {**{f"{i}": (64,) for i in range(20)}, "odd": (10,), "scalar": (), "large": (300, 1000)}


def many(dtype=torch.float32, **options):
    return {name: torch.randn(shape, dtype=dtype, **options) for name, shape in MANY.items()}


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_many_leaves_get_the_bits_of_torch(kernel, dtype, amsgrad):
    params, gradients = many(dtype), [many(dtype) for _ in range(5)]
    theirs = [torch.nn.Parameter(p.clone()) for p in params.values()]
    torchs = torch.optim.AdamW(theirs, amsgrad=amsgrad, **TORCH_FLAGS[kernel])
    for grads in gradients:
        for param, grad in zip(theirs, grads.values(), strict=True):
            param.grad = grad
        torchs.step()
    opt = AdamW(amsgrad=amsgrad, kernel=kernel)
    assert_same_bits(list(run(opt, params, gradients)[0].values()), [p.detach() for p in theirs])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_leaves_that_are_packed_get_the_bits_of_leaves_that_are_not(dtype):
    params, grads = many(dtype), many(dtype)
    moved, _ = run(AdamW(), params, [grads])
    alone = {n: run(AdamW(), {n: params[n]}, [{n: grads[n]}])[0][n] for n in params}
    assert_same_bits(moved, alone)


def test_packed_results_are_tensors_of_their_own():
    params = many(requires_grad=True)
    moved, state = AdamW().update(many(), AdamW().init(params), params)
    for tree in (moved, state.exp_avg):
        assert tree["0"].untyped_storage().data_ptr() == tree["1"].untyped_storage().data_ptr()
        assert not any(leaf._is_view() for leaf in tree.values())
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in moved.values())
    before, version = moved["1"].detach().clone(), moved["1"]._version
    with torch.no_grad():
        moved["0"].zero_()
    assert_same_bits(moved["1"].detach(), before)
    assert moved["1"]._version == version


def test_leaves_move_in_whatever_order_their_batches_are_taken():
    shapes = [(64,), (7,), (300, 1000), (32, 3)] * 9
    params = [torch.full(shape, float(i)) for i, shape in enumerate(shapes)]
    zeros = [torch.zeros(shape) for shape in shapes]
    moved, _ = run(AdamW(lr=0.5, weight_decay=1.0), params, [zeros])
    assert [leaf.mean().item() for leaf in moved] == [i / 2 for i in range(len(shapes))]


def test_two_trees_of_the_same_shapes_with_their_numbers_swapped_get_their_own():
    params = many()
    opt, other = AdamW(lr=0.1), AdamW(lr=0.2)
    grads = many()
    alternating = [run(o, params, [grads])[0] for o in (opt, other, opt, other)]
    assert_same_bits(alternating[0], alternating[2])
    assert_same_bits(alternating[1], alternating[3])
    assert not torch.equal(alternating[0]["0"], alternating[1]["0"])


def test_a_leaf_that_changed_under_the_same_name_is_noticed():
    opt, params = AdamW(), many()
    state = opt.init(params)
    opt.update_(many(), state, params)
    params["large"].data = params["large"].data.T
    with pytest.raises(ValueError, match=r"grads\['large'\]: shape \(300, 1000\), the parameter"):
        opt.update_(many(), state, params)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("lr", [0.1, 0.0])
def test_the_foreach_kernel_takes_count_and_learning_rate_unread(amsgrad, lr):
    def moved(step, lr):
        columns = [[torch.ones(3), torch.full((2, 2), 0.5)] for _ in range(5)]
        inputs = StepInputs.of(columns if amsgrad else columns[:4])
        numbers = AdamW.rule.numbers(step, lr, 0.9, 0.999, 1e-8, 0.1)
        options = AdamW.rule.set_up(AdamW(amsgrad=amsgrad)).options
        AdamW.rule.kernel("foreach").step_(inputs, numbers, options)
        return list(inputs.columns)

    tensors = torch.tensor(3.0, dtype=torch.float64), torch.tensor(lr, dtype=torch.float64)
    assert_close(moved(*tensors), moved(3.0, lr), rtol=1e-6)
