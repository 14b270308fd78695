"""Updates in the capture of a CUDA graph: replayed right, or refused with what to do.

Without a GPU, the meta device stands for one, and the question whether a graph is being captured is
answered with yes. What a graph replays can be seen on a GPU alone.
"""

import contextlib
import math

import pytest
import torch

from funcopt import (
    Accumulate,
    AdamW,
    Best,
    Cautious,
    Clip,
    ClipAdaptive,
    ClipValue,
    Ema,
    Frozen,
    Lookahead,
    LossScale,
    Partition,
    Plateau,
    ScheduleFree,
    SkipNonfinite,
)
from funcopt._core import transforms
from funcopt.distributed import LocalUpdates, Zero1
from funcopt.schedules import Cosine

from ..cases import (
    assert_close,
    assert_same_bits,
    faded,
    leaves,
    no_synchronization,
    random_like,
    tree_map,
)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SCHEDULE = Cosine(peak=0.1, steps=20, warmup_steps=3)

OPTIMIZERS = {
    "AdamW": AdamW(lr=0.1),
    "amsgrad": AdamW(lr=0.1, amsgrad=True),
    "counts of leaves": AdamW(lr=0.1, step_per_leaf=True),
    "schedule": AdamW(lr=SCHEDULE, weight_decay=SCHEDULE),
    "Clip": Clip(AdamW(lr=0.1), 0.5),
    "Clip that skips": Clip(AdamW(lr=0.1), 0.5, nonfinite="skip"),
    "ClipValue": ClipValue(AdamW(lr=0.1), 0.5),
    "ClipAdaptive": ClipAdaptive(AdamW(lr=0.1), 0.1),
    "Accumulate": Accumulate(AdamW(lr=0.1), 3),
    "Accumulate without some gradients": Accumulate(AdamW(lr=0.1), 3),
    "SkipNonfinite": SkipNonfinite(AdamW(lr=0.1)),
    "LossScale": LossScale(AdamW(lr=0.1), init_scale=8.0, growth_interval=3),
    "Ema": Ema(AdamW(lr=0.1), 0.9),
    "Lookahead": Lookahead(AdamW(lr=0.1), every=3),
    "Lookahead that restarts": Lookahead(AdamW(lr=SCHEDULE), every=3, reset_state=True),
    "Best": Best(AdamW(lr=0.1), patience=2),
    "Plateau": Plateau(AdamW(lr=0.1), patience=0),
    "Cautious": Cautious(AdamW(lr=0.1), weight_decay=SCHEDULE),
    "ScheduleFree": ScheduleFree(AdamW(lr=SCHEDULE), weight_decay=0.1),
    "Transform": faded(AdamW(lr=0.1)),
    "Partition": Partition(
        {"decay": AdamW(lr=0.1), "none": AdamW(lr=0.1, weight_decay=0.0), "rest": Frozen()},
        {"w": "decay", "b": "none", "unused": "rest"},
    ),
    "nested": Accumulate(Ema(Lookahead(Clip(AdamW(lr=SCHEDULE), 0.5), every=2), 0.9), 3),
    "Zero1": Zero1(AdamW(lr=0.1), mesh=None),
}
SKIPPING = ("Clip that skips", "SkipNonfinite", "LossScale")

# What the state of each holds on the CPU.
COUNTS = {
    "AdamW": ["state.step"],
    "counts of leaves": ["state.step['w']", "state.step['b']", "state.step['unused']"],
    "Clip": ["state.inner.step"],
    "Accumulate": ["state.mini_step", "state.given", "state.inner.step"],
    "SkipNonfinite": ["state.inner.step"],
    "LossScale": ["state.inner.step"],
    "Ema": ["state.n_averaged", "state.weight", "state.inner.step"],
    "Lookahead": ["state.steps_since_sync", "state.inner.step"],
    "Partition": ["state.inner['decay'].step", "state.inner['none'].step"],
}


def params_on(device, **options):
    shapes = {"w": (4, 3), "b": (3,), "unused": (2,)}
    return {name: torch.randn(shape, device=device, **options) for name, shape in shapes.items()}


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(transforms, "capturing", lambda: True)


@pytest.mark.parametrize("method", ["update", "update_"])
@pytest.mark.parametrize("name", COUNTS)
def test_a_count_on_the_cpu_is_refused_by_its_path(name, method, capturing):
    params, opt = params_on("meta"), OPTIMIZERS[name]
    state = opt.init(params)
    with pytest.raises(RuntimeError) as error:
        getattr(opt, method)(params, state, params)
    found, _, remedy = str(error.value).partition(" on the CPU, where no replay of the CUDA graph")
    assert found == ", ".join(COUNTS[name]) + (" is" if len(COUNTS[name]) == 1 else " are")
    assert "Move what is there to the GPU before the capture" in remedy


