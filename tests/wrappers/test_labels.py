"""Which leaf has which label, and what is wrong with labels."""

import dataclasses
import re

import pytest
import torch
from torch.func import vmap

import funcopt
from funcopt import (
    Accumulate,
    AdamW,
    Clip,
    ClipAdaptive,
    Ema,
    Frozen,
    Lookahead,
    LossScale,
    Partition,
    PartitionState,
    SkipNonfinite,
    interop,
)
from funcopt.distributed import LocalUpdates, Zero1

from ..cases import assert_close, assert_same_bits, clone, random_like, run
from ..groups import all_one, two

PARAMS = {"w": torch.ones(2, 2), "bias": torch.ones(2), "norm": {"bias": torch.ones(2)}}
PATTERNS = {re.compile("bias$"): "b", re.compile("^norm"): "b", re.compile("^w"): "a"}


@pytest.mark.parametrize(
    "labels",
    [
        lambda name, leaf: "b" if name.endswith("bias") else "a",
        lambda name, leaf: "b" if leaf.ndim < 2 else "a",
        {"norm": {"bias": "b"}, "w": "a", "bias": "b"},
        PATTERNS,
    ],
    ids=["by name", "by leaf", "tree", "patterns"],
)
def test_labels_may_be_said_in_three_ways(labels):
    state = Partition({"a": AdamW(), "b": AdamW()}, labels).init(PARAMS)
    assert {label: set(own.exp_avg) for label, own in state.inner.items()} == {
        "a": {"w"},
        "b": {"bias", "norm.bias"},
    }


WRONG_LABELS = {
    "a leaf without a label, of a function": (
        lambda name, leaf: "b" if name.endswith("bias") else None,
        TypeError,
        "params['w'] has no label: each leaf needs one of 'a', 'b'.",
    ),
    "a label of another type": (
        lambda name, leaf: name.endswith("bias"),
        TypeError,
        "has a bool for a label: each leaf needs one of 'a', 'b'.",
    ),
    "an unknown label": (
        lambda name, leaf: "b" if name.endswith("bias") else "c",
        ValueError,
        "params['w'] has the label 'c', for which there is no optimizer: there are 'a', 'b'. "
        "Correct the label, or add an optimizer for it, such as Frozen().",
    ),
    "a label without a leaf": (
        lambda name, leaf: "a",
        ValueError,
        "no leaf has the label 'b': each label must have a leaf, or one that is misspelt would go "
        "unnoticed. Correct labels, or leave its optimizer out. Leaves are named 'w', "
        "'bias', 'norm.bias'.",
    ),
    "a tree without a leaf": (
        {"w": "a", "bias": "b"},
        ValueError,
        "labels does not have the structure of params: no labels['norm']['bias'] for "
        "params['norm']['bias']. Give each parameter one label under the same key",
    ),
    "patterns that are not compiled": (
        {"bias$": "b", "^w": "a"},
        ValueError,
        "patterns are compiled: re.compile",
    ),
    "patterns of which one is not compiled": (
        {re.compile("bias$"): "b", "^w": "a"},
        TypeError,
        "labels has '^w' among its patterns: give it as re.compile('^w').",
    ),
    "a leaf without a pattern": (
        {re.compile("bias$"): "b", re.compile("^v"): "a"},
        ValueError,
        "params['w'] has no label: no pattern is found in its name 'w'. Add one that is",
    ),
    "a leaf with two labels": (
        {re.compile("bias$"): "b", re.compile("^norm"): "a", re.compile("^w"): "a"},
        ValueError,
        "params['norm']['bias'] has two labels, 'b' by the pattern 'bias$' and 'a' by '^norm', "
        "both of which are found in its name 'norm.bias': it can have one. Narrow a pattern, or "
        "give a function.",
    ),
    "a pattern without a leaf": (
        {**PATTERNS, re.compile("scale$"): "b"},
        ValueError,
        "the pattern 'scale$' of labels is found in no name",
    ),
    "an unknown label in a tree": (
        {"w": "a", "bias": "b", "norm": {"bias": "d"}},
        ValueError,
        "labels has the label 'd', for which there is no optimizer",
    ),
    "an unknown label of a pattern": (
        {**PATTERNS, re.compile("^w"): "d"},
        ValueError,
        "labels has the label 'd', for which there is no optimizer",
    ),
}


