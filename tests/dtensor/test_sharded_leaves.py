"""Leaves that are DTensors: the same numbers as on one process, on every rank, lying as before."""

import functools
import re
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._pytree import tree_flatten, tree_map

from funcopt import (
    SGD,
    Accumulate,
    AdamW,
    Clip,
    ClipAdaptive,
    ClipValue,
    Compensated,
    Ema,
    Frozen,
    Lookahead,
    LossScale,
    MasterWeights,
    Partition,
    SkipNonfinite,
    averaged,
    decay_label,
)
from funcopt.interop import from_state_dict, to_state_dict
from funcopt.schedules import Linear

from ..cases import assert_same_bits
from ..distributed.harness import run_ranks
from ..interop.formats import load_dcp

STEPS = 20

falling = Linear(0.5, 0.05, steps=STEPS)


def partition():
    groups = {"decay": AdamW(lr=0.02, weight_decay=0.1), "no_decay": AdamW(lr=0.01)}
    return Partition(groups, decay_label)


OPTIMIZERS = {
    "AdamW": lambda: AdamW(lr=0.02, amsgrad=True),
    "AdamW with a count of each leaf": lambda: AdamW(lr=0.02, step_per_leaf=True),
    "Clip": lambda: Clip(AdamW(lr=0.02), max_norm=0.3),
    "Clip to the largest": lambda: Clip(AdamW(lr=0.02), max_norm=0.1, norm_type=float("inf")),
    "Accumulate of Clip of Partition": lambda: Accumulate(Clip(partition(), 0.3), every=3),
    "Partition of Clips": lambda: Partition(
        {
            "decay": Clip(AdamW(lr=0.02), 0.2),
            "no_decay": Clip(Accumulate(AdamW(lr=0.02), every=2), 0.1),
        },
        decay_label,
    ),
    "MasterWeights of Clip of Partition": lambda: MasterWeights(Clip(partition(), 0.3)),
    "Compensated of Clip of Partition": lambda: Compensated(Clip(partition(), 0.3)),
    "Ema of Lookahead of ClipValue": lambda: Ema(
        Lookahead(ClipValue(AdamW(lr=0.02), 0.05), every=3, reset_state=True), decay=0.9
    ),
    "LossScale of SkipNonfinite": lambda: LossScale(
        SkipNonfinite(AdamW(lr=0.02)), init_scale=1.0, growth_factor=1.5, growth_interval=50
    ),
    "schedules in all of them": lambda: Clip(
        Accumulate(
            Ema(
                Lookahead(
                    ClipValue(AdamW(lr=0.02, betas=(Linear(0.9, 0.5, 20), 0.99)), falling),
                    every=lambda count: torch.where(count < 6, 2, 3),
                    alpha=falling,
                ),
                decay=Linear(0.0, 0.9, steps=10),
            ),
            every=lambda count: torch.where(count < 6, 1, 2),
        ),
        max_norm=falling,
        nonfinite="skip",
    ),
    "schedules of a scale": lambda: LossScale(
        SkipNonfinite(AdamW(lr=0.02), max_consecutive=lambda count: 3),
        1.0,
        growth_factor=lambda count: 1 + 1 / (1 + count),
        growth_interval=lambda count: torch.where(count < 6, 2, 3),
    ),
}
SOME = [
    ("Clip to the largest", True),
    ("Accumulate of Clip of Partition", False),
    ("Partition of Clips", True),
]


def whole(tree):
    """The tree with DTensors as tensors, the same on every rank."""
    return tree_map(
        lambda leaf: leaf.full_tensor().clone() if isinstance(leaf, DTensor) else leaf.clone(),
        tree_map(lambda leaf: leaf.detach(), tree),
    )


def assert_near(ours, theirs):
    for own, other in zip(*(tree_flatten(tree)[0] for tree in (ours, theirs)), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6)


class Small(nn.Module):
    """Uneven everywhere, with a leaf of one row, of which most ranks have none."""

    def __init__(self, hidden):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, hidden), nn.Linear(hidden, 3)
        self.last = nn.Linear(3, 1)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def batch(step):
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    return x, x.sum(1, keepdim=True).sin()


