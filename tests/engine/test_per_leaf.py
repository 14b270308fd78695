"""Hyperparameters that are trees: each leaf moves by a number of its own."""

import pickle
import re

import pytest
import torch
from torch.func import grad, vmap

from funcopt import (
    SGD,
    Accumulate,
    Adagrad,
    Adam,
    AdamW,
    Clip,
    Compensated,
    Ema,
    Lion,
    Members,
    NAdam,
    Partition,
    Plateau,
    RAdam,
    RMSprop,
    SkipNonfinite,
    distributed,
    interop,
    members,
    replace,
)
from funcopt.schedules import Cosine

from ..cases import assert_same_bits, clone, leaves, random_like, tree_map

RATES = {"w": 0.1, "b": 0.2, "h": 0.3}
TENSORS = {name: torch.tensor(rate, dtype=torch.float64) for name, rate in RATES.items()}


def flat_params(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = {"w": (4, 3), "b": (17,), "h": ()}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def nested_params():
    torch.manual_seed(0)
    return {"body": {"w": torch.randn(4, 3), "b": [torch.randn(17)]}, "head": (torch.randn(2),)}


def by_partition(make, rates=RATES):
    """The same by an optimizer for each leaf."""
    return Partition({name: make(rate) for name, rate in rates.items()}, {n: n for n in rates})


MAKES = {
    "AdamW": lambda lr: AdamW(lr=lr, weight_decay=0.1),
    "AdamW, native": lambda lr: AdamW(lr=lr, kernel="native"),
    "AdamW, plain": lambda lr: AdamW(lr=lr, kernel="plain"),
    "AdamW, foreach": lambda lr: AdamW(lr=lr, kernel="foreach"),
    "AdamW, a count of each": lambda lr: AdamW(lr=lr, step_per_leaf=True),
    "Adam, weight decay": lambda lr: Adam(lr=0.1, weight_decay=lr, amsgrad=True),
    "Adam, betas and eps": lambda lr: Adam(betas=(lr, 0.99), eps=lr),
    "SGD": lambda lr: SGD(lr=lr, momentum=lr, dampening=0.1),
    "Lion": lambda lr: Lion(lr=lr),
    "RAdam": lambda lr: RAdam(lr=lr),
    "NAdam": lambda lr: NAdam(lr=lr),
    "Adagrad": lambda lr: Adagrad(lr=lr),
    "RMSprop": lambda lr: RMSprop(lr=lr),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("rates", [RATES, TENSORS], ids=["numbers", "tensors"])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_each_leaf_moves_as_by_an_optimizer_of_its_own_to_the_bit(make, rates, dtype):
    opt, apart = make(rates), by_partition(make)
    params = own = flat_params(dtype)
    state, own_state = opt.init(params), apart.init(params)
    for _ in range(3):
        grads = random_like(params)
        written = clone((params, state))
        params, state = opt.update(grads, state, params)
        own, own_state = apart.update(grads, own_state, own)
        assert_same_bits(params, own)
        opt.update_(grads, written[1], written[0])
        assert_same_bits(written, (params, state))


def test_what_stands_above_leaves_holds_for_all_of_them():
    params = nested_params()
    grads = random_like(params)
    top = SGD(lr={"body": 0.1, "head": 0.2})
    full = SGD(lr={"body": {"w": 0.1, "b": [0.1]}, "head": (0.2,)})
    given = grads, top.init(params), params
    assert_same_bits(top.update(*given), full.update(*given))


def test_a_tree_may_have_its_keys_in_any_order_and_lists_for_tuples_not():
    params = flat_params()
    turned = SGD(lr=dict(reversed(RATES.items())))
    given = random_like(params), turned.init(params), params
    assert_same_bits(turned.update(*given), SGD(lr=RATES).update(*given))


def test_each_element_may_have_a_number_of_its_own():
    params, own = flat_params(), torch.rand(4, 3)
    rows = torch.rand(4, 1)
    grads = random_like(params)
    for rate in (own, rows):
        opt = SGD(lr=RATES | {"w": rate}, weight_decay={"w": 0.0, "b": torch.rand(17), "h": 0.0})
        state = opt.init(params)
        moved, _ = opt.update(grads, state, params)
        torch.testing.assert_close(moved["w"], params["w"] - rate * grads["w"])
        written = clone(params)
        opt.update_(grads, state, written)
        assert_same_bits(written, moved)


def test_a_schedule_of_a_leaf_is_called_with_the_count():
    params, schedule = flat_params(), Cosine(0.1, 10)
    opt, apart = SGD(lr=RATES | {"w": schedule}), SGD(lr=schedule)
    state, own_state = opt.init(params), apart.init(params)
    for _ in range(3):
        grads = random_like(params)
        expected, own_state = apart.update(grads, own_state, params)
        params, state = opt.update(grads, state, params)
        assert_same_bits(params["w"], expected["w"])


def test_learned_rates_have_their_derivatives():
    params = flat_params(torch.float64)
    grads = random_like(params)
    rates = {"w": torch.rand(4, 3).double(), "b": torch.tensor(0.1).double(), "h": 0.1}

    def total(rates):
        opt = SGD(lr=rates)
        return sum(leaf.sum() for leaf in opt.update(grads, opt.init(params), params)[0].values())

    slopes = grad(lambda w, b: total(rates | {"w": w, "b": b}), (0, 1))(rates["w"], rates["b"])
    torch.testing.assert_close(slopes[0], -grads["w"])
    torch.testing.assert_close(slopes[1], -grads["b"].sum())
    learned = rates | {"w": rates["w"].clone().requires_grad_()}
    total(learned).backward()
    torch.testing.assert_close(learned["w"].grad, -grads["w"])


def test_members_have_trees_of_their_own():
    params = {name: torch.stack([leaf] * 3) for name, leaf in flat_params().items()}
    grads, rates = random_like(params), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)

    def step(rate, grads, params):
        opt = AdamW(lr=RATES | {"w": rate})
        return opt.update(grads, opt.init(params), params)[0]

    together = vmap(step)(rates, grads, params)
    opt = Members(AdamW(lr=RATES | {"w": rates}))
    assert_same_bits(opt.update(grads, opt.init(params), params)[0], together)
    for i in range(3):
        own_grads, own = members.unstack((grads, params))[i]
        alone = step(rates[i], own_grads, own)
        for one, other in zip(leaves(alone), leaves(together), strict=True):
            torch.testing.assert_close(one, other[i])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda opt: Clip(opt, 1.0),
        Compensated,
        lambda opt: Accumulate(opt, every=2),
        lambda opt: Ema(SkipNonfinite(opt), 0.9),
        Plateau,
    ],
    ids=["Clip", "Compensated", "Accumulate", "Ema", "Plateau"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrappers_go_around(wrap, dtype):
    params = own = flat_params(dtype)
    opt, apart = wrap(SGD(lr=RATES)), wrap(by_partition(lambda lr: SGD(lr=lr)))
    state, own_state = opt.init(params), apart.init(params)
    for _ in range(3):
        grads = random_like(params)
        written = clone((params, state))
        params, state = opt.update(grads, state, params)
        own, own_state = apart.update(grads, own_state, own)
        assert_same_bits(params, own)
        opt.update_(grads, written[1], written[0])
        assert_same_bits(written, (params, state))


def test_plateau_lowers_every_rate():
    params, grads = flat_params(), tree_map(torch.ones_like, flat_params())
    opt = Plateau(SGD(lr=RATES), factor=0.5, patience=0)
    state = opt.init(params)
    for value in (1.0, 2.0):
        before = params
        params, state = opt.update(grads, state, params, value=value)
    for name, rate in RATES.items():
        torch.testing.assert_close(before[name] - params[name], rate * 0.5 * grads[name])


def test_leaves_without_gradients_stay():
    params = flat_params()
    grads = random_like(params) | {"b": None}
    for opt in (AdamW(lr=RATES), AdamW(lr=RATES, step_per_leaf=True)):
        moved, _ = opt.update(grads, opt.init(params), params)
        assert_same_bits(moved["b"], params["b"])
        expected = AdamW(lr=0.3).update(grads, AdamW().init(params), params)[0]["h"]
        assert_same_bits(moved["h"], expected)


def test_a_tensor_that_was_written_counts_and_is_checked_again():
    rates = clone(TENSORS)
    opt, params = SGD(lr=rates), flat_params()
    grads = tree_map(torch.ones_like, params)
    opt.update(grads, opt.init(params), params)
    rates["w"].fill_(0.5)
    moved, _ = opt.update(grads, opt.init(params), params)
    assert_same_bits(moved["w"], params["w"] - 0.5)
    rates["w"].fill_(-0.5)
    with pytest.raises(ValueError, match=re.escape("lr['w']=-0.5")):
        opt.update(grads, opt.init(params), params)


def test_a_step_of_many_numbers_is_one_call_of_the_kernel(monkeypatch):
    from funcopt.optimizers import _native

    calls, step = [], _native.extension.step
    opt, params = AdamW(lr=RATES), flat_params()
    state, grads = opt.init(params), random_like(params)
    params, state = opt.update(grads, state, params)

    class Extension:
        @staticmethod
        def step(*given):
            calls.append(given)
            return step(*given)

    monkeypatch.setattr(_native, "extension", Extension)
    opt.update(grads, state, params)
    opt.update_(grads, state, params)
    assert len(calls) == 2


def test_it_compiles_and_is_a_value():
    params = flat_params()
    opt = AdamW(lr=RATES)
    given = random_like(params), opt.init(params), params
    compiled = torch.compile(opt.update, backend="eager", fullgraph=True)
    for one, other in zip(leaves(compiled(*given)), leaves(opt.update(*given)), strict=True):
        torch.testing.assert_close(one, other)
    again = pickle.loads(pickle.dumps(opt))
    assert again == opt == AdamW(lr=dict(RATES))
    assert hash(again) == hash(opt)
    assert opt != AdamW(lr=RATES | {"w": 0.2})
    assert replace(opt, "lr", 0.5).lr == 0.5


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        ({"w": 0.1}, "it has nothing for params['b'], params['h']. It must have their keys"),
        (RATES | {"x": 1.0}, "params has no leaf at lr['x']"),
        ([0.1, 0.2], "For the members of a vmap, give one tensor"),
        (RATES | {"w": torch.ones(4)}, "lr['w'] has shape (4,), and its parameter (4, 3)"),
        (RATES | {"w": {"a": 1.0}}, "params has no leaf at lr['w']['a']"),
        (RATES | {"w": lambda _: -1.0}, "lr['w']=-1.0 from its schedule"),
    ],
)
def test_what_does_not_fit_the_parameters_is_refused(lr, message):
    params = flat_params()
    opt, before = SGD(lr=lr), clone(params)
    with pytest.raises(ValueError, match=re.escape(message)):
        opt.update_(random_like(params), opt.init(params), params)
    assert_same_bits(params, before)


def test_trees_without_a_leaf_are_refused_by_init():
    for opt in (SGD(lr={"w": 0.1}), Clip(SGD(lr={"w": 0.1}), 1.0)):
        with pytest.raises(ValueError, match=r"lr is a tree.*nothing for params\['b'\]"):
            opt.init({"w": torch.ones(2), "b": torch.ones(2)})


def test_parameters_in_place_of_rates_are_told_where_to_go():
    weights = {"w": torch.tensor([0.1, -0.1])}
    with pytest.raises(ValueError, match=r"lr\['w'\]=-0.1.* Parameters are given to init\(\)"):
        SGD(weights)


def test_those_who_see_no_leaves_say_what_to_do_instead():
    opt, params = AdamW(lr=RATES), flat_params()
    with pytest.raises(ValueError, match=r"a number for each leaf.*Zero1\(\.\.\.\)"):
        distributed.Zero1(opt, mesh=None).init(params)
    with pytest.raises(ValueError, match=r"lr has a number for each leaf.*Hand over a Partition"):
        interop.to_torch(opt, opt.init(params), params)
