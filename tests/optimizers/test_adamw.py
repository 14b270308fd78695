"""AdamW's numbers and its value semantics."""

import copy
import dataclasses
import pickle
from collections import OrderedDict

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch.func import vmap

import funcopt
from funcopt import AdamW

from .. import oracle
from ..cases import (
    KERNELS,
    OPTIONS,
    TORCH_FLAGS,
    assert_close,
    assert_same_bits,
    clone,
    leaves,
    random_like,
    run,
    tree_map,
    trees,
)

MIXED_SHAPES = [(3, 4), (), (5,), (0,), (1,), (2, 3, 4)]


def torch_run(params, gradients, **options):
    """Run torch.optim.AdamW on copies; return its parameters and its state, leaf by leaf."""
    params = [torch.nn.Parameter(param.clone()) for param in params]
    opt = torch.optim.AdamW(params, **options)
    for grads in gradients:
        for param, grad in zip(params, grads, strict=True):
            param.grad = None if grad is None else grad.clone()
        opt.step()
    return [param.detach() for param in params], [opt.state.get(param, {}) for param in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_are_torchs_over_100_steps(options, kernel, dtype):
    params = [torch.randn(shape, dtype=dtype) for shape in MIXED_SHAPES]
    gradients = [random_like(params) for _ in range(100)]
    opt = AdamW(kernel=kernel, **options)
    theirs, their_state = torch_run(params, gradients, **options, **TORCH_FLAGS[kernel])

    ours, state = run(opt, params, gradients)
    in_place, state_in_place = clone(params), opt.init(params)
    for grads in gradients:
        opt.update_(grads, state_in_place, in_place)

    assert_same_bits(ours, theirs)
    assert_same_bits(in_place, theirs)
    assert_same_bits(state, state_in_place)
    for index, their in enumerate(their_state):
        assert state.step == their["step"]
        for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if opt.amsgrad else [])):
            assert torch.equal(getattr(state, name)[index], their[name]), name