def train(model, opt, in_place, rank=0, world_size=1):
    """Train and return the parameters and the state."""
    params = dict(model.named_parameters())
    state = opt.init(params)
    for step in range(STEPS):
        x, y = (part.chunk(world_size)[rank] for part in batch(step))
        model.zero_grad()
        (model(x) - y).square().mean().backward()
        grads = {name: param.grad for name, param in params.items()}
        if in_place:
            opt.update_(grads, state, params)
        else:
            new_params, state = opt.update(grads, state, params)
            assert all(new.requires_grad and new.is_leaf for new in new_params.values())
            with torch.no_grad():
                for name, new in new_params.items():
                    params[name].copy_(new)
    return params, state


@functools.cache
def on_one_process(name, hidden):
    return whole(train(Small(hidden), OPTIMIZERS[name](), in_place=True))


def one_mesh(model):
    for layer in model.children():
        fully_shard(layer)
    fully_shard(model)
    return dist.get_rank(), dist.get_world_size()


def replicated_and_sharded(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    return dist.get_rank(), 4


def tensor_parallel(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"first": ColwiseParallel(), "second": RowwiseParallel()})
    for layer in model.children():
        fully_shard(layer, mesh=mesh["dp"])  # of which the last is on one dimension of the mesh
    fully_shard(model, mesh=mesh["dp"])
    return mesh.get_coordinate()[0], 2


def train_sharded(rank, shard, runs):
    hidden = 8 if shard is tensor_parallel else 7  # torch's is for even parts alone
    for name, in_place in runs:
        model = Small(hidden)
        share = shard(model)
        trained = train(model, OPTIMIZERS[name](), in_place, *share)
        assert_near(whole(trained), on_one_process(name, hidden))


@pytest.mark.by_day(1)
@pytest.mark.parametrize(
    ("world_size", "shard", "runs"),
    [
        (2, one_mesh, [(name, in_place) for name in OPTIMIZERS for in_place in (True, False)]),
        (4, one_mesh, SOME),
        (4, replicated_and_sharded, SOME),
        (4, tensor_parallel, SOME),
    ],
)
def test_twenty_steps_give_the_numbers_of_one_process(world_size, shard, runs):
    run_ranks(world_size, train_sharded, shard, runs)


def full_tree():
    """Leaves for every way to lie: uneven, with empty parts, of several dtypes, not contiguous."""
    torch.manual_seed(1)
    return {
        "uneven": torch.randn(5, 3),
        "one row": torch.randn(1, 7),
        "columns": torch.randn(4, 6),
        "transposed": torch.randn(6, 4).t(),
        "vector": torch.randn(9),
        "half": torch.randn(6, 2).bfloat16(),
        "double": torch.randn(3, 3, dtype=torch.float64),
        "complex": torch.randn(3, 2, dtype=torch.complex64),
        "replicated": torch.randn(3, 3),
        "plain": torch.randn(4),
        "plain number": torch.randn(()),
    }


def on_a_line():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    lying = {name: (mesh, [Shard(0)]) for name in full_tree() if not name.startswith("plain")}
    lying["columns"] = mesh, [Shard(1)]
    lying["transposed"] = mesh, [Shard(1)]
    lying["replicated"] = mesh, [Replicate()]
    return lying


def on_a_square():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    return {
        "uneven": (mesh, [Shard(0), Shard(1)]),
        "one row": (mesh, [Shard(0), Replicate()]),
        "columns": (mesh, [Replicate(), Shard(1)]),
        "transposed": (mesh["a"], [Shard(0)]),
        "vector": (mesh, [Shard(0), Shard(0)]),
        "half": (mesh["b"], [Shard(1)]),
        "double": (init_device_mesh("cpu", (4,)), [Shard(0)]),
        "complex": (mesh, [Shard(1), Shard(0)]),
        "replicated": (mesh, [Replicate(), Replicate()]),
    }


def place(tree, lying):
    return {
        name: distribute_tensor(leaf, *lying[name]) if name in lying else leaf.clone()
        for name, leaf in tree.items()
    }


