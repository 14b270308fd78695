"""Members on several processes: the bits of the same ensemble on one, and nothing is sent."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._pytree import tree_leaves, tree_map

from funcopt import (
    SGD,
    Accumulate,
    AdamW,
    Best,
    Clip,
    ClipAdaptive,
    Ema,
    Frozen,
    Members,
    Partition,
    Plateau,
    SkipNonfinite,
    extend,
)

from ..cases import assert_same_bits
from ..distributed.harness import run_ranks

COUNT = 6  # on four processes two, two, two and none
STEPS = 5
RATES = torch.linspace(0.01, 0.3, COUNT, dtype=torch.float64)
DECAYS = RATES.flip(0).clone()
SEEDS = torch.arange(COUNT, dtype=torch.float64)
ROWS = Shard(0)
ACTIVE = torch.tensor([True, False, True, True, False, True])


def inner(name, lay=lambda tensor: tensor):
    """An optimizer whose numbers differ between members."""
    rates, decays = lay(RATES), lay(DECAYS)
    return {
        "AdamW": lambda: AdamW(lr=rates, weight_decay=decays),
        "AdamW, by chance": lambda: AdamW(lr=rates, rounding="stochastic", seed=lay(SEEDS)),
        "AdamW, one rate": lambda: AdamW(lr=0.1),
        "SGD, a tensor for all": lambda: SGD(lr=torch.tensor(0.1), momentum=0.9),
        "a count of each leaf": lambda: AdamW(lr=rates, step_per_leaf=True),
        "Clip": lambda: Clip(AdamW(lr=rates), max_norm=lay(RATES * 3)),
        "Accumulate": lambda: Accumulate(SkipNonfinite(SGD(lr=rates)), every=2),
        "Ema of Clip": lambda: Ema(Clip(AdamW(lr=rates), 0.5), 0.9),
    }[name]()


NAMES = (
    "AdamW",
    "AdamW, by chance",
    "AdamW, one rate",
    "SGD, a tensor for all",
    "a count of each leaf",
    "Clip",
    "Accumulate",
    "Ema of Clip",
)


def tree(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = {"w": (COUNT, 4, 3), "b": (COUNT, 5), "s": (COUNT,)}
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


def new_mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def laid(given, mesh, placement=ROWS):
    """A tree with its members shared out over the processes."""
    return tree_map(lambda leaf: distribute_tensor(leaf.clone(), mesh, [placement]), given)


def whole(given):
    return tree_map(
        lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf,
        tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, given),
    )


def train(opt, params, grads_at, in_place, state=None, **extras):
    state = opt.init(params) if state is None else state
    for step in range(STEPS):
        update = opt.update_ if in_place else opt.update
        params, state = update(grads_at(step), state, params, **extras)
    return params, state


def alone(opt, in_place=False, dtype=torch.float32, **extras):
    """The same ensemble in plain tensors."""
    return train(opt, tree(0, dtype), lambda step: tree(1 + step, dtype), in_place, **extras)


def dtype_of(name):
    return torch.bfloat16 if "chance" in name else torch.float32


# ---------------------------------------------------------------------------------- the same bits


def check_bits(rank):
    mesh = new_mesh()
    lays = (lambda tensor: tensor, lambda tensor: laid(tensor, mesh))
    for name in NAMES:
        dtype = dtype_of(name)
        for active in (None, ACTIVE):
            told = {} if active is None else {"active": active}
            expected = alone(Members(inner(name)), dtype=dtype, **told)
            for in_place in (False, True):
                for lay in lays:
                    own = {key: lay(value) for key, value in told.items()}
                    params = laid(tree(0, dtype), mesh)
                    grads = [laid(tree(1 + step, dtype), mesh) for step in range(STEPS)]
                    opt = Members(inner(name, lay))
                    trained = train(opt, params, grads.__getitem__, in_place, **own)
                    assert all(
                        leaf.placements == (Shard(0),) and len(leaf) == COUNT
                        for leaf in tree_leaves(trained)
                    )
                    assert_same_bits(whole(trained), expected)


# By day on four processes, of which one has no member.
@pytest.mark.by_day(1)
@pytest.mark.parametrize("world_size", [4, 2])
def test_members_on_several_processes_have_the_bits_of_one(world_size):
    run_ranks(world_size, check_bits)


# --------------------------------------------------------------------------------- nothing is sent


def check_traffic(rank):
    mesh = new_mesh()
    for name in NAMES:
        opt = Members(inner(name, lambda tensor: laid(tensor, mesh)))
        given = [laid(tree(seed, dtype_of(name)), mesh) for seed in (0, 1)]
        active = laid(ACTIVE, mesh)
        with CommDebugMode() as sent:
            step_all_ways(opt, *given, active)
        assert sent.get_total_counts() == 0, name
        # Whoever waited for another one here would wait for good.
        if rank == 0:
            step_all_ways(opt, *given, active)
        dist.barrier()


def step_all_ways(opt, params, grads, active):
    state = opt.init(params)
    for told in ({}, {"active": active}):
        opt.update_(grads, state, params, **told)
        opt.update(grads, state, params, **told)


def test_a_step_of_members_sends_nothing_and_waits_for_nobody():
    run_ranks(2, check_traffic)


def check_values(rank):
    """What goes by a score of each member, told as one DTensor or as one plain tensor."""
    mesh, scores = new_mesh(), torch.tensor([3.0, 1.0, 2.0, torch.nan, 0.5, 4.0])
    for optimizer in (
        lambda: Members(Best(SGD(lr=RATES), patience=1)),
        lambda: Members(Plateau(SGD(lr=RATES), patience=0, factor=0.5)),
    ):
        expected = alone(optimizer(), value=scores)
        for value in (scores, laid(scores, mesh)):
            for in_place in (False, True):
                grads = [laid(tree(1 + step), mesh) for step in range(STEPS)]
                found = train(
                    optimizer(), laid(tree(0), mesh), grads.__getitem__, in_place, value=value
                )
                assert_same_bits(whole(found), expected)


def test_each_member_is_told_its_own_value():
    run_ranks(2, check_values)


def check_around(rank):
    """A wrapper around Members sees all of them; beneath it, each is by itself."""
    mesh = new_mesh()
    opt = Ema(Members(Clip(SGD(lr=RATES), max_norm=0.5)), decay=0.9)
    for in_place in (False, True):
        grads = [laid(tree(1 + step), mesh) for step in range(STEPS)]
        found = train(opt, laid(tree(0), mesh), grads.__getitem__, in_place)
        assert_same_bits(whole(found), alone(opt))
    opt = Clip(Members(Clip(SGD(lr=RATES), max_norm=0.5)), max_norm=1.0)
    found = train(opt, laid(tree(0), mesh), lambda step: laid(tree(1 + step), mesh), True)
    for own, other in zip(*map(tree_leaves, (whole(found), alone(opt))), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6)


def test_what_is_around_members_sees_all_and_what_is_within_sees_one():
    run_ranks(2, check_around)


# ---------------------------------------------------------------------------------- what is wrong


def check_refusals(rank):
    mesh = new_mesh()
    opt, params, grads = Members(SGD(lr=RATES)), laid(tree(0), mesh), laid(tree(1), mesh)
    state = opt.init(params)
    columns = {"w": laid(tree(0)["w"], mesh, Shard(1))}
    here = whole(params)["w"]
    everywhere = laid(here, mesh, Replicate())
    uneven = DTensor.from_local(
        params["w"].to_local()[:2], mesh, [Shard(0)], shape=(COUNT, 4, 3), stride=(12, 3, 1)
    )
    before = whole((params, state))
    for method in (opt.update, opt.update_):
        for given, message in (
            (
                (grads, state, columns),
                r"params\['w'\] has placements \(Shard\(dim=1\),\).*Shard\(0\)",
            ),
            (
                (grads, state, params | {"w": here}),
                r"params\['w'\] is a plain tensor, .*\['b'\] is",
            ),
            ((grads | {"w": here}, state, params), r"grads\['w'\] is a plain tensor.*distribute"),
            ((grads | {"w": everywhere}, state, params), r"grads\['w'\] has .*Replicate.*redistr"),
            ((grads, whole(state), params), r"state.step is a plain tensor.*from_local"),
            ((grads, state, {"w": uneven}), r"params\['w'\] has 2 of 6 members here: must have"),
        ):
            with pytest.raises(ValueError, match=message):
                method(*given)
        with pytest.raises(ValueError, match=r"active has shape \(3,\) for 6 members: .*Shard"):
            method(grads, state, params, active=ACTIVE[:3])
        with pytest.raises(ValueError, match=r"active has placements .*Replicate.*redistribute"):
            method(grads, state, params, active=laid(ACTIVE, mesh, Replicate()))
    for rates in (RATES[:3], laid(RATES[:4], mesh)):
        with pytest.raises(ValueError, match=r"inner\.lr has shape \([34],\).* 6 members"):
            Members(SGD(lr=rates)).update_(grads, state, params)
    sharded = Members(SGD(lr=laid(RATES, mesh)))
    with pytest.raises(ValueError, match=r"inner\.lr is a DTensor .* and params has none"):
        sharded.update(*map(whole, (grads, state, params)))
    for wrong in (columns, params | {"w": here}, {"w": uneven}):
        with pytest.raises(ValueError, match=r"params\['w'\] (has|is a plain)"):
            opt.init(wrong)
    with pytest.raises(TypeError, match="Whole does not say that it works on parts"):
        Partition({"all": Members(SGD(lr=RATES)), "whole": Whole()}, {"w": "all"}).update(
            {"w": grads["w"]}, {}, {"w": params["w"]}
        )
    assert_same_bits(whole((params, state)), before)


class Whole(Frozen):
    """An optimizer that says nothing of itself."""

    traits = extend.Traits()


def test_what_lies_otherwise_is_refused_with_its_path_and_where_to_bring_it():
    run_ranks(2, check_refusals)


def check_whole_members(rank):
    """What sees a whole leaf, as a norm of it, sees that of a member; replicas go alike."""
    mesh = new_mesh()
    expected = alone(Members(SkipNonfinite(ClipAdaptive(SGD(lr=RATES)))))
    for placement in (Shard(0), Replicate()):
        opt = Members(SkipNonfinite(ClipAdaptive(SGD(lr=laid(RATES, mesh, placement)))))
        grads = [laid(tree(1 + step), mesh, placement) for step in range(STEPS)]
        params = tree_map(torch.Tensor.requires_grad_, laid(tree(0), mesh, placement))
        found = train(opt, params, grads.__getitem__, in_place=False)
        assert all(leaf.requires_grad and leaf.is_leaf for leaf in found[0].values())
        assert all(leaf.placements == (placement,) for leaf in tree_leaves(found))
        assert_same_bits(whole(found), expected)


def test_replicas_have_the_bits_of_one_process_and_parameters_go_on_requiring_a_gradient():
    run_ranks(2, check_whole_members)
