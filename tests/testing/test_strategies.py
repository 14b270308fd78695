"""The strategies: what they draw, what they refuse, how they shrink, and that they are quick."""

import time
from collections import OrderedDict

import pytest
import torch
from hypothesis import HealthCheck, find, given, settings
from hypothesis.errors import InvalidArgument

from funcopt import Adafactor, AdamW, MasterWeights, Optimizer
from funcopt._core import pytree
from funcopt.testing import strategies
from funcopt.testing._tensors import LAYOUTS, VALUES
from funcopt.testing._trees import NODES, Box, Pair

quickly = settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
patiently = settings(quickly, max_examples=5000)


def seen(strategy, examples=300):
    """What a strategy draws."""
    drawn = []

    @settings(quickly, max_examples=examples)
    @given(strategy)
    def collect(thing):
        drawn.append(thing)

    collect()
    return drawn


def test_tensors_are_finite_and_of_every_dtype_and_layout():
    drawn = seen(strategies.tensors())
    assert all(tensor.isfinite().all() for tensor in drawn)
    assert {tensor.dtype for tensor in drawn} == {
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.complex64, torch.complex128),
    }
    assert any(tensor.ndim == 0 for tensor in drawn)
    assert any(tensor.numel() == 0 for tensor in drawn)
    assert any(not tensor.is_contiguous() for tensor in drawn)
    assert any(0 in tensor.stride() and tensor.numel() > 1 for tensor in drawn)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_kinds_of_values_are_what_they_are_called(values, dtype):
    drawn = seen(strategies.tensors(dtype=dtype, shape=(50,), values=[values]), 20)
    tiny = torch.finfo(dtype).smallest_normal
    found = torch.stack(drawn).double().abs()
    promised = {
        "zeros": not found.any(),
        "ones": bool((found == 1).all()),
        "normal": 0.1 < found.mean() < 10,
        "sparse": bool((found == 0).any()) and bool((found > 0.1).any()),
        "tiny": 0 < found.max() < tiny,
        "huge": found.max() > torch.finfo(dtype).max / 10,
    }
    assert promised[values]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_no_value_but_expanded(layout):
    def drawn(kind):
        return strategies.build((2, 3, 4), torch.float32, "normal", kind, 0)

    plain, other = drawn("contiguous"), drawn(layout)
    assert torch.equal(other, plain[:1].expand(2, 3, 4) if layout == "expanded" else plain)
    assert (other.stride() == plain.stride()) == (layout == "contiguous")


@pytest.mark.parametrize("kind", [dict, list, tuple, torch.Tensor, OrderedDict, Pair, Box])
def test_trees_have_every_sort_of_node(kind):
    find(strategies.trees(), lambda tree: type(tree) is kind, settings=patiently)


def test_dicts_are_not_always_sorted():
    def is_unsorted(tree):
        return type(tree) is dict and list(tree) != sorted(tree)

    find(strategies.trees(), is_unsorted, settings=patiently)


@pytest.mark.parametrize("node", NODES)
def test_every_node_holds_the_leaves_it_is_given(node):
    for tree in seen(strategies.trees(nodes=[node], min_leaves=0), 30):
        leaves, structure = pytree.flatten(tree)
        assert structure == pytree.flatten(pytree.unflatten(structure, leaves))[1]


@quickly
@given(strategies.params().flatmap(lambda p: strategies.gradients(p).map(lambda g: (p, g))))
def test_gradients_are_like_their_parameters(pair):
    params, grads = pair
    leaves, structure = pytree.flatten(params)
    own, own_structure = pytree.flatten(grads)
    assert own_structure == structure
    for p, g in zip(leaves, own, strict=True):
        assert (p.shape, p.dtype, p.device) == (g.shape, g.dtype, g.device)


def test_gradients_have_none_only_if_asked():
    params = [torch.ones(2), torch.ones(2)]

    def nones(**options):
        return sum(
            g is None for grads in seen(strategies.gradients(params, **options)) for g in grads
        )

    assert nones() == 0
    assert nones(none=True) > 0


@pytest.mark.parametrize("steps", [1, 3])
def test_sequences_have_as_many_steps_as_asked(steps):
    drawn = seen(strategies.gradient_sequences([torch.ones(2)], steps), 10)
    assert {len(sequence) for sequence in drawn} == {steps}


