"""`check_optimizer`: what it tells apart, and what its report shows."""

import dataclasses
import re

import pytest
import torch

from funcopt import Adam, AdamW, compat
from funcopt.testing import check_optimizer, from_optax, laws, parametrize_laws, strategies

from ..cases import tree_map


@dataclasses.dataclass(frozen=True)
class Descent:
    """Plain descent: it has init and update, and nothing else."""

    lr: float = 0.1

    def init(self, params):
        return ()

    def update(self, grads, state, params):
        return tree_map(lambda p, g: p - (self.lr * g).to(p.dtype), params, grads), state


class Severed(Descent):
    """Descent whose results know nothing of their history."""

    def update(self, grads, state, params):
        moved, state = super().update(grads, state, params)
        return tree_map(torch.Tensor.detach, moved), state


class Writing(Descent):
    """Descent that writes over the parameters."""

    def update(self, grads, state, params):
        return tree_map(lambda p, g: p.sub_((self.lr * g).to(p.dtype)), params, grads), state


def test_what_an_optimizer_does_not_have_is_not_held_against_it():
    report = check_optimizer(
        Descent(), laws=[laws.inplace_is_pure, laws.kernels_agree, laws.matches_torch]
    )
    assert report.ok
    assert {verdict.status for verdict in report.verdicts} == {"not applicable"}
    assert "it has no update_" in str(report)


def test_one_that_is_not_differentiable_is_told_apart_from_one_that_fails():
    report = check_optimizer(Severed(), laws=[laws.gradient_is_finite], max_examples=5)
    assert report.ok
    assert "skipped         gradient_is_finite: it is not differentiable" in str(report)
    good = check_optimizer(Descent(), laws=[laws.gradient_is_finite], max_examples=5)
    assert good.verdicts[0].status == "holds"


def test_a_law_that_fails_is_reported_with_the_smallest_example():
    report = check_optimizer(Writing(), laws=[laws.never_mutates])
    (verdict,) = report.verdicts
    assert report.broken == ("never_mutates",)
    assert verdict.detail.startswith("never_mutates: step ")
    assert "params['p0']: got" in verdict.detail
    params, gradients = verdict.example
    assert list(params) == ["p0"]
    assert params["p0"].numel() == 1
    assert len(gradients) == 2
    assert "params = {'p0': tensor(" in str(report)


def test_the_same_seed_gives_the_same_report():
    reports = [str(check_optimizer(Writing(), laws=[laws.never_mutates], seed=7)) for _ in range(2)]
    assert reports[0] == reports[1]


def test_the_report_counts():
    report = check_optimizer(
        Writing(),
        laws=[laws.never_mutates, laws.keeps_structure, laws.kernels_agree],
        max_examples=5,
    )
    assert str(report).startswith("Writing: 1 hold, 1 broken, 1 skipped")


def test_laws_may_be_given_by_their_names():
    report = check_optimizer(Descent(), laws=["deterministic", laws.never_mutates], max_examples=5)
    assert [verdict.law for verdict in report.verdicts] == ["deterministic", "never_mutates"]
    (mark,) = parametrize_laws(Descent(), laws=["deterministic"]).mark.args[1:]
    assert mark == [laws.deterministic]


WRONG_LAWS = {
    "has 'determinism', and no law has this name: never_mutates, .*": ["determinism"],
    "has 3: a law is a function, or the name of one": [3],
    "must be a list of laws or their names": "deterministic",
    "must be a list of laws": laws.deterministic,
    "must be a list": laws,
}


@pytest.mark.parametrize("message", WRONG_LAWS)
def test_what_are_no_laws_is_refused(message):
    for check in (check_optimizer, parametrize_laws):
        with pytest.raises((TypeError, ValueError), match=f"laws.*{message}"):
            check(Descent(), laws=WRONG_LAWS[message])


def test_a_class_is_refused_in_place_of_an_optimizer():
    with pytest.raises(TypeError, match=r"is a class: give an instance, such as AdamW\(\)"):
        check_optimizer(AdamW)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(
        TypeError, match=r"has no init\(\): an optimizer has init\(\) and update\(\)"
    ):
        check_optimizer(object())
    with pytest.raises(ValueError, match="max_examples=0: must be at least 1"):
        check_optimizer(AdamW(), max_examples=0)


@parametrize_laws(Descent(), laws=[laws.never_mutates, laws.vmap_is_loop])
def test_the_pytest_form_is_a_test_for_each_law(law, request):
    assert request.node.callspec.id == f"Descent-{law.__name__}"
    assert check_optimizer(Descent(), laws=[law], max_examples=5).ok


def test_an_optimizer_that_raises_is_reported_as_an_error():
    class Broken(Descent):
        def update(self, grads, state, params):
            raise RuntimeError("out of order")

    (verdict,) = check_optimizer(Broken(), laws=[laws.deterministic]).verdicts
    assert verdict.status == "error"
    assert verdict.detail == "RuntimeError: out of order"


