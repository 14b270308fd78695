"""Skipped steps: nothing moves but the counts, as in optax.apply_if_finite."""

import math

import pytest
import torch
from torch.func import grad, jvp, vmap

from funcopt import Accumulate, AdamW, Clip, LossScale, Partition, SkipNonfinite, interop
from funcopt.testing import check_optimizer, laws

from ..cases import assert_same_bits, attempt, clone, leaves, random_like, run, tree_map, trees

INF, NAN = math.inf, math.nan
# Which of a row of calls are bad, and how.
BAD = [None, NAN, None, INF, -INF, NAN, None, None, NAN, NAN, NAN, NAN, NAN, None, INF] + [None] * 5


def spoilt(grads, bad):
    """Return gradients with one element of the last leaf replaced, unless by None."""
    if bad is None:
        return grads
    *_, last = (leaf for leaf in leaves(grads) if leaf.numel() > 0)
    return tree_map(
        lambda g: (
            g.flatten().index_fill(0, torch.tensor(g.numel() - 1), bad).view_as(g)
            if g is last
            else g
        ),
        grads,
    )


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", [name for name in trees() if name != "no leaf"])
@pytest.mark.parametrize("most", [0, 2, INF, torch.tensor(1.0)])
def test_steps_are_those_of_adamw_on_what_is_let_through(most, name, in_place):
    params = trees()[name]
    opt, inner = SkipNonfinite(AdamW(lr=0.1), most), AdamW(lr=0.1)
    step = opt.update_ if in_place else opt.update
    bare, bare_state = clone(params), inner.init(params)
    state = opt.init(params)
    consecutive = total = 0
    for bad in BAD:
        grads = spoilt(random_like(params), bad)
        consecutive, total = (0, total) if bad is None else (consecutive + 1, total + 1)
        if bad is None or consecutive > most:
            bare, bare_state = inner.update(grads, bare_state, bare)
        params, state = step(grads, state, params)
        assert_same_bits((params, state.inner), (bare, bare_state))
        assert (int(state.consecutive), int(state.total)) == (consecutive, total)
        assert bool(state.last_finite) == (bad is None)
        assert [leaf.dtype for leaf in state[:3]] == [torch.int64, torch.int64, torch.bool]


@pytest.mark.parametrize("most", [0, 1, 3, 100])
def test_optax_gives_the_same_over_20_steps(most):
    optax = pytest.importorskip("optax", reason="optax comes with the extra `benchmark` alone")
    numpy = pytest.importorskip("numpy")
    params = {"b": torch.randn(3), "a": torch.randn(2, 3)}
    theirs = optax.apply_if_finite(optax.adamw(0.1, weight_decay=0.01), most)
    their_params = {name: p.numpy() for name, p in params.items()}
    their_state = theirs.init(their_params)
    opt = SkipNonfinite(AdamW(lr=0.1), most)
    state = opt.init(params)
    for bad in BAD:
        grads = spoilt(random_like(params), bad)
        given = {name: g.numpy() for name, g in grads.items()}
        updates, their_state = theirs.update(given, their_state, their_params)
        their_params = optax.apply_updates(their_params, updates)
        params, state = opt.update(grads, state, params)
        for name, own in params.items():
            expected = torch.from_numpy(numpy.array(their_params[name]))
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert state.consecutive == int(their_state.notfinite_count)
        assert state.total == int(their_state.total_notfinite)
        assert state.last_finite == bool(their_state.last_finite)
        assert state.inner.step == int(their_state.inner_state[0].count)


def test_a_leaf_without_a_gradient_counts_for_nothing():
    params = [torch.ones(2), torch.ones(2)]
    opt = SkipNonfinite(AdamW(lr=0.1))
    moved, state = opt.update([torch.ones(2), None], opt.init(params), params)
    assert state.last_finite
    assert state.inner.step == 1
    assert_same_bits(moved[1], params[1])


