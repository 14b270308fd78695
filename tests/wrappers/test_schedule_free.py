"""Schedule-free learning: its equations in float64, what is averaged, and how it composes."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from funcopt import (
    SGD,
    Accumulate,
    Adam,
    AdamW,
    Clip,
    ClipAdaptive,
    Ema,
    Frozen,
    Lion,
    MasterWeights,
    Partition,
    Plateau,
    ScheduleFree,
    ScheduleFreeState,
    averaged,
    interop,
    pure,
)
from funcopt._core.types import traits_of
from funcopt.schedules import Linear

from ..cases import assert_close, assert_same_bits, attempt, clone, leaves, random_like, tree_map

both_ways = pytest.mark.parametrize("method", ["update", "update_"])
SHAPES = {"w": (3, 2), "b": (4,), "s": ()}


def params_of(*lead, dtype=torch.float64):
    return {name: torch.randn((*lead, *shape), dtype=dtype) for name, shape in SHAPES.items()}


def by_hand(inner, beta, rates, params, gradients, decay=0.0):
    """x, y and z after each update by the paper's equations, with the step of an optimizer."""
    x, y, z = clone(params), clone(params), clone(params)
    state, total = inner.init(z), 0.0
    for lr, grads in zip(rates, gradients, strict=True):
        z, state = inner.update(grads, state, z)
        z = {name: leaf - lr * decay * y[name] for name, leaf in z.items()}
        total += lr**2
        c = lr**2 / total if total else 0.0
        x = {name: (1 - c) * x[name] + c * z[name] for name in z}
        y = {name: (1 - beta) * z[name] + beta * x[name] for name in z}
        yield x, y, z


WARMUP = Linear(0.0, 0.1, 10)
CASES = {
    "SGD": (SGD(lr=0.1), 0.9, lambda t: 0.1, 0.0),
    "SGD, a warmup from zero": (SGD(lr=WARMUP), 0.95, lambda t: 0.1 * min(t / 10, 1), 0.0),
    "Adam, a warmup": (
        Adam(lr=Linear(0.01, 0.1, 9), betas=(0.0, 0.9)),
        0.9,
        lambda t: 0.01 + 0.01 * min(t, 9),
        0.0,
    ),
    "Adam, decay at y": (Adam(lr=0.1, betas=(0.0, 0.9)), 0.9, lambda t: 0.1, 0.2),
    "AdamW, decay at z": (AdamW(lr=0.1, betas=(0.0, 0.9), weight_decay=0.2), 0.5, lambda t: 0.1, 0),
    "a rate that falls": (SGD(lr=lambda n: 0.1 / (1 + n)), 0.9, lambda t: 0.1 / (1 + t), 0.0),
    "no interpolation": (SGD(lr=0.1), 0.0, lambda t: 0.1, 0.0),
    "the average alone": (SGD(lr=0.1), 1.0, lambda t: 0.1, 0.0),
}


@both_ways
@pytest.mark.parametrize("name", CASES)
def test_over_100_steps_it_is_the_papers_in_float64(name, method):
    inner, beta, rate, decay = CASES[name]
    opt, params = ScheduleFree(inner, beta, decay), params_of()
    gradients = [random_like(params) for _ in range(100)]
    rates = [rate(t) for t in range(100)]
    expected = by_hand(inner, beta, rates, params, gradients, decay)
    state = opt.init(params)
    for grads, (x, y, z) in zip(gradients, expected, strict=True):
        params, state = getattr(opt, method)(grads, state, params)
        for own, wanted in ((params, y), (state.z, z), (state.average, x)):
            assert_close(own, wanted, rtol=1e-11, atol=1e-12)
    assert state.weight_sum.item() == pytest.approx(sum(lr**2 for lr in rates), rel=1e-13)


