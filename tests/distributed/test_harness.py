"""The harness: what every rank returns, and what is said of one that fails, dies or hangs."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from .harness import RankError, run_ranks


def add_up(rank, start):
    total = torch.tensor(float(start + rank))
    dist.all_reduce(total)
    return rank, total, torch.full((100_000,), float(rank))


def fail_at_one(rank):
    if rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def die_at_one(rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_at_zero(rank):
    if rank == 0:
        time.sleep(1000)


def test_each_rank_gives_its_result_in_order():
    for world_size in (1, 2, 4):
        results = run_ranks(world_size, add_up, 10)
        assert [rank for rank, _, _ in results] == list(range(world_size))
        total = sum(10 + rank for rank in range(world_size))
        assert all(found == total for _, found, _ in results)
        assert all(torch.equal(big, torch.full((100_000,), float(r))) for r, _, big in results)


def test_a_rank_that_fails_takes_the_others_down_with_its_own_message():
    start = time.monotonic()
    with pytest.raises(
        RankError, match=r"(?s)^rank 1 failed:.*fail_at_one.*ValueError: the reason"
    ):
        run_ranks(3, fail_at_one, timeout=100)
    assert time.monotonic() - start < 30


def test_a_rank_that_dies_is_named_before_those_that_miss_it():
    with pytest.raises(RankError, match=r"^rank 1 failed:\nIt died with exit code -9"):
        run_ranks(3, die_at_one, timeout=100)


def test_a_rank_that_hangs_is_killed_and_named_with_the_line_where_it_hangs():
    with pytest.raises(RankError, match=r"(?s)after 3 s.*rank 0 hung:.*in hang_at_zero") as raised:
        run_ranks(2, hang_at_zero, timeout=3)
    assert "rank 1" not in str(raised.value)
