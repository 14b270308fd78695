"""Wrappers and states that are generic for a type checker are at run time what they were."""

import copy
import dataclasses
import io
import pickle
import types
import typing

import optree
import pytest
import torch
from torch.func import vmap
from torch.utils import _pytree

from funcopt import SGD, Clip, ClipState, Members, OptimizerLike, Partition, SGDState
from funcopt._core import pytree

from ..cases import assert_same_bits, random_like
from ..every_optimizer import OPTIMIZERS

WRAPPERS = {name: opt for name, opt in OPTIMIZERS.items() if hasattr(opt, "inner")}


def params_of():
    torch.manual_seed(0)
    return {"w": torch.randn(3, 2), "b": torch.randn(5)}


@pytest.mark.parametrize("opt", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_with_brackets_is_the_wrapper(opt):
    kind = type(opt)
    named = kind[SGD]
    assert typing.get_origin(named) is kind
    made = named(**{field.name: getattr(opt, field.name) for field in dataclasses.fields(opt)})
    assert type(made) is kind
    assert made == opt
    assert repr(made) == repr(opt)
    assert vars(made).keys() == vars(opt).keys()


@pytest.mark.parametrize("opt", WRAPPERS.values(), ids=WRAPPERS)
def test_a_state_is_a_plain_named_tuple(opt):
    state = opt.init(params_of())
    for node in (state, *([] if isinstance(opt, Members) else [type(state)(*state)])):
        kind = type(node)
        assert isinstance(node, tuple)
        assert not hasattr(node, "__dict__")
        assert optree.is_namedtuple_class(kind)
        assert _pytree.is_namedtuple_class(kind)
        assert pickle.loads(pickle.dumps(kind)) is kind
        assert kind.__new__ is not tuple.__new__
        assert len(node._asdict()) == len(node)


@pytest.mark.parametrize("opt", WRAPPERS.values(), ids=WRAPPERS)
def test_a_state_keeps_its_type_wherever_it_goes(opt):
    state = opt.init(params_of())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    leaves, structure = pytree.flatten(state)
    theirs, spec = _pytree.tree_flatten(state)
    ways = [
        pickle.loads(pickle.dumps(state)),
        copy.deepcopy(state),
        torch.load(file, weights_only=True),
        pytree.unflatten(structure, leaves),
        _pytree.tree_unflatten(theirs, spec),
    ]
    for other in ways:
        assert type(other) is type(state)
        assert_same_bits(other, state)


def test_a_state_with_brackets_makes_the_state():
    inner = SGD(momentum=0.9).init(params_of())
    state = ClipState[SGDState](torch.zeros(()), inner)
    assert type(state) is ClipState
    assert state == ClipState(state.norm, inner)
    assert typing.get_args(ClipState[SGDState]) == (SGDState,)


def test_a_state_goes_through_vmap_and_export():
    opt = Clip(SGD(lr=0.1, momentum=0.9), max_norm=1.0)
    params = {"w": torch.ones(2, 3)}
    grads = random_like(params)
    state = vmap(opt.init)(params)
    assert type(state) is ClipState
    _, state = vmap(opt.update)(grads, state, params)
    assert type(state) is ClipState

    class Step(torch.nn.Module):
        def forward(self, grads, state, params):
            return opt.update(grads, state, params)

    given = grads, opt.init(params), params
    exported = torch.export.export(Step(), given).module()(*given)
    assert type(exported[1]) is ClipState
    assert_same_bits(exported, opt.update(*given))


def test_a_partition_is_built_as_a_dataclass():
    assert isinstance(Partition.__init__, types.FunctionType)
    opt = Partition({"all": SGD()}, {"w": "all"})
    assert dataclasses.replace(opt, inner={"all": SGD(lr=0.5)}).inner["all"].lr == 0.5


def test_the_protocol_of_what_may_be_wrapped_is_for_type_checkers_alone():
    with pytest.raises(TypeError, match="runtime_checkable"):
        isinstance(SGD(), OptimizerLike)