def gradients_of(tree, step):
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator)
        for name, leaf in tree.items()
    }


def lies_like(one, other):
    return isinstance(one, DTensor) == isinstance(other, DTensor) and (
        not isinstance(one, DTensor)
        or (one.device_mesh, one.placements, one.shape, one.stride(), one.dtype)
        == (other.device_mesh, other.placements, other.shape, other.stride(), other.dtype)
    )


def inside(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def locals_of(tree):
    return tree_map(
        lambda leaf: leaf.to_local().clone() if isinstance(leaf, DTensor) else leaf.clone(), tree
    )


def keep_lying_and_touch_nothing(rank, lie):
    lying, full = lie(), full_tree()
    params = place(full, lying)
    for opt in (
        AdamW(lr=0.1, amsgrad=True),
        Ema(Accumulate(AdamW(lr=0.1), every=2), decay=0.5),
        MasterWeights(Ema(AdamW(lr=0.1), decay=0.5)),
        Compensated(Ema(AdamW(lr=0.1), decay=0.5)),
    ):
        state, own = opt.init(params), locals_of(params)
        own_state = opt.init(own)
        given, kept = params, None
        for step in range(3):
            grads = place(gradients_of(full, step), lying)
            before = locals_of((grads, state, given))
            new_params, new_state = opt.update(grads, state, given)
            assert_same_bits(locals_of((grads, state, given)), before)
            own, own_state = opt.update(locals_of(grads), own_state, own)
            assert_same_bits(locals_of((new_params, new_state)), (own, own_state))
            for name, leaf in params.items():
                assert lies_like(new_params[name], leaf), name
            olds, news = tree_flatten(state)[0], tree_flatten(new_state)[0]
            assert all(map(lies_like, news, olds))
            kept, given, state = (grads, state, given), new_params, new_state
        # In place, from the last step on: the same bits, in the same tensors.
        grads, state, given = kept
        written = tree_flatten((given, state))[0]
        versions = [(tensor._version, inside(tensor)._version) for tensor in written]
        result = opt.update_(grads, state, given)
        assert result[0] is given
        assert result[1] is state
        assert_same_bits(locals_of((given, state)), (own, own_state))
        for tensor, (outer, inner) in zip(written, versions, strict=True):
            assert (tensor._version > outer) == (inside(tensor)._version > inner)
        assert any(
            inside(t)._version > inner for t, (_, inner) in zip(written, versions, strict=True)
        )


@pytest.mark.parametrize(("world_size", "lie"), [(1, on_a_line), (3, on_a_line), (4, on_a_square)])
def test_placements_and_strides_are_kept_and_the_bits_are_those_of_local_updates(world_size, lie):
    run_ranks(world_size, keep_lying_and_touch_nothing, lie)


def clip_what_stands_for_16_bits(rank):
    mesh = init_device_mesh("cpu", (2,))
    full = {name: leaf.bfloat16() for name, leaf in full_tree().items() if not leaf.is_complex()}
    lying = {name: (mesh, [Shard(0)]) for name in full if not name.startswith("plain")}
    for wrap in (MasterWeights, Compensated):
        for method in ("update", "update_"):
            opt = wrap(Clip(SGD(lr=0.1, momentum=0.9), 0.5))
            params, expected = place(full, lying), {n: leaf.clone() for n, leaf in full.items()}
            state, expected_state = opt.init(params), opt.init(expected)
            for step in range(3):
                grads = gradients_of(full, step)
                params, state = getattr(opt, method)(place(grads, lying), state, params)
                expected, expected_state = opt.update(grads, expected_state, expected)
                assert_near(state.inner.norm, expected_state.inner.norm)
            for name, leaf in whole(params).items():
                assert torch.allclose(leaf, expected[name], rtol=2e-2), name


def test_a_norm_of_what_stands_for_16_bit_leaves_is_over_all_processes():
    run_ranks(2, clip_what_stands_for_16_bits)


def lay_moments_out_as_parameters(rank):
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(rank)
    part, shape = torch.randn(4, 3).t(), torch.Size((6, 4))  # columns side by side
    columns = DTensor.from_local(part, mesh, [Shard(0)], shape=shape, stride=(1, 6))
    rows = DTensor.from_local(part.contiguous(), mesh, [Shard(0)], shape=shape, stride=(4, 1))
    opt = AdamW(lr=0.1)
    new, state = opt.update({"w": rows}, opt.init({"w": rows}), {"w": columns})
    same, same_state = opt.update({"w": rows}, opt.init({"w": rows}), {"w": rows})
    for one, other in ((new, same), (state.exp_avg, same_state.exp_avg)):
        assert one["w"].stride() == (1, 6)
        assert one["w"].to_local().stride() == (1, 3)
        assert torch.equal(one["w"].full_tensor(), other["w"].full_tensor())


def test_moments_in_another_layout_come_out_in_that_of_their_parameter():
    run_ranks(2, lay_moments_out_as_parameters)


def norms(rank, lie):
    lying, full = lie(), full_tree()
    params = place(full, lying)
    found = {}
    for order in (1.0, 2.0, 3.0, float("inf")):
        grads = gradients_of(full, 7)
        opt = Clip(AdamW(), max_norm=1.0, norm_type=order)
        state, given = opt.init(params), place(grads, lying)
        norm = opt.update(given, state, params)[1].norm
        with CommDebugMode() as comms:
            opt.update(given, state, params)
        _, theirs = opt.update(grads, opt.init(full), full)
        torch.testing.assert_close(norm, theirs.norm, rtol=1e-6, atol=0)
        found[order] = norm, comms.get_total_counts()

        if order == float("inf"):  # which torch does not take of a part that is empty
            continue
        # What torch takes: one mesh, one dtype, no plain tensors. (Of replicated leaves beside
        # sharded ones it counts those of order 1 too often.)
        mesh, _ = lying["uneven"]
        alike = [
            name
            for name, (own_mesh, placements) in lying.items()
            if own_mesh is mesh and Replicate() not in placements and name not in ("half", "double")
        ]
        leaves = [nn.Parameter(place(full, lying)[name]) for name in alike]
        for leaf, name in zip(leaves, alike, strict=True):
            leaf.grad = distribute_tensor(grads[name], *lying[name])
        total = nn.utils.clip_grad_norm_(leaves, 1.0, norm_type=order).full_tensor()
        mine = {name: params[name] for name in alike}
        own = opt.update({name: given[name] for name in alike}, opt.init(mine), mine)[1]
        torch.testing.assert_close(own.norm.to(total), total, rtol=1e-6, atol=0)
    return found


@pytest.mark.parametrize(
    ("world_size", "lie", "collectives"),
    # On the square there are its two dimensions, either one alone, and a line through all.
    [(2, on_a_line, 1), (3, on_a_line, 1), (4, on_a_square, 2 + 1 + 1 + 1)],
)
def test_norms_are_those_of_the_whole_on_every_rank_to_the_bit(world_size, lie, collectives):
    results = run_ranks(world_size, norms, lie)
    for order, (norm, _) in results[0].items():
        assert all(torch.equal(other[order][0], norm) for other in results)
        assert all(other[order][1] == collectives for other in results)


def skip_together(rank):
    mesh = init_device_mesh("cpu", (2,))
    opt = Clip(AdamW(lr=0.1), max_norm=1.0, nonfinite="skip")
    params = {"w": distribute_tensor(torch.ones(3, 2), mesh, [Shard(0)]), "b": torch.ones(2)}
    before = locals_of(params)
    state = opt.init(params)
    for bad in (0, 2):  # in the part of the one rank, then of the other
        whole_grad = torch.ones(3, 2)
        whole_grad[bad] = torch.inf
        grads = {"w": distribute_tensor(whole_grad, mesh, [Shard(0)]), "b": torch.ones(2)}
        new_params, state = opt.update(grads, state, params)
        opt.update_(grads, state, params)
        assert_same_bits(locals_of(new_params), before)
        assert_same_bits(locals_of(params), before)
        assert state.norm == torch.inf
        assert state.inner.step == 0


def test_what_is_infinite_on_one_rank_is_skipped_on_all():
    run_ranks(2, skip_together)


def count_together(rank):
    mesh = init_device_mesh("cpu", (2,))
    opt = LossScale(SkipNonfinite(AdamW(lr=0.1), max_consecutive=1), init_scale=4.0)
    skip = SkipNonfinite(AdamW(lr=0.1), max_consecutive=1)
    params = {"w": distribute_tensor(torch.ones(3, 2), mesh, [Shard(0)]), "b": torch.ones(2)}
    state, own = opt.init(params), skip.init(params)
    for step, bad in enumerate((0, 2)):  # in the part of the one rank, then of the other
        whole_grad = torch.ones(3, 2)
        whole_grad[bad] = torch.nan
        grads = {"w": distribute_tensor(whole_grad, mesh, [Shard(0)]), "b": torch.ones(2)}
        _, state = opt.update(grads, state, params)
        assert state.scale == 2.0 ** (1 - step)
        assert state.inner.inner.step == 0
        _, own = skip.update(grads, own, params)
        assert (own.total, own.consecutive, own.inner.step) == (step + 1, step + 1, step)


def test_what_is_nan_on_one_rank_is_counted_and_scales_down_on_all():
    run_ranks(2, count_together)


def clip_units(rank):
    mesh = init_device_mesh("cpu", (2,))
    opt = ClipAdaptive(AdamW(lr=0.1, betas=(0.0, 0.0)), clipping=0.1)
    full, large = torch.arange(1.0, 13.0).view(3, 4), torch.full((3, 4), 9.0)
    params, grads = ({"w": distribute_tensor(t, mesh, [Shard(0)])} for t in (full, large))
    _, expected = opt.update({"w": large}, opt.init({"w": full}), {"w": full})
    _, state = opt.update(grads, opt.init(params), params)
    assert_same_bits(whole(state.inner.exp_avg), expected.inner.exp_avg)
    cut = [("w", Shard(1), full), ("b", Shard(0), torch.ones(4))]
    for name, placement, tensor in cut:
        bad = {name: distribute_tensor(tensor, mesh, [placement])}
        message = rf"params\['{name}'\] is a DTensor with .*, which cuts through its units"
        with pytest.raises(ValueError, match=message):
            opt.update(bad, opt.init(bad), bad)


def test_units_are_clipped_where_they_are_whole_and_refused_where_they_are_cut():
    run_ranks(2, clip_units)


def never_wait_alone(rank):
    mesh = init_device_mesh("cpu", (2,))
    # Of the second group rank 0 has more than of the first, and rank 1 less.
    params = {
        "a": distribute_tensor(torch.ones(2, 4), mesh, [Shard(0)]),
        "b": distribute_tensor(torch.ones(1, 7), mesh, [Shard(0)]),
    }
    opt = Partition(
        {"a": Clip(AdamW(lr=0.1), 1.0), "b": Clip(AdamW(lr=0.1), 1.0, norm_type=float("inf"))},
        labels=lambda name, leaf: "a" if leaf.shape == (2, 4) else "b",
    )
    state = opt.init(params)
    opt.update_(tree_map(torch.ones_like, params), state, params)
    assert state.inner["a"].norm == torch.tensor(8.0).sqrt()
    assert state.inner["b"].norm == 1
    # A leaf may have a gradient on one rank alone, or on none.
    clip = Clip(AdamW(lr=0.1), 1.0)
    state = clip.init(params)
    grads = {"a": torch.ones_like(params["a"]) if rank == 0 else None, "b": None}
    _, state = clip.update(grads, state, params)
    assert state.norm == 2
    _, state = clip.update({"a": None, "b": None}, state, params)
    assert state.norm == 0


def test_ranks_that_have_more_or_less_make_the_same_collectives_in_the_same_order():
    run_ranks(2, never_wait_alone)


def refuse(rank):
    mesh, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    full = torch.ones(4, 4)

    def lying(*placements, mesh=mesh):
        return distribute_tensor(full, mesh, placements)

    summand = DTensor.from_local(full, mesh, [Partial()])
    good, plain = {"w": lying(Shard(0))}, {"w": full.clone()}
    longer = {"w": distribute_tensor(torch.ones(5, 4), mesh, [Shard(0)])}
    cases = [
        ({"w": lying(Shard(1))}, good, r"grads\['w'\] has placements \(Shard\(dim=1\),\) on a mesh "
         r"of shape \(2,\), the parameter has placements \(Shard\(dim=0\),\).*\.redistribute\("),
        ({"w": lying(Replicate())}, good, r"grads\['w'\] has placements \(Replicate\(\),\)"),
        ({"w": lying(Replicate(), Shard(0), mesh=square)}, good, r"shape \(1, 2\).*full_tensor\("),
        ({"w": summand}, good, r"grads\['w'\] has placements \(Partial\(sum\),\).*Reduce it first"),
        (plain, good, r"grads\['w'\] is a plain tensor, the parameter a? ?.*distribute_tensor\("),
        (good, plain, r"grads\['w'\] is a DTensor.*the parameter is a plain tensor.*full_tensor"),
        (longer, good, r"grads\['w'\] has shape \(5, 4\), the parameter has \(4, 4\)"),
    ]  # fmt: skip
    for make in (AdamW, lambda: Clip(AdamW(), 1.0), lambda: Accumulate(AdamW(), 2)):
        opt = make()
        opt.update(good, opt.init(good), good)  # which is known from then on
        for grads, params, message in cases:
            state = opt.init(params)
            before = locals_of((state, params))
            for update in (opt.update, opt.update_):
                with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
                    update(grads, state, params)
            assert_same_bits(locals_of((state, params)), before)
    for opt, root in (
        (AdamW(), r"state\.exp_avg\['w'\]"),
        (Accumulate(AdamW(), 2), r"state\.acc_grads\['w'\]"),
        (Ema(AdamW()), r"state\.average\['w'\]"),
        (Lookahead(AdamW()), r"state\.slow_params\['w'\]"),
    ):
        opt.update(good, opt.init(good), good)
        like_here = lying(Replicate(), Shard(0), mesh=square)
        for other in (plain, *({"w": leaf} for leaf in (lying(Replicate()), like_here))):
            with pytest.raises(ValueError, match=root):
                opt.update(good, opt.init(other), good)
    with pytest.raises(ValueError, match=r"params\['.'\] shares its memory with params\['.'\]"):
        AdamW().init({"v": good["w"], "w": good["w"]})


def test_whatever_does_not_lie_as_its_parameter_is_refused_by_its_path_and_nothing_is_written():
    run_ranks(2, refuse)


def refuse_derivatives(rank):
    mesh = init_device_mesh("cpu", (2,))
    params = {"w": nn.Parameter(distribute_tensor(torch.ones(3, 2), mesh, [Shard(0)]))}
    opt = AdamW(lr=0.1)
    state = opt.init(params)
    (grad,) = torch.autograd.grad((params["w"] ** 3).sum(), params["w"], create_graph=True)
    new_params, _ = opt.update({"w": grad}, state, params)  # of these parameters alone: as always
    assert new_params["w"].is_leaf
    assert new_params["w"].requires_grad
    with pytest.raises(RuntimeError, match=r"grads\['w'\] has a history"):
        opt.update_({"w": grad}, state, params)
    grads = {"w": grad.detach()}
    rate = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"params\['w'\] is a DTensor, .* has no derivative"):
        AdamW(lr=rate).update(grads, state, params)
    with pytest.raises(RuntimeError, match=r"has no derivative"):
        AdamW(differentiable=True).update(grads, state, params)
    other = torch.ones((), requires_grad=True)
    with pytest.raises(RuntimeError, match=r"has no derivative"):
        opt.update({"w": grads["w"] * distribute_tensor(other, mesh)}, state, params)
    with pytest.raises(RuntimeError, match=r"params\['w'\] has a history"):
        opt.update_(grads, state, {"w": params["w"] * 1})
    with pytest.raises(RuntimeError, match=r"no transform .* knows which process"):
        torch.vmap(lambda lr: AdamW(lr=lr).update(grads, state, params))(torch.ones(2))
    with forward_ad.dual_level():
        opt.update_(grads, opt.init(params), params)  # nothing of it has a tangent
        dual = forward_ad.make_dual(rate.detach(), torch.ones(()))
        for given in (dual, lambda _: dual):
            with pytest.raises(RuntimeError, match=r"has no derivative"):
                AdamW(lr=given).update(grads, state, params)
            with pytest.raises(RuntimeError, match=r"update_\(\) writes in place"):
                AdamW(lr=given).update_(grads, state, params)


