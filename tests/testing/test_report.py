"""What a report shows: what was skipped and why, each failure once, and where it was raised."""

import io
import sys
import time

import pytest
import torch

from funcopt import SGD, AdamW
from funcopt.testing import LawBroken, check_optimizer, laws, strategies
from funcopt.testing._progress import shown

from ..cases import leaves
from .test_check import Descent, Writing

FEW = [laws.never_mutates, laws.deterministic, laws.vmap_is_loop]


class Raising(Descent):
    """Raises for whatever has more than one element, with its size."""

    def update(self, grads, state, params):
        return self.refuse(super().update(grads, state, params))

    def refuse(self, moved):
        for leaf in leaves(moved[0]):
            if leaf.numel() > 1:
                raise RuntimeError(f"out of order at {leaf.numel()}")  # this line
        return moved


class OutOfOrder(Descent):
    def update(self, grads, state, params):
        raise RuntimeError("out of order")


def line_of(text):
    """The number of the line of this file that has this text."""
    with open(__file__) as file:
        return next(number for number, line in enumerate(file, 1) if text in line)


def test_one_exception_is_one_entry_however_many_laws_it_breaks():
    report = check_optimizer(OutOfOrder(), laws=FEW, max_examples=5)
    text = str(report)
    assert report.broken == tuple(law.__name__ for law in FEW)
    assert text.count("RuntimeError: out of order") == 1
    assert "in 3 laws: RuntimeError: out of order" in text
    assert "never_mutates, deterministic, vmap_is_loop" in text


def test_one_that_always_raises_is_not_praised_for_refusing_bad_trees():
    report = check_optimizer(OutOfOrder(), laws=["bad_trees_raise"], max_examples=5)
    assert "it raises for right gradients, too" in report.skipped["bad_trees_raise"]


def test_exceptions_of_different_places_are_entries_of_their_own():
    class Otherwise(Descent):
        def init(self, params):
            raise RuntimeError("out of order")

    class InBoth(Otherwise):
        def init(self, params):
            if any(torch._C._functorch.is_batchedtensor(leaf) for leaf in params.values()):
                return super().init(params)
            raise RuntimeError("out of order")

    dicts = strategies.params(nodes=["dict"])
    report = check_optimizer(InBoth(), laws=FEW, params=dicts, max_examples=5)
    assert str(report).count("RuntimeError: out of order") == 2


def test_an_exception_comes_with_the_line_that_raised_it():
    (verdict,) = check_optimizer(Raising(), laws=["deterministic"]).verdicts
    number = line_of("# this line")
    assert verdict.place.startswith(f"at {__file__}:{number}, in refuse: raise RuntimeError(")
    before = line_of("return self.refuse(super()")
    assert f"at {__file__}:{before}, in update" in str(verdict)
    assert isinstance(verdict.error, RuntimeError)
    assert verdict.error.__traceback__ is not None


def test_a_law_that_is_broken_keeps_what_was_raised():
    (verdict,) = check_optimizer(Writing(), laws=["never_mutates"], max_examples=5).verdicts
    assert isinstance(verdict.error, LawBroken)
    assert str(verdict.error) == verdict.detail


def test_what_is_skipped_as_asked_is_shown_with_the_reason():
    report = check_optimizer(
        Writing(),
        laws=["never_mutates", "kernels_agree"],
        skip={"never_mutates": "it writes in place on purpose"},
    )
    assert report.ok
    assert report.skipped == {
        "never_mutates": "it writes in place on purpose",
        "kernels_agree": "it has no kernel",
    }
    assert "skipped         never_mutates: as asked: it writes in place on purpose" in str(report)
    assert str(report).startswith("Writing: 2 skipped")


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ({"determinism": "why"}, "skip has 'determinism', and no law has this name"),
        ({"deterministic": " "}, r"skip\['deterministic'\]=' ': must say why"),
        ({"deterministic": None}, "must say why"),
        (["deterministic"], "must be a dict of laws and reasons"),
        ({laws.deterministic: "why"}, "a law is skipped by its name"),
    ],
)
def test_what_skips_no_law_or_says_no_reason_is_refused(skip, message):
    with pytest.raises((TypeError, ValueError), match=message):
        check_optimizer(SGD(lr=0.1), laws=["deterministic"], skip=skip)


def test_require_raises_with_the_report():
    report = check_optimizer(OutOfOrder(), laws=FEW, max_examples=5)
    with pytest.raises(AssertionError, match="in 3 laws: RuntimeError: out of order") as raised:
        report.require()
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_require_skips_a_test_of_a_law_that_does_not_apply():
    report = check_optimizer(Descent(), laws=["kernels_agree"])
    with pytest.raises(pytest.skip.Exception, match="it has no kernel"):
        report.require()
    check_optimizer(Descent(), laws=["deterministic"], max_examples=3).require()


def test_times_has_the_longest_first():
    def slow(opt, params, gradient_sequence):
        time.sleep(0.01)

    report = check_optimizer(Descent(), laws=[laws.deterministic, slow], max_examples=10)
    assert report.times().splitlines()[0].split()[1:] == ["s", "slow"]
    assert report.verdicts[1].seconds >= 0.01


def test_the_fast_profile_tries_less():
    runs = []

    def counting(opt, params, gradient_sequence):
        runs.append(1)
        assert size_of(params) < 7

    def size_of(params):
        return sum(leaf.numel() for leaf in leaves(params))

    tried = {}
    for profile in ("fast", "thorough"):
        runs.clear()
        report = check_optimizer(Descent(), laws=[counting], profile=profile, max_examples=25)
        tried[profile] = len(runs), size_of(report.verdicts[0].example[0])
    assert tried["fast"][0] <= 26 + 60 < tried["thorough"][0]
    assert tried["thorough"][1] == 7 <= tried["fast"][1]
    with pytest.raises(ValueError, match="profile='quick': must be one of fast, thorough"):
        check_optimizer(Descent(), profile="quick")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_silent_in_a_test_and_a_line_for_each_law_where_asked(capsys, monkeypatch):
    check_optimizer(AdamW(), laws=["deterministic"], max_examples=1)
    assert capsys.readouterr().err == ""
    check_optimizer(AdamW(), laws=["deterministic"], max_examples=1, progress=True)
    assert capsys.readouterr().err == "AdamW: law 1 of 1, deterministic\n"
    monkeypatch.setattr(sys, "stderr", Terminal())
    list(shown(FEW, "AdamW", None))
    assert sys.stderr.getvalue() == ""
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    assert list(shown(FEW, "AdamW", None)) == FEW
    assert "AdamW: " in sys.stderr.getvalue()


def test_progress_in_a_terminal_without_tqdm_is_a_line_for_each_law(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    list(shown(FEW, "AdamW", True))
    assert sys.stderr.getvalue().splitlines()[2] == "AdamW: law 3 of 3, vmap_is_loop"


def test_an_assertion_of_the_optimizer_is_an_error_of_its_own_and_not_a_broken_law():
    class Refusing(Descent):
        def update(self, grads, state, params):
            raise AssertionError("no such gradient")

    (verdict,) = check_optimizer(Refusing(), laws=["deterministic"], max_examples=3).verdicts
    assert (verdict.status, verdict.detail) == ("error", "AssertionError: no such gradient")
