"""LocalUpdates: apart between syncs, one at them; the numbers of torch and of DiLoCo."""

import copy
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from funcopt import Accumulate, AdamW, Clip, Frozen, Partition, interop
from funcopt.distributed import LocalUpdates, LocalUpdatesState, _average

from ..cases import assert_close, assert_same_bits, clone, leaves, random_like, tree_map, trees
from .harness import run_ranks

DILOCO = {"outer_lr": 0.7, "outer_momentum": 0.9}
OUTER = [{}, {"outer_lr": 0.5}, DILOCO, {**DILOCO, "nesterov": False}]


def start():
    """Parameters of every kind, the same on each rank."""
    torch.manual_seed(0)
    return {
        "w": torch.randn(5, 3),
        "0-dim": torch.randn(()),
        "empty": torch.randn(0, 3),
        "transposed": torch.randn(4, 7).T,
        "double": torch.randn(6, dtype=torch.float64),
        "complex": torch.randn(3, dtype=torch.complex64),
        "bfloat16": torch.randn(33).bfloat16(),
        "half": torch.randn(2, 2).half(),
    }


def gradients_of(rank, params, steps):
    torch.manual_seed(1 + rank)
    return [random_like(params) for _ in range(steps)]


def gathered(tree):
    """The tree of each rank."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, tree)
    return found


def mean(tensors):
    wide = [t.to(torch.complex128 if t.is_complex() else torch.float64) for t in tensors]
    return sum(wide) / len(wide)


def check_syncs(rank, mesh, options, in_place):
    """Follow the equations step by step on the whole, and compare."""
    opt, inner = LocalUpdates(AdamW(lr=0.1), 3, mesh, **options), AdamW(lr=0.1)
    params = start()
    state = opt.init(params)
    anchor, velocity = clone(params), tree_map(torch.zeros_like, params)
    anchor = tree_map(lambda a: mean([a]), anchor)
    lr, momentum = options.get("outer_lr", 1.0), options.get("outer_momentum", 0.0)
    for number, grads in enumerate(gradients_of(rank, params, 7), 1):
        alone = inner.update(grads, clone(state.inner), clone(params))
        before = clone((params, state))
        moved = (opt.update_ if in_place else opt.update)(grads, state, params)
        if not in_place:
            assert_same_bits((params, state), before)
        params, state = moved
        assert_same_bits(state.inner, alone[1])
        assert state.steps_since_sync == number % 3
        everyone = gathered(params)
        if number % 3:
            assert_same_bits(params, alone[0])
            assert len(everyone) == 1 or not torch.equal(everyone[0]["w"], everyone[1]["w"])
            continue
        for other in everyone:
            assert_same_bits(other, everyone[0])
        means = {k: mean([p[k] for p in gathered(alone[0])]) for k in params}
        step = tree_map(lambda a, m: a - m, anchor, means)
        velocity = tree_map(lambda v, s: momentum * v + s, velocity, step)
        if options.get("nesterov", True):
            step = tree_map(lambda v, s: s + momentum * v, velocity, step)
        else:
            step = velocity
        anchor = tree_map(lambda a, s: a - lr * s, anchor, step)
        for key, param in params.items():
            spread = {torch.bfloat16: 1e-2, torch.half: 1e-3}.get(param.dtype, 1e-5)
            assert_close(mean([param]), anchor[key], spread, spread)
        for tree, wanted in ((state.anchor, anchor), (state.momentum_buffer, velocity)):
            for key in tree or ():
                assert_close(mean([tree[key]]), wanted[key], 1e-4, 1e-5)


class Counted:
    """Counts the reductions and their bytes."""

    def __enter__(self):
        self.calls, self.bytes, self.original = 0, 0, dist.all_reduce
        dist.all_reduce = self.reduce
        return self

    def __exit__(self, *_):
        dist.all_reduce = self.original

    def reduce(self, tensor, *args, **kwargs):
        self.calls += 1
        self.bytes += tensor.nbytes
        return self.original(tensor, *args, **kwargs)


def check_traffic(mesh):
    """Reductions go by bytes and kinds, none between syncs, whatever the bucket's size."""
    params = {f"{i}": torch.randn(100) for i in range(50)}
    params |= {"half": torch.randn(1000).half(), "double": torch.randn(10, dtype=torch.float64)}
    opt = LocalUpdates(AdamW(), 2, mesh)
    results = []
    for full, calls in ((2**25, 2), (4000, 7), (1, 52)):
        _average._FULL, kept = full, _average._FULL
        own, state = clone(params), opt.init(params)
        with Counted() as between:
            own, state = opt.update(params, state, own)
        with Counted() as counted:
            own, state = opt.update(params, state, own)
        _average._FULL = kept
        assert between.calls == 0
        assert (counted.calls, counted.bytes) == (calls, 4 * 6000 + 8 * 10)
        results.append(own)
    for other in results[1:]:
        for key, leaf in other.items():  # of half, the last bit may round the other way
            assert_close(leaf, results[0][key], 1e-3 if key == "half" else 1e-6, 1e-6)


