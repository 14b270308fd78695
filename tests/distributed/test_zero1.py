"""Zero1 on one, two and four processes: the numbers of one process, at the least traffic."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import vmap
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import funcopt
from funcopt import (
    Accumulate,
    AdamW,
    Clip,
    ClipValue,
    Compensated,
    Ema,
    Frozen,
    Lookahead,
    MasterWeights,
    Muon,
    Partition,
    SkipNonfinite,
)
from funcopt.distributed import LocalUpdates, Zero1, Zero1State, gather_state, scatter_state
from funcopt.distributed._collectives import Started, one_ahead
from funcopt.interop import from_state_dict, to_state_dict

from ..cases import NOT_DENSE, not_dense, tree_map
from ..interop.formats import load_dcp
from .harness import run_ranks

STEPS = 20
SIZES = (1, 2, 4)
TINY, SMALL, HUGE = 1, 64, 2**30
HALVES = (torch.float16, torch.bfloat16)

# Uneven over two and four, of one element, of none, of shape (); one is transposed below.
SHAPES = {"z": (3, 5), "b": (1,), "empty": (0, 4), "scalar": (), "t": (6, 7), "big": (17, 9)}


def make_params(scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    tree = {n: torch.randn(shape, generator=g) * scale for n, shape in SHAPES.items()}
    tree["t"] = tree["t"].t()
    tree["double"] = torch.randn(4, 3, generator=g, dtype=torch.float64) * scale
    tree["half"] = (torch.randn(11, generator=g) * scale).bfloat16()
    tree["complex"] = torch.randn(2, 3, generator=g, dtype=torch.complex64) * scale
    return tree


def grads_of(step, rank):
    return make_params(10.0 ** (step % 3 - 1), seed=1000 + 10 * step + rank)


def mean(trees):
    return {n: torch.stack([tree[n] for tree in trees]).mean(0) for n in trees[0]}


def answers(tensor):
    """The tensor, with numbers for yes and no."""
    return tensor.float() if tensor.dtype is torch.bool else tensor


def worst(found, expected):
    """The largest difference between two trees, relative to the largest element if that is > 1."""
    own, others = (torch.utils._pytree.tree_leaves(tree) for tree in (found, expected))
    assert len(own) == len(others)
    pairs = zip(own, others, strict=True)
    return max(
        (
            ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()
            for a, b in ((answers(one), answers(other)) for one, other in pairs)
            if a.numel()
        ),
        default=0.0,
    )


def same(found, expected):
    own, others = (torch.utils._pytree.tree_leaves(tree) for tree in (found, expected))
    return len(own) == len(others) and all(map(torch.equal, own, others))


def run(opt, gradients, inplace=False, steps=STEPS, names=None):
    """Parameters and state after some steps; `gradients(step)` may give some of other leaves."""
    params = make_params()
    params = {name: params[name] for name in names or params}
    state = opt.init(params)
    for step in range(steps):
        grads = gradients(step)
        grads = {name: grads[name] for name in params}
        params, state = (opt.update_ if inplace else opt.update)(grads, state, params)
    return params, state


FALLING = funcopt.schedules.Linear(0.9, 0.1, steps=STEPS)
FALLING_COUNT = funcopt.schedules.Piecewise((3, 2), (2,))


INNERS = {
    "AdamW": AdamW(lr=1e-2, weight_decay=0.1),
    "amsgrad": AdamW(lr=funcopt.schedules.Linear(1e-2, 1e-3, steps=STEPS), amsgrad=True),
    "Ema": Ema(ClipValue(AdamW(lr=1e-2), max_value=0.5), decay=0.9),
    "Lookahead": Lookahead(AdamW(lr=1e-2), every=3),
    "MasterWeights": MasterWeights(AdamW(lr=1e-2)),
    "Compensated": Compensated(AdamW(lr=1e-2)),
    "schedules, by bucket": Ema(
        Lookahead(ClipValue(AdamW(lr=1e-2), FALLING), every=FALLING_COUNT, alpha=FALLING),
        decay=FALLING,
    ),
    "schedules": Clip(
        SkipNonfinite(AdamW(lr=1e-2, betas=(FALLING, 0.99), eps=1e-3), lambda count: 2), FALLING
    ),
    "Frozen": Frozen(),
    "Clip": Clip(AdamW(lr=1e-2, eps=1e-3), max_norm=3.0),
    "Clip, largest": Clip(AdamW(lr=1e-2, eps=1e-3), max_norm=0.1, norm_type=float("inf")),
    "Clip or skip": Clip(AdamW(lr=1e-2, eps=1e-3), max_norm=3.0, nonfinite="skip"),
    "Accumulate": Accumulate(Clip(AdamW(lr=1e-2, eps=1e-3), max_norm=3.0), every=4),
    "SkipNonfinite": SkipNonfinite(AdamW(lr=1e-2)),
}
MOST_WAYS = [
    *((TINY, "local", True), (SMALL, "local", False), (HUGE, "local", True)),
    *((TINY, "averaged", False), (SMALL, "averaged", True), (HUGE, "averaged", False)),
]


def check_numbers(mesh):
    """Every inner optimizer, bucket size and form of gradients, against one process."""
    rank, size = mesh.get_local_rank(), mesh.size()
    every = [[grads_of(step, r) for r in range(size)] for step in range(STEPS)]
    means = [mean(trees) for trees in every]
    for name, inner in INNERS.items():
        # The largest element of a complex leaf is another one than that of its pairs.
        names = [*SHAPES, "half"] if name == "Clip, largest" else None
        reference, state = run(inner, means.__getitem__, names=names)
        ways = MOST_WAYS if name == "AdamW" else MOST_WAYS[: 3 if name == "Clip" else 2]
        for bucket_bytes, gradients, inplace in ways:
            opt = Zero1(inner, mesh, bucket_bytes=bucket_bytes, gradients=gradients)
            given = means if gradients == "averaged" else [trees[rank] for trees in every]
            params, own = run(opt, given.__getitem__, inplace=inplace, names=names)
            case = name, bucket_bytes, gradients, inplace
            compare(params, reference, case)
            assert params["t"].stride() == reference["t"].stride(), case
            if name == "Accumulate":
                with pytest.raises(ValueError, match=r"state.inner.given has shape.*around Zero1"):
                    gather_state(opt, own, params)
            else:
                compare(to_state_dict(gather_state(opt, own, params)), to_state_dict(state), case)
            assert_same_everywhere(params)


def compare(found, expected, case):
    """Within 1e-6; of bfloat16, where a last bit may differ at each step, within a few of these."""
    assert found.keys() == expected.keys(), case
    for key in found:
        assert found[key].dtype == expected[key].dtype, (case, key)
        bound = 2e-2 if "half" in key else 1e-6
        assert worst(found[key], expected[key]) < bound, (case, key)


def assert_same_everywhere(params):
    for leaf in params.values():
        flat = torch.view_as_real(leaf) if leaf.is_complex() else leaf
        theirs = flat.contiguous().clone()
        dist.broadcast(theirs, 0)
        assert torch.equal(theirs, flat)


class Traffic:
    """Counts the collectives that are asked for, and the bytes that each process sends in them."""

    NAMES = (
        *("all_to_all_single", "all_gather_single", "all_gather_into_tensor"),
        *("reduce_scatter_single", "reduce_scatter_tensor", "all_reduce", "broadcast"),
        *("all_gather", "all_to_all", "reduce", "reduce_scatter", "gather", "scatter"),
    )

    def __enter__(self):
        self.calls, self.sent, self.patch = [], 0, pytest.MonkeyPatch()
        for name in self.NAMES:
            if hasattr(dist, name):
                self.patch.setattr(dist, name, self.counting(name, getattr(dist, name)))
        return self

    def __exit__(self, *_):
        self.patch.undo()

    def counting(self, name, function):
        def call(output, *args, **kwargs):
            assert kwargs.get("async_op"), name
            self.calls.append(name)
            size = dist.get_world_size(kwargs["group"])
            flat = max((output, args[0]), key=torch.Tensor.numel)
            self.sent += flat.numel() * flat.element_size() * (size - 1) // size
            return function(output, *args, **kwargs)

        return call


def check_traffic(mesh):
    """Bytes and collectives of a step, and bytes of state, of parameters of a few megabytes."""
    size = mesh.size()
    params = {f"layer {i}": torch.randn(250 + i, 101) for i in range(40)}
    params["odd"] = torch.randn(7)
    grads = {name: torch.ones_like(leaf) for name, leaf in params.items()}
    nbytes = sum(leaf.nbytes for leaf in params.values())
    floor = 2 * (size - 1) / size * nbytes
    for bucket_bytes in (2**19, HUGE):
        opt = Zero1(AdamW(), mesh, bucket_bytes=bucket_bytes)
        state = opt.init(params)
        buckets = len(state.inner.exp_avg)
        assert buckets <= nbytes // bucket_bytes + 1
        for method in (opt.update, opt.update_):
            with Traffic() as traffic:
                method(grads, state, params)
            assert len(traffic.calls) == (2 * buckets if size > 1 else 0), traffic.calls
            assert floor <= traffic.sent <= 1.05 * floor
        own = sum(
            leaf.to_local().nbytes
            for tree in (state.inner.exp_avg, state.inner.exp_avg_sq)
            for leaf in tree.values()
        )
        assert own <= 2 * nbytes / size + 8 * buckets
        averaged = Zero1(AdamW(), mesh, bucket_bytes=bucket_bytes, gradients="averaged")
        with Traffic() as traffic:
            averaged.update(grads, state, params)
        assert floor / 2 <= traffic.sent <= 1.05 * floor / 2


def check_one_dimension_of_a_mesh():
    """Two processes to each of two replicas of something else: means are over one dimension."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "other"))
    own = mesh["data"]
    opt = Zero1(AdamW(lr=0.1), own)
    other = mesh.get_local_rank("other")
    grads = [{"w": torch.tensor([1.0, -2.0, 3.0]) * (1 + r) * (1 - 2 * other)} for r in range(2)]
    w = {"w": torch.ones(3)}
    found, state = opt.update(grads[own.get_local_rank()], opt.init(w), w)
    expected, reference = AdamW(lr=0.1).update(mean(grads), AdamW().init(w), w)
    assert worst(found, expected) < 1e-6
    assert worst(gather_state(opt, state, w), reference) < 1e-6
    with pytest.raises(ValueError, match=r"has 2 dimensions.*mesh\['data'\]"):
        Zero1(AdamW(), mesh)


