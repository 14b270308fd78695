"""The parameters with the best score so far, and when to stop."""

import math
import pickle

import pytest
import torch
from torch.func import grad, jvp, vmap

from funcopt import (
    SGD,
    Accumulate,
    AdamW,
    Best,
    Clip,
    Ema,
    Frozen,
    Lookahead,
    Partition,
    SkipNonfinite,
    find,
    interop,
)
from funcopt.distributed import Zero1
from funcopt.wrappers.best import BestState

from ..cases import assert_same_bits, attempt, clone, leaves, random_like, tree_map, trees

both_ways = pytest.mark.parametrize("method", ["update", "update_"])
# The third is the best of the first, the last one of all; None is an update without a score.
SCORES = [3.0, math.nan, 2.0, None, 2.5, math.inf, 2.0, 1.0]


def walk(opt, params, scores, method="update"):
    """Yield for each score the parameters that it is of, and the state after their update."""
    params, state = clone(params), opt.init(params)
    for score in scores:
        given = clone(params)
        params, state = getattr(opt, method)(random_like(params), state, params, value=score)
        yield given, state


@both_ways
@pytest.mark.parametrize("name", trees())
def test_it_keeps_the_parameters_that_had_the_best_score(name, method):
    params = trees()[name]
    best, best_step, best_value, n_worse = params, 0, math.inf, 0
    steps = walk(Best(AdamW(lr=0.1)), params, SCORES, method)
    for count, (score, (given, state)) in enumerate(zip(SCORES, steps, strict=True)):
        if score is not None and score < best_value:
            best, best_step, best_value, n_worse = given, count, score, 0
        elif score is not None:
            n_worse += 1
        assert_same_bits(state.best_params, best)
        assert (state.best_value, state.best_step) == (best_value, best_step)
        assert (state.n_worse, state.step, state.value) == (n_worse, count + 1, ())
        assert not state.stopped
    assert (best_step, best_value) == (7, 1.0)


def test_in_place_it_has_the_same_bits():
    for name, params in trees().items():
        torch.manual_seed(1)
        pure = list(walk(Best(AdamW(lr=0.1), patience=1), params, SCORES))
        torch.manual_seed(1)
        written = walk(Best(AdamW(lr=0.1), patience=1), params, SCORES, "update_")
        for one, other in zip(pure, written, strict=True):
            assert_same_bits(one, other), name


@both_ways
def test_the_largest_score_may_be_the_best(method):
    scores = [-math.inf, 1.0, 0.5, math.nan, 1.5]
    states = [state for _, state in walk(Best(SGD(), "max"), torch.ones(2), scores, method)]
    if method == "update":
        values = [state.best_value.item() for state in states]
        assert values == [-math.inf, 1.0, 1.0, 1.0, 1.5]
    assert states[-1].best_step == 4


def test_a_new_best_is_better_by_more_than_the_threshold():
    for mode, sign in (("min", 1.0), ("max", -1.0)):
        scores = [sign * score for score in (4.0, 3.5, 3.0, 2.75, 2.25)]
        steps = walk(Best(SGD(), mode, threshold=0.5), torch.ones(2), scores)
        values = [sign * state.best_value.item() for _, state in steps]
        assert values == [4.0, 4.0, 3.0, 3.0, 2.25]


def test_scores_are_compared_in_float64():
    score = torch.tensor(1.0 - 2.0**-40, dtype=torch.float64)
    steps = list(walk(Best(SGD()), torch.ones(2), [torch.tensor(1.0), score]))
    assert steps[-1][1].best_value == score


@pytest.mark.parametrize("patience", [0, 2, torch.tensor(2.0), lambda count: torch.tensor(2)])
def test_it_is_time_to_stop_after_more_scores_than_its_patience_without_a_best(patience):
    most = patience if isinstance(patience, int) else 2
    scores = [1.0, *[2.0, None] * most, 3.0, 0.5]
    stopped = [
        s.stopped.item() for _, s in walk(Best(SGD(), patience=patience), torch.ones(1), scores)
    ]
    assert stopped == [False] * (1 + 2 * most) + [True, False]