def check_frozen(rank, mesh):
    """A frozen leaf, which an update hands back as it is, is not written into."""
    params = {"a": torch.ones(2), "b": torch.full((2,), float(rank), requires_grad=True)}
    inner = Partition({"on": AdamW(), "off": Frozen()}, {"a": "on", "b": "off"})
    opt = LocalUpdates(inner, 1, mesh)
    before = clone(params)
    moved, _ = opt.update({"a": torch.ones(2), "b": None}, opt.init(params), params)
    assert_same_bits(params, before)
    assert torch.equal(moved["b"], torch.full((2,), (mesh.size() - 1) / 2))
    assert moved["b"].is_leaf
    assert moved["b"].requires_grad


def check_none_on_one_rank(rank, mesh):
    """Processes average every leaf, though one of them had no gradient for it."""
    opt = LocalUpdates(AdamW(lr=0.1, weight_decay=0.0), 1, mesh)
    grads = {"a": torch.ones(2), "b": torch.ones(2) if rank == 0 else None}
    params = tree_map(torch.ones_like, {"a": torch.ones(2), "b": torch.ones(2)})
    params, _ = opt.update(grads, opt.init(params), params)
    assert_close(params["b"], torch.full((2,), 1 - 0.1 / mesh.size()))


def check_another_order(rank, mesh):
    """Leaves are averaged by their paths, not in the order in which each dict was filled."""
    opt = LocalUpdates(AdamW(lr=0.0), 1, mesh, **DILOCO)
    params = {"a": torch.full((2,), 1.0 + rank), "b": torch.full((2,), 10.0)}
    if rank == 1:
        params = dict(reversed(params.items()))
    state = opt.init(params)
    state = state._replace(anchor=tree_map(torch.zeros_like, state.anchor))
    params, state = opt.update(tree_map(torch.zeros_like, params), state, params)
    assert_close(state.momentum_buffer["a"], torch.full((2,), -(1 + mesh.size()) / 2))
    assert_close(params["b"], torch.full((2,), 0.7 * 1.9 * 10))


def check_torch(rank, mesh, warmup):
    """Torch's own optimizer beside it, after a warmup without syncs.

    On two ranks to the bit. On more, the order of a sum goes by an element's place in the buffer.
    """
    near = {"rtol": 0, "atol": 0} if mesh.size() == 2 else {"rtol": 1e-5, "atol": 1e-6}
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    ours = {name: p.detach().clone() for name, p in model.named_parameters()}
    theirs = PostLocalSGDOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.05),
        # It averages in the first step after the warmup, and counts from there.
        PeriodicModelAverager(4, warmup + 3, mesh.get_group()),
    )
    torch.manual_seed(3 + rank)
    alone = AdamW(lr=0.05, kernel="foreach")
    opt = LocalUpdates(alone, 4, mesh)
    state = alone.init(ours)
    for number in range(warmup + 9):
        x = torch.randn(5, 4)
        theirs.zero_grad()
        model(x).square().mean().backward()
        grads = grad(lambda p: torch.func.functional_call(model, p, x).square().mean())(ours)  # noqa: B023
        theirs.step()
        if number == warmup:
            state = opt.init(ours)._replace(inner=state)
        ours, state = (alone if number < warmup else opt).update(grads, state, ours)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), ours[name], **near)