@pytest.mark.parametrize("name", WRONG_LABELS)
def test_wrong_labels_are_an_error_that_says_which(name):
    labels, kind, message = WRONG_LABELS[name]
    with pytest.raises(kind) as error:
        Partition({"a": AdamW(), "b": AdamW()}, labels).init(PARAMS)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("inner", "kind", "message"),
    [
        (AdamW(), TypeError, "inner is of type AdamW: it must be a dict from labels"),
        ({}, ValueError, "inner={}: there must be an optimizer"),
        ({1: AdamW()}, TypeError, "inner has the label 1: a label must be a string"),
        ({"a": 0.1}, TypeError, r"inner\['a'\]=0.1: must be an optimizer"),
        ({"a": AdamW}, TypeError, r"inner\['a'\]=<class .*: must be an optimizer"),
    ],
)
def test_what_is_no_dict_of_optimizers_is_refused(inner, kind, message):
    with pytest.raises(kind, match=message):
        Partition(inner, all_one)


def test_leaves_of_one_name_are_refused():
    params = {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}
    with pytest.raises(ValueError, match=r"are both named 'a.b': rename a key"):
        Partition({"all": AdamW()}, all_one).init(params)


@pytest.mark.parametrize("method", ["update", "update_"])
def test_a_state_of_something_else_is_refused(method):
    params = {"first": torch.ones(3), "second": torch.ones(2)}
    update = getattr(two(), method)
    with pytest.raises(TypeError, match=r"state is of type AdamWState: it must be the Partition"):
        update(params, AdamW().init(params), params)
    state = two().init(params)
    other = PartitionState({"first": state.inner["first"], "third": state.inner["second"]})
    with pytest.raises(ValueError, match=r"state.inner has the labels 'first', 'third', this"):
        update(params, other, params)


def test_labels_that_have_changed_since_init_are_an_error():
    params = {"first": torch.ones(3), "second": torch.ones(2), "third": torch.ones(2)}
    state = two().init(params)
    opt = dataclasses.replace(
        two(), labels=lambda name, leaf: "first" if name == "first" else "second"
    )
    with pytest.raises(ValueError, match=r"state.exp_avg does not have the structure of params"):
        opt.update_(clone(params), state, params)
    assert_same_bits(params["first"], torch.ones(3))


DECAYING = {
    "layers.0.weight": "decay",
    "layers.0.bias": "no_decay",
    "norm.weight": "no_decay",
    "scale": "no_decay",
    "embed_tokens.weight": "no_decay",
    "token_embedding.weight": "no_decay",
    "transformer.wte.weight": "no_decay",
    "transformer.h.0.attn.c_attn.weight": "decay",
    "tok_emb.weight": "no_decay",
    "embeddings.weight": "no_decay",
    "member.weight": "decay",
    "unembed.weight": "decay",
    "assembly.weight": "decay",
}


def test_the_usual_rule_of_weight_decay():
    shapes = {"layers.0.bias": (3,), "norm.weight": (3,), "scale": ()}
    found = {
        name: funcopt.decay_label(name, torch.ones(shapes.get(name, (3, 2)))) for name in DECAYING
    }
    assert found == DECAYING


BIAS_FREE = {"embed": torch.ones(4, 2), "w": torch.ones(2, 2), "v": torch.ones(3, 2)}
LABELED = {
    "all leaves decay": {"w": BIAS_FREE["w"], "v": BIAS_FREE["v"]},
    "none decays": {"embed": BIAS_FREE["embed"], "b": torch.ones(2)},
    "some do": BIAS_FREE,
}


def decaying():
    return Partition(
        {"decay": AdamW(lr=0.1, weight_decay=0.1), "no_decay": AdamW(lr=0.1, weight_decay=0.0)},
        funcopt.decay_label,
    )


@pytest.mark.parametrize("params", LABELED.values(), ids=LABELED.keys())
def test_the_usual_rule_serves_a_model_of_which_all_leaves_have_one_label(params):
    opt = decaying()
    gradients = [random_like(params) for _ in range(4)]
    moved, state = run(opt, params, gradients[:2])
    for name, param in params.items():
        bare = AdamW(lr=0.1, weight_decay=0.1 if name in ("w", "v") else 0.0)
        expected, _ = run(bare, param, [grads[name] for grads in gradients[:2]])
        assert_same_bits(moved[name], expected)
    assert [own.step.item() for own in state.inner.values()] == [2, 2]
    # It goes on from a checkpoint, in place as well, and is found.
    resumed = interop.from_state_dict(opt.init(params), clone(interop.to_state_dict(state)))
    again, own = clone(moved), clone(resumed)
    for grads in gradients[2:]:
        moved, state = opt.update(grads, state, moved)
        opt.update_(grads, own, again)
    assert_same_bits((again, own), (moved, state))
    assert set(funcopt.find(state, "step")) == {"inner['decay'].step", "inner['no_decay'].step"}
    assert set(funcopt.find(state, "lr", opt)) == {"inner['decay'].lr", "inner['no_decay'].lr"}


