"""Muon: torch's bits, its map by hand, stacked leaves, derivatives, and what it refuses."""

import dataclasses
import math

import pytest
import torch
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

from funcopt import SGD, AdamW, Muon, MuonState, Partition, decay_label, muon_label
from funcopt.testing import check_optimizer, laws

from ..cases import assert_close, assert_same_bits, clone, random_like, tree_map
from .common import number, run, same_memory

KERNELS = ("auto", "batched", "plain")
# Tall and wide ones, and some of one shape, which are stacked if they are large enough.
SHAPES = [(3, 4), (4, 3), (3, 4), (1, 5), (5, 1), (1, 1), (40, 70), (40, 70), (70, 40)]
OPTIONS = [
    {},
    {"nesterov": False, "momentum": 0.5},
    {"adjust_lr_fn": "match_rms_adamw", "lr": 0.1, "weight_decay": 0.0},
    {"adjust_lr_fn": "original", "ns_steps": 2, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 0.1},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_are_torchs_over_100_steps(options, kernel, dtype):
    params = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    theirs = [torch.nn.Parameter(param.clone()) for param in params]
    torchs, opt = torch.optim.Muon(theirs, **options), Muon(kernel=kernel, **options)
    pure, state = params, opt.init(params)
    in_place, state_in_place = clone(params), opt.init(params)
    for _ in range(100):
        grads = random_like(params)
        for param, own in zip(theirs, grads, strict=True):
            param.grad = own.clone()
        torchs.step()
        pure, state = opt.update(grads, state, pure)
        opt.update_(grads, state_in_place, in_place)
    for one, other, their in zip(pure, in_place, theirs, strict=True):
        assert same_memory(one, their.detach())
        assert same_memory(other, their.detach())
    for own, their in zip(state.momentum_buffer, theirs, strict=True):
        assert same_memory(own, torchs.state[their]["momentum_buffer"])
    assert_same_bits(state, state_in_place)


@pytest.mark.parametrize("shape", [(256, 256), (512, 512), (513, 1500), (1500, 513), (700, 700)])
def test_half_of_a_symmetric_product_gives_the_bits_of_the_whole(shape):
    params, opt = [torch.randn(shape)], Muon(lr=0.1)
    gradients = [random_like(params) for _ in range(2)]
    plain = Muon(lr=0.1, kernel="plain")
    assert_same_bits(run(opt, params, gradients), run(plain, params, gradients))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_the_step_is_the_polynomial_of_each_singular_value(shape, kernel):
    """By the singular value decomposition, in float64."""
    param, first = torch.randn(2, *shape, dtype=torch.float64).unbind()
    a, b, c = 3.0, -4.0, 2.0
    opt = Muon(
        0.1, 0.2, 0.75, nesterov=False, ns_coefficients=(a, b, c), ns_steps=3, ns_dtype=None,
        kernel=kernel,
    )  # fmt: skip
    moved, state = opt.update(first, opt.init(param), param)
    assert_close(state.momentum_buffer, 0.25 * first)
    left, values, right = torch.linalg.svd(first, full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(3):
        values = a * values + b * values**3 + c * values**5
    ratio = math.sqrt(max(1, shape[0] / shape[1]))
    expected = param * (1 - 0.1 * 0.2) - 0.1 * ratio * left @ torch.diag(values) @ right
    assert_close(moved, expected, rtol=1e-10, atol=1e-12)


def test_a_step_has_singular_values_near_one():
    params = torch.zeros(30, 50)
    moved, _ = Muon(lr=1.0).update(torch.randn(30, 50), Muon().init(params), params)
    values = torch.linalg.svdvals(moved)
    assert values.min() > 0.5
    assert values.max() < 1.3


def directions(param, opt):
    """What the first step of a matrix is, of a learning rate of 1."""
    moved, _ = opt.update(param, opt.init(param), torch.zeros_like(param))
    return moved.double()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(30, 60), (60, 30), (40, 60), (260, 1100), (2, 30, 60)])
