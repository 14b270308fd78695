"""The way into every optimizer: whatever is under way around an update stays out of it."""

import importlib.util
import itertools
import threading

import pytest
import torch
from torch.func import grad, jvp, vmap

from funcopt import AdamW, LossScale, SkipNonfinite
from funcopt._core import transforms
from funcopt._core.types import optimizers_in
from funcopt.distributed import Zero1, gather_state, scatter_state

from ..cases import assert_same_bits, leaves, tree_map
from ..every_optimizer import OPTIMIZERS, public_optimizers
from ..schedules.cases import CASES

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)
CASTS = (torch.float16, torch.bfloat16)
OTHER = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float16}


def tree(dtype, device="cpu", *stacked, small=9):
    """So many small leaves that they are packed, and a few others."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        values = torch.randn((*stacked, *shape), generator=generator, dtype=torch.float64)
        return values.to(dtype).to(device)

    return {
        **{f"w{index}": leaf(8, 4) for index in range(small)},
        "odd": leaf(5),
        "scalar": leaf(),
        "empty": leaf(0, 3),
    }


def transposed(params):
    """A tree of which no leaf is packed."""
    return params | {"odd": torch.stack([params["odd"], params["odd"]]).mT}


def two_steps(opt, way, params):
    params = tree_map(torch.clone, params)
    state = opt.init(params)
    for _ in range(2):
        grads = tree_map(lambda leaf: leaf * 0.5, params)
        params, state = getattr(opt, way)(grads, state, params)
    return params, state


def assert_same(one, other):
    assert [leaf.dtype for leaf in leaves(one)] == [leaf.dtype for leaf in leaves(other)]
    assert_same_bits(one, other)


def test_the_table_has_every_optimizer():
    parts = itertools.chain.from_iterable(map(optimizers_in, OPTIMIZERS.values()))
    assert set(map(type, parts)) == public_optimizers()


def is_real_only(opt):
    return any(
        getattr(getattr(part, "rule", None), "real_only", False) for part in optimizers_in(opt)
    )


SERVED = [
    (name, dtype)
    for name, opt in OPTIMIZERS.items()
    for dtype in DTYPES
    if not (dtype.is_complex and is_real_only(opt))
]


@pytest.mark.parametrize(("name", "dtype"), SERVED, ids=str)
def test_autocast_changes_no_bit(name, dtype, device):
    opt, packed = OPTIMIZERS[name], tree(dtype, device)
    for way, params in itertools.product(("update", "update_"), (packed, transposed(packed))):
        wanted = two_steps(opt, way, params)
        for cast in CASTS:
            with torch.autocast(device, dtype=cast):
                assert_same(two_steps(opt, way, params), wanted)


SOME = {
    "AdamW": AdamW(lr=0.1),
    "LossScale": LossScale(AdamW(lr=0.1), init_scale=4.0),
    "SkipNonfinite": SkipNonfinite(AdamW(lr=0.1)),
}


@pytest.mark.parametrize("dtype", OTHER, ids=str)
@pytest.mark.parametrize("name", SOME)
def test_autocast_changes_no_bit_under_vmap_nor_of_a_derivative(name, dtype, device):
    opt, params = SOME[name], tree(dtype, device)
    members, state = tree(dtype, device, 3), opt.init(params)

    def total(grads):
        return sum(leaf.float().sum() for leaf in opt.update(grads, state, params)[0].values())

    def mapped():
        return vmap(opt.update)(members, vmap(opt.init)(members), members)

    def forward():
        return jvp(total, (params,), (params,))

    functions = (mapped, lambda: grad(total)(params), forward)
    wanted = [function() for function in functions]
    with torch.autocast(device, dtype=OTHER[dtype]):
        for function, one in zip(functions, wanted, strict=True):
            assert_same(function(), one)


@pytest.mark.by_day(1)
@pytest.mark.parametrize("name", SOME)
def test_under_autocast_an_update_compiles_to_one_graph_with_the_same_bits(name):
    opt, params = SOME[name], tree(torch.bfloat16, small=1)
    state = opt.init(params)
    torch._dynamo.reset()
    step = torch.compile(opt.update, backend="aot_eager", fullgraph=True)
    wanted = step(params, state, params)
    with torch.autocast("cpu", dtype=torch.float16):
        assert_same(step(params, state, params), wanted)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_same(step(params, state, params), wanted)


def test_an_exported_update_is_without_the_autocast_around_it():
    opt = SOME["SkipNonfinite"]

    class Step(torch.nn.Module):
        def forward(self, grads, state, params):
            return opt.update(grads, state, params)

    params = tree(torch.bfloat16, small=1)
    inputs = params, opt.init(params), params
    wanted = torch.export.export(Step(), inputs).module()(*inputs)
    with torch.autocast("cpu", dtype=torch.float16):
        # A strict export traces its graph once more, when torch ignores what turns autocast off.
        exported = torch.export.export(Step(), inputs, strict=False).module()
        assert_same(exported(*inputs), wanted)


def casting():
    return torch.is_autocast_enabled("cpu")


def test_autocast_is_off_within_an_update_and_on_again_behind_it():
    seen = []

    def lr(count):
        seen.append(casting())
        if count > 0:
            raise ArithmeticError
        return 0.1

    opt, params = AdamW(lr=lr), torch.ones(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        params, state = opt.update(params, opt.init(params), params)
        assert casting()
        with pytest.raises(ArithmeticError):
            opt.update_(params, state, params)
        assert casting()
    assert seen == [False, False]
    assert not casting()


def test_an_update_leaves_autocast_on_in_other_threads():
    within, looked = threading.Event(), threading.Event()
    seen = []

    def lr(count):
        within.set()
        assert looked.wait(60)
        return 0.1

    def look():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert within.wait(60)
            seen.append(casting())
        looked.set()

    other = threading.Thread(target=look)
    other.start()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        params = torch.ones(2)
        AdamW(lr=lr).update(params, AdamW().init(params), params)
    other.join()
    assert seen == [True]


def test_without_torchs_private_question_autocast_is_noticed_too(monkeypatch):
    monkeypatch.delattr(torch._C, "_is_any_autocast_enabled")
    spec = importlib.util.spec_from_file_location("funcopt._core.again", transforms.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert not again.autocasting()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert again.autocasting()


@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_no_bit_of_a_schedule(name, device):
    schedule, counts = CASES[name].schedule, torch.arange(30, device=device)
    wanted = schedule(counts)
    for cast in CASTS:
        with torch.autocast(device, dtype=cast):
            assert_same(schedule(counts), wanted)


@pytest.mark.parametrize("dtype", OTHER, ids=str)
def test_autocast_changes_no_bit_of_a_state_that_is_shared_out(dtype):
    opt, params = Zero1(AdamW(), mesh=None), tree(dtype)
    state = opt.inner.init(params)
    wanted = scatter_state(opt, state, params)
    with torch.autocast("cpu", dtype=OTHER[dtype]):
        assert_same(scatter_state(opt, state, params), wanted)
        assert_same(gather_state(opt, wanted, params), state)
