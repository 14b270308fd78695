"""Master weights: 16-bit parameters that are the rounded bits of a run in float32."""

import pytest
import torch
from torch.func import grad, jvp, vmap

from funcopt import (
    SGD,
    Accumulate,
    Adam,
    AdamW,
    Clip,
    Compensated,
    Ema,
    Frozen,
    Lion,
    LossScale,
    MasterWeights,
    Partition,
    SkipNonfinite,
    averaged,
    find,
    interop,
    replace,
)

from ..cases import (
    assert_close,
    assert_same_bits,
    attempt,
    clone,
    leaves,
    random_like,
    run,
    tree_map,
    trees,
)

NARROW = [torch.float16, torch.bfloat16]
narrow = pytest.mark.parametrize("dtype", NARROW, ids=str)
both_ways = pytest.mark.parametrize("method", ["update", "update_"])
INNER = {
    "SGD": SGD(lr=0.01),
    "SGD, momentum": SGD(lr=0.01, momentum=0.9, nesterov=True),
    "Adam": Adam(lr=0.01),
    "AdamW": AdamW(lr=0.01, amsgrad=True),
    "Lion": Lion(lr=0.01),
    "Clip": Clip(AdamW(lr=0.01), 0.5),
    "Accumulate": Accumulate(AdamW(lr=0.01), 2),
    "LossScale": LossScale(AdamW(lr=0.01), 4.0),
    "Ema": Ema(AdamW(lr=0.01), 0.9),
    "SkipNonfinite": SkipNonfinite(AdamW(lr=0.01)),
}


def steps(opt, method, params, gradients):
    state = opt.init(params)
    for grads in gradients:
        params, state = getattr(opt, method)(grads, state, params)
    return params, state


def wide(tree):
    return tree_map(lambda t: t.float() if t.dtype in NARROW else t, tree)


def mixed():
    """Leaves in every dtype."""
    kinds = [*NARROW, torch.float32, torch.float64, torch.complex64]
    return {str(kind): torch.randn(3, 4, dtype=kind) for kind in kinds}


@both_ways
@narrow
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("name", trees())
def test_they_and_the_inner_state_are_those_of_a_run_in_float32_to_the_bit(
    name, inner, dtype, method
):
    params, opt = trees(dtype)[name], INNER[inner]
    gradients = [random_like(params) for _ in range(5)]
    expected, inner_state = run(opt, wide(params), wide(gradients))
    moved, state = steps(MasterWeights(opt), method, clone(params), gradients)
    assert_same_bits(state.master, expected)
    assert_same_bits(state.inner, inner_state)
    assert_same_bits(moved, tree_map(lambda leaf: leaf.to(dtype), expected))


@both_ways
def test_steps_far_below_half_an_ulp_add_up(method):
    opt, start = SGD(lr=1e-3), torch.ones(4, dtype=torch.bfloat16)
    gradients = [torch.full_like(start, 0.1)] * 1000
    alone, _ = steps(opt, method, start.clone(), gradients)
    assert torch.equal(alone, start)
    expected, _ = run(opt, start.float(), wide(gradients))
    moved, _ = steps(MasterWeights(opt), method, start.clone(), gradients)
    assert torch.equal(moved, expected.bfloat16())
    assert (moved < 0.91).all()


@both_ways
@pytest.mark.parametrize("wrap", [MasterWeights, Compensated])
def test_wider_leaves_move_as_with_the_inner_optimizer_alone_to_the_bit(wrap, method):
    params = {name: leaf for name, leaf in mixed().items() if leaf.itemsize > 2}
    gradients = [random_like(params) for _ in range(4)]
    opt = AdamW(lr=0.1)
    expected = steps(opt, method, clone(params), gradients)
    moved, state = steps(wrap(opt), method, clone(params), gradients)
    assert_same_bits((moved, state.inner), expected)