def check_errors(mesh):
    opt = Zero1(AdamW(), mesh, bucket_bytes=SMALL)
    params = make_params()
    state = opt.init(params)
    with pytest.raises(ValueError, match=r"grads\['b'\] is None.*Frozen"):
        opt.update({**make_params(), "b": None}, state, params)
    with pytest.raises(ValueError, match=r"grads\['b'\]: shape"):
        opt.update_({**make_params(), "b": torch.ones(2)}, state, params)
    with pytest.raises(ValueError, match=r"state\.inner\.exp_avg has \d+ buckets.*gather_state"):
        Zero1(AdamW(), mesh).update(make_params(), state, params)
    with pytest.raises(TypeError, match=r"state\.inner\.exp_avg\['bucket 0'\] is of type Tensor"):
        opt.update(make_params(), Zero1(AdamW(), None, SMALL).init(params), params)
    with pytest.raises(ValueError, match=r"params\['complex'\] is complex.*norm_type=2"):
        Zero1(Clip(AdamW(), 1.0, norm_type=1.0), mesh).init(params)
    with pytest.raises(TypeError, match=r"params\['w'\] is a DTensor"):
        opt.init({"w": torch.distributed.tensor.ones(4, device_mesh=mesh)})
    before = {name: leaf.clone() for name, leaf in params.items()}
    with pytest.raises(ValueError, match=r"grads\['z'\] shares its memory"):
        opt.update_({**make_params(), "z": params["z"]}, state, params)
    assert same(params, before)


