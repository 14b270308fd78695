"""The law that steps lead down: right optimizers of every kind obey it, and none that ascends."""

import dataclasses

import pytest
import torch

from funcopt import (
    Accumulate,
    AdamW,
    Clip,
    ClipAdaptive,
    ClipValue,
    Frozen,
    Lookahead,
    LossScale,
    Partition,
)
from funcopt._core.types import Traits
from funcopt.distributed import LocalUpdates, Zero1
from funcopt.schedules import Cosine
from funcopt.testing import check_optimizer, laws

from ..cases import leaves, tree_map


@dataclasses.dataclass(frozen=True)
class Momentum:
    """Descent with momentum, and weight decay that goes through it."""

    lr: float = 0.1
    momentum: float = 0.0
    decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    def init(self, params):
        return tree_map(torch.zeros_like, params)

    def update(self, grads, means, params):
        sign = -1 if self.maximize else 1
        grads = tree_map(lambda g, p: sign * self.direction(g) + self.decay * p, grads, params)
        means = tree_map(lambda m, g: self.momentum * m + g, means, grads)
        ahead = tree_map(lambda m, g: g + self.momentum * m, means, grads)
        moves = ahead if self.nesterov else means
        return tree_map(lambda p, m: (p - self.lr * m).to(p.dtype), params, moves), means

    def direction(self, grad):
        return grad


class Signs(Momentum):
    """As of Lion, to which all elements are as steep."""

    def direction(self, grad):
        return torch.sgn(grad)


class Orthogonal(Momentum):
    """As of Muon: the nearest orthogonal matrix, rows over columns."""

    def direction(self, grad):
        if grad.ndim < 2 or grad.numel() == 0:
            return grad
        wide = grad.to(torch.complex128 if grad.is_complex() else torch.float64)
        left, _, right = torch.linalg.svd(wide.flatten(1), full_matrices=False)
        return (left @ right).reshape(grad.shape).to(grad.dtype)


class Centred(Momentum):
    """Without the mean over each row, which may leave nothing."""

    def direction(self, grad):
        if grad.ndim < 2 or grad.numel() == 0:
            return grad
        return grad - grad.flatten(1).mean(1).reshape(-1, *[1] * (grad.ndim - 1))


class InProportion(Momentum):
    """As of LAMB: in proportion to the parameters, where these are not zero."""

    def update(self, grads, means, params):
        def moved(p, g):
            size, steepness = p.abs().norm(), g.abs().norm()
            ratio = torch.where((size > 0) & (steepness > 0), size / steepness, 1.0)
            return (p - self.lr * ratio * g).to(p.dtype)

        return tree_map(moved, params, grads), means


class Together(Momentum):
    """By the norm over all gradients."""

    def update(self, grads, means, params):
        size = sum(g.detach().abs().double().square().sum() for g in leaves(grads)).sqrt()
        scaled = tree_map(lambda g: (g / (size + 1e-12)).to(g.dtype), grads)
        return super().update(scaled, means, params)


RIGHT = {
    "descent": Momentum(),
    "momentum": Momentum(momentum=0.9),
    "momentum, at a high rate": Momentum(lr=1.0, momentum=0.9, decay=1.0),
    "Nesterov": Momentum(momentum=0.9, nesterov=True),
    "ascent": Momentum(momentum=0.9, maximize=True),
    "signs": Signs(momentum=0.9, decay=0.5),
    "orthogonal": Orthogonal(momentum=0.9),
    "centred": Centred(momentum=0.9),
    "in proportion": InProportion(),
    "together": Together(momentum=0.9),
    "AdamW, at a high rate": AdamW(lr=1.0, weight_decay=0.9),
    "AdamW, ascending": AdamW(lr=1.0, weight_decay=0.5, maximize=True),
    "AdamW, warming up": AdamW(lr=Cosine(0.1, 5, warmup_steps=2)),
    "AdamW, without memory": AdamW(betas=(0.0, 0.0), eps=1.0),
    "every seventh": Accumulate(AdamW(), 7),
    "back to the start": Lookahead(AdamW(lr=0.1), 3, alpha=0.0),
    "never back": Lookahead(AdamW(lr=0.1), 3, alpha=1.0),
    "loss scaled": LossScale(Clip(AdamW(lr=0.1), 1.0)),
    "by units": ClipAdaptive(AdamW(lr=0.1), 1e-4),
    "in buckets": Zero1(AdamW(), None),
    "with outer momentum": LocalUpdates(AdamW(), 2, None, outer_lr=0.7, outer_momentum=0.9),
}

