"""Runs a function on several processes that meet over gloo on loopback, and never hangs."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pathlib
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["RankError", "run_ranks"]

# The ranks are forked from a process that has imported these and done nothing else, which takes
# a hundredth of a second, where importing them takes seconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed.tensor", "torch._dynamo", "funcopt"])

# How long others are listened to once one has failed, to tell a cause from what follows from it.
_GRACE = 0.3


class RankError(RuntimeError):
    """A rank failed, died or hung. The message says which, with its traceback."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0
) -> list[Any]:
    """Call `function(rank, *args)` on ranks of a gloo group, and return what each returned.

    Args:
        world_size: How many processes.
        function: A function of a module, not a lambda or closure. `torch.distributed` is
            initialized when it is called, with one thread to each rank. What it returns must
            pickle; its tensors come back as copies.
        args: What it is given beside the rank. They must pickle.
        timeout: The seconds after which every rank that has not returned is killed.

    Raises:
        RankError: If a rank raises, dies or takes too long. The others are killed.
    """
    with tempfile.TemporaryDirectory() as directory:
        processes, connections = [], []
        try:
            for rank in range(world_size):
                own, given = _CONTEXT.Pipe()
                process = _CONTEXT.Process(
                    target=_run,
                    args=(given, directory, rank, world_size, timeout, function, args),
                    name=f"rank {rank}",
                    daemon=True,
                )
                process.start()
                given.close()
                processes.append(process)
                connections.append(own)
            return _collect(connections, processes, pathlib.Path(directory), timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for connection in connections:
                connection.close()


def _run(
    connection: Connection,
    directory: str,
    rank: int,
    world_size: int,
    timeout: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    with open(f"{directory}/stack {rank}", "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        try:
            torch.set_num_threads(1)
            os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
            dist.init_process_group(
                "gloo",
                init_method=f"file://{directory}/meeting",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
            # Pickled here, as a connection would send a tensor as a handle to this memory.
            message = pickle.dumps((True, function(rank, *args)))
        except BaseException:
            message = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(message)
        # Stay until everyone is done: who leaves early makes others fail with another message.
        connection.poll(timeout)


def _collect(
    connections: list[Connection], processes: list[Any], directory: pathlib.Path, timeout: float
) -> list[Any]:
    """Wait for a result of every rank."""
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(connections):
        waiting = [c for r, c in enumerate(connections) if r not in results and r not in failures]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = connections.index(connection)
            try:
                succeeded, value = pickle.loads(connection.recv_bytes())
                (results if succeeded else failures)[rank] = value
            except EOFError:
                processes[rank].join()
                failures[rank] = f"It died with exit code {processes[rank].exitcode}."
        if failures:
            deadline = min(deadline, time.monotonic() + _GRACE)
    if failures:
        raise RankError(_tell(failures))
    hung = [rank for rank in range(len(connections)) if rank not in results]
    if hung:
        told = {rank: _stack_of(processes[rank], directory / f"stack {rank}") for rank in hung}
        raise RankError(f"Not done after {timeout:g} s, and killed. {_tell(told, 'hung')}")
    return [results[rank] for rank in range(len(connections))]


def _tell(failures: dict[int, str], what: str = "failed") -> str:
    """List failures, those that died first, since others fail for want of them."""
    ranks = sorted(failures, key=lambda rank: not failures[rank].startswith("It died"))
    return "\n".join(f"rank {rank} {what}:\n{failures[rank]}" for rank in ranks)


def _stack_of(process: Any, path: pathlib.Path) -> str:
    """Return where a process hangs."""
    if path.exists():  # then it listens
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.2)
    return path.read_text() if path.exists() else "It never started."
