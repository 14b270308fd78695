"""Rounding to 16 bits by chance: what decides, that the mean is right, and who rounds alike."""

import pytest
import torch
from torch.func import grad, vmap

from funcopt import SGD, Adam, AdamW, Clip, Ema, Lion, Partition
from funcopt._engine.rounding import philox, random_bits, round_stochastically
from funcopt.distributed._checks import check_packable
from funcopt.interop import from_state_dict, to_state_dict, to_torch

from ..cases import assert_same_bits, clone, leaves, random_like, tree_map

DTYPES = [torch.bfloat16, torch.float16]
SHAPES = {"a": (700, 3), "b": (5,), "c": (), "d": (0, 2), "e": (513,), "f": (1, 512)}

# Counter, key and words, of the known answers that Random123 comes with.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def whole(number):
    return torch.tensor(number, dtype=torch.int64)


def key(number):
    return torch.tensor(number, dtype=torch.float64)


def params_in(dtype, generator=None):
    return {name: torch.randn(s, generator=generator).to(dtype) for name, s in SHAPES.items()}


def run(opt, params, steps=3, update="update", state=None, seed=1, first=0):
    generator = torch.Generator().manual_seed(seed)
    state = opt.init(params) if state is None else state
    for step in range(first + steps):
        grads = {
            k: torch.randn(p.shape, generator=generator).to(p.dtype) for k, p in params.items()
        }
        if step >= first:
            params, state = getattr(opt, update)(grads, state, params)
    return params, state


@pytest.mark.parametrize(("counter", "own", "words"), KNOWN)
def test_the_generator_gives_the_known_answers(counter, own, words):
    found = philox(tuple(map(whole, counter)), tuple(map(whole, own)))
    assert tuple(int(word) for word in found) == words


def test_bits_differ_between_keys_steps_leaves_columns_and_elements():
    def bits(key=1.0, step=1.0, leaf=0, column=0):
        return random_bits(key, step, leaf, column, torch.Size([4096]), torch.device("cpu"))

    first = bits()
    assert first.unique().numel() > 3800  # of 65536
    assert first.min() >= 0
    assert first.max() < 2**16
    for other in (bits(key=2.0), bits(key=2.0**33), bits(step=2.0), bits(step=2.0**33 + 1)):
        assert (first == other).sum() < 8
    for other in (bits(leaf=1), bits(column=1)):
        assert (first == other).sum() < 8


# What each of the 16 bits that are dropped can be, and some exponents: the smallest, others, and
# that of the largest numbers; each sign.
BASES = [0x00000000, 0x007F0000, 0x00800000, 0x3F800000, 0x3FFF0000, 0x42FE0000, 0x7F7E0000]


@pytest.mark.parametrize("sign", [0, -(2**31)])
@pytest.mark.parametrize("base", BASES)
def test_of_all_tails_as_many_random_numbers_round_up_as_the_mean_asks_for(base, sign):
    tails = torch.arange(2**16, dtype=torch.int32)
    values = ((base | tails) | sign).view(torch.float32)
    down = torch.full_like(tails, base | sign).view(torch.float32).to(torch.bfloat16)
    up = torch.full_like(tails, (base + 0x10000) | sign).view(torch.float32).to(torch.bfloat16)
    # Those below the first that rounds up do not, and those above do: tail of them in all.
    last_down = round_stochastically(values, (2**16 - 1 - tails).clamp(max=2**16 - 1), up.dtype)
    first_up = round_stochastically(values[1:], (2**16 - tails)[1:], up.dtype)
    assert_same_bits(last_down, down)
    assert_same_bits(first_up, up[1:])
    for tail in (0, 1, 5, 2**15, 2**16 - 1):
        every = round_stochastically(values[tail].expand(2**16), tails, up.dtype)
        assert (every == up[0]).sum() == tail
        assert (every == down[0]).sum() == 2**16 - tail


@pytest.mark.parametrize("base", [0x38800000, 0x3F800000, 0x477FC000])
def test_in_float16_the_mean_is_right_for_every_tail(base):
    tails = torch.arange(2**13, dtype=torch.int32)
    values, random = (base | tails).view(torch.float32), torch.arange(2**16, dtype=torch.int32)
    for tail in range(0, 2**13, 511):
        found = round_stochastically(values[tail].expand(2**16), random, torch.float16)
        assert found.double().mean() == values[tail].double()


