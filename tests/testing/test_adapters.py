"""What `check_optimizer` takes besides an optimizer with `init` and `update`."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st

import funcopt
from funcopt import compat
from funcopt.testing import check_optimizer, from_optax, laws, oracles
from funcopt.testing._adapters import subject_of

FEW = [laws.never_mutates, laws.inplace_is_pure, laws.vmap_is_loop, laws.goes_downhill]
PARAMS = {"w": torch.tensor([1.0, -2.0])}
GRADS = {"w": torch.tensor([0.5, 0.25])}


def moved(opt):
    return opt.update(GRADS, opt.init(PARAMS), PARAMS)[0]["w"]


def torchs(make):
    parameter = torch.nn.Parameter(PARAMS["w"].clone())
    parameter.grad = GRADS["w"].clone()
    make([parameter]).step()
    return parameter.detach()


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.SGD, torch.optim.Adafactor])
def test_a_class_of_torch_is_tested_with_its_defaults(kind):
    assert torch.equal(moved(subject_of(kind)), torchs(kind))
    real = funcopt.testing.strategies.params(dtype=torch.float64, shape=(2, 3))
    report = check_optimizer(kind, laws=FEW, params=real, max_examples=3)
    assert report.optimizer == kind.__name__
    assert [verdict.status for verdict in report.verdicts] == ["holds"] * len(FEW)


class Told(torch.optim.SGD):
    """An optimizer that keeps an option outside of its parameter groups."""

    def __init__(self, params, lr=0.1, factor=1.0):
        super().__init__(params, lr=lr)
        self.factor = factor

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(group["lr"] * self.factor * parameter.grad)


FACTORIES = {
    "options": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9, nesterov=True),
    "options of the group": lambda params: torch.optim.Adam([{"params": params, "lr": 0.25}]),
    "ascending": lambda params: torch.optim.AdamW(params, lr=0.5, maximize=True),
    "an option outside of the group": lambda params: Told(params, factor=3.0),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_what_a_factory_makes_is_tested_with_all_that_it_was_told(name):
    opt = subject_of(FACTORIES[name])
    assert torch.equal(moved(opt), torchs(FACTORIES[name]))
    assert check_optimizer(opt, laws=FEW, max_examples=3).ok


def test_the_learning_rate_and_the_direction_are_known_to_the_laws():
    known = ["zero_lr_moves_nothing", "per_member_hyperparameters", "maximize_is_minimize_negated"]
    real = funcopt.testing.strategies.params(dtype=torch.float64)
    for factory in FACTORIES.values():
        report = check_optimizer(factory, laws=known[:2], params=real, max_examples=3)
        assert [verdict.status for verdict in report.verdicts] == ["holds"] * 2, report
    report = check_optimizer(FACTORIES["ascending"], laws=known, params=real, max_examples=3)
    assert not report.skipped


def test_one_that_ignores_its_learning_rate_is_found():
    class Deaf(Told):
        def step(self, closure=None):
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.sub_(0.1 * parameter.grad)

    report = check_optimizer(Deaf, laws=["zero_lr_moves_nothing"], max_examples=5)
    assert report.broken == ("zero_lr_moves_nothing",)


def of_told(opt, grads, state, params):
    """Descent by hand, with the factor that the class has by default."""
    return {name: params[name] - opt.lr * grads[name] for name in params}, state


def test_an_oracle_is_found_by_the_class_that_is_run(monkeypatch):
    monkeypatch.setattr(oracles, "_ORACLES", dict(oracles._ORACLES))
    dicts = funcopt.testing.strategies.params(nodes=["dict"], max_leaves=2, dtype=torch.float32)

    def status(opt):
        (found,) = check_optimizer(
            opt, laws=["matches_oracle"], params=dicts, max_examples=5
        ).verdicts
        return found.status

    subjects = [Told, lambda params: Told(params, lr=0.25), funcopt.pure(Told, lr=0.5)]
    assert {status(opt) for opt in subjects} == {"not applicable"}
    oracles.register(Told, of_told)
    assert [status(opt) for opt in subjects] == ["holds"] * 3
    assert status(FACTORIES["an option outside of the group"]) == "fails"


def test_an_oracle_of_such_a_class_is_given_the_state_by_names():
    given = []

    class Counted(torch.optim.SGD):
        def step(self, closure=None):
            for param in self.param_groups[0]["params"]:
                kept = self.state[param]
                kept["step"] = kept.get("step", 0) + 1
                kept.setdefault("mean", torch.zeros_like(param))

    def oracle(opt, grads, state, params):
        given.append((opt, state))
        return params, state

    oracles.register(Counted, oracle)
    try:
        check_optimizer(Counted, laws=["matches_oracle"], params=st.just({"w": torch.ones(2)}))
    finally:
        del oracles._ORACLES[Counted]
    opt, state = given[0]
    assert opt.lr == 1e-3
    assert opt.hyperparameters == {}
    assert (list(state.slots), list(state.numbers)) == (["mean"], ["step"])
    assert state.slots["mean"]["w"].dtype is torch.float64
    assert state.numbers["step"]["w"].shape == ()


def test_what_a_class_cannot_be_asked_is_skipped_with_the_reason():
    report = check_optimizer(torch.optim.Adafactor, laws=["gradient_is_finite", "compiles_once"])
    assert "has no differentiable=" in report.skipped["gradient_is_finite"]
    assert "outside of the graph" in report.skipped["compiles_once"]


class Pair(NamedTuple):
    init: object
    update: object


def descent(lr=0.5):
    def update(grads, state, params=None):
        return {name: -lr * grad for name, grad in grads.items()}, state

    return Pair(lambda params: (), update)


def test_the_updates_of_a_pair_are_added_to_the_parameters():
    for pair in (descent(), tuple(descent()), compat.as_optax(funcopt.SGD(lr=0.5))):
        assert torch.equal(moved(from_optax(pair)), torch.tensor([0.75, -2.125]))
    few = [laws.never_mutates, laws.goes_downhill, laws.compiles_once]
    pair = compat.as_optax(funcopt.SGD(lr=0.5))
    report = check_optimizer(from_optax(pair), laws=few, max_examples=1)
    assert [verdict.status for verdict in report.verdicts] == ["holds"] * 3


def test_updates_that_lead_the_wrong_way_are_found():
    dicts = funcopt.testing.strategies.params(nodes=["dict"], min_leaves=1, max_leaves=1)
    report = check_optimizer(from_optax(descent(-0.5)), laws=["goes_downhill"], params=dicts)
    assert report.broken == ("goes_downhill",)


def test_options_are_given_to_each_update():
    def update(grads, state, params=None, *, inplace=True):
        assert not inplace
        return grads, state

    assert torch.equal(
        moved(from_optax(Pair(lambda params: (), update), inplace=False)), PARAMS["w"] + GRADS["w"]
    )


WRONG = {
    r"is a pair of init and update, .* give testing.from_optax\(...\) of it": descent(),
    r"give the class, SGD, or how to make one, such as lambda params: SGD": torch.optim.SGD(
        [torch.nn.Parameter(torch.ones(1))], lr=0.1
    ),
    r"it must make a torch.optim.Optimizer, such as lambda": lambda params: funcopt.SGD(lr=0.1),
    r"called with a list of parameters .* and raised ZeroDivisionError": lambda params: 1 / 0,
    r"made 2 parameter groups: it must make one": lambda params: torch.optim.SGD(
        [{"params": params}, {"params": [torch.nn.Parameter(torch.ones(1))]}], lr=0.1
    ),
    r"needs a closure": torch.optim.LBFGS,
    r"has no init\(\): an optimizer has init\(\) and update\(\)": 3,
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_tested_is_refused_with_the_remedy(message):
    with pytest.raises(TypeError, match=message):
        check_optimizer(WRONG[message])


def test_a_pair_that_is_none_is_refused():
    for wrong in (3, (1, 2), funcopt.SGD):
        with pytest.raises(TypeError, match=r"must have init\(\) and update\(\)"):
            from_optax(wrong)
    report = check_optimizer(
        from_optax(Pair(lambda params: (), lambda grads, state, params: grads)),
        laws=["deterministic"],
        max_examples=3,
    )
    assert "it must return (updates, state)" in report.verdicts[0].detail