@pytest.mark.parametrize("warmup", [None, 5])
def test_optax_gives_the_same_over_100_steps(warmup):
    optax = pytest.importorskip("optax", reason="optax comes with the extra `benchmark` alone")
    numpy = pytest.importorskip("numpy")
    lr = 0.1 if warmup is None else optax.linear_schedule(0.0, 0.1, warmup)
    own = 0.1 if warmup is None else Linear(0.0, 0.1, warmup)
    # Optax counts the updates from 1 for the weights, and from 0 for the inner optimizer.
    weighed = lr if warmup is None else lambda count: lr(count - 1)
    theirs = optax.contrib.schedule_free(optax.sgd(lr), weighed, b1=0.9)
    opt, params = ScheduleFree(SGD(lr=own)), params_of(dtype=torch.float32)
    their_params = {name: p.numpy() for name, p in params.items()}
    their_state, state = theirs.init(their_params), opt.init(params)
    for _ in range(100):
        grads = random_like(params)
        given = {name: g.numpy() for name, g in grads.items()}
        updates, their_state = theirs.update(given, their_state, their_params)
        their_params = optax.apply_updates(their_params, updates)
        params, state = opt.update(grads, state, params)
        for mine, other in ((params, their_params), (state.z, their_state.z)):
            for name, leaf in mine.items():
                wanted = torch.from_numpy(numpy.array(other[name]))
                torch.testing.assert_close(leaf, wanted, rtol=1e-4, atol=1e-5)


@both_ways
def test_on_a_quadratic_the_average_comes_nearer_than_what_is_moved(method):
    target = torch.linspace(-1, 1, 20, dtype=torch.float64)
    opt = ScheduleFree(SGD(lr=0.5))
    params = torch.zeros(20, dtype=torch.float64)
    state = opt.init(params)
    for _ in range(400):
        noise = torch.randn_like(params)
        params, state = getattr(opt, method)(params - target + noise, state, params)
    error = (averaged(state, params) - target).norm()
    assert error < 0.5
    assert error < (state.z - target).norm() / 4


@both_ways
def test_while_the_learning_rate_is_zero_nothing_moves(method):
    opt, params = ScheduleFree(SGD(lr=Linear(0.0, 0.1, 2))), params_of()
    before, state = clone(params), opt.init(params)
    params, state = getattr(opt, method)(random_like(params), state, params)
    assert_same_bits(params, before)
    assert_same_bits(state.average, before)
    assert state.weight_sum == 0
    assert all(leaf.isfinite().all() for leaf in leaves((params, state)))


@both_ways
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_16_bit_parameters_all_is_kept_in_float32(dtype, method):
    opt, params = ScheduleFree(SGD(lr=2.0**-12)), torch.ones(3, dtype=dtype)
    gradients = [torch.ones_like(params) for _ in range(20)]
    wide, state = torch.ones(3), opt.init(params)
    assert state.z.dtype is state.average.dtype is torch.float32
    wide_state = opt.init(wide)
    for grads in gradients:
        params, state = getattr(opt, method)(grads, state, params)
        wide, wide_state = opt.update(grads.float(), wide_state, wide)
        assert_same_bits((state.z, state.average), (wide_state.z, wide_state.average))
        assert torch.equal(params, wide.to(dtype))
    assert averaged(state, params).dtype is dtype


@both_ways
def test_a_parameter_without_a_gradient_stays_with_all_that_belongs_to_it(method):
    opt, params = ScheduleFree(SGD(lr=0.1), weight_decay=0.5), params_of()
    params, state = opt.update(random_like(params), opt.init(params), params)
    before = clone((params["b"], state.z["b"], state.average["b"]))
    grads = {**random_like(params), "b": None}
    params, state = getattr(opt, method)(grads, state, params)
    assert_same_bits((params["b"], state.z["b"], state.average["b"]), before)


@both_ways
def test_leaves_at_rest_are_their_own_average(method):
    groups = Partition({"on": SGD(lr=0.1), "off": Frozen()}, {"w": "on", "b": "off", "n": "off"})
    opt = ScheduleFree(groups)
    params = {"w": torch.ones(2), "b": torch.ones(3), "n": torch.tensor(5)}
    state = opt.init(params)
    grads = {"w": torch.ones(2), "b": None, "n": None}
    moved, state = getattr(opt, method)(grads, state, params)
    assert moved["b"] is params["b"]
    assert moved["n"] is params["n"]
    assert torch.equal(state.average["b"], params["b"])
    moved["b"].fill_(7.0)
    _, state = getattr(opt, method)(grads, state, moved)
    assert_same_bits(averaged(state, moved)["b"], torch.full((3,), 7.0))