AT_REST = {
    "no rate": Momentum(lr=0.0),
    "AdamW without a rate": AdamW(lr=0.0),
    "frozen": Frozen(),
    "clipped to nothing": Clip(AdamW(), 0.0),
    "bound to nothing": ClipValue(AdamW(), 0.0),
    "too seldom": Accumulate(AdamW(), 100),
}


def verdict(opt, examples=25):
    return check_optimizer(opt, laws=[laws.goes_downhill], max_examples=examples).verdicts[0]


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_optimizer_goes_downhill(name, pytestconfig):
    found = verdict(RIGHT[name], 300 if pytestconfig.getoption("--nightly") else 25)
    assert found.status == "holds", found


@pytest.mark.parametrize("name", AT_REST)
def test_one_that_does_not_move_is_not_judged(name):
    found = verdict(AT_REST[name], 5)
    assert (found.status, found.detail) == (
        "not applicable",
        "it moves nothing in 10 updates",
    )


def test_one_that_goes_both_ways_on_purpose_is_not_judged():
    opt = Partition({"up": AdamW(maximize=True), "down": AdamW()}, lambda name, leaf: name)
    assert verdict(opt, 5).detail == "some of it maximizes, and some does not"


class Ascends(Momentum):
    def direction(self, grad):
        return -grad


class OneWay(Momentum):
    """Wherever it is steep."""

    def direction(self, grad):
        return torch.ones_like(grad)


class Partly(Momentum):
    """Matrices ascend, and all else descends further."""

    traits = Traits(leafwise=True)

    def direction(self, grad):
        return -grad if grad.ndim == 2 else 100 * grad


class NowAndThen(Momentum):
    """The fourth step goes back over the start."""

    def init(self, params):
        return 0

    def update(self, grads, count, params):
        lr = -10.0 if count == 3 else 1.0
        return tree_map(lambda p, g: (p - lr * g).to(p.dtype), params, grads), count + 1


@pytest.mark.parametrize("opt", [Ascends(), OneWay(), Partly(), NowAndThen()], ids=repr)
def test_what_ascends_is_found(opt):
    found = verdict(opt)
    assert found.status == "fails"
    assert "on a slope along which steps should lower it" in found.detail


def test_what_descends_where_it_should_maximize_is_found():
    found = verdict(Ascends(maximize=True))
    assert "on a slope along which steps should raise it" in found.detail


def test_no_other_law_finds_one_that_ascends_and_has_no_oracle():
    """Why there is this one, whatever an optimizer does with wrong trees, a compiler or history."""
    beside = laws.bad_trees_raise, laws.compiles_once, laws.state_keeps_no_history
    others = [law for law in laws.LAWS if law not in beside]
    report = check_optimizer(Ascends(momentum=0.9), laws=others, max_examples=10)
    assert report.broken == ("goes_downhill",)


def test_the_message_names_step_leaf_and_change():
    params = {"w": torch.zeros(1)}
    with pytest.raises(laws.LawBroken) as broken:
        laws.goes_downhill(Partly(lr=1.0), {"w": torch.zeros(1, 1)}, [params])
    assert str(broken.value).startswith("goes_downhill: step 1, params['w']: got a loss that chang")
