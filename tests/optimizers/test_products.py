"""Products of matrices in bfloat16 by the extension: values, symmetry, and what is refused."""

import dataclasses
from itertools import product as combinations

import pytest
import torch

from funcopt import Muon
from funcopt.optimizers import _native, _products

from ..cases import assert_same_bits, random_like
from .common import number, run

HAS_PRODUCTS = _native.extension is not None and _native.extension.has_products()
WAYS = () if _native.extension is None else _native.extension.products()
by_every_way = pytest.mark.usefixtures("way")


@pytest.fixture(params=WAYS)
def way(request):
    """The ways in which this processor can make products, also those slower than torch's."""
    _native.extension.use_products(request.param)
    yield request.param
    _native.extension.use_products(None)


DEPTHS = (1, 2, 15, 16, 17, 31, 32, 33, 64, 100, 129, 200)


def random(*shape):
    return torch.randn(shape).bfloat16()


def by_columns(matrix):
    """The same, but lying column by column."""
    return matrix.mT.contiguous().mT


def assert_rounded(found, exact, sizes):
    """That it is the exact result rounded to bfloat16, up to the rounding of sums in float32.

    `sizes` are sums of the sizes of terms.
    """
    error = (found.double() - exact).abs()
    bound = exact.abs() * 2**-8 + sizes * 2**-18
    assert (error <= bound).all()


@by_every_way
@pytest.mark.parametrize("depth", DEPTHS)
def test_symmetric_products_are_those_of_float64_rounded_for_every_number_of_rows(depth):
    for rows, lie in combinations(range(1, 71), (torch.clone, by_columns)):
        matrix, added = random(2, rows, depth), random(2, rows, rows)
        added, wide = added + added.mT, matrix.double()
        found = _products.symmetric(lie(matrix), lie(matrix).mT, (added, 0.5), alpha=-2.0)
        exact = -2 * wide @ wide.mT + added.double() / 2
        assert_rounded(found, exact, 2 * wide.abs() @ wide.abs().mT + added.double().abs())
        assert_same_bits(found, found.mT)


@by_every_way
@pytest.mark.parametrize("lie", [torch.clone, by_columns])
def test_products_of_matrices_that_commute_are_exactly_symmetric(lie):
    for rows in range(1, 71):
        root = random(rows, rows).double() / rows**0.5
        one = (root @ root.mT).bfloat16()[None]
        other = (one.double() @ one.double()).bfloat16()
        other = (other.tril() + other.tril(-1).mT).contiguous()
        found = _products.symmetric(lie(one), lie(other), (one, 3.0), (other, -0.25))
        below = (one.double() @ other.double() + 3 * one.double() - other.double() / 4).tril()
        sizes = one.double().abs() @ other.double().abs() + 3 * one.double().abs()
        assert_rounded(found.tril(), below, sizes + other.double().abs())
        assert_same_bits(found, found.mT)


@by_every_way
@pytest.mark.parametrize("lie", [torch.clone, by_columns])
@pytest.mark.parametrize("columns", DEPTHS)
def test_other_products_are_those_of_float64_rounded_and_lie_as_the_right_factor(columns, lie):
    for rows in range(1, 71):
        left, right = random(2, rows, rows), random(2, rows, columns)
        left, right = left + left.mT, lie(right)
        found = _products.whole(left, right, (right, 3.0))
        wide = left.double(), right.double()
        sizes = wide[0].abs() @ wide[1].abs() + 3 * wide[1].abs()
        assert_rounded(found, wide[0] @ wide[1] + 3 * wide[1], sizes)
        assert found.stride() == right.stride() or 1 in (rows, columns)


@by_every_way
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (1, 3, 0)])
def test_empty_matrices_give_what_is_added_alone(shape):
    matrix, added = random(*shape), random(shape[0], shape[1], shape[1])
    added = added + added.mT
    assert_same_bits(_products.symmetric(matrix, matrix.mT, (added, 2.0)), 2 * added)