@pytest.mark.parametrize("kernel", KERNELS)
def test_auto_and_every_kernel_agree_to_a_few_ulp(kernel):
    params = trees(torch.float64)["nested"]
    gradients = [random_like(params) for _ in range(20)]
    options = {"amsgrad": True, "weight_decay": 0.1, "lr": 0.1}
    results = [run(AdamW(kernel=k, **options), params, gradients) for k in ("auto", kernel)]
    assert_close(*results, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_results_are_the_papers_in_float64(options, kernel):
    param = torch.randn(7, dtype=torch.float64)
    gradients = [torch.randn_like(param) * 10.0 ** (i % 7 - 3) for i in range(50)]
    ours, ours_state = run(AdamW(kernel=kernel, **options), param, gradients)
    expected, state = param, oracle.init(param)
    for grad in gradients:
        expected, state = oracle.update(grad, state, expected, **options)
    assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    assert_close(ours_state.exp_avg_sq, state.exp_avg_sq, rtol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_leaves_are_the_papers_rounded(dtype, kernel):
    """Each step is computed in float32 from what is stored: within an ulp of rounding the oracle's.

    A step is compared at a time, since a stored ulp of difference would feed back.
    """
    param = torch.randn(50).to(dtype)
    opt = AdamW(lr=0.1, weight_decay=0.1, kernel=kernel)
    state = opt.init(param)
    for step in range(10):
        grad = torch.randn(50).to(dtype)
        wide = oracle.OracleState(
            float(step), state.exp_avg.double(), state.exp_avg_sq.double(), torch.zeros(50)
        )
        expected, moments = oracle.update(
            grad.double(), wide, param.double(), lr=0.1, weight_decay=0.1
        )
        param, state = opt.update(grad, state, param)
        ulp = torch.finfo(dtype).eps
        tiny = torch.finfo(dtype).smallest_normal * ulp
        assert_close(param.double(), expected, rtol=ulp, atol=1e-4)
        assert_close(state.exp_avg.double(), moments.exp_avg, rtol=ulp, atol=2 * tiny)
        assert_close(state.exp_avg_sq.double(), moments.exp_avg_sq, rtol=ulp, atol=2 * tiny)


# Where the second moment of gradients of 1 stops in bfloat16, where it should be 1: in torch's
# kernels, and here in all, which go the way of the fused one.
PLATEAUS = {
    0.999: {"fused": 0.25, "foreach": 0.5, "plain": 0.5},
    0.99: {"fused": 0.8046875, "foreach": 0.8359375, "plain": 0.98046875},
    0.95: {"fused": 0.9609375, "foreach": 0.96484375, "plain": 0.98046875},
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("beta2", PLATEAUS)
def test_in_bfloat16_the_second_moment_stops_below_its_limit(beta2, kernel):
    ones = torch.ones(32, dtype=torch.bfloat16)
    opt, params = AdamW(betas=(0.9, beta2), kernel=kernel, moments=None), ones.clone()
    theirs = torch.nn.Parameter(ones.clone())
    reference = torch.optim.AdamW([theirs], betas=(0.9, beta2), **TORCH_FLAGS[kernel])
    theirs.grad = ones
    state = opt.init(params)
    for _ in range(1500):
        opt.update_(ones, state, params)
        reference.step()
    assert state.exp_avg_sq.unique().tolist() == [PLATEAUS[beta2]["fused"]]
    assert reference.state[theirs]["exp_avg_sq"].unique().tolist() == [PLATEAUS[beta2][kernel]]
    for _ in range(100):
        opt.update_(torch.zeros_like(ones), state, params)
    falls = state.exp_avg_sq < PLATEAUS[beta2]["fused"]
    assert not falls.any() if beta2 == 0.999 else falls.all()


def test_in_bfloat16_the_second_moment_of_normal_gradients_only_rises():
    generator = torch.Generator().manual_seed(1)
    opt, params = AdamW(moments=None), torch.zeros(4096, dtype=torch.bfloat16)
    state, before = opt.init(params), torch.zeros(())
    for _ in range(4000):
        grads = torch.randn(4096, generator=generator).bfloat16()
        opt.update_(grads, state, params)
        assert (state.exp_avg_sq >= before).all()
        before = state.exp_avg_sq.clone()
    assert 1.39 < before.float().mean() < 1.44


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64],
    ids=str,
)
def test_zero_gradients_move_nothing_without_weight_decay(dtype, kernel):
    params = [torch.randn(3).to(dtype), torch.ones((), dtype=dtype)]
    zeros = tree_map(torch.zeros_like, params)
    moved, state = run(AdamW(weight_decay=0.0, kernel=kernel), params, [zeros] * 3)
    assert_same_bits(moved, params)
    assert all(leaf.isfinite().all() for leaf in leaves(state))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_complex_leaves_are_pairs_of_real_ones(kernel, amsgrad):
    params = [torch.randn(3, 2, dtype=torch.complex128), torch.randn((), dtype=torch.complex128)]
    gradients = [random_like(params) for _ in range(5)]
    opt = AdamW(lr=0.1, amsgrad=amsgrad, kernel=kernel)
    ours, state = run(opt, params, gradients)
    pairs, pair_state = run(
        opt,
        tree_map(torch.view_as_real, params),
        [tree_map(torch.view_as_real, grads) for grads in gradients],
    )
    assert_same_bits(tree_map(torch.view_as_real, ours), pairs)
    assert_same_bits(tree_map(torch.view_as_real, state.exp_avg_sq), pair_state.exp_avg_sq)


@pytest.mark.parametrize("in_place", [False, True])
def test_conjugate_views_are_read_and_written_right(in_place):
    plain = torch.randn(3, dtype=torch.complex64)
    grad = torch.randn(3, dtype=torch.complex64)
    opt = AdamW(lr=0.1)
    expected, _ = opt.update(grad, opt.init(plain), plain)

    lazy = plain.conj().resolve_conj().conj()
    assert lazy.is_conj()
    lazy_grad = grad.conj().resolve_conj().conj()
    update = opt.update_ if in_place else opt.update
    moved, _ = update(lazy_grad, opt.init(lazy), lazy)
    assert_close(moved.resolve_conj(), expected)


# The count of updates.


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("step", [0, 1, 10, 1000, 2**24, 2**25 + 1, 2**40])
def test_bias_corrections_are_right_and_the_count_goes_on_at_every_size(step, kernel):
    param, grad = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    opt = AdamW(kernel=kernel)
    state = opt.init(param)._replace(step=torch.tensor(float(step), dtype=torch.float64))
    ours, after = opt.update(grad, state, param)
    expected, _ = oracle.update(grad, oracle.init(param)._replace(step=float(step)), param)
    assert after.step.item() == step + 1
    assert_close(ours, expected, rtol=1e-13, atol=0)


def test_bias_corrections_of_tensor_hyperparameters_have_float64s_digits():
    param, grad = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    expected, _ = oracle.update(grad, oracle.init(param), param, betas=(0.9, 0.999), lr=0.1)

    def number(value):
        return torch.tensor(value, dtype=torch.float64)

    opt = AdamW(lr=number(0.1), betas=(number(0.9), number(0.999)), kernel="plain")
    eager, _ = opt.update(grad, opt.init(param), param)
    mapped, _ = vmap(lambda opt, g: opt.update(g, opt.init(param), param))(
        tree_map(lambda t: t.repeat(2), opt), grad.repeat(2, 1)
    )
    assert_close(eager, expected, rtol=1e-14, atol=0)
    assert_close(mapped[0], expected, rtol=1e-14, atol=0)


def test_a_leaf_without_a_gradient_is_left_alone_and_the_count_goes_on():
    params = {"a": torch.randn(3), "b": torch.randn(2)}
    opt = AdamW(amsgrad=True)
    _, state = run(opt, params, [random_like(params)])
    moved, after = opt.update({"a": None, "b": torch.ones(2)}, state, params)
    assert torch.equal(moved["a"], params["a"])
    assert not torch.equal(moved["b"], params["b"])
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(getattr(after, name)["a"], getattr(state, name)["a"])
    assert after.step == 2


def test_no_gradient_at_all_still_counts_as_an_update():
    opt = AdamW()
    params = [torch.ones(2)]
    moved, state = opt.update([None], opt.init(params), params)
    assert torch.equal(moved[0], params[0])
    assert state.step == 1


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_step_per_leaf_counts_skipped_leaves_as_torch_does(kernel, in_place):
    params = [torch.randn(3), torch.randn(2), torch.randn(4)]
    gradients = [
        [None if (i + j) % 3 == 0 or j == 2 else torch.randn_like(p) for j, p in enumerate(params)]
        for i in range(10)
    ]
    theirs, their_state = torch_run(params, gradients, lr=0.1, **TORCH_FLAGS[kernel])
    opt = AdamW(lr=0.1, kernel=kernel, step_per_leaf=True)
    ours, state = clone(params), opt.init(params)
    for grads in gradients:
        ours, state = (opt.update_ if in_place else opt.update)(grads, state, ours)
    assert_same_bits(ours, theirs)
    assert [int(step) for step in state.step] == [int(s.get("step", 0)) for s in their_state]


# Schedules.


def test_a_schedule_is_called_with_the_count_before_the_update():
    seen = []

    def schedule(step):
        seen.append(step.item())
        return 0.1 / (1 + step)

    params = torch.ones(3)
    gradients = [torch.ones(3)] * 3
    ours, _ = run(AdamW(lr=schedule, weight_decay=lambda step: 0.1 * step), params, gradients)
    expected, state = params, AdamW().init(params)
    for i, grads in enumerate(gradients):
        expected, state = AdamW(lr=0.1 / (1 + i), weight_decay=0.1 * i).update(
            grads, state, expected
        )
    assert seen == [0.0, 1.0, 2.0]
    assert_close(ours, expected, rtol=1e-6)


def test_a_schedule_works_under_vmap_with_a_step_of_each_members_own():
    opt = AdamW(lr=lambda step: 0.1 / (1 + step))
    params, grads = torch.randn(4, 3), torch.randn(4, 3)
    state = vmap(opt.init)(params)._replace(step=torch.arange(4.0, dtype=torch.float64))
    mapped, _ = vmap(opt.update)(grads, state, params)
    for i in range(4):
        own = tree_map(lambda t, i=i: t[i], state)
        assert_close(mapped[i], opt.update(grads[i], own, params[i])[0])


# A value.


def test_the_repr_shows_what_was_given_and_rebuilds_the_value():
    opt = AdamW(lr=0.1, betas=[0.8, 0.9], amsgrad=True)
    assert eval(repr(opt), {"AdamW": AdamW}) == opt
    assert repr(opt) == "AdamW(lr=0.1, betas=(0.8, 0.9), amsgrad=True)"


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, dataclasses.replace], ids=["copy", "deepcopy", "replace"]
)
def test_copies_are_equal(copied):
    opt = AdamW(lr=0.1, maximize=True)
    assert copied(opt) == opt
    assert hash(copied(opt)) == hash(opt)