def test_by_the_gram_matrix_it_is_the_same_but_for_rounding(shape, kernel):
    """In bfloat16 about as near to float64 as by torch's order: singular values from 1 to 1e-4."""
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    param = left * torch.logspace(0, -4, min(shape[-2:])) @ right
    options = {"lr": 1.0, "matrices": "stack", "weight_decay": 0.0}
    exact = directions(param.double(), Muon(**options, ns_dtype=None))
    single = directions(param, Muon(**options, ns_dtype=None, gram=True, kernel=kernel))
    assert_close(single, exact, rtol=0, atol=1e-4)
    ours = directions(param, Muon(**options, gram=True, kernel=kernel))
    theirs = directions(param, Muon(**options))
    assert not torch.equal(ours, theirs)
    assert (ours - exact).norm() < 1.3 * (theirs - exact).norm()


def test_by_the_gram_matrix_matrices_that_are_almost_square_are_iterated_as_without():
    params = [torch.randn(6, 8), torch.randn(8, 6), torch.randn(300, 400)]
    options, gradients = {"lr": 1.0, "weight_decay": 0.0}, [random_like(params)]
    plain = Muon(**options, gram=True, kernel="plain")
    theirs, _ = run(Muon(**options), params, gradients)
    assert_same_bits(run(plain, params, gradients)[0], theirs)
    ours, _ = run(Muon(**options, gram=True), params, gradients)
    exact, _ = run(Muon(**options, ns_dtype=torch.float64), params, gradients)
    for own, their, right in zip(ours, theirs, exact, strict=True):
        assert (own - right).norm() < 1.1 * (their - right).norm()


