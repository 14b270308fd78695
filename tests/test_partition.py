"""Groups of leaves: their numbers, their labels, and that all of them move or none."""

import dataclasses
import pickle
import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap

import funcopt
from funcopt import AdamW, Frozen, Partition, PartitionState, interop
from funcopt.testing import laws, strategies
from funcopt.testing._check import check_law

from . import oracle
from .cases import (
    KERNELS,
    TORCH_FLAGS,
    Point,
    assert_close,
    assert_same_bits,
    clone,
    leaves,
    random_like,
    run,
    tree_map,
    trees,
)


@dataclasses.dataclass(frozen=True)
class Halved:
    """Somebody's wrapper, of which nothing is known but that it keeps to the rules."""

    inner: Any

    def init(self, params):
        return (self.inner.init(params),)

    def update(self, grads, state, params):
        params, inner = self.inner.update(tree_map(lambda g: g / 2, grads), state[0], params)
        return params, (inner,)

    def update_(self, grads, state, params):
        self.inner.update_(tree_map(lambda g: g / 2, grads), state[0], params)
        return params, state


def all_one(name, leaf):
    return "all"


def by_first_key(name, leaf):
    return "second" if name.startswith(("second", "c")) else "first"


def two(first=None, second=None):
    return Partition(
        {
            "first": first or AdamW(lr=0.1, weight_decay=0.1),
            "second": second or AdamW(lr=0.01, betas=(0.5, 0.75), amsgrad=True),
        },
        by_first_key,
    )


def steps_in_place(opt, params, gradients):
    params, state = clone(params), opt.init(params)
    for grads in gradients:
        opt.update_(grads, state, params)
    return params, state


# Numbers.


@pytest.mark.parametrize("name", trees())
def test_a_partition_of_one_label_is_the_optimizer_itself(name):
    params = trees()[name]
    gradients = [random_like(params) for _ in range(5)]
    bare = AdamW(lr=0.1, amsgrad=True)
    opt = Partition({"all": bare}, all_one)
    expected, expected_state = run(bare, params, gradients)
    for moved, state in (run(opt, params, gradients), steps_in_place(opt, params, gradients)):
        assert_same_bits(moved, expected)
        assert state.inner["all"].step == 5
        for field in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            own, wanted = getattr(state.inner["all"], field), getattr(expected_state, field)
            assert_same_bits(list(own.values()), leaves(wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_two_groups_have_the_bits_of_torchs_param_groups(kernel, dtype):
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)).to(dtype)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = [random_like(params) for _ in range(20)]
    decaying = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    theirs = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=0.1,
        **TORCH_FLAGS[kernel],
    )
    for grads in gradients:
        for name, param in model.named_parameters():
            param.grad = grads[name].clone()
        theirs.step()
    opt = Partition(
        {
            "decay": AdamW(lr=0.1, weight_decay=0.1, kernel=kernel),
            "no_decay": AdamW(lr=0.1, weight_decay=0.0, kernel=kernel),
        },
        labels=funcopt.decay_label,
    )
    expected = {name: param.detach() for name, param in model.named_parameters()}
    ours, state = run(opt, params, gradients)
    assert_same_bits(ours, expected)
    in_place, state_in_place = steps_in_place(opt, params, gradients)
    assert_same_bits(in_place, expected)
    assert_same_bits(state_in_place, state)


def test_each_group_has_the_numbers_of_the_paper():
    params = {"first": torch.randn(3).double(), "second": torch.randn(2).double()}
    gradients = [random_like(params) for _ in range(20)]
    options = {
        "first": {"lr": 0.1, "weight_decay": 0.1},
        "second": {"lr": 0.01, "betas": (0.5, 0.75), "amsgrad": True},
    }
    opt = two(AdamW(**options["first"]), AdamW(**options["second"]))
    ours, _ = run(opt, params, gradients)
    for name, param in params.items():
        expected, state = param, oracle.init(param)
        for grads in gradients:
            expected, state = oracle.update(grads[name], state, expected, **options[name])
        assert_close(ours[name], expected, rtol=1e-12, atol=1e-14)