@both_ways
def test_the_master_weight_wins_over_a_parameter_that_was_changed(method):
    opt, grads = MasterWeights(AdamW(lr=0.1)), mixed()
    params = mixed()
    state = opt.init(params)
    expected = opt.update(grads, state, params)
    other = tree_map(lambda leaf: leaf + 100, params)
    assert_same_bits(getattr(opt, method)(grads, clone(state), other), expected)


@both_ways
def test_a_master_weight_comes_back_where_the_parameter_overflowed(method):
    opt, w = MasterWeights(SGD(lr=1.0)), torch.full((2,), 65504.0, dtype=torch.float16)
    state, out = opt.init(w), torch.full((2,), -100.0, dtype=torch.float16)
    w, state = getattr(opt, method)(out, state, w)
    assert w.isinf().all()
    w, state = getattr(opt, method)(-out, state, w)
    assert (w == 65504).all()


@both_ways
@pytest.mark.parametrize("wrap", [MasterWeights, Compensated])
def test_a_leaf_without_a_gradient_is_left_alone(wrap, method):
    opt, params = wrap(AdamW(lr=0.1)), mixed()
    params, state = opt.update(random_like(params), opt.init(params), params)
    before = clone((params, state))
    moved, after = getattr(opt, method)(dict.fromkeys(params), state, params)
    assert_same_bits(moved, before[0])
    assert_same_bits(after[1], before[1][1])
    step = {**dict.fromkeys(params), "torch.bfloat16": params["torch.bfloat16"].clone()}
    again, _ = getattr(opt, method)(step, after, moved)
    assert not torch.equal(again["torch.bfloat16"], before[0]["torch.bfloat16"])
    for name in params.keys() - {"torch.bfloat16"}:
        assert torch.equal(again[name], before[0][name])


@both_ways
@pytest.mark.parametrize("wrap", [MasterWeights, Compensated])
def test_a_leaf_that_an_accumulation_moves_later_is_moved(wrap, method):
    params = {"a": torch.ones(2).bfloat16(), "b": torch.ones(2).bfloat16()}
    grads = tree_map(torch.ones_like, params)
    opt = wrap(Accumulate(SGD(lr=0.5), 2))
    moved, _ = steps(opt, method, clone(params), [grads, {"a": grads["a"], "b": None}])
    assert_same_bits(moved, {"a": torch.full((2,), 0.5).bfloat16(), "b": moved["b"]})
    assert (moved["b"] == 0.75).all()


@both_ways
@pytest.mark.parametrize("wrap", [MasterWeights, Compensated])
def test_a_leaf_at_rest_is_the_very_tensor_and_has_a_copy_or_nothing(wrap, method):
    params = {"move": torch.ones(2).bfloat16(), "rest": torch.randn(3).bfloat16()}
    inner = Partition({"m": SGD(lr=1e-3), "r": Frozen()}, {"move": "m", "rest": "r"})
    rest = params["rest"]
    moved, state = steps(wrap(inner), method, params, [{"move": torch.ones(2).bfloat16()}] * 3)
    assert moved["rest"] is rest
    kept = rest.float() if wrap is MasterWeights else torch.zeros_like(rest)
    assert torch.equal(state[1]["rest"], kept)
    assert (moved["move"] < 1).all()


WRAPS = {
    "Clip around": lambda wrap: Clip(wrap(AdamW(lr=0.01)), 0.5),
    "Clip within": lambda wrap: wrap(Clip(AdamW(lr=0.01), 0.5)),
    "Ema around": lambda wrap: Ema(wrap(AdamW(lr=0.01)), 0.5),
    "Accumulate around": lambda wrap: Accumulate(wrap(AdamW(lr=0.01)), 2),
    "LossScale around": lambda wrap: LossScale(wrap(AdamW(lr=0.01)), 4.0, growth_interval=2),
    "LossScale within": lambda wrap: wrap(LossScale(AdamW(lr=0.01), 4.0, growth_interval=2)),
    "groups": lambda wrap: Partition(
        {"a": wrap(AdamW(lr=0.01)), "b": Clip(wrap(SGD(lr=0.1)), 1.0), "c": Frozen()},
        {"w": "a", "v": "b", "u": "c"},
    ),
    "groups within": lambda wrap: wrap(
        Partition(
            {"a": AdamW(lr=0.01), "b": SGD(lr=0.1, momentum=0.9), "c": Frozen()},
            {"w": "a", "v": "b", "u": "c"},
        )
    ),
}