@quickly
@given(strategies.optimizers())
def test_optimizers_are_optimizers(opt):
    assert isinstance(opt, Optimizer)


def test_adamws_keep_what_is_fixed_and_may_have_tensors():
    drawn = seen(strategies.adamws(amsgrad=True, tensor=True), 50)
    assert all(opt.amsgrad for opt in drawn)
    assert any(isinstance(opt.lr, torch.Tensor) for opt in drawn)
    assert all(isinstance(opt, AdamW) for opt in drawn)


def test_optimizers_are_drawn_in_every_precision():
    drawn = seen(strategies.adamws(), 200)
    halves = {torch.bfloat16, torch.float16}
    assert {opt.moments for opt in drawn} == {"auto", None, torch.float32, *halves}
    assert {opt.rounding for opt in drawn} == {"nearest", "stochastic"}
    assert {opt.seed for opt in drawn if opt.rounding == "nearest"} == {0}
    nearest = seen(strategies.precisions(half=False, stochastic=False), 50)
    assert {own["moments"] for own in nearest} == {"auto", None, torch.float32}
    assert {own["rounding"] for own in nearest} == {"nearest"}


def test_for_an_optimizer_of_real_leaves_alone_no_parameter_is_complex():
    drawn = seen(strategies.params_for(MasterWeights(Adafactor())), 100)
    assert not any(leaf.is_complex() for tree in drawn for leaf in pytree.flatten(tree)[0])


def test_beside_moments_in_16_bits_no_parameter_is_complex():
    drawn = seen(strategies.params_for(MasterWeights(AdamW(moments=torch.bfloat16))), 100)
    assert not any(leaf.is_complex() for tree in drawn for leaf in pytree.flatten(tree)[0])
    drawn = seen(strategies.params_for(AdamW()), 100)
    assert any(leaf.is_complex() for tree in drawn for leaf in pytree.flatten(tree)[0])


REFUSED = {
    "min_side=3, max_side=2": lambda: strategies.shapes(min_side=3, max_side=2),
    "min_dims=-1": lambda: strategies.shapes(min_dims=-1),
    "dtype='float32'": lambda: strategies.tensors(dtype="float32"),
    "dtype=torch.int64": lambda: strategies.tensors(dtype=torch.int64),
    "shape=3": lambda: strategies.tensors(shape=3),
    "values=\\['odd'\\]": lambda: strategies.tensors(values=["odd"]),
    "layouts=\\[\\]": lambda: strategies.tensors(layouts=[]),
    "nodes=\\['set'\\]": lambda: strategies.trees(nodes=["set"]),
    "min_leaves=5, max_leaves=2": lambda: strategies.trees(min_leaves=5, max_leaves=2),
    "steps=0": lambda: strategies.gradient_sequences([torch.ones(1)], 0),
    "momentum=0.9": lambda: strategies.adamws(momentum=0.9),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_bad_option_is_refused_with_its_value(message):
    with pytest.raises(InvalidArgument, match=message):
        REFUSED[message]()


def test_a_failing_tree_shrinks_to_the_smallest():
    def has_a_matrix(tree):
        return any(leaf.ndim == 2 and leaf.numel() > 0 for leaf in pytree.flatten(tree)[0])

    smallest = find(strategies.params(), has_a_matrix, settings=settings(quickly, max_examples=500))
    leaves = pytree.flatten(smallest)[0]
    assert [tuple(leaf.shape) for leaf in leaves] == [(1, 1)]
    assert leaves[0].item() == 0
    assert list(smallest) == ["p0"]


def test_the_same_seed_draws_the_same():
    def drawn():
        things = []

        @settings(quickly, max_examples=20, derandomize=True)
        @given(strategies.params())
        def collect(tree):
            things.append(repr(tree))

        collect()
        return things

    assert drawn() == drawn()


def test_drawing_a_tree_takes_milliseconds_at_most():
    seen(strategies.trees(), 50)
    start = time.perf_counter()
    seen(strategies.trees(), 300)
    assert (time.perf_counter() - start) / 300 < 0.02  # some 1.5 ms on an idle core