def test_the_average_is_read_at_any_depth_and_goes_into_a_module():
    model = torch.nn.Linear(3, 2)
    params = {name: p.detach() for name, p in model.named_parameters()}
    opt = Clip(ScheduleFree(SGD(lr=0.1)), 1.0)
    state = opt.init(params)
    for _ in range(3):
        params, state = opt.update(random_like(params), state, params)
    found = averaged(state, params)
    assert_same_bits(found, state.inner.average)
    functional_call(model, found, torch.ones(3))
    groups = Partition(
        {"weight": ScheduleFree(SGD(lr=0.1)), "bias": Ema(SGD(lr=0.2), 0.5)},
        {"weight": "weight", "bias": "bias"},
    )
    state = groups.init(params)
    params, state = groups.update(random_like(params), state, params)
    assert_same_bits(
        averaged(state, params),
        {
            "weight": state.inner["weight"].average["weight"],
            "bias": state.inner["bias"].average["bias"],
        },
    )
    outer = Ema(ScheduleFree(SGD(lr=0.1)), 0.5)
    state = outer.init(params)
    assert averaged(state, params)["weight"] is state.average["weight"]


COMPOSED = {
    "MasterWeights": MasterWeights(SGD(lr=0.1)),
    "ClipAdaptive": ClipAdaptive(SGD(lr=0.1), 0.05),
    "Clip": Clip(Lion(lr=0.1), 0.1),
}


@both_ways
@pytest.mark.parametrize("name", COMPOSED)
def test_what_is_inside_sees_what_it_moved(name, method):
    inner, params = COMPOSED[name], params_of()
    opt, z = ScheduleFree(inner), clone(params)
    state, alone = opt.init(params), inner.init(z)
    for _ in range(4):
        grads = random_like(params)
        z, alone = inner.update(grads, alone, z)
        params, state = getattr(opt, method)(grads, state, params)
        assert_same_bits((state.z, state.inner), (z, alone))


def test_a_plateau_lowers_the_weight_with_the_learning_rate():
    opt, params = Plateau(ScheduleFree(SGD(lr=1.0)), factor=0.5, patience=0), torch.zeros(2)
    _, state = opt.update(torch.ones(2), opt.init(params), params, value=1.0)
    _, state = opt.update(torch.ones(2), state, params, value=2.0)
    assert state.inner.weight_sum == 1.0 + 0.25
    # From -1, a fifth of the way to -1.5.
    assert_close(state.inner.average, torch.full((2,), -1.1))


def test_a_vmap_is_the_updates_of_its_members_each_with_its_learning_rate():
    rates, params = torch.tensor([0.1, 0.3], dtype=torch.float64), params_of(2)

    def steps(lr, params, gradients):
        opt = ScheduleFree(SGD(lr=lr), beta=lr)
        state = opt.init(params)
        for grads in gradients:
            params, state = opt.update(grads, state, params)
        return params, state

    gradients = [random_like(params) for _ in range(3)]
    together = vmap(steps)(rates, params, gradients)
    for i in range(2):
        alone = steps(*tree_map(lambda leaf, i=i: leaf[i], (rates, params, gradients)))
        assert_close(tree_map(lambda leaf, i=i: leaf[i], together), alone, 1e-13, 1e-14)


def test_derivatives_flow_to_gradients_parameters_and_every_number():
    params, gradients = params_of(), [random_like(params_of()) for _ in range(3)]

    def loss(number):
        opt = ScheduleFree(SGD(lr=lambda n: 0.1 * number / (1 + n)), number * 0.5, number * 0.1)
        moved = tree_map(lambda p: p * number, params)
        state = opt.init(moved)
        for grads in gradients:
            moved, state = opt.update(tree_map(lambda g: g * number, grads), state, moved)
        return sum(leaf.square().sum() for leaf in leaves((moved, state.average)))

    one = torch.tensor(1.0, dtype=torch.float64)
    wanted = (loss(one + 1e-6) - loss(one - 1e-6)) / 2e-6
    assert_close(grad(loss)(one), wanted, rtol=1e-7)
    assert_close(jvp(loss, (one,), (one,))[1], wanted, rtol=1e-7)
    own = one.clone().requires_grad_()
    assert_close(torch.autograd.grad(loss(own), own)[0], wanted, rtol=1e-7)


def test_parameters_that_require_a_gradient_leave_no_history():
    opt, params = ScheduleFree(SGD(lr=0.1)), {k: p.requires_grad_() for k, p in params_of().items()}
    state = opt.init(params)
    for _ in range(2):
        params, state = opt.update(random_like(params), state, params)
    assert all(p.requires_grad and p.grad_fn is None for p in params.values())
    assert not any(leaf.requires_grad for leaf in leaves(state))