@pytest.mark.parametrize("ns_steps", [1, 2, 3, 4, 6])
def test_by_the_gram_matrix_any_number_of_iterations_is_the_same(ns_steps):
    param, options = torch.randn(4, 9, dtype=torch.float64), {"ns_dtype": None, "lr": 1.0}
    ours = directions(param, Muon(**options, ns_steps=ns_steps, gram=True))
    assert_close(ours, directions(param, Muon(**options, ns_steps=ns_steps)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_leaf_of_more_dimensions_is_one_matrix_or_a_stack_of_them(kernel):
    param, gradient = torch.randn(2, 6, 2, 3, 5).unbind()
    one = Muon(lr=0.1, kernel=kernel)
    [moved], state = run(one, [param], [[gradient]] * 2)
    [flat], _ = run(one, [param.view(6, 30)], [[gradient.view(6, 30)]] * 2)
    assert_same_bits(moved, flat.view_as(param))
    assert state.momentum_buffer[0].shape == param.shape
    stack = Muon(lr=0.1, kernel=kernel, matrices="stack")
    [moved], _ = run(stack, [param], [[gradient]] * 2)
    for index in ((0, 0), (3, 1), (5, 0)):
        [own], _ = run(one, [param[index]], [[gradient[index]]] * 2)
        assert_close(moved[index], own, rtol=0, atol=0.1 * 2 * 2**-7)


@pytest.mark.parametrize("matrices", ["flatten", "stack"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_empty_leaves_and_zero_gradients_make_no_nan(kernel, matrices):
    params = [torch.ones(0, 3), torch.ones(3, 0), torch.ones(0, 2, 2), torch.ones(2, 3)]
    opt = Muon(lr=0.5, weight_decay=0.5, kernel=kernel, matrices=matrices)
    moved, _ = run(opt, params, [tree_map(torch.zeros_like, params)])
    assert_same_bits(moved[3], torch.full((2, 3), 0.75))
    assert [leaf.shape for leaf in moved] == [leaf.shape for leaf in params]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_leaves_are_computed_in_float32(dtype, kernel):
    params = [torch.randn(4, 6).to(dtype)]
    gradients = [random_like(params) for _ in range(3)]
    for nesterov in (False, True):
        opt = Muon(lr=0.1, kernel=kernel, nesterov=nesterov)
        wide, wide_state = opt.init([params[0].float()]), None
        state, param = opt.init(params), params
        for grads in gradients:
            given = [leaf.float() for leaf in param]
            wide_param, wide_state = opt.update([leaf.float() for leaf in grads], wide, given)
            param, state = opt.update(grads, state, param)
            assert_same_bits(param[0], wide_param[0].to(dtype))
            assert_same_bits(state.momentum_buffer, wide_state.momentum_buffer)
            wide = wide_state


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_leaf_without_a_gradient_is_left_alone(kernel):
    params = [torch.ones(2, 2), torch.ones(2, 2)]
    opt = Muon(lr=0.1, weight_decay=0.5, kernel=kernel)
    moved, state = run(opt, params, [[torch.ones(2, 2), None]] * 2)
    assert torch.equal(moved[1], params[1])
    assert not state.momentum_buffer[1].any()
    assert not torch.equal(moved[0], params[0])
    assert state.step == 2


def test_tensors_schedules_and_trees_give_the_bits_of_the_numbers():
    params = [torch.randn(3, 4), torch.randn(40, 70)]
    gradients = [random_like(params) for _ in range(5)]
    expected = run(Muon(0.1, 0.2, 0.5, eps=1e-3), params, gradients)
    tensors = Muon(number(0.1), number(0.2), number(0.5), eps=number(1e-3))
    schedules = Muon(lambda step: 0.1, lambda step: 0.2, lambda step: 0.5, eps=lambda step: 1e-3)
    trees = Muon([0.1, 0.1], [0.2, number(0.2)], 0.5, eps=1e-3)
    for opt in (tensors, schedules, trees):
        assert_same_bits(run(opt, params, gradients), expected)


def test_weight_decay_has_a_schedule_of_its_own():
    params = [torch.full((2, 3), 8.0)]
    zeros = [tree_map(torch.zeros_like, params)] * 3
    moved, _ = run(Muon(lr=0.5, weight_decay=lambda step: step / 2), params, zeros)
    assert_same_bits(moved[0], torch.full((2, 3), 8.0 * 0.75 * 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_momentum_may_be_kept_in_16_bits(dtype):
    params = [torch.randn(3, 4)]
    _, state = run(Muon(lr=0.1, moments=dtype), params, [random_like(params)] * 2)
    assert state.momentum_buffer[0].dtype is dtype


@pytest.mark.parametrize(
    "opt",
    [
        Muon(lr=0.1, ns_dtype=None),
        Muon(lr=number([0.1, 0.2, 0.3]), momentum=number([0.0, 0.5, 0.9]), ns_dtype=None),
        Muon(ns_coefficients=(number([3.0, 2.0, 1.5]), -4.0, 2.0), ns_dtype=None),
    ],
    ids=["shared", "lr and momentum", "a coefficient"],
)
def test_a_vmap_is_a_loop(opt):
    params = {"w": torch.randn(3, 4, 5), "v": torch.randn(3, 6, 2, 2)}
    held = []
    tree_map(held.append, opt)
    axis = 0 if held else None
    state = vmap(lambda o, p: o.init(p), in_dims=(axis, 0))(opt, params)
    step = vmap(lambda o, g, s, p: o.update(g, s, p), in_dims=(axis, 0, 0, 0))
    gradients = [random_like(params) for _ in range(4)]
    start = params
    for grads in gradients:
        params, state = step(opt, grads, state, params)
    for i in range(3):
        member = lambda leaf, i=i: leaf[i]  # noqa: E731
        own = tree_map(member, opt)
        single = run(own, tree_map(member, start), [tree_map(member, g) for g in gradients])
        assert_close(tree_map(member, (params, state)), single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gram", [False, True])
def test_derivatives_go_through_the_iterations(gram):
    options = {"ns_steps": 2, "ns_dtype": None, "gram": gram}
    params, grads = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 2, 3).double()
    weights = torch.randn(2, 3, dtype=torch.float64)

    def loss(numbers, param, first, second):
        lr, decay, momentum, a, eps = numbers.unbind()
        opt = Muon(lr, decay, momentum, ns_coefficients=(a, -2.0, 0.5), eps=eps, **options)
        moved, state = run(opt, param, [first, second])
        return (weights * moved).sum() + state.momentum_buffer.square().sum()

    given = number([0.1, 0.2, 0.6, 2.0, 1e-3]), params, *grads.unbind()
    given = [tensor.requires_grad_() for tensor in map(torch.clone, given)]
    assert torch.autograd.gradcheck(loss, given)
    assert torch.autograd.gradgradcheck(loss, given)
    plain = [tensor.detach() for tensor in given]
    by_func = grad(loss, argnums=(0, 1, 2, 3))(*plain)
    assert_close(by_func, torch.autograd.grad(loss(*given), given), rtol=1e-10)
    direction = torch.randn(2, 3, dtype=torch.float64)
    by_jvp = jvp(lambda g: loss(plain[0], plain[1], g, plain[3]), (plain[2],), (direction,))[1]
    assert_close(by_jvp, (by_func[2] * direction).sum(), rtol=1e-10)


def test_at_a_gradient_of_zero_derivatives_are_finite():
    param = torch.ones(2, 3)
    found = grad(lambda g: run(Muon(ns_dtype=None), param, [g])[0].sum())(torch.zeros(2, 3))
    assert found.isfinite().all()


def test_compiled_it_is_as_it_was():
    params = {"w": torch.randn(4, 6), "v": torch.randn(6, 4)}
    opt, grads = Muon(lr=0.1), random_like(params)
    state = opt.init(params)
    compiled = torch.compile(opt.update, backend="aot_eager", fullgraph=True)
    assert_close(compiled(grads, state, params), opt.update(grads, state, params), atol=0.1 * 2**-7)


@st.composite
def matrices(draw):
    """A tree of matrices."""
    sizes = st.tuples(st.integers(1, 4), st.integers(1, 4))
    shapes = draw(st.lists(st.one_of(sizes, st.just((2, 3, 2))), min_size=1, max_size=3))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    made = [torch.randn(shape, generator=source) for shape in shapes]
    return {f"w{index}": leaf for index, leaf in enumerate(made)}


@pytest.mark.parametrize(
    "opt",
    [Muon(lr=0.1, ns_dtype=None), Muon(lr=0.1, ns_dtype=None, matrices="stack", nesterov=False)],
    ids=["flatten", "stack"],
)
def test_every_law_holds_or_does_not_apply(opt):
    # These make vectors of their own, which are refused.
    spared = ("bad_trees_raise", "moments_follow_gradients", "moments_have_room")
    chosen = [law for law in laws.LAWS if law.__name__ not in spared]
    report = check_optimizer(opt, laws=chosen, params=matrices(), max_examples=8)
    assert report.ok, str(report)


def test_the_norm_has_the_same_bits_whether_or_not_autograd_could_follow():
    opt = Muon(lr=0.1, ns_dtype=None, matrices="stack", nesterov=False)
    for _ in range(20):
        params, grads = {"w": torch.randn(2, 3, 2)}, {"w": torch.randn(2, 3, 2)}
        expected = opt.update(grads, opt.init(params), params)
        with torch.no_grad():
            assert_same_bits(opt.update(grads, opt.init(params), params), expected)
        state = opt.init(params)  # which no step has seen yet, so that all is checked
        opt.update_(grads, state, params)
        assert_same_bits((params, state), expected)


@pytest.mark.parametrize("method", ["update", "update_"])
def test_complex_leaves_are_refused_where_another_optimizer_has_known_such_by_their_looks(method):
    params = {"w": torch.randn(3, 5, dtype=torch.complex64)}
    other, grads = SGD(lr=0.1, momentum=0.9), random_like(params)
    state = other.init(params)
    for _ in range(3):
        getattr(other, method)(grads, state, params)
    own = MuonState(state.step, state.momentum_buffer)
    with pytest.raises(TypeError, match=r"params\['w'\] has dtype .*: Muon moves real"):
        getattr(Muon(), method)(grads, own, params)


def test_leaves_that_are_no_matrices_are_refused_with_path_and_remedy():
    opt = Muon()
    message = r"params\['b'\] has shape \(3,\): Muon moves matrices.*Partition.*labels=muon_label"
    params = {"w": torch.ones(2, 3), "b": torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        opt.init(params)
    state = opt.init({"w": torch.ones(2, 3), "b": torch.ones(3, 1)})
    for update in (opt.update, opt.update_):
        with pytest.raises(ValueError, match=message):
            update(params, state, params)
    with pytest.raises(ValueError, match=r"params has shape \(\)"):
        opt.init(torch.tensor(1.0))
    stacked = {"b": torch.ones(4, 3)}  # members with a vector each
    with pytest.raises(ValueError, match=r"params\['b'\] has shape \(3,\)"):
        vmap(opt.update)(stacked, vmap(Muon().init)({"b": torch.ones(4, 3, 1)}), stacked)
    with pytest.raises(TypeError, match=r"params\[0\] has dtype .*: Muon moves real"):
        opt.init([torch.ones(2, 2, dtype=torch.complex64)])


REFUSED = [
    ({"momentum": 1.0}, ValueError, "momentum=1.0: momentum must be at least 0 and below 1"),
    ({"lr": -1.0}, ValueError, "lr=-1.0: lr must be finite and at least 0"),
    ({"eps": 0.0}, ValueError, "eps=0.0: eps must be finite and above 0"),
    ({"ns_coefficients": (1.0, 2.0)}, TypeError, r"ns_coefficients=.*must be 3 numbers"),
    ({"ns_coefficients": (1.0, 2.0, math.inf)}, ValueError, r"ns_coefficients\[2\]=inf"),
    ({"ns_steps": 0}, ValueError, "ns_steps=0: must be at least 1 and at most 99"),
    ({"ns_steps": 100}, ValueError, "ns_steps=100"),
    ({"ns_steps": 5.0}, TypeError, "ns_steps=5.0: must be a whole number"),
    ({"adjust_lr_fn": "none"}, ValueError, "adjust_lr_fn='none': must be one of original, match"),
    ({"matrices": "rows"}, ValueError, "matrices='rows': must be one of flatten, stack"),
    ({"ns_dtype": torch.int32}, ValueError, "ns_dtype=torch.int32: must be one of None"),
    ({"kernel": "native"}, ValueError, "must be one of auto, batched, plain"),
]


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED, ids=[str(r[0]) for r in REFUSED])
def test_bad_options_are_refused_with_their_value(options, kind, message):
    with pytest.raises(kind, match=message):
        Muon(**options)


def test_the_rest_of_a_network_goes_to_another_optimizer_by_labels():
    params = {"wte.weight": torch.randn(7, 4), "h.w": torch.randn(4, 4), "h.b": torch.zeros(4)}
    muon, adamw = Muon(lr=0.1), AdamW(lr=0.1)
    opt = Partition({"muon": muon, "adamw": adamw}, muon_label)
    grads = random_like(params)
    moved, _ = run(opt, params, [grads])
    [own], _ = run(muon, [params["h.w"]], [[grads["h.w"]]])
    rest = {name: params[name] for name in ("wte.weight", "h.b")}
    others, _ = run(adamw, rest, [{name: grads[name] for name in rest}])
    for name, leaf in {"h.w": own, **others}.items():
        assert_same_bits(moved[name], leaf)


def test_muon_label_goes_by_dimensions_and_names():
    matrix = torch.zeros(2, 2)
    to_muon = ("h.0.attn.weight", "fc.weight", "heading.w", "multihead.w", "subhead.w", "member.w")
    assert {muon_label(name, matrix) for name in to_muon} == {"muon"}
    heads = ["lm_head.weight", "head.0.weight", "heads.head.weight", "classifier.2.weight"]
    heads += ["unembed.weight", "Head.weight", "output_head.weight", "unembedding.kernel"]
    embeddings = ("embed_tokens.weight", "wte.weight", "wpe.weight", "tok_emb.weight")
    assert {muon_label(name, matrix) for name in (*heads, *embeddings)} == {"adamw"}
    assert all(decay_label(name, matrix) == "no_decay" for name in embeddings)
    assert muon_label("h.0.attn.bias", torch.zeros(2)) == "adamw"
    assert muon_label("conv.weight", torch.zeros(2, 2, 3, 3)) == "muon"
    assert muon_label.possible_labels == ("muon", "adamw")


@pytest.mark.parametrize("kernel", ["batched", "plain"])
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1.0, 1e6])
def test_iterations_in_float16_are_as_near_for_small_and_large_gradients(kernel, size):
    params = {"w": torch.zeros(3, 4), "v": torch.zeros(6, 2)}
    grads = {name: torch.randn_like(leaf) * size for name, leaf in params.items()}
    opt = Muon(lr=1.0, weight_decay=0.0, eps=1e-12, ns_dtype=torch.float32, kernel=kernel)
    expected, _ = opt.update(grads, opt.init(params), params)
    narrow = dataclasses.replace(opt, eps=1e-7, ns_dtype=torch.float16)
    for method in (narrow.update, narrow.update_):
        found, _ = method(grads, narrow.init(params), clone(params))
        for name, leaf in expected.items():
            assert (found[name] - leaf).norm() < 1e-2 * leaf.norm()