@dataclasses.dataclass(frozen=True)
class Momentum:
    """Descent with momentum: counts in int64, keeps the gradient before its sign is turned."""

    lr: float = 0.1
    maximize: bool = False

    def init(self, params):
        return torch.zeros((), dtype=torch.int64), tree_map(torch.zeros_like, params)

    def update(self, grads, state, params):
        tree_map(self.check, grads, params)
        count, means = state[0] + 1, tree_map(lambda m, g: 0.9 * m + 0.1 * g, state[1], grads)
        rate = (1 if self.maximize else -1) * self.lr / (1 - 0.9 ** count.double())
        return tree_map(lambda p, m: (p + rate * m).to(p.dtype), params, means), (count, means)

    def check(self, grad, param):
        if grad.shape != param.shape:
            raise ValueError(f"shape {grad.shape} for {param.shape}")


@dataclasses.dataclass(frozen=True)
class Halved:
    """A wrapper: the inner optimizer sees half the gradients."""

    inner: object

    def init(self, params):
        return self.inner.init(params)

    def update(self, grads, state, params):
        return self.inner.update(tree_map(lambda g: g / 2, grads), state, params)


@pytest.mark.by_day(1)
@pytest.mark.parametrize("opt", [Momentum(), Halved(Momentum()), Halved(AdamW(lr=0.1))], ids=repr)
def test_optimizers_that_are_right_raise_no_false_alarm(opt, examples):
    for law in laws.LAWS:
        report = check_optimizer(opt, laws=[law], max_examples=examples(law, by_night=400))
        assert report.ok, report


def test_a_law_that_fails_without_a_word_is_reported_all_the_same():
    def wordless(opt, params, gradient_sequence):
        assert not gradient_sequence

    (verdict,) = check_optimizer(Descent(), laws=[wordless]).verdicts
    assert (verdict.status, verdict.law) == ("fails", "wordless")


class Biased:
    """Adam without the corrections of its bias; no dataclass."""

    lr = 0.1

    def init(self, params):
        return tree_map(torch.zeros_like, params), tree_map(torch.zeros_like, params)

    def update(self, grads, state, params):
        means = tree_map(lambda m, g: 0.9 * m + 0.1 * g, state[0], grads)
        squares = tree_map(lambda s, g: 0.999 * s + 0.001 * g * g, state[1], grads)
        return tree_map(self.move, params, means, squares), (means, squares)

    def move(self, param, mean, square):
        return param - self.lr * mean / (square.sqrt() + 1e-8)


class BiasedOfTorch(torch.optim.Optimizer):
    """The same in the manner of torch."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            kept = self.state[param]
            kept.setdefault("mean", torch.zeros_like(param)).lerp_(param.grad, 0.1)
            square = kept.setdefault("square", torch.zeros_like(param))
            square.lerp_(param.grad.square(), 0.001)
            step = kept["mean"] / (square.sqrt() + 1e-8)
            param.sub_(self.param_groups[0]["lr"] * step)


REFERENCES = {
    "a factory": lambda params: torch.optim.Adam(params, lr=0.1),
    "one of funcopt's": Adam(lr=0.1),
    "a pair": from_optax(compat.as_optax(Adam(lr=0.1))),
}


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("opt", [Biased(), BiasedOfTorch])
def test_a_missing_bias_correction_is_found_by_a_reference(opt, reference):
    real = strategies.params(dtype=torch.float64, min_leaves=1, max_leaves=1, nodes=["dict"])
    report = check_optimizer(
        opt,
        laws=["matches_reference"],
        like=REFERENCES[reference],
        params=real,
        max_examples=10,
    )
    (verdict,) = report.verdicts
    assert verdict.status == "fails"
    # Of a gradient of 1: lr * 0.1 / sqrt(0.001), where the corrected step is lr.
    assert re.match(
        r"matches_reference \(like=\w+, torch.float64\): step \d, params\['p0'\]: got -?[\d.e-]+, "
        r"expected",
        verdict.detail,
    )


@pytest.mark.parametrize("reference", REFERENCES)
def test_what_is_like_its_reference_holds_in_every_dtype(reference):
    for opt in (Adam(lr=0.1), torch.optim.Adam):
        like = REFERENCES[reference] if opt != torch.optim.Adam else torch.optim.Adam
        report = check_optimizer(opt, laws=["matches_reference"], like=like, max_examples=10)
        assert [verdict.status for verdict in report.verdicts] == ["holds"], report


def test_a_reference_that_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"is a class: give an instance, such as AdamW\(\)"):
        check_optimizer(Adam(), like=AdamW)


def test_a_field_that_cannot_be_replaced_is_told_apart_from_one_that_there_is_not():
    few = ["zero_lr_moves_nothing", "maximize_is_minimize_negated"]
    found = check_optimizer(Biased(), laws=few).skipped
    assert found == {
        "zero_lr_moves_nothing": (
            "lr is no field of a dataclass, so that no other value can be given to it"
        ),
        "maximize_is_minimize_negated": "it has no maximize",
    }


def test_parameters_that_are_no_strategy_are_refused():
    with pytest.raises(TypeError, match=r"must be a strategy, such as strategies.params\(\)"):
        check_optimizer(AdamW(), params={"w": torch.ones(2)})
