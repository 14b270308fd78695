"""The class in torch's table, and what stood there before back in it."""

import pytest
import torch
from torch.distributed.optim import as_functional_optim, utils

from funcopt import torchscript
from funcopt.torchscript import FunctionalAdamW

from .trainers import gradients_of, parameters, step_torch

ADAMW = torch.optim.AdamW


@pytest.fixture
def table():
    """Give the table, and whatever a test does to it, leave it as it was."""
    before = dict(utils.functional_optim_map)
    yield utils.functional_optim_map
    torchscript.unregister()
    assert utils.functional_optim_map == before


def test_register_puts_the_class_in_and_unregister_what_was_there_back(table):
    found = table[ADAMW]
    torchscript.register()
    assert table[ADAMW] is FunctionalAdamW
    torchscript.unregister()
    assert table[ADAMW] is found


def test_both_may_be_called_again(table):
    found = table[ADAMW]
    torchscript.unregister()
    assert table[ADAMW] is found
    torchscript.register()
    torchscript.register()
    torchscript.unregister()
    assert table[ADAMW] is found
    torchscript.unregister()
    assert table[ADAMW] is found


def test_a_with_undoes_what_it_did_and_no_more(table):
    found = table[ADAMW]
    with torchscript.register():
        with torchscript.register():
            pass
        assert table[ADAMW] is FunctionalAdamW
    assert table[ADAMW] is found


def test_another_class_is_put_back_too(table):
    found = table[ADAMW]
    other = type("Other", (), {})
    table[ADAMW] = other
    with torchscript.register():
        assert table[ADAMW] is FunctionalAdamW
    assert table[ADAMW] is other
    table[ADAMW] = found


def test_a_with_leaves_what_a_later_call_did(table):
    with torchscript.register():
        torchscript.unregister()
        torchscript.register()
    assert table[ADAMW] is FunctionalAdamW


def test_a_class_that_came_later_stays(table):
    found = table[ADAMW]
    other = type("Other", (), {})
    with torchscript.register():
        table[ADAMW] = other
    assert table[ADAMW] is other
    table[ADAMW] = found


def test_no_entry_is_put_back_as_none(table):
    found = table.pop(ADAMW)
    with torchscript.register():
        assert table[ADAMW] is FunctionalAdamW
    assert ADAMW not in table
    table[ADAMW] = found


def test_every_name_that_torch_has_for_the_table_is_one_object():
    from torch.distributed.optim import optimizer, zero_redundancy_optimizer

    for module in (optimizer, zero_redundancy_optimizer):
        assert module.functional_optim_map is utils.functional_optim_map


def test_as_functional_optim_gives_the_class_and_its_steps_are_those_of_torch(table):
    with torchscript.register():
        opt = as_functional_optim(ADAMW, 0.1, amsgrad=True)
    assert type(opt) is FunctionalAdamW
    params = parameters()
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    reference = ADAMW(copies, 0.1, amsgrad=True, foreach=False)
    for grads in gradients_of(params, 20):
        for param, grad in zip(params, grads, strict=True):
            opt.step_param(param, grad)
        step_torch(reference, copies, grads)
    assert all(map(torch.equal, params, copies))
