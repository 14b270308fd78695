"""The calls of optax and TorchOpt: what is added, to which bit, and who takes it."""

import importlib.util
import io
import math
import re
import sys
import types
from typing import NamedTuple

import pytest
import torch
from torch.func import grad, vmap

import funcopt
from funcopt import SGD, Adam, AdamW, Clip, Frozen, Partition, Plateau, compat
from funcopt.schedules import Linear

from .cases import assert_close, assert_same_bits, clone, leaves, random_like, tree_map, trees
from .every_optimizer import OPTIMIZERS


def params_of(*lead, dtype=torch.float32):
    shapes = {"w": (3, 2), "b": (4,)}
    return {name: torch.randn((*lead, *shape), dtype=dtype) for name, shape in shapes.items()}


def added(params, updates):
    """What whoever knows nothing of funcopt makes of updates."""
    return tree_map(torch.add, params, updates)


@pytest.mark.parametrize("opt", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_applied_updates_are_the_new_parameters_to_the_bit(opt):
    pair, params = compat.as_optax(opt), params_of()
    state = pair.init(params)
    expected, own = clone(params), opt.init(params)
    for _ in range(3):
        grads = random_like(params)
        expected, own = opt.update(grads, own, expected)
        updates, state = pair.update(grads, state, params)
        assert_close(added(params, updates), expected, rtol=1e-6)
        params = compat.apply_updates(params, updates)
        assert_same_bits((params, state), (expected, own))


@pytest.mark.parametrize("name", trees())
def test_updates_are_trees_like_the_parameters(name):
    params = trees()[name]
    pair = compat.as_optax(SGD(lr=0.5))
    updates, _ = pair.update(params, pair.init(params), params)
    assert_same_bits(updates, tree_map(lambda p: -0.5 * p, params))
    assert_same_bits(compat.apply_updates(params, updates), tree_map(lambda p: p - 0.5 * p, params))


def test_updates_are_a_tuple_where_the_gradients_are():
    """As where a library keeps parameters in a list, and gets gradients by several arguments."""
    pair, params = compat.as_torchopt(SGD(lr=0.5)), [{"a": torch.ones(2)}, torch.ones(3)]
    grads = {"a": torch.ones(2)}, torch.ones(3)
    updates, _ = pair.update(grads, pair.init(params), params=params)
    assert_same_bits(updates, ({"a": torch.full((2,), -0.5)}, torch.full((3,), -0.5)))
    assert isinstance(compat.apply_updates(params, updates), list)


def test_updates_are_complete_where_gradients_of_leaves_at_rest_are_missing():
    opt = Partition({"on": SGD(lr=0.5), "off": Frozen()}, {"w": "on", "b": "off"})
    pair, params = compat.as_optax(opt), {"w": torch.ones(2), "b": torch.ones(3)}
    updates, _ = pair.update({"w": torch.ones(2)}, pair.init(params), params)
    assert_same_bits(updates, {"w": torch.full((2,), -0.5), "b": torch.zeros(3)})


class Told:
    """An optimizer whose new parameters are told."""

    def __init__(self, new):
        self.new = new

    def init(self, params):
        return ()

    def update(self, grads, state, params):
        return self.new, state

    update_ = update


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_has_every_bit_of_a_parameter_that_changes_by_a_factor_of_two_at_most(dtype):
    old = (torch.randn(100_000, dtype=torch.float64) * 10.0).to(dtype)
    new = (old.double() * 2 ** torch.empty(100_000, dtype=torch.float64).uniform_(-1, 1)).to(dtype)
    ratio = new.double() / old.double()
    kept = (ratio >= 0.5) & (ratio <= 2.0) & (old.abs() > torch.finfo(dtype).smallest_normal * 4)
    assert kept.double().mean() > 0.99
    updates, _ = compat.as_optax(Told(new)).update(old, (), old)
    assert torch.equal((old + updates)[kept], new[kept])


@pytest.mark.parametrize("dtype", DTYPES)
def test_elsewhere_the_sum_is_off_by_two_roundings_at_most(dtype):
    old, new = (torch.randn(100_000).to(dtype) for _ in range(2))
    updates, _ = compat.as_optax(Told(new)).update(old, (), old)
    wide_old, wide_new = old.double(), new.double()
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    bound = eps / 2 * ((wide_new - wide_old).abs() + wide_new.abs()) * (1 + eps) + tiny * eps
    assert ((old + updates).double() - wide_new).abs().le(bound).all()
    assert dtype is torch.float64 or not torch.equal(old + updates, new)
    assert torch.equal(compat.apply_updates(old, updates), new)


def test_what_does_not_change_keeps_its_bits_whoever_adds():
    old = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1.5])
    updates, _ = compat.as_optax(Told(old.clone())).update(old, (), old)
    found = old + updates
    assert torch.equal(found.view(torch.int32), old.view(torch.int32))


