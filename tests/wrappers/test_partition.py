"""Groups of leaves: their numbers, the laws, transforms, and value semantics."""

import dataclasses
import pickle
import re
from collections import OrderedDict

import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap

import funcopt
from funcopt import AdamW, Frozen, Partition, PartitionState, interop
from funcopt.testing import laws, strategies
from funcopt.testing._check import check_law

from .. import oracle
from ..cases import (
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
from ..groups import Halved, all_one, by_first_key, steps_in_place, two

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


@st.composite
def in_two_parts(draw):
    """Trees with leaves for both labels."""
    part = strategies.params().filter(leaves)
    return {"second": draw(part), "first": draw(part)}


# Which rename leaves, and so would give them other labels.
RENAMING = (
    laws.names_do_not_matter,
    laws.leaves_are_independent,
    laws.elements_are_independent,
)

# Which speak of an AdamW as such.
OF_ADAMW = (
    laws.matches_torch,
    laws.matches_oracle,
    laws.decay_is_decoupled,
    laws.scale_invariant,
    laws.first_step_is_sign,
)


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("opt", [two(), two(second=Halved(AdamW(lr=0.5)))], ids=["AdamW", "any"])
def test_every_law_holds_of_two_groups(opt, law, examples):
    verdict = check_law(law, opt, params=in_two_parts(), max_examples=examples(law, by_night=200))
    of_rounding = laws.small_steps_add_up, laws.random_bits_go_by_key
    of_others = laws.matches_reference, laws.missing_gradients_leave_others_alone
    silent = law in (*OF_ADAMW, *RENAMING, *of_rounding, *of_others)
    assert verdict.status == ("not applicable" if silent else "holds"), verdict


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
def test_the_laws_hold_beside_frozen_leaves(law, examples):
    # Of the tree that one of them brings along, the leaf whose gradient is never wrong is frozen.
    opt = Partition(
        {"moving": AdamW(lr=0.1), "frozen": Frozen()},
        lambda name, leaf: "frozen" if name.startswith(("second", "a")) else "moving",
    )
    verdict = check_law(law, opt, params=in_two_parts(), max_examples=examples(law, by_night=200))
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


@pytest.mark.by_day(1)
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
        methods, said = {"init", "update", "update_"}, {"traits"}
        assert public == {f.name for f in dataclasses.fields(opt)} | methods | said


def test_equal_ones_are_equal_and_changing_the_dict_changes_nothing():
    inner = {"a": AdamW(), "b": Frozen()}
    opt = Partition(inner, by_first_key)
    del inner["b"]
    again = Partition({"b": Frozen(), "a": AdamW()}, by_first_key)
    assert opt == again
    assert hash(opt) == hash(again)
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
