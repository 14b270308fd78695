"""Gradients changed by a function: what it is given, what it may return, and what is kept."""

import pickle
import re

import pytest
import torch
from torch.func import grad, jvp, vmap

from funcopt import SGD, AdamW, Ema, Frozen, Members, Partition, Transform, TransformState
from funcopt._core.types import traits_of
from funcopt.distributed import Zero1
from funcopt.extend import Traits, normal_like, tree_map

from ..cases import assert_same_bits, attempt, clone, leaves, random_like

both_ways = pytest.mark.parametrize("method", ["update", "update_"])
SHAPES = {"w": (3, 2), "b": (5,)}


def params_of(*lead, dtype=torch.float64):
    torch.manual_seed(0)
    return {name: torch.randn(*lead, *shape, dtype=dtype) for name, shape in SHAPES.items()}


def double(grads, own, params):
    return tree_map(lambda grad: 2 * grad, grads), own


def sign(grads, own, params):
    return tree_map(torch.sign, grads), own


def heavy_ball(grads, own, params):
    """Momentum with decay added to the gradients, which looks at all three trees."""
    news = {
        name: 0.9 * own[name] + grad + 0.1 * params[name]
        for name, grad in grads.items()
        if grad is not None
    }
    return {**grads, **news}, {**own, **news}


def add_noise(grads, own, params):
    noisy = {
        name: grads[name] + normal_like(grads[name], **own, leaf=index)
        for index, name in enumerate(sorted(grads))
    }
    return noisy, {"key": own["key"], "step": own["step"] + 1}


def zeros(params):
    return tree_map(torch.zeros_like, params)


HEAVY = Transform(SGD(lr=0.1), heavy_ball, initial=zeros, traits=Traits(elementwise=True))
NOISY = Transform(SGD(lr=0.1), add_noise, initial={"key": 7, "step": 0})


@both_ways
def test_the_inner_optimizer_is_given_what_the_function_makes_of_the_gradients(method):
    params = params_of()
    opt, inner = Transform(AdamW(lr=0.1), double), AdamW(lr=0.1)
    state, expected = opt.init(params), (clone(params), inner.init(params))
    for _ in range(3):
        grads = random_like(params)
        params, state = getattr(opt, method)(grads, state, params)
        expected = inner.update(tree_map(lambda g: 2 * g, grads), expected[1], expected[0])
        assert_same_bits((params, state.inner), expected)
        assert state.own == ()


@both_ways
def test_a_function_with_a_state_and_parameters_is_torchs_sgd_with_momentum_and_decay(method):
    params = params_of()
    torchs = {name: p.clone().requires_grad_() for name, p in params.items()}
    theirs = torch.optim.SGD(torchs.values(), lr=0.1, momentum=0.9, weight_decay=0.1)
    state = HEAVY.init(params)
    for _ in range(5):
        grads = random_like(params)
        params, state = getattr(HEAVY, method)(grads, state, params)
        for name, p in torchs.items():
            p.grad = grads[name].clone()
        theirs.step()
        for name, p in torchs.items():
            torch.testing.assert_close(params[name], p.detach(), rtol=1e-13, atol=1e-14)


@both_ways
def test_noise_is_a_function_of_the_state(method):
    params = params_of()
    state, grads = NOISY.init(params), random_like(params)
    one = NOISY.update(grads, pickle.loads(pickle.dumps(state)), params)
    torch.manual_seed(17)
    again = getattr(NOISY, method)(clone(grads), clone(state), clone(params))
    assert_same_bits(one, again)
    assert again[1].own["step"] == 1
    later = NOISY.update(grads, one[1], params)[0]
    assert not torch.equal(later["w"], one[0]["w"])


def test_each_member_of_a_vmap_has_the_noise_of_its_own_key():
    keys = torch.tensor([3.0, 4.0, 3.0], dtype=torch.float64)
    params = params_of()

    def moved(key):
        opt = Transform(SGD(lr=0.1), add_noise, initial={"key": key, "step": 0})
        return opt.update(zeros(params), opt.init(params), params)[0]["b"]

    found = vmap(moved)(keys)
    for key, own in zip(keys, found, strict=True):
        assert torch.equal(own, moved(key))
    assert torch.equal(found[0], found[2])
    assert (found[0] != found[1]).all()


@both_ways
def test_a_parameter_without_a_gradient_stays_as_it_is(method):
    params, state = params_of(), HEAVY.init(params_of())
    before = clone(params)
    params, state = getattr(HEAVY, method)({"w": params["w"], "b": None}, state, params)
    assert torch.equal(params["b"], before["b"])
    assert (params["w"] != before["w"]).all()