def optax_run(transform, params, gradients):
    """Run optax over the same trees, in float64; return the parameters."""
    jax = pytest.importorskip("jax", reason="optax is in the extra 'benchmark' alone")
    optax = pytest.importorskip("optax", reason="optax is in the extra 'benchmark' alone")

    def theirs(tree):
        return jax.tree_util.tree_map(lambda leaf: jax.numpy.asarray(leaf.numpy()), tree)

    with jax.enable_x64(True):
        params, opt = theirs(params), transform(optax, jax)
        state = opt.init(params)
        for grads in gradients:
            updates, state = opt.update(theirs(grads), state, params)
            params = optax.apply_updates(params, updates)
    return jax.tree_util.tree_map(lambda leaf: torch.tensor(jax.device_get(leaf)), params)


def optax_labels(jax, tree):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: by_first_key(str(getattr(path[0], "key", path[0])), _), tree
    )


OPTAX = {
    "multi_transform": (
        two(AdamW(lr=0.1, weight_decay=0.1), AdamW(lr=0.01, betas=(0.5, 0.75))),
        lambda optax, jax: optax.multi_transform(
            {
                "first": optax.adamw(0.1, weight_decay=0.1),
                "second": optax.adamw(0.01, b1=0.5, b2=0.75, weight_decay=1e-2),
            },
            lambda tree: optax_labels(jax, tree),
        ),
    ),
    "multi_transform that freezes": (
        two(AdamW(lr=0.1), Frozen()),
        lambda optax, jax: optax.multi_transform(
            {"first": optax.adamw(0.1, weight_decay=1e-2), "second": optax.set_to_zero()},
            lambda tree: optax_labels(jax, tree),
        ),
    ),
    "masked weight decay": (
        Partition(
            {
                "decay": AdamW(lr=0.1, weight_decay=0.1),
                "no_decay": AdamW(lr=0.1, weight_decay=0.0),
            },
            funcopt.decay_label,
        ),
        lambda optax, jax: optax.adamw(
            0.1,
            weight_decay=0.1,
            mask=lambda tree: jax.tree_util.tree_map(lambda leaf: leaf.ndim >= 2, tree),
        ),
    ),
}


@pytest.mark.parametrize("name", OPTAX)
def test_numbers_are_those_of_optax_over_20_steps(name):
    opt, transform = OPTAX[name]
    params = {
        "first": [torch.randn(3, 2).double(), torch.randn(2).double()],
        "second": {"b": torch.randn(()).double(), "w": torch.randn(2, 3).double()},
    }
    gradients = [random_like(params) for _ in range(20)]
    expected = optax_run(transform, params, gradients)
    ours, _ = run(opt, params, gradients)
    assert_close(ours, expected, rtol=1e-6, atol=1e-9)


# The laws.


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_every_law_holds_of_one_label(law, pytestconfig):
    examples = 100 if pytestconfig.getoption("--nightly") else 10
    opt = Partition({"all": AdamW(lr=0.1)}, all_one)
    assert check_law(law, opt, max_examples=examples).status in ("holds", "not applicable")


@st.composite
def in_two_parts(draw):
    """Trees with leaves for both labels."""
    part = strategies.params().filter(leaves)
    return {"second": draw(part), "first": draw(part)}


# Which renames leaves, and so gives them other labels.
RENAMES = laws.leaves_are_independent


@pytest.mark.parametrize("law", [law for law in laws.LAWS if law is not RENAMES], ids=str)
@pytest.mark.parametrize("opt", [two(), two(second=Halved(AdamW(lr=0.5)))], ids=["AdamW", "any"])
def test_every_law_holds_of_two_groups(opt, law, pytestconfig):
    examples = 100 if pytestconfig.getoption("--nightly") else 10
    verdict = check_law(law, opt, params=in_two_parts(), max_examples=examples)
    assert verdict.status in ("holds", "not applicable"), verdict


