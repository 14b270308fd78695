"""Who is watching: what another thread does, and what this one does not ask for, changes no bit."""

import contextlib
import math
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functionalize, grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from funcopt import Accumulate, AdamW, Clip, ClipAdaptive, Ema, Lookahead, LossScale, Partition
from funcopt._core import transforms
from funcopt._dtensor import shards
from funcopt._engine import registration
from funcopt.distributed import LocalUpdates, Zero1
from funcopt.schedules import Cosine

from ..cases import WRAPPED, assert_close, assert_same_bits, clone, tree_map


def compiling(pause):
    def backend(graph, _):
        pause()
        return graph

    function = eval("lambda x: x + 1")  # of new code, so that it is compiled each time
    torch.compile(function, backend=backend)(torch.ones(2))


class Pausing(nn.Module):
    def __init__(self, pause):
        super().__init__()
        self.pause = pause

    def forward(self, x):
        self.pause()
        return 2 * x


def exporting(pause):
    torch.export.export(Pausing(pause), (torch.ones(2),), strict=False)


def in_dual_level(pause):
    with forward_ad.dual_level():
        pause()


def tracing_by_hand(pause):
    make_fx(Pausing(pause), pre_dispatch=True)(torch.ones(2))


def scripting(pause):
    torch.jit.trace(Pausing(pause), torch.ones(2), check_trace=False)


def faking(pause):
    with FakeTensorMode():
        pause()


def mapping(pause):
    vmap(Pausing(pause))(torch.ones(2, 2))


def inferring(pause):
    with torch.inference_mode():
        pause()


def planning(pause):
    transforms.looked_on(pause)


def working_on_parts(pause):
    shards.work_on(shards.Parts(), pause)


def counting_flops(pause):
    with FlopCounterMode(display=False):
        pause()


# What another thread is in the middle of.
ELSEWHERE = {
    function.__name__: function
    for function in (
        compiling,
        exporting,
        in_dual_level,
        tracing_by_hand,
        scripting,
        faking,
        mapping,
        inferring,
        planning,
        working_on_parts,
        counting_flops,
    )
}


@pytest.fixture(autouse=True, scope="module")
def _fake_tensors_here_first():
    """Enter the mode in this thread, which lives on: torch 2.11 crashes once the first is gone."""
    with FakeTensorMode():
        pass


@contextlib.contextmanager
def elsewhere(function):
    """Be here while another thread is in the middle of something: it waits there for the end."""
    there, over = threading.Event(), threading.Event()
    errors = []

    def pause():
        there.set()
        assert over.wait(60)

    def run():
        try:
            function(pause)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        assert there.wait(60)
        yield
    finally:
        over.set()
        thread.join(60)
    assert not thread.is_alive()
    assert not errors


@pytest.fixture(params=ELSEWHERE)
def other_thread(request):
    with elsewhere(ELSEWHERE[request.param]):
        yield request.param


def test_another_thread_is_really_in_the_middle_of_it():
    with elsewhere(exporting):
        assert torch.compiler.is_exporting()  # which is asked of the process
    with elsewhere(in_dual_level):
        assert forward_ad._current_level == 0


INNER = AdamW(lr=0.1)
OPTIMIZERS = {
    **WRAPPED,
    "tensors": AdamW(lr=torch.tensor(0.1), eps=torch.tensor(1e-8)),
    "a function": AdamW(lr=lambda step: 0.1 / (1 + step)),
    "a schedule": AdamW(lr=Cosine(peak=torch.tensor(0.1), steps=100)),
    "Zero1": Zero1(Clip(INNER, 0.5), mesh=None),
    "LocalUpdates": LocalUpdates(INNER, every=2, mesh=None, outer_lr=0.5),
}


def params_of(requires_grad=True):
    generator = torch.Generator().manual_seed(1)
    shapes = {"w": (40, 30), "v": (7,), "u": (5, 2)}
    return {
        name: torch.randn(shape, generator=generator).requires_grad_(requires_grad)
        for name, shape in shapes.items()
    }


def train(opt, update, params):
    generator = torch.Generator().manual_seed(2)
    state = opt.init(params)
    for _ in range(3):
        grads = {n: torch.randn(p.shape, generator=generator) for n, p in params.items()}
        params, state = getattr(opt, update)(grads, state, params)
    return params, state


@pytest.fixture(scope="module")
def undisturbed():
    """The results of every optimizer, while no other thread does anything."""
    return {
        (name, update): train(opt, update, params_of())
        for name, opt in OPTIMIZERS.items()
        for update in ("update", "update_")
    }