def check_diloco(rank, mesh):
    """DiLoCo as it is written down, with torch.optim.SGD for the outer optimizer, to the bit."""
    params = {"w": torch.ones(4, 3), "b": torch.zeros(3)}
    opt = LocalUpdates(AdamW(lr=0.1), 2, mesh, **DILOCO)
    state = opt.init(params)
    whole = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    outer = torch.optim.SGD(whole.values(), lr=0.7, momentum=0.9, nesterov=True)
    own, own_state = clone(params), AdamW().init(params)
    for number, grads in enumerate(gradients_of(rank, params, 6), 1):
        params, state = opt.update(grads, state, params)
        own, own_state = AdamW(lr=0.1).update(grads, own_state, own)
        if number % 2 == 0:
            flat = torch.cat([own["b"], own["w"].reshape(-1)]) / mesh.size()
            dist.all_reduce(flat)  # as a whole, since its order of summation goes by position
            whole["b"].grad = whole["b"].detach() - flat[:3]
            whole["w"].grad = whole["w"].detach() - flat[3:].view(4, 3)
            outer.step()
            own = {name: leaf.detach().clone() for name, leaf in whole.items()}
            assert_same_bits(state.anchor, own)
            buffers = {name: outer.state[p]["momentum_buffer"] for name, p in whole.items()}
            assert_same_bits(state.momentum_buffer, buffers)
        assert_same_bits(params, own)


def check_order(rank, mesh):
    """Wrappers inside and around it, and a checkpoint between syncs."""
    opt = Accumulate(LocalUpdates(Clip(AdamW(lr=0.1), 0.5, nonfinite="skip"), 2, mesh, **DILOCO), 2)
    params = {"w": torch.ones(3)}
    gradients = gradients_of(rank, params, 8)
    if rank == 0:
        gradients[2]["w"][0] = math.nan  # this rank's inner update is skipped, and it still syncs
    state, resumed = opt.init(params), None
    for number, grads in enumerate(gradients):
        if number == 6:
            saved = interop.to_state_dict({"params": params, "state": state})
            template = {"params": params, "state": opt.init(params)}
            resumed = interop.from_state_dict(template, clone(saved))
        params, state = opt.update(grads, state, params)
        if resumed is not None:
            resumed["params"], resumed["state"] = opt.update_(
                grads, resumed["state"], resumed["params"]
            )
            assert_same_bits((params, state), (resumed["params"], resumed["state"]))
    for other in gathered(params):
        assert_same_bits(other, params)
    assert params["w"].isfinite().all()


def check_mesh_of_two_dimensions():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match=r"2 dimensions.*mesh\['dp'\]"):
        LocalUpdates(AdamW(), 2, mesh)
    rank = dist.get_rank()
    opt = LocalUpdates(AdamW(lr=0.0), 1, mesh["dp"])
    params, _ = opt.update(torch.ones(1), opt.init(torch.ones(1)), torch.full((1,), float(rank)))
    assert params == 1 + rank % 2  # of ranks 0 and 2, or 1 and 3


def on_each_rank(rank):
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for options in OUTER:
        for in_place in (False, True):
            check_syncs(rank, mesh, options, in_place)
    check_traffic(mesh)
    check_frozen(rank, mesh)
    check_none_on_one_rank(rank, mesh)
    check_another_order(rank, mesh)
    check_order(rank, mesh)
    check_diloco(rank, mesh)
    for warmup in (0, 3):
        check_torch(rank, mesh, warmup)
    if mesh.size() == 4:
        check_mesh_of_two_dimensions()
    return repr(LocalUpdates(AdamW(), 2, mesh))


@pytest.mark.by_day(1)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes_train_apart_and_sync_to_the_same_bits(world_size):
    assert all("every=2" in found for found in run_ranks(world_size, on_each_rank))