def test_no_derivative_is_lost_without_a_word():
    run_ranks(2, refuse_derivatives)


def leave_alone(rank):
    mesh = init_device_mesh("cpu", (2,))
    names = ("moving", "idle", "frozen")
    params = {name: distribute_tensor(torch.ones(3, 2), mesh, [Shard(0)]) for name in names}
    opt = Partition(
        {"on": AdamW(lr=0.1), "off": Frozen()},
        labels=lambda name, leaf: "off" if name == "frozen" else "on",
    )
    grads = {"moving": torch.ones_like(params["moving"]), "idle": None}
    new_params, state = opt.update(grads, opt.init(params), params)
    assert new_params["frozen"] is params["frozen"]
    assert_same_bits(locals_of(new_params["idle"]), locals_of(params["idle"]))
    assert (whole(new_params)["moving"] < 1).all()
    versions = {name: leaf._version for name, leaf in params.items()}
    opt.update_(grads, state, params)
    assert [params[n]._version - versions[n] for n in names] == [1, 0, 0]


def test_a_frozen_leaf_is_the_very_tensor_and_one_without_a_gradient_is_left_alone():
    run_ranks(2, leave_alone)


def leave_alone_beneath(rank):
    mesh = init_device_mesh("cpu", (2,))
    groups = Partition({"on": AdamW(lr=0.1), "off": Frozen()}, {"w": "on", "b": "off", "n": "off"})
    given = {"w": torch.tensor([[3.0], [4.0], [0.0]]), "b": torch.full((3, 1), torch.inf)}
    for opt in (
        Clip(groups, 0.5),
        Clip(groups, 0.5, nonfinite="skip"),
        ClipAdaptive(groups),
        SkipNonfinite(groups),
        LossScale(groups, 1.0),
        Accumulate(groups, 2),
        Ema(groups, 0.5),
        Lookahead(groups, 2),
    ):
        plain = {"w": torch.ones(3, 1), "b": torch.ones(3, 1), "n": torch.arange(3)}
        params = {n: distribute_tensor(leaf, mesh, [Shard(0)]) for n, leaf in plain.items()}
        grads = {n: distribute_tensor(leaf, mesh, [Shard(0)]) for n, leaf in given.items()}
        expected, expected_state = opt.update(given, opt.init(plain), plain)
        moved, state = opt.update(grads, opt.init(params), params)
        assert moved["b"] is params["b"]
        assert moved["n"] is params["n"]
        assert_near(whole((moved, state)), whole((expected, expected_state)))
        versions = [params[name]._version for name in ("b", "n")]
        state = opt.init(params)
        opt.update_(grads, state, params)
        assert_near(whole((params, state)), whole((expected, expected_state)))
        assert [params[name]._version for name in ("b", "n")] == versions


