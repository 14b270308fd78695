"""Whatever in torch takes such a class runs with this one, for real, in two processes."""

import pathlib
import subprocess
import sys
import time

import pytest

from .workers import CONSUMERS, WORLD

ROOT = pathlib.Path(__file__).parents[2]

# Torch takes some seconds to import, and a machine may be busy; what hangs is to be stopped.
LONGEST = 90


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_twenty_steps_are_those_of_torch_to_the_bit(consumer, tmp_path):
    logs = [tmp_path / f"process-{rank}.txt" for rank in range(WORLD)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, "-m", "tests.torchscript.workers", consumer, str(rank)]
            with log.open("w") as output:
                processes.append(
                    subprocess.Popen([*command, tmp_path], cwd=ROOT, stdout=output, stderr=output)
                )
        statuses = _wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    told = [
        f"{log.name}, {'stopped' if status is None else f'status {status}'}:\n{log.read_text()}"
        for log, status in zip(logs, statuses, strict=True)
    ]
    assert statuses == [0] * WORLD, "\n".join(told)


def _wait(processes: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """Wait until all have ended, or one has failed, and the others soon after.

    Returns:
        The status of each, None if it is still running.
    """
    deadline = time.monotonic() + LONGEST
    while True:
        statuses = [process.poll() for process in processes]
        if None not in statuses or time.monotonic() > deadline:
            return statuses
        if any(statuses):  # the others may wait for it in vain
            deadline = min(deadline, time.monotonic() + 5)
        time.sleep(0.05)
