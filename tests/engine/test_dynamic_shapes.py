"""Every optimizer traced once for leaves of any size."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

from funcopt.distributed import LocalUpdates, Zero1

from ..cases import assert_close, clone, leaves, tree_map
from ..every_optimizer import OPTIMIZERS

# Those that can be traced whole: the others leave the graph, since they may have to send something.
# Two that differ in the kernel alone are the same to a tracer.
TRACED = {
    name: opt
    for name, opt in OPTIMIZERS.items()
    if not isinstance(opt, (Zero1, LocalUpdates)) and getattr(opt, "kernel", "auto") == "auto"
}
# To compile takes seconds, so that is done once for each class, and not for its options.
COMPILED = [name for name in TRACED if "," not in name]
SIZES = (5, 7, 9)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")


def inputs(opt, size):
    params = {"w": torch.full((size, 3), 0.5), "b": torch.arange(size) * 0.1}
    grads = tree_map(lambda leaf: leaf * 0.3, params)
    return grads, opt.init(params), params


class Step(torch.nn.Module):
    def __init__(self, opt):
        super().__init__()
        self.opt = opt

    def forward(self, grads, state, params):
        return self.opt.update(grads, state, params)


@pytest.mark.by_day(3)
@pytest.mark.parametrize("name", COMPILED)
def test_one_graph_serves_leaves_of_every_size(name):
    opt = TRACED[name]
    step = torch.compile(opt.update, backend="eager", fullgraph=True, dynamic=True)
    for size in SIZES:
        grads, state, params = inputs(opt, size)
        assert_close(step(grads, state, params), opt.update(grads, state, params))
        torch.compiler.set_stance("fail_on_recompile")


@pytest.mark.parametrize("name", ["AdamW", "ClipValue", "Partition"])
def test_one_graph_serves_leaves_of_every_size_in_place(name):
    opt = TRACED[name]
    step = torch.compile(opt.update_, backend="eager", fullgraph=True, dynamic=True)
    for size in SIZES:
        grads, state, params = inputs(opt, size)
        wanted = opt.update(grads, state, params)
        state, params = clone((state, params))
        step(grads, state, params)
        assert_close((params, state), wanted)
        torch.compiler.set_stance("fail_on_recompile")


@pytest.mark.parametrize("marked", [False, True])
def test_a_second_size_makes_one_more_graph_and_a_size_that_is_marked_none(marked):
    opt = TRACED["ClipValue"]
    graphs = CompileCounter()
    step = torch.compile(opt.update, backend=graphs, fullgraph=True)
    for size in SIZES:
        args = inputs(opt, size)
        for leaf in leaves(args) if marked else ():
            if leaf.ndim > 0:
                torch._dynamo.mark_dynamic(leaf, 0)
        assert_close(step(*args), opt.update(*args))
    assert graphs.frame_count == (1 if marked else 2)


@pytest.mark.parametrize("name", TRACED)
def test_make_fx_traces_symbolic_sizes(name):
    opt = TRACED[name]
    args = inputs(opt, SIZES[0])

    def update(grads, state, params):
        return opt.update(grads, state, params)

    graph = make_fx(update, tracing_mode="symbolic")(*args)
    for size in SIZES:
        args = inputs(opt, size)
        assert_close(graph(*args), opt.update(*args))


@pytest.mark.by_day(4)
@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in TRACED), ("AdamW", True), ("ClipValue", True)]
)
def test_an_export_serves_every_size(name, strict):
    opt = TRACED[name]
    args = inputs(opt, SIZES[0])
    size = torch.export.Dim("size", min=2, max=100_000)
    dims = tree_map(lambda leaf: {0: size} if leaf.ndim > 0 else {}, args)
    if name == "Accumulate":  # in which one tensor has an element for each leaf
        dims[1].given.clear()
    graph = torch.export.export(Step(opt), args, dynamic_shapes=dims, strict=strict).module()
    for size in (*SIZES, 40_000):
        args = inputs(opt, size)
        assert_close(graph(*args), opt.update(*args))
