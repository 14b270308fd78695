"""The numbers of an update: checked at each one, and given by schedules, in every wrapper."""

import math
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch.func import grad, vmap

from funcopt import (
    Accumulate,
    AdamW,
    Cautious,
    Clip,
    ClipAdaptive,
    ClipValue,
    Ema,
    Lookahead,
    LossScale,
    ScheduleFree,
    SkipNonfinite,
    averaged,
    find,
    interop,
    replace,
)
from funcopt.schedules import Constant, Linear

from ..cases import assert_close, assert_same_bits, clone, leaves, random_like, tree_map

INNER = AdamW(lr=0.1)


class Case(NamedTuple):
    """A number of a wrapper."""

    name: str
    build: Any  # the wrapper with this for its number
    early: float  # the value of a schedule before the third update
    late: float  # and from then on
    bad: float


CASES = {
    "max_norm": Case("max_norm", lambda n: Clip(INNER, n), 0.5, 2.0, -0.5),
    "max_norm, skipping": Case(
        "max_norm", lambda n: Clip(INNER, n, nonfinite="skip"), 0.5, 2.0, -0.5
    ),
    "max_value": Case("max_value", lambda n: ClipValue(INNER, n), 0.5, 1.5, -0.5),
    "clipping": Case("clipping", lambda n: ClipAdaptive(INNER, clipping=n), 0.1, 0.5, -0.5),
    "eps": Case("eps", lambda n: ClipAdaptive(INNER, 0.1, n), 3.0, 2.0, -0.5),
    "every": Case("every", lambda n: Accumulate(INNER, n), 1.0, 3.0, 1.5),
    "every of Lookahead": Case("every", lambda n: Lookahead(INNER, n), 1.0, 2.0, 0.0),
    "alpha": Case("alpha", lambda n: Lookahead(INNER, 2, n), 0.25, 0.75, 1.5),
    "decay": Case("decay", lambda n: Ema(INNER, n), 0.5, 0.75, 1.0),
    "weight_decay": Case(
        "weight_decay", lambda n: Cautious(INNER, False, False, n), 0.5, 0.25, -0.5
    ),
    "beta": Case("beta", lambda n: ScheduleFree(INNER, n), 0.5, 0.25, 1.5),
    "decay of ScheduleFree": Case(
        "weight_decay", lambda n: ScheduleFree(INNER, 0.9, n), 0.5, 0.25, -0.5
    ),
    "max_consecutive": Case("max_consecutive", lambda n: SkipNonfinite(INNER, n), 1.0, 0.0, -1.0),
    "growth_factor": Case(
        "growth_factor", lambda n: LossScale(INNER, 2.0, n, 0.5, 1), 2.0, 3.0, 1.0
    ),
    "backoff_factor": Case(
        "backoff_factor", lambda n: LossScale(INNER, 2.0, 2.0, n, 1), 0.5, 0.25, 1.0
    ),
    "growth_interval": Case(
        "growth_interval", lambda n: LossScale(INNER, 2.0, 2.0, 0.5, n), 1.0, 2.0, 0.0
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
# Those that decide what is done, or by how much beside the parameters, and have no derivative.
SMOOTH = ("max_norm", "max_value", "clipping", "eps", "alpha", "decay", "weight_decay", "beta")


def switch(case):
    """A schedule that goes from the early value to the late one, also under vmap."""
    return lambda count: torch.where(count < 2, case.early, case.late)


def params_and_gradients(steps):
    """Parameters and gradients, of which the third and fourth are not finite for all."""
    params = {"w": torch.randn(3, 2), "b": torch.randn(3)}
    return params, [random_like(params) for _ in range(steps)]


def broken(grads):
    return {**grads, "b": grads["b"] * math.nan}


# Checks.


def refused(update, state, params, message):
    """Say that an update of ones is refused, and that nothing has moved."""
    before = clone((state, params))
    with pytest.raises(ValueError, match=message):
        update(tree_map(torch.ones_like, params), state, params)
    assert_same_bits((state, params), before)


@every_case
def test_a_tensor_that_was_filled_since_is_checked_at_each_update(case):
    number = torch.tensor(case.early)
    opt = case.build(number)
    params, _ = params_and_gradients(0)
    state = opt.init(params)
    for bad in (case.bad, math.nan):
        number.fill_(bad)
        message = rf"^{case.name}={bad}: {case.name} must be"
        refused(opt.update, state, params, message)
        refused(opt.update_, state, params, message)
        refused(
            lambda g, s, p: grad(lambda g: total(opt.update(g, s, p)))(g), state, params, message
        )
    number.fill_(case.early)
    opt.update_(tree_map(torch.ones_like, params), state, params)


def total(moved):
    return sum(leaf.sum() for leaf in leaves(moved[0]))


@every_case
def test_one_bad_member_is_found_at_its_update(case):
    numbers = torch.tensor([case.early, case.late, case.early])
    opts = case.build(numbers)
    params = {"w": torch.randn(3, 3, 2), "b": torch.randn(3, 3)}
    state = vmap(case.build(case.early).init)(params)

    def update(grads, state, params):
        return vmap(lambda o, g, s, p: o.update(g, s, p))(opts, grads, state, params)

    update(params, state, params)
    numbers[1].fill_(case.bad)
    refused(update, state, params, rf"^{case.name}={case.bad}: {case.name} must be")


@every_case
def test_on_a_device_that_is_not_to_be_waited_for_no_number_is_read(case):
    """A tensor without values stands in for one on a GPU: to read it is an error."""
    opt = case.build(torch.empty((), device="meta"))
    params = tree_map(lambda leaf: leaf.to("meta"), params_and_gradients(0)[0])
    state = tree_map(lambda leaf: leaf.to("meta"), case.build(case.early).init(params))
    moved, _ = opt.update(tree_map(torch.empty_like, params), state, params)
    assert all(leaf.is_meta for leaf in leaves(moved))


@every_case
def test_what_a_schedule_gives_is_checked_before_anything_moves(case):
    params, _ = params_and_gradients(0)
    for bad, given in ((case.bad, case.bad), (math.nan, torch.tensor(math.nan))):
        opt = case.build(lambda count, given=given: given)
        state = opt.init(params)
        message = rf"{case.name}={bad} from its schedule.*: {case.name} must be"
        refused(opt.update, state, params, message)
        refused(opt.update_, state, params, message)


# Schedules.


@every_case
@pytest.mark.parametrize("method", ["update", "update_"])
def test_a_number_follows_its_schedule(case, method):
    opt = case.build(switch(case))
    params, gradients = params_and_gradients(9)
    gradients[5:7] = map(broken, gradients[5:7])
    expected, state = clone(params), opt.init(params)
    ours, own = params, opt.init(params)
    for grads in gradients:
        count = own.n_averaged if isinstance(opt, Ema) else own.step
        constant = case.build(case.early if count < 2 else case.late)
        expected, state = constant.update(grads, state, expected)
        ours, own = getattr(opt, method)(grads, own, ours)
        assert_same(ours, expected)
        assert_same(own, state)
    # Both of its values were asked for.
    assert count > 2


def assert_same(one, other):
    for a, b in zip(leaves(one), leaves(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", ["update", "update_"])
def test_updates_are_counted_and_skipped_ones_are_not(method):
    def count(opt, gradients):
        params = torch.ones(2)
        state = opt.init(params)
        for grads in gradients:
            params, state = getattr(opt, method)(grads, state, params)
        assert (state.step.dtype, state.step.shape) == (torch.float64, ())
        return state.step.item()

    good, bad = torch.ones(2), torch.tensor([1.0, math.inf])
    mixed = [good, bad, good, bad, good]
    assert count(Clip(INNER, Constant(1.0)), mixed) == 5
    assert count(Clip(INNER, Constant(1.0), nonfinite="skip"), mixed) == 3
    assert count(ClipValue(INNER, Constant(1.0)), mixed) == 5
    assert count(ClipAdaptive(INNER, Constant(1.0)), mixed) == 5
    assert count(Accumulate(INNER, Constant(2.0)), mixed) == 2
    assert count(Lookahead(INNER, Constant(2.0)), mixed) == 5
    assert count(SkipNonfinite(INNER, Constant(9.0)), mixed) == 3
    assert count(SkipNonfinite(INNER, lambda _: 1), [good, bad, bad, bad, good]) == 4
    assert count(LossScale(INNER, 1.0, Constant(2.0)), mixed) == 3


def test_sums_are_as_long_as_the_number_of_inner_updates_says():
    """As optax.MultiSteps calls its every_k_schedule."""
    opt = Accumulate(INNER, lambda count: torch.where(count < 1, 2, 3))
    params, state = torch.ones(1), None
    state = opt.init(params)
    moved_at = []
    for call in range(1, 9):
        new_params, state = opt.update(torch.ones(1), state, params)
        if not torch.equal(new_params, params):
            moved_at.append(call)
        params = new_params
    assert moved_at == [2, 5, 8]


@pytest.mark.parametrize("second", [False, True])
def test_a_sum_under_a_schedule_is_that_of_optax(second):
    optax = pytest.importorskip("optax", reason="optax comes with the extra `benchmark` alone")
    jax = pytest.importorskip("jax", reason="optax comes with the extra `benchmark` alone")
    jnp = jax.numpy
    params = torch.randn(3)
    gradients = [torch.randn(3) for _ in range(12)]
    theirs = optax.MultiSteps(
        optax.adamw(0.1, weight_decay=0.01), lambda n: jnp.where(n < 2, 1, 2 + second)
    )
    their_params = jnp.asarray(params.numpy())
    their_state = theirs.init(their_params)
    opt = Accumulate(INNER, lambda n: torch.where(n < 2, 1, 2 + second))
    state = opt.init(params)
    for grads in gradients:
        updates, their_state = theirs.update(jnp.asarray(grads.numpy()), their_state, their_params)
        their_params = optax.apply_updates(their_params, updates)
        params, state = opt.update(grads, state, params)
        assert_close(params, torch.tensor(jax.device_get(their_params)), rtol=1e-5)
        assert state.step == int(their_state.gradient_step)


@every_case
def test_members_follow_it_at_counts_of_their_own(case):
    opt = case.build(switch(case))
    params = {"w": torch.randn(2, 3, 2), "b": torch.randn(2, 3)}
    state = vmap(opt.init)(params)
    name = "n_averaged" if isinstance(opt, Ema) else "step"
    state = state._replace(**{name: torch.tensor([0.0, 7.0], dtype=torch.float64)})
    for factor in (1.0, math.nan, math.nan, 1.0):
        grads = random_like(params)
        grads["b"][1] *= factor
        expected = [
            opt.update(
                *(tree_map(lambda leaf, i=i: leaf[i], tree) for tree in (grads, state, params))
            )
            for i in range(2)
        ]
        params, state = vmap(opt.update)(grads, state, params)
        for i in range(2):
            for one, other in zip(leaves((params, state)), leaves(expected[i]), strict=True):
                torch.testing.assert_close(one[i], other, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.by_day(1)
@every_case
def test_one_compiled_graph_serves_a_run_with_it(case):
    torch.compiler.reset()
    opt = case.build(switch(case))
    params, gradients = params_and_gradients(6)
    gradients[3] = broken(gradients[3])
    state = opt.init(params)
    step = torch.compile(opt.update, fullgraph=True, backend="aot_eager")
    in_place = torch.compile(opt.update_, fullgraph=True, backend="aot_eager")
    own = clone((params, state))
    try:
        for grads in gradients:
            expected = opt.update(grads, state, params)
            found = step(grads, state, params)
            in_place(grads, own[1], own[0])
            for moved in (found, own):
                for one, other in zip(leaves(moved), leaves(expected), strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)
            params, state = expected
            torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_with_respect_to_a_schedule_are_those_of_differences(name):
    case = CASES[name]
    params = {"w": torch.randn(3, 2).double(), "b": torch.randn(3).double()}
    gradients = [random_like(params) for _ in range(3)]

    def after(start, end):
        opt = replace(case.build(Linear(start, end, steps=4)), "differentiable", True)
        moved, state = params, opt.init(params)
        for grads in gradients:
            moved, state = opt.update(grads, state, moved)
        return tuple(leaves(averaged(state, params) if isinstance(opt, Ema) else moved))

    numbers = [torch.tensor(n).double().requires_grad_() for n in (case.early, case.late)]
    assert torch.autograd.gradcheck(after, numbers, check_forward_ad=True)
    values = tuple(number.detach() for number in numbers)
    slopes = torch.func.jacrev(after, argnums=(0, 1))(*values)
    assert any(slope.any() for slope in leaves(slopes))
    assert_close(slopes, torch.autograd.functional.jacobian(after, tuple(numbers)), rtol=1e-9)


@pytest.mark.parametrize("name", SMOOTH)
def test_a_function_with_a_tensor_in_it_is_differentiated_too(name):
    """No field of the optimizer shows that tensor: what the schedule gives does."""
    case = CASES[name]
    params, (grads,) = params_and_gradients(1)
    number = torch.tensor(case.early, requires_grad=True)
    opt = case.build(lambda count: number * 1.0)
    state = opt.init(params)
    if name == "alpha":
        state = state._replace(steps_since_sync=torch.ones((), dtype=torch.float64))
    if name == "beta":  # and so would be what is moved
        state = state._replace(weight_sum=torch.ones((), dtype=torch.float64))
    if name == "decay":  # with a weight of 0 the first average would be the parameters
        state = state._replace(weight=torch.ones((), dtype=torch.float64))
    moved, new_state = opt.update(grads, state, params)
    seen = averaged(new_state, params) if name == "decay" else moved
    sum(leaf.square().sum() for leaf in leaves(seen)).backward()
    assert number.grad is not None
    assert number.grad != 0
    before = clone((state, params))
    with pytest.raises(RuntimeError, match=rf"{name} has a history, which writing in place"):
        opt.update_(grads, state, params)
    assert_same_bits((state, params), before)


@every_case
def test_a_schedule_cannot_write_into_the_count_and_is_called_once_an_update(case):
    calls = []

    def schedule(count):
        calls.append(count.item())
        count.add_(5)
        return case.early

    opt = case.build(schedule)
    params, gradients = params_and_gradients(2)
    for method in ("update", "update_"):
        calls.clear()
        moved, state = clone(params), opt.init(params)
        for grads in gradients:
            moved, state = getattr(opt, method)(grads, state, moved)
        assert calls == [0, 1]


# States.


@every_case
def test_a_state_counts_only_where_a_schedule_asks_for_it(case):
    params, (grads,) = params_and_gradients(1)
    opt = case.build(case.early)
    _, state = opt.update(grads, opt.init(params), params)
    assert (state._fields[-1] == "step") is not isinstance(opt, Ema)
    assert getattr(state, "step", ()) == ()
    assert list(find(state, "step")) == ["inner.step"]
    assert "state.step" not in interop.to_state_dict(state)


@every_case
def test_a_checkpoint_goes_on_to_the_bit(case):
    opt = case.build(switch(case))
    params, gradients = params_and_gradients(5)
    state = opt.init(params)
    for grads in gradients[:3]:
        params, state = opt.update(grads, state, params)
    saved = clone(interop.to_state_dict(state))
    assert ("state.step" in saved) is not isinstance(opt, Ema)
    resumed = interop.from_state_dict(opt.init(params), saved)
    for grads in gradients[3:]:
        assert_same_bits(opt.update(grads, resumed, params), opt.update(grads, state, params))


@every_case
def test_it_is_found_as_it_is_at_the_next_update(case):
    opt = Clip(case.build(switch(case)), 1.0)
    params, gradients = params_and_gradients(3)
    state = opt.init(params)
    path = f"inner.{case.name}"
    if case.name != "max_norm":
        assert find(state, case.name, opt)[path] == pytest.approx(case.early)
    for grads in gradients:
        params, state = opt.update(grads, state, params)
    own = state.inner.n_averaged if case.name == "decay" else state.inner.step
    expected = case.early if own < 2 else case.late
    assert find(state, case.name, opt)[path] == pytest.approx(expected)


@pytest.mark.parametrize("name", [name for name in CASES if name != "decay"])  # an Ema counts
def test_a_state_without_a_count_is_refused_with_the_remedy(name):
    case = CASES[name]
    params, _ = params_and_gradients(0)
    state = case.build(case.early).init(params)
    opt = case.build(Constant(case.early) if case.name != "max_consecutive" else lambda _: 1)
    message = (
        rf"{case.name} is a schedule, and the state has no count.*state.step is \(\).*init\(\)"
    )
    refused(opt.update, state, params, message)
    refused(opt.update_, state, params, message)
    with pytest.raises(ValueError, match=rf"{case.name} is a function.*has no count"):
        find(state, case.name, opt)
    begun = state._replace(step=torch.zeros((), dtype=torch.float64))
    opt.update(params, begun, params)
    with pytest.raises(TypeError, match=r"state.step is of torch.float16.*can count far"):
        opt.update(params, state._replace(step=torch.zeros((), dtype=torch.float16)), params)


@pytest.mark.parametrize("devices", [["cuda"], ["cuda", "cpu"], ["cpu"]])
def test_a_count_is_where_nobody_has_to_wait_for_it(devices):
    from torch._subclasses import FakeTensorMode

    on_gpu = devices == ["cuda"]
    with FakeTensorMode():
        params = [torch.empty(2, device=device) for device in devices]
        for opt, there in (
            (ClipValue(INNER, Constant(1.0)), on_gpu),
            (ClipAdaptive(INNER, Constant(1.0)), on_gpu),
            (Clip(INNER, Constant(1.0)), devices != ["cpu"]),
            (SkipNonfinite(INNER, Constant(1.0)), devices != ["cpu"]),
            (LossScale(INNER, 2.0, Constant(2.0)), devices != ["cpu"]),
            (Accumulate(INNER, Constant(2.0)), False),
            (Lookahead(INNER, Constant(2.0)), False),
        ):
            step = opt.init(params).step
            assert step.dtype is torch.float64
            assert step.device.type == ("cuda" if there else "cpu"), opt


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_an_error_within_a_schedule_tells_of_which_number(case):
    params = {"w": torch.ones(3)}
    opt = case.build(lambda count: {}["a key that is not there"])
    with pytest.raises(KeyError) as raised:
        opt.update(params, opt.init(params), params)
    (note,) = raised.value.__notes__
    assert f"the schedule {case.name}=<function" in note


# Functions that do not go with vmap.


@pytest.mark.parametrize(
    "schedule",
    [
        lambda count: 0.5 if count < 10 else 0.25,
        lambda count: math.exp(-count) / 2,
        lambda count: 0.5 if count.item() else 0.25,
    ],
    ids=["if", "float", "item"],
)
@pytest.mark.parametrize("name", ["lr", "betas[1]", "max_norm", "decay"])
def test_a_schedule_that_decides_by_the_count_is_told_under_vmap_what_to_write(name, schedule):
    build = {
        "lr": lambda given: AdamW(lr=given),
        "betas[1]": lambda given: AdamW(betas=(0.9, given)),
    }
    opt = build[name](schedule) if name in build else CASES[name].build(schedule)
    params = torch.ones(3, 2)
    state = vmap(opt.init)(params)
    message = (
        rf"^{re.escape(name)}=.* failed under vmap, .*`if count < 10`.*"
        r"torch.where\(count < 10, a, b\).*funcopt.schedules.Piecewise or Join"
    )
    with pytest.raises(RuntimeError, match=message) as refusal:
        vmap(opt.update)(params, state, params)
    assert "vmap" in str(refusal.value.__cause__)
    with pytest.raises(RuntimeError, match="failed under vmap"):
        vmap(lambda s: list(find(s, name.partition("[")[0], opt).values()))(state)
    # Outside of vmap it serves.
    member = opt.init(params[0])
    opt.update(params[0], member, params[0])