def test_gradients_whose_norm_overflows_are_not_skipped():
    params = torch.ones(3)
    opt = SkipNonfinite(AdamW(lr=0.1, eps=0.0))
    state = opt.update(torch.full((3,), 3e38), opt.init(params), params)[1]
    assert state.inner.step == 1


def test_order_decides_how_much_a_bad_gradient_spoils():
    params = torch.ones(2)
    row = [torch.ones(2), torch.tensor([NAN, 1.0]), torch.ones(2)]
    each = run(SkipNonfinite(Accumulate(AdamW(lr=0.1), 2)), params, row)[1]
    assert each.inner.inner.step == 1  # of the two good ones
    every = run(Accumulate(SkipNonfinite(AdamW(lr=0.1)), 2), params, row)[1]
    assert every.inner.inner.step == 0
    assert every.inner.total == 1


def test_each_member_of_a_vmap_skips_for_itself_and_has_its_own_patience():
    most = torch.tensor([0.0, 1.0, INF])
    params = {"w": torch.randn(3, 4), "b": torch.randn(3)}
    opts = SkipNonfinite(AdamW(lr=0.1), most)
    state = vmap(lambda opt, p: opt.init(p))(opts, params)
    gradients = [spoilt(random_like(params), bad) for bad in (None, NAN, NAN, None)]
    gradients.append({"w": torch.full((3, 4), INF), "b": torch.ones(3)})
    gradients.append({"w": torch.full((3, 4), INF), "b": torch.ones(3)})
    moved = params
    for grads in gradients:
        moved, state = vmap(lambda opt, g, s, p: opt.update(g, s, p))(opts, grads, state, moved)
    for i in range(3):
        member = SkipNonfinite(AdamW(lr=0.1), most[i].item())
        own = {name: p[i] for name, p in params.items()}
        expected = run(member, own, [{n: g[i] for n, g in grads.items()} for grads in gradients])
        for one, other in zip(
            leaves(tree_map(lambda leaf, i=i: leaf[i], (moved, state))),
            leaves(expected),
            strict=True,
        ):
            torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("bad", [INF, NAN])
def test_a_skipped_step_has_the_derivative_of_doing_nothing(bad):
    opt = SkipNonfinite(AdamW(lr=torch.tensor(0.1)), torch.tensor(1.0))

    def after(opt, grads, params):
        return opt.update(grads, opt.init(params), params)[0].sum()

    def check(slopes):
        wanted = map(torch.tensor, (0.0, 0.0, [0.0, 0.0], [1.0, 1.0]))
        assert_same_bits([*leaves(slopes)], [*wanted])

    grads, params = torch.tensor([1.0, bad]), torch.ones(2)
    check(grad(after, (0, 1, 2))(opt, grads, params))
    row = vmap(grad(after, (0, 1, 2)), (None, 0, 0))(opt, grads[None], params[None])
    check(tree_map(lambda leaf: leaf[0], row))
    slope = jvp(lambda g: after(opt, g, params), (grads,), (torch.ones(2),))[1]
    assert slope == 0
    recorded = grads.clone().requires_grad_()
    start = params.clone().requires_grad_()
    moved = opt.update(recorded, opt.init(params), start)[0]
    slopes = torch.autograd.grad(moved.sum(), [recorded, start], materialize_grads=True)
    assert_same_bits(slopes, (torch.zeros(2), torch.ones(2)))
    # Beneath a vmap, plain autograd follows what could not be decided.
    many = grads.expand(3, 2).clone().requires_grad_()
    moved = vmap(lambda g: opt.update(g, opt.init(params), params)[0])(many)
    assert_same_bits(torch.autograd.grad(moved.sum(), many)[0], torch.zeros(3, 2))


