"""Updating inside the backward pass: the bits of a loop, and never all gradients at once."""

import gc
import pathlib
import subprocess
import sys
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

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
    Partition,
    interop,
)
from funcopt._core.types import Traits
from funcopt.distributed import LocalUpdates, update_in_backward
from funcopt.schedules import Linear

from ..cases import assert_same_bits, clone, not_dense, tree_map
from .harness import run_ranks

ROOT = pathlib.Path(__file__).parents[2]


class Model(torch.nn.Module):
    """Tied weights, a weight used twice, a scalar, and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 4)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 40), torch.nn.Tanh(), torch.nn.Linear(40, 4)
        )
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.norm = torch.nn.LayerNorm(4)
        self.norm.bias.requires_grad_(False)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens, recompute=False):
        x = self.embedding(tokens)
        for _ in range(2):
            x = x + (
                checkpoint(self.layers, x, use_reentrant=False) if recompute else self.layers(x)
            )
        return self.head(self.norm(x) * self.scale).logsumexp(-1).sum()


def made(seed=0):
    torch.manual_seed(seed)
    return Model()


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def batches(count, seed=1):
    torch.manual_seed(seed)
    return [torch.randint(7, (5,)) for _ in range(count)]


def loop(model, opt, tokens, state=None, module=None):
    """What everyone writes: one update of all, after the backward pass."""
    params = trained(model)
    state = opt.init(params) if state is None else state
    for batch in tokens:
        (module or model)(batch).backward()
        opt.update_({name: p.grad for name, p in params.items()}, state, params)
        (module or model).zero_grad()
    return state


OPTIMIZERS = {
    "AdamW": AdamW(lr=0.1),
    "amsgrad, a schedule": AdamW(lr=Linear(0.1, 0.01, 4), amsgrad=True, kernel="foreach"),
    "ClipValue": ClipValue(AdamW(lr=0.1), 0.01),
    "Ema": Ema(AdamW(lr=0.1), 0.5),
    "Lookahead": Lookahead(AdamW(lr=0.1), 2),
    "MasterWeights": MasterWeights(AdamW(lr=0.1)),
    "Compensated": Compensated(AdamW(lr=0.1)),
    "Accumulate": Accumulate(AdamW(lr=0.1), 2),
    "Partition": Partition(
        {"a": AdamW(lr=0.1), "b": ClipValue(AdamW(), 1e-3), "c": Frozen()},
        labels=lambda name, leaf: "c" if leaf.ndim == 0 else "ab"[leaf.ndim - 1],
    ),
    "Ema of a Partition": Ema(
        Partition({"a": AdamW(lr=0.1), "b": Frozen()}, lambda name, leaf: "ab"[leaf.ndim == 0])
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bits_are_those_of_a_loop(name):
    model, other, opt = made(), made(), OPTIMIZERS[name]
    handle = update_in_backward(model, opt)
    frozen = clone(model.norm.bias.detach())
    for batch in (tokens := batches(5)):
        model(batch).backward()
        assert all(p.grad is None for p in model.parameters())
    loop(other, opt, tokens)
    assert_same_bits(trained(model), trained(other))
    assert torch.equal(model.norm.bias, frozen)
    assert list(handle.state) == list(trained(model))
    assert "head.weight" not in handle.state


def test_each_state_is_that_of_the_leaf_in_a_loop():
    model, other, opt = made(), made(), AdamW(lr=0.1)
    handle = update_in_backward(model, opt)
    for batch in (tokens := batches(3)):
        model(batch).backward()
    state = loop(other, opt, tokens)
    for name, own in handle.state.items():
        assert own.step == 3
        assert_same_bits(own.exp_avg[name], state.exp_avg[name])
        assert_same_bits(own.exp_avg_sq[name], state.exp_avg_sq[name])


def test_recomputed_activations_see_the_parameters_of_the_forward_pass():
    model, other = made(), made()
    update_in_backward(model, AdamW(lr=0.1))
    for batch in (tokens := batches(3)):
        model(batch, recompute=True).backward()
    loop(other, AdamW(lr=0.1), tokens)
    assert_same_bits(trained(model), trained(other))


def test_a_parameter_that_a_backward_pass_does_not_reach_stands_still():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 1), "b": torch.nn.Linear(2, 1)})
    handle = update_in_backward(model, AdamW(lr=0.1))
    before = clone(tree_map(torch.Tensor.detach, dict(model["b"].named_parameters())))
    model["a"](torch.ones(2)).backward()
    assert_same_bits(tree_map(torch.Tensor.detach, dict(model["b"].named_parameters())), before)
    assert (handle.state["a.weight"].step, handle.state["b.weight"].step) == (1, 0)


def test_no_more_than_one_gradient_is_there_at_a_time():
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(20)))
    alive, most = [], 0

    def watch(param):
        nonlocal most
        alive.append(weakref.ref(param.grad))
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(watch)
    update_in_backward(model, AdamW())
    model(torch.ones(8)).sum().backward()
    assert (len(alive), most) == (20, 1)


PEAK = """
import json, sys, tempfile, torch
from funcopt import AdamW
from funcopt.distributed import update_in_backward

