"""Among everything one may do with an optimizer: hand it to torch.optim, step there, come back."""

import dataclasses

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from funcopt._core import pytree
from funcopt.interop import from_torch, to_torch
from funcopt.testing import OptimizerMachine, strategies

from ..cases import assert_same_bits, leaves
from ..testing.test_machine import settings
from .runs import torch_optimizer, torch_params, torch_step


class HandOverMachine(OptimizerMachine):
    """Runs that go to and fro between funcopt and torch.optim."""

    optimizers = strategies.adamws(moments="auto", rounding="nearest")

    def handed_over(self):
        """A torch.optim.AdamW that goes on from here; its fused kernel takes nothing complex."""
        opt = self.opt
        if opt.kernel == "fused" and any(leaf.is_complex() for leaf in leaves(self.params)):
            opt = dataclasses.replace(opt, kernel="plain")
        theirs = torch_optimizer(self.params)
        theirs.load_state_dict(to_torch(opt, self.state, self.params))
        return theirs

    def taken_over(self, theirs):
        return from_torch(theirs, self.params, step_per_leaf=self.opt.step_per_leaf)

    @rule()
    def hand_over_and_back(self):
        opt, state = self.taken_over(self.handed_over())
        # Torch has neither these kernels nor a seed, which nothing is rounded by here.
        assert dataclasses.replace(opt, kernel=self.opt.kernel, seed=self.opt.seed) == self.opt
        assert_same_bits(state, self.state)
        self.opt, self.state = opt, state

    @rule(data=st.data())
    def step_in_torch(self, data):
        theirs = self.handed_over()
        torch_step(theirs, self.gradients(data, none=self.opt.step_per_leaf))
        leaves_there, structure = torch_params(theirs), pytree.flatten(self.params)[1]
        moved = [leaves_there[name].detach().clone() for name in pytree.names(structure)]
        self.opt, self.state = self.taken_over(theirs)
        self.params = pytree.unflatten(structure, moved)


@pytest.mark.filterwarnings("ignore:the source counts")  # all gradients drawn may be 0
def test_a_run_goes_to_torch_and_back_whatever_else_is_done(examples):
    run_state_machine_as_test(HandOverMachine, settings=settings(examples(by_night=400)))