def test_derivatives_are_the_limits_of_differences():
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    params = torch.randn(3, dtype=torch.float64, requires_grad=True)
    gradients = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    bad = torch.full((3,), NAN, dtype=torch.float64)

    def after(lr, params, one, other):
        return run(SkipNonfinite(AdamW(lr=lr, eps=0.1)), params, [one, bad, other])[0]

    assert torch.autograd.gradcheck(after, (lr, params, *gradients), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(after, (lr, params, *gradients))


@pytest.mark.by_day(1)
@pytest.mark.parametrize("in_place", [False, True])
def test_one_compiled_graph_takes_good_and_bad(in_place):
    torch.compiler.reset()
    opt = SkipNonfinite(Clip(AdamW(lr=0.1), 0.5), 2)
    step = torch.compile(
        opt.update_ if in_place else opt.update, fullgraph=True, backend="aot_eager"
    )
    params = {"w": torch.randn(3), "b": torch.randn(2, dtype=torch.float64)}
    own, state = clone(params), opt.init(params)
    try:
        for bad in (None, NAN, INF, None, NAN, NAN, NAN):
            grads = spoilt(random_like(params), bad)
            expected = opt.update(grads, clone(state), clone(own))
            own, state = step(grads, state, own)
            for one, other in zip(leaves((own, state)), leaves(expected), strict=True):
                torch.testing.assert_close(one, other, equal_nan=True)
            torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")


def test_a_checkpoint_goes_on_to_the_bit():
    opt = SkipNonfinite(AdamW(lr=0.1), 2)
    params = trees()["nested"]
    gradients = [spoilt(random_like(params), bad) for bad in (None, NAN, NAN, None)]
    expected = run(opt, params, gradients)
    params, state = run(opt, params, gradients[:2])
    saved = interop.to_state_dict({"params": params, "state": state})
    loaded = interop.from_state_dict({"params": params, "state": opt.init(params)}, clone(saved))
    params, state = loaded["params"], loaded["state"]
    for grads in gradients[2:]:
        params, state = opt.update(grads, state, params)
    assert_same_bits((params, state), expected)


def test_parameters_that_require_a_gradient_grow_no_graph():
    opt = SkipNonfinite(AdamW(lr=0.1))
    params = {"w": torch.ones(3, requires_grad=True)}
    state = opt.init(params)
    for bad in (1.0, NAN, 1.0):
        slopes = grad(lambda p: p["w"].pow(2).sum())(params)
        grads = tree_map(lambda g, bad=bad: g * bad, slopes)
        assert grads["w"].requires_grad  # torch.func.grad leaves a history at a parameter
        params, state = opt.update(grads, state, params)
        assert params["w"].is_leaf
        assert params["w"].requires_grad
        assert not any(leaf.requires_grad for leaf in leaves(state))


def test_stacked_parameters_that_require_a_gradient_grow_no_graph_under_vmap():
    opt = SkipNonfinite(AdamW(lr=0.1))
    params = torch.ones(2, 3, requires_grad=True)
    state = vmap(opt.init)(params)

    def step(state, params):
        return opt.update(grad(lambda p: p.pow(2).sum())(params), state, params)

    params, state = vmap(step)(state, params)
    assert not any(leaf.requires_grad for leaf in leaves((params, state)))


def test_update_in_place_refuses_before_it_writes():
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    grads = tree_map(lambda p: 3 * p, params)
    opt = SkipNonfinite(AdamW())
    state = opt.init(params)
    tied = {"a": params["b"][:2], "b": params["b"]}
    learnt = SkipNonfinite(AdamW(), torch.tensor(1.0, requires_grad=True))
    asked = {**grads, "b": torch.ones(3, requires_grad=True)}
    shared = state._replace(total=state.consecutive)
    assert "'c'" in attempt(opt, {"a": grads["a"], "c": grads["b"]}, state, params)
    assert "shares its memory" in attempt(opt, grads, state, tied)
    assert attempt(opt, grads, shared, params).startswith("state.total shares its memory")
    assert attempt(learnt, grads, state, params).startswith("max_consecutive requires a gradient")
    assert attempt(opt, asked, state, params).startswith("grads['b'] requires a gradient")
    assert "SkipNonfiniteState" in attempt(opt, grads, state.inner, params)
    stacked = tree_map(lambda leaf: leaf[None], (grads, state, params))
    with pytest.raises(RuntimeError, match=r"Use update\(\)"):
        vmap(opt.update_)(*stacked)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("consecutive", torch.zeros(2), "state.consecutive has shape (2,)"),
        ("total", torch.zeros((), dtype=torch.bool), "state.total is of torch.bool"),
        ("last_finite", torch.ones(()), "state.last_finite is of torch.float32 and shape ()"),
        ("last_finite", True, "state.last_finite is of type bool"),
    ],
)
def test_a_state_of_another_kind_is_refused(field, value, words):
    params = torch.ones(2)
    opt = SkipNonfinite(AdamW())
    with pytest.raises((TypeError, ValueError)) as refused:
        opt.update(params, opt.init(params)._replace(**{field: value}), params)
    assert str(refused.value).startswith(words)