torch.set_num_threads(1)
model = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(16)))
opt, params, x = AdamW(), dict(model.named_parameters()), torch.randn(4, 256)
if sys.argv[1] == "inside":
    handle = update_in_backward(model, opt)
else:
    state = opt.init(params)
with torch.profiler.profile(profile_memory=True) as profile:
    model(x).sum().backward()
    if sys.argv[1] == "after":
        opt.update_({name: p.grad for name, p in params.items()}, state, params)
with tempfile.NamedTemporaryFile(suffix=".json") as file:
    profile.export_chrome_trace(file.name)
    events = json.load(open(file.name))["traceEvents"]
events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
used = most = 0
for event in events:
    used += event["args"]["Bytes"]
    most = max(most, used)
print(most / sum(p.nbytes for p in params.values()))
"""


def test_the_peak_is_lower_by_nearly_the_size_of_the_parameters():
    def peak(way):
        command = [sys.executable, "-c", PEAK, way]
        run = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=100, cwd=ROOT
        )
        return float(run.stdout.split()[-1])

    after, inside = peak("after"), peak("inside")
    assert after > 1.0  # all gradients, and the activations
    assert inside < 0.25  # of 16 gradients two at most, and the activations
    assert after - inside > 0.85


@dataclass(frozen=True)
class Descent:
    """An optimizer of one's own."""

    def init(self, params):
        return ()

    def update(self, grads, state, params):
        raise NotImplementedError

    def update_(self, grads, state, params):
        with torch.no_grad():
            for name, grad in grads.items():
                params[name].sub_(grad)
        return params, state


class Leafwise(Descent):
    traits = Traits(leafwise=True)


class Elementwise(Descent):
    traits = Traits(elementwise=True)


class Heir(Leafwise):
    """Says nothing of itself."""


NEEDS_ALL = (
    "opt has a Clip, which may look at the gradients of several leaves at once, as for a norm over "
    "all of them.*ClipValue bounds each element by itself; or update after the backward pass"
)


@pytest.mark.parametrize(
    ("opt", "reason"),
    [
        (Clip(AdamW(), 1.0), NEEDS_ALL),
        (Ema(Clip(AdamW(), 1.0)), NEEDS_ALL),
        (Partition({"a": Clip(AdamW(), 1.0)}, lambda name, leaf: "a"), NEEDS_ALL),
        (LocalUpdates(AdamW(), 2, None), "LocalUpdates, which may look at"),
        (Descent(), r"Descent, which may look at .*Traits\(leafwise=True\)"),
        (Heir(), "Heir, which may look at"),
    ],
)
def test_what_looks_at_several_leaves_is_refused_with_the_reason(opt, reason):
    model = made()
    with pytest.raises(ValueError, match=reason):
        update_in_backward(model, opt)
    model(batches(1)[0]).backward()
    assert all(p.grad is not None for p in trained(model).values())


@pytest.mark.parametrize("kind", [Leafwise, Elementwise])
def test_an_optimizer_of_ones_own_says_that_it_is_leafwise(kind):
    model = torch.nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    handle = update_in_backward(model, kind())
    model(torch.ones(2)).backward()
    assert torch.equal(model.weight, before - 1)
    assert handle.state == {"weight": ()}


def test_a_checkpoint_goes_on_to_the_bit():
    opt, tokens = Ema(Accumulate(AdamW(lr=0.1), 2), 0.5), batches(6)
    model, other = made(), made()
    handle = update_in_backward(model, opt)
    for batch in tokens[:3]:
        model(batch).backward()
    saved = clone(interop.to_state_dict({"params": trained(model), "state": handle.state}))
    for batch in tokens[3:]:
        model(batch).backward()

    resumed = update_in_backward(other, opt)
    template = {"params": trained(other), "state": resumed.state}
    loaded = interop.from_state_dict(template, saved)
    other.load_state_dict(loaded["params"], strict=False)
    resumed.state = loaded["state"]
    for batch in tokens[3:]:
        other(batch).backward()
    assert_same_bits((trained(model), handle.state), (trained(other), resumed.state))


