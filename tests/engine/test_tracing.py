"""The step under torch's tracers: compile, export, make_fx, fake tensors."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from funcopt import AdamW, AdamWState
from funcopt._engine import registration
from funcopt.distributed import Zero1

from ..cases import (
    WRAPPED,
    Point,
    assert_close,
    assert_same_bits,
    clone,
    random_like,
    tree_map,
    trees,
)

BACKENDS = ["eager", "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")


def compiled(function, backend):
    """Compile to one graph: after the first call, compiling anything again is an error."""
    step = torch.compile(function, backend=backend, fullgraph=True)

    def once(*args):
        result = step(*args)
        torch.compiler.set_stance("fail_on_recompile")
        return result

    return once


def params():
    return {"b": torch.randn(3), "a": Point(torch.randn(4, 3), [torch.randn(())])}


@pytest.mark.by_day(1)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_serves_six_steps_with_a_changing_tensor_lr(backend):
    step = compiled(lambda opt, g, s, p: opt.update(g, s, p), backend)
    ours = theirs = params(), AdamW().init(params())
    for i in range(6):
        opt = AdamW(lr=torch.tensor(0.01 * (i + 1)))
        grads = random_like(ours[0])
        theirs = opt.update(grads, theirs[1], theirs[0])
        ours = step(opt, grads, ours[1], ours[0])
        assert_close(ours, theirs, rtol=2e-6)
        if i == 0:
            ours = theirs


@pytest.mark.by_day(1)
@pytest.mark.parametrize("field", ["lr", "weight_decay", "eps"])
def test_a_number_compiles_once_more_when_it_first_changes_and_then_never(field):
    graphs = CompileCounter()
    step = torch.compile(lambda opt, g, s, p: opt.update(g, s, p), backend=graphs, fullgraph=True)
    start = params()
    grads, counts = random_like(start), []
    for value in (0.1, 0.2, 0.0, 1.0, 0.3):
        opt = AdamW(**{field: value})
        state = opt.init(start)
        assert_close(step(opt, grads, state, start), opt.update(grads, state, start), rtol=2e-6)
        counts.append(graphs.frame_count)
    assert counts == [1, 2, 2, 2, 2]


VARIANTS = {
    "amsgrad and maximize": {"amsgrad": True, "maximize": True},
    "a count of each leaf": {"step_per_leaf": True},
    "a schedule": {"lr": lambda step: 0.1 / (1 + step)},
    "a kernel by name": {"kernel": "fused"},
}


@pytest.mark.by_day(2)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_one_graph_serves_every_variant(name, backend):
    opt = AdamW(**VARIANTS[name])
    step = compiled(opt.update, backend)
    weights = params()
    state = opt.init(weights)
    for _ in range(3):
        grads = random_like(weights)
        expected = opt.update(grads, state, weights)
        assert_close(step(grads, state, weights), expected, rtol=2e-6)
        weights, state = expected


@pytest.mark.by_day(3)
@pytest.mark.parametrize("name", trees())
def test_one_graph_serves_trees_of_every_kind(name):
    opt, weights = AdamW(lr=0.1), trees()[name]
    state = opt.init(weights)
    step = compiled(opt.update, "eager")
    for _ in range(3):
        grads = random_like(weights)
        if isinstance(weights, dict):  # paired by key
            grads = dict(reversed(grads.items()))
        expected = opt.update(grads, state, weights)
        assert_close(step(grads, state, weights), expected, rtol=2e-6)
        weights, state = expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_update_in_place_compiles_for_the_parameters_of_a_module(backend):
    opt = AdamW(lr=0.1)
    weights = {"w": nn.Parameter(torch.randn(3)), "s": nn.Parameter(torch.randn(()).double())}
    state = opt.init(weights)
    step = compiled(opt.update_, backend)
    theirs, their_state = tree_map(lambda p: p.detach().clone(), weights), clone(state)
    for _ in range(3):
        grads = tree_map(torch.ones_like, theirs)
        step(grads, state, weights)
        opt.update_(grads, their_state, theirs)
        assert_close((weights, state), (theirs, their_state), rtol=2e-6)


@pytest.mark.by_day(1)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_train_step_compiles_and_leaves_no_graph_behind(backend):
    model = nn.Linear(3, 2)
    inputs = torch.randn(5, 3)
    opt = AdamW(lr=0.1)

    def train(weights, state):
        slopes = grad(lambda w: functional_call(model, w, inputs).square().sum())(weights)
        return opt.update(slopes, state, weights)

    weights = dict(model.named_parameters())
    ours = theirs = weights, opt.init(weights)
    step = torch.compile(train, backend=backend, fullgraph=True)
    for _ in range(3):
        ours, theirs = step(*ours), train(*theirs)
        assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert all(p.grad_fn is None for p in ours[0].values())


@pytest.mark.by_day(2)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mapped_update_compiles(backend):
    opt = AdamW(lr=torch.rand(4), weight_decay=torch.rand(4))
    weights, grads = {"w": torch.randn(4, 3)}, {"w": torch.randn(4, 3)}
    state = vmap(AdamW().init)(weights)
    mapped = vmap(lambda o, g, s, p: o.update(g, s, p))
    step = compiled(mapped, backend)
    assert_close(step(opt, grads, state, weights), mapped(opt, grads, state, weights), rtol=2e-6)


def test_a_compiled_update_is_differentiated_by_autograd():
    opt = AdamW(lr=0.1)
    weights = torch.randn(3, dtype=torch.float64)
    slopes = torch.randn(3, dtype=torch.float64, requires_grad=True)
    state = opt.init(weights)
    step = torch.compile(opt.update, backend="aot_eager", fullgraph=True)
    ours, theirs = (
        torch.autograd.grad(update(slopes, state, weights)[0].square().sum(), slopes)[0]
        for update in (step, opt.update)
    )
    assert_close(ours, theirs, rtol=1e-12)


class Step(nn.Module):
    """An update as a module, which is what export takes."""

    def __init__(self, opt):
        super().__init__()
        self.opt = opt

    def forward(self, grads, state, params):
        return self.opt.update(grads, state, params)


@pytest.mark.parametrize("strict", [True, False])
def test_it_exports_and_the_count_goes_on_in_the_program(strict):
    opt, weights = AdamW(amsgrad=True), params()
    state, grads = opt.init(weights), random_like(weights)
    program = torch.export.export(Step(opt), (grads, state, weights), strict=strict).module()
    later = opt.update(grads, state, weights)[1]
    assert_close(program(grads, later, weights), opt.update(grads, later, weights))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("above_autograd", [False, True])
def test_make_fx_records_the_equations_and_no_constant_count(mode, above_autograd):
    opt, weights = AdamW(), params()
    state, grads = opt.init(weights), random_like(weights)
    trace = make_fx(Step(opt), tracing_mode=mode, pre_dispatch=above_autograd)
    graph = trace(grads, state, weights)
    later = opt.update(grads, state, weights)[1]
    assert_close(graph(grads, later, weights), opt.update(grads, later, weights))
    assert "fused" not in graph.code


TRACERS = {
    "export": lambda step, *args: torch.export.export(step, args, strict=False).module(),
    "make_fx": lambda step, *args: make_fx(step)(*args),
    "make_fx above autograd": lambda step, *args: make_fx(step, pre_dispatch=True)(*args),
}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("name", [*WRAPPED, "Zero1"])
def test_what_was_traced_goes_on_in_every_optimizer(name, tracer):
    opt = Zero1(AdamW(lr=0.1), mesh=None) if name == "Zero1" else WRAPPED[name]
    weights = {"w": torch.randn(4, 3), "v": torch.randn(3), "u": torch.randn(2)}
    state, grads = opt.init(weights), random_like(weights)
    program = TRACERS[tracer](Step(opt), grads, state, weights)
    for _ in range(3):
        expected = opt.update(grads, state, weights)
        assert_close(program(grads, state, weights), expected, rtol=2e-6)
        weights, state = expected


def test_make_fx_of_a_gradient_through_the_update():
    opt, weights = AdamW(), torch.randn(3)
    state = opt.init(weights)

    def slope(g):
        return grad(lambda g: opt.update(g, state, weights)[0].square().sum())(g)

    grads = torch.randn(3)
    assert_close(make_fx(slope)(grads)(grads), slope(grads), rtol=1e-5)


@pytest.mark.parametrize("method", ["update", "update_"])
def test_fake_tensors_pass_through_in_and_outside_their_mode(method):
    opt = AdamW(amsgrad=True)
    with FakeTensorMode():
        weights = params()
        state, grads = opt.init(weights), params()
        moved, after = getattr(opt, method)(grads, state, weights)
        mapped = vmap(lambda g: opt.update(g, opt.init(g), g)[0])(torch.ones(4, 2))
    assert isinstance(moved["b"], FakeTensor)
    assert isinstance(after.exp_avg["b"], FakeTensor)
    assert mapped.shape == (4, 2)
    moved, _ = getattr(opt, method)(grads, state, weights)
    assert moved["b"].shape == (3,)


@pytest.mark.parametrize("method", ["update", "update_"])
def test_meta_tensors_pass_through(method):
    weights = {"w": torch.ones(2, device="meta"), "v": torch.ones(2, device="meta")}
    opt = AdamW()
    moved, state = getattr(opt, method)(weights, opt.init(weights), weights)
    assert moved["w"].is_meta
    assert state.exp_avg["v"].is_meta


def test_dual_tensors_carry_their_tangents():
    opt, weights = AdamW(), torch.randn(3, dtype=torch.float64)
    state = opt.init(weights)
    slopes, direction = torch.randn(2, 3, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(slopes, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(opt.update(dual, state, weights)[0]).tangent
    expected = jvp(lambda g: opt.update(g, state, weights)[0], (slopes,), (direction,))[1]
    assert_close(tangent, expected)


def test_an_optimizer_passed_to_a_compiled_function_may_be_built_in_it():
    weights = torch.randn(3)
    state = AdamW().init(weights)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(lr, g, s, p):
        return AdamW(lr=lr).update(g, s, p)

    lr = torch.tensor(0.1)
    expected = AdamW(lr=lr).update(weights, state, weights)
    moved, after = step(lr, weights, state, weights)
    assert isinstance(after, AdamWState)
    assert_close((moved, after), expected)


def test_many_leaves_stay_out_of_the_graph_instead_of_compiling_for_hours(monkeypatch):
    monkeypatch.setattr(registration, "_MOST_TO_COMPILE", 3)
    opt = AdamW()
    params = {f"{i}": torch.randn(2) for i in range(4)}
    grads = random_like(params)
    state = opt.init(params)
    expected = opt.update(grads, state, params)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave the update outside"):
        torch.compile(opt.update, backend="aot_eager", fullgraph=True)(grads, state, params)

    @torch.compile(backend="aot_eager")
    def step(grads, state, params):
        doubled = {name: 2 * grad for name, grad in grads.items()}
        return opt.update({name: grad / 2 for name, grad in doubled.items()}, state, params)

    assert_same_bits(step(grads, state, params), expected)
    torch.compile(opt.update_, backend="aot_eager")(grads, state, params)
    assert_same_bits((params, state), expected)


def test_many_leaves_go_into_the_graph_where_it_cannot_break(monkeypatch):
    monkeypatch.setattr(registration, "_MOST_TO_COMPILE", 3)
    opt = AdamW(lr=0.1)
    params = {f"{i}": torch.randn(2) for i in range(4)}
    state = opt.init(params)

    def loss(grads):
        return sum(leaf.sum() for leaf in opt.update(grads, state, params)[0].values())

    grads = random_like(params)
    compiled = torch.compile(grad(loss), backend="aot_eager", fullgraph=True)(grads)
    assert_close(compiled, grad(loss)(grads))
    exported = torch.export.export(Step(opt), (grads, state, params)).module()
    assert_close(exported(grads, state, params), opt.update(grads, state, params))


def test_fake_tensors_of_symbolic_shape_are_served_outside_of_their_mode():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    params, grads = ({"a": mode.from_tensor(torch.randn(5, 4))} for _ in range(2))
    opt = AdamW()
    moved, _ = opt.update(grads, opt.init(params), params)
    assert isinstance(moved["a"], FakeTensor)