def test_a_step_is_as_ever_while_another_thread_is_watched(undisturbed, other_thread, monkeypatch):
    monkeypatch.setattr(registration, "_MOST_TO_COMPILE", 2)  # of three leaves
    for (name, update), (params, state) in undisturbed.items():
        moved, after = train(OPTIMIZERS[name], update, params_of())
        assert_same_bits((moved, after), (params, state))
        assert all(leaf.requires_grad and leaf.is_leaf for leaf in moved.values()), name


@pytest.mark.parametrize("update", ["update", "update_"])
def test_tied_weights_are_refused_while_another_thread_is_watched(update, other_thread):
    weight = torch.ones(3)
    tied, grads = {"a": weight, "b": weight}, {"a": torch.ones(3), "b": torch.ones(3)}
    apart = {"a": weight, "b": weight.clone()}
    for opt in (INNER, Clip(INNER, 1.0), Ema(INNER, 0.9)):
        with pytest.raises(ValueError, match="shares its memory"):
            getattr(opt, update)(grads, opt.init(apart), tied)
        with pytest.raises(ValueError, match="shares its memory"):
            opt.init(tied)


def test_a_bad_tensor_is_refused_while_another_thread_is_watched(other_thread):
    with pytest.raises(ValueError, match=r"lr=-1\.0"):
        AdamW(lr=torch.tensor(-1.0))
    with pytest.raises(TypeError, match="called with the count"):
        AdamW(lr=lambda: 0.1)


# Those which torch itself cannot take in one thread while another is in a dual level.
FORWARD = {
    "vmap": lambda f, x: vmap(f)(torch.stack([x, 2 * x])),
    "grad": lambda f, x: grad(lambda x: f(x)[0].square().sum())(x),
    "jacrev": lambda f, x: jacrev(f)(x),
    "functionalize": lambda f, x: functionalize(f)(x),
}


@pytest.mark.parametrize("transform", FORWARD)
def test_a_transform_is_as_ever_while_another_thread_is_watched(transform):
    params = torch.linspace(-1, 1, 600)
    state = INNER.init(params)

    def moved(grads):
        new_params, new_state = INNER.update(grads, state, params)
        return new_params, new_state.exp_avg_sq

    expected = FORWARD[transform](moved, torch.linspace(1, 2, 600))
    for function in ELSEWHERE.values():
        with elsewhere(function):
            assert_same_bits(FORWARD[transform](moved, torch.linspace(1, 2, 600)), expected)


def test_a_dual_level_in_which_nothing_here_is_dual_changes_nothing(undisturbed):
    with forward_ad.dual_level():
        for (name, update), expected in undisturbed.items():
            assert_same_bits(train(OPTIMIZERS[name], update, params_of()), expected)


def _tangents(tree):
    return tree_map(lambda leaf: forward_ad.unpack_dual(leaf).tangent, tree)


# What may be dual, and the function that makes it so: of a number, the new parameters.
def _through(where):
    params, grads = torch.linspace(-1, 1, 41).double(), torch.linspace(0, 2, 41).double()

    def moved(number):
        ones = torch.ones_like(params) * number
        opt = {
            "a hyperparameter": lambda: AdamW(lr=number),
            "a function that holds one": lambda: AdamW(lr=lambda step: number * (1 + step)),
            "a schedule": lambda: AdamW(lr=Cosine(peak=number, steps=100)),
            "the norm of a Clip": lambda: Clip(INNER, number),
            "the scale of a ClipAdaptive": lambda: ClipAdaptive(INNER, number),
            "the decay of an Ema": lambda: Ema(INNER, number, debias=False),
            "the share of a Lookahead": lambda: Lookahead(INNER, 1, number),
        }.get(where, lambda: Clip(INNER, 1e-3))()
        state = opt.init(params)
        if where == "a moment":
            inner = state.inner._replace(exp_avg=ones, exp_avg_sq=ones)
            state = state._replace(inner=inner)
        own = params * ones if where == "a parameter" else params
        new_params, new_state = opt.update(
            grads * ones if where == "a gradient" else grads, state, own
        )
        return new_params, *([new_state.average] if isinstance(opt, Ema) else [])

    return moved