@by_every_way
def test_matrices_may_lie_with_gaps_between_elements():
    square, matrix = random(2, 40, 80)[:, :, ::2], random(2, 40, 180)[:, :, ::3]
    square = square + square.mT
    for given in (matrix, matrix.mT.contiguous().mT[:, :, 1:], matrix.expand(2, 40, 60)):
        dense = given.contiguous()
        gram = _products.symmetric(dense, dense.mT, (square, 2.0))
        assert_same_bits(_products.symmetric(given, given.mT, (square, 2.0)), gram)
        expected = _products.whole(gram, dense, (dense, 2.0))
        assert_same_bits(_products.whole(gram, given, (given, 2.0)), expected)


@by_every_way
def test_what_is_no_number_stays_so_and_the_infinite_infinite():
    matrix = torch.ones(1, 20, 20).bfloat16()
    matrix[0, 3, 3], matrix[0, 17, 17] = torch.inf, torch.nan
    found = _products.symmetric(matrix, matrix.mT)[0]
    assert found[17].isnan().all()
    assert found[:, 17].isnan().all()
    assert found[3, 2] == torch.inf


@by_every_way
def test_no_bit_depends_on_threads_nor_on_the_matrices_beside_one():
    matrix = random(5, 200, 333)
    count, found = torch.get_num_threads(), []
    try:
        for addresses, threads in combinations((_native.threads_of_torch(), ()), (1, 2, 3, 7)):
            _native.extension.take_threads(*addresses)
            torch.set_num_threads(threads)
            gram = _products.symmetric(matrix, matrix.mT)
            found.append((gram, _products.whole(gram, matrix, (matrix, 2.0))))
    finally:
        torch.set_num_threads(count)
        _native.extension.take_threads(*_native.threads_of_torch())
    for other in found[1:]:
        assert_same_bits(other, found[0])
    for index in range(5):
        one = matrix[index : index + 1]
        gram = _products.symmetric(one, one.mT)
        assert_same_bits(gram, found[0][0][index : index + 1])


@by_every_way
@pytest.mark.parametrize("shape", [(40, 70), (70, 30), (33, 33)])
def test_muon_gives_a_matrix_the_same_bits_however_it_lies_and_whatever_is_beside_it(shape):
    opt = Muon(lr=0.1, gram=True, matrices="stack")
    params = [torch.randn(shape) for _ in range(3)]
    grads = random_like(params)
    expected, _ = run(opt, params, [grads])
    for param, grad, moved in zip(params, grads, expected, strict=True):
        turned = [tensor.mT.contiguous().mT for tensor in (param, grad)]
        cut = [torch.randn(shape[0], 2 * shape[1])[:, ::2].copy_(own) for own in (param, grad)]
        for own in ([param, grad], turned, cut):
            assert_same_bits(run(opt, own[:1], [own[1:]])[0][0], moved)
    stacked, _ = run(opt, [torch.stack(params)], [[torch.stack(grads)]])
    assert_same_bits(stacked[0], torch.stack(expected))


@by_every_way
@pytest.mark.parametrize("shape", [(300, 700), (1100, 300), (520, 520)])
def test_muon_gives_the_same_bits_on_any_number_of_threads_and_by_numbers_in_tensors(shape):
    params = [torch.randn(shape)]
    gradients = [random_like(params) for _ in range(2)]
    numbers = {"lr": 0.1, "momentum": 0.5, "eps": 1e-6}
    coefficients = (3.0, -4.0, 2.0)
    expected = run(Muon(**numbers, ns_coefficients=coefficients, gram=True), params, gradients)
    tensors = {name: number(value) for name, value in numbers.items()}
    by_tensors = Muon(**tensors, ns_coefficients=tuple(map(number, coefficients)), gram=True)
    assert_same_bits(run(by_tensors, params, gradients), expected)
    count = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            opt = Muon(**numbers, ns_coefficients=coefficients, gram=True)
            assert_same_bits(run(opt, params, gradients), expected)
    finally:
        torch.set_num_threads(count)


