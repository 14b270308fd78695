"""What is remembered of leaves: no more than how they look, and only while they look the same."""

import gc
import weakref

import pytest
import torch

from funcopt import AdamW
from funcopt._engine import memory
from funcopt._engine.memory import known, layout_of
from funcopt._engine.rule import StepInputs

from ..cases import assert_same_bits, clone


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(memory, "_recent", ())


def leaves_of(make=torch.randn, count=3) -> StepInputs:
    return StepInputs.of([make(4, 3) for _ in range(count)] for _ in range(4))


# What is different about one tensor, in whatever column.
DIFFERENCES = {
    "shape": lambda: torch.randn(3, 4),
    "strides": lambda: torch.randn(3, 4).T,
    "dtype": lambda: torch.randn(4, 3, dtype=torch.float64),
    "device": lambda: torch.randn(4, 3, device="meta"),
    "requires_grad": lambda: torch.randn(4, 3, requires_grad=True),
    "type": lambda: torch.nn.Parameter(torch.randn(4, 3), requires_grad=False),
    "laziness": lambda: torch._neg_view(torch.randn(4, 3)),
    "sparsity": lambda: torch.randn(4, 3).to_sparse(),
    "no tensor": lambda: None,
}


@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize("recording", [True, False])
def test_leaves_that_look_different_are_not_known(difference, column, recording):
    with torch.set_grad_enabled(recording):
        layout_of(leaves_of())
        other = leaves_of()
        assert known(other) is not None
        other.columns[column][1] = DIFFERENCES[difference]()
    assert known(other) is None


def test_what_is_remembered_holds_where_gradients_are_recorded_and_where_not():
    with torch.no_grad():
        layout_of(leaves_of(lambda *shape: torch.randn(*shape, requires_grad=True)))
    assert known(leaves_of()) is None
    seen = known(leaves_of(lambda *shape: torch.randn(*shape, requires_grad=True)))
    assert seen.params_require_grad
    assert seen.others_require_grad


def test_tensors_made_in_inference_mode_are_told_apart():
    layout_of(leaves_of())
    with torch.inference_mode():
        inferred = leaves_of()
    assert known(inferred) is None
    assert not layout_of(inferred).writable


def test_members_of_a_vmap_are_told_apart_from_tensors():
    layout_of(leaves_of())
    seen = []
    stacked = leaves_of(lambda *shape: torch.randn(2, *shape))
    columns = stacked.columns
    torch.func.vmap(lambda own: seen.append(known(StepInputs.of(own))) or own[0][0])(columns)
    assert seen == [None]


def test_another_number_of_leaves_is_not_known():
    layout_of(leaves_of(count=3))
    assert known(leaves_of(count=2)) is None
    assert known(StepInputs.of([*leaves_of().columns, leaves_of().params])) is None


def test_no_tensor_is_kept_alive():
    leaves = leaves_of()
    layout_of(leaves)
    gone = [weakref.ref(tensor) for column in leaves.columns for tensor in column]
    del leaves
    gc.collect()
    assert not any(reference() is not None for reference in gone)


def test_only_so_many_are_remembered():
    for size in range(100):
        layout_of(leaves_of(lambda *_, size=size: torch.randn(size)))
    assert len(memory._recent) == memory._REMEMBERED


def test_without_the_guard_nothing_is_remembered_and_all_is_found(monkeypatch):
    expected = layout_of(leaves_of())
    monkeypatch.setattr(memory, "_recent", ())
    monkeypatch.setattr(memory, "_guard_of", None)
    assert layout_of(leaves_of()) == expected
    assert known(leaves_of()) is None


def batches_of(*shapes, **options):
    column = [torch.zeros(shape, **options) for shape in shapes]
    seen = layout_of(StepInputs.of([column, column[:], column[:], column[:]]))
    return seen.batches, seen.batches_in_place


def test_every_leaf_is_in_one_batch_of_its_device_and_dtype():
    shapes = [(64,)] * 20 + [(), (0,), (5, 7), (300, 1000), (300, 1000), (64,), (32, 4)]
    for groups in batches_of(*shapes):
        places = [index for batches in groups for batch in batches for index in batch.indices]
        assert sorted(places) == list(range(len(shapes)))
        assert all(b.indices == sorted(b.indices) for batches in groups for b in batches)


def test_large_leaves_are_cut_into_batches_that_fit_in_the_cache():
    (batches,), (in_place,) = batches_of(*[(1 << 17,)] * 8)
    assert [len(batch.indices) for batch in batches] == [2, 2, 2, 2]
    assert [len(batch.indices) for batch in in_place] == [8]


def test_leaves_among_which_one_tensor_comes_twice_drive_nothing_else_out():
    layout_of(leaves_of())
    twice = leaves_of()
    twice.grads[1] = twice.grads[0]
    for _ in range(100):
        layout_of(twice)
    assert known(leaves_of()) is not None


def test_a_guard_that_cannot_be_made_is_done_without(monkeypatch):
    def changed(*tensors):
        raise AssertionError("this is never called without keywords")

    monkeypatch.setattr(memory, "_guard_of", changed)
    assert layout_of(leaves_of()).ready
    assert known(leaves_of()) is None


def test_of_leaves_that_share_a_storage_one_may_shrink_and_a_clone_of_one_may_grow():
    params = {f"w{index}": torch.full((32,), float(index)) for index in range(9)}
    opt = AdamW()
    moved, _ = opt.update(params, opt.init(params), params)
    others = clone({name: leaf for name, leaf in moved.items() if name != "w0"})
    storages = {leaf.untyped_storage().data_ptr() for leaf in moved.values()}
    assert len(storages) == 1
    moved["w0"].clone().resize_(64).fill_(7.0)
    moved["w0"].resize_(16).fill_(7.0)
    assert_same_bits({name: moved[name] for name in others}, others)
