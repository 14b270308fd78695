"""Adafactor: torch's numbers, its first steps by hand, its derivatives, and what it refuses."""

import dataclasses
import math

import pytest
import torch
from torch.func import grad, vmap

from funcopt import Adafactor, AdamW, Partition
from funcopt.testing import oracles

from ..cases import assert_close, assert_same_bits, clone, random_like, tree_map
from .common import (
    SHAPES,
    assert_derivatives_are_those_of_differences,
    assert_vmap_is_loop,
    crossed,
    number,
    run,
)

OPTIONS = [
    *crossed(maximize=(False, True), weight_decay=(0.0, 0.1), lr=(1e-2, 0.5)),
    {"beta2_decay": -0.5, "eps": (1e-3, 0.1), "d": 2.0},
    {"beta2_decay": 0.0, "eps": (0.5, 0.0)},
]
SLOTS = ("row_var", "col_var", "variance")


def torchs_run(params, gradients, **options):
    """Run torch's; return the parameters and the state of each."""
    theirs = [torch.nn.Parameter(param.clone()) for param in params]
    torchs = torch.optim.Adafactor(theirs, **options)
    for grads in gradients:
        for param, own in zip(theirs, grads, strict=True):
            param.grad = None if own is None else own.clone()
        torchs.step()
    return [param.detach() for param in theirs], [torchs.state.get(own, {}) for own in theirs]


@pytest.mark.by_day(12)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_numbers_are_torchs_over_100_steps(options, dtype):
    params = [torch.randn(shape, dtype=dtype) for shape in SHAPES if math.prod(shape)]
    gradients = [random_like(params) for _ in range(100)]
    opt = Adafactor(**options)
    pure, state = run(opt, params, gradients)
    in_place = run(opt, clone(params), gradients, "update_")
    assert_same_bits(in_place, (pure, state))
    expected, theirs = torchs_run(params, gradients, **options)
    near = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    assert_close(pure, expected, **near)
    for index, own in enumerate(theirs):
        for name in SLOTS:
            found = getattr(state, name)[index]
            if name in own:
                assert_close(found, own[name], **near)
            else:
                assert found.shape == (0,)
    assert state.step == 100


def test_the_first_step_of_a_matrix_is_as_by_hand():
    opt = Adafactor(lr=0.5, eps=(1e-30, 0.25), d=1.5, weight_decay=0.5)
    param, gradient = number([[3.0, -3.0], [3.0, -3.0]]), number([[1.0, 2.0], [3.0, 6.0]])
    moved, state = opt.update(gradient, opt.init(param), param)
    assert state.row_var.tolist() == [[2.5], [22.5]]  # (1 + 4) / 2 and (9 + 36) / 2
    assert state.col_var.tolist() == [[5.0, 20.0]]  # (1 + 9) / 2 and (4 + 36) / 2
    # The squares are of rank 1, so that the estimate is the squares: each element of u is 1, and
    # each element moves by half of the size of the leaf, which is 3.
    assert_close(moved, param * 0.75 - 3 * 0.5)
    assert state.variance.shape == (0,)


def test_the_second_step_of_a_vector_is_as_by_hand():
    opt = Adafactor(lr=1.0, beta2_decay=-1.0, eps=(0.5, 2.0))
    param, state = number([0.0, 0.0]), opt.init(number([0.0, 0.0]))
    param, state = opt.update(number([4.0, 0.0]), state, param)
    # The size of u = (1, 0) is below 1, and the leaf, of zeros, is taken to be of size 2.
    assert param.tolist() == [-2.0, 0.0]
    param, state = opt.update(number([4.0, 0.25]), state, param)
    variance = [16.0, 0.0625 / 2]
    assert state.variance.tolist() == variance
    # The root of the second is 0.177, which is below 0.5; u = (1, 0.5) is of a size below 1.
    rate = 2 / math.sqrt(2)
    assert_close(param, number([-2.0 - rate, -0.5 * rate]))
    # A gradient that is larger than all before it is cut: the root of 1040 / 3 is 18.6.
    before = param
    param, state = opt.update(number([32.0, 0.0]), state, param)
    step = number([32 / math.sqrt((2 * 16 + 1024) / 3), 0.0])
    size, rate = step.square().mean().sqrt(), max(2.0, before.square().mean().sqrt()) / math.sqrt(3)
    assert size > 1
    assert_close(param, before - rate * step / size)