def test_a_leaf_without_a_gradient_and_one_at_rest_get_an_update_of_zero():
    opt = Partition({"on": SGD(lr=0.5), "off": Frozen()}, {"w": "on", "b": "on", "n": "off"})
    pair = compat.as_optax(opt)
    params = {"w": torch.ones(2), "b": torch.tensor([-0.0, 1.0]), "n": torch.tensor([3, 4])}
    grads = {"w": torch.ones(2), "b": None, "n": None}
    updates, _ = pair.update(grads, pair.init(params), params)
    for apply in (added, compat.apply_updates):
        found = apply(params, updates)
        assert torch.equal(found["w"], torch.full((2,), 0.5))
        assert torch.equal(torch.signbit(found["b"]), torch.signbit(params["b"]))
        assert_same_bits({**found, "w": params["w"]}, params)


@pytest.mark.parametrize(
    "change", ["scaled", "written", "by data", "by numpy", "of others", "parameter written"]
)
def test_what_was_changed_since_is_added(change):
    old, new = torch.tensor([1.0, 3.0]), torch.tensor([1e-9, 3.5])
    updates, _ = compat.as_optax(Told(new)).update(old, (), old)
    if change == "scaled":
        updates = updates * 0.5
    elif change == "written":
        updates.mul_(0.5)
    elif change == "by data":  # which no count of versions sees
        updates.data.mul_(0.5)
    elif change == "by numpy":
        updates.numpy()[:] *= 0.5
    elif change == "of others":
        old = old.clone()
    else:
        old.add_(1.0)
    assert torch.equal(compat.apply_updates(old, updates), old + updates)


def test_a_parameter_written_by_data_is_what_is_added_to():
    old, new = torch.tensor([1.0, 3.0]), torch.tensor([1e-9, 3.5])
    updates, _ = compat.as_optax(Told(new)).update(old, (), old)
    old.data.mul_(2.0)
    assert torch.equal(compat.apply_updates(old, updates), old + updates)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_updates_may_be_applied_twice_to_tensors_of_their_own(dtype):
    old, new = torch.tensor([1.0, 3.0], dtype=dtype), torch.tensor([1e-9, 3.5], dtype=dtype)
    updates, _ = compat.as_optax(Told(new)).update(old, (), old)
    compat.apply_updates(old, updates).zero_()
    assert_same_bits(compat.apply_updates(old, updates), torch.tensor([1e-9, 3.5], dtype=dtype))


def test_the_dtype_of_a_parameter_stays():
    found = compat.apply_updates(torch.ones(2, dtype=torch.bfloat16), torch.ones(2))
    assert_same_bits(found, torch.full((2,), 2.0, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("params", "updates", "error", "message"),
    [
        (torch.ones(4), torch.ones(3, 4), ValueError, "updates['w']: shape (3, 4), the parameter"),
        (torch.ones(4), 1.0, TypeError, "updates['w'] is of type float"),
        (1.0, torch.ones(4), TypeError, "params['w'] is of type float"),
    ],
    ids=["broadcast", "no update", "no parameter"],
)
def test_what_cannot_be_added_is_refused(params, updates, error, message):
    with pytest.raises(error, match=re.escape(message)):
        compat.apply_updates({"w": params}, {"w": updates})


def test_updates_are_saved_without_what_they_lead_to():
    params = torch.ones(2)
    pair, file = compat.as_optax(SGD(lr=0.5)), io.BytesIO()
    updates, _ = pair.update(params, pair.init(params), params)
    torch.save(updates, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), updates)


def test_none_leaves_a_parameter_as_it_is_and_keys_may_be_in_another_order():
    params = {"a": torch.ones(2), "b": torch.zeros(2)}
    found = compat.apply_updates(params, {"b": torch.ones(2), "a": None})
    assert list(found) == ["a", "b"]
    assert found["a"] is params["a"]
    assert torch.equal(found["b"], torch.ones(2))
    with pytest.raises(ValueError, match=r"updates does not have the structure of params.*\['b'\]"):
        compat.apply_updates(params, {"a": torch.ones(2)})


