"""Members on several processes: the bits of the same ensemble on one, and nothing is sent."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
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
    members,
)
from funcopt.interop import from_state_dict, to_state_dict

from ..cases import assert_same_bits
from ..distributed.harness import run_ranks
from ..interop.formats import load_dcp

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


# ------------------------------------------------------------------------------- taken and chosen


def check_take(rank):
    mesh = new_mesh()
    shapes = {"complex": (COUNT, 2), "flag": (COUNT,), "none": (COUNT, 0)}
    plain = tree(0) | {"half": tree(1)["w"].bfloat16(), "none": torch.zeros(shapes["none"])}
    plain |= {"complex": torch.complex(*tree(2)["w"].chunk(2, 1)).conj(), "flag": ACTIVE}
    sharded = laid(plain, mesh)
    losses = torch.tensor([0.3, 0.1, torch.inf, 0.2, 0.5, 0.4])
    for indices in (
        losses.argsort()[[0, 0, 1, 2, 3, 1]],  # the worst have the best copied over them
        [5, 4, 3, 2, 1, 0],
        [-1, -1, -1],
        [2],
        losses < 0.35,
        torch.zeros(COUNT, dtype=torch.bool),
        torch.arange(COUNT).repeat(3),
        losses.argmin(),
        4,
    ):
        single = getattr(indices, "ndim", isinstance(indices, list)) == 0
        placement = Replicate() if single else Shard(0)
        taken = members.take((sharded, RATES), indices)
        assert_same_bits(whole(taken), members.take((plain, RATES), indices))
        assert all(leaf.placements == (placement,) for leaf in taken[0].values())
        assert type(taken[1]) is torch.Tensor
        if not single:  # as torch itself lays them out
            for name, leaf in members.take(plain, indices).items():
                assert_same_bits(taken[0][name].to_local(), laid(leaf, mesh).to_local())
    before = members.take(sharded, list(range(COUNT)))
    members.take(sharded, [0] * COUNT)["w"].to_local().zero_()
    assert_same_bits(whole(before), whole(sharded))
    assert_same_bits(
        whole(members.take(sharded, laid(losses.argsort(), mesh))),
        members.take(plain, losses.argsort()),
    )


@pytest.mark.by_day(1)
@pytest.mark.parametrize("world_size", [4, 2])
def test_members_are_taken_across_processes_to_the_bit_and_lie_as_before(world_size):
    run_ranks(world_size, check_take)


def check_each_is_sent_once(rank):
    """The best member goes once to the other process, however many places it takes there."""
    mesh, sizes = new_mesh(), []
    send = dist.all_to_all_single

    def noted(output, given, *args):
        sizes.append((len(output), len(given)))
        return send(output, given, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", noted)
        taken = members.take(laid(RATES, mesh), [0, 1, 2, 0, 0, 5])
    assert sizes == [(3, 4) if rank == 0 else (2, 1)]
    assert_same_bits(whole(taken), RATES[[0, 1, 2, 0, 0, 5]])


def test_a_member_is_sent_once_to_a_process_that_has_it_several_times():
    run_ranks(2, check_each_is_sent_once)


def check_select(rank):
    mesh, new, old = new_mesh(), tree(1), tree(0)
    new["w"][1] = torch.nan
    expected = members.select(ACTIVE, (SGD(lr=RATES), new), (SGD(lr=DECAYS), old))
    own, other = ((SGD(lr=n), laid(t, mesh)) for n, t in ((RATES, new), (DECAYS, old)))
    for mask in (ACTIVE, laid(ACTIVE, mesh)):
        chosen = members.select(mask, own, other)
        assert_same_bits(chosen[0].lr, expected[0].lr)
        assert_same_bits(whole(chosen[1]), expected[1])
        assert all(leaf.placements == (Shard(0),) for leaf in chosen[1].values())
    with CommDebugMode() as sent:
        members.select(ACTIVE, own, other)
    assert sent.get_total_counts() == 0
    assert members.size(own[1]) == COUNT


@pytest.mark.by_day(1)
@pytest.mark.parametrize("world_size", [4, 2])
def test_members_are_chosen_where_they_are(world_size):
    run_ranks(world_size, check_select)


def check_exploit(rank):
    """A population: after some steps the best are copied over the worst, and go on."""
    mesh = new_mesh()
    scores = torch.tensor([0.3, 0.1, 0.7, 0.2, 0.5, 0.4])

    def run(rates, lay, scores):
        places = scores.argsort()[[0, 0, 1, 2, 3, 1]]
        opt, params = Members(Clip(AdamW(lr=rates), 0.5)), lay(tree(0))
        params, state = train(opt, params, lambda step: lay(tree(1 + step)), in_place=True)
        opt, params, state = members.take((opt, params, state), places)
        return opt, *train(opt, params, lambda step: lay(tree(6 + step)), True, state)

    expected = run(RATES, lambda given: given, scores)
    board = laid(scores, mesh).full_tensor()  # each process knows the scores of its own members
    for rates in (RATES, laid(RATES, mesh)):
        found = run(rates, lambda given: laid(given, mesh), board)
        assert_same_bits(whole(found), expected)


def test_a_population_goes_on_from_the_best_with_the_bits_of_one_process():
    run_ranks(2, check_exploit)


def check_refused_members(rank):
    mesh = new_mesh()
    sharded = laid(tree(0), mesh)
    columns = {"w": laid(tree(0)["w"], mesh, Shard(1))}
    with pytest.raises(ValueError, match=r"tree\['w'\] has placements .*dim=1.*redistribute"):
        members.take(columns, [0])
    with pytest.raises(ValueError, match=r"a tensor of new has placements .*dim=1.*redistr"):
        members.select(ACTIVE, columns, columns)
    with pytest.raises(ValueError, match=r"new is a DTensor .*old is a plain tensor.*redistr"):
        members.select(ACTIVE, sharded, tree(0))
    with pytest.raises(ValueError, match=r"tree\['w'\] is a DTensor .*full_tensor.*take"):
        members.unstack(sharded)
    with pytest.raises(IndexError, match="indices has 6, and there are 6 members"):
        members.take(sharded, [6])
    required = {"w": sharded["w"].requires_grad_()}
    with pytest.raises(RuntimeError, match=r"tree\['w'\] is a DTensor that requires .*detach"):
        members.take(required, [0])
    with torch.no_grad():
        assert not members.take(required, [0])["w"].requires_grad


def test_what_members_cannot_do_across_processes_is_refused_with_a_remedy():
    run_ranks(2, check_refused_members)


# ------------------------------------------------------------------------------------ checkpoints


def population(mesh):
    """What a checkpoint has of a population: parameters and state, made anew."""
    params = tree(0) if mesh is None else laid(tree(0), mesh)
    opt = Members(Clip(AdamW(lr=RATES, amsgrad=True), 0.5))
    return opt, {"params": params, "state": opt.init(params)}


def save(rank, directory):
    mesh = new_mesh()
    opt, runs = population(mesh)
    runs["params"], runs["state"] = train(
        opt, runs["params"], lambda step: laid(tree(1 + step), mesh), True, runs["state"]
    )
    dcp.save(to_state_dict(runs), checkpoint_id=directory)
    return whole(runs)


def load(rank, directory, expected):
    """Load, and go on."""
    mesh = new_mesh()
    opt, template = population(mesh)
    entries = to_state_dict(template)
    dcp.load(entries, checkpoint_id=directory)
    found = from_state_dict(template, entries)
    assert all(leaf.placements == (Shard(0),) for leaf in tree_leaves(found))
    assert_same_bits(whole(found), expected)
    grads = [laid(tree(6 + step), mesh) for step in range(STEPS)]
    return whole(train(opt, found["params"], grads.__getitem__, True, found["state"]))


def test_a_checkpoint_of_two_processes_goes_on_on_any_number_and_alone(tmp_path):
    expected = run_ranks(2, save, str(tmp_path))[0]
    opt, template = population(None)
    found = from_state_dict(template, load_dcp(str(tmp_path), to_state_dict(template)))
    assert_same_bits(found, expected)
    later = train(opt, found["params"], lambda step: tree(6 + step), False, found["state"])
    for world_size in (1, 4):
        for loaded in run_ranks(world_size, load, str(tmp_path), expected):
            assert_same_bits(loaded, later)
