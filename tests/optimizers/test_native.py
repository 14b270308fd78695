"""The native kernel: its bits, which depend on nothing but the values, and what it refuses."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.func import vmap

from funcopt import SGD, Adam, AdamW, Lion
from funcopt._engine.rule import StepInputs, StepOutputs
from funcopt.optimizers import _native

from ..cases import clone
from .common import crossed, fresh_step, number, same_memory

pytestmark = pytest.mark.skipif(_native.unserved is not None, reason=str(_native.unserved))

WIDE = [torch.float32, torch.float64]
NARROW = [torch.bfloat16, torch.float16]
# Each loop of the extension: with and without weight decay, amsgrad, a buffer, nesterov; the mean
# of the gradients taken from both ends.
OPTIMIZERS = [
    AdamW(lr=0.1, weight_decay=0.3),
    AdamW(lr=0.1, betas=(0.3, 0.9), amsgrad=True, maximize=True),
    Adam(lr=0.1),
    Adam(lr=0.1, weight_decay=0.3),
    Adam(lr=0.1, amsgrad=True),
    Adam(lr=0.1, weight_decay=0.3, amsgrad=True, maximize=True),
    SGD(lr=0.1),
    SGD(lr=0.1, weight_decay=0.3, maximize=True),
    SGD(lr=0.1, momentum=0.9),
    SGD(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.3),
    SGD(lr=0.1, momentum=0.9, nesterov=True),
    SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.3, maximize=True),
    Lion(lr=0.1, weight_decay=0.3),
    Lion(lr=0.1, maximize=True),
]
each_optimizer = pytest.mark.parametrize("opt", OPTIMIZERS, ids=str)


def inputs_for(opt, sizes, dtype=torch.float32, members=()):
    """Leaves in the middle of a run, of any scale."""
    columns = []
    for _ in range(2):
        columns.append([torch.randn(*members, size).to(dtype) for size in sizes])
    for _ in opt.rule.kept_slots(opt):
        columns.append([torch.rand(*members, size).to(dtype) for size in sizes])
    return StepInputs.of(columns)


def numbers_of(opt, step=5.0, grad_scale=1.0):
    return opt.rule.numbers(step, *opt.rule.hyperparams_of(opt), grad_scale=grad_scale)


def moved(opt, inputs, numbers=None):
    """The columns after a step into fresh memory."""
    options = opt.rule.set_up(opt).options
    own = numbers_of(opt) if numbers is None else numbers
    return fresh_step(opt.rule.kernel("native"), inputs, own, options).columns


def moved_in_place(opt, inputs, numbers=None):
    """Those after a step over copies of what was there."""
    copies = StepInputs.of(clone(list(inputs.columns)))
    options = opt.rule.set_up(opt).options
    own = numbers_of(opt) if numbers is None else numbers
    opt.rule.kernel("native").step_(copies, own, options)
    return copies.targets.columns


def assert_same(ones, others):
    for column, other_column in zip(ones, others, strict=True):
        for one, other in zip(column, other_column, strict=True):
            assert same_memory(one, other)


def slices(inputs, begin, end):
    return StepInputs.of([[tensor[begin:end] for tensor in column] for column in inputs.columns])


# What torch's own kernels give, for each of their options.
TORCHS = [
    *(
        (ours, options)
        for ours in (Adam, AdamW)
        for options in crossed(
            amsgrad=(False, True),
            maximize=(False, True),
            weight_decay=(0.0, 0.1),
            lr=(1e-3, 0.3),
            betas=((0.9, 0.999), (0.3, 0.5)),
        )
    ),
    *(
        (SGD, options)
        for options in crossed(
            momentum=(0.0, 0.9),
            dampening=(0.0, 0.3),
            nesterov=(False, True),
            maximize=(False, True),
            weight_decay=(0.0, 0.1),
            lr=(1e-3, 0.3),
        )
        if not options["nesterov"] or (options["momentum"] > 0 and options["dampening"] == 0)
    ),
]


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(("ours", "options"), TORCHS, ids=str)
def test_bits_are_those_of_torchs_fused_kernel_on_whole_vectors(ours, options, dtype):
    params = [torch.randn(size, dtype=dtype) for size in (64, 640, 4096)]
    theirs = [torch.nn.Parameter(param.clone()) for param in params]
    torch_opt = getattr(torch.optim, ours.__name__)(theirs, fused=True, **options)
    opt = ours(kernel="native", **options)
    pure, state = params, opt.init(params)
    in_place, state_in_place = clone(params), opt.init(params)
    for _ in range(20):
        grads = [torch.randn_like(param) for param in params]
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.clone()
        torch_opt.step()
        pure, state = opt.update(grads, state, pure)
        opt.update_(grads, state_in_place, in_place)
    for column in (pure, in_place):
        assert_same([column], [[their.detach() for their in theirs]])
    for own in (state, state_in_place):
        for name in own._fields[1:]:
            for slot, their in zip(getattr(own, name), theirs, strict=False):
                assert same_memory(slot, torch_opt.state[their][name])


@pytest.mark.parametrize("dtype", [*WIDE, *NARROW])
@pytest.mark.parametrize("maximize", [False, True])
def test_bits_of_lion_are_those_of_its_equations(maximize, dtype):
    params = [torch.randn(size).to(dtype) for size in (0, 1, 7, 640, 999)]
    options = {"lr": 0.01, "weight_decay": 0.3, "maximize": maximize}
    native, plain = Lion(kernel="native", **options), Lion(kernel="plain", **options)
    own, state = params, native.init(params)
    for _ in range(20):
        grads = [torch.randn_like(param) for param in params]
        expected, expected_state = plain.update(grads, state, own)
        own, state = native.update(grads, state, own)
        assert_same([own, state.exp_avg], [expected, expected_state.exp_avg])


@pytest.mark.parametrize("dtype", [*WIDE, *NARROW])
@each_optimizer
def test_no_bit_depends_on_where_an_element_lies_or_what_it_is_moved_with(opt, dtype):
    whole = inputs_for(opt, [1500], dtype)
    expected = moved(opt, whole)
    for begin, end in [(0, 1), (1, 2), (3, 20), (15, 49), (64, 1500), (1, 1400), (511, 1025)]:
        part = slices(whole, begin, end)
        own = [[column[0][begin:end]] for column in expected]
        assert_same(moved(opt, part), own)
        assert_same(moved_in_place(opt, part), own)
    cuts = list(zip((0, 1, 4, 33, 777), (1, 4, 33, 777, 1500), strict=True))
    leaves = StepInputs.of(
        [[column[0][begin:end] for begin, end in cuts] for column in whole.columns]
    )
    assert_same(moved(opt, leaves), [[c[0][begin:end] for begin, end in cuts] for c in expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_optimizer
def test_no_bit_depends_on_the_number_of_threads_nor_on_whose_they_are(opt, dtype):
    # Leaves that a thread ends in, one that lies across the border, and one behind it.
    inputs = inputs_for(opt, [3, (1 << 18) + 7, 0, (1 << 19) + 1, 5], dtype)
    count = torch.get_num_threads()
    try:
        results = []
        for addresses in (_native.threads_of_torch(), ()):
            _native.extension.take_threads(*addresses)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results += [moved(opt, inputs), moved_in_place(opt, inputs)]
    finally:
        torch.set_num_threads(count)
        _native.extension.take_threads(*_native.threads_of_torch())
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch has no such threads")
def test_threads_of_torch_are_found_where_its_loops_run_on_an_openmp():
    found = _native.threads_of_torch()
    assert len(found) == (3 if "OpenMP" in torch.__config__.parallel_info() else 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
def test_the_child_of_a_fork_does_not_wait_for_the_threads_of_its_parent():
    code = """