def test_parameters_that_require_a_gradient_gather_no_history():
    params = {name: p.requires_grad_() for name, p in params_of().items()}
    pair = compat.as_optax(AdamW(lr=0.1))
    updates, _ = pair.update(random_like(params), pair.init(params), params)
    assert not any(u.requires_grad for u in updates.values())
    for given in (updates, clone(updates)):
        found = compat.apply_updates(params, given)
        assert all(p.requires_grad and p.grad_fn is None for p in found.values())


@pytest.mark.parametrize("apply", [added, compat.apply_updates])
def test_derivatives_are_those_of_the_optimizer_itself(apply):
    params, grads = params_of(dtype=torch.float64), random_like(params_of(dtype=torch.float64))
    opt = Adam(lr=0.1)
    state = opt.init(params)

    def total(tree):
        return sum(leaf.square().sum() for leaf in leaves(tree))

    def direct(p, g):
        return total(opt.update(g, state, p)[0])

    def by_updates(p, g):
        updates, _ = compat.as_optax(opt).update(g, state, p)
        return total(apply(p, updates))

    wanted = grad(direct, (0, 1))(params, grads)
    assert_close(grad(by_updates, (0, 1))(params, grads), wanted, rtol=1e-12)
    own = [tree_map(lambda leaf: leaf.clone().requires_grad_(), t) for t in (params, grads)]
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    moved = by_updates(own[0], tree_map(lambda g: g * factor, own[1]))
    found = torch.autograd.grad(moved, [*own[0].values(), *own[1].values()])
    assert_close(list(found), [*wanted[0].values(), *wanted[1].values()], rtol=1e-12)


def test_members_of_a_vmap_move_by_their_own_optimizers():
    params, rates = params_of(3), torch.tensor([0.1, 0.2, 0.3])

    def step(lr, grads, params):
        pair = compat.as_optax(SGD(lr=lr))
        updates, _ = pair.update(grads, pair.init(params), params)
        return compat.apply_updates(params, updates)

    grads = random_like(params)
    found = vmap(step)(rates, grads, params)
    for i in range(3):
        own = tree_map(lambda leaf, i=i: leaf[i], (rates, grads, params))
        assert_close(tree_map(lambda leaf, i=i: leaf[i], found), step(*own), 1e-6, 1e-7)


def test_it_compiles_to_one_graph():
    pair, params = compat.as_optax(Clip(AdamW(lr=0.1), 1.0)), params_of()
    state, grads = pair.init(params), random_like(params)

    def step(grads, state, params):
        updates, state = pair.update(grads, state, params)
        return compat.apply_updates(params, updates), state

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(grads, state, params), step(grads, state, params))


def test_in_inference_mode_updates_are_added():
    params = torch.ones(2)
    pair = compat.as_optax(SGD(lr=0.5))
    with torch.inference_mode():
        updates, _ = pair.update(torch.ones(2), pair.init(params), params)
        assert torch.equal(compat.apply_updates(params, updates), torch.full((2,), 0.5))


def test_parameters_may_be_given_by_name_and_must_be_given():
    pair, params = compat.as_torchopt(SGD(lr=Linear(0.5, 1.0, 2))), (torch.ones(2),)
    state = pair.init(params)
    for inplace in (True, False):
        before = clone((params, state))
        updates, _ = pair.update(params, state, params=params, inplace=inplace)
        assert torch.equal(updates[0], torch.full((2,), -0.5))
        assert_same_bits((params, state), before)
    with pytest.raises(TypeError, match="no params: SGD needs the parameters"):
        pair.update(params, state)


def test_what_an_update_may_be_told_is_handed_on():
    opt, params = Plateau(SGD(lr=1.0), factor=0.5, patience=0), torch.zeros(1)
    pair = compat.as_optax(opt)
    _, state = pair.update(torch.ones(1), pair.init(params), params, value=1.0)
    updates, state = pair.update(torch.ones(1), state, params, value=2.0)
    assert updates == -0.5
    updates, _ = pair.update(torch.ones(1), state, params, active=False)
    assert updates == 0
    with pytest.raises(TypeError, match="was given grad: besides"):
        pair.update(torch.ones(1), state, params, grad=torch.ones(1))


def test_what_is_no_optimizer_is_refused():
    for make in (compat.as_optax, compat.as_torchopt):
        with pytest.raises(TypeError, match=r"opt=<class.*must be an optimizer"):
            make(SGD)