def test_below_its_normal_numbers_float16_is_right_to_a_part_in_2_16_of_a_unit():
    random, unit = torch.arange(2**16, dtype=torch.int32), 2.0**-24
    for value in (0.0, 0.3 * unit, unit, 5.7 * unit, 1022.6 * unit, 1e-9 * unit):
        found = round_stochastically(torch.full((2**16,), value), random, torch.float16)
        assert abs(found.double().mean() - torch.tensor(value).double()) <= unit / 2**16


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_finite_stays_finite_and_nothing_else_becomes_so(dtype):
    largest = torch.finfo(dtype).max
    values = torch.tensor([largest * 1.00001, torch.finfo(torch.float32).max, -1e38, 0.0, -0.0])
    for random in (0, 2**16 - 1):
        bits = torch.full((5,), random, dtype=torch.int32)
        found = round_stochastically(values, bits, dtype)
        assert found.isfinite().all()
        assert torch.equal(found.signbit(), values.signbit())
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    found = round_stochastically(odd, torch.full((3,), 2**16 - 1, dtype=torch.int32), dtype)
    assert found.isinf().tolist() == [True, True, False]
    assert found.isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moments", ["auto", None])
@pytest.mark.parametrize("kind", [SGD, Lion, Adam, AdamW])
def test_the_kernels_round_alike(kind, moments, dtype):
    options = {"momentum": 0.9} if kind is SGD else {}
    own = {"lr": 0.05, "moments": moments, "rounding": "stochastic", "seed": 2**40 + 3, **options}
    params, results = params_in(dtype), []
    for kernel in ("native", "plain"):
        for update in ("update", "update_"):
            results.append(run(kind(kernel=kernel, **own), clone(params), update=update))
    for other in results[1:]:
        assert_same_bits(other, results[0])
    nearest = run(kind(kernel="plain", **{**own, "rounding": "nearest"}), params)[0]
    assert any(not torch.equal(results[0][0][name], nearest[name]) for name in params)


def test_a_count_and_a_key_beyond_32_bits_are_not_cut():
    params = params_in(torch.bfloat16)
    for kernel in ("native", "plain"):
        opt = SGD(lr=0.1, rounding="stochastic", kernel=kernel)
        state, found = opt.init(params), []
        for count, own in ((1.0, 7.0), (2.0**32 + 1, 7.0), (1.0, 2.0**32 + 7)):
            own_state = state._replace(step=key(count), key=key(own))
            found.append(run(opt, params, 1, state=own_state)[0]["a"])
        assert not torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("kernel", ["native", "plain", "auto"])
