"""Memory for results: allocated in few pieces, and used again only where nobody else holds it."""

import gc
import itertools
import threading
import weakref

import numpy as np
import pytest
import torch
from torch.func import grad, vmap

from funcopt import SGD, AdamW, memory
from funcopt._engine import memory as engine_memory
from funcopt._engine import results

from ..cases import assert_same_bits, clone

LARGE = (300, 200)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(engine_memory, "_recent", ())
    # So that small results are kept as large ones are.
    monkeypatch.setattr(results, "_WORTH_KEEPING", {})
    gc.collect()
    memory.release()
    yield
    memory.release()


def start(shapes=(LARGE, (64,), (64,), ())):
    torch.manual_seed(0)
    params = {f"p{index}": torch.randn(shape) for index, shape in enumerate(shapes)}
    opt = AdamW(lr=0.1)
    return opt, params, opt.init(params)


def grads_of(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(leaf.shape, generator=generator) for name, leaf in params.items()}


def addresses(params):
    return params["p0"].data_ptr()


def test_a_loop_writes_into_two_sets_of_results_in_turn():
    opt, params, state = start()
    seen = []
    for seed in range(8):
        params, state = opt.update(grads_of(params, seed), state, params)
        seen.append(addresses(params))
    assert len(set(seen)) == 2
    assert seen[:2] * 4 == seen
    kept = sum(leaf.nbytes for name, leaf in params.items() if name != "p3")  # of shape ()
    assert memory.kept_bytes() == 2 * 3 * kept


def test_numbers_are_those_of_memory_that_is_never_used_again():
    opt, params, state = start()
    again = params, state
    for seed in range(6):
        params, state = opt.update(grads_of(params, seed), state, params)
    memory.reuse("cpu", False)
    try:
        for seed in range(6):
            again = opt.update(grads_of(params, seed), again[1], again[0])
        assert memory.kept_bytes() == 0
    finally:
        memory.reuse("cpu", True)
    assert_same_bits((params, state), again)


# Ways to hold the values of a tensor without the tensor, each with a way to read them.
HOLDERS = {
    "itself": (lambda t: t, lambda h: h),
    "view": (lambda t: t[3:], None),
    "element": (lambda t: t[2, 1], None),
    "transposed": (lambda t: t.T, None),
    "detached": (lambda t: t.detach(), lambda h: h),
    "data": (lambda t: t.data, lambda h: h),
    "alias": (torch.ops.aten.alias, lambda h: h),
    "parameter": (torch.nn.Parameter, lambda h: h.detach()),
    "numpy": (lambda t: t.numpy(), torch.from_numpy),
    "numpy view": (lambda t: t.numpy()[5:, 1], None),
    "memoryview": (lambda t: memoryview(t.numpy()), np.asarray),
    "dlpack": (torch.utils.dlpack.to_dlpack, torch.utils.dlpack.from_dlpack),
    "numpy by dlpack": (np.from_dlpack, None),
    "storage": (lambda t: t.untyped_storage(), None),
    "typed storage": (lambda t: t._typed_storage(), None),
    "lazy clone": (torch._lazy_clone, lambda h: h),
    "graph": (lambda t: (t.view_as(t).requires_grad_() * t).sum().grad_fn, None),
    "closure": (lambda t: lambda: t, lambda h: h()),
    "set": (lambda t: torch.empty(0).set_(t), lambda h: h),
    "swapped in module": (lambda t: torch.nn.Linear(1, 1).register_buffer("b", t), None),
    "share_memory": (lambda t: t.share_memory_()[1:], None),
    "list of a split": (lambda t: t.split(7), torch.cat),
    "expanded": (lambda t: t[0].expand(9, -1), None),
}


def values(holder):
    if isinstance(holder, torch.UntypedStorage):
        return torch.empty(0).set_(holder).clone()
    if isinstance(holder, torch.storage.TypedStorage):
        return values(holder._untyped_storage)
    if isinstance(holder, (np.ndarray, memoryview)):
        return torch.from_numpy(np.array(holder))
    if isinstance(holder, torch.Tensor):
        return holder.detach().clone()
    if callable(getattr(holder, "_saved_self", None)) or hasattr(holder, "next_functions"):
        (node, _), *_ = holder.next_functions
        return node._saved_other.detach().clone()
    return None


@pytest.mark.parametrize("way", HOLDERS)
def test_what_anyone_holds_is_never_written(way):
    hold, read = HOLDERS[way]
    opt, params, state = start()
    for seed in range(4):
        params, state = opt.update(grads_of(params, seed), state, params)
    expected = params["p0"].clone()
    held = hold(params["p0"])
    once = way == "dlpack"  # which can be read once, at the end
    before = None if once else values(read(held) if read else held)
    for seed in range(6):
        params, state = opt.update(grads_of(params, seed), state, params)
    if once:
        assert_same_bits(read(held), expected)
    elif before is not None:
        assert_same_bits(values(read(held) if read else held), before)
    else:
        assert way == "swapped in module"