def test_optimizer_and_state_survive_pickling():
    opt = AdamW(lr=torch.tensor(0.1), amsgrad=True)
    state = opt.init({"w": torch.ones(2)})
    opt_again, state_again = pickle.loads(pickle.dumps((opt, state)))
    assert_same_bits(state_again, state)
    assert torch.equal(opt_again.lr, opt.lr)
    assert opt_again.amsgrad


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdamW().lr = 1.0


def test_it_is_an_optimizer_by_its_shape_alone():
    assert isinstance(AdamW(), funcopt.Optimizer)
    public = {name for name in dir(AdamW()) if not name.startswith("_")}
    methods, said = {"init", "update", "update_"}, {"rule"}
    assert public == {f.name for f in dataclasses.fields(AdamW)} | methods | said


@pytest.mark.parametrize(
    "tree_map", [torch_pytree.tree_map, optree.tree_map], ids=["torch", "optree"]
)
def test_its_tensors_are_leaves_and_the_rest_is_structure(tree_map):
    opt = AdamW(lr=torch.tensor(0.1), betas=(0.9, torch.tensor(0.99)), amsgrad=True)
    doubled = tree_map(lambda t: t * 2, opt)
    assert torch.equal(doubled.lr, opt.lr * 2)
    assert torch.equal(doubled.betas[1], opt.betas[1] * 2)
    assert dataclasses.replace(doubled, lr=0, betas=(0, 0)) == dataclasses.replace(
        opt, lr=0, betas=(0, 0)
    )


