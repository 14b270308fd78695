"""Cautious updates and cautious weight decay: their equations by hand, and what is held back."""

import math

import pytest
import torch
from torch.func import grad, vmap

from funcopt import (
    SGD,
    Adam,
    AdamW,
    Cautious,
    CautiousState,
    Clip,
    Frozen,
    MasterWeights,
    Partition,
    Plateau,
    pure,
)
from funcopt._core.types import traits_of
from funcopt.schedules import Linear

from ..cases import assert_close, assert_same_bits, attempt, clone, leaves, random_like, tree_map

both_ways = pytest.mark.parametrize("method", ["update", "update_"])
MOMENTUM = SGD(lr=0.1, momentum=0.9)


def params_of(*lead, dtype=torch.float64):
    shapes = {"w": (4, 6), "b": (9,), "s": ()}
    return {name: torch.randn((*lead, *shape), dtype=dtype) for name, shape in shapes.items()}


def by_hand(old, moved, slope, *, mask=True, rescale=True, decay=0.0):
    """The equations, element by element, in Python's floats."""
    flat = [tensor.flatten().tolist() for tensor in (old, moved, slope)]
    agrees = [(n - o) * g < 0 for o, n, g in zip(*flat, strict=True)]
    share = max(sum(agrees) / len(agrees), 1e-3) if rescale else 1.0
    found = []
    for o, n, held in zip(flat[0], flat[1], agrees, strict=True):
        update = n - o
        value = o + (update * held / share if mask else update)
        found.append(value - (decay * o if update * o <= 0 else 0.0))
    return torch.tensor(found, dtype=torch.float64).reshape(old.shape)


OPTIONS = {
    "as it comes": {},
    "not rescaled": {"rescale": False},
    "with decay": {"weight_decay": 0.3},
    "decay alone": {"mask": False, "weight_decay": 0.3},
    "neither": {"mask": False},
}
INNER = {
    "SGD": MOMENTUM,
    "Adam": Adam(lr=0.1, betas=(0.9, 0.9)),
    "Clip": Clip(MOMENTUM, 1.0),
}


@both_ways
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
@pytest.mark.parametrize("name", OPTIONS)
def test_each_update_is_that_of_the_equations(name, inner, method):
    options = OPTIONS[name]
    opt, params = Cautious(inner, **options), params_of()
    state, inner_state, held = opt.init(params), inner.init(params), 0
    decay = options.get("weight_decay", 0.0) * 0.1
    flags = {flag: options[flag] for flag in ("mask", "rescale") if flag in options}
    for _ in range(8):
        grads = random_like(params)
        moved, inner_state = inner.update(grads, inner_state, params)
        expected = {
            key: by_hand(params[key], moved[key], grads[key], decay=decay, **flags)
            for key in params
        }
        held += sum(int((expected[key] == params[key]).sum()) for key in params)
        params, state = getattr(opt, method)(grads, state, params)
        assert_close(params, expected, rtol=1e-13, atol=1e-14)
        assert_same_bits(state.inner, inner_state)
    assert (held > 20) == options.get("mask", True)


@both_ways
def test_an_element_is_the_old_or_the_new_one_to_the_bit_where_nothing_is_scaled(method):
    opt = Cautious(MOMENTUM, rescale=False)
    params = params_of(dtype=torch.float32)
    state = opt.init(params)
    for _ in range(4):
        grads, before, inner_state = random_like(params), clone(params), clone(state.inner)
        moved = MOMENTUM.update(grads, inner_state, before)[0]
        params, state = getattr(opt, method)(grads, state, params)
        for key, own in params.items():
            agrees = (moved[key] - before[key]) * grads[key] < 0
            assert torch.equal(own, torch.where(agrees, moved[key], before[key]))