def test_a_state_can_be_given_in_any_order_and_is_checked():
    model, opt = torch.nn.Linear(2, 1), AdamW()
    first = update_in_backward(model, opt)
    model(torch.ones(2)).backward()
    first.remove()
    state = dict(reversed(first.state.items()))
    handle = update_in_backward(model, opt, state)
    assert handle.state["bias"].step == 1
    assert handle.state["weight"].exp_avg["weight"].shape == (1, 2)
    kept = handle.state
    bad = {**state, "bias": state["bias"]._replace(exp_avg={"bias": torch.ones(3)})}
    with pytest.raises(ValueError, match=r"state\['bias'\]\.exp_avg\['bias'\] is of torch.float32"):
        handle.state = bad
    bad["bias"] = state["bias"]._replace(
        exp_avg={"bias": not_dense("nested and strided", torch.ones(1))}
    )
    with pytest.raises(ValueError, match=r"state\['bias'\]\.exp_avg\['bias'\] is a nested tensor"):
        handle.state = bad
    with pytest.raises(ValueError, match="state does not have the structure"):
        handle.state = {"weight": state["weight"]}
    with pytest.raises(ValueError, match="state does not have the structure"):
        update_in_backward(model, Ema(opt), state)
    assert_same_bits(handle.state, kept)


def test_removed_it_leaves_gradients_again():
    model = torch.nn.Linear(2, 1)
    with update_in_backward(model, AdamW(lr=0.1)) as handle:
        model(torch.ones(2)).backward()
    before = clone(tree_map(torch.Tensor.detach, dict(model.named_parameters())))
    model(torch.ones(2)).backward()
    assert_same_bits(tree_map(torch.Tensor.detach, dict(model.named_parameters())), before)
    assert model.weight.grad is not None
    assert handle.state["weight"].step == 1
    handle.remove()


def test_two_on_one_module_are_one_too_many():
    model = torch.nn.Linear(2, 1)
    update_in_backward(model, AdamW())
    update_in_backward(model, AdamW())
    with pytest.raises(RuntimeError, match=r"'bias' is gone.*remove\(\)|'weight' is gone"):
        model(torch.ones(2)).backward()


def test_a_gradient_that_is_to_be_differentiated_is_refused():
    model = torch.nn.Linear(2, 1)
    before = clone(tree_map(torch.Tensor.detach, dict(model.named_parameters())))
    update_in_backward(model, AdamW())
    with (
        pytest.warns(UserWarning, match="create_graph"),
        pytest.raises(RuntimeError, match="grads"),
    ):
        model(torch.ones(2)).square().backward(create_graph=True)
    assert_same_bits(tree_map(torch.Tensor.detach, dict(model.named_parameters())), before)


def test_a_second_pass_through_one_graph_is_an_error_and_not_a_wrong_gradient():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    update_in_backward(model, AdamW())
    loss = model(torch.ones(2)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("module", "opt"),
    [
        (torch.nn.Linear(2, 1), AdamW),
        ({"w": torch.ones(1)}, AdamW()),
        (torch.nn.ReLU(), AdamW()),
    ],
)
def test_bad_arguments_are_refused(module, opt):
    with pytest.raises((TypeError, ValueError), match=r"^(opt|module)"):
        update_in_backward(module, opt)


def test_a_state_of_another_kind_is_refused():
    model = torch.nn.Linear(2, 1)
    state = AdamW().init(dict(model.named_parameters()))
    with pytest.raises(TypeError, match="state is of type AdamWState: it must be a dict"):
        update_in_backward(model, AdamW(), state)


def reduced(model, **options):
    return DistributedDataParallel(model, bucket_cap_mb=0.0005, **options)


def check_reduced(rank, opt, views):
    """The bits of a loop around the same module, while gradients are freed."""
    model, other = made(), made()
    module, beside = (reduced(m, gradient_as_bucket_view=views) for m in (model, other))
    handle = update_in_backward(module, opt)
    for batch in (tokens := batches(6, seed=10 + rank)):
        module(batch).backward()
        assert all(p.grad is None for p in model.parameters())
    loop(other, opt, tokens, module=beside)
    assert_same_bits(trained(model), trained(other))
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: p.detach() for name, p in trained(model).items()})
    assert all(torch.equal(e["scale"], everyone[0]["scale"]) for e in everyone)
    return model, module, other, beside, handle