def test_its_leaves_have_names():
    opt = AdamW(lr=torch.tensor(0.1), betas=(0.9, torch.tensor(0.99)))
    found, _ = torch_pytree.tree_flatten_with_path(opt)
    assert [torch_pytree.keystr(path) for path, _ in found] == [".lr", ".betas[1]"]


def test_one_that_was_rebuilt_around_placeholders_has_the_same_structure():
    opt = AdamW(lr=torch.tensor(0.1))
    structure = torch_pytree.tree_structure(opt)
    for placeholder in (None, 0, 1.0, object()):
        rebuilt = torch_pytree.tree_unflatten([placeholder], structure)
        assert torch_pytree.tree_structure(rebuilt).num_leaves == 1
        assert torch_pytree.tree_leaves(rebuilt) == [placeholder]


def test_a_population_is_a_stacked_optimizer_that_can_be_indexed():
    lrs = torch.tensor([0.1, 0.2, 0.3])
    members = [tree_map(lambda t, i=i: t[i], AdamW(lr=lrs)) for i in range(3)]
    params, grads = torch.randn(3, 2), torch.randn(3, 2)
    mapped, _ = vmap(lambda opt, g, p: opt.update(g, opt.init(p), p))(AdamW(lr=lrs), grads, params)
    for i, member in enumerate(members):
        assert_close(mapped[i], member.update(grads[i], member.init(params[i]), params[i])[0])


@pytest.mark.parametrize("name", trees())
def test_init_gives_zeros_in_the_structure_and_layout_of_the_parameters(name):
    params = trees()[name]
    state = AdamW(amsgrad=True).init(params)
    structure = optree.tree_structure(params, namespace="torch")
    for tree in (state.exp_avg, state.exp_avg_sq, state.max_exp_avg_sq):
        assert optree.tree_structure(tree, namespace="torch") == structure
        for zero, param in zip(leaves(tree), leaves(params), strict=True):
            assert zero.stride() == param.stride()
            assert not zero.any()
    assert AdamW().init(params).max_exp_avg_sq == ()
    pointers = [leaf.data_ptr() for leaf in leaves(state) if leaf.numel()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("in_place", [False, True])
def test_counts_of_each_leaf_may_stand_in_another_kind_of_tree(in_place):
    opt = AdamW(step_per_leaf=True)
    params = OrderedDict(b=torch.ones(2), a=torch.ones(3))
    state = opt.init(dict(params))
    update = opt.update_ if in_place else opt.update
    _, state = update({"b": torch.ones(2), "a": None}, state, params)
    assert state.step == {"b": 1, "a": 0}


def test_a_bare_tensor_without_a_gradient_counts_the_update():
    opt = AdamW()
    assert opt.update(None, opt.init(torch.ones(2)), torch.ones(2))[1].step == 1


def test_the_count_is_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert AdamW().init(torch.ones(2)).step.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.bool])
def test_a_count_that_cannot_count_far_is_refused(dtype):
    opt = AdamW()
    state = opt.init(torch.ones(2))._replace(step=torch.zeros((), dtype=dtype))
    with pytest.raises(TypeError, match=f"state.step is of {dtype} and .*can count far"):
        opt.update(torch.ones(2), state, torch.ones(2))