@both_ways
def test_where_all_agrees_it_is_the_inner_update_to_the_bit(method):
    params = params_of(dtype=torch.float32)
    opt, inner = Cautious(AdamW(lr=0.1, weight_decay=0.0)), AdamW(lr=0.1, weight_decay=0.0)
    grads = random_like(params)
    expected = inner.update(grads, inner.init(params), params)
    params, state = getattr(opt, method)(grads, opt.init(params), params)
    assert_same_bits((params, state.inner), expected)


def test_where_next_to_nothing_agrees_the_update_grows_a_thousandfold_at_most():
    count = 4000
    opt, params = Cautious(MOMENTUM), torch.zeros(count, dtype=torch.float64)
    params, state = opt.update(torch.ones(count).double(), opt.init(params), params)
    grads = -torch.full((count,), 0.5, dtype=torch.float64)
    grads[0] = 0.5  # the one that goes on the way it went
    moved, _ = opt.update(grads, state, params)
    assert torch.equal(moved[1:], params[1:])
    assert moved[0] - params[0] == pytest.approx(-0.1 * (0.9 + 0.5) * 1000, rel=1e-12)


def test_signs_are_compared_where_the_product_would_be_zero():
    tiny = torch.tensor([1e-30])
    opt = Cautious(SGD(lr=1.0))
    zero = torch.zeros(1)
    assert torch.equal(opt.update(tiny, opt.init(zero), zero)[0], -tiny)


def test_decay_is_left_out_where_an_update_leads_away_from_zero():
    opt = Cautious(SGD(lr=0.5), mask=False, weight_decay=0.25)
    params = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    grads = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0])
    moved, _ = opt.update(grads, opt.init(params), params)
    # Towards zero, away, away, towards, and not moved, which decays, too.
    expected = [1 - 0.5 - 0.125, -1 - 0.5, 1 + 0.5, -1 + 0.5 + 0.125, 2 - 0.25]
    assert moved.tolist() == expected


@both_ways
def test_one_that_maximizes_agrees_where_it_goes_up(method):
    params, down = params_of(), Cautious(MOMENTUM)
    up = Cautious(SGD(lr=0.1, momentum=0.9, maximize=True))
    state, other, expected = up.init(params), down.init(params), clone(params)
    for _ in range(4):
        grads = random_like(params)
        expected, other = down.update(tree_map(torch.neg, grads), other, expected)
        params, state = getattr(up, method)(grads, state, params)
        assert_same_bits(params, expected)


def test_what_goes_both_ways_is_refused_where_the_gradient_is_asked():
    both = Partition({"w": SGD(), "b": SGD(maximize=True)}, {"w": "w", "b": "b"})
    with pytest.raises(ValueError, match="maximizes in one part"):
        Cautious(both)
    Cautious(both, mask=False, weight_decay=0.1)


@both_ways
def test_a_complex_element_is_two(method):
    pairs = torch.randn(5, 2, dtype=torch.float64)
    params, opt = torch.view_as_complex(pairs.clone()), Cautious(MOMENTUM, weight_decay=1.0)
    state, other = opt.init(params), opt.init(pairs)
    for _ in range(3):
        grads = torch.randn_like(pairs)
        pairs, other = opt.update(grads, other, pairs)
        params, state = getattr(opt, method)(torch.view_as_complex(grads), state, params)
        assert_close(torch.view_as_real(params), pairs, rtol=1e-13)


@both_ways
def test_16_bit_parameters_keep_small_steps_within_master_weights(method):
    opt = MasterWeights(Cautious(SGD(lr=1e-3)))
    params = torch.ones(3, dtype=torch.bfloat16)
    state = opt.init(params)
    for _ in range(8):
        params, state = getattr(opt, method)(torch.ones_like(params), state, params)
    assert torch.equal(params, torch.full_like(params, 1 - 8e-3))