@both_ways
def test_leaves_at_rest_come_without_a_gradient(method):
    seen = []

    def look(grads, own, params):
        seen.append(grads)
        return grads, own

    opt = Transform(Partition({"w": SGD(), "b": Frozen()}, {"w": "w", "b": "b"}), look)
    params = {"w": torch.ones(2), "b": torch.ones(2, dtype=torch.int64)}
    getattr(opt, method)({"w": torch.ones(2)}, opt.init(params), params)
    assert seen[0]["b"] is None
    assert torch.equal(seen[0]["w"], torch.ones(2))


def test_a_vmap_is_the_updates_of_its_members():
    params, grads = params_of(4), random_like(params_of(4))
    state = vmap(HEAVY.init)(params)
    together = vmap(HEAVY.update)(grads, state, params)
    for index in range(4):

        def row(tree, index=index):
            return tree_map(lambda leaf: leaf[index], tree)

        alone = HEAVY.update(row(grads), HEAVY.init(row(params)), row(params))
        torch.testing.assert_close(row(together), alone, rtol=1e-14, atol=1e-15)
    own = Members(HEAVY)
    assert_same_bits(own.update(grads, own.init(params), params), together)


def after_two_updates(function, initial, scale, params, grads):
    def scaled(given, own, current):
        changed, own = function(given, own, current)
        return tree_map(lambda g: g * scale, changed), own

    opt = Transform(SGD(lr=0.1), scaled, initial=initial)
    state = opt.init(params)
    for _ in range(2):
        params, state = opt.update(grads, state, params)
    return sum(leaf.sum() for leaf in leaves(params)), state


def test_a_derivative_flows_through_the_function_its_state_and_what_it_closes_over():
    params, grads = params_of(), random_like(params_of())
    scale = torch.tensor(2.0, dtype=torch.float64)

    def loss(scale):
        return after_two_updates(heavy_ball, zeros, scale, params, grads)[0]

    wanted = (loss(scale + 1e-6) - loss(scale - 1e-6)) / 2e-6
    torch.testing.assert_close(grad(loss)(scale), wanted, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(
        jvp(loss, (scale,), (torch.ones_like(scale),))[1], wanted, rtol=1e-7, atol=1e-7
    )
    # Plain autograd, with parameters that require a gradient, as those of a module do.
    given = {name: p.clone().requires_grad_() for name, p in params.items()}
    own = scale.clone().requires_grad_()
    value, _ = after_two_updates(heavy_ball, zeros, own, given, grads)
    (found,) = torch.autograd.grad(value, own)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)


def test_nothing_is_recorded_for_parameters_that_require_a_gradient():
    params = {name: p.requires_grad_() for name, p in params_of().items()}
    state = HEAVY.init(params)
    for _ in range(2):
        params, state = HEAVY.update(random_like(params), state, params)
    assert all(p.requires_grad and p.grad_fn is None for p in params.values())
    assert not any(leaf.requires_grad for leaf in leaves(state))


def test_what_update_returns_shares_no_memory_with_what_it_was_given():
    def hand_out(grads, own, params):
        return grads, {"old": params, "last": grads["b"], "kept": own["kept"], "again": own["kept"]}

    def begin(params):
        kept = torch.ones(2)
        return {"old": params, "last": params["b"], "kept": kept, "again": kept}

    opt, params = Transform(SGD(lr=0.1), hand_out, initial=begin), params_of()
    state, grads = opt.init(params), random_like(params)
    before = clone((grads, state, params))
    expected = opt.update(grads, state, params)
    assert_same_bits((grads, state, params), before)
    places = [leaf.data_ptr() for leaf in leaves((grads, state, params, expected[1], expected[0]))]
    assert len(set(places)) == len(places)
    written = opt.update_(grads, state, params)
    assert_same_bits(written, expected)
    assert_same_bits(state.own["old"], before[2])  # those before the update, not after it
    assert_same_bits(grads, before[0])


@both_ways
def test_compiled_it_makes_the_same_update(method):
    params = params_of(dtype=torch.float32)
    state, grads = HEAVY.init(params), random_like(params)
    expected = HEAVY.update(grads, state, params)
    compiled = torch.compile(getattr(HEAVY, method), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(grads, state, params), expected)


