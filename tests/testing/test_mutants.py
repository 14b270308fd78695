"""Each planted defect is caught by the law that it was planted for, and the table is up to date."""

import pytest

from funcopt.testing import laws
from funcopt.testing._check import check_law

from ..mutants import MUTANTS, TABLE, planted, reference


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_law_catches_it(mutant):
    with planted(mutant):
        like = reference(mutant.subject)
        verdict = check_law(mutant.law, mutant.subject, shrink=False, like=like)
    assert verdict.status in ("fails", "error"), verdict


def test_there_are_many_and_every_law_has_one():
    assert len(MUTANTS) >= 25
    assert {mutant.law for mutant in MUTANTS} == set(laws.LAWS)


def test_the_table_lists_every_mutant_and_every_law():
    table = TABLE.read_text()
    assert all(f"| {mutant.name} |" in table for mutant in MUTANTS)
    assert all(f"`{law.__name__}` catches" in table for law in laws.LAWS)
    assert "catches 0" not in table