PLACES = (
    "a gradient",
    "a parameter",
    "a moment",
    "a hyperparameter",
    "a function that holds one",
    "a schedule",
    "the norm of a Clip",
    "the scale of a ClipAdaptive",
    "the decay of an Ema",
    "the share of a Lookahead",
)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("recording", [False, True])
def test_a_tangent_goes_through_a_step_wherever_it_comes_in(where, mapped, recording):
    moved = _through(where)
    number, direction = torch.tensor([0.01, 0.02]).double(), torch.tensor([1.0, 3.0]).double()
    if not mapped:
        number, direction = number[0], direction[0]
    function = vmap(moved) if mapped else moved
    _, expected = jvp(function, (number,), (direction,))
    with forward_ad.dual_level(), torch.set_grad_enabled(recording):
        tangents = _tangents(function(forward_ad.make_dual(number, direction)))
    assert any(leaf.any() for leaf in expected)
    for tangent, own in zip(tangents, expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(own) if tangent is None else tangent, own)


@pytest.mark.parametrize("kind", [Clip, ClipAdaptive])
def test_a_bound_that_a_gradient_just_reaches_has_a_tangent_as_under_jvp(kind):
    bound = torch.tensor(0.5, dtype=torch.float64)
    params = torch.tensor([1.0, 0.0], dtype=torch.float64)
    norm = 0.5 - (1e-6 if kind is Clip else 0.0)  # which Clip adds
    grads = torch.tensor([norm, 0.0], dtype=torch.float64)

    def moved(bound):
        # The largest element is a norm without a rounding.
        opt = Clip(INNER, bound, norm_type=math.inf) if kind is Clip else kind(INNER, bound)
        return opt.update(grads, opt.init(params), params)[1].inner.exp_avg

    _, expected = jvp(moved, (bound,), (torch.ones_like(bound),))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(moved(_dual(bound))).tangent
    torch.testing.assert_close(torch.zeros(2).double() if tangent is None else tangent, expected)
    one = torch.ones(())  # the slope of a clamp at its bound is 1 in torch 2.13, and 0 in 2.15
    slope = jvp(lambda scale: scale.clamp(max=1.0), (one,), (one,))[1]
    assert bool(expected.any()) == (kind is ClipAdaptive or bool(slope))


def test_a_tangent_goes_through_a_step_beneath_a_derivative_in_reverse():
    params, grads = torch.linspace(-1, 1, 40).double(), torch.linspace(1, 2, 40).double()
    state = INNER.init(params)

    def slope(scale):
        def loss(grads):
            return INNER.update(grads * scale, state, params)[0].square().sum()

        return grad(loss)(grads)

    scale = torch.tensor(1e-8).double()  # about eps, so that it matters
    _, expected = jvp(slope, (scale,), (torch.ones_like(scale),))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(slope(_dual(scale))).tangent
    torch.testing.assert_close(tangent, expected)
    assert expected.any()