def test_nothing_depends_on_the_layout_nor_on_who_else_has_a_gradient(kernel):
    opt = AdamW(lr=0.1, rounding="stochastic", kernel=kernel)
    params = {"a": torch.randn(40, 30).bfloat16(), "b": torch.randn(600).bfloat16()}
    grads = random_like(params)
    expected, _ = opt.update(grads, opt.init(params), params)
    turned = {**params, "a": params["a"].T.contiguous().T}
    given = {**grads, "a": grads["a"].T.contiguous().T}
    assert_same_bits(opt.update(given, opt.init(turned), turned)[0], expected)
    alone, _ = opt.update({"a": None, "b": grads["b"]}, opt.init(params), params)
    assert_same_bits(alone["b"], expected["b"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bit_depends_on_the_number_of_threads(dtype):
    # Threads share a leaf within a block of 512 elements, the second time within a member of it.
    options = {"lr": 0.1, "moments": None, "rounding": "stochastic"}
    results, count = [], torch.get_num_threads()
    for shape in [(33000,), (3, 23001)]:
        params = {"w": torch.randn(shape).to(dtype)}
        grads = random_like(params)
        for kernel, threads in [("plain", 1), ("native", 1), ("native", 2), ("native", 3)]:
            opt = Lion(kernel=kernel, **options)

            def moved(own_grads, own_params, opt=opt):
                return opt.update(own_grads, opt.init(own_params), own_params)

            torch.set_num_threads(threads)
            try:
                results.append((vmap(moved) if len(shape) > 1 else moved)(grads, params))
            finally:
                torch.set_num_threads(count)
        for result in results[1:]:
            assert_same_bits(result, results[0])
        results.clear()


@pytest.mark.parametrize("shared", [True, False])
def test_each_member_of_a_vmap_is_rounded_as_it_would_be_alone(shared):
    params = {name: torch.randn(3, *shape).bfloat16() for name, shape in SHAPES.items()}
    grads = random_like(params)
    seed = 5.0 if shared else key([5.0, 6.0, 2.0**33])
    stacked = AdamW(lr=0.1, rounding="stochastic", seed=seed)
    axis = None if shared else 0
    state = vmap(lambda o, p: o.init(p), in_dims=(axis, 0))(stacked, params)
    step = vmap(lambda o, g, s, p: o.update(g, s, p), in_dims=(axis, 0, 0, 0))
    moved, state = step(stacked, grads, state, params)
    moved, state = step(stacked, grads, state, moved)
    for i in range(3):
        own = AdamW(lr=0.1, rounding="stochastic", seed=seed if shared else seed[i].item())
        single, own_grads = (tree_map(lambda leaf, i=i: leaf[i], tree) for tree in (params, grads))
        alone, own_state = own.update(own_grads, own.init(single), single)
        alone, own_state = own.update(own_grads, own_state, alone)
        assert_same_bits(tree_map(lambda leaf, i=i: leaf[i], moved), alone)


def test_derivatives_pass_as_through_rounding_to_the_nearest():
    def loss(rounding):
        def of(lr, param):
            opt = AdamW(lr=lr, rounding=rounding, moments=None)
            param, _ = opt.update(torch.ones_like(param), opt.init(param), param)
            return param.float().sum()

        return grad(of, argnums=(0, 1))(key(0.1), torch.randn(600).bfloat16())

    torch.manual_seed(0)
    nearest = loss("nearest")
    torch.manual_seed(0)
    assert_same_bits(loss("stochastic"), nearest)


def test_a_compiled_step_rounds_alike():
    opt = SGD(lr=0.1, rounding="stochastic")
    params = params_in(torch.bfloat16)
    grads = random_like(params)
    expected = opt.update(grads, opt.init(params), params)
    step = torch.compile(opt.update, backend="eager", fullgraph=True)
    assert_same_bits(step(grads, opt.init(params), params), expected)


@pytest.mark.parametrize("wrap", [lambda opt: opt, lambda opt: Ema(Clip(opt, 1.0), 0.9)])
def test_a_run_goes_on_from_a_checkpoint_with_the_same_bits(wrap):
    opt = wrap(AdamW(lr=0.1, rounding="stochastic", seed=11))
    params = params_in(torch.bfloat16)
    expected = run(opt, params, 4)
    params, state = run(opt, params, 2)
    template = tree_map(torch.zeros_like, opt.init(params))
    again = from_state_dict(template, to_state_dict(state))
    assert_same_bits(run(opt, params, 2, state=again, first=2), expected)


def test_a_step_below_half_a_unit_adds_up():
    params = {"w": torch.ones(20000, dtype=torch.bfloat16)}
    opt, grads = SGD(lr=1e-4, rounding="stochastic"), {"w": torch.ones(20000).bfloat16()}
    state = opt.init(params)
    for _ in range(100):
        params, state = opt.update(grads, state, params)
    assert params["w"].float().mean().item() == pytest.approx(0.99, abs=5e-4)
    still, _ = SGD(lr=1e-4).update(grads, SGD().init(grads), {"w": torch.ones_like(grads["w"])})
    assert still["w"].eq(1).all()


def test_float32_leaves_are_rounded_as_ever():
    params = {"w": torch.randn(700)}
    nearest, _ = run(AdamW(), params)
    by_chance, state = run(AdamW(rounding="stochastic"), params)
    assert_same_bits(by_chance, nearest)
    assert state.key.item() == 0.0


def test_results_share_no_memory_with_what_was_given():
    opt = AdamW(rounding="stochastic")
    params = params_in(torch.bfloat16)
    state = opt.init(params)
    before = clone(state)
    _, after = opt.update(params, state, params)
    assert after.key is not state.key
    assert_same_bits(state, before)
    assert len(leaves(after)) == len(leaves(state))


def test_what_cannot_be_is_refused():
    params = {"w": torch.ones(3, dtype=torch.bfloat16)}
    opt = AdamW(rounding="stochastic")
    with pytest.raises(ValueError, match="rounding='up': must be one of nearest, stochastic"):
        AdamW(rounding="up")
    with pytest.raises(ValueError, match=r"seed=0.5: seed must be a whole number"):
        AdamW(seed=0.5)
    with pytest.raises(ValueError, match=r"state.key is empty, but .*rounding='stochastic'"):
        opt.update(params, AdamW().init(params), params)
    with pytest.raises(ValueError, match=r"state.key is there, but .*rounding='nearest'"):
        AdamW().update(params, opt.init(params), params)
    foreach = AdamW(rounding="stochastic", kernel="foreach")
    with pytest.raises(ValueError, match="it rounds to the nearest number"):
        foreach.update(params, opt.init(params), params)
    with pytest.raises(ValueError, match=r"torch\.optim rounds to the nearest number alone"):
        to_torch(opt, opt.init(params), params)
    with pytest.raises(ValueError, match="by the place of an element in its leaf"):
        check_packable(Clip(opt, 1.0))


def test_groups_of_a_partition_have_keys_of_their_own():
    params = params_in(torch.bfloat16)
    inner = {"x": AdamW(rounding="stochastic", seed=1), "y": AdamW(rounding="stochastic", seed=2)}
    opt = Partition(inner, {name: "x" if name < "c" else "y" for name in params})
    _, state = run(opt, params)
    assert [state.inner[label].key.item() for label in "xy"] == [1.0, 2.0]