def check_rest(mesh):
    """That new parameters are as the old, and inputs bit-unchanged."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1, bias=False))
    torch.manual_seed(0)
    torch.nn.init.normal_(model[0].weight)
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    before = {n: p.detach().clone() for n, p in params.items()}
    opt = Zero1(AdamW(lr=0.1), mesh)
    state = opt.init(params)
    old = {key: leaf.clone() for key, leaf in to_state_dict(state).items()}
    grads = {n: torch.randn_like(p) for n, p in params.items()}
    news, new_state = opt.update(grads, state, params)
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in news.values())
    assert same({n: p.detach() for n, p in params.items()}, before)
    assert all(torch.equal(leaf, old[key]) for key, leaf in to_state_dict(state).items())
    assert new_state.inner.step == 1
    # Another order of keys is the same layout.
    turned = dict(reversed(news.items()))
    again, _ = opt.update(dict(reversed(grads.items())), new_state, turned)
    expected, _ = opt.update(grads, new_state, news)
    assert list(again) == list(reversed(expected))
    assert all(torch.equal(again[name], expected[name]) for name in again)


def check_skip(mesh):
    """That a gradient that is not finite on one process alone moves nothing on any."""
    opt = Zero1(Clip(AdamW(), 1.0, nonfinite="skip"), mesh, bucket_bytes=SMALL)
    params, grads = make_params(), make_params()
    if mesh.get_local_rank() == 1:
        grads["scalar"] = torch.tensor(torch.nan)
    for method in (opt.update, opt.update_):
        found, state = method(grads, opt.init(params), params)
        assert same(found, make_params())
        assert state.inner.norm.isnan()
        assert state.inner.inner.step == 0


def check_reduce_scatter(mesh):
    """What is called where the backend is not gloo gives the same."""
    params, grads = make_params(), grads_of(0, mesh.get_local_rank())
    found = []
    for backend in ("gloo", "nccl"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "get_backend", lambda group, backend=backend: backend)
            opt = Zero1(AdamW(lr=0.1), mesh, bucket_bytes=SMALL)
            news, state = opt.update(grads, opt.init(params), params)
            found.append((news, to_state_dict(gather_state(opt, state, params))))
    for one, other in zip(*found, strict=True):
        compare(other, one, "reduce-scatter")
    large = {"w": torch.full((8,), 60000.0, dtype=torch.float16)}  # twice of it is infinite
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend", lambda group: "nccl")
        clipped = Zero1(Clip(AdamW(lr=0.1), 1.0), mesh)
        state = clipped.update(large, clipped.init(large), large)[1]
        assert state.inner.norm == (8 * 60000.0**2) ** 0.5


def check_beside_sharded(mesh):
    """That a Zero1 may have a group of its own beside leaves that are sharded otherwise."""
    plain, grads = make_params(), mean([grads_of(0, rank) for rank in range(mesh.size())])
    alone = Clip(AdamW(lr=0.1), 1.0)
    zero = Zero1(alone, mesh, bucket_bytes=SMALL)
    groups = Partition({"zero": zero, "sharded": AdamW()}, lambda name, _: name.split("/")[0])
    sharded = distribute_tensor(torch.ones(5, 2), mesh, [Shard(0)])
    for method in (groups.update, groups.update_):
        params = {f"zero/{n}": p for n, p in make_params().items()} | {"sharded/w": sharded.clone()}
        given = {f"zero/{n}": g for n, g in grads.items()} | {"sharded/w": sharded.clone()}
        state = groups.init(params)
        for _ in range(2):
            params, state = method(given, state, params)
        expected, inner = plain, alone.init(plain)
        for _ in range(2):
            expected, inner = alone.update(grads, inner, expected)
        found = {n: params[f"zero/{n}"] for n in expected}
        compare(found, expected, "beside sharded leaves")
        own = gather_state(zero, state.inner["zero"], expected)
        compare(to_state_dict(own), to_state_dict(inner), "state beside sharded leaves")
        assert isinstance(params["sharded/w"], DTensor)
        assert state.inner["sharded"].step == 2


def on_ranks(rank, directory):
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    check_numbers(mesh)
    check_traffic(mesh)
    check_errors(mesh)
    check_rest(mesh)
    check_scattered(mesh)
    if size == 1:
        return None
    check_skip(mesh)
    check_reduce_scatter(mesh)
    check_beside_sharded(mesh)
    if size == 4:
        check_one_dimension_of_a_mesh()
    return checkpoint(mesh, directory)


SCATTERED = {
    "amsgrad": AdamW(lr=1e-2, amsgrad=True),
    "Ema": Ema(AdamW(lr=1e-2), decay=0.9),
    "Ema of Lookahead": Clip(Ema(Lookahead(AdamW(lr=1e-2), every=2), decay=0.9), max_norm=3.0),
}


def few(scale=1.0, seed=0):
    """Leaves with fewer elements than there are processes, in every dtype, among others."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape, dtype):
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    return {
        **{f"half {dtype}": leaf(1, dtype=dtype) for dtype in HALVES},
        "one": leaf(1, dtype=torch.float32),
        "complex": leaf(1, dtype=torch.complex64),
        "none": leaf(0, 3, dtype=torch.bfloat16),
        "half": leaf(7, dtype=torch.bfloat16),
        "half, transposed": leaf(3, 2, dtype=torch.float16).mT,
    }