def three(dtype):
    return {"w": torch.randn(3, 2).to(dtype), "v": torch.randn(5).to(dtype), "u": torch.ones(2)}


@narrow
@pytest.mark.parametrize("name", WRAPS)
@pytest.mark.parametrize("wrap", [MasterWeights, Compensated])
def test_among_other_wrappers_in_place_is_pure_and_a_checkpoint_goes_on_to_the_bit(
    wrap, name, dtype
):
    opt, params = WRAPS[name](wrap), three(dtype)
    gradients = [random_like(params) for _ in range(6)]
    expected = steps(opt, "update", clone(params), gradients)
    assert_same_bits(steps(opt, "update_", clone(params), gradients), expected)
    assert not torch.equal(expected[0]["w"], params["w"])
    params, state = steps(opt, "update", params, gradients[:3])
    saved = clone(interop.to_state_dict({"params": params, "state": state}))
    loaded = interop.from_state_dict({"params": params, "state": opt.init(params)}, saved)
    params, state = loaded["params"], loaded["state"]
    for grads in gradients[3:]:
        params, state = opt.update(grads, state, params)
    assert_same_bits((params, state), expected)


@both_ways
@pytest.mark.parametrize("wrap", [MasterWeights, Compensated])
@pytest.mark.parametrize("outside", [True, False])
def test_a_loss_scale_skips_an_overflow_and_nothing_moves(outside, wrap, method):
    params = {"w": torch.randn(64).half()}
    opt = LossScale(wrap(AdamW(lr=0.01)), 4.0) if outside else wrap(LossScale(AdamW(lr=0.01), 4.0))
    params, state = steps(opt, method, params, [random_like(params) for _ in range(5)])
    before = clone((params, state))
    moved, after = getattr(opt, method)(
        {"w": torch.full_like(params["w"], torch.inf)}, state, params
    )
    assert_same_bits(moved, before[0])
    (name,) = {"master", "compensation"} & {path.split(".")[-1] for path in _names(after)}
    assert_same_bits(find(after, name), find(before[1], name))
    assert find(after, "scale").popitem()[1] == 2


def _names(state):
    return [field for part in (state, state.inner) for field in part._fields]


def test_the_average_around_is_of_rounded_parameters_and_the_one_within_of_master_weights():
    params, gradients = torch.ones(2).bfloat16(), [torch.ones(2).bfloat16()] * 4
    expected = run(Ema(SGD(lr=1e-3), 0.5), params.float(), wide(gradients))[1].average
    moved, state = run(MasterWeights(Ema(SGD(lr=1e-3), 0.5)), params, gradients)
    assert torch.equal(state.inner.average, expected)
    assert averaged(state, moved).dtype is torch.bfloat16
    around = run(Ema(MasterWeights(SGD(lr=1e-3)), 0.5), params, gradients)[1]
    assert not torch.equal(around.average, expected)


@pytest.mark.parametrize("wrap", [MasterWeights, Compensated])
def test_members_of_a_vmap_get_what_a_loop_gives(wrap):
    lrs = torch.tensor([0.001, 0.01, 0.1])
    params = {"w": torch.randn(3, 4).bfloat16(), "b": torch.randn(3, 2).half(), "c": torch.ones(3)}
    gradients = [random_like(params) for _ in range(4)]
    opts = wrap(Adam(lr=lrs))
    state = vmap(lambda opt, p: opt.init(p))(opts, params)
    moved = params
    for grads in gradients:
        moved, state = vmap(lambda opt, g, s, p: opt.update(g, s, p))(opts, grads, state, moved)
    for i in range(3):
        own = tree_map(lambda p, i=i: p[i], params)
        each = [tree_map(lambda g, i=i: g[i], grads) for grads in gradients]
        expected = run(wrap(Adam(lr=lrs[i])), own, each)
        assert_close(tree_map(lambda leaf, i=i: leaf[i], (moved, state)), expected)


