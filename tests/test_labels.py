"""Which leaf has which label, and what is wrong with labels."""

import dataclasses
import re

import pytest
import torch

import funcopt
from funcopt import AdamW, Partition, PartitionState

from .cases import assert_same_bits, clone
from .groups import all_one, two

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


def test_a_function_that_does_not_take_a_name_and_a_leaf_is_refused_when_it_is_given():
    with pytest.raises(TypeError, match=r"^labels=.* name and the leaf, and this has too many"):
        Partition({"a": AdamW()}, lambda name: "a")