import os, torch, funcopt
torch.set_num_threads(2)
params = {"w": torch.ones(1 << 20)}
opt = funcopt.AdamW(kernel="native")
state = opt.init(params)
expected = opt.update(params, state, params)[0]["w"]
child = os.fork()
result = opt.update(params, state, params)[0]["w"]
torch.set_num_threads(1)  # for torch itself would wait
same = torch.equal(result, expected)
if child == 0:
    os._exit(0 if same else 1)
assert same
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("dtype", [*WIDE, *NARROW])
@each_optimizer
def test_no_bit_depends_on_the_instructions(opt, dtype):
    inputs = inputs_for(opt, [1, 31, 640], dtype)
    results = []
    try:
        for name, _ in _native.instruction_sets():
            _native.use(name)
            results.append(moved(opt, inputs))
    finally:
        _native.use(_native.instruction_sets()[0][0])
    for result in results[1:]:
        assert_same(result, results[0])


def test_results_that_are_written_past_the_cache_have_the_same_bits():
    opt = AdamW(lr=0.1)
    inputs = inputs_for(opt, [(3 << 19) + 5, 64])
    shifted = [torch.empty((3 << 19) + 6)[1:] for _ in range(3)]  # where it cannot be done
    small = [torch.empty(64) for _ in range(3)]
    outputs = StepOutputs.of([list(pair) for pair in zip(shifted, small, strict=True)])
    options = opt.rule.set_up(opt).options
    opt.rule.kernel("native").step_to(inputs, outputs, numbers_of(opt), options)
    assert_same(moved(opt, inputs), outputs.columns)
    assert_same(moved_in_place(opt, inputs), outputs.columns)