@pytest.mark.parametrize(
    "law",
    [
        laws.never_mutates,
        laws.keeps_structure,
        laws.inplace_is_pure,
        laws.bad_trees_raise,
        laws.vmap_is_loop,
        laws.gradient_matches_differences,
        laws.compiles_once,
    ],
    ids=lambda law: law.__name__,
)
def test_the_laws_hold_beside_frozen_leaves(law):
    # Of the tree that one of them brings along, the leaf whose gradient is never wrong is frozen.
    opt = Partition(
        {"moving": AdamW(lr=0.1), "frozen": Frozen()},
        lambda name, leaf: "frozen" if name.startswith(("second", "a")) else "moving",
    )
    verdict = check_law(law, opt, params=in_two_parts(), max_examples=10)
    assert verdict.status == "holds", verdict


# Transforms.


def test_hyperparameters_of_a_group_may_differ_by_member():
    lrs = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    params = {"first": torch.randn(3, 4), "second": [torch.randn(3, 2, 2)]}
    gradients = [random_like(params) for _ in range(3)]
    state = vmap(two().init)(params)
    moved = params
    for grads in gradients:
        moved, state = vmap(lambda opt, g, s, p: opt.update(g, s, p))(
            two(AdamW(lr=lrs)), grads, state, moved
        )
    for i in range(3):
        own = [tree_map(lambda leaf, i=i: leaf[i], tree) for tree in (params, *gradients)]
        expected, expected_state = run(two(AdamW(lr=lrs[i].item())), own[0], own[1:])
        member = tree_map(lambda leaf, i=i: leaf[i], (moved, state))
        assert_close(member, (expected, expected_state), rtol=1e-6)