@pytest.mark.parametrize("patience", [None, math.inf])
def test_without_patience_it_never_is(patience):
    *_, (_, state) = walk(Best(SGD(), patience=patience), torch.ones(1), [0.0] + [1.0] * 50)
    assert state.n_worse == 50
    assert not state.stopped


def test_what_is_kept_is_in_fresh_memory_and_of_the_dtypes_of_the_parameters():
    params = {
        "half": torch.randn(3, dtype=torch.bfloat16),
        "complex": torch.randn(2, dtype=torch.complex64),
        "number": torch.randn(()),
        "empty": torch.randn(0, 2),
        "turned": torch.randn(3, 2).T,
    }
    opt = Best(AdamW(lr=0.1))
    state = opt.init(params)
    for score in (None, 1.0, 2.0, 0.5):
        before = {leaf.data_ptr() for leaf in leaves((params, state)) if leaf.numel()}
        new_params, new_state = opt.update(random_like(params), state, params, value=score)
        assert before.isdisjoint(
            leaf.data_ptr() for leaf in leaves((new_params, new_state)) if leaf.numel()
        )
        for name, leaf in new_state.best_params.items():
            assert leaf.dtype is params[name].dtype
        params, state = new_params, new_state


def test_in_place_nothing_but_counts_is_written_unless_there_is_a_new_best():
    opt, params = Best(AdamW(lr=0.1)), {"w": torch.randn(3), "b": torch.randn(2)}
    state = opt.init(params)
    opt.update_(random_like(params), state, params, value=1.0)
    kept = state.best_params
    for score in (None, 2.0, torch.tensor(3.0), math.nan):
        versions = [leaf._version for leaf in leaves(kept)]
        opt.update_(random_like(params), state, params, value=score)
        assert versions == [leaf._version for leaf in leaves(kept)]
    opt.update_(random_like(params), state, params, value=0.5)
    assert versions != [leaf._version for leaf in leaves(kept)]


@both_ways
def test_it_moves_nothing_itself(method):
    params, grads = trees()["nested"], random_like(trees()["nested"])
    inner = AdamW(lr=0.1)
    expected = inner.update(grads, inner.init(params), params)
    opt, own = Best(inner), clone(params)
    moved, state = getattr(opt, method)(grads, opt.init(own), own, value=1.0)
    assert_same_bits((moved, state.inner), expected)


@both_ways
def test_leaves_that_rest_or_have_no_gradient_are_kept_as_they_are(method):
    params = {"a": torch.randn(3), "n": torch.tensor([1, 2])}
    opt = Best(Partition({"move": AdamW(lr=0.1), "rest": Frozen()}, {"a": "move", "n": "rest"}))
    state = opt.init(params)
    for score, first in ((2.0, 3), (3.0, 4), (1.0, 5)):
        own = {**params, "n": torch.tensor([first, 2])}
        params, state = getattr(opt, method)({"a": None, "n": None}, state, own, value=score)
    assert_same_bits(state.best_params["n"], torch.tensor([5, 2]))
    assert params["n"] is own["n"]
    assert state.best_params["n"].data_ptr() != own["n"].data_ptr()


def test_members_have_scores_of_their_own_and_those_that_stopped_stay_as_they_are():
    opt = Best(AdamW(lr=0.1), patience=1)
    params = {"w": torch.randn(3, 4), "b": torch.randn(3, 2).bfloat16()}
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.5], [1.0, 2.0, 2.0, 0.5], [2.0, math.nan, 1.0, 3.0]])
    gradients = [random_like(params) for _ in range(4)]

    def step(g, s, p, v):
        return opt.update(g, s, p, value=v, active=~s.stopped)

    moved, state = params, vmap(opt.init)(params)
    for grads, score in zip(gradients, scores.T, strict=True):
        moved, state = vmap(step)(grads, state, moved, score)
    for i in range(3):
        alone = tree_map(lambda p, i=i: p[i], params)
        own = opt.init(alone)
        for grads, score in zip(gradients, scores[i], strict=True):
            if not own.stopped:
                each = tree_map(lambda g, i=i: g[i], grads)
                alone, own = opt.update(each, own, alone, value=score)
        assert_same_bits(tree_map(lambda leaf, i=i: leaf[i], (moved, state)), (alone, own))
    assert state.stopped.tolist() == [False, True, False]
    assert state.step.tolist() == [4, 3, 4]