def test_a_frozen_leaf_is_the_very_tensor_beneath_wrappers_too_and_counts_for_nothing():
    run_ranks(2, leave_alone_beneath)


def compile_around(rank):
    mesh = init_device_mesh("cpu", (2,))
    params = {"w": distribute_tensor(torch.ones(3, 2), mesh, [Shard(0)])}
    opt = Clip(AdamW(lr=0.1), max_norm=1.0)
    state, grads = opt.init(params), tree_map(torch.ones_like, params)
    expected = opt.update(grads, state, params)
    step = torch.compile(opt.update, backend="eager")
    assert_same_bits(locals_of(step(grads, state, params)), locals_of(expected))


def test_a_compiled_step_leaves_the_update_out_of_its_graph():
    run_ranks(2, compile_around)


def trained(params, opt):
    state = opt.init(params)
    for step in range(3):
        grads = gradients_of(params, step)
        given = {
            name: distribute_tensor(grads[name], leaf.device_mesh, leaf.placements)
            if isinstance(leaf, DTensor)
            else grads[name]
            for name, leaf in params.items()
        }
        opt.update_(given, state, params)
    return {"params": params, "state": state}


def checkpointed():
    return Clip(Ema(Accumulate(partition(), every=2), decay=0.9), max_norm=1e6)