def test_members_that_begin_within_a_cache_line_have_the_same_bits_past_the_cache():
    opt = AdamW(lr=0.1)
    inputs = inputs_for(opt, [(1 << 19) + 1], members=(3,))
    rates = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    numbers = numbers_of(opt)._replace(lr=rates)
    assert_same(moved(opt, inputs, numbers), moved_in_place(opt, inputs, numbers))


@pytest.mark.parametrize("dtype", [*WIDE, *NARROW])
@each_optimizer
def test_a_step_leaves_what_it_reads_as_it_was(opt, dtype):
    inputs = inputs_for(opt, [0, 1, 5, 64, 700], dtype)
    before = clone(list(inputs.columns))
    moved(opt, inputs)
    assert_same(inputs.columns, before)
    options = opt.rule.set_up(opt).options
    opt.rule.kernel("native").step_(inputs, numbers_of(opt), options)
    assert_same([inputs.grads], [before[1]])


@pytest.mark.parametrize("dtype", NARROW)
@each_optimizer
def test_16_bit_leaves_are_computed_in_float32_and_rounded_once(opt, dtype):
    inputs = inputs_for(opt, [1, 31, 1300], dtype)
    wide = StepInputs.of([[tensor.float() for tensor in column] for column in inputs.columns])
    expected = [[tensor.to(dtype) for tensor in column] for column in moved(opt, wide)]
    assert_same(moved(opt, inputs), expected)
    assert_same(moved_in_place(opt, inputs), expected)


@pytest.mark.parametrize("dtype", NARROW)
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(dtype):
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    still = StepInputs.of([[every], [torch.zeros_like(every)]])
    (same,) = moved(SGD(lr=0.0), still)[0]
    torch.testing.assert_close(same, every, rtol=0, atol=0, equal_nan=True)
    # Of a parameter at zero, a step is a product of float32: of all sizes, halfway cases too.
    for lr in (1.0 + 2**-9, 1.0 + 2**-12, 3.0, 2.0**-10, 2.0**-20 + 2.0**-29, 1e5):
        (product,) = moved(SGD(lr=lr), StepInputs.of([[torch.zeros_like(every)], [every]]))[0]
        expected = (every.float() * torch.tensor(-lr)).to(dtype)
        torch.testing.assert_close(product, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", NARROW)
def test_nothing_is_lost_of_a_zero_below_zero(dtype):
    below, still = torch.full((40,), -0.0, dtype=dtype), torch.zeros(40, dtype=dtype)
    columns = [below.clone(), still, torch.zeros(40), torch.zeros(40), below.clone()]
    number = {torch.bfloat16: 2, torch.float16: 3}[dtype]
    kind = (_native.ADAMW_RULE, number, 0, 2, len(columns), False, False, 1, 1)
    addresses = [column.data_ptr() for column in columns]
    values = (5.0, 1e-3, 0.9, 0.999, 1e-8, 0.0, 0.0, 1.0, 1.0)
    _native.extension.step(*kind, [40], None, addresses, values)
    assert same_memory(columns[0], below)
    assert same_memory(columns[4], still)


@pytest.mark.parametrize("dtype", [*WIDE, *NARROW])
@each_optimizer
def test_gradients_are_scaled_as_if_they_had_been_multiplied_before(opt, dtype):
    inputs = inputs_for(opt, [1, 31, 640], dtype)
    scale = 0.3
    product = inputs._replace(grads=[grad * scale for grad in inputs.grads])
    scaled = numbers_of(opt, grad_scale=scale)
    assert_same(moved(opt, inputs, scaled), moved(opt, product))
    assert_same(moved_in_place(opt, inputs, scaled), moved(opt, product))


@pytest.mark.parametrize("dtype", [*WIDE, *NARROW])
@each_optimizer
def test_members_move_as_they_do_one_by_one(opt, dtype):
    inputs = inputs_for(opt, [1, 31, 64, 0], dtype, members=(2, 3))
    numbers = numbers_of(opt)
    rates = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=torch.float64)
    decays = torch.tensor([[0.0], [0.7]], dtype=torch.float64)
    own = numbers._replace(
        step=number(3.0), lr=rates, weight_decay=decays, grad_scale=rates.flip(0)
    )
    columns = moved(opt, inputs, own)
    assert_same(moved_in_place(opt, inputs, own), columns)
    for i in range(2):
        for j in range(3):
            member = StepInputs.of([[t[i, j] for t in column] for column in inputs.columns])
            single = numbers._replace(
                step=3.0,
                lr=rates[i, j].item(),
                weight_decay=decays[i, 0].item(),
                grad_scale=rates[1 - i, j].item(),
            )
            expected = [[tensor[i, j] for tensor in column] for column in columns]
            assert_same(moved(opt, member, single), expected)