@pytest.mark.parametrize("method", ["update", "update_"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_its_state_on_the_device_every_optimizer_may_be_captured(name, method, capturing):
    params, opt = params_on("meta"), OPTIMIZERS[name]
    state = tree_map(lambda leaf: leaf.to("meta"), opt.init(params))
    _, after = getattr(opt, method)(params, state, params)
    assert all(leaf.is_meta for leaf in leaves(after))


def test_the_error_says_how_to_move_the_counts(capturing):
    opt, params = Accumulate(Frozen(), 2), params_on("meta")
    with pytest.raises(RuntimeError) as error:
        opt.update(params, opt.init(params), params)
    remedy = "state._replace(mini_step=state.mini_step.cuda(), given=state.given.cuda())"
    assert f"with {remedy}: there each replay does" in str(error.value)


@pytest.mark.parametrize(
    ("opt", "path"),
    [
        (AdamW(lr=torch.tensor(0.1)), "lr"),
        (AdamW(lr=Cosine(peak=torch.tensor(0.1), steps=9)), "lr.peak"),
        (AdamW(betas=(0.9, torch.tensor(0.99))), r"betas\[1\]"),
        (Clip(AdamW(), max_norm=torch.tensor(1.0)), "max_norm"),
        (Accumulate(AdamW(), every=torch.tensor(2.0)), "every"),
        (Ema(Ema(AdamW(), torch.tensor(0.9)), 0.9), r"inner\.decay"),
        (Partition({"a": AdamW(lr=torch.tensor(0.1))}, lambda *_: "a"), r"inner\['a'\]\.lr"),
    ],
)
def test_a_hyperparameter_on_the_cpu_is_refused_since_its_value_would_stay(opt, path, capturing):
    params = params_on("meta")
    state = tree_map(lambda leaf: leaf.to("meta"), opt.init(params))
    with pytest.raises(RuntimeError, match=rf"^{path} is on the CPU.*Give a number"):
        opt.update(params, state, params)


@pytest.mark.parametrize(
    ("opt", "path"),
    [
        (LocalUpdates(AdamW(), 2, mesh=None), "the optimizer"),
        (Clip(LocalUpdates(AdamW(), 2, mesh=None), 1.0), "inner"),
    ],
)
def test_what_decides_on_the_host_is_refused(opt, path, capturing):
    params = params_on("meta")
    with pytest.raises(RuntimeError, match=rf"^{path} is a LocalUpdates.*out of the capture"):
        opt.update(params, opt.init(params), params)


@pytest.mark.parametrize("method", ["update", "update_"])
def test_on_the_cpu_nothing_is_captured_and_nothing_refused(method, capturing):
    for opt in (AdamW(lr=torch.tensor(0.1)), *OPTIMIZERS.values(), Frozen()):
        params = params_on("cpu")
        getattr(opt, method)(random_like(params), opt.init(params), params)


def test_where_cuda_is_not_in_use_no_graph_is_captured():
    """Its own question raises without a driver, as a build for CUDA has none on such a machine."""
    assert torch.cuda.is_initialized() or not transforms.capturing()


class Compared:
    """The same gradients for eager updates and for others, which have tensors of their own."""

    def __init__(self, name, device):
        self.opt = OPTIMIZERS[name]
        self.params = params_on(device)
        self.gradients = [random_like(self.params) for _ in range(12)]
        if name == "Accumulate without some gradients":
            self.gradients = [{**grads, "unused": None} for grads in self.gradients]
        if name in SKIPPING:
            self.gradients[5]["b"][1] = math.inf
            self.gradients[6]["w"][0] = math.nan
        if name == "LossScale":  # gradients of a loss that was scaled once
            self.gradients = [tree_map(lambda g: g * 8.0, grads) for grads in self.gradients]

    def eager(self, method="update"):
        params = tree_map(torch.clone, self.params)
        state = self.opt.init(params)
        for grads in self.gradients:
            params, state = getattr(self.opt, method)(grads, state, params)
        return params, state

    def replayed(self, method):
        """Make two eager updates, and the others by a graph that holds one."""
        params = tree_map(torch.clone, self.params)
        state = tree_map(lambda leaf: leaf.cuda(), self.opt.init(params))
        grads = tree_map(torch.clone, self.gradients[0])

        def step():
            results = getattr(self.opt, method)(grads, state, params)
            for old, new in zip(leaves((params, state)), leaves(results), strict=True):
                if new is not old:
                    old.copy_(new)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for given in self.gradients[:2]:
                tree_map(torch.Tensor.copy_, grads, given)
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for given in self.gradients[2:]:
            tree_map(torch.Tensor.copy_, grads, given)
            graph.replay()
        return params, state


@pytest.mark.parametrize("method", ["update", "update_"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_on_a_device_decides_the_same_without_being_read(name, method, monkeypatch):
    compared = Compared(name, "cpu")
    expected = compared.eager()
    monkeypatch.setattr(transforms, "on_host", lambda tensor: False)
    assert_close(compared.eager(method), expected, rtol=1e-6, atol=1e-7)


@needs_cuda
@pytest.mark.parametrize("method", ["update", "update_"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_graph_replays_what_eager_updates_do(name, method):
    compared = Compared(name, "cuda")
    params, state = compared.eager()
    own_params, own_state = compared.replayed(method)
    assert_close(own_params, params, rtol=1e-5, atol=1e-6)
    state = tree_map(lambda leaf: leaf.cuda(), state)
    assert_close(own_state, state, rtol=1e-5, atol=1e-6)


@needs_cuda
@pytest.mark.parametrize("method", ["update", "update_"])
@pytest.mark.parametrize("name", ["Accumulate", "Lookahead", "nested"])
def test_a_capture_that_would_replay_one_branch_is_an_error(name, method):
    opt, params = OPTIMIZERS[name], params_on("cuda")
    state = opt.init(params)
    before = tree_map(torch.clone, (params, state))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        params["w"].neg()  # an empty graph would be warned of
        with pytest.raises(RuntimeError, match="on the CPU, where no replay"):
            getattr(opt, method)(params, state, params)
    assert_same_bits((params, state), before)


@pytest.mark.parametrize("wrapper", [Accumulate, Lookahead])
def test_counts_are_where_the_number_is_that_they_count_to(wrapper):
    params = params_on("cpu")
    state = wrapper(Frozen(), every=torch.tensor(3.0, device="meta")).init(params)
    assert state[0].is_meta
    assert state[-1] == ()
    assert wrapper(Frozen(), every=torch.tensor(3.0)).init(params)[0].is_cpu
    if wrapper is Accumulate:
        assert state.given.is_meta


@needs_cuda
@pytest.mark.parametrize("method", ["update", "update_"])
@pytest.mark.parametrize("wrapper", [Accumulate, Lookahead])
def test_a_number_on_the_gpu_is_not_waited_for(wrapper, method):
    on_gpu = wrapper(AdamW(lr=0.1), every=torch.tensor(3.0, device="cuda"))
    params, expected = params_on("cuda"), wrapper(AdamW(lr=0.1), every=3)
    before = own = tree_map(torch.clone, params), on_gpu.init(params)
    theirs = params, expected.init(params)
    for number in range(7):
        grads = {**random_like(params), "unused": None}
        theirs = expected.update(grads, theirs[1], theirs[0])
        with no_synchronization() if number else contextlib.nullcontext():
            own = getattr(on_gpu, method)(grads, own[1], own[0])
    assert_close(own[0], theirs[0], rtol=1e-5, atol=1e-6)
    # Counts of a state that was made for a number on the CPU are waited for, and right.
    on_cpu = before[1]._replace(**{before[1]._fields[0]: torch.ones((), dtype=torch.float64)})
    _, after = getattr(on_gpu, method)(random_like(params), on_cpu, before[0])
    assert after[0] == 2


@needs_cuda
def test_a_learning_rate_on_the_gpu_may_change_between_replays():
    lr = torch.tensor(0.1, device="cuda", dtype=torch.float64)
    opt, params = AdamW(lr=lr), params_on("cuda")
    grads, state = random_like(params), opt.init(params)
    expected, expected_state = tree_map(torch.clone, params), opt.init(params)
    opt.update_(grads, opt.init(params), tree_map(torch.clone, params))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.update_(grads, state, params)
    for value in (0.1, 0.7, 0.01):
        lr.fill_(value)
        graph.replay()
        AdamW(lr=value).update_(grads, expected_state, expected)
    assert_close((params, state), (expected, expected_state), rtol=1e-5, atol=1e-6)
