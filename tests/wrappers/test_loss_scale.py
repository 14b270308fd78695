"""Loss scaling: the numbers of torch.amp.GradScaler, and nothing of the scale left in the step."""

import math

import pytest
import torch
from torch.func import grad, jvp, vmap

from funcopt import Accumulate, AdamW, Clip, ClipValue, LossScale, SkipNonfinite, interop
from funcopt.testing import check_optimizer, laws

from ..cases import (
    TORCH_FLAGS,
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

INF, NAN = math.inf, math.nan
# Without running means, exp_avg is the gradient that the inner optimizer was given, to the bit.
SHOWING = AdamW(lr=0.1, betas=(0.0, 0.0), moments=None)
# Which of a row of calls are bad, and how.
BAD = [None] * 4 + [INF, None, NAN, NAN] + [None] * 7 + [-INF] + [None] * 9


def scaled(grads, scale, bad=None):
    """Return gradients of a loss times a scale, with one element of the last replaced if bad."""
    grads = tree_map(lambda g: g * scale.to(g.dtype), grads)
    if bad is not None:
        [leaf for leaf in leaves(grads) if leaf.numel() > 0][-1].view(-1)[-1] = bad
    return grads


class Torchs:
    """A GradScaler around torch.optim.AdamW."""

    def __init__(self, params, kernel, **options):
        self.params = [torch.nn.Parameter(p.clone()) for p in params]
        self.optimizer = torch.optim.AdamW(self.params, lr=0.1, **TORCH_FLAGS[kernel])
        self.scaler = torch.amp.GradScaler("cpu", **options)
        self.scaler.scale(torch.zeros(()))  # which makes its tensors

    def step(self, grads):
        for param, g in zip(self.params, grads, strict=True):
            param.grad = g.clone()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @property
    def state(self):
        """The parameters and the scale, and how many steps were made."""
        made = [int(state["step"]) for state in self.optimizer.state.values()]
        tracker = int(self.scaler._growth_tracker)
        return [*self.params, self.scaler._scale], max(made, default=0), tracker


OPTIONS = [
    {"init_scale": 2.0**10, "growth_interval": 3},
    {"init_scale": 1.0, "growth_interval": 1},
    {"init_scale": 2.0**126, "growth_interval": 2},  # which cannot grow as often as it is to
    {},
    # Numbers that float32 does not hold, nor what comes of them.
    {"init_scale": 777.7, "growth_factor": 1.1, "backoff_factor": 0.3, "growth_interval": 2},
    {"init_scale": 1e-3, "growth_factor": 3.7, "backoff_factor": 0.9, "growth_interval": 4},
]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kernel", TORCH_FLAGS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_are_those_of_grad_scaler(options, kernel, dtype, in_place):
    if kernel == "fused" and "growth_factor" in options:
        options = {**options, "init_scale": 512.0, "growth_factor": 4.0, "backoff_factor": 0.25}
    params = [torch.randn(3, 4, dtype=dtype), torch.randn((), dtype=dtype)]
    theirs = Torchs(params, kernel, **options)
    opt = LossScale(AdamW(lr=0.1, kernel=kernel), **options)
    state = opt.init(params)
    for bad in BAD:
        size = min(1.0, 1e38 / state.scale.item())
        grads = scaled([g * size for g in random_like(params)], state.scale, bad)
        given = clone(grads)
        params, state = (opt.update_ if in_place else opt.update)(grads, state, params)
        assert_same_bits(grads, given)
        theirs.step(grads)
        expected, made, tracker = theirs.state
        assert_same_bits([*params, state.scale], [p.detach() for p in expected])
        assert int(state.inner.step) == made
        assert int(state.growth_tracker) == tracker
        assert state.scale.dtype is torch.float32


def test_the_scale_grows_and_backs_off_as_described():
    opt = LossScale(AdamW(), 8.0, growth_factor=4.0, backoff_factor=0.5, growth_interval=2)
    params = torch.ones(1)
    state, seen = opt.init(params), []
    for bad in (None, None, None, NAN, None, None):
        grads = torch.ones(1) if bad is None else torch.tensor([bad])
        params, state = opt.update(grads, state, params)
        seen.append((state.scale.item(), int(state.growth_tracker)))
    assert seen == [(8.0, 1), (32.0, 0), (32.0, 1), (16.0, 0), (16.0, 1), (64.0, 0)]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", [name for name in trees() if name != "no leaf"])
def test_steps_are_those_of_adamw_on_gradients_of_the_true_size(name, in_place):
    params = trees()[name]
    opt, inner = LossScale(AdamW(lr=0.1), growth_interval=3), AdamW(lr=0.1)
    bare, bare_state = clone(params), inner.init(params)
    state = opt.init(params)
    for bad in BAD:
        grads = random_like(params)
        if bad is None:
            bare, bare_state = inner.update(grads, bare_state, bare)
        step = opt.update_ if in_place else opt.update
        params, state = step(scaled(grads, state.scale, bad), state, params)
        assert_same_bits((params, state.inner), (bare, bare_state))


def test_a_half_precision_loss_trains_where_its_gradients_would_vanish():
    x = torch.full((8, 4), 1e-4)

    def loss(w):
        return (x.half() @ w.half() * 1e-4).float().mean()

    w = torch.ones(4)
    assert not grad(loss)(w).any()
    opt = LossScale(AdamW(lr=0.1, weight_decay=0.0), 2.0**30, growth_interval=2)
    state = opt.init(w)
    for _ in range(40):
        w, state = opt.update(grad(lambda w: loss(w) * state.scale)(w), state, w)  # noqa: B023
    assert (w < 0.5).all()
    assert int(state.inner.step) < 40  # some scales were too large


def test_a_scale_stops_falling_where_its_reciprocal_is_finite():
    opt = LossScale(SHOWING, 2.0**-120)
    params = torch.ones(1)
    state = opt.init(params)
    for _ in range(30):
        params, state = opt.update(torch.tensor([NAN]), state, params)
    assert state.scale == 2.0**-126
    params, state = opt.update(torch.ones(1) * state.scale, state, params)
    assert_same_bits(state.inner.exp_avg, torch.ones(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_gradients_are_divided_in_float32_and_rounded_once(dtype):
    grads = torch.tensor([1.0, -3.0, 640.0]).to(dtype)
    opt = LossScale(SHOWING, 49.0)
    state = opt.update(grads, opt.init(grads), grads)[1]
    assert_same_bits(state.inner.exp_avg, (grads.float() * (1 / torch.tensor(49.0))).to(dtype))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_gradients_are_divided_part_by_part(dtype):
    grads = torch.randn(4, dtype=dtype)
    opt = LossScale(SHOWING, 2.0**5)
    state = opt.update(grads.conj() * 32, opt.init(grads), grads)[1]
    assert_same_bits(state.inner.exp_avg, grads.conj().resolve_conj())


def test_what_is_inside_sees_gradients_of_the_true_size():
    params = torch.ones(2)
    opt = LossScale(Clip(SHOWING, 1.0))
    state = opt.init(params)
    state = opt.update(torch.tensor([3.0, 4.0]) * state.scale, state, params)[1]
    assert state.inner.norm == 5.0
    assert_close(state.inner.inner.exp_avg, torch.tensor([0.6, 0.8]))


def test_order_decides_how_much_a_bad_gradient_spoils():
    params = torch.ones(2)
    row = [torch.ones(2), torch.tensor([NAN, 1.0]), torch.ones(2), torch.ones(2)]
    each = run(LossScale(Accumulate(SHOWING, 2), 4.0), params, row)[1]
    assert (int(each.inner.inner.step), each.scale) == (1, 2.0)
    every = run(Accumulate(LossScale(SHOWING, 4.0), 2), params, row)[1]
    assert (int(every.inner.inner.step), every.inner.scale) == (1, 2.0)
    assert_same_bits(every.inner.inner.exp_avg, torch.full((2,), 0.5))


def test_each_member_of_a_vmap_has_a_scale_of_its_own():
    numbers = {
        "init_scale": [4.0, 16.0, 1.0],
        "growth_factor": [2.0, 4.0, 1.5],
        "backoff_factor": [0.5, 0.25, 0.75],
        "growth_interval": [1.0, 2.0, 3.0],
    }
    params = {"w": torch.randn(3, 4), "b": torch.randn(3)}
    opts = LossScale(AdamW(lr=0.1), **{name: torch.tensor(row) for name, row in numbers.items()})
    gradients = [random_like(params) for _ in range(8)]
    gradients[2]["b"][0] = NAN
    gradients[5]["w"][1, 2] = INF
    moved, state = params, vmap(lambda opt, p: opt.init(p))(opts, params)
    for grads in gradients:
        moved, state = vmap(lambda opt, g, s, p: opt.update(g, s, p))(opts, grads, state, moved)
    for i in range(3):
        member = LossScale(AdamW(lr=0.1), **{name: row[i] for name, row in numbers.items()})
        own = {name: p[i] for name, p in params.items()}
        expected = run(member, own, [{n: g[i] for n, g in grads.items()} for grads in gradients])
        assert_close(tree_map(lambda leaf, i=i: leaf[i], (moved, state)), expected)
        assert_same_bits(state.scale[i], expected[1].scale)


@pytest.mark.parametrize("bad", [INF, NAN])
def test_a_skipped_step_has_the_derivative_of_doing_nothing(bad):
    opt = LossScale(AdamW(lr=torch.tensor(0.1)), torch.tensor(2.0), torch.tensor(4.0))

    def after(opt, grads, params):
        return opt.update(grads, opt.init(params), params)[0].sum()

    def check(slopes):
        wanted = map(torch.tensor, (0.0, 0.0, 0.0, [0.0, 0.0], [1.0, 1.0]))
        assert_same_bits([*leaves(slopes)], [*wanted])

    grads, params = torch.tensor([1.0, bad]), torch.ones(2)
    check(grad(after, (0, 1, 2))(opt, grads, params))
    row = vmap(grad(after, (0, 1, 2)), (None, 0, 0))(opt, grads[None], params[None])
    check(tree_map(lambda leaf: leaf[0], row))
    assert jvp(lambda g: after(opt, g, params), (grads,), (torch.ones(2),))[1] == 0
    many = grads.expand(3, 2).clone().requires_grad_()
    moved = vmap(lambda g: opt.update(g, opt.init(params), params)[0])(many)
    assert_same_bits(torch.autograd.grad(moved.sum(), many)[0], torch.zeros(3, 2))


def test_derivatives_are_the_limits_of_differences():
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    params = torch.randn(3, dtype=torch.float64, requires_grad=True)
    gradients = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    bad = torch.full((3,), NAN, dtype=torch.float64)

    def after(lr, params, one, other):
        opt = LossScale(AdamW(lr=lr, eps=0.1), 3.0, growth_interval=1)
        return run(opt, params, [one, bad, other])[0]

    assert torch.autograd.gradcheck(after, (lr, params, *gradients), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(after, (lr, params, *gradients))


def test_training_has_the_derivative_that_it_has_without_a_scale():
    def after(lr, opt_of):
        w = torch.ones(3, dtype=torch.float64)
        opt = opt_of(AdamW(lr=lr))
        state = opt.init(w)
        for _ in range(3):
            scale = state.scale if isinstance(opt, LossScale) else 1.0
            slopes = grad(lambda w: w.pow(4).sum() * scale)(w)  # noqa: B023
            w, state = opt.update(slopes, state, w)
        return w.square().sum()

    lr = torch.tensor(0.1, dtype=torch.float64)
    scaling = grad(after)(lr, lambda inner: LossScale(inner, growth_interval=2))
    assert_close(scaling, grad(after)(lr, lambda inner: inner), rtol=1e-12)


@pytest.mark.by_day(1)
@pytest.mark.parametrize("in_place", [False, True])
def test_one_compiled_graph_takes_every_step(in_place):
    torch.compiler.reset()
    opt = LossScale(Clip(AdamW(lr=0.1), 0.5), 2.0**8, growth_interval=2)
    step = torch.compile(
        opt.update_ if in_place else opt.update, fullgraph=True, backend="aot_eager"
    )
    params = {"w": torch.randn(3), "b": torch.randn(2, dtype=torch.float64)}
    own, state = clone(params), opt.init(params)
    try:
        for bad in (None, None, NAN, None, INF, None):
            grads = scaled(random_like(params), state.scale, bad)
            expected = opt.update(grads, clone(state), clone(own))
            own, state = step(grads, state, own)
            assert_close((own, state), expected)
            torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")


def test_a_checkpoint_goes_on_to_the_bit():
    opt = LossScale(AdamW(lr=0.1), growth_interval=2)
    params = trees()["nested"]
    gradients = [random_like(params) for _ in range(5)]
    expected = run(opt, params, gradients)
    params, state = run(opt, params, gradients[:3])
    saved = interop.to_state_dict({"params": params, "state": state})
    loaded = interop.from_state_dict({"params": params, "state": opt.init(params)}, clone(saved))
    params, state = loaded["params"], loaded["state"]
    for grads in gradients[3:]:
        params, state = opt.update(grads, state, params)
    assert_same_bits((params, state), expected)


def test_parameters_that_require_a_gradient_grow_no_graph():
    opt = LossScale(AdamW(lr=0.1), growth_interval=1)
    params = {"w": torch.ones(3, requires_grad=True)}
    state = opt.init(params)
    for bad in (1.0, NAN, 1.0):
        grads = grad(lambda p: p["w"].pow(2).sum() * state.scale * bad)(params)  # noqa: B023
        assert grads["w"].requires_grad  # torch.func.grad leaves a history at a parameter
        params, state = opt.update(grads, state, params)
        assert params["w"].is_leaf
        assert params["w"].requires_grad
        assert not any(leaf.requires_grad for leaf in leaves(state))


def test_numbers_that_require_a_gradient_give_the_scale_none():
    numbers = [torch.tensor(x, requires_grad=True) for x in (8.0, 4.0, 0.5, 1.0)]
    opt = LossScale(AdamW(), *numbers)
    state = opt.init(torch.ones(1))
    assert not state.scale.requires_grad
    assert state.scale.data_ptr() != numbers[0].data_ptr()
    state = opt.update(torch.ones(1), state, torch.ones(1))[1]
    assert state.scale == 32.0
    assert not state.scale.requires_grad


def test_update_in_place_refuses_before_it_writes():
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    grads = tree_map(lambda p: 3 * p, params)
    opt = LossScale(AdamW())
    state = opt.init(params)
    tied = {"a": params["b"][:2], "b": params["b"]}
    learnt = LossScale(AdamW(), backoff_factor=torch.tensor(0.5, requires_grad=True))
    asked = {**grads, "b": torch.ones(3, requires_grad=True)}
    shared = state._replace(scale=grads["a"][0])
    assert "'c'" in attempt(opt, {"a": grads["a"], "c": grads["b"]}, state, params)
    assert "shares its memory" in attempt(opt, grads, state, tied)
    assert attempt(opt, grads, shared, params).startswith("state.scale shares its memory")
    assert attempt(learnt, grads, state, params).startswith("backoff_factor requires a gradient")
    assert attempt(opt, asked, state, params).startswith("grads['b'] requires a gradient")
    assert "LossScaleState" in attempt(opt, grads, state.inner, params)
    stacked = tree_map(lambda leaf: leaf[None], (grads, state, params))
    with pytest.raises(RuntimeError, match=r"Use update\(\)"):
        vmap(opt.update_)(*stacked)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("scale", torch.ones(2), "state.scale is of torch.float32 and shape (2,)"),
        ("scale", 1.0, "state.scale is of type float"),
        ("growth_tracker", torch.zeros(2), "state.growth_tracker has shape (2,)"),
    ],
)
def test_a_state_of_another_kind_is_refused(field, value, words):
    params = torch.ones(2)
    opt = LossScale(AdamW())
    with pytest.raises((TypeError, ValueError)) as refused:
        opt.update(params, opt.init(params)._replace(**{field: value}), params)
    assert str(refused.value).startswith(words)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("init_scale", value) for value in (0.0, -1.0, INF, NAN, 1e39, 1e-39, "1", None)),
        *(("growth_factor", value) for value in (1.0, 0.5, INF, NAN, torch.tensor(1.0))),
        *(("backoff_factor", value) for value in (0.0, 1.0, 2.0, NAN, torch.tensor(1.0))),
        *(("growth_interval", value) for value in (0, -1, 1.5, INF, torch.tensor(0.5), True)),
    ],
)
def test_bad_hyperparameters_are_refused(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        LossScale(AdamW(), **{name: value})
    with pytest.raises(TypeError, match="must be an optimizer"):
        LossScale(AdamW)


def test_a_stacked_number_needs_a_vmap():
    params = torch.ones(2)
    state = LossScale(AdamW()).init(params)
    for name in ("init_scale", "growth_factor", "growth_interval"):
        opt = LossScale(AdamW(), **{name: torch.tensor([2.0, 3.0])})
        with pytest.raises(ValueError, match=rf"{name} has shape \(2,\)"):
            opt.update(params, state, params)
    with pytest.raises(ValueError, match=r"init_scale has shape \(2,\)"):
        LossScale(AdamW(), torch.ones(2)).init(params)


@pytest.mark.parametrize("in_place", [False, True])
def test_on_a_device_that_is_not_to_be_waited_for_nothing_is_read(in_place):
    """Tensors without values stand in for those of a GPU: to read one is an error."""
    opt = LossScale(AdamW(lr=0.1))
    params = {"a": torch.ones(2, device="meta"), "b": torch.ones(3, device="meta")}
    state = tree_map(lambda leaf: leaf.to("meta"), opt.init(params))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        bool(state.scale)
    step = opt.update_ if in_place else opt.update
    moved, new_state = step(tree_map(torch.ones_like, params), state, params)
    assert [leaf.device.type for leaf in new_state[:2]] == ["meta"] * 2
    assert [leaf.shape for leaf in leaves(moved)] == [(2,), (3,)]


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(
    "opt",
    [
        LossScale(ClipValue(SkipNonfinite(AdamW(lr=0.1)), 0.5), 4.0, growth_interval=1),
        SkipNonfinite(LossScale(Accumulate(AdamW(lr=0.1), 2), 4.0, growth_interval=1), 3),
    ],
    ids=["outermost", "within"],
)
def test_among_other_wrappers_the_laws_hold(opt, law, examples):
    report = check_optimizer(opt, laws=[law], max_examples=examples(law))
    assert report.ok, report