@pytest.mark.parametrize("size", [4, 4000])
@pytest.mark.parametrize("lr", [0.1, torch.tensor([0.1, 0.2, 0.3])], ids=["shared", "each its own"])
def test_all_members_of_a_vmap_are_moved_by_one_call(lr, size, monkeypatch):
    calls = []

    def step(*given):
        calls.append(given)
        return extension.step(*given)

    extension = _native.extension
    monkeypatch.setattr(_native, "extension", SimpleNamespace(step=step))
    params = {"w": torch.randn(3, size), "b": torch.randn(3, 2)}
    opt, axis = AdamW(lr=lr), 0 if isinstance(lr, torch.Tensor) else None
    state = vmap(AdamW().init)(params)
    moved, _ = vmap(lambda o, g, s, p: o.update(g, s, p), in_dims=(axis, 0, 0, 0))(
        opt, params, state, params
    )
    assert len(calls) == 1
    for member in range(3):
        own = AdamW(lr=lr[member] if axis == 0 else lr)
        single = {key: leaf[member] for key, leaf in params.items()}
        alone, _ = own.update(single, own.init(single), single)
        for key, leaf in alone.items():
            assert same_memory(moved[key][member], leaf)


def test_the_first_gradient_of_sgd_is_not_dampened():
    opt = SGD(lr=0.1, momentum=0.9, dampening=0.3)
    inputs = StepInputs.of([[torch.zeros(2)], [torch.ones(2)], [torch.zeros(2)]])
    assert moved(opt, inputs, numbers_of(opt, step=1.0))[1][0].tolist() == [1.0, 1.0]
    later = moved(opt, inputs, numbers_of(opt, step=2.0))[1][0]
    assert later.tolist() == torch.tensor([0.7, 0.7]).tolist()


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("opt", OPTIMIZERS[:6], ids=str)
def test_what_is_not_finite_goes_the_way_it_goes_in_torch(opt, dtype):
    odd = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0], dtype=dtype)
    grid = torch.cartesian_prod(odd, odd, odd, odd.abs()).T.contiguous()
    columns = [[row] for row in (*grid, *([grid[3].flip(0)] if opt.amsgrad else []))]
    whole = [[torch.nn.functional.pad(c[0], (0, -len(c[0]) % 64))] for c in columns]
    inputs = StepInputs.of(whole)
    own = moved(opt, inputs)
    fused = StepInputs.of(clone(whole))
    opt.rule.kernel("fused").step_(fused, numbers_of(opt), opt.rule.set_up(opt).options)
    for column, expected in zip(own, fused.targets.columns, strict=True):
        torch.testing.assert_close(column[0], expected[0], rtol=0, atol=0, equal_nan=True)


