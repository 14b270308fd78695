"""One thread for small tensors, and nobody else notices."""

import threading

import pytest
import torch

from funcopt import AdamW
from funcopt._core import tensors
from funcopt._core.tensors import on_one_thread
from funcopt._engine import memory


@pytest.fixture
def two_threads():
    count = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(count)


def in_another_thread(question):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(question()))
    thread.start()
    thread.join(10)
    return answers[0]


def test_operators_within_start_no_threads_and_afterwards_do_again(two_threads):
    assert on_one_thread(torch.get_num_threads) == 1
    assert torch.get_num_threads() == 2


def test_it_ends_with_an_error_too(two_threads):
    with pytest.raises(ValueError, match="within"):
        on_one_thread(int, "within")
    assert torch.get_num_threads() == 2


def test_no_other_thread_notices_be_it_new_or_old(two_threads):
    assert on_one_thread(in_another_thread, torch.get_num_threads) == 2
    assert in_another_thread(torch.get_num_threads) == 2


def test_where_the_runtime_is_not_found_nothing_is_done(two_threads, monkeypatch):
    monkeypatch.setattr(tensors, "_setter", lambda: None)
    assert on_one_thread(torch.get_num_threads) == 2


def test_small_leaves_are_moved_by_one_thread_and_large_ones_by_all(two_threads, monkeypatch):
    counts = []
    fused = AdamW.rule.kernel("fused")

    def step_(inputs, *rest):
        counts.append((inputs.params[0].numel(), torch.get_num_threads()))
        fused.step_(inputs, *rest)

    monkeypatch.setitem(AdamW.rule._loaded, "fused", fused._replace(step_=step_))
    monkeypatch.setattr(memory, "_recent", ())
    params = [torch.zeros(7) for _ in range(10)] + [torch.zeros(10_000)]
    opt = AdamW(kernel="fused")
    state = opt.init(params)
    opt.update(params, state, params)
    opt.update_([p.clone() for p in params], state, params)
    assert sorted(counts) == [(7, 1), (7, 1), (10_000, 2), (10_000, 2)]