def check_scattered(mesh):
    """A state that is shared out has the dtypes of one that was made so, also where it is empty."""
    for name, inner in SCATTERED.items():
        params = few()
        state = inner.init(params)
        for step in range(3):
            params, state = inner.update(few(seed=step + 1), state, params)
        for bucket_bytes in (TINY, SMALL, HUGE):
            case = name, bucket_bytes
            opt = Zero1(inner, mesh, bucket_bytes=bucket_bytes, gradients="averaged")
            shared = scatter_state(opt, state, params)
            for own, wanted in zip(tensors(shared), tensors(opt.init(params)), strict=True):
                assert local(own).dtype is local(wanted).dtype, case
                assert local(own).shape == local(wanted).shape, case
            assert same(gather_state(opt, shared, params), state), case
            grads = few(seed=9)
            moved, _ = opt.update(grads, shared, params)
            compare(moved, inner.update(grads, state, params)[0], case)
            opt.update_(grads, shared, tree_map(torch.clone, params))


def tensors(tree):
    return torch.utils._pytree.tree_leaves(tree)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def checkpoint(mesh, directory):
    """Save on two and load on four; and what both have in the end."""
    opt = Zero1(AdamW(lr=1e-2), mesh, bucket_bytes=SMALL)
    path = f"{directory}/checkpoint"
    params = make_params()
    if mesh.size() == 2:
        params, state = run(opt, lambda step: grads_of(step, 0), steps=3)
        dcp.save(to_state_dict({"params": params, "state": state}), checkpoint_id=path)
    else:
        template = {"params": params, "state": opt.init(params)}
        loaded = to_state_dict(template)
        dcp.load(loaded, checkpoint_id=path)
        found = from_state_dict(template, loaded)
        params, state = found["params"], found["state"]
    whole = gather_state(opt, state, params)
    assert same(gather_state(opt, scatter_state(opt, whole, params), params), whole)
    # From one bucket size to another, and on.
    other = Zero1(AdamW(lr=1e-2), mesh, bucket_bytes=HUGE)
    moved = scatter_state(other, whole, params)
    ahead, _ = opt.update(grads_of(3, 0), state, params)
    there, _ = other.update(grads_of(3, 0), moved, params)
    assert same(there, ahead)
    return whole, params