def with_a_mesh_of_one(rank):
    mesh = init_device_mesh("cpu", (1,))
    for options in OUTER:
        check_syncs(rank, mesh, options, False)
        one, alone = (LocalUpdates(AdamW(), 2, of, **options) for of in (mesh, None))
        assert_same_bits(one.init(start()), alone.init(start()))


def test_a_mesh_of_one_process_is_that_process():
    run_ranks(1, with_a_mesh_of_one)


@pytest.mark.parametrize("name", trees())
def test_alone_and_by_the_mean_it_is_the_inner_optimizer_to_the_bit(name):
    params = trees()[name]
    opt, inner = LocalUpdates(AdamW(lr=0.1), 2, None), AdamW(lr=0.1)
    own, state, own_state = clone(params), opt.init(params), inner.init(params)
    for _ in range(5):
        grads = random_like(params)
        params, state = opt.update(grads, state, params)
        own, own_state = inner.update(grads, own_state, own)
        assert_same_bits((params, state.inner), (own, own_state))


@pytest.mark.parametrize("options", OUTER)
def test_in_place_the_numbers_and_the_memory_stay_the_same(options):
    opt = LocalUpdates(AdamW(lr=0.1), 2, None, **options)
    params = start()
    own, state = clone(params), opt.init(params)
    own_state = clone(state)
    places = [leaf.data_ptr() for leaf in leaves((own, own_state))]
    for grads in gradients_of(0, params, 5):
        params, state = opt.update(grads, state, params)
        found = opt.update_(grads, own_state, own)
        assert found[0] is own
        assert_same_bits((own, own_state), (params, state))
    assert [leaf.data_ptr() for leaf in leaves((own, own_state))] == places


def test_the_structure_of_the_state_is_a_matter_of_the_fields():
    params = {"w": torch.ones(2).half(), "b": torch.ones(1, dtype=torch.float64)}
    shapes = [LocalUpdates(AdamW(), 2, None, **options).init(params) for options in OUTER]
    assert (shapes[0].anchor, shapes[0].momentum_buffer) == ((), ())
    assert shapes[1].momentum_buffer == ()
    assert shapes[2].anchor["w"].dtype is torch.float32
    assert shapes[2].momentum_buffer["b"].dtype is torch.float64
    for index, state in enumerate(shapes):
        for other, options in enumerate(OUTER):
            if min(index, 2) != min(other, 2):
                with pytest.raises(ValueError, match=r"state\.(anchor|momentum_buffer)"):
                    LocalUpdates(AdamW(), 2, None, **options).update(params, state, params)


def test_parameters_that_require_a_gradient_grow_no_graph():
    opt = LocalUpdates(AdamW(lr=0.1), 2, None, **DILOCO)
    params = {"w": torch.nn.Parameter(torch.ones(3)), "frozen": torch.ones(2)}
    state = opt.init(params)
    for _ in range(5):
        grads = grad(lambda p: p["w"].pow(2).sum() + p["frozen"].sum())(params)
        params, state = opt.update(grads, state, params)
        assert params["w"].is_leaf
        assert params["w"].requires_grad
        assert not params["frozen"].requires_grad
        assert not any(leaf.requires_grad for leaf in leaves(state))


def test_what_would_need_a_derivative_of_a_sync_is_refused():
    params = torch.ones(2)
    opt = LocalUpdates(AdamW(), 1, None)
    state = opt.init(params)
    learnt = LocalUpdates(AdamW(lr=torch.tensor(0.1, requires_grad=True)), 1, None)
    asked = torch.ones(2, requires_grad=True) * 1
    for own, grads in ((opt, asked), (learnt, params)):
        for step in (own.update, own.update_):
            with pytest.raises(RuntimeError, match="no derivative goes through what LocalUpdates"):
                step(grads, state, params)
    with pytest.raises(RuntimeError, match="which a transform"):
        vmap(opt.update, in_dims=(0, None, 0))(torch.ones(3, 2), state, torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="which a transform"):
        grad(lambda p: opt.update(params, state, p)[0].sum())(params)


