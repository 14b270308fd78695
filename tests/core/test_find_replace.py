"""Reading and editing states and optimizers, however they are nested."""

import dataclasses
import functools
import re
from collections import OrderedDict, defaultdict
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch.func import grad, vmap

import funcopt
from funcopt import (
    Accumulate,
    AccumulateState,
    AdamW,
    AdamWState,
    Clip,
    ClipAdaptive,
    ClipState,
    ClipValue,
    Frozen,
    Partition,
    Transform,
    find,
    interop,
    replace,
)
from funcopt._engine.registration import register_optimizer
from funcopt.schedules import Cosine, Linear

from ..cases import Point, assert_same_bits, clone, fade, leaves, tree_map

LABELS = ["decay", "no_decay", "rest"]


def nested(lr=0.1):
    """Four wrappers deep, with two groups that move and one that does not."""
    groups = {
        "decay": ClipValue(AdamW(lr=lr), 1.0),
        "no_decay": AdamW(lr=0.2, weight_decay=0.0),
        "rest": Frozen(),
    }
    return Accumulate(Clip(Partition(groups, LABELS), max_norm=1.0), every=1)


def moved(opt, params, steps=1):
    state = opt.init(params)
    for _ in range(steps):
        params, state = opt.update(params, state, params)
    return state


@pytest.fixture
def params():
    return [torch.randn(3), torch.randn(2), torch.randn(1)]


def words(error):
    return str(error.value.args[0])


# Reading.


def test_keys_are_those_of_checkpoints_without_the_root(params):
    state = moved(nested(), params)
    found = find(state, torch.Tensor)
    saved = interop.to_state_dict(state)
    del saved["funcopt.format"]
    assert {f"state.{path}" for path in found} == saved.keys()
    for path, tensor in found.items():
        assert eval(f"state.{path}", {"state": state}) is tensor


def test_fields_and_classes_are_found_wherever_they_are(params):
    opt = nested()
    state = moved(opt, params)
    groups = state.inner.inner.inner
    assert find(state, "exp_avg") == {
        "inner.inner.inner['decay'].inner.exp_avg": groups["decay"].inner.exp_avg,
        "inner.inner.inner['no_decay'].exp_avg": groups["no_decay"].exp_avg,
    }
    assert find(state, ClipState) == {"inner": state.inner}
    assert list(find(state, AdamWState)) == [
        "inner.inner.inner['decay'].inner",
        "inner.inner.inner['no_decay']",
    ]
    assert find(opt, Accumulate) == {"": opt}
    assert find(opt, "max_norm") == {"inner.max_norm": 1.0}
    assert find(opt, "lr") == {
        "inner.inner.inner['decay'].inner.lr": 0.1,
        "inner.inner.inner['no_decay'].lr": 0.2,
    }
    assert list(find(state, "mini_step")) == ["mini_step"]


@pytest.mark.parametrize(
    "within", ["decay", "inner.inner.inner['decay']", "inner.inner.inner['decay'].inner"]
)
def test_a_path_or_a_label_says_where_to_look(params, within):
    paths = ["inner.inner.inner['decay'].inner.step"]
    assert list(find(moved(nested(), params), "step", within=within)) == paths


def test_a_path_tells_things_of_one_name_apart():
    opt = Clip(Clip(AdamW(), 1.0), 2.0)
    state = opt.init(torch.ones(2))
    assert list(find(state, "norm")) == ["norm", "inner.norm"]
    assert list(find(state, "norm", within="inner")) == ["inner.norm"]
    assert find(opt, "max_norm", within="inner") == {"inner.max_norm": 1.0}
    assert replace(opt, "max_norm", 3.0, "inner") == Clip(Clip(AdamW(), 3.0), 2.0)
    # A step is a whole one: "inn" is no path, and a name no label.
    for within in ("inn", "norm.", "AdamW"):
        with pytest.raises(KeyError, match=r"It is at norm, inner\.norm"):
            find(state, "norm", within=within)