# All that is checked on several processes is checked in one start of them, since that takes longer.
@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the processes had at the end of all checks, which are made there."""
    directory = str(tmp_path_factory.mktemp("zero1"))
    return directory, {size: run_ranks(size, on_ranks, directory, timeout=120) for size in SIZES}


def test_meshes_of_all_sizes_agree_with_no_mesh_in_everything_checked_there(results):
    _, found = results
    assert tuple(map(len, found.values())) == SIZES


def test_a_checkpoint_of_two_processes_is_the_same_bits_on_four_and_on_one(results):
    directory, found = results
    whole, params = found[2][0]
    for size in (2, 4):
        for theirs in found[size]:
            assert same(theirs, (whole, params))
    opt = Zero1(AdamW(lr=1e-2), None, bucket_bytes=SMALL)
    template = {"params": make_params(), "state": opt.init(make_params())}
    loaded = load_dcp(f"{directory}/checkpoint", to_state_dict(template))
    alone = from_state_dict(template, loaded)
    assert same(alone["params"], params)
    assert same(gather_state(opt, alone["state"], alone["params"]), whole)


@pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS)
@pytest.mark.parametrize("bucket_bytes", [TINY, SMALL, HUGE])
def test_alone_it_is_its_inner_optimizer(inner, bucket_bytes):
    opt = Zero1(inner, None, bucket_bytes=bucket_bytes)
    names = [*SHAPES, "half"]
    expected, reference = run(inner, lambda step: grads_of(step, 0), names=names)
    for inplace in (False, True):
        params, state = run(opt, lambda step: grads_of(step, 0), inplace=inplace, names=names)
        compare(params, expected, inner)
        if not isinstance(inner, Accumulate):  # which counts leaves
            whole = gather_state(opt, state, params)
            compare(to_state_dict(whole), to_state_dict(reference), inner)


def test_no_leaves_and_leaves_without_elements_are_served():
    opt = Zero1(AdamW(), None)
    assert opt.update({}, opt.init({}), {})[0] == {}
    params, grads = {"w": torch.ones(0, 2)}, {"w": torch.ones(0, 2)}
    params, state = opt.update(grads, opt.init(params), params)
    assert params["w"].shape == (0, 2)
    assert gather_state(opt, state, params).exp_avg["w"].shape == (0, 2)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Zero1(AdamW, None), TypeError, "must be an optimizer"),
        (lambda: Zero1(AdamW(step_per_leaf=True), None), ValueError, "step_per_leaf=True"),
        (lambda: Zero1(Clip(Partition({"a": AdamW()}, lambda _, __: "a"), 1.0), None), ValueError,
         "a Partition, which tells leaves apart.*outside"),
        (lambda: Zero1(Clip(Muon(), 1.0), None), ValueError, "a Muon, which.*leafwise.*outside"),
        (lambda: Zero1(Clip(LocalUpdates(AdamW(), 2, None), 1.0), None), ValueError,
         "a LocalUpdates, which takes leaves to be the same.*around Zero1"),
        (lambda: Zero1(Zero1(AdamW(), None), None), ValueError, "a Zero1, which takes leaves"),
        (lambda: Zero1(AdamW(), "cpu"), TypeError, "mesh='cpu': must be a DeviceMesh"),
        (lambda: Zero1(AdamW(), None, 0), ValueError, "bucket_bytes=0: must be at least 1"),
        (lambda: Zero1(AdamW(), None, 1e6), TypeError, "bucket_bytes=1000000.0: must be a whole"),
        (lambda: Zero1(AdamW(), None, gradients="sum"), ValueError, "one of local, averaged"),
    ],
)  # fmt: skip
def test_what_it_cannot_be_made_of_is_an_error_that_says_why(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_a_transform_is_refused():
    opt = Zero1(AdamW(), None)
    w = torch.ones(2)
    state = opt.init(w)
    with pytest.raises(RuntimeError, match="a transform"):
        vmap(lambda g: opt.update(g, state, w)[0])(torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="a transform"):
        vmap(opt.init)(torch.ones(3, 2))


def test_no_derivative_is_lost_without_a_word():
    w = torch.ones(2)
    opt, state = Zero1(AdamW(), None), Zero1(AdamW(), None).init(w)
    asked = torch.ones(2, requires_grad=True) * 1
    learnt = Zero1(AdamW(lr=torch.tensor(0.1, requires_grad=True)), None)
    said = Zero1(Clip(AdamW(differentiable=True), 1.0), None)
    for own, grads in ((opt, asked), (learnt, w)):
        for step in (own.update, own.update_):
            with pytest.raises(RuntimeError, match="no derivative goes through what Zero1 sends"):
                step(grads, state, w)
    with pytest.raises(RuntimeError, match="differentiable=False"):
        said.update(torch.nn.Parameter(w), said.init(w), torch.nn.Parameter(w))
    with pytest.raises(RuntimeError, match=r"^grads has a history"):
        opt.update_((p := torch.nn.Parameter(w)) * 1, state, p)
    assert state.inner.step == 0


def test_a_state_of_the_inner_optimizer_is_refused():
    opt, w = Zero1(AdamW(), None), {"w": torch.ones(2)}
    with pytest.raises(TypeError, match="must be the Zero1State"):
        opt.update(w, AdamW().init(w), w)
    with pytest.raises(ValueError, match="state is not like that of the inner optimizer"):
        scatter_state(opt, opt.init(w), w)
    must = r"for this parameter it must be a dense tensor of torch.float32 and shape \(2,\), on cpu"
    for wrong in (torch.ones(3), torch.ones(2).double(), torch.ones(2, device="meta")):
        with pytest.raises(ValueError, match=rf"state\.exp_avg\['w'\] is of torch.*: {must}"):
            scatter_state(opt, AdamW().init({"w": wrong}), w)


@pytest.mark.parametrize("kind", NOT_DENSE)
def test_a_state_that_is_not_dense_is_neither_shared_out_nor_made_whole(kind):
    opt, w = Zero1(AdamW(), None), {"w": torch.ones(2)}
    wrong = not_dense(kind, torch.zeros(2))
    state = AdamW().init(w)
    with pytest.raises(ValueError, match=r"state\.exp_avg\['w'\] is .*(nested|sparse_coo)"):
        scatter_state(opt, state._replace(exp_avg={"w": wrong}), w)
    with pytest.raises(TypeError, match=r"state\.step has .*(nested|sparse_coo)"):
        scatter_state(opt, state._replace(step=not_dense(kind, state.step)), w)
    inner = opt.init(w).inner._replace(exp_avg={"bucket 0": wrong})
    with pytest.raises(TypeError, match=r"state\.inner\.exp_avg\['bucket 0'\] has .*(nest|sparse)"):
        gather_state(opt, Zero1State(inner), w)


def test_groups_of_leaves_have_a_zero1_each():
    inner = {"decay": AdamW(weight_decay=0.1), "no_decay": AdamW(weight_decay=0.0)}
    plain = Partition(inner, funcopt.decay_label)
    sharded = Partition({k: Zero1(v, None) for k, v in inner.items()}, funcopt.decay_label)
    expected, _ = run(plain, lambda step: grads_of(step, 0))
    for inplace in (False, True):
        found, state = run(sharded, lambda step: grads_of(step, 0), inplace=inplace)
        compare(found, expected, inplace)
        assert isinstance(state.inner["decay"], Zero1State)


def test_what_requires_a_gradient_goes_in_and_comes_out_so():
    opt = Zero1(AdamW(lr=0.1), None)
    params = {"w": torch.nn.Parameter(torch.ones(2)), "b": torch.zeros(1)}
    for _ in range(2):
        loss = params["w"].square().sum()
        (slope,) = torch.autograd.grad(loss, params["w"], create_graph=True)
        params, _ = opt.update({"w": slope, "b": torch.ones(1)}, opt.init(params), params)
        assert params["w"].is_leaf
        assert params["w"].requires_grad
        assert not params["b"].requires_grad


def test_the_next_collective_is_under_way_while_the_result_of_one_is_used():
    events = []

    def started(number):
        events.append(f"start {number}")
        return Started(None, lambda: events.append(f"wait {number}"))

    for number, _ in enumerate(one_ahead(map(started, range(3)))):
        events.append(f"use {number}")
    assert events == [
        *("start 0", "start 1", "wait 0", "use 0", "start 2", "wait 1", "use 1", "wait 2", "use 2")
    ]