def test_what_another_thread_holds_is_never_written():
    opt, params, state = start()
    for seed in range(4):
        params, state = opt.update(grads_of(params, seed), state, params)
    expected, taken, go = params["p0"].clone(), threading.Event(), threading.Event()
    seen = []

    def hold(tensor):
        taken.set()
        go.wait(30)
        seen.append(tensor.clone())

    thread = threading.Thread(target=hold, args=(params["p0"],))
    thread.start()
    taken.wait(30)
    for seed in range(6):
        params, state = opt.update(grads_of(params, seed), state, params)
    go.set()
    thread.join(30)
    assert_same_bits(seen[0], expected)


def test_threads_that_train_trees_of_one_look_are_given_memory_of_their_own():
    opt, params, state = start()
    runs = {}

    def train(name):
        own = params, state
        for seed in range(40):
            own = opt.update(grads_of(params, seed + name), own[1], own[0])
        runs[name] = own

    threads = [threading.Thread(target=train, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name, own in runs.items():
        train(name)
        assert_same_bits(own, own)


def test_a_derivative_through_many_steps_keeps_what_it_needs():
    opt, params, state = start()

    def loss(scale):
        own, kept = params, state
        for seed in range(6):
            grads = {n: g * scale for n, g in grads_of(params, seed).items()}
            own, kept = opt.update(grads, kept, own)
        return own["p0"].square().sum()

    for _ in range(3):
        found = grad(loss)(torch.tensor(1.0, dtype=torch.float32))
    memory.reuse("cpu", False)
    try:
        expected = grad(loss)(torch.tensor(1.0, dtype=torch.float32))
    finally:
        memory.reuse("cpu", True)
    assert_same_bits(found, expected)


def test_members_of_a_vmap_are_held_by_what_holds_their_stack():
    opt, params, _ = start()
    stacked = {name: torch.stack([leaf, leaf + 1]) for name, leaf in params.items()}
    own, state = stacked, vmap(opt.init)(stacked)
    held = []
    for seed in range(6):
        own, state = vmap(opt.update)(grads_of(stacked, seed), state, own)
        held.append((own, clone(own)))
    for kept, before in held:
        assert_same_bits(kept, before)


def test_a_history_of_parameters_stays_as_it_was():
    opt, params, state = start()
    history = []
    for seed in range(6):
        params, state = opt.update(grads_of(params, seed), state, params)
        history.append((params, clone(params)))
    for own, before in history:
        assert_same_bits(own, before)


def test_results_of_inference_mode_are_its_own():
    opt, params, state = start()
    for seed in range(4):
        params, state = opt.update(grads_of(params, seed), state, params)
    with torch.inference_mode():
        params, _ = opt.update(grads_of(params, 9), state, params)
    assert params["p0"].is_inference()


def test_a_result_that_other_processes_see_is_never_written_again():
    opt, params, state = start()
    params, state = opt.update(grads_of(params, 0), state, params)
    place = params["p0"].share_memory_().data_ptr()
    for seed in range(5):
        params, state = opt.update(grads_of(params, seed), state, params)
        assert addresses(params) != place


def test_a_result_that_was_resized_is_not_used_again():
    opt, params, state = start()
    params, state = opt.update(grads_of(params, 0), state, params)
    params["p0"].untyped_storage().resize_(0)
    opt, params, state = start()
    for seed in range(4):
        params, state = opt.update(grads_of(params, seed), state, params)
        assert params["p0"].untyped_storage().nbytes() >= params["p0"].nbytes


def test_all_is_given_back_when_asked_and_what_is_held_stays():
    opt, params, state = start()
    for seed in range(4):
        params, state = opt.update(grads_of(params, seed), state, params)
    before = clone((params, state))
    memory.release()
    assert memory.kept_bytes() == 0
    assert_same_bits((params, state), before)
    reference = weakref.ref(params["p0"])
    del params, state
    assert reference() is None


def test_what_is_not_asked_for_in_a_while_is_given_back(monkeypatch):
    monkeypatch.setattr(results, "_PATIENCE", 4)
    opt, params, state = start()
    for seed in range(3):
        params, state = opt.update(grads_of(params, seed), state, params)
    other = {"w": torch.ones(1 << 18)}
    sgd = SGD(lr=0.1)
    other_state = sgd.init(other)
    for _ in range(20):
        other, other_state = sgd.update({"w": torch.ones(1 << 18)}, other_state, other)
    assert memory.kept_bytes() == 2 * other["w"].nbytes


def test_two_trees_that_take_turns_both_keep_their_memory():
    one, other = start(), start(((200, 300), (8,)))
    seen = set()
    for seed in range(100):
        for index, (opt, params, state) in enumerate((one, other)):
            moved = opt.update(grads_of(params, seed), state, params)
            seen.add((index, addresses(moved[0])))
            if index == 0:
                one = opt, *moved
            else:
                other = opt, *moved
    assert len(seen) == 4


def test_two_loops_on_trees_of_one_look_that_take_turns_use_theirs_again():
    loops, seen = [start(), start()], set()
    for seed in range(40):
        for index, (opt, params, state) in enumerate(loops):
            moved = opt.update(grads_of(params, seed), state, params)
            seen.add(addresses(moved[0]))
            loops[index] = opt, *moved
    assert len(seen) <= 4
    kept = sum(leaf.nbytes for name, leaf in loops[0][1].items() if name != "p3")  # of shape ()
    assert memory.kept_bytes() <= 4 * 3 * kept


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["plain", "recorded"])
def test_columns_share_a_storage_unless_a_derivative_would_keep_all_for_one(lr):
    params = {"a": torch.randn(5), "b": torch.randn(7)}
    opt = AdamW(lr=lr.requires_grad_() if isinstance(lr, torch.Tensor) else lr)
    new_params, state = opt.update(params, opt.init(params), params)
    storages = {
        tensor.untyped_storage().data_ptr()
        for tree in (new_params, state.exp_avg, state.exp_avg_sq)
        for tensor in tree.values()
    }
    assert len(storages) == (3 if isinstance(lr, torch.Tensor) else 1)


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 3)] * 3,
        [()] * 3,
        [(0,), (3, 0), (0, 3)],
        [(5,), (7, 2), (), (9,), (1, 2)],
        [(5,), (9,), (3,), (3, 5), (1, 7)],
        [(4096,)] * 600,
    ],
)
def test_results_look_like_what_they_are_of_and_share_no_element(shapes):
    params = [torch.randn(shape) for shape in shapes]
    made = results.Results(params, [params, params]).make()
    assert [[t.shape for t in column] for column in made.columns] == [[p.shape for p in params]] * 3
    found = [tensor for column in made.columns for tensor in column]
    places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in found if t.numel())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
    assert all(t.is_contiguous() and not t._is_view() and t.is_leaf for t in found)
    before = found[0]._version
    found[-1].add_(1)
    assert found[0]._version == before