@pytest.mark.parametrize("above_autograd", [False, True])
def test_a_tracer_is_refused_since_it_must_know_whether_a_sync_is_due(above_autograd):
    opt = LocalUpdates(AdamW(), 2, None)
    params = torch.ones(3)
    state = opt.init(params)
    trace = make_fx(lambda w: opt.update(w, state, w)[0], pre_dispatch=above_autograd)
    with pytest.raises(RuntimeError, match="cannot be read, as it must to know whether a sync is"):
        trace(params)


def test_a_compiled_loop_breaks_its_graph_at_the_update():
    torch.compiler.reset()
    opt = LocalUpdates(AdamW(lr=0.1), 2, None, **DILOCO)

    @torch.compile(backend="eager")
    def step(grads, state, params):
        return opt.update(tree_map(lambda g: g * 2, grads), state, params)

    params = {"w": torch.ones(3)}
    own, state, own_state = params, opt.init(params), opt.init(params)
    for _ in range(4):
        grads = random_like(params)
        own, own_state = step(grads, own_state, own)
        params, state = opt.update(tree_map(lambda g: g * 2, grads), state, params)
        assert_same_bits((own, own_state), (params, state))


def test_update_in_place_refuses_before_it_writes():
    opt = LocalUpdates(AdamW(), 1, None, **DILOCO)
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    grads, state = clone(params), opt.init(params)

    def attempt(grads, state, params):
        before = clone((state, params))
        with pytest.raises((RuntimeError, TypeError, ValueError)) as refused:
            opt.update_(grads, state, params)
        assert_same_bits((state, params), before)
        return str(refused.value)

    def with_b(name, leaf):
        return state._replace(**{name: {**getattr(state, name), "b": leaf}})

    assert "grads['b']: shape (2,)" in attempt({**grads, "b": torch.ones(2)}, state, params)
    for name in ("anchor", "momentum_buffer"):
        assert f"state.{name}['b'] does not" in attempt(grads, with_b(name, torch.ones(4)), params)
        assert "strides" in attempt(grads, with_b(name, torch.ones(1).expand(3)), params)
        shared = with_b(name, params["b"])
        assert "shares its memory" in attempt(grads, shared, params)
    both = state._replace(momentum_buffer=state.anchor)
    assert "shares its memory" in attempt(grads, both, params)
    assert "state.steps_since_sync" in attempt(
        grads, state._replace(steps_since_sync=torch.ones(2)), params
    )
    assert "LocalUpdatesState" in attempt(grads, state.inner, params)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("every", value) for value in (0, 1.5, math.nan, math.inf, torch.tensor(2.0), "2", True)),
        *(("outer_lr", value) for value in (-0.1, math.nan, torch.tensor(0.7), None)),
        *(("outer_momentum", value) for value in (-0.1, 1.0, math.nan, torch.tensor(0.9), "0")),
        ("nesterov", 1),
        ("inner", AdamW),
        ("mesh", "cpu"),
    ],
)
def test_bad_arguments_are_refused(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        LocalUpdates(**{"inner": AdamW(), "every": 2, "mesh": None, name: value})


def test_it_is_a_value():
    opt = LocalUpdates(AdamW(), 4.0, None, **DILOCO)
    assert opt == copy.deepcopy(opt)
    assert hash(opt) == hash(copy.deepcopy(opt))
    assert "every=4, mesh=None, outer_lr=0.7" in repr(opt)
    assert isinstance(opt.init(torch.ones(1)), LocalUpdatesState)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_complex_leaf_may_come_after_an_odd_number_of_others(in_place):
    params = {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.complex64), "c": torch.ones(1)}
    inner = AdamW(lr=0.1)
    opt = LocalUpdates(inner, 1, None)
    expected, _ = inner.update(params, inner.init(params), params)
    found, _ = (opt.update_ if in_place else opt.update)(clone(params), opt.init(params), params)
    assert_same_bits(found, expected)