def test_a_schedule_of_a_dual_count_has_its_slope():
    schedule, count = Cosine(peak=0.1, steps=100), torch.tensor(30.0, dtype=torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(count, torch.ones_like(count))
        slope = forward_ad.unpack_dual(schedule(dual)).tangent
    expected = -0.1 / 2 * math.pi / 100 * math.sin(math.pi * 0.3)
    assert slope.item() == pytest.approx(expected, rel=1e-12)


def _dual(tensor):
    return forward_ad.make_dual(tensor, torch.ones_like(tensor))


def _replaced(state, where, function):
    """Return a state in which a function was applied to what is at a path, such as "inner.norm"."""
    name, _, rest = where.partition(".")
    part = getattr(state, name)
    part = _replaced(part, rest, function) if rest else tree_map(function, part)
    return state._replace(**{name: part})


# Optimizers, and what of their states to be written is dual.
WRITTEN = {
    "a moment": (INNER, "exp_avg"),
    "a count": (INNER, "step"),
    "a norm": (Clip(INNER, 1.0), "norm"),
    "a sum": (Accumulate(INNER, 4), "acc_grads"),
    "a count of a sum": (Accumulate(INNER, 4), "mini_step"),
    "an average": (Ema(INNER, 0.9), "average"),
    "a slow parameter": (Lookahead(INNER, 4), "slow_params"),
    "a moment beneath": (Ema(Clip(INNER, 1.0), 0.9), "inner.inner.exp_avg_sq"),
    "a scale": (LossScale(INNER), "scale"),
    "a share": (Zero1(INNER, None), "inner.exp_avg"),
    "an anchor": (LocalUpdates(INNER, 4, None, outer_lr=0.5), "anchor"),
}


@pytest.mark.parametrize("where", WRITTEN)
def test_a_state_with_a_tangent_is_not_written(where):
    opt, path = WRITTEN[where]
    params = {"w": torch.ones(3), "v": torch.ones(2)}
    grads, state = clone(params), opt.init(params)
    before = clone((params, state))
    with forward_ad.dual_level():
        dual = _replaced(state, path, _dual)
        with pytest.raises(RuntimeError, match="which a transform"):
            opt.update_(grads, dual, params)
    assert_same_bits((params, state), before)


@pytest.mark.parametrize("where", ["grads", "params", "lr", "max_norm", "a function"])
def test_writing_in_place_over_a_tangent_is_refused_and_nothing_is_written(where):
    with forward_ad.dual_level():
        dual = _dual(torch.tensor(0.1))
        lr = {"lr": dual, "a function": lambda step: dual}.get(where, 0.1)
        inner = AdamW(lr=lr)
        clipped = Clip(inner, dual if where == "max_norm" else 1.0)
        for opt in (
            clipped,
            Accumulate(clipped, 1),
            Partition({"a": inner, "b": clipped}, {"w": "a", "v": "b"}),
            Partition({"a": Clip(INNER, 1.0), "b": clipped}, {"w": "a", "v": "b"}),
        ):
            params = {"w": torch.ones(3), "v": torch.ones(2)}
            grads, state = clone(params), opt.init(params)
            if where in ("grads", "params"):
                tree = {"grads": grads, "params": params}[where]
                tree["v"] = _dual(tree["v"])
            before = clone((params, state))
            with pytest.raises(RuntimeError, match="in place"):
                opt.update_(grads, state, params)
            assert_same_bits((params, state), before)


class Seeing(TorchDispatchMode):
    """A mode of which nothing is known: it looks on, and lets no value be read."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        assert "_local_scalar_dense" not in function.__name__
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("update", ["update", "update_"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "LocalUpdates"])
def test_a_mode_that_looks_on_sees_plain_operators_and_changes_nothing(name, update, undisturbed):
    opt = OPTIMIZERS[name]
    for mode in (Seeing(), FlopCounterMode(display=False)):
        with mode:
            moved, after = train(opt, update, params_of())
        assert_close((moved, after), undisturbed[name, update], rtol=1e-5)
        assert all(leaf.requires_grad and leaf.is_leaf for leaf in moved.values())
        seen = getattr(mode, "names", [])
        assert not any("fused" in name or "foreach" in name for name in seen)


def test_a_bad_number_is_refused_while_a_mode_looks_on():
    with Seeing(), pytest.raises(ValueError, match=r"lr=-1\.0"):
        AdamW(lr=torch.tensor(-1.0))


@pytest.mark.parametrize("update", ["update", "update_"])
@pytest.mark.parametrize("mode", [Seeing, partial(FlopCounterMode, display=False)])
def test_what_is_refused_is_refused_while_a_mode_looks_on(update, mode):
    opt = Partition({"a": INNER, "b": Clip(INNER, 1.0)}, {"w": "a", "v": "b"})
    weight = torch.ones(3)
    apart = {"w": weight, "v": weight.clone()}
    shared = {"w": weight, "v": weight}
    expanded = {"w": torch.ones(1).expand(3), "v": weight}
    historic = {"w": torch.ones(3, requires_grad=True) * 1, "v": weight}
    state = opt.init(apart)
    with mode():
        with pytest.raises(ValueError, match="shares its memory"):
            opt.init(shared)
        with pytest.raises(ValueError, match="shares its memory"):
            getattr(opt, update)(clone(apart), state, shared)
        if update == "update_":
            with pytest.raises(ValueError, match="shares its memory with a tensor that is to be"):
                opt.update_(apart, state, apart)
            with pytest.raises(ValueError, match="several elements share one place"):
                opt.update_(clone(apart), opt.init(expanded), expanded)
            with pytest.raises(RuntimeError, match="has a history"):
                opt.update_(clone(apart), state, historic)
    assert_same_bits(state, opt.init(apart))


def test_an_update_is_recorded_by_the_same_rule_while_a_mode_looks_on():
    weight = nn.Parameter(torch.ones(3))
    state = INNER.init(weight)
    loss = (weight.square()).sum()
    own = torch.autograd.grad(loss, weight, create_graph=True)[0]
    elsewhere_from = torch.ones(3, requires_grad=True) * 2
    for grads, recorded in ((own, False), (elsewhere_from, True)):
        with Seeing():
            moved, _ = INNER.update(grads, state, weight)
        assert moved.requires_grad
        assert (moved.grad_fn is not None) == recorded