def test_results_can_be_viewed_as_any_dtype():
    shapes = [(2,), (6,), (4,), (3, 4), (1, 4), (16,), (10,)]
    made = results.Results([torch.randn(shape) for shape in shapes], []).make()
    assert [tuple(t.shape) for t in made.params] == shapes
    assert all(t.data_ptr() % 16 == 0 for t in made.params)
    for tensor in made.params:
        assert tensor.view(torch.complex64).numel() * 2 == tensor.numel()


@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_one_result_is_one(size):
    made = results.Results([torch.randn(size)], []).make()
    assert [tuple(t.shape) for t in made.params] == [(size,)]


def test_dense_layouts_are_those_of_the_parameters():
    params = [torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.zeros(4, 3).T]
    made = results.Results(params, [params]).make()
    for column in made.columns:
        assert [t.stride() for t in column] == [p.stride() for p in params]


def test_a_storage_holds_no_more_than_its_bound():
    made = results.Results([torch.zeros(4096)] * 1000, []).make()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in made.params}
    assert max(sizes.values()) <= 1 << 21
    assert len(sizes) == 8


def test_a_device_type_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"device_type='gpu': must be \"cpu\" or \"cuda\"\."):
        memory.reuse("gpu", True)


def test_without_the_count_of_users_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(results, "_count_users", None)
    opt, params, state = start()
    for seed in range(4):
        params, state = opt.update(grads_of(params, seed), state, params)
    assert memory.kept_bytes() == 0


def test_results_that_are_quickly_allocated_are_not_kept(monkeypatch):
    monkeypatch.setattr(results, "_WORTH_KEEPING", {"cpu": 1 << 16})
    for shapes, nbytes in (((64, 64),), 0), (((128, 128),), 1 << 16):
        opt, params, state = start(shapes)
        for seed in range(4):
            params, state = opt.update(grads_of(params, seed), state, params)
        assert memory.kept_bytes() == 2 * 3 * nbytes


def test_where_results_start_is_known():
    params = [torch.randn(shape) for shape in [(5,), (7, 2), (), (9,), (2, 2), LARGE, (), (3,)]]
    made = results.Results(params, [params, params])
    for _ in range(4):
        outputs = made.make()
        found = [tensor.data_ptr() for column in outputs.columns for tensor in column]
        assert outputs.starts == found