def test_threads_of_python_may_call_it_at_once():
    opt = AdamW(lr=0.1)
    inputs = inputs_for(opt, [1 << 16])
    expected, results = moved(opt, inputs), []
    workers = [
        threading.Thread(target=lambda: results.extend(moved(opt, inputs) for _ in range(20)))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 80
    for result in results:
        assert_same(result, expected)


def call(**changed):
    """Call the extension for SGD of two leaves in place, with one argument changed."""
    tensors = [torch.zeros(4), torch.zeros(8), torch.ones(4), torch.ones(8)]
    given = {
        "rule": 2,
        "dtype": 0,
        "slot_dtype": 0,
        "rounding": 0,
        "columns": 2,
        "maximize": False,
        "nesterov": False,
        "members": 1,
        "threads": 1,
        "sizes": [4, 8],
        "ids": None,
        "addresses": [tensor.data_ptr() for tensor in tensors],
        "numbers": (1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0),
    }
    for name, change in changed.items():
        given[name] = change(given[name]) if callable(change) else change
    try:
        _native.extension.step(*given.values())
    finally:
        expected = 0.0 if changed else -0.5
        assert all(tensor.eq(expected).all() for tensor in tensors[:2])


REFUSED = [
    (ValueError, "rule=4: must be at least 0 and at most 3", {"rule": 4}),
    (ValueError, "dtype=-1: must be at least 0 and at most 3", {"dtype": -1}),
    (ValueError, "slot_dtype=4: must be at least 0 and at most 3", {"slot_dtype": 4}),
    (ValueError, "float64 must be both", {"slot_dtype": 1}),
    (ValueError, "rounding=3: must be at least 0 and at most 2", {"rounding": 3}),
    (ValueError, "with a compensation must have 16 bits", {"rounding": 2, "columns": 3}),
    (TypeError, "ids: must be None, or a list of 2", {"ids": [0]}),
    (ValueError, "id=-1: must be at least 0", {"ids": [0, -1]}),
    (ValueError, "columns=4: must be at least 2 and at most 3", {"columns": 4}),
    (ValueError, "members=-1: must be at least 0", {"members": -1}),
    (ValueError, "threads=0: must be at least 1", {"threads": 0}),
    (ValueError, "size=-4: must be at least 0", {"sizes": [-4, 8]}),
    (ValueError, "size=.*: must be at least 0 and at most", {"sizes": [4, 1 << 62]}),
    (OverflowError, "", {"sizes": [4, 1 << 70]}),
    (ValueError, "size=4: must be a multiple of members=8", {"members": 8}),
    (ValueError, "addresses: must be 4 in place, else 6, not 3", {"addresses": lambda a: a[:3]}),
    (ValueError, "addresses: must be 6 in place, else 10, not 4", {"columns": 3}),
    (ValueError, "address=0: must be that of 8 elements", {"addresses": lambda a: [*a[:3], 0]}),
    (ValueError, "at a multiple of 4", {"addresses": lambda a: [*a[:3], a[3] + 2]}),
    (ValueError, "must be that of 8", {"addresses": lambda a: [*a[:3], 2**64 - 16]}),
    (OverflowError, "", {"addresses": lambda a: [*a[:3], -8]}),
    (TypeError, "", {"addresses": lambda a: [*a[:3], "8"]}),
    (TypeError, "sizes and addresses: must be lists", {"sizes": (4, 8)}),
    (TypeError, "numbers a tuple", {"numbers": [1.0] * 8}),
    (ValueError, "numbers: must be 8, not 7", {"numbers": lambda n: n[:7]}),
    (TypeError, "", {"numbers": lambda n: (*n[:7], "1")}),
    (TypeError, "", {"numbers": lambda n: (*n[:7], [1.0])}),
    (ValueError, "address=0: must be that of 1 elements", {"numbers": lambda n: (*n[:7], 0)}),
    (ValueError, "at a multiple of 8", {"numbers": lambda n: (*n[:7], 12)}),
]


@pytest.mark.parametrize(("error", "message", "changed"), REFUSED)
def test_what_cannot_be_right_is_refused_before_anything_is_written(error, message, changed):
    call()  # which is right
    with pytest.raises(error, match=message or None):
        call(**changed)


def test_the_extension_wants_all_arguments_and_an_instruction_set_that_is_there():
    with pytest.raises(TypeError, match="step takes 13 arguments, not 1"):
        _native.extension.step(1)
    with pytest.raises(TypeError, match="take_threads takes 3 addresses or none, not 1"):
        _native.extension.take_threads(1)
    with pytest.raises(ValueError, match="no such instruction set"):
        _native.use("abacus")