@pytest.mark.parametrize("mode", ["reverse", "forward", "plain"])
@pytest.mark.parametrize("wrap", [MasterWeights, Compensated])
def test_the_derivative_is_that_of_a_run_in_float32(wrap, mode):
    """Rounding passes it on as a cast does, which rounds it to 16 bits."""
    start, slopes = torch.randn(3).bfloat16(), torch.randn(4, 3).bfloat16()

    def after(opt, lr, dtype):
        params, state = start.to(dtype), None
        for slope in slopes:
            opt_now = replace(opt, "lr", lr)
            state = opt_now.init(params) if state is None else state
            params, state = opt_now.update(slope.to(dtype), state, params)
        return params.float().sum()

    def derivative(opt, dtype):
        lr = torch.tensor(0.1)
        if mode == "reverse":
            return grad(lambda lr: after(opt, lr, dtype))(lr)
        if mode == "forward":
            return jvp(lambda lr: after(opt, lr, dtype), (lr,), (torch.ones(()),))[1]
        lr.requires_grad_()
        return torch.autograd.grad(after(opt, lr, dtype), lr)[0]

    opt = SGD(lr=0.1, momentum=0.9)
    expected = derivative(opt, torch.float32)
    assert_close(derivative(wrap(opt), torch.bfloat16), expected, rtol=2e-2, atol=2e-2)
    params = start.clone()
    exact = grad(lambda lr: sums(wrap(replace(opt, "lr", lr)), params, slopes))(torch.tensor(0.1))
    assert_close(exact, expected, rtol=1e-5 if wrap is MasterWeights else 2e-2, atol=1e-5)


def sums(opt, params, slopes):
    """What stands for the parameters in more digits than they have."""
    params, state = run(opt, params, list(slopes))
    return (state.master if isinstance(opt, MasterWeights) else params.float()).sum()


@pytest.mark.parametrize("wrap", [MasterWeights, Compensated])
def test_initial_parameters_have_their_derivative_where_an_update_is_recorded(wrap):
    opt = wrap(SGD(lr=0.5))

    def trained(w):
        state = opt.init(w)
        for _ in range(3):
            w, state = opt.update(w * 1, state, w)
        return w.float().sum()

    w = torch.tensor([1.0, 2.0]).bfloat16()
    assert_close(grad(trained)(w).float(), torch.full((2,), 0.125), rtol=1e-2)


@pytest.mark.parametrize("wrap", [MasterWeights, Compensated])
def test_parameters_that_require_a_gradient_grow_no_graph(wrap):
    opt = wrap(Ema(AdamW(lr=0.1), 0.9))
    params = {
        "w": torch.nn.Parameter(torch.ones(3).bfloat16()),
        "f": torch.nn.Parameter(torch.ones(2)),
    }
    state = opt.init(params)
    for method in ("update", "update", "update_"):
        with torch.enable_grad():
            loss = params["w"].pow(2).sum() + params["f"].sum()
        graph = method == "update"
        found = torch.autograd.grad(loss, list(params.values()), create_graph=graph)
        params, state = getattr(opt, method)(dict(zip(params, found, strict=True)), state, params)
        assert all(leaf.is_leaf and leaf.requires_grad for leaf in params.values())
        assert not any(leaf.requires_grad for leaf in leaves(state))