def test_a_schedule_is_read_at_the_count_of_its_own_group(params):
    opt = nested(Linear(start=0.0, end=1.0, steps=10))
    state = moved(opt, params, 3)
    now = find(state, "lr", opt)
    assert now == {
        "inner.inner.inner['decay'].inner.lr": pytest.approx(0.3),
        "inner.inner.inner['no_decay'].lr": 0.2,
    }
    assert list(now) == list(find(opt, "lr"))
    later = replace(state, "step", 9, within="decay")
    assert find(later, "lr", opt, within="decay").popitem()[1] == pytest.approx(0.9)
    # It is the one that the next update takes.
    plain = replace(opt, "lr", now.popitem()[1], "no_decay")
    plain = replace(plain, "lr", now.popitem()[1], "decay")
    assert_same_bits(opt.update(params, state, params), plain.update(params, state, params))


def test_with_the_optimizer_fields_of_the_state_are_found_as_well(params):
    opt = nested()
    state = moved(opt, params)
    assert find(state, "norm", opt) == {"inner.norm": state.inner.norm}
    assert find(state, "inner", opt)["inner"] is state.inner
    assert find(state, "every", opt) == {"every": 1}
    assert find(state, "betas", opt, within="no_decay").popitem()[1] == (0.9, 0.999)
    schedule = nested(Cosine(0.3, steps=5))
    assert find(state, "peak", schedule).popitem()[1] == 0.3
    assert (
        find(state, Cosine, schedule).popitem()[1]
        is find(schedule, "lr", within="decay").popitem()[1]
    )


def test_counts_of_each_leaf_give_a_tree():
    opt = AdamW(lr=lambda step: step + 1, step_per_leaf=True)
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    _, state = opt.update({"a": params["a"], "b": None}, opt.init(params), params)
    assert find(state, "lr", opt) == {"lr": {"a": 2.0, "b": 1.0}}


@pytest.mark.parametrize("per_leaf", [False, True])
def test_a_pair_of_which_one_is_a_schedule_is_read_at_the_count(per_leaf):
    opt = AdamW(betas=(Linear(0.9, 0.5, steps=4), 0.999), step_per_leaf=per_leaf)
    params = {"a": torch.ones(2), "b": torch.ones(1)}
    grads = {**params, "b": None}
    _, state = opt.update(grads, opt.init(params), params)
    (first, second) = find(state, "betas", opt)["betas"]
    expected = {"a": 0.8, "b": 0.9} if per_leaf else 0.8
    assert tree_map(float, first) == expected
    assert second == 0.999


def test_a_schedule_cannot_write_into_the_state():
    opt = AdamW(lr=lambda step: step.add_(1))
    state = opt.init(torch.ones(2))
    assert find(state, "lr", opt) == {"lr": 1.0}
    assert state.step == 0


def test_tensors_are_found_as_they_are():
    lr = torch.tensor(0.1, requires_grad=True)
    opt = Clip(AdamW(lr=lr), 1.0)
    state = opt.init(torch.ones(2))
    assert find(opt, "lr")["inner.lr"] is lr
    assert find(state, "lr", opt)["inner.lr"] is lr


def test_members_of_a_vmap_have_their_own():
    opts = Clip(AdamW(lr=Linear(0.0, torch.tensor([1.0, 2.0]), steps=2)), 1.0)
    params = torch.randn(2, 3)
    state = vmap(lambda opt, p: opt.init(p))(opts, params)
    _, state = vmap(lambda opt, g, s, p: opt.update(g, s, p))(opts, params, state, params)
    now = vmap(lambda opt, s: find(s, "lr", opt))(opts, state)
    assert now["inner.lr"].tolist() == [0.5, 1.0]
    assert find(state, "step")["inner.step"].tolist() == [1.0, 1.0]
    faster = vmap(lambda opt, lr: replace(opt, "lr", lr))(opts, torch.tensor([3.0, 4.0]))
    assert find(faster, "lr")["inner.lr"].tolist() == [3.0, 4.0]
    anew = vmap(lambda s: replace(s, AdamWState, 0))(state)
    assert_same_bits(anew.inner, vmap(lambda opt, p: opt.init(p))(opts, params).inner)


