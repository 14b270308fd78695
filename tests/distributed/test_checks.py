"""What an optimizer around local gradients, or around buckets, is refused for, and what serves."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from funcopt import (
    SGD,
    Accumulate,
    Adafactor,
    Cautious,
    Clip,
    ClipAdaptive,
    ClipValue,
    Compensated,
    Ema,
    Lookahead,
    LossScale,
    MasterWeights,
    Optimizer,
    Partition,
    ScheduleFree,
    SkipNonfinite,
    extend,
)
from funcopt.distributed import LocalUpdates, Zero1, plan
from funcopt.distributed._fake_world import in_fake_world

from ..cases import faded


def wrapper(name, traits):
    """Make the class of a wrapper as one writes it by hand."""

    @extend.register_optimizer
    @dataclass(frozen=True)
    class Own:
        traits: ClassVar[extend.Traits]
        inner: Optimizer[Any]

        def init(self, params):
            return self.inner.init(params)

        def update(self, grads, state, params):
            return self.inner.update(grads, state, params)

        def update_(self, grads, state, params):
            return self.inner.update_(grads, state, params)

    if traits is not None:
        Own.traits = traits
    Own.__name__ = name
    return Own


# One that is silent about itself, one that says all but what counts here, and one that says it.
Silent = wrapper("Silent", None)
Elementwise = wrapper("Elementwise", extend.Traits(elementwise=True))
Linear = wrapper("Linear", extend.Traits(elementwise=True, linear=True))


def label(name, leaf):
    return "all"


DECIDES = {
    "Clip": lambda opt: Clip(opt, 1.0),
    "Clip or skip": lambda opt: Clip(opt, 1.0, nonfinite="skip"),
    "ClipAdaptive": ClipAdaptive,
    "ClipValue": lambda opt: ClipValue(opt, 1.0),
    "SkipNonfinite": SkipNonfinite,
    "LossScale": LossScale,
    "Cautious": Cautious,
    "Silent": Silent,
    "Elementwise": Elementwise,
}
SERVES = {
    "Accumulate": lambda opt: Accumulate(opt, 2),
    "Ema": Ema,
    "Lookahead": Lookahead,
    "ScheduleFree": ScheduleFree,
    "MasterWeights": MasterWeights,
    "Compensated": Compensated,
    "Transform": faded,
    "Partition": lambda opt: Partition({"all": opt}, label),
    "Linear": Linear,
}
LOCAL = {
    "Zero1": lambda mesh: Zero1(SGD(), mesh, gradients="local"),
    "LocalUpdates": lambda mesh: LocalUpdates(SGD(), 2, mesh),
}
BETWEEN = {
    "nothing": lambda opt: opt,
    "Partition": SERVES["Partition"],
    "Accumulate": SERVES["Accumulate"],
    "two of them": lambda opt: Partition({"all": Ema(Accumulate(opt, 2))}, label),
}


def on_a_mesh(function):
    """Call a function with the mesh of two processes, of which this one is the first."""
    return in_fake_world(2, 0, "gloo", function)


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
@pytest.mark.parametrize("local", LOCAL)
@pytest.mark.parametrize("outer", DECIDES)
def test_what_decides_by_the_gradients_of_one_process_is_refused_when_it_is_built(
    outer, local, between
):
    def build(mesh):
        inner = between(LOCAL[local](mesh))
        name = outer.split()[0]
        message = (
            rf"^{name} is around {local}.*the trait `linear`.*would go apart\. Let it be inside, "
            rf"{local}\({name}\(\.\.\.\), \.\.\.\).*average_gradients\(grads, mesh\) and "
            rf"Zero1\(\.\.\., gradients='averaged'\).*traits = Traits\(linear=True"
        )
        with pytest.raises(ValueError, match=message):
            DECIDES[outer](inner)

    on_a_mesh(build)


@pytest.mark.parametrize("local", LOCAL)
@pytest.mark.parametrize("outer", SERVES)
def test_what_is_linear_in_the_gradients_goes_around_local_ones(outer, local):
    on_a_mesh(lambda mesh: SERVES[outer](LOCAL[local](mesh)))


@pytest.mark.parametrize("outer", DECIDES)
def test_what_decides_goes_around_averaged_gradients_and_around_a_process_alone(outer):
    def build(mesh):
        for inner in (
            Zero1(SGD(), mesh, gradients="averaged"),
            Zero1(SGD(), None),
            LocalUpdates(SGD(), 2, None),
        ):
            for between in BETWEEN.values():
                DECIDES[outer](between(inner))

    on_a_mesh(build)


def test_the_innermost_of_several_does_not_hide_one_that_takes_local_gradients():
    """One group of two is enough, wherever it stands."""

    def build(mesh):
        groups = {"first": SGD(), "second": Accumulate(Zero1(SGD(), mesh), 2)}
        with pytest.raises(ValueError, match=r"^SkipNonfinite is around Zero1"):
            SkipNonfinite(Partition(groups, lambda name, leaf: name))
        outer = LocalUpdates(Zero1(SGD(), mesh, gradients="averaged"), 2, mesh)
        with pytest.raises(ValueError, match=r"^Clip is around LocalUpdates"):
            Clip(outer, 1.0)

    on_a_mesh(build)


def test_the_remedies_that_the_message_names_can_be_built():
    def build(mesh):
        Zero1(Clip(SGD(), 1.0), mesh)
        Zero1(SkipNonfinite(SGD()), mesh)
        LocalUpdates(ClipAdaptive(SGD()), 2, mesh)
        groups = {"all": Zero1(SGD(), mesh, gradients="averaged")}
        SkipNonfinite(Clip(Partition(groups, label), 1.0))

    on_a_mesh(build)


def test_a_plan_puts_optimizers_on_a_mesh_and_refuses_them_there():
    params = {"w": torch.ones(4, device="meta")}
    with pytest.raises(ValueError, match=r"^Clip is around Zero1.*`linear`"):
        plan(Clip(Zero1(SGD(), None), 1.0), params, 2)
    plan(Clip(Zero1(SGD(), None, gradients="averaged"), 1.0), params, 2)


REFUSED_INSIDE = [
    (lambda: Partition({"all": SGD()}, label), r"`tells_leaves_apart`.*average_gradients"),
    (lambda: Accumulate(SGD(step_per_leaf=True), 2), "step_per_leaf=True.*Leave it out"),
    (Adafactor, r"state has other shapes than the leaves.*average_gradients"),
    (lambda: Silent(SGD()), r"a Silent, which.*`elementwise` or `packable`"),
    (lambda: LocalUpdates(SGD(), 2, None), "its trait `sends`.*around Zero1"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED_INSIDE)
def test_what_must_see_leaves_is_refused_inside_zero1_with_its_trait(make, message):
    for inner in (make(), Ema(make())):
        with pytest.raises(ValueError, match=message):
            Zero1(inner, None)


def test_what_moves_each_element_by_itself_is_served_inside_zero1():
    for inner in (Elementwise(SGD()), Linear(Clip(SGD(), 1.0)), Ema(ClipValue(SGD(), 1.0))):
        opt = Zero1(inner, None)
        w = torch.ones(3)
        assert torch.equal(opt.update(w, opt.init(w), w)[0], inner.update(w, inner.init(w), w)[0])
