"""Names that optimizers of torch have say what to use instead."""

import copy
import pickle

import pytest
import torch

import funcopt
from funcopt._core.torch_names import refuse_names_of_torch

OPTS = [funcopt.AdamW(), funcopt.Clip(funcopt.SGD(), 1.0), funcopt.pure(torch.optim.Adamax)]
REMEDIES = {
    "step": "opt.update(grads, state, params)",
    "zero_grad": "model.zero_grad()",
    "state_dict": "interop.to_state_dict(state)",
    "load_state_dict": "interop.from_state_dict(opt.init(params), state_dict)",
    "param_groups": "funcopt.replace(opt, 'lr', 1e-4)",
}


@pytest.mark.parametrize("name", REMEDIES)
@pytest.mark.parametrize("opt", OPTS, ids=lambda opt: type(opt).__name__)
def test_what_torch_has_is_an_error_that_says_what_to_write(opt, name):
    assert not hasattr(opt, name)
    assert name not in dir(opt)
    with pytest.raises(AttributeError) as caught:
        getattr(opt, name)
    assert str(caught.value).startswith(f"{type(opt).__name__} has no {name}, which")
    assert REMEDIES[name] in str(caught.value)


def test_schedulers_of_torch_end_in_that_error():
    with pytest.raises(AttributeError, match="a schedule is given as lr="):
        torch.optim.lr_scheduler.LambdaLR(funcopt.AdamW(), lambda epoch: 1.0)


@pytest.mark.parametrize("opt", OPTS, ids=lambda opt: type(opt).__name__)
def test_copies_and_pickles_are_as_before(opt):
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert repr(other) == repr(opt)


def test_a_class_that_has_such_a_name_keeps_it():
    class Own:
        step = "mine"

    refuse_names_of_torch(Own)
    assert Own().step == "mine"
