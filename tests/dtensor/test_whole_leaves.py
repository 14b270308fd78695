"""Optimizers that look at whole leaves: DTensors are refused with the trait, before any write."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from funcopt import (
    SGD,
    Accumulate,
    Clip,
    Ema,
    Frozen,
    Number,
    Optimizer,
    Partition,
    Schedule,
    extend,
)

from ..cases import assert_same_bits, tree_map
from ..distributed.harness import run_ranks


class MuonState(NamedTuple):
    step: Any
    momentum: Any


def orthogonal(param, grad, slots, numbers, options):
    """A step of Muon: the momentum with all its singular values made 1."""
    momentum = slots[0] * numbers.momentum + grad
    left, _, right = torch.linalg.svd(momentum, full_matrices=False)
    return [param - numbers.lr * left @ right, momentum]


def muon(traits):
    """Make the class of an optimizer of whole matrices as one writes it by hand."""

    @extend.register_optimizer
    @dataclass(frozen=True)
    class Muon:
        rule: ClassVar[extend.UpdateRule] = extend.UpdateRule(
            state=MuonState,
            slots=(extend.Slot("momentum"),),
            hyperparams=(
                extend.Hyperparam("lr", extend.AT_LEAST_ZERO),
                extend.Hyperparam("momentum", extend.BELOW_ONE),
            ),
            equations=orthogonal,
            traits=traits,
        )
        lr: Number | Schedule = 0.1
        momentum: Number | Schedule = 0.9
        __post_init__ = extend.check_fields
        init, update, update_ = extend.init, extend.update, extend.update_

    return Muon


Muon = muon(extend.Traits(leafwise=True, linear=True))


@extend.register_optimizer
@dataclass(frozen=True)
class Centralize:
    """Takes from each gradient its mean over all dimensions but the first."""

    traits: ClassVar[extend.Traits] = extend.Traits(leafwise=True, linear=True)
    inner: Optimizer[Any]

    def init(self, params):
        return self.inner.init(params)

    def update(self, grads, state, params):
        return self.inner.update(self.centered(grads), state, params)

    def update_(self, grads, state, params):
        return self.inner.update_(self.centered(grads), state, params)

    def centered(self, grads):
        return extend.tree_map(lambda grad: grad - grad.mean(1, keepdim=True), grads)


def label(name, leaf):
    return name


REFUSED = {
    "Muon": (Muon, "Muon"),
    "Centralize": (lambda: Centralize(SGD(momentum=0.9)), "Centralize"),
    "Clip": (lambda: Clip(Muon(), 1.0), "Muon"),
    "Ema": (lambda: Ema(Centralize(SGD())), "Centralize"),
    "Accumulate": (lambda: Accumulate(Muon(), 2), "Muon"),
    "one group": (lambda: Partition({"v": SGD(), "w": Muon()}, label), "Muon"),
}


def copied(tree):
    """The values of a tree, DTensors by their local parts."""
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [(x.to_local() if isinstance(x, DTensor) else x).clone() for x in leaves]


def refuse(rank):
    mesh = init_device_mesh("cpu", (2,))
    full = torch.arange(12.0).reshape(4, 3)
    for lying in (Shard(0), Shard(1), Replicate()):
        params = {name: distribute_tensor(full + 1, mesh, [lying]) for name in "vw"}
        grads = {name: distribute_tensor(full.cos(), mesh, [lying]) for name in "vw"}
        for make, name in REFUSED.values():
            opt = make()
            state = opt.init(params)
            given = grads, state, params
            before = copied(given)
            message = (
                rf"params has DTensors, and {name} does not say.*"
                r"`traits = Traits\(elementwise=True\)`.*`shardable=True`.*\.full_tensor\(\)"
            )
            for update in (opt.update, opt.update_):
                with pytest.raises(TypeError, match=message):
                    update(*given)
            assert_same_bits(copied(given), before)


def test_what_sees_whole_leaves_is_refused_with_the_trait_and_nothing_is_written():
    run_ranks(2, refuse)


def serve(rank):
    """What is refused of DTensors is right where its words say: on whole tensors, or beside."""
    mesh = init_device_mesh("cpu", (2,))
    full = torch.arange(12.0).reshape(4, 3) + torch.eye(4, 3)
    params = {"v": distribute_tensor(full, mesh, [Shard(0)])}
    grads = {"v": distribute_tensor(full.sin(), mesh, [Shard(0)])}
    whole, given = (tree_map(lambda leaf: leaf.full_tensor(), t) for t in (params, grads))
    plain = {"v": full}
    for opt in (Muon(), Centralize(SGD(momentum=0.9))):
        found = opt.update(given, opt.init(whole), whole)[0]
        expected = opt.update({"v": full.sin()}, opt.init(plain), plain)[0]
        assert torch.equal(found["v"], expected["v"])
    # A group that is given no DTensor is of no matter if all leaves are whole.
    at_rest = Partition({"v": Frozen(), "w": SGD()}, label)
    both, slopes = {**params, "w": full}, {**grads, "w": full}
    assert at_rest.update(slopes, at_rest.init(both), both)[0]["v"] is params["v"]
    # Whoever says that leaves may be parts is believed, and given parts.
    believed = muon(extend.Traits(leafwise=True, shardable=True))()
    moved = believed.update(grads, believed.init(params), params)[0]["v"]
    part = {"v": params["v"].to_local()}
    own = believed.update({"v": grads["v"].to_local()}, believed.init(part), part)[0]["v"]
    assert torch.equal(moved.to_local(), own)


def test_on_whole_tensors_it_is_right_and_who_says_shardable_is_given_parts():
    run_ranks(2, serve)
