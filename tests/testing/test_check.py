"""`check_optimizer`: what it tells apart, and what its report shows."""

import dataclasses

import pytest
import torch

from funcopt import AdamW
from funcopt.testing import check_optimizer, laws, parametrize_laws

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
    assert "not applicable  gradient_is_finite: it is not differentiable" in str(report)
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
    assert str(report).startswith("Writing: 1 laws hold, 1 broken, 1 not applicable")


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