def save(rank, path):
    import torch.distributed.checkpoint as dcp

    run = trained(place(full_tree(), on_a_line()), checkpointed())
    dcp.save(to_state_dict(run), checkpoint_id=path)
    return whole(run)


def load(rank, path, lie):
    import torch.distributed.checkpoint as dcp

    params = place(tree_map(torch.zeros_like, full_tree()), lie())
    template = {"params": params, "state": checkpointed().init(params)}
    entries = to_state_dict(template)
    dcp.load(entries, checkpoint_id=path)
    loaded = from_state_dict(template, entries)
    assert all(map(lies_like, loaded["params"].values(), params.values()))
    return whole(loaded)


def test_a_checkpoint_of_two_ranks_is_loaded_on_one_and_on_four_to_the_bit(tmp_path):
    path = str(tmp_path / "checkpoint")
    saved, _ = run_ranks(2, save, path)
    params = tree_map(torch.zeros_like, full_tree())
    template = {"params": params, "state": checkpointed().init(params)}
    alone = from_state_dict(template, load_dcp(path, to_state_dict(template)))
    assert_same_bits(alone, saved)
    for loaded in run_ranks(4, load, path, on_a_square):
        assert_same_bits(loaded, saved)


def mixed_norms(rank):
    """The norm of leaves cut along different dimensions, in a tree that was filled as it came."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    whole = {name: torch.randn(8, 6, generator=seeded(name)) for name in "abcd"}
    lie = {
        "a": (mesh, [Shard(0), Replicate()]),
        "b": (mesh, [Replicate(), Shard(1)]),
        "c": (mesh["model"], [Shard(0)]),
        "d": (mesh["data"], [Shard(1)]),
    }
    order = "abcd" if rank in (0, 2) else "dcba"
    shared = {n: distribute_tensor(whole[n], *lie[n]) for n in whole}
    leaves = OrderedDict((n, shared[n]) for n in order)
    opt = Clip(AdamW(), max_norm=1.0)
    norm = opt.update(leaves, opt.init(leaves), leaves)[1].norm
    expected = torch.cat([leaf.flatten() for leaf in whole.values()]).norm()
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    return norm


def seeded(name):
    return torch.Generator().manual_seed(ord(name))


def test_a_tree_that_was_filled_in_another_order_has_the_same_norm():
    norms = run_ranks(4, mixed_norms)
    assert all(torch.equal(norm, norms[0]) for norm in norms)


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def evaluate_with_an_average(rank):
    mesh = init_device_mesh("cpu", (2,))
    model, whole = small_network(), small_network()
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    model.register_forward_hook(lambda _, __, output: output.clone())  # no view, of which it warns
    params, whole_params = (dict(own.named_parameters()) for own in (model, whole))
    opt = Ema(AdamW(lr=0.1), decay=0.5)
    state, whole_state = opt.init(params), opt.init(whole_params)
    x = torch.randn(4, 5, generator=seeded("x"))

    def write(values):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        with torch.no_grad():
            for name, value in values.items():
                params[name].copy_(value)

    for _ in range(3):
        for own, its_state, its_params in (
            (model, state, params),
            (whole, whole_state, whole_params),
        ):
            own(x).square().mean().backward()
            opt.update_({n: p.grad for n, p in its_params.items()}, its_state, its_params)
            own.zero_grad()
        model(x)  # which leaves the outermost module whole
        trained = {name: p.detach().clone() for name, p in params.items()}
        write(averaged(state, params))
        expected = torch.func.functional_call(whole, averaged(whole_state, whole_params), x)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)
        write(trained)
        torch.testing.assert_close(model(x), whole(x), rtol=0, atol=1e-6)


def test_an_average_is_written_into_a_sharded_model_and_what_was_trained_back():
    run_ranks(2, evaluate_with_an_average)