WRONG = {
    "no pair": (lambda g, s, p: g, TypeError, "returned something of type dict: it must be a pair"),
    "another tree": (lambda g, s, p: ({"w": g["w"]}, s), ValueError, r"go with.*no grads\['b'\]"),
    "another shape": (
        lambda g, s, p: ({**g, "b": g["w"]}, s),
        ValueError,
        r"returned gradients that do not go with the parameters: grads\['b'\]",
    ),
    "another dtype": (
        lambda g, s, p: (tree_map(torch.Tensor.float, g), s),
        (TypeError, ValueError),
        "returned gradients that do not go with",
    ),
    "another state": (lambda g, s, p: (g, ()), ValueError, "a state of another structure"),
    "a state of another dtype": (
        lambda g, s, p: (g, {**s, "n": s["n"].float()}),
        ValueError,
        r"own\['n'\] of torch.float32 and shape \(\), where it was given one of torch.float64",
    ),
    "a state of another shape": (
        lambda g, s, p: (g, {**s, "n": torch.zeros(2, dtype=torch.float64)}),
        ValueError,
        r"own\['n'\] of torch.float64 and shape \(2,\)",
    ),
    "a state that is no tensor": (lambda g, s, p: (g, {"n": 1.0}), ValueError, "of type float"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_function_may_not_return_is_refused_and_nothing_is_written(name):
    function, error, message = WRONG[name]
    opt, params = Transform(SGD(lr=0.1), function, initial={"n": 0}), params_of()
    state, grads = opt.init(params), random_like(params)
    assert re.search(message, attempt(opt, grads, state, params))
    with pytest.raises(error, match=message):
        opt.update(grads, state, params)


def test_in_place_no_derivative_is_lost():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    opt = Transform(SGD(lr=0.1), lambda g, s, p: (tree_map(lambda x: x * scale, g), s))
    params = params_of()
    assert "history" in attempt(opt, random_like(params), opt.init(params), params)
    opt = Transform(SGD(lr=0.1), lambda g, s, p: (g, s * scale), initial=1.0)
    message = attempt(opt, random_like(params), opt.init(params), params)
    assert "state.own" in message


@both_ways
def test_what_fails_within_leaves_everything_as_it_was(method):
    opt, params = Transform(SGD(lr=0.1, momentum=0.9), heavy_ball, initial=zeros), params_of()
    state = opt.init(params)
    state = state._replace(inner=state.inner._replace(momentum_buffer={"w": params["w"]}))
    before = clone((state, params))
    with pytest.raises(ValueError, match="momentum_buffer"):
        getattr(opt, method)(random_like(params), state, params)
    assert_same_bits((state, params), before)


def test_traits_are_those_that_were_promised():
    assert not traits_of(Transform(SGD(), sign)).leafwise
    assert traits_of(Ema(HEAVY)).elementwise
    assert not traits_of(Ema(Transform(SGD(), sign, traits=Traits(leafwise=True)))).elementwise
    opt = Zero1(HEAVY, mesh=None)
    assert opt.inner == HEAVY
    with pytest.raises((TypeError, ValueError), match="Transform"):
        Zero1(Transform(SGD(), sign), mesh=None).init(params_of())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Transform(sign, SGD()), "inner="),
        (lambda: Transform(SGD(), torch.nn.Tanh), "function=.*must be a function"),
        (
            lambda: Transform(SGD(), lambda grads: grads),
            r"called as function\(grads, own, params\)",
        ),
        (lambda: Transform(SGD(), sign, initial=lambda: ()), r"called as initial\(params\)"),
        (lambda: Transform(SGD(), sign, traits=True), "traits=True: must be Traits"),
    ],
)
def test_what_it_cannot_be_made_of_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_state_that_is_no_tensor_is_refused_at_first():
    opt = Transform(SGD(), sign, initial={"name": "w"})
    with pytest.raises(TypeError, match=r"initial\['name'\] is of type str"):
        opt.init(params_of())


def test_the_state_of_another_optimizer_is_refused():
    params = params_of()
    with pytest.raises(TypeError, match="TransformState"):
        HEAVY.update(params, SGD().init(params), params)


def test_numbers_of_the_first_state_are_tensors():
    state = NOISY.init(params_of())
    assert isinstance(state, TransformState)
    assert_same_bits(
        state.own,
        {"key": torch.tensor(7.0).double(), "step": torch.tensor(0.0).double()},
    )


@both_ways
def test_a_state_with_something_else_in_it_is_refused_by_its_path(method):
    params, state = params_of(), NOISY.init(params_of())
    for wrong in (7, state.own["key"].to_sparse()):
        with pytest.raises(TypeError, match=r"^state\.own\['key'\] (is of type int|has layout)"):
            getattr(NOISY, method)(params, state._replace(own={**state.own, "key": wrong}), params)