@pytest.mark.parametrize("around", [lambda o: o, lambda o: Clip(o, 1.0), Ema])
@pytest.mark.parametrize(
    "within",
    [
        lambda o: o,
        lambda o: Clip(o, 1.0),
        ClipAdaptive,
        lambda o: Accumulate(o, 2),
        lambda o: SkipNonfinite(LossScale(Lookahead(o, 2), 1.0), 1),
        lambda o: Zero1(o, None),
        lambda o: LocalUpdates(o, 2, None),
    ],
    ids=["bare", "Clip", "ClipAdaptive", "Accumulate", "several", "Zero1", "LocalUpdates"],
)
def test_a_group_without_a_leaf_does_nothing_whatever_its_optimizer(within, around):
    params = LABELED["all leaves decay"]
    inner = {label: within(opt) for label, opt in decaying().inner.items()}
    opt = around(Partition(inner, funcopt.decay_label))
    alone = around(Partition({"decay": inner["decay"]}, funcopt.decay_label))
    gradients = [random_like(params) for _ in range(3)]
    expected, _ = run(alone, params, gradients)
    assert_same_bits(run(opt, params, gradients)[0], expected)
    in_place, state = clone(params), opt.init(params)
    for grads in gradients:
        opt.update_(grads, state, in_place)
    assert_same_bits(in_place, expected)


def test_a_group_without_a_leaf_is_none_in_torch():
    opt, params = decaying(), {name: torch.nn.Parameter(p) for name, p in BIAS_FREE.items()}
    del params["embed"]
    moved, state = run(opt, params, [random_like(params)])
    handed = interop.to_torch(opt, state, moved)
    assert [group["name"] for group in handed["param_groups"]] == ["decay"]
    theirs = torch.optim.AdamW([(name, moved[name]) for name in ("w", "v")])
    theirs.load_state_dict(handed)
    back, _ = interop.from_torch(theirs, moved)
    assert back.weight_decay == 0.1


def test_members_and_a_compiled_step_may_have_a_group_without_a_leaf():
    opt, params = decaying(), {"w": torch.randn(3, 2, 2)}
    state = vmap(opt.init)(params)
    _, state = vmap(opt.update)(params, state, params)
    assert state.inner["no_decay"].step.shape == (3,)
    torch.compiler.reset()
    step = torch.compile(opt.update, fullgraph=True, backend="aot_eager")
    alone = {"w": torch.randn(2, 2)}
    given = alone, opt.init(alone), alone
    assert_close(step(*given), opt.update(*given), rtol=1e-6)


def own_rule(name, leaf):
    return "frozen" if name.startswith("v") else funcopt.decay_label(name, leaf)


def test_a_function_of_ones_own_says_which_labels_may_be_without_a_leaf():
    inner = {**decaying().inner, "frozen": Frozen()}
    with pytest.raises(ValueError, match=r"no leaf has the label 'no_decay'.*possible_labels"):
        Partition(inner, own_rule).init(LABELED["all leaves decay"])

    def saying(name, leaf):
        return own_rule(name, leaf)

    saying.possible_labels = ("decay", "no_decay", "frozen")
    opt = Partition(inner, saying)
    assert opt.init(LABELED["all leaves decay"]).inner["no_decay"].exp_avg == {}
    assert opt.init({"b": torch.ones(2)}).inner["frozen"] == ()


def test_a_misspelt_label_is_noticed_all_the_same():
    inner = {"decay": AdamW(), "nodecay": AdamW(weight_decay=0.0)}
    message = r"inner has the label 'nodecay', .*possible_labels there are 'decay', 'no_decay'"
    with pytest.raises(ValueError, match=message):
        Partition(inner, funcopt.decay_label)

    def wrong(name, leaf):
        return "a"

    wrong.possible_labels = "a"
    with pytest.raises(TypeError, match=r"labels\.possible_labels='a': must be a tuple"):
        Partition({"a": AdamW()}, wrong)


def test_a_function_that_does_not_take_a_name_and_a_leaf_is_refused_when_it_is_given():
    with pytest.raises(TypeError, match=r"^labels=.* name and the leaf, and this has too many"):
        Partition({"a": AdamW()}, lambda name: "a")