def test_eps_of_none_is_the_machine_epsilon_of_each_leaf():
    params = {"w": torch.zeros(2), "v": torch.zeros(2).double(), "h": torch.zeros(2).bfloat16()}
    grads = tree_map(lambda leaf: torch.full_like(leaf, 1e-10), params)
    moved, _ = Adafactor(lr=1.0).update(grads, Adafactor().init(params), params)
    shares = {"w": 1e-10 * 2**23, "v": 1.0, "h": 1e-10 * 2**23}  # 16 bits are computed in float32
    for name, share in shares.items():
        assert_close(moved[name], torch.full_like(params[name], -1e-3 * share))
    by_number = Adafactor(lr=1.0, eps=(2.0**-23, 1e-3))
    assert_same_bits(by_number.update(grads, by_number.init(params), params)[0]["w"], moved["w"])
    assert Adafactor() == Adafactor(eps=[None, 1e-3]) != by_number


def test_a_zero_gradient_moves_nothing_however_small_eps_is():
    """Torch squares it, and gives NaN."""
    for shape in [(3, 4), (5,), ()]:
        param, zeros = torch.ones(shape), torch.zeros(shape)
        opt = Adafactor(eps=(1e-30, 1e-3))
        assert_same_bits(run(opt, param, [zeros] * 3)[0], param)
        (theirs,), _ = torchs_run([param], [[zeros]], eps=(1e-30, 1e-3))
        assert theirs.isnan().all()


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_small_and_large_gradients_move_a_matrix_alike(size):
    """The product of two means of squares is out of the range of float32."""
    param, gradient = torch.ones(3, 4), torch.randn(3, 4)
    opt = Adafactor(eps=(1e-30, 1e-3))
    expected = run(opt, param, [gradient] * 2)[0]
    assert_close(run(opt, param, [gradient * size] * 2)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("moments", ["auto", None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_leaves_are_computed_in_float32(dtype, moments):
    for shape in [(4, 5), (33,)]:
        param = torch.randn(shape).to(dtype)
        opt = Adafactor(lr=0.1, weight_decay=0.1, moments=moments)
        state = opt.init(param)
        kept = {"auto": torch.float32, None: dtype}.get(moments, moments)
        assert {own.dtype for own in state[1:4]} == {kept}
        for _ in range(5):
            gradient = torch.randn(shape).to(dtype)
            wide = tree_map(torch.Tensor.double, state)
            expected = oracles.adafactor(opt, gradient.double(), wide, param.double())
            param, state = opt.update(gradient, state, param)
            found = param.double(), tree_map(torch.Tensor.double, state)
            coarsest = max(torch.finfo(own).eps for own in (dtype, kept))
            assert_close(found, expected, rtol=coarsest, atol=1e-4)


def test_step_per_leaf_counts_skipped_leaves_as_torch_does():
    params = [torch.randn(3, 2), torch.randn(2), torch.randn(4)]
    gradients = [
        [None if (i + j) % 3 == 0 or j == 2 else torch.randn_like(p) for j, p in enumerate(params)]
        for i in range(12)
    ]
    ours, state = run(Adafactor(lr=0.5, step_per_leaf=True), params, gradients)
    assert_close(ours, torchs_run(params, gradients, lr=0.5)[0])
    assert_same_bits(ours[2], params[2])
    assert [int(step) for step in state.step] == [8, 8, 0]


def test_tensors_and_schedules_give_the_numbers_of_numbers():
    params = [torch.randn(3, 4), torch.randn(5), torch.randn(())]
    gradients = [random_like(params) for _ in range(4)]
    given = (0.6, -0.5, (1e-3, 0.5), 1.5, 0.1)  # an lr between the roots of 1 / 2 and 1 / 3
    expected = run(Adafactor(*given), params, gradients)
    tensors = [number(own) for own in (0.6, -0.5, 1e-3, 0.5, 1.5, 0.1)]
    lr, decay, eps1, eps2, d, weight_decay = tensors
    assert_close(
        run(Adafactor(lr, decay, (eps1, eps2), d, weight_decay), params, gradients), expected
    )
    lr, decay, eps1, eps2, d, weight_decay = [lambda _, own=own: own for own in tensors]
    assert_close(
        run(Adafactor(lr, decay, (eps1, eps2), d, weight_decay), params, gradients), expected
    )


@pytest.mark.parametrize("eps1", [None, torch.tensor([1e-3, 0.5, 2.0])], ids=["none", "tensor"])
def test_a_vmap_is_a_loop(eps1):
    assert_vmap_is_loop(Adafactor(lr=0.1, weight_decay=0.1, maximize=True), rtol=1e-2, atol=1e-2)
    opt = Adafactor(
        lr=torch.tensor([0.1, 0.6, 1.0]),
        beta2_decay=torch.tensor([-0.8, -0.5, 0.0]),
        eps=(eps1, torch.tensor([1e-3, 0.1, 1.0])),
        d=torch.tensor([1.0, 1.5, 2.0]),
        weight_decay=torch.tensor([0.0, 0.1, 0.2]),
    )
    assert_vmap_is_loop(opt, rtol=1e-2, atol=1e-2)


def test_rows_and_columns_are_those_of_each_member():
    """A stack of matrices in one leaf has one size, and members of a vmap have one each."""
    stacked = torch.randn(3, 4, 5) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    gradient = torch.randn(3, 4, 5)
    opt = Adafactor(lr=0.1)
    mapped, state = vmap(opt.update)(gradient, vmap(opt.init)(stacked), stacked)
    assert state.row_var.shape == (3, 4, 1)
    assert state.col_var.shape == (3, 1, 5)
    assert state.variance.shape == (3, 0)
    for i in range(3):
        alone, _ = opt.update(gradient[i], opt.init(stacked[i]), stacked[i])
        assert_close(mapped[i], alone)
    whole, _ = opt.update(gradient, opt.init(stacked), stacked)
    assert not torch.allclose(whole[0], mapped[0], rtol=1e-2)


@pytest.mark.parametrize("shape", [(2, 1, 3), (2, 3, 1)])
def test_a_factor_that_has_the_shape_of_its_leaf_by_chance_keeps_its_strides(shape):
    leaf = torch.randn(shape[::-1]).permute(2, 1, 0)
    first = Adafactor().init(leaf)
    _, state = Adafactor().update(torch.randn(shape), first, leaf)
    for name in SLOTS:
        assert getattr(state, name).stride() == getattr(first, name).stride()


def test_it_compiles_to_one_graph():
    params = {"w": torch.randn(3, 4), "b": torch.randn(4)}
    opt, state = Adafactor(lr=0.5, weight_decay=0.1), Adafactor().init(params)
    step = torch.compile(opt.update, fullgraph=True, backend="aot_eager")
    compiled, compiled_state = params, state
    for _ in range(5):
        grads = random_like(params)
        params, state = opt.update(grads, state, params)
        compiled, compiled_state = step(grads, compiled_state, compiled)
    assert_close((compiled, compiled_state), (params, state))


# The rate is lr at each of the steps, or the root of the count at each.
NUMBERS = {"by lr": [0.1, -0.8, 0.3, 1.2], "by the count": [1.7, -0.8, 0.3, 1.2]}


@pytest.mark.parametrize("name", NUMBERS)
def test_derivatives_are_those_of_differences_in_every_mode(name):
    assert_derivatives_are_those_of_differences(
        lambda lr, decay, eps2, d: Adafactor(lr, decay, (1e-3, eps2), d, 0.1),
        number(NUMBERS[name]),
    )


def test_derivatives_by_a_matrix_are_those_of_differences():
    params, grads = torch.randn(3, 4).double(), torch.randn(2, 3, 4).double()

    def moved(lr, eps1, param, grads):
        param, state = run(Adafactor(lr, eps=(eps1, 1e-3)), param, grads.unbind())
        return param, state.row_var, state.col_var

    given = [number(0.1), number(1e-3), params, grads]
    assert torch.autograd.gradcheck(moved, [own.requires_grad_() for own in given], atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3), (3,), ()])
def test_a_derivative_where_all_is_zero_is_finite(shape):
    def moved(gradient):
        opt, param = Adafactor(lr=0.1, eps=(0.5, 1.0)), torch.zeros_like(gradient)
        return run(opt, param, [gradient] * 3)[0].sum()

    found = grad(moved)(number(0.0).expand(shape).clone())
    assert found.isfinite().all()
    assert (found < 0).all()


def test_complex_leaves_are_refused_with_their_path_and_a_remedy():
    params = {"w": torch.ones(2), "z": torch.ones(2, dtype=torch.complex64)}
    with pytest.raises(
        TypeError, match=r"params\['z'\] has dtype torch.complex64: Adafactor moves"
    ):
        Adafactor().init(params)
    both = Partition({"real": Adafactor(), "complex": AdamW()}, {"w": "real", "z": "complex"})
    moved, _ = both.update(params, both.init(params), params)
    assert (moved["w"] < 1).all()
    assert (moved["z"].real < 1).all()


def test_a_state_of_other_shapes_is_refused():
    param = torch.ones(3, 4)
    state = Adafactor().init(param)
    wrong = state._replace(row_var=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"state.row_var: shape \(3, 4\), and beside .* \(3, 1\)"):
        Adafactor().update(param, wrong, param)


BAD = {
    r"eps=1e-08: must be a pair, such as \(None, 0.001\)": (TypeError, {"eps": 1e-8}),
    r"eps=\(None,\): must be a pair": (TypeError, {"eps": (None,)}),
    r"eps\[0\]=-1.0: eps\[0\] must be finite and at least 0": (ValueError, {"eps": (-1.0, 0.1)}),
    r"eps\[1\]=None: must be a number": (TypeError, {"eps": (None, None)}),
    "beta2_decay=0.8: beta2_decay must be finite and at most 0": (ValueError, {"beta2_decay": 0.8}),
    "d=0.5: d must be finite and at least 1": (ValueError, {"d": 0.5}),
    "lr=None: must be a number": (TypeError, {"lr": None}),
    "must be one of auto, foreach, plain": (ValueError, {"kernel": "fused"}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_refused_with_their_value(message):
    error, options = BAD[message]
    with pytest.raises(error, match=message):
        Adafactor(**options)
    with pytest.raises(error, match=message):
        dataclasses.replace(Adafactor(), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "maximize": True, "eps": (1e-12, 1e-2), "d": 2.0},
        {"lr": torch.tensor(0.1), "eps": (torch.tensor(1e-6), 1e-3)},
    ],
    ids=str,
)
def test_the_foreach_kernel_differs_from_the_equations_by_rounding(options, dtype):
    shapes = [(300, 50), (70,), (), (0,), (3, 0), (3, 4, 5, 6), (1 << 18,)]
    ours = {str(shape): torch.randn(shape, dtype=dtype) for shape in shapes}
    plain, foreach = Adafactor(kernel="plain", **options), Adafactor(kernel="foreach", **options)
    state, in_place = plain.init(ours), foreach.init(ours)
    own, moved, own_state = clone(ours), ours, in_place
    for _ in range(5):
        grads = random_like(ours)
        ours, state = plain.update(grads, state, ours)
        moved, own_state = foreach.update(grads, own_state, moved)
    for name, leaf in ours.items():
        bound = 50 * torch.finfo(dtype).eps
        torch.testing.assert_close(moved[name], leaf, rtol=bound, atol=bound)
    torch.manual_seed(1)
    grads = random_like(own)
    expected = foreach.update(grads, in_place, own)
    foreach.update_(grads, in_place, own)
    assert_same_bits((own, in_place), expected)