@pytest.mark.by_day(1)
@both_ways
@pytest.mark.parametrize("wrap", [MasterWeights, Compensated])
def test_one_compiled_graph_takes_every_step(wrap, method):
    torch.compiler.reset()
    opt = wrap(Clip(AdamW(lr=0.1), 0.5))
    step = torch.compile(getattr(opt, method), fullgraph=True, backend="aot_eager")
    params = {"w": torch.randn(3).bfloat16(), "b": torch.randn(2, dtype=torch.float64)}
    own, state = clone(params), opt.init(params)
    try:
        for _ in range(4):
            grads = random_like(params)
            expected = opt.update(grads, clone(state), clone(own))
            own, state = step(grads, state, own)
            assert_close((own, state), expected, rtol=1e-4)
            torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.parametrize("wrap", [MasterWeights, Compensated])
def test_update_in_place_refuses_before_it_writes(wrap):
    opt = wrap(AdamW())
    params = {"a": torch.ones(2).bfloat16(), "b": torch.ones(4).bfloat16()}
    grads = tree_map(lambda p: 3 * p, params)
    state = opt.init(params)
    field = state._fields[1]
    kept = state[1]["b"]

    def with_b(leaf):
        return state._replace(**{field: {**state[1], "b": leaf}})

    asked = {**grads, "b": grads["b"].clone().requires_grad_()}
    historic = {**params, "b": params["b"].clone().requires_grad_() * 1}
    own = f"state.{field}['b']"
    assert "grads['b']: shape (2,)" in attempt(opt, {**grads, "b": grads["a"]}, state, params)
    assert f"{own} does not go" in attempt(opt, grads, with_b(kept[:1]), params)
    assert "must be a dense tensor of" in attempt(opt, grads, with_b(kept.double()), params)
    assert attempt(opt, asked, state, params).startswith("grads['b'] requires a gradient")
    assert attempt(opt, grads, state, historic).startswith("params['b'] has a history")
    assert attempt(opt, grads, with_b(kept.clone().requires_grad_()), params).startswith(own)
    assert "strides" in attempt(opt, grads, with_b(kept[:1].expand(4)), params)
    wider = {**params, "b": params["b"][:1].expand(4)}
    assert "params['b'] has strides" in attempt(opt, grads, state, wider)
    tied = {"a": params["b"][:2], "b": params["b"]}
    assert "shares its memory" in attempt(opt, grads, state, tied)
    assert "shares its memory" in attempt(opt, params, state, params)
    moments = state.inner.exp_avg["b"]
    assert "shares its memory" in attempt(
        opt, grads, state, {**params, "b": moments.view(torch.bfloat16)[:4]}
    )
    assert f"{wrap.__name__}State" in attempt(opt, grads, state.inner, params)
    with torch.inference_mode():
        unwritable = torch.ones(4).bfloat16()
    assert "inference mode" in attempt(opt, grads, state, {**params, "b": unwritable})
    stacked = tree_map(lambda leaf: leaf[None], (grads, opt.init(params), params))
    with pytest.raises(RuntimeError, match=r"Use update\(\)"):
        vmap(opt.update_)(*stacked)


@pytest.mark.parametrize("wrap", [MasterWeights, Compensated])
def test_what_the_inner_optimizer_refuses_leaves_everything_unwritten(wrap):
    opt, params = wrap(AdamW(lr=lambda count: -1.0)), {"a": torch.ones(2).bfloat16()}
    assert "from its schedule" in attempt(opt, clone(params), opt.init(params), params)


@pytest.mark.parametrize("wrap", [MasterWeights, Compensated])
def test_numbers_within_are_found_and_replaced(wrap):
    opt = wrap(AdamW(lr=0.1))
    assert find(opt, "lr") == {"inner.lr": 0.1}
    assert replace(opt, "lr", 0.2) == wrap(AdamW(lr=0.2))


@pytest.mark.parametrize("wrap", [MasterWeights, Compensated])
def test_what_is_no_optimizer_is_refused(wrap):
    with pytest.raises(TypeError, match=r"inner=.*must be an optimizer"):
        wrap(AdamW)