def test_members_have_patience_and_thresholds_of_their_own():
    patience, threshold = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.5]).double()
    opts = Best(SGD(), patience=patience, threshold=threshold)
    params = torch.ones(2, 3)
    state = vmap(lambda opt, p: opt.init(p))(opts, params)
    for score in (3.0, 2.0, 2.5):
        params, state = vmap(lambda o, s, p, v=score: o.update(p, s, p, value=v))(
            opts, state, params
        )
    assert state.best_value.tolist() == [2.0, 3.0]
    assert state.n_worse.tolist() == [1, 2]
    assert state.stopped.tolist() == [True, True]


def test_no_derivative_flows_through_the_score_or_what_is_kept():
    opt = Best(AdamW(lr=0.1, differentiable=True))

    def kept(w):
        state = opt.init(w)
        for _ in range(2):
            w, state = opt.update(w.square(), state, w, value=w.square().sum())
        return w.sum(), state.best_params.sum() + state.best_value.float()

    w = torch.randn(3)
    plain = AdamW(lr=0.1, differentiable=True)

    def moved(w):
        state = plain.init(w)
        for _ in range(2):
            w, state = plain.update(w.square(), state, w)
        return w.sum()

    assert_same_bits(grad(lambda w: sum(kept(w)))(w), grad(moved)(w))
    assert_same_bits(jvp(kept, (w,), (torch.ones(3),))[1][1], torch.zeros(()))
    asked = w.clone().requires_grad_()
    value = asked.square().sum()
    _, state = opt.update(torch.ones(3), opt.init(asked), asked, value=value)
    assert not any(leaf.requires_grad for leaf in leaves(state._replace(inner=())))
    value.backward()
    assert_same_bits(asked.grad, 2 * w)


@pytest.mark.by_day(1)
@both_ways
def test_one_compiled_graph_takes_every_score(method):
    torch.compiler.reset()
    opt = Best(Clip(AdamW(lr=0.1), 0.5), patience=1)

    def step(grads, state, params, value):
        return getattr(opt, method)(grads, state, params, value=value)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    params = {"w": torch.randn(3).bfloat16(), "b": torch.randn(2, dtype=torch.float64)}
    own, state = clone(params), opt.init(params)
    try:
        for score in (3.0, math.nan, 2.0, 4.0, 4.0):
            grads, value = random_like(params), torch.tensor(score)
            expected = opt.update(grads, clone(state), clone(own), value=value)
            own, state = compiled(grads, state, own, value)
            assert state.value == ()
            assert_same_bits(state._replace(inner=()), expected[1]._replace(inner=()))
            torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")
    assert state.stopped


AROUND = {
    "Clip": lambda opt: Clip(opt, 1e9),
    "Ema": lambda opt: Ema(opt, 0.9),
    "Lookahead": lambda opt: Lookahead(opt, 100),
    "SkipNonfinite": SkipNonfinite,
    "Partition": lambda opt: Partition({"a": opt}, {"w": "a", "b": "a"}),
    "Zero1": lambda opt: Zero1(opt, mesh=None),
    "several": lambda opt: Ema(SkipNonfinite(Clip(Accumulate(opt, 1), 1e9)), 0.9),
}


