"""Anything in any order: the machine on optimizers and wrappers, and one that must fail."""

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from funcopt import AdamW
from funcopt.interop import from_state_dict
from funcopt.testing import LawBroken, OptimizerMachine, _machine

from ..cases import tree_map


def settings(examples):
    return hypothesis.settings(
        max_examples=examples,
        stateful_step_count=12,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


def test_every_optimizer_agrees_with_its_oracle_whatever_is_done(examples):
    run_state_machine_as_test(OptimizerMachine, settings=settings(examples(by_night=600)))


class Stale(AdamW):
    """In place, the count stands still."""

    def update_(self, grads, state, params):
        step = state.step.clone()
        result = super().update_(grads, state, params)
        state.step.copy_(step)
        return result


def test_a_defect_that_takes_two_different_rules_to_show_is_found():
    class StaleMachine(OptimizerMachine):
        optimizers = st.just(Stale(lr=0.1))

    unshrunk = hypothesis.settings(settings(40), phases=[Phase.generate])
    with pytest.raises(LawBroken, match="the model: step"):
        run_state_machine_as_test(StaleMachine, settings=unshrunk)


def test_a_checkpoint_that_loses_a_bit_is_found(monkeypatch):
    def lossy(template, entries):
        state = from_state_dict(template, entries)
        return tree_map(lambda leaf: leaf * (1 - 2**-50), state)

    monkeypatch.setattr(_machine, "from_state_dict", lossy)
    unshrunk = hypothesis.settings(settings(40), phases=[Phase.generate])
    with pytest.raises(LawBroken, match="the checkpoint: step"):
        run_state_machine_as_test(OptimizerMachine, settings=unshrunk)