@pytest.mark.parametrize(
    "most", [-1, 0.5, NAN, -INF, torch.tensor(0.5), torch.tensor(2), "2", True, None]
)
def test_max_consecutive_is_a_whole_number_from_0_or_infinite(most):
    with pytest.raises((TypeError, ValueError), match="max_consecutive"):
        SkipNonfinite(AdamW(), most)
    with pytest.raises(TypeError, match="must be an optimizer"):
        SkipNonfinite(AdamW)


def test_max_consecutive_is_shown_as_it_was_given():
    assert "max_consecutive=4)" in repr(SkipNonfinite(AdamW(), 4.0))
    assert repr(SkipNonfinite(AdamW())) == "SkipNonfinite(AdamW())"


def test_a_stacked_max_consecutive_needs_a_vmap():
    params = torch.ones(2)
    opt = SkipNonfinite(AdamW(), torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"max_consecutive has shape \(2,\)"):
        opt.update(params, opt.init(params), params)


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(
    "opt",
    [
        SkipNonfinite(Accumulate(AdamW(lr=0.1), 2), 3),
        Accumulate(SkipNonfinite(AdamW(lr=0.1)), 2),
    ],
    ids=["each", "the mean"],
)
def test_in_either_order_the_laws_hold(opt, law, examples):
    report = check_optimizer(opt, laws=[law], max_examples=examples(law))
    assert report.ok, report


@pytest.mark.parametrize("in_place", [False, True])
def test_on_a_device_that_is_not_to_be_waited_for_nothing_is_read(in_place):
    """Tensors without values stand in for those of a GPU: to read one is an error."""
    opt = SkipNonfinite(AdamW(lr=0.1), 2)
    params = {"a": torch.ones(2, device="meta"), "b": torch.ones(3, device="meta")}
    state = tree_map(lambda leaf: leaf.to("meta"), opt.init(params))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        bool(state.last_finite)
    step = opt.update_ if in_place else opt.update
    moved, new_state = step(tree_map(torch.ones_like, params), state, params)
    assert [leaf.device.type for leaf in new_state[:3]] == ["meta"] * 3
    assert [leaf.shape for leaf in leaves(moved)] == [(2,), (3,)]


def test_a_loss_scale_that_would_never_see_an_overflow_is_refused():
    scaled = LossScale(AdamW(lr=0.1), init_scale=2.0**10)
    for inner in (scaled, Accumulate(scaled, 2), Partition({"a": scaled}, lambda *_: "a")):
        with pytest.raises(ValueError, match=r"has a LossScale, .* SkipNonfinite would hide it"):
            SkipNonfinite(inner)
        with pytest.raises(ValueError, match=r"LossScale, .* Clip\(nonfinite='skip'\) would hide"):
            Clip(inner, 1.0, nonfinite="skip")
        assert Clip(inner, 1.0).inner is inner


def test_a_loss_scale_is_let_see_one_after_so_many_calls():
    opt = SkipNonfinite(LossScale(AdamW(lr=0.1), init_scale=4.0), max_consecutive=1)
    params = torch.ones(2)
    state = opt.init(params)
    for scale in (4.0, 2.0):
        moved, state = opt.update(torch.full((2,), INF), state, params)
        assert torch.equal(moved, params)
        assert state.inner.scale == scale
