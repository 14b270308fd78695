"""A run that was killed goes on from its checkpoint as if it had not been, in every format."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

import funcopt
from funcopt.interop import from_state_dict, to_state_dict

from ..cases import assert_same_bits
from . import run_until_killed as run
from .formats import FORMATS

PROJECT = pathlib.Path(funcopt.__file__).parents[1]


def killed_run(kind, directory):
    """Start a run, and kill it once its checkpoint is there."""
    command = [sys.executable, "-m", run.__name__, kind, str(directory)]
    with subprocess.Popen(command, cwd=PROJECT) as process:
        deadline = time.monotonic() + 60
        while not (directory / "saved").exists():
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.by_day(2)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_killed_run_resumes_to_the_bit(kind, tmp_path):
    killed_run(kind, tmp_path)
    template = run.whole(*run.start())
    found = FORMATS[kind][1](tmp_path / "checkpoint", to_state_dict(run.whole(*run.start())))
    resumed = from_state_dict(template, found)
    params, state = resumed["params"], resumed["state"]
    for number in range(run.SAVED, run.STEPS):
        params, state = run.step(number, state, params)

    unbroken, unbroken_state = run.start()
    for number in range(run.STEPS):
        unbroken, unbroken_state = run.step(number, unbroken_state, unbroken)
    assert_same_bits(params, unbroken)
    assert_same_bits(state, unbroken_state)
    assert int(state.step["out"]) == run.STEPS
    assert int(state.step["in"][0]) < run.STEPS