@pytest.mark.parametrize("matrices", ["flatten", "stack"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_muon_leaves_matrices_without_elements_as_they_are_and_moves_others(shape, matrices):
    params = [torch.randn(shape), torch.randn(shape), torch.randn(20, 40)]
    opt, grads = Muon(lr=0.1, gram=True, matrices=matrices), [random_like(params)]
    moved, _ = run(opt, params, grads)
    assert_same_bits(moved[:2], params[:2])
    assert_same_bits(moved[2], run(opt, params[2:], [grads[0][2:]])[0][0])
    assert not torch.equal(moved[2], params[2])


@pytest.mark.parametrize("shape", [(30, 60), (260, 1100), (280, 300), (2, 30, 60)])
def test_a_processor_without_the_instruction_is_served_by_torchs_products(shape, monkeypatch):
    class Extension:
        has_products = staticmethod(lambda: False)

    param, opt = torch.zeros(shape), Muon(lr=1.0, gram=True, matrices="stack")
    grads = random_like(param)
    plain, _ = run(dataclasses.replace(opt, kernel="plain"), param, [grads])
    exact, _ = run(dataclasses.replace(opt, ns_dtype=torch.float64), param, [grads])
    for lacking in (Extension, None):
        monkeypatch.setattr(_native, "extension", lacking)
        moved, _ = run(opt, param, [grads])
        assert (moved - exact).norm() < 1.1 * (plain - exact).norm()


def call(**changed):
    """Call the extension for two products, with one argument changed."""
    left, right, result = torch.ones(2, 3, 4), torch.ones(2, 4, 3), torch.zeros(2, 3, 3)
    left, right, result = left.bfloat16(), right.bfloat16(), result.bfloat16()
    given = {
        "is_symmetric": True,
        "threads": 1,
        "batch": 2,
        "rows": 3,
        "columns": 3,
        "depth": 4,
        "left": left.data_ptr(),
        "left_is_crosswise": False,
        "right": right.data_ptr(),
        "right_is_crosswise": True,
        "result": result.data_ptr(),
        "alpha": 0.5,
        "addends": (left.data_ptr(), 1.0),
    }
    given |= changed
    try:
        _native.extension.product(*given.values())
    finally:
        expected = 0.0 if changed else 3.0
        assert result.eq(expected).all()


REFUSED = [
    (ValueError, "is_symmetric=2: must be at least 0 and at most 1", {"is_symmetric": 2}),
    (ValueError, "threads=0: must be at least 1", {"threads": 0}),
    (ValueError, "batch=-1: must be at least 0", {"batch": -1}),
    (ValueError, "depth=-1: must be at least 0", {"depth": -1}),
    (ValueError, "columns=2: must be rows=3 of what is symmetric", {"columns": 2}),
    (OverflowError, "more elements than memory", {"rows": 1 << 30, "columns": 1 << 30}),
    (OverflowError, "more elements than memory", {"batch": 1 << 50, "depth": 1 << 50}),
    (ValueError, "left_is_crosswise=2", {"left_is_crosswise": 2}),
    (ValueError, "address=0: must be that of 24 elements, at a multiple of 2", {"left": 0}),
    (ValueError, "address=3: must be that of 24 elements", {"right": 3}),
    (ValueError, "address=0: must be that of 18 elements", {"result": 0}),
    (TypeError, "", {"alpha": "1"}),
    (TypeError, "product takes 12 numbers and a tuple", {"addends": [0, 1.0]}),
    (ValueError, "addends: must be at most 2 pairs", {"addends": (0,)}),
    (ValueError, "addends: must be at most 2 pairs", {"addends": (0, 1.0) * 3}),
    (ValueError, "address=0: must be that of 18 elements", {"addends": (0, 1.0)}),
    (TypeError, "", {"addends": (2, "1")}),
]


@by_every_way
@pytest.mark.parametrize(("error", "message", "changed"), REFUSED)
def test_what_cannot_be_right_is_refused_before_anything_is_written(error, message, changed):
    call()  # which is right
    with pytest.raises(error, match=message or None):
        call(**changed)


@pytest.mark.skipif(_native.extension is None, reason=str(_native.unserved))
def test_a_way_that_this_processor_has_not_is_refused():
    with pytest.raises(ValueError, match="'float8': this processor makes no such products"):
        _native.extension.use_products("float8")
    with pytest.raises(TypeError):
        _native.extension.use_products(3)
    assert _native.extension.has_products() is HAS_PRODUCTS


@pytest.mark.skipif(_native.extension is None, reason=str(_native.unserved))
def test_the_extension_refuses_products_where_it_has_none_and_too_few_arguments():
    if HAS_PRODUCTS:
        with pytest.raises(TypeError, match="product takes 12 numbers and a tuple"):
            _native.extension.product(1)
    else:
        with pytest.raises(ValueError, match="this processor has no instruction for it"):
            call(alpha=0.25)
