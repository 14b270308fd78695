"""The kernel beneath `Cautious`: the bits of the operators, and who is served by it."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from funcopt import SGD, AdamW, Cautious, SkipNonfinite, extend
from funcopt.optimizers import _native
from funcopt.wrappers import _hold_back
from funcopt.wrappers._hold_back import HoldBack

from ..cases import assert_same_bits, clone, layouts, random_like, tree_map

pytestmark = pytest.mark.skipif(_native.unserved is not None, reason=str(_native.unserved))

both_ways = pytest.mark.parametrize("method", ["update", "update_"])
# Whole vectors of every instruction set and parts of them, and leaves larger than what is cached.
SIZES = [0, 1, 3, 7, 8, 15, 16, 17, 63, 64, 65, 4097, 40_000, 70_001]
SPECIAL = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40])


@pytest.fixture(params=[name for name, _ in _native.instruction_sets()])
def instructions(request):
    _native.use(request.param)
    yield
    _native.use(_native.instruction_sets()[0][0])


def sprinkled(tensor):
    """Put values among them that are easy to get wrong, a few of each."""
    at = torch.randint(max(tensor.numel(), 1), (tensor.numel() // 4,))
    tensor[at] = SPECIAL[torch.randint(len(SPECIAL), at.shape)].to(tensor)
    return tensor


def held_back(how, olds, news, grads):
    """What the kernel makes of an update."""
    made = clone(news)
    served = how.served(olds, grads)
    served.write_between(olds, made)
    return made


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", [-1.0, 0.0, 1.0])
def test_bits_are_those_of_the_operators(way, dtype):
    olds = [sprinkled(torch.randn(size, dtype=dtype)) for size in SIZES]
    grads = [sprinkled(torch.randn(size, dtype=dtype)) for size in SIZES]
    news = [sprinkled(old + 0.1 * torch.randn_like(old)) for old in olds]
    for rescale in (False, True):
        for decay in (None, 0.0, 0.03):
            how = HoldBack(way, rescale, decay)
            expected = [how.of(*leaves) for leaves in zip(olds, news, grads, strict=True)]
            assert_same_bits(held_back(how, olds, news, grads), expected)


def test_bits_are_those_of_any_number_of_threads():
    olds, grads, moves = ([torch.randn(n) for n in (100, 300_000, 9, 90_000)] for _ in range(3))
    news = [old + move for old, move in zip(olds, moves, strict=True)]
    how = HoldBack(-1.0, True, 0.1)
    expected = held_back(how, olds, news, grads)
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(held_back(how, olds, news, grads), expected)
    finally:
        torch.set_num_threads(1)


def test_complex_elements_are_pairs_of_real_ones():
    olds, grads, moves = ([torch.randn(33, dtype=torch.complex64)] for _ in range(3))
    news, how = [olds[0] + moves[0]], HoldBack(-1.0, True, 0.1)
    assert_same_bits(held_back(how, olds, news, grads), [how.of(olds[0], news[0], grads[0])])


@both_ways
def test_a_run_has_the_bits_that_it_has_without_the_kernel(method, monkeypatch):
    inner = AdamW(lr=0.1, weight_decay=0.0)
    opt = Cautious(inner, weight_decay=torch.tensor(0.3))
    params = {"w": torch.randn(5, 7), "d": torch.randn(9, dtype=torch.float64), "b": torch.randn(3)}
    runs = []
    for serves in (True, False):
        if not serves:
            monkeypatch.setattr(_hold_back, "_extension", lambda: None)
        torch.manual_seed(1)
        own = clone(params)
        state = opt.init(own)
        for step in range(5):
            grads = {**random_like(params), **({"b": None} if step % 2 else {})}
            own, state = getattr(opt, method)(grads, state, own)
        runs.append((own, state))
    assert_same_bits(*runs)


def test_who_is_not_served_takes_the_operators():
    how, plain = HoldBack(-1.0, True, None), [torch.ones(4)]
    assert how.served(plain, plain) is not None
    half = [torch.ones(4).half()]
    assert how.served(half, half) is None
    assert how.served([], []) is None
    on_meta = [torch.ones(4, device="meta")]
    assert how.served(on_meta, on_meta) is None
    for name, leaf in layouts().items():
        assert (how.served([leaf], [leaf]) is None) == (not leaf.is_contiguous()), name
    rate = torch.tensor(0.1)
    assert how._replace(decay=rate).served(plain, plain).decay == rate.item()
    assert how._replace(decay=rate.requires_grad_()).served(plain, plain) is None
    assert torch.vmap(lambda p: p * (how.served([p], [p]) is None))(plain[0].bool()).all()


@extend.register_optimizer
@dataclass(frozen=True)
class Remembering:
    """A step of SGD whose state is the very tensor that it returns."""

    traits: ClassVar[extend.Traits] = extend.Traits(elementwise=True)
    lr: float = 0.5

    def init(self, params: Any) -> Any:
        return {"last": clone(params)}

    def update(self, grads, state, params):
        moved = tree_map(lambda p, g: p - self.lr * g, params, grads)
        return moved, {"last": moved}

    def update_(self, grads, state, params):
        raise NotImplementedError


def test_what_the_inner_state_holds_is_not_written():
    opt, params = Cautious(Remembering(), weight_decay=0.5), {"w": torch.tensor([2.0, 2.0])}
    grads = {"w": torch.tensor([1.0, 0.0])}
    moved, state = opt.update(grads, opt.init(params), params)
    assert state.inner["last"]["w"].tolist() == [1.5, 2.0]
    assert moved["w"].tolist() == [2.0 - 0.5 * 2.0 - 0.5, 2.0 - 0.5]


def test_who_saved_a_parameter_is_told_that_it_was_written():
    params = {"w": torch.ones(3)}
    opt = Cautious(SkipNonfinite(SGD(lr=0.5)), weight_decay=0.5)
    version = params["w"]._version
    opt.update_({"w": torch.full((3,), math.inf)}, opt.init(params), params)
    assert params["w"].tolist() == [0.75] * 3  # which decay, though the update was skipped
    assert params["w"]._version > version


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((2, -1, 0, None, 1, [1], [8, 8, 8]), ValueError, "dtype=2"),
        ((0, -2, 0, None, 1, [1], [8, 8, 8]), ValueError, "way=-2"),
        ((0, -1, 0, "much", 1, [1], [8, 8, 8]), TypeError, "must be real number"),
        ((0, -1, 0, None, 0, [1], [8, 8, 8]), ValueError, "threads=0"),
        ((0, -1, 0, None, 1, [-1], [8, 8, 8]), ValueError, "size=-1"),
        ((0, -1, 0, None, 1, [1], [8]), ValueError, "addresses: must be 2 in place, else 3, not 1"),
        ((0, -1, 0, None, 1, [1], [8, 8, 9]), ValueError, "address=9"),
        ((0, -1, 0, None, 1, (1,), [8, 8, 8]), TypeError, "5 numbers and 2 lists"),
        ((0, -1), TypeError, "5 numbers and 2 lists"),
    ],
)
def test_what_the_extension_cannot_take_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        _native.extension.hold_back(*given)
