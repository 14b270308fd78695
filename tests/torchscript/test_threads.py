"""Many threads at one optimizer, which TorchScript runs without Python's lock."""

import os
import signal
import threading
import time

import pytest
import torch

import funcopt

from .trainers import FORMS, trainer

THREADS = 6


def in_threads(work):
    """Call work(0), work(1), ... at the same time, and raise what one of them raised."""
    barrier = threading.Barrier(THREADS, timeout=60)
    errors = []

    def run(index):
        barrier.wait()
        try:
            work(index)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a thread waits for ever"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("listed", [True, False])
def test_a_cold_optimizer_loses_no_state(form, listed):
    params = [torch.ones(3) for _ in range(40 * THREADS)]
    made = trainer(form, params if listed else [], _allow_empty_param_list=True)

    def work(index):
        for param in params[index::THREADS]:
            made.step_param(param, torch.ones(3))
        for param in params[index::THREADS]:
            made.step_param(param, torch.ones(3))

    in_threads(work)
    state = made.state()
    assert len(state) == len(params)
    assert all(state[param]["step"] == 2 for param in params)
    assert all(torch.equal(param, params[0]) for param in params)


@pytest.mark.parametrize("form", FORMS)
def test_steps_exclude_each_other(form, monkeypatch):
    under_way, together = [], []
    step_ = funcopt.AdamW.update_

    def slowly(*args):
        under_way.append(None)
        together.append(len(under_way))
        time.sleep(0.002)  # while other threads may run
        under_way.pop()
        return step_(*args)

    monkeypatch.setattr(funcopt.AdamW, "update_", slowly)
    params = [torch.ones(3) for _ in range(THREADS)]
    made = trainer(form, params)
    in_threads(lambda index: made.step_param(params[index], torch.ones(3)))
    assert together == [1] * THREADS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False])
def test_no_step_on_a_shared_parameter_is_lost(form, shared):
    param = torch.zeros(1000)
    # Each step subtracts exactly 1, whatever came before.
    options = {"lr": 1.0, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
    made = [trainer(form, [param], **options) for _ in range(1 if shared else THREADS)]

    def work(index):
        for _ in range(40):
            made[0 if shared else index].step([torch.ones(1000)])

    in_threads(work)
    assert torch.equal(param, torch.full((1000,), -40.0 * THREADS))
    assert sum(each.state()[param]["step"] for each in made) == 40 * THREADS


def test_a_step_that_was_interrupted_keeps_nobody_waiting():
    param = torch.ones(3)
    made = trainer("unscripted", [param])
    torch.ops.funcopt.begin_step()  # and Ctrl-C before its end
    made.step([torch.ones(3)])
    other = threading.Thread(target=made.step, args=([torch.ones(3)],), daemon=True)
    other.start()
    other.join(timeout=60)
    assert made.state()[param]["step"] == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_does_not_wait_for_a_thread_that_it_does_not_have():
    holds, go_on = threading.Event(), threading.Event()

    def step():
        torch.ops.funcopt.begin_step()
        holds.set()
        go_on.wait(60)
        torch.ops.funcopt.end_step()

    thread = threading.Thread(target=step, daemon=True)
    thread.start()
    holds.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # which ends a child that waits
        torch.ops.funcopt.begin_step()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    go_on.set()
    thread.join()
    assert status == 0


@pytest.mark.parametrize("form", FORMS)
def test_an_error_keeps_no_other_thread_waiting(form):
    made = trainer(form, [torch.ones(3)])

    def work(index):
        for _ in range(5):
            if index % 2:
                made.step([torch.ones(3)])
            else:
                with pytest.raises((ValueError, RuntimeError), match="shape"):
                    made.step([torch.ones(4)])

    in_threads(work)
    assert made.state()[made.parameters_now()[0]]["step"] == 5 * THREADS // 2
