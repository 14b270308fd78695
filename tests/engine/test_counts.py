"""The counts of updates, in every form in which a state may bring them."""

import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch.autograd import forward_ad
from torch.func import jacfwd, jacrev, vmap

from funcopt import (
    Accumulate,
    AdamW,
    Best,
    Cautious,
    Clip,
    Ema,
    Frozen,
    Lookahead,
    LossScale,
    Partition,
    Plateau,
    ScheduleFree,
    SkipNonfinite,
    schedules,
)
from funcopt._engine.dispatch import unserved
from funcopt.schedules import Cosine

from ..cases import assert_close, faded, tree_map

DTYPES = (torch.float64, torch.float32, torch.int64, torch.int32)

CPU = torch.device("cpu")
KERNELS = [name for name in AdamW.rule.kernel_names if unserved(AdamW.rule, name, CPU) is None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_leaf", [False, True])
def test_a_count_keeps_its_dtype_and_both_updates_agree_on_it(dtype, per_leaf):
    opt = AdamW(step_per_leaf=per_leaf)
    params = [torch.ones(2), torch.ones(3)]
    grads = [torch.ones(2), None]
    state = opt.init(params)
    step = [s.to(dtype) for s in state.step] if per_leaf else state.step.to(dtype)
    state = state._replace(step=step)
    for _ in range(2):
        moved, after = opt.update(grads, state, params)
        opt.update_(grads, state, params)
        for new, old in zip(*(_listed(s.step) for s in (after, state)), strict=True):
            assert new.dtype == old.dtype == dtype
            assert new.item() == old.item()
            assert new.data_ptr() != old.data_ptr()
        torch.testing.assert_close(moved, params, rtol=0, atol=0)
    assert [count.item() for count in _listed(state.step)] == ([2, 0] if per_leaf else [2])


def _listed(step):
    return step if isinstance(step, list) else [step]


def test_a_count_in_float64_goes_on_where_float32_stops():
    opt, params = AdamW(), torch.ones(1)
    state = opt.init(params)._replace(step=torch.tensor(2.0**25, dtype=torch.float64))
    _, after = opt.update(params, state, params)
    assert after.step.item() == 2**25 + 1


@pytest.mark.parametrize("count", [-5.0, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_count_that_counts_nothing_is_refused_before_anything_is_written(count, dtype):
    opt, params = AdamW(), torch.ones(1)
    state = opt.init(params)._replace(step=torch.tensor(count, dtype=dtype))
    for update in (opt.update, opt.update_):
        with pytest.raises(ValueError, match="step"):
            update(torch.ones(1), state, params)
    assert params.item() == 1
    assert not state.exp_avg.any()


@pytest.mark.parametrize("devices", [["cuda"], ["cuda", "cpu"], ["cpu"], ["meta"]])
def test_a_new_count_is_on_the_gpu_if_all_parameters_are_on_one(devices):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        params = [torch.empty(2, device=device) for device in devices]
        step = AdamW().init(params).step
    assert step.device.type == ("cuda" if devices == ["cuda"] else "cpu")
    assert step.dtype == torch.float64


def test_a_count_stays_where_it_is_whatever_the_default_device():
    opt, params = AdamW(), {"a": torch.zeros(3)}
    state = opt.init(params)
    with torch.device("meta"):
        _, after = opt.update(params, state, params)
    assert after.step.device.type == "cpu"
    assert after.step.item() == 1


@pytest.mark.parametrize("update", ["update", "update_"])
def test_a_leaf_at_rest_asks_no_schedule_for_a_number(update):
    asked = []

    def rate(count):
        asked.append(count.item())
        return 0.1

    opt = AdamW(lr=rate, weight_decay=rate, step_per_leaf=True)
    params = {"moving": torch.ones(2), "resting": torch.ones(3)}
    state = opt.init(params)
    state.step["moving"].fill_(4)
    _, state = getattr(opt, update)({"moving": torch.ones(2), "resting": None}, state, params)
    assert asked == [4, 4]
    asked.clear()
    getattr(opt, update)({"moving": None, "resting": None}, state, params)
    assert asked == []
    assert (state.step["moving"], state.step["resting"]) == (5, 0)


@pytest.mark.parametrize("update", ["update", "update_"])
def test_a_schedule_that_has_no_value_for_the_count_of_a_leaf_at_rest_is_fine(update):
    opt = AdamW(lr=lambda count: 0.1 / count.item(), weight_decay=0.0, step_per_leaf=True)
    params = {"moving": torch.ones(2), "resting": torch.ones(3)}
    state = opt.init(params)
    state.step["moving"].fill_(2)
    moved, _ = getattr(opt, update)({"moving": torch.ones(2), "resting": None}, state, params)
    # By 0.05 times m / sqrt(v) with m = 0.1 / (1 - 0.9**3) and v = 0.001 / (1 - 0.999**3).
    by = 0.05 * (0.1 / (1 - 0.9**3)) / (0.001 / (1 - 0.999**3)) ** 0.5
    torch.testing.assert_close(moved["moving"], torch.full((2,), 1 - by))


@pytest.mark.parametrize("update", ["update", "update_"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_leaves_that_moved_more_often_than_others_get_what_they_get_alone(kernel, update):
    opt = AdamW(lr=0.1, step_per_leaf=True, kernel=kernel)
    shapes = {"a": (3,), "b": (64,), "c": (5, 2), "d": (3,)}
    counts = {"a": 1.0, "b": 4.0, "c": 2.0, "d": 1.0}

    def given(names):
        leaves = {name: torch.full(shapes[name], counts[name] + 0.5) for name in names}
        step = {name: torch.tensor(counts[name]) for name in names}
        return tree_map(torch.cos, leaves), opt.init(leaves)._replace(step=step), leaves

    moved, state = getattr(opt, update)(*given(shapes))
    for name in shapes:
        alone, own = opt.update(*given([name]))
        assert_close(moved[name], alone[name])
        assert_close(state.exp_avg_sq[name], own.exp_avg_sq[name])
        assert state.step[name] == counts[name] + 1


def test_members_have_counts_of_each_leaf_of_which_some_rest():
    opt = AdamW(lr=schedules.Linear(0.1, 0.0, steps=4), step_per_leaf=True)
    params = {"moving": torch.randn(2, 3), "resting": torch.randn(2, 3)}
    state = vmap(opt.init)(params)
    step = {**state.step, "moving": torch.tensor([0.0, 2.0], dtype=torch.float64)}
    state = state._replace(step=step)
    for given in (torch.randn(2, 3), None):
        grads = {"moving": given, "resting": None}
        dims = {"moving": None if given is None else 0, "resting": None}
        moved = vmap(opt.update, in_dims=(dims, 0, 0))(grads, state, params)
        for i in range(2):
            alone = tree_map(lambda leaf, i=i: leaf[i], (grads, state, params))
            member = tree_map(lambda leaf, i=i: leaf[i], moved)
            assert_close(member, opt.update(*alone), rtol=1e-6)


def test_a_count_at_rest_that_is_written_over_is_refused():
    opt = AdamW(step_per_leaf=True)
    params = {"moving": torch.ones(2), "resting": torch.ones(3)}
    state = opt.init(params)
    shared = state._replace(step=dict.fromkeys(params, state.step["moving"]))
    with pytest.raises(ValueError, match=r"state\.step\['resting'\] shares its memory"):
        opt.update_({"moving": torch.ones(2), "resting": None}, shared, params)
    asking = {**state.step, "resting": torch.zeros((), dtype=torch.float64, requires_grad=True)}
    with pytest.raises(RuntimeError, match=r"state\.step\['resting'\] requires a gradient"):
        opt.update_({"moving": torch.ones(2), "resting": None}, state._replace(step=asking), params)
    assert torch.equal(params["moving"], torch.ones(2))


INNER = AdamW(lr=0.1)
# For each optimizer the counts in its state, and what else of it no derivative of a step knows.
COUNTING = {
    "AdamW": (INNER, {".step"}),
    "a count of each leaf": (AdamW(lr=0.1, step_per_leaf=True), {".step['v']", ".step['w']"}),
    "amsgrad": (AdamW(lr=0.1, amsgrad=True), {".step"}),
    "a function of the count": (AdamW(lr=lambda step: 0.1 / (1 + step)), {".step"}),
    "a schedule": (AdamW(lr=Cosine(peak=0.1, steps=100)), {".step"}),
    "Clip": (Clip(INNER, 0.5), {".inner.step", ".norm"}),
    "Accumulate": (Accumulate(INNER, 2), {".inner.step", ".mini_step"}),
    "SkipNonfinite": (SkipNonfinite(INNER, 3), {".inner.step"}),
    "LossScale": (LossScale(INNER, 1.0), {".inner.step", ".scale"}),
    "Ema": (Ema(INNER, lambda step: 0.9 * step / (1 + step)), {".inner.step", ".n_averaged"}),
    "Lookahead": (Lookahead(INNER, 2, 0.5), {".inner.step", ".steps_since_sync"}),
    "Best": (Best(INNER), {".inner.step", ".step", ".best_value", ".best_step", ".n_worse"}),
    "Cautious": (Cautious(INNER), {".inner.step"}),
    "ScheduleFree": (ScheduleFree(INNER), {".inner.step"}),
    "Transform": (faded(INNER), {".inner.step"}),
    "Plateau": (Plateau(INNER), {".inner.step", ".best_value", ".n_worse", ".cooldown_left"}),
    "Partition": (
        Partition({"a": INNER, "b": Frozen()}, {"w": "a", "v": "b"}),
        {".inner['a'].step"},
    ),
}


def _after_three_updates(opt):
    params = {"w": torch.tensor([1.0, 2.0]), "v": torch.tensor([3.0])}
    grads = {"w": torch.tensor([0.5, -0.25]), "v": torch.tensor([0.125])}
    state = opt.init(params)
    for _ in range(3):
        params, state = opt.update(grads, state, params)
    return grads, state, params


def _by_count(opt):
    """For each count: its path, its value, and the new parameters as a function of it."""
    grads, state, params = _after_three_updates(opt)
    leaves, structure = torch_pytree.tree_flatten_with_path(state)
    for index, (keys, leaf) in enumerate(leaves):

        def moved(count, index=index):
            own = [count if i == index else other for i, (_, other) in enumerate(leaves)]
            return opt.update(grads, torch_pytree.tree_unflatten(own, structure), params)[0]

        if leaf.ndim == 0 and leaf.is_floating_point():
            yield torch_pytree.keystr(keys), leaf, moved


@pytest.mark.parametrize("name", COUNTING)
def test_no_derivative_flows_through_a_count_in_reverse_nor_in_forward_mode(name):
    opt, counts = COUNTING[name]
    differentiated = set()
    for path, count, moved in _by_count(opt):
        if path in counts:
            differentiated.add(path)
            for jacobian in (jacfwd(moved)(count), jacrev(moved)(count)):
                assert not any(slope.any() for slope in jacobian.values()), path
            with forward_ad.dual_level():
                dual = moved(forward_ad.make_dual(count, torch.ones_like(count)))
                tangents = [forward_ad.unpack_dual(leaf).tangent for leaf in dual.values()]
            assert not any(t is not None and t.any() for t in tangents), path
    assert differentiated == counts