def test_it_is_of_torchopts_own_class_if_that_is_installed(monkeypatch):
    class Theirs(NamedTuple):
        init: object
        update: object

    monkeypatch.setitem(sys.modules, "torchopt", types.ModuleType("torchopt"))
    monkeypatch.setitem(sys.modules, "torchopt.base", types.ModuleType("torchopt.base"))
    sys.modules["torchopt.base"].GradientTransformation = Theirs
    assert type(compat.as_torchopt(SGD())) is Theirs
    monkeypatch.setitem(sys.modules, "torchopt.base", None)
    assert type(compat.as_torchopt(SGD())) is compat.GradientTransformation


def installed(name):
    return pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"{name} is not installed"
    )


TABLE, NOT_HERE = compat.__doc__.partition("**What stands for")[2].split("**What is not here.**")
ROWS = re.findall(r"^\| (.*) \| (.*) \|$", TABLE, re.MULTILINE)[1:]
# What the table names besides: arguments, and what is of torch.
ARGUMENTS = {
    "weight_decay",
    "lr",
    "momentum",
    "dampening",
    "nesterov",
    "amsgrad",
    "active",
    "value",
}


def names_in(text):
    return set(re.findall(r"`([\w.]+)[=(`]", text))


def test_what_stands_for_something_of_optax_is_there():
    assert len(ROWS) > 25
    for _, ours in ROWS:
        for name in names_in(ours) - ARGUMENTS:
            assert hasattr(funcopt, name), name


def test_what_is_named_of_optax_is_there_and_every_transform_of_it_is_named():
    optax = pytest.importorskip("optax", reason="optax comes with the extra `benchmark` alone")
    named = names_in(NOT_HERE) - {"extend", "scale_by", "vmap", "grad"}
    named = named.union(*(names_in(theirs) for theirs, _ in ROWS))
    for name in named:
        base, _, own = name.rpartition(".")
        assert hasattr(getattr(optax, base) if base else optax, own), name
    for prefix, module in (("", optax), ("contrib.", optax.contrib)):
        for name, function in vars(module).items():
            returns = str(getattr(function, "__annotations__", {}).get("return"))
            own = not name.startswith(("_", "scale_by_"))
            if own and name.islower() and "GradientTransformation" in returns:
                assert prefix + name in named, name


def loss(params, batch):
    x, y = batch
    error = (x @ params["w"] + params["b"] - y).square().mean()
    return error, torch.zeros(())


@installed("torchopt")
@pytest.mark.parametrize("kind", ["FuncOptimizer", "Optimizer", "MetaOptimizer"])
def test_torchopts_classes_take_one(kind):
    import torchopt

    x, y = torch.randn(64, 3), torch.randn(64, 1)
    model = torch.nn.Linear(3, 1)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = AdamW(lr=0.1)
    state, pair = opt.init(expected), compat.as_torchopt(opt)
    params = tuple(model.parameters())
    theirs = {
        "FuncOptimizer": lambda: torchopt.FuncOptimizer(pair),
        "Optimizer": lambda: torchopt.Optimizer(params, pair),
        "MetaOptimizer": lambda: torchopt.MetaOptimizer(model, pair),
    }[kind]()
    for _ in range(5):
        slopes = grad(lambda p: (torch.func.functional_call(model, p, x) - y).square().mean())(
            expected
        )
        expected, state = opt.update(slopes, state, expected)
        if kind == "FuncOptimizer":
            named = dict(zip(("weight", "bias"), params, strict=True))
            value = (torch.func.functional_call(model, named, x) - y).square().mean()
            params = theirs.step(value, params)
            continue
        value = (model(x) - y).square().mean()
        if kind == "MetaOptimizer":
            theirs.step(value)
            params = model.weight, model.bias
        else:
            theirs.zero_grad()
            value.backward()
            theirs.step()
    assert_close(list(params), [expected["weight"], expected["bias"]], rtol=1e-5, atol=1e-6)


@installed("posteriors")
def test_posteriors_takes_one():
    import posteriors

    x = torch.randn(64, 3)
    batch = x, x.sum(1, keepdim=True)
    params = {"w": torch.zeros(3, 1), "b": torch.zeros(1)}
    opt = Adam(lr=0.1)
    transform = posteriors.torchopt.build(loss, compat.as_torchopt(opt))
    state = transform.init(params)
    expected, own = params, opt.init(params)
    for _ in range(50):
        state, _ = transform.update(state, batch)
        slopes = grad(lambda p: loss(p, batch)[0])(expected)
        expected, own = opt.update(slopes, own, expected)
    found = {name: state.params[name] for name in expected}
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert state.loss < 0.1