@both_ways
def test_it_compiles_to_one_graph(method):
    torch.compiler.reset()  # as one function serves all methods, and may have few graphs in all
    opt, params = ScheduleFree(SGD(lr=0.1), weight_decay=0.1), params_of(dtype=torch.float32)
    state, grads = opt.init(params), random_like(params)
    expected = opt.update(grads, state, params)
    compiled = torch.compile(getattr(opt, method), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(grads, state, params), expected)


def test_it_goes_on_from_a_file_with_the_same_bits():
    opt, params = ScheduleFree(Adam(lr=WARMUP, betas=(0.0, 0.9))), params_of()
    state = opt.init(params)
    for _ in range(3):
        params, state = opt.update(random_like(params), state, params)
    again = interop.from_state_dict(opt.init(params), interop.to_state_dict(state))
    grads = random_like(params)
    assert_same_bits(opt.update(grads, again, params), opt.update(grads, state, params))


def test_what_is_wrong_is_refused_with_nothing_written():
    opt, params = ScheduleFree(SGD(lr=0.1, momentum=0.5)), params_of()
    state, grads = opt.init(params), random_like(params)
    assert "grads['b']" in attempt(opt, {**grads, "b": torch.ones(1)}, state, params)
    assert "ScheduleFreeState" in attempt(opt, grads, SGD().init(params), params)
    for name in ("z", "average"):
        wrong = state._replace(**{name: {**getattr(state, name), "b": torch.ones(4)}})
        assert f"state.{name}['b']" in attempt(opt, grads, wrong, params)
    shared = state._replace(z=state.average)
    assert "state.average['w']" in attempt(opt, grads, shared, params)
    shared = state._replace(average={**state.average, "w": params["w"]})
    assert "params['w']" in attempt(opt, grads, shared, params)
    wrong = state._replace(inner=state.inner._replace(momentum_buffer={}))
    assert "momentum_buffer" in attempt(opt, grads, wrong, params)
    wrong = state._replace(weight_sum=torch.zeros(2))
    assert "state.weight_sum" in attempt(opt, grads, wrong, params)
    scheduled = ScheduleFree(SGD(lr=WARMUP, momentum=0.5))
    assert "no count" in attempt(scheduled, grads, state, params)


def test_it_goes_by_the_one_learning_rate_that_there_is():
    labels = {"w": "w", "b": "b", "s": "b"}
    with pytest.raises(ValueError, match="has 2 learning rates, where ScheduleFree takes"):
        ScheduleFree(Partition({"w": SGD(lr=0.1), "b": SGD(lr=0.2)}, labels))
    with pytest.raises(ValueError, match="a learning rate for each leaf"):
        ScheduleFree(SGD(lr={"w": 0.1, "b": WARMUP, "s": 0.1}))
    with pytest.raises(ValueError, match="no learning rate"):
        ScheduleFree(Frozen(), weight_decay=0.1)
    assert ScheduleFree(Frozen()).init(params_of()).step == ()
    assert ScheduleFree(Accumulate(SGD(lr=0.3), 2)).lr == 0.3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": 1.5}, ValueError, "beta=1.5"),
        ({"beta": None}, TypeError, "beta=None"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay=-1"),
    ],
)
def test_numbers_out_of_range_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        ScheduleFree(SGD(), **options)


def test_traits_are_those_of_each_element_by_itself():
    assert traits_of(ScheduleFree(SGD())).elementwise
    assert traits_of(ScheduleFree(SGD())).linear
    assert isinstance(ScheduleFree(SGD()).init(torch.ones(2)), ScheduleFreeState)


@both_ways
@pytest.mark.parametrize("lr", [0.1, 1, Linear(0.0, 0.1, 3)], ids=["number", "int", "schedule"])
def test_weights_go_by_the_learning_rate_of_a_class_of_torch(method, lr):
    ours = ScheduleFree(SGD(lr=lr), weight_decay=0.1)
    theirs = ScheduleFree(pure(torch.optim.SGD, lr=lr), weight_decay=0.1)
    params = params_of()
    expected, found = clone(params), clone(params)
    state, own = ours.init(expected), theirs.init(found)
    for _ in range(4):
        grads = random_like(params)
        expected, state = ours.update(grads, state, expected)
        found, own = getattr(theirs, method)(grads, own, found)
        assert_same_bits(found, expected)
    assert_same_bits((own.weight_sum, own.average), (state.weight_sum, state.average))


def test_the_learning_rate_of_a_class_of_torch_may_be_its_default():
    opt = ScheduleFree(pure(torch.optim.Adam), weight_decay=0.1)
    assert opt.lr == 1e-3