@both_ways
def test_leaves_without_a_gradient_and_at_rest_neither_move_nor_decay(method):
    groups = Partition({"on": MOMENTUM, "off": Frozen()}, {"w": "on", "b": "on", "s": "off"})
    opt, params = Cautious(groups, weight_decay=0.5), params_of()
    before = clone(params)
    grads = {"w": random_like(params["w"]), "b": None, "s": None}
    moved, _ = getattr(opt, method)(grads, opt.init(params), params)
    assert torch.equal(moved["b"], before["b"])
    assert torch.equal(moved["s"], before["s"])
    assert (moved["w"] != before["w"]).all()


@both_ways
def test_nan_stays_and_leaves_without_elements_do_not_matter(method):
    opt, params = Cautious(MOMENTUM), {"w": torch.ones(3), "e": torch.ones(0, 2)}
    grads = {"w": torch.tensor([1.0, math.nan, 1.0]), "e": torch.ones(0, 2)}
    moved, _ = getattr(opt, method)(grads, opt.init(params), params)
    assert moved["w"].isnan().tolist() == [False, True, False]
    assert moved["e"].shape == (0, 2)


@both_ways
def test_numbers_may_be_schedules_and_tensors(method):
    schedule = Linear(0.1, 0.4, 3)
    opt = Cautious(SGD(lr=schedule), mask=False, weight_decay=torch.tensor(0.5))
    params = torch.ones(3, dtype=torch.float64)
    state = opt.init(params)
    for step in range(3):
        lr = 0.1 + 0.1 * step
        expected = params - lr - lr * 0.5 * params
        params, state = getattr(opt, method)(torch.ones_like(params), state, params)
        assert_close(params, expected, rtol=1e-13)
        assert state.step == step + 1


def test_a_plateau_lowers_the_decay_with_the_learning_rate():
    inner = Cautious(SGD(lr=0.5), weight_decay=0.5)
    opt, params = Plateau(inner, factor=0.5, patience=0), torch.ones(2)
    state = opt.init(params)
    _, state = opt.update(torch.ones(2), state, params, value=1.0)
    moved, _ = opt.update(torch.ones(2), state, params, value=2.0)
    assert moved.tolist() == [1 - 0.25 - 0.125] * 2
    Plateau(Cautious(SGD(lr=0.5)), patience=0).init(params)


def test_a_vmap_is_the_updates_of_its_members():
    opt, params = Cautious(MOMENTUM, weight_decay=0.1), params_of(3)
    state = vmap(opt.init)(params)
    alone = [tree_map(lambda leaf, i=i: leaf[i], params) for i in range(3)]
    states = [opt.init(own) for own in alone]
    for _ in range(3):
        grads = random_like(params)
        params, state = vmap(opt.update)(grads, state, params)
        for i in range(3):
            own = tree_map(lambda leaf, i=i: leaf[i], grads)
            alone[i], states[i] = opt.update(own, states[i], alone[i])
            assert_close(tree_map(lambda leaf, i=i: leaf[i], params), alone[i], 1e-13, 1e-14)


def test_derivatives_flow_by_what_is_not_held_back():
    opt = Cautious(SGD(lr=0.1, momentum=0.9), weight_decay=0.2)
    params, grads = params_of(), random_like(params_of())
    _, state = opt.update(random_like(params), opt.init(params), params)
    factor = torch.tensor(1.0, dtype=torch.float64)

    def loss(factor):
        moved, _ = opt.update(
            tree_map(lambda g: g * factor, grads), state, tree_map(lambda p: p * factor, params)
        )
        return sum(leaf.square().sum() for leaf in leaves(moved))

    wanted = (loss(factor + 1e-6) - loss(factor - 1e-6)) / 2e-6
    assert_close(grad(loss)(factor), wanted, rtol=1e-7)
    own = factor.clone().requires_grad_()
    assert_close(torch.autograd.grad(loss(own), own)[0], wanted, rtol=1e-7)


def test_parameters_that_require_a_gradient_do_so_afterwards_without_a_history():
    opt, params = Cautious(MOMENTUM), {k: p.requires_grad_() for k, p in params_of().items()}
    moved, _ = opt.update(random_like(params), opt.init(params), params)
    assert all(p.requires_grad and p.grad_fn is None for p in moved.values())