def check_no_sync(rank, views):
    """Gradients of passes that send nothing are in the next one's."""
    opt, (first, second) = AdamW(lr=0.1), batches(2, seed=20 + rank)
    model, other = made(), made()
    module, beside = (reduced(m, gradient_as_bucket_view=views) for m in (model, other))
    handle = update_in_backward(module, opt)
    state = None
    for number in range(2):
        for own in (module, beside):
            with own.no_sync():
                own(first).backward()
        assert all(own.step == number for own in handle.state.values())
        module(second).backward()
        state = loop(other, opt, [second], state, beside)
        assert_same_bits(trained(model), trained(other))


def check_removed(rank, views):
    """Once removed, a module leaves averaged gradients."""
    model, module, other, beside, handle = check_reduced(rank, AdamW(lr=0.1), views)
    handle.remove()
    before = clone({name: p.detach() for name, p in trained(model).items()})
    for batch in batches(3, seed=30 + rank):
        for own in (module, beside):
            own(batch).backward()
        for name, p in trained(model).items():
            assert torch.equal(p.grad, trained(other)[name].grad), name
        if dist.get_world_size() != 2:  # what views add up is then divided, not multiplied
            module.zero_grad()
            beside.zero_grad()
    assert_same_bits({name: p.detach() for name, p in trained(model).items()}, before)


def check_checkpoint(rank):
    """What was saved under a reduced module goes on in a plain one, with the same names."""
    model, module, *_, handle = check_reduced(rank, AdamW(lr=0.1), False)
    alone = made(1)
    alone.load_state_dict(model.state_dict())
    resumed = update_in_backward(alone, AdamW(lr=0.1), clone(handle.state))
    tokens = [torch.arange(5)] * 2  # the same on each rank, so that the mean changes nothing
    for batch in tokens:
        module(batch).backward()
        alone(batch).backward()
    if dist.get_world_size() == 2:
        assert_same_bits(trained(alone), trained(model))
        assert_same_bits(resumed.state, handle.state)


def check_refusals():
    for options in ({"find_unused_parameters": True}, {"static_graph": True}):
        with pytest.raises(ValueError, match=next(iter(options))):
            update_in_backward(reduced(made(), **options), AdamW())
    with pytest.raises(ValueError, match=NEEDS_ALL):
        update_in_backward(reduced(made()), Clip(AdamW(), 1.0))
    for outer in (torch.nn.Sequential(reduced(made())), torch.compile(reduced(made()))):
        with pytest.raises(ValueError, match=r"has a DistributedDataParallel in it.*itself"):
            update_in_backward(outer, AdamW())


class Broken(Leafwise):
    traits = Traits(leafwise=True)

    def update_(self, grads, state, params):
        raise ZeroDivisionError("the reason")


def check_errors():
    """What an update raises within a bucket comes out of the backward pass."""
    module = reduced(made())
    update_in_backward(module, Broken())
    with pytest.raises(ZeroDivisionError, match="the reason"):
        module(batches(1)[0]).backward()


def check_unfrozen():
    """A parameter whose gradients are not averaged, and would pile up, is found out."""
    model = made()
    module = reduced(model)
    model.norm.bias.requires_grad_()
    update_in_backward(module, AdamW())
    with pytest.raises(RuntimeError, match="averages 7 parameters, of 8 that required"):
        module(batches(1)[0]).backward()


def check_without_the_private_call(rank):
    """A torch that always copies buckets into gradients has these freed."""
    model = made()
    module = reduced(model)

    class Bare:
        def __getattr__(self, name):
            if name == "_set_optimizer_in_backward":
                raise AttributeError(name)
            return getattr(kept, name)

    kept, module.reducer = module.reducer, Bare()
    handle = update_in_backward(module, AdamW(lr=0.1))
    module.reducer = kept
    other = made()
    beside = reduced(other)
    for batch in (tokens := batches(3, seed=40 + rank)):
        module(batch).backward()
        assert all(p.grad is None for p in model.parameters())
    loop(other, AdamW(lr=0.1), tokens, module=beside)
    assert_same_bits(trained(model), trained(other))
    assert handle.state["scale"].step == 3


def on_each_rank(rank):
    for views in (False, True):
        for opt in OPTIMIZERS.values():
            check_reduced(rank, opt, views)
        check_no_sync(rank, views)
        check_removed(rank, views)
    check_checkpoint(rank)
    check_refusals()
    check_without_the_private_call(rank)
    check_errors()
    check_unfrozen()


@pytest.mark.by_day(1)
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_reduced_module_moves_by_the_mean_to_the_bit(world_size):
    run_ranks(world_size, on_each_rank)