def test_derivatives_through_groups_match_differences_hyperparameters_included():
    params = {"first": torch.randn(3).double(), "second": torch.randn(2).double()}
    gradients = [random_like(params) for _ in range(2)]

    def after(lr, decay, first, second):
        opt = two(AdamW(lr=lr), AdamW(lr=0.1, weight_decay=decay))
        grads = [{**gradients[0], "first": first}, {**gradients[1], "second": second}]
        return tuple(run(opt, params, grads)[0].values())

    inputs = [
        torch.tensor(0.1).double(),
        torch.tensor(0.2).double(),
        gradients[0]["first"],
        gradients[1]["second"],
    ]
    tracked = [tensor.clone().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(after, tracked)


def test_a_derivative_with_respect_to_the_optimizer_is_an_optimizer():
    params = {"first": torch.ones(2), "second": torch.ones(2)}
    opt = two(AdamW(lr=torch.tensor(0.1)), AdamW(weight_decay=torch.tensor(0.2)))

    def loss(opt):
        moved, _ = opt.update(params, opt.init(params), params)
        return sum(leaf.square().sum() for leaf in moved.values())

    slope = grad(loss)(opt)
    assert slope.inner["first"].lr.item() < 0
    assert slope.inner["second"].weight_decay.item() < 0


@pytest.mark.parametrize("method", ["update", "update_"])
@pytest.mark.parametrize("labels", ["function", "patterns", "tree"])
def test_one_graph_serves_every_step(labels, method):
    params = {"layer": [torch.randn(3, 2), torch.randn(2)], "body": torch.randn(2, 2)}
    opt = Partition(
        {"moving": AdamW(lr=0.1), "other": AdamW(lr=0.01), "frozen": Frozen()},
        {
            "function": lambda name, leaf: {"layer.0": "moving", "layer.1": "other"}.get(
                name, "frozen"
            ),
            "patterns": {
                re.compile("0$"): "moving",
                re.compile("1$"): "other",
                re.compile("^body"): "frozen",
            },
            "tree": {"layer": ["moving", "other"], "body": "frozen"},
        }[labels],
    )
    torch.compiler.reset()
    step = torch.compile(getattr(opt, method), fullgraph=True, backend="aot_eager")
    ours = (clone(params), opt.init(params))
    theirs = (clone(params), opt.init(params))
    try:
        for _ in range(4):
            grads = random_like(params)
            ours = step(grads, ours[1], ours[0])
            theirs = opt.update(grads, theirs[1], theirs[0])
            assert_close(ours, theirs, rtol=2e-6)
            torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")


def test_it_refuses_to_write_under_a_transform():
    params = {"first": torch.ones(3, 2), "second": torch.ones(3, 2)}
    opt = two(second=Halved(AdamW()))
    state = vmap(opt.init)(params)
    with pytest.raises(RuntimeError, match=r"update_\(\) writes in place.*Use update\(\)"):
        vmap(opt.update_)(params, state, params)


# A value, and its state.


def test_it_is_an_optimizer_by_its_shape_alone():
    for opt in (two(), Frozen()):
        assert isinstance(opt, funcopt.Optimizer)
        public = {name for name in dir(opt) if not name.startswith("_")}
        assert public == {f.name for f in dataclasses.fields(opt)} | {"init", "update", "update_"}


def test_equal_ones_are_equal_and_changing_the_dict_changes_nothing():
    inner = {"a": AdamW(), "b": Frozen()}
    opt = Partition(inner, by_first_key)
    del inner["b"]
    assert opt == Partition({"a": AdamW(), "b": Frozen()}, by_first_key)
    assert pickle.loads(pickle.dumps(opt)) == opt


def test_the_state_is_by_label_and_name_and_a_checkpoint_resumes_to_the_bit():
    params = {"first": {"w": torch.randn(3)}, "second": torch.randn(2)}
    gradients = [random_like(params) for _ in range(3)]
    opt = two(second=Frozen())
    moved, state = run(opt, params, gradients[:2])
    saved = interop.to_state_dict(state)
    assert list(saved) == [
        "funcopt.format",
        "state.inner['first'].step",
        "state.inner['first'].exp_avg['first.w']",
        "state.inner['first'].exp_avg_sq['first.w']",
    ]
    resumed = interop.from_state_dict(opt.init(params), saved)
    assert isinstance(resumed, PartitionState)
    assert_same_bits(
        opt.update(gradients[2], resumed, moved), opt.update(gradients[2], state, moved)
    )


@pytest.mark.parametrize("method", ["update", "update_"])
def test_what_comes_back_has_the_structure_and_the_order_of_keys_that_was_given(method):
    params = OrderedDict(
        z=torch.randn(2), a=Point([torch.randn(3)], {"y": torch.randn(2), "b": torch.randn(1)})
    )
    opt = Partition(
        {"even": AdamW(lr=0.1), "odd": AdamW(lr=0.2)},
        lambda name, leaf: "even" if leaf.numel() % 2 == 0 else "odd",
    )
    moved, _ = getattr(opt, method)(random_like(params), opt.init(params), params)
    assert list(moved) == ["z", "a"]
    assert list(moved["a"].y) == ["y", "b"]
    assert_same_bits(tree_map(torch.zeros_like, moved), tree_map(torch.zeros_like, params))


def test_partitions_and_their_gradients_may_be_nested_and_in_another_order():
    params = {"first": torch.randn(3), "second": {"b": torch.randn(2), "a": torch.randn(2)}}
    inner = Partition({"a": AdamW(lr=0.5), "b": Frozen()}, lambda name, leaf: name[-1])
    opt = two(second=inner)
    grads = random_like(params)
    turned = {"second": dict(reversed(grads["second"].items())), "first": grads["first"]}
    moved, _ = opt.update(turned, opt.init(params), params)
    bare = AdamW(lr=0.5)
    expected, _ = bare.update(
        grads["second"]["a"], bare.init(params["second"]["a"]), params["second"]["a"]
    )
    assert_same_bits(moved["second"]["a"], expected)
    assert moved["second"]["b"] is params["second"]["b"]
    in_place = clone(params)
    opt.update_(grads, opt.init(in_place), in_place)
    assert_same_bits(in_place, moved)


# Frozen leaves.


@pytest.mark.parametrize("method", ["update", "update_"])
@pytest.mark.parametrize("given", ["missing", "None", "a gradient"])
def test_frozen_leaves_are_passed_through_whatever_their_gradients(given, method):
    params = {
        "first": torch.randn(3),
        "second": [nn.Parameter(torch.randn(2)), torch.tensor([1, 2])],
    }
    frozen, versions = list(params["second"]), [leaf._version for leaf in params["second"]]
    grads = {"first": torch.ones(3)}
    if given == "None":
        grads["second"] = [None, None]
    if given == "a gradient":
        grads["second"] = [torch.ones(2), None]
    opt = two(second=Frozen())
    state = opt.init(params)
    assert state.inner["second"] == ()
    moved, state = getattr(opt, method)(grads, state, params)
    assert all(new is old for new, old in zip(moved["second"], frozen, strict=True))
    assert [leaf._version for leaf in frozen] == versions
    assert state.inner["second"] == ()
    assert state.inner["first"].step == 1


@pytest.mark.parametrize("method", ["update", "update_"])
def test_a_gradient_that_is_missing_elsewhere_or_has_no_parameter_is_an_error(method):
    params = {"first": torch.ones(3), "second": torch.ones(2)}
    opt = two(second=Frozen())
    state = opt.init(params)
    for grads, message in (
        ({"second": torch.ones(2)}, r"no grads\['first'\] for params\['first'\]"),
        ({"first": torch.ones(3), "third": None}, r"grads\['third'\] without a parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(opt, method)(grads, state, params)


def test_frozen_alone_gives_back_what_it_was_given_under_any_transform():
    params = torch.randn(3, 2)
    opt = Frozen()
    moved, state = vmap(opt.update_)(params, opt.init(params), params)
    assert state == ()
    assert_same_bits(moved, params)
    slope = grad(lambda p: opt.update(None, (), p)[0].sum())(params)
    assert_same_bits(slope, torch.ones(3, 2))


# Labels.


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


# All or none.


INNERS = {
    "AdamW and AdamW": lambda second: two(AdamW(lr=0.1), second),
    "AdamW and any": lambda second: two(AdamW(lr=0.1), Halved(second)),
    "any and AdamW": lambda second: two(Halved(AdamW(lr=0.1)), second),
    "any and any": lambda second: two(Halved(AdamW(lr=0.1)), Halved(second)),
}


def stale(state, **changed):
    """The state with something in that of the second group replaced."""
    inner = state.inner["second"]
    own = inner if isinstance(inner, funcopt.AdamWState) else inner[0]
    new = own._replace(**changed)
    second = new if own is inner else (new,)
    return PartitionState({**state.inner, "second": second})


def faults():
    """What may be wrong in the second group: a function of (opt, grads, state, params)."""
    nan = torch.tensor(float("nan"), dtype=torch.float64)
    tracked = torch.ones(2, requires_grad=True)

    def grads_are(leaf):
        return lambda g, s, p: ({**g, "second": leaf}, s, p)

    return {
        "a gradient of another dtype": grads_are(torch.ones(2).double()),
        "a gradient of another shape": grads_are(torch.ones(1)),
        "a gradient with a history": grads_are(tracked * 2),
        "no gradient key": lambda g, s, p: ({"first": g["first"]}, s, p),
        "a count that is NaN": lambda g, s, p: (g, stale(s, step=nan), p),
        "a count of integers in 16 bits": lambda g, s, p: (
            g,
            stale(s, step=torch.zeros((), dtype=torch.int16)),
            p,
        ),
        "a moment of another shape": lambda g, s, p: (
            g,
            stale(s, exp_avg={"second": torch.zeros(3)}),
            p,
        ),
        "moments that share their memory": lambda g, s, p: (
            g,
            stale(s, exp_avg=p, exp_avg_sq=p),
            p,
        ),
        "an expanded parameter": lambda g, s, p: (g, s, {**p, "second": torch.ones(1).expand(2)}),
        "a parameter with a history": lambda g, s, p: (g, s, {**p, "second": tracked * 1}),
        "a parameter that is another one": lambda g, s, p: (
            g,
            s,
            {**p, "second": p["first"][:2]},
        ),
        "a gradient that is a parameter of the first group": lambda g, s, p: (
            {**g, "second": p["first"][:2]},
            s,
            p,
        ),
        "a moment that is a parameter of the first group": lambda g, s, p: (
            g,
            stale(s, exp_avg={"second": p["first"][:2]}),
            p,
        ),
    }


@pytest.mark.parametrize("fault", faults())
@pytest.mark.parametrize("inner", INNERS)
def test_a_fault_in_the_second_group_leaves_the_first_unmoved(inner, fault):
    opt = INNERS[inner](AdamW(lr=0.1))
    params = {"first": torch.randn(3), "second": torch.randn(2)}
    state = opt.init(params)
    given = faults()[fault](random_like(params), state, params)
    before = [leaf.detach().clone() for leaf in leaves(given)]
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        opt.update_(*given)
    for leaf, old in zip(leaves(given), before, strict=True):
        torch.testing.assert_close(leaf.detach(), old, rtol=0, atol=0, equal_nan=True)


def test_a_fault_in_the_first_group_leaves_the_second_unmoved():
    for build in INNERS.values():
        opt = build(AdamW(lr=0.1))
        params = {"first": torch.randn(3), "second": torch.randn(2)}
        state = opt.init(params)
        before = clone((params, state))
        with pytest.raises(ValueError, match=r"\['first'\]: shape \(1,\)"):
            opt.update_({"first": torch.ones(1), "second": torch.ones(2)}, state, params)
        assert_same_bits((params, state), before)


HYPERPARAMETERS = {
    "a learning rate with a history": torch.tensor(0.1, requires_grad=True),
    "a schedule that gives NaN": lambda step: float("nan"),
    "a schedule with a history": lambda step: torch.tensor(0.1, requires_grad=True) * 1,
    "stacked learning rates": torch.tensor([0.1, 0.2]),
}


@pytest.mark.parametrize("fault", HYPERPARAMETERS)
@pytest.mark.parametrize("inner", INNERS)
def test_a_wrong_number_in_the_second_group_leaves_the_first_unmoved(inner, fault):
    opt = INNERS[inner](AdamW(lr=HYPERPARAMETERS[fault]))
    params = {"first": torch.randn(3), "second": torch.randn(2)}
    state = opt.init(params)
    before = clone((params, state))
    with pytest.raises((ValueError, RuntimeError)):
        opt.update_(random_like(params), state, params)
    assert_same_bits((params, state), before)


@pytest.mark.parametrize("inner", INNERS)
def test_a_learning_rate_that_became_nan_leaves_the_first_group_unmoved(inner):
    lr = torch.tensor(0.1)
    opt = INNERS[inner](AdamW(lr=lr))
    params = {"first": torch.randn(3), "second": torch.randn(2)}
    state = opt.init(params)
    before = clone((params, state))
    lr.fill_(float("nan"))
    with pytest.raises(ValueError, match="lr=nan"):
        opt.update_(random_like(params), state, params)
    assert_same_bits((params, state), before)


@pytest.mark.parametrize("method", ["init", "update", "update_"])
def test_weights_tied_across_groups_are_refused(method):
    shared = torch.ones(3)
    params = {"first": shared, "second": shared}
    opt = two(second=Frozen())
    state = opt.init(clone(params))
    arguments = (params,) if method == "init" else (clone(params), state, params)
    with pytest.raises(ValueError, match=r"params\['second'\] shares its memory with params\['fi"):
        getattr(opt, method)(*arguments)


@pytest.mark.parametrize("inner", INNERS)
def test_update_in_place_writes_into_the_memory_it_was_given(inner):
    opt = INNERS[inner](AdamW(lr=0.1, amsgrad=True))
    params = {"first": nn.Parameter(torch.randn(3)), "second": nn.Parameter(torch.randn(2))}
    gradients = [random_like(params) for _ in range(3)]
    plain = {name: param.detach().clone() for name, param in params.items()}
    expected = run(opt, plain, gradients)
    state = opt.init(params)
    pointers = [leaf.data_ptr() for leaf in leaves((params, state))]
    for grads in gradients:
        moved = opt.update_(grads, state, params)
        assert moved[0] is params
        assert moved[1] is state
    assert_same_bits((params, state), expected)
    assert [leaf.data_ptr() for leaf in leaves((params, state))] == pointers
    assert all(param.is_leaf and param.requires_grad for param in params.values())