@both_ways
def test_it_compiles_to_one_graph(method):
    opt, params = Cautious(MOMENTUM, weight_decay=0.1), params_of(dtype=torch.float32)
    state, grads = opt.init(params), random_like(params)
    expected = opt.update(grads, state, params)
    compiled = torch.compile(getattr(opt, method), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(grads, state, params), expected)


def test_what_is_wrong_within_is_refused_with_nothing_written():
    opt, params = Cautious(MOMENTUM, weight_decay=Linear(0.1, 0.2, 3)), params_of()
    state = opt.init(params)
    assert "grads['b']" in attempt(opt, {**params, "b": torch.ones(1)}, state, params)
    wrong = state._replace(inner=state.inner._replace(momentum_buffer={}))
    assert "momentum_buffer" in attempt(opt, random_like(params), wrong, params)
    assert "CautiousState" in attempt(opt, params, MOMENTUM.init(params), params)
    assert "no count" in attempt(opt, params, CautiousState(state.inner), params)


def test_traits_tell_whether_whole_leaves_are_looked_at():
    assert traits_of(Cautious(SGD())).leafwise
    assert not traits_of(Cautious(SGD())).elementwise
    assert traits_of(Cautious(SGD(), rescale=False)).elementwise
    assert traits_of(Cautious(SGD(), mask=False)).elementwise
    assert not traits_of(Cautious(SGD(), mask=False)).linear


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": 1}, TypeError, "mask=1: must be True or False"),
        ({"rescale": None}, TypeError, "rescale=None"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1"),
        ({"weight_decay": "0.1"}, TypeError, "weight_decay='0.1'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Cautious(SGD(), **options)
    with pytest.raises(TypeError, match="inner="):
        Cautious(0.1)


@pytest.mark.parametrize(
    ("inner", "found"),
    [
        (Frozen(), "no learning rate"),
        (Partition({"w": SGD(lr=0.1), "b": SGD(lr=0.2)}, {"w": "w", "b": "b"}), "2 learning rates"),
        (SGD(lr={"w": 0.1, "b": 0.2}), "a learning rate for each leaf"),
    ],
)
def test_decay_takes_the_one_learning_rate_that_there_is(inner, found):
    with pytest.raises(ValueError, match=f"has {found}, where Cautious with a weight_decay takes"):
        Cautious(inner, weight_decay=0.1)
    Cautious(inner)
    same = Partition({"w": SGD(lr=0.1), "b": Adam(lr=0.1)}, {"w": "w", "b": "b"})
    assert Cautious(same, weight_decay=0.1).lr == 0.1


@both_ways
def test_a_class_of_torch_that_ascends_is_held_back_where_its_update_goes_down(method):
    params = {"w": torch.tensor([1.0, 2.0])}
    grads = {"w": torch.tensor([0.5, -0.5])}
    opt = Cautious(pure(torch.optim.SGD, lr=0.5, maximize=True))
    moved, _ = getattr(opt, method)(grads, opt.init(params), clone(params))
    assert_same_bits(moved, {"w": torch.tensor([1.25, 1.75])})


def test_a_class_of_torch_that_ascends_beside_one_that_descends_is_refused():
    up, down = pure(torch.optim.SGD, maximize=True), pure(torch.optim.SGD)
    with pytest.raises(ValueError, match="maximizes in one part and minimizes in another"):
        Cautious(Partition({"up": up, "down": down}, lambda name, leaf: "up"))


def test_weight_decay_goes_by_the_learning_rate_of_a_class_of_torch():
    params = random_like(params_of())
    grads, own = random_like(params), {"lr": 0.1, "momentum": 0.9}
    expected = Cautious(SGD(**own), weight_decay=0.5)
    found = Cautious(pure(torch.optim.SGD, **own), weight_decay=0.5)
    assert_same_bits(
        found.update(grads, found.init(params), params)[0],
        expected.update(grads, expected.init(params), params)[0],
    )