def test_a_learning_rate_that_is_found_can_be_differentiated():
    state = AdamW().init(torch.ones(2))._replace(step=torch.tensor(1.0))

    def now(end):
        opt = AdamW(lr=Linear(0.0, end, steps=4))
        return find(state, "lr", opt)["lr"]

    assert grad(now)(torch.tensor(0.5)) == 0.25


def test_one_compiled_graph_reads_and_edits():
    torch.compiler.reset()
    opt = Clip(Partition({"a": AdamW(lr=Cosine(0.1, steps=5)), "b": AdamW()}, ["a", "b"]), 1.0)
    params = [torch.ones(2), torch.ones(3)]

    def step(grads, state, params):
        params, state = opt.update(grads, state, params)
        lr = find(state, "lr", opt, within="a")["inner.inner['a'].lr"]
        return params, replace(state, "exp_avg", 0, within="b"), lr

    state = opt.init(params)
    expected = step(params, state, params)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for one, other in zip(leaves(compiled(params, state, params)), leaves(expected), strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_is_read_from_a_device():
    state = nested().init([torch.ones(3, device="meta") for _ in range(3)])
    meta = replace(state, "step", lambda step: step.to("cpu"))
    opt = nested(Linear(0.0, 1.0, steps=4))
    assert len(find(meta, "lr", opt)) == 2
    assert all(leaf.is_meta for leaf in leaves(find(replace(meta, "exp_avg", 0), "exp_avg")))


# Editing.


def test_one_group_begins_again_and_nothing_else_changes(params):
    opt = nested()
    state = moved(opt, params, 2)
    before = clone(state)
    by_number = replace(state, AdamWState, 0, within="decay")
    inner = find(opt, AdamW, within="decay").popitem()[1]
    by_init = replace(state, AdamWState, lambda _: inner.init({"0": params[0]}), within="decay")
    fresh = inner.init({"0": params[0]})
    for edited in (by_number, by_init, replace(state, AdamWState, fresh, within="decay")):
        assert_same_bits(edited.inner.inner.inner["decay"].inner, fresh)
        kept = edited.inner.inner.inner["no_decay"]
        assert kept is state.inner.inner.inner["no_decay"]
        assert edited.acc_grads is state.acc_grads
        assert type(edited) is type(state)
        opt.update(params, edited, params)
    assert_same_bits(state, before)


def test_what_is_put_into_a_state_is_a_copy_at_each_place():
    opt = Clip(Clip(AdamW(), 1.0), 1.0)
    value = torch.tensor(2.0)
    state = replace(opt.init(torch.ones(2)), "norm", value)
    assert len({t.data_ptr() for t in (value, state.norm, state.inner.norm)}) == 3
    assert state.norm == state.inner.norm == 2.0


def test_leaves_are_edited_one_by_one_by_their_class(params):
    state = moved(nested(), params)
    doubled = replace(state, torch.Tensor, lambda t: t * 2 if t.is_floating_point() else t)
    assert_same_bits(
        find(doubled, "exp_avg").popitem()[1]["1"], 2 * find(state, "exp_avg").popitem()[1]["1"]
    )


@pytest.mark.parametrize(
    "params",
    [
        torch.randn(2),
        {},
        OrderedDict(b=torch.randn(2), a=torch.randn(0, 3)),
        Point(torch.randn(()), [torch.randn(2), (torch.randn(1, dtype=torch.complex64),)]),
        {0: torch.randn(2).bfloat16(), 1: torch.randn(2).double()},
    ],
)
def test_the_structure_and_dtypes_stay_whatever_the_parameters_are(params):
    opt = Clip(AdamW(amsgrad=True), 1.0)
    state = moved(opt, params)
    assert_same_bits(replace(state, AdamWState, 0).inner, opt.init(params).inner)
    assert replace(state, "step", 2**25).inner.step == 2**25
    both = replace((params, state), AdamWState, 0)
    assert both[0] is params
    assert_same_bits(both[1].inner, opt.init(params).inner)


def test_a_number_a_function_and_a_schedule_are_put_into_an_optimizer(params):
    opt = nested()
    state = moved(opt, params)
    before = dataclasses.asdict(AdamW(lr=0.1))
    assert set(find(replace(opt, "lr", 1e-4), "lr").values()) == {1e-4}
    assert set(find(replace(opt, "lr", lambda lr: 0.1 * lr), "lr").values()) == {
        0.1 * 0.1,
        0.1 * 0.2,
    }
    third = functools.partial(lambda by, lr: lr / by, 3)
    assert find(replace(opt, "lr", third), "lr", within="no_decay").popitem()[1] == 0.2 / 3
    schedule = Linear(0.0, 1.0, steps=10)
    edited = replace(opt, "lr", schedule, within="inner.inner.inner['decay']")
    assert edited == nested(schedule)
    assert find(edited, "lr", within="decay").popitem()[1] is schedule
    assert find(replace(edited, "steps", 20.0), "steps").popitem()[1] == 20.0
    assert dataclasses.asdict(find(opt, AdamW, within="decay").popitem()[1]) == before
    edited.update(params, state, params)


def test_of_optimizers_in_one_another_the_inner_ones_are_edited_first():
    opt = Clip(Clip(AdamW(), 1.0), 1.0)
    halved = replace(opt, Clip, lambda clip: dataclasses.replace(clip, max_norm=0.5))
    assert halved == Clip(Clip(AdamW(), 0.5), 0.5)
    assert replace(opt, AdamW, ClipAdaptive) == Clip(Clip(ClipAdaptive(AdamW()), 1.0), 1.0)
    assert replace(opt, Clip, lambda clip: clip.inner) == AdamW()


# Whatever users write.


class MomentumState(NamedTuple):
    step: Any
    momentum: Any


@register_optimizer
@dataclasses.dataclass(frozen=True)
class Momentum:
    lr: Any
    rate: Any = 0.9

    def init(self, params):
        return MomentumState(torch.zeros(()), torch.zeros_like(params))

    def update(self, grads, state, params):
        return params, state._replace(step=state.step + 1)

    update_ = update


@register_optimizer
@dataclasses.dataclass(frozen=True)
class Through:
    """Adds nothing to the state of what it wraps."""

    optimizer: Any
    scale: float = 1.0

    def init(self, params):
        return self.optimizer.init(params)

    def update(self, grads, state, params):
        return self.optimizer.update(grads, state, params)

    update_ = update


@register_optimizer
@dataclasses.dataclass(frozen=True)
class Chain:
    """Its state is a dict, that of its parts a tuple."""

    parts: Any

    def init(self, params):
        return {"parts": tuple(part.init(params) for part in self.parts), "calls": 0}

    def update(self, grads, state, params):
        return params, state

    update_ = update


def test_optimizers_of_a_user_are_walked_as_ours_are():
    opt = Chain(
        (Through(Momentum(lr=Linear(1.0, 0.0, steps=4))), Clip(Through(AdamW(lr=0.3)), 1.0))
    )
    state = opt.init(torch.ones(2))
    state = replace(state, "step", 1, within="parts")
    assert find(state, "momentum").keys() == {"['parts'][0].momentum"}
    now = find(state, "lr", opt)
    assert now == {"parts[0].optimizer.lr": 0.75, "parts[1].inner.optimizer.lr": 0.3}
    slower = replace(opt, "lr", 0.1, within="parts[0]")
    assert find(slower, "lr") == {"parts[0].optimizer.lr": 0.1, "parts[1].inner.optimizer.lr": 0.3}
    assert isinstance(slower, Chain)


def test_mappings_keep_their_types():
    momentum = MomentumState(torch.ones(()), torch.ones(2))
    for mapping in (
        OrderedDict(a=momentum),
        defaultdict(list, a=momentum),
        MappingProxyType({"a": momentum}),
    ):
        edited = replace(mapping, "step", 0)
        assert type(edited) is type(mapping)
        assert edited["a"].step == 0
        assert mapping["a"].step == 1


class Holder(NamedTuple):
    opt: Any
    state: Any
    noise: torch.Tensor


def test_what_holds_an_optimizer_is_edited_by_the_rules_of_each_part(params):
    opt = AdamW(lr=0.5)
    tree = Holder(opt, moved(opt, params), torch.tensor(0.25))
    assert list(find(tree, "lr")) == ["opt.lr"]
    halved = replace(tree, "lr", lambda lr: lr / 2)
    assert halved.opt == AdamW(lr=0.25)
    assert halved.state is tree.state
    assert tree.opt is opt
    assert replace(tree, "lr", torch.tensor([0.1, 0.2])).opt.lr.shape == (2,)
    assert replace(tree, "noise", 1.0).noise.item() == 1.0
    with pytest.raises(ValueError, match=r"noise: shape torch.Size\(\[2\]\), it was"):
        replace(tree, "noise", torch.zeros(2))
    with pytest.raises(ValueError, match="lr"):
        replace(tree, "lr", -1.0)


def test_of_what_holds_an_optimizer_nothing_else_is_asked_for(params):
    tree = Holder(AdamW(), AdamW().init(params), torch.tensor(0.25))
    for ask in (lambda: find(tree, "momentum"), lambda: replace(tree, "momentum", 0.5)):
        with pytest.raises(KeyError) as error:
            ask()
        message = words(error)
        assert message.startswith("no 'momentum' in this Holder. There are opt, lr, betas,")
        assert "give its optimizer" not in message


# Errors.


def test_what_is_not_there_is_an_error_that_lists_what_is(params):
    opt = nested()
    state = moved(opt, params)
    with pytest.raises(KeyError) as error:
        find(state, "lr")
    assert words(error) == (
        "no 'lr' in this AccumulateState. There are mini_step, acc_grads, given, inner, norm, "
        "step, exp_avg, exp_avg_sq, max_exp_avg_sq, key. A state holds no hyperparameters: for "
        "those, give its optimizer, find(state, 'lr', opt)."
    )
    with pytest.raises(KeyError) as error:
        replace(state, "lr", 0.1)
    assert words(error).endswith("give its optimizer, replace(opt, 'lr', ...).")
    with pytest.raises(KeyError) as error:
        find(opt, AdamWState)
    assert words(error) == (
        "no AdamWState in this Accumulate. There are Accumulate, Clip, Partition, ClipValue, AdamW."
    )
    with pytest.raises(KeyError) as error:
        replace(opt, "lr", 0.1, within="head")
    assert words(error) == (
        "no 'lr' within 'head'. It is at inner.inner.inner['decay'].inner.lr, "
        "inner.inner.inner['no_decay'].lr."
    )
    with pytest.raises(KeyError, match="There are nothing"):
        find(Frozen().init(params), "step")


@pytest.mark.parametrize(
    ("what", "new", "message"),
    [
        ("step", torch.zeros(()), "step: dtype torch.float32, it was torch.float64"),
        ("exp_avg", lambda _: {"w": torch.zeros(2)}, "exp_avg['w']: shape torch.Size([2]), it was"),
        ("exp_avg", {"v": torch.zeros(3)}, "exp_avg: no exp_avg['w'] and a new exp_avg['v']"),
        ("exp_avg", (torch.zeros(3),), "exp_avg: no exp_avg['w'] and a new exp_avg[0]"),
        ("exp_avg", OrderedDict(w=torch.zeros(3)), "exp_avg: a OrderedDict in place of a dict"),
        ("exp_avg", {"w": None}, "exp_avg['w']: shape <class 'NoneType'>, it was"),
        ("exp_avg", {"w": torch.zeros(3, device="meta")}, "exp_avg['w']: device meta, it was cpu"),
        (AdamWState, lambda state: state._replace(exp_avg=()), "the whole: no exp_avg['w']"),
        (AdamWState, tuple, "the whole: no step, exp_avg['w']"),
    ],
)
def test_a_state_takes_only_what_is_like_what_was_there(what, new, message):
    state = AdamW().init({"w": torch.ones(3)})
    before = clone(state)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        replace(state, what, new)
    assert "must be like what was there" in words(error)
    assert_same_bits(state, before)


def test_an_optimizer_checks_what_it_is_given():
    opt = Clip(AdamW(), 1.0)
    for what, new, error, message in (
        ("lr", -1.0, ValueError, "lr=-1.0"),
        ("lr", "fast", TypeError, "lr='fast'"),
        ("inner", 5, TypeError, "inner is an optimizer, and 5 is none"),
        (AdamW, lambda _: AdamW, TypeError, "inner is an optimizer"),
        (Clip, None, TypeError, "the whole is an optimizer"),
    ):
        with pytest.raises(error, match=message):
            replace(opt, what, new)


def test_a_state_must_be_that_of_the_optimizer(params):
    state = moved(nested(), params)
    other = Accumulate(Clip(Partition({"all": AdamW()}, lambda name, leaf: "all"), 1.0), 1)
    with pytest.raises(ValueError, match=r"nothing for inner.inner.inner\['all'\]"):
        find(state, "lr", other)
    with pytest.raises(ValueError, match="lr is a function, and its state, of type ClipState, has"):
        find(state.inner, "lr", AdamW(lr=lambda step: 0.1))
    with pytest.raises(ValueError, match="labels is a function"):
        find(other.init(params), "labels", other)
    for opt in (AdamW, 0.1):
        with pytest.raises(TypeError, match="must be the optimizer to which"):
            find(state, "lr", opt)


def test_what_is_looked_for_is_a_name_or_a_class(params):
    for what in (None, 3, ("lr", "eps")):
        with pytest.raises(TypeError, match="must be the name of a field"):
            find(AdamW(), what)
        with pytest.raises(TypeError, match="must be the name of a field"):
            replace(AdamW(), what, 0)


def test_every_wrapper_of_the_library_is_walked():
    """So that one that hides its inner optimizer from the walk does not go unnoticed."""
    wrappers = [
        getattr(funcopt, name)
        for name in funcopt.__all__
        if dataclasses.is_dataclass(getattr(funcopt, name))
        and "inner" in {field.name for field in dataclasses.fields(getattr(funcopt, name))}
    ]
    assert {Accumulate, Clip, ClipAdaptive, ClipValue, Partition} <= set(wrappers)
    inner = AdamW(lr=Linear(0.0, 1.0, steps=4))
    required = {Accumulate: (2,), Clip: (1.0,), ClipValue: (1.0,), Transform: (fade,)}
    for wrapper in wrappers:
        if wrapper is Partition:
            opt = Partition({"a": inner}, "a")
        else:
            opt = wrapper(inner, *required.get(wrapper, ()))
        state = opt.init(torch.ones(2))
        assert len(find(state, "exp_avg")) == 1, wrapper
        [lr] = find(state, "lr", opt).values()
        assert not lr.any(), wrapper  # of Members, one for each
        assert set(find(replace(opt, "lr", 0.5), "lr").values()) == {0.5}, wrapper
        assert isinstance(replace(state, AdamWState, 0), type(state))


def test_accumulate_keeps_what_was_not_edited():
    state = Accumulate(AdamW(), 2).init([torch.ones(2)])
    edited = replace(state, "given", True)
    assert isinstance(edited, AccumulateState)
    assert edited.given.tolist() == [True]
    assert edited.inner is state.inner