@both_ways
@pytest.mark.parametrize("within", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("name", AROUND)
def test_it_is_found_and_told_at_every_depth(name, within, method):
    wrap, inner = AROUND[name], AdamW(lr=0.1)
    opt = wrap(Best(inner)) if within else Best(wrap(inner))
    params = {"w": torch.randn(3, 2), "b": torch.randn(5)}
    state = opt.init(params)
    for score in (3.0, None, 1.0, 2.0):
        if score == 1.0:
            best = clone(params)
        params, state = getattr(opt, method)(random_like(params), state, params, value=score)
    (own,) = find(state, BestState).values()
    assert (own.best_value, own.best_step, own.n_worse, own.value) == (1.0, 2, 1, ())
    if not (within and name == "Zero1"):  # which has them in buckets
        (kept,) = find(state, "best_params").values()
        assert_same_bits(kept, best)


def test_within_what_leaves_updates_out_it_sees_the_scores_of_those_that_are_made():
    grads, params = [torch.ones(2), torch.full((2,), math.nan)], torch.ones(2)
    for opt in (Accumulate(Best(SGD()), 2), SkipNonfinite(Best(SGD()))):
        own, state = params, opt.init(params)
        for score, one in zip((3.0, 2.0), grads, strict=True):
            own, state = opt.update(one, state, own, value=score)
        accumulates = isinstance(opt, Accumulate)
        assert state.inner.best_value == (2.0 if accumulates else 3.0)


def test_a_checkpoint_goes_on_to_the_bit():
    opt = Clip(Best(AdamW(lr=0.1), patience=3), 0.5)
    params = trees()["nested"]
    state = opt.init(params)
    for score in (3.0, 1.0, 2.0):
        params, state = opt.update(random_like(params), state, params, value=score)
    saved = clone(interop.to_state_dict({"params": params, "state": state}))
    loaded = interop.from_state_dict({"params": params, "state": opt.init(params)}, saved)
    copied = pickle.loads(pickle.dumps(opt))
    assert copied == opt
    grads = random_like(params)
    assert_same_bits(
        copied.update(grads, loaded["state"], loaded["params"], value=0.5),
        opt.update(grads, state, params, value=0.5),
    )


def test_what_is_wrong_is_refused_by_path_and_nothing_is_written():
    opt = Best(AdamW())
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    state, grads = opt.init(params), random_like(params)
    other = state._replace(best_params={**params, "b": torch.ones(4)})
    assert "state.best_params['b'] does not go" in attempt(opt, grads, other, params)
    half = state._replace(best_value=torch.ones(()))
    assert "state.best_value is of torch.float32" in attempt(opt, grads, half, params)
    flag = state._replace(stopped=torch.zeros(()))
    assert "state.stopped" in attempt(opt, grads, flag, params)
    assert "BestState" in attempt(opt, grads, state.inner, params)
    history = state._replace(best_value=state.best_value.clone().requires_grad_())
    assert attempt(opt, grads, history, params).startswith("state.best_value requires")
    shared = state._replace(best_params=params)
    assert "shares its memory" in attempt(opt, grads, shared, params)
    state = opt.init(params)
    before = clone((params, state))
    with pytest.raises(ValueError, match="grads"):
        opt.update_({**grads, "b": torch.ones(2)}, state, params, value=1.0)
    broken = state._replace(inner=state.inner._replace(exp_avg={}))
    with pytest.raises(ValueError, match="exp_avg"):
        opt.update_(grads, broken, params, value=1.0)
    assert_same_bits((params, state), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "least"}, "mode='least': must be one of min, max"),
        ({"patience": -1}, "patience=-1.0: patience must be a whole number of at least 0"),
        ({"patience": 0.5}, "patience=0.5: patience must be a whole number"),
        ({"threshold": -0.1}, "threshold=-0.1: threshold must be finite and at least 0"),
        ({"threshold": None}, "threshold=None: must be a number"),
        ({"threshold": math.nan}, "threshold=nan"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Best(AdamW(), **options)
    with pytest.raises(TypeError, match="inner"):
        Best(AdamW)
